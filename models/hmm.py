r"""A hidden Markov model whose state is summed out, and its exact log evidence.

.. math:: k_t \sim p(k_t \mid k_{t-1}), \qquad x_t \sim p(x_t \mid k_t)

The model has no guide: the sum over all paths of the state is part of the objective.

References:
    Rabiner (1989), A tutorial on hidden Markov models and selected applications in speech recognition.
"""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import pyro_elbo as pe


class HMM(nn.Module):
    """Sequences of numbers or vectors (Gaussian emissions), or of symbols (categorical emissions).

    Args:
        states: the number of states.
        symbols: the number of symbols; None for numbers.
        channels: the length of a vector, whose entries are independent given the state; None for single numbers.
    """

    def __init__(self, states: int, symbols: int | None = None, channels: int | None = None) -> None:
        super().__init__()
        self.symbols, self.channels = symbols, channels
        self.step = nn.Parameter(torch.eye(states) + 0.1 * torch.rand(states, states))
        self.emit = nn.Parameter(torch.randn(states, symbols or channels or 1))
        self.log_scale = nn.Parameter(torch.zeros(states, channels or 1))

    @torch.no_grad()
    def start_from(self, groups: Sequence[Float[Tensor, "frames d"]]) -> None:
        """Start with the Gaussian emissions of groups of frames, one per state."""
        for k, frames in enumerate(groups):
            self.emit[k], self.log_scale[k] = frames.mean(0), frames.std(0).log()

    def transition(self, k: Int[Tensor, "*values"]) -> dist.Categorical:
        """Return p(k_t | k_{t-1})."""
        return dist.Categorical(logits=self.step[k])

    def emission(self, k: Int[Tensor, "*values"]) -> dist.TorchDistribution:
        """Return p(x_t | k_t)."""
        if self.symbols is not None:
            return dist.Categorical(logits=self.emit[k])
        if self.channels is None:
            return dist.Normal(self.emit[k, 0], self.log_scale[k, 0].exp())
        return dist.Normal(self.emit[k], self.log_scale[k].exp()).to_event(1)

    def model(self, x: Tensor, lengths: Tensor | None = None) -> None:
        """Sequences of shape (sequences, T), or (sequences, T, channels); the state before the first step is 0."""
        pyro.module("hmm", self)

        def step(k: Tensor, x_t: Tensor) -> tuple[Tensor, None]:
            k = pyro.sample("k", self.transition(k), infer={"enumerate": "parallel"})
            pyro.sample("x", self.emission(k), obs=x_t)
            return k, None

        with pyro.plate("sequences", len(x)):
            pe.scan(step, torch.tensor(0), x, lengths, dim=1)

    def guide(self, x: Tensor, lengths: Tensor | None = None) -> None:
        """Return nothing: no latent is left to guide."""

    def log_evidence(self, x: Tensor, lengths: Tensor | None = None) -> Float[Tensor, " sequences"]:
        """Return log p(x) of each sequence (nats) by the forward algorithm."""
        states, rows = torch.arange(len(self.step)), torch.arange(len(x))
        ends = torch.full(x.shape[:1], x.shape[1]) if lengths is None else lengths
        log_step = self.step.log_softmax(-1)
        message = log_step[0] + self.emission(states).log_prob(x[:, :1])
        for t in range(1, x.shape[1]):
            new = (message.unsqueeze(-1) + log_step).logsumexp(-2)
            last = x[rows, (ends - 1).clamp(max=t)]  # padding may hold any value
            new = new + self.emission(states).log_prob(last.unsqueeze(1))
            message = torch.where((t < ends).unsqueeze(-1), new, message)
        return message.logsumexp(-1)
