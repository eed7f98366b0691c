"""The deep Markov model: a nonlinear state space with gated transitions.

    z_t ~ Normal(transition(z_{t-1})),   x_t ~ Bernoulli(emitter(z_t))
    transition: g = gate(z),  mean = (1 - g) ⊙ (A z + b) + g ⊙ proposal(z),  scale = softplus(linear(relu(proposal(z))))
    q(z_t | z_{t-1}, s_t): c = ½ (tanh(W z_{t-1} + b) + s_t),  mean and scale are functions of c

The summary s_t is the state of a recurrent network that ran over x_{t:T} backward (smoothing) or over x_{1:t} forward
(filtering). In residual form, which learns faster where z must be remembered, the mean is that of p(z_t | z_{t-1})
plus a function of c. :func:`models.cells.gaussian` bounds all means and scales. In semi-amortized inference s_t is
optimized for each sequence instead. Krishnan, Shalit, Sontag (2017), Structured inference networks for nonlinear state
space models, arXiv:1609.09869.
"""

from collections.abc import Callable
from typing import Literal, get_args

import pyro
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.cells import GRU, MLP, SequenceModel, bernoulli, gaussian, summaries

Posterior = Literal["smoothing", "filtering"]


class Transition(nn.Module):
    """p(z_t | z_{t-1}): a gate chooses, for each dimension, between a linear and a nonlinear mean.

    The linear map starts as the identity and the gate in favor of it, so that an untrained model remembers.
    """

    def __init__(self, z_dim: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.proposal = MLP(z_dim, hidden, z_dim), MLP(z_dim, hidden, z_dim)
        self.linear, self.scale = nn.Linear(z_dim, z_dim), nn.Linear(z_dim, z_dim)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        nn.init.constant_(self.gate.last.bias, -1.0)

    def forward(self, z: Float[Tensor, "... z_dim"]) -> tuple[Tensor, Tensor]:
        """Return the mean and the raw scale of the next z, which :func:`~models.cells.gaussian` bounds."""
        gate, proposal = torch.sigmoid(self.gate(z)), self.proposal(z)
        return (1 - gate) * self.linear(z) + gate * proposal, self.scale(torch.relu(proposal))


class Combiner(nn.Module):
    """Mean and raw scale of q(z_t | z_{t-1}, s_t), from the average of the last z's features and the summary of x."""

    def __init__(self, z_dim: int, rnn: int) -> None:
        super().__init__()
        self.state, self.output = nn.Linear(z_dim, rnn), nn.Linear(rnn, 2 * z_dim)

    def forward(self, z: Float[Tensor, "... z_dim"], seen: Float[Tensor, "... rnn"]) -> tuple[Tensor, ...]:
        """Return the two halves of the output."""
        return self.output(0.5 * (torch.tanh(self.state(z)) + seen)).chunk(2, -1)


class DMM(SequenceModel):
    """The deep Markov model of Krishnan, Shalit and Sontag.

    Args:
        x_dim: features of a frame.
        z_dim: latent dimensions of a frame.
        emission: width of the emitter's two hidden layers.
        transition: width of the transition's hidden layers.
        rnn: width of the guide's recurrence.
        posterior: whether the guide is smoothing, q(z_t | z_{t-1}, x_{t:T}), which can be the posterior, since given
            z_{t-1} earlier frames say nothing of z_t; or filtering, q(z_t | z_{t-1}, x_{1:t}).
        residual: whether the guide states how far its mean is from the transition's.
        dropout: share of the features of x, and of its summaries, that the guide does not see while training.
    """

    def __init__(
        self,
        x_dim: int = 88,
        z_dim: int = 32,
        emission: int = 64,
        transition: int = 64,
        rnn: int = 128,
        *,
        posterior: Posterior = "smoothing",
        residual: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(x_dim, z_dim)
        if posterior not in get_args(Posterior):
            raise ValueError(f"posterior must be one of {get_args(Posterior)}, got {posterior!r}.")
        self.posterior: Posterior = posterior
        self.residual = residual
        self.transition, self.emitter = Transition(z_dim, transition), MLP(z_dim, emission, x_dim, layers=2)
        self.cell, self.combiner = GRU(x_dim, rnn), Combiner(z_dim, rnn)
        self.dropout, self.start = nn.Dropout(dropout), nn.Parameter(torch.zeros(z_dim))

    @property
    def output(self) -> nn.Linear:
        return self.emitter.last

    def model(
        self, x: Float[Tensor, "n time x_dim"], lengths: Int[Tensor, " n"] | None = None, horizon: int = 0
    ) -> Float[Tensor, "*particles n all_time x_dim"]:
        return self.scan(self.model_step, self.start.expand(len(x), -1), x, lengths, horizon)

    def guide(self, x: Float[Tensor, "n time x_dim"], lengths: Int[Tensor, " n"] | None = None) -> None:
        self.infer(self.summarize(x, lengths), lengths)

    def summarize(
        self, x: Float[Tensor, "n time x_dim"], lengths: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n time rnn"]:
        """Return the summary s_t of every frame, the states of the recurrent network."""
        return self.dropout(summaries(self.cell, self.dropout(x), lengths, reverse=self.posterior == "smoothing"))

    def infer(self, seen: Float[Tensor, "n time rnn"], lengths: Int[Tensor, " n"] | None = None) -> None:
        """Draw z given the summary of every frame."""
        self.scan(self.guide_step, self.start.expand(len(seen), -1), seen, lengths)

    def semi_amortized(
        self, x: Float[Tensor, "n time x_dim"], lengths: Int[Tensor, " n"] | None = None
    ) -> Callable[..., None]:
        """Return a guide of x whose summaries are parameters of their own, started where the network puts them.

        A network that has seen few sequences errs on others. Trained alone, with the model held fixed, the parameters
        (``"summaries"`` in Pyro's store, shape (n, time, rnn)) undo that, and the bound stays one on log p(x) of the
        same model. Clear the store, or scope it, before the guide of other sequences. Kim, Wiseman, Miller, Sontag,
        Rush (2018), Semi-amortized variational autoencoders, arXiv:1802.02550.
        """
        with torch.no_grad():
            own = nn.Parameter(self.summarize(x, lengths).contiguous())  # others would be copied by the store

        def guide(x: Tensor, lengths: Tensor | None = None) -> None:
            pyro.param("summaries", own)
            self.infer(own, lengths)

        return guide

    def model_step(self, z: Tensor, x_t: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draw z_t given z_{t-1}, and x_t unless it is given."""
        z = pyro.sample("z", gaussian(*self.transition(z)))
        return z, pyro.sample("x", bernoulli(self.emitter(z)), obs=x_t)

    def guide_step(self, z: Tensor, seen: Tensor) -> tuple[Tensor, None]:
        """Draw z_t given z_{t-1} and the state of the recurrent network."""
        loc, raw_scale = self.combiner(z, seen)
        if self.residual:
            loc = self.transition(z)[0] + loc
        return pyro.sample("z", gaussian(loc, raw_scale)), None
