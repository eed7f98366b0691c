"""The stochastic recurrent network: a state space on top of a deterministic recurrence.

    d_t = GRU(x_{t-1}, d_{t-1})
    z_t ~ Normal(prior(z_{t-1}, d_t)),   x_t ~ Bernoulli(decoder(z_t, d_t))
    a_t = GRU([d_t, x_t], a_{t+1})
    q(z_t | z_{t-1}, x_{1:T}) = Normal(prior mean(z_{t-1}, d_t) + shift(z_{t-1}, a_t), scale(z_{t-1}, a_t))

The guide states only how far its mean is from the prior's (residual form). Fraccaro et al. (2016), Sequential neural
models with stochastic layers, arXiv:1605.07571.
"""

from typing import Any

import pyro
from jaxtyping import Float, Int
from torch import Tensor, nn

import pyro_elbo as pe
from models.cells import GRU, MLP, TIME, SequenceModel, bernoulli, gaussian, summaries


class SRNN(SequenceModel):
    """The stochastic recurrent network of Fraccaro et al.; its guide smooths.

    Args:
        x_dim: features of a frame.
        z_dim: latent dimensions of a frame.
        hidden: width of both recurrences and of all hidden layers.
    """

    def __init__(self, x_dim: int = 88, z_dim: int = 16, hidden: int = 64) -> None:
        super().__init__(x_dim, z_dim)
        self.cell, self.backward_cell = GRU(x_dim, hidden), GRU((hidden, x_dim), hidden)
        self.prior = MLP((z_dim, hidden), hidden, 2 * z_dim)
        self.decoder = MLP((z_dim, hidden), hidden, x_dim)
        self.encoder = MLP((z_dim, hidden), hidden, 2 * z_dim)

    @property
    def output(self) -> nn.Linear:
        return self.decoder.last

    def model(
        self, x: Float[Tensor, "n time x_dim"], lengths: Int[Tensor, " n"] | None = None, horizon: int = 0
    ) -> Float[Tensor, "*particles n all_time x_dim"]:
        return self.scan(self.model_step, self._start(x), x, lengths, horizon)

    def guide(self, x: Float[Tensor, "n time x_dim"], lengths: Int[Tensor, " n"] | None = None) -> None:
        start_z, start_d = self._start(x)
        past = pe.scan(self.recur, start_d, x, lengths, dim=TIME)[1]
        seen = summaries(self.backward_cell, (past, x), lengths, reverse=True)
        self.scan(self.guide_step, start_z, (past, seen), lengths)

    def model_step(self, carry: tuple[Tensor, Tensor], x_t: Tensor | None) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Draw z_t, and x_t unless it is given; the carry holds z_{t-1} and d_t."""
        z, d = carry
        z = pyro.sample("z", gaussian(*self.prior(z, d).chunk(2, -1)))
        x = pyro.sample("x", bernoulli(self.decoder(z, d)), obs=x_t)
        return (z, self.recur(d, x)[0]), x

    def guide_step(self, z: Tensor, xs: Any) -> tuple[Tensor, None]:
        """Draw z_t given z_{t-1} and the summaries of the past and of what is to come."""
        d, seen = xs
        prior_mean, _ = self.prior(z, d).chunk(2, -1)
        shift, raw_scale = self.encoder(z, seen).chunk(2, -1)
        return pyro.sample("z", gaussian(prior_mean + shift, raw_scale)), None

    def recur(self, d: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """The step of the deterministic recurrence: d_{t+1}, and d_t."""
        return self.cell(d, x_t), d

    def _start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cell.state.weight.new_zeros(len(x), self.z_dim), self.cell.start(x)
