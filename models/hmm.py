r"""A hidden Markov model whose state is summed out, and its exact log evidence.

.. math:: k_t \sim p(k_t \mid k_{t-1}), \qquad x_t \sim p(x_t \mid k_t)

The model has no guide: the sum over all paths of the state is part of the objective.

References:
    Rabiner (1989), A tutorial on hidden Markov models and selected applications in speech recognition.
"""

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

import pyro_elbo as pe


class HMM(PyroModule):
    """Sequences of numbers (Gaussian emissions), or of symbols (categorical emissions).

    Args:
        states: the number of states.
        symbols: the number of symbols; None for numbers.
    """

    def __init__(self, states: int, symbols: int | None = None) -> None:
        super().__init__()
        self.symbols = symbols
        self.step = PyroParam((torch.eye(states) + 0.1 * torch.rand(states, states)).softmax(-1), constraints.simplex)
        if symbols is None:
            self.loc, self.scale = PyroParam(torch.randn(states)), PyroParam(torch.ones(states), constraints.positive)
        else:
            self.emit = PyroParam(torch.randn(states, symbols).softmax(-1), constraints.simplex)

    def emission(self, k: Int[Tensor, "*values"]) -> dist.TorchDistribution:
        """Return p(x | k)."""
        return dist.Normal(self.loc[k], self.scale[k]) if self.symbols is None else dist.Categorical(self.emit[k])

    def model(self, x: Tensor, lengths: Tensor | None = None) -> None:
        """Sequences of shape (T, sequences); the state before the first step is 0."""

        def step(k: Tensor, x_t: Tensor) -> tuple[Tensor, None]:
            k = pyro.sample("k", dist.Categorical(self.step[k]), infer={"enumerate": "parallel"})
            pyro.sample("x", self.emission(k), obs=x_t)
            return k, None

        with pyro.plate("sequences", x.shape[1]):
            pe.scan(step, torch.tensor(0), x, lengths)

    def guide(self, x: Tensor, lengths: Tensor | None = None) -> None:
        """Return nothing: no latent is left to guide."""

    def log_evidence(self, x: Tensor, lengths: Tensor | None = None) -> Float[Tensor, " sequences"]:
        """Return log p(x) of each sequence (nats) by the forward algorithm."""
        states = torch.arange(len(self.step))
        ends = torch.full(x.shape[1:], len(x)) if lengths is None else lengths
        message = self.step[0].log() + self.emission(states).log_prob(x[0].unsqueeze(-1))
        for t in range(1, len(x)):
            new = (message.unsqueeze(-1) + self.step.log()).logsumexp(-2)
            new = new + self.emission(states).log_prob(x[t].unsqueeze(-1))
            message = torch.where((t < ends).unsqueeze(-1), new, message)
        return message.logsumexp(-1)
