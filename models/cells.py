"""Parts of the sequence models: cells and Gaussians for any batch, summaries over time, generating, forecasting.

Tensors have shape (..., features), with particles to the left of the sequences. Networks see x only inside
:func:`pyro_elbo.scan`: there padding, which may be NaN, reaches neither a value nor a gradient.
"""

import functools
import operator
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from pyro import poutine
from torch import Tensor, nn

import pyro_elbo as pe

TIME = -2  # of a batch of sequences; counted from the right, where particles do not shift it
BOUND = 10.0  # of the mean of z, and about that of its scale: far outside of what training needs
SMALLEST_SCALE = 0.03


class Joint(nn.Module):
    """A linear map of several inputs, as a sum of one map each.

    The inputs need only broadcast, and what has no part in a recurrence can be computed for all steps at once.

    Args:
        inputs: features of each.
        outputs: features of the sum.
    """

    def __init__(self, inputs: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(n, outputs, bias=i == 0) for i, n in enumerate(inputs))

    def forward(self, *xs: Float[Tensor, "..."]) -> Float[Tensor, "... outputs"]:
        """Return the sum."""
        return functools.reduce(operator.add, (part(x) for part, x in zip(self.parts, xs, strict=True)))


class MLP(nn.Module):
    """A network of one or several inputs.

    Args:
        inputs: features of each input.
        hidden: width of the hidden layers.
        outputs: features of the output.
        layers: number of hidden layers.
    """

    def __init__(self, inputs: int | Sequence[int], hidden: int, outputs: int, layers: int = 1) -> None:
        super().__init__()
        self.first = Joint([inputs] if isinstance(inputs, int) else inputs, hidden)
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.last = nn.Linear(hidden, outputs)

    def forward(self, *xs: Float[Tensor, "..."]) -> Float[Tensor, "... outputs"]:
        """Return the output."""
        x = self.first(*xs).relu()
        for layer in self.hidden:
            x = layer(x).relu()
        return self.last(x)


class GRU(nn.Module):
    """A gated recurrent cell, ``torch.nn.GRUCell`` for one or several inputs and any number of batch dimensions.

    Args:
        inputs: features of each input.
        hidden: features of the state.
    """

    def __init__(self, inputs: int | Sequence[int], hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.inputs = Joint([inputs] if isinstance(inputs, int) else inputs, 3 * hidden)
        self.state = nn.Linear(hidden, 3 * hidden)

    def forward(self, state: Float[Tensor, "... hidden"], *xs: Float[Tensor, "..."]) -> Float[Tensor, "... hidden"]:
        """Return the next state."""
        reset_x, update_x, new_x = self.inputs(*xs).chunk(3, -1)
        reset_h, update_h, new_h = self.state(state).chunk(3, -1)
        reset, update = torch.sigmoid(reset_x + reset_h), torch.sigmoid(update_x + update_h)
        new = torch.tanh(new_x + reset * new_h)
        return new + update * (state - new)

    def start(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n hidden"]:
        """The state before the first step: zero for every sequence of x."""
        return self.state.weight.new_zeros(len(x), self.hidden)


def gaussian(loc: Float[Tensor, "... z"], raw_scale: Float[Tensor, "... z"]) -> dist.Independent:
    """Normal(c tanh(loc / c), s + c tanh(softplus(raw_scale) / c)) with c = 10 and s = 0.03, independent dimensions.

    While z is of order 1 this is Normal(loc, s + softplus(raw_scale)), nearly. Whatever z_{t-1} is, z_t is of order c,
    so a recurrence of z through unbounded networks cannot grow with time. The KL between two of these Gaussians is less
    than (4 c² + (c + s)²) / (2 s²) ≈ 2.8e5 nats a dimension; without s or c nothing bounds it.
    """
    scale = SMALLEST_SCALE + _bounded(nn.functional.softplus(raw_scale))
    return dist.Normal(_bounded(loc), scale).to_event(1)


def _bounded(x: Tensor) -> Tensor:
    """A smooth bound: x near zero, never beyond ±BOUND."""
    return BOUND * torch.tanh(x / BOUND)


def bernoulli(logits: Float[Tensor, "... x"]) -> dist.Independent:
    """Binary features, independent given their log odds."""
    return dist.Bernoulli(logits=logits).to_event(1)


def summaries(
    cell: GRU,
    xs: Float[Tensor, "n time d"] | Sequence[Float[Tensor, "n time _"]],
    lengths: Int[Tensor, " n"] | None,
    *,
    reverse: bool,
) -> Float[Tensor, "n time hidden"]:
    """Return the states of a recurrent encoder: at t of x up to t, or with ``reverse`` of x from t to the end."""

    def step(state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        state = cell(state, *x)
        return state, state

    xs = (xs,) if isinstance(xs, Tensor) else xs
    return pe.scan(step, cell.start(xs[0]), xs, lengths, reverse=reverse, dim=TIME)[1]


class SequenceModel(nn.Module):
    """A model of binary sequences with a latent z for every frame: model, guide, reconstructions and forecasts.

    Args:
        x_dim: features of a frame.
        z_dim: latent dimensions of a frame.
    """

    def __init__(self, x_dim: int, z_dim: int) -> None:
        super().__init__()
        self.x_dim, self.z_dim = x_dim, z_dim

    @abstractmethod
    def model(
        self, x: Float[Tensor, "n time x_dim"], lengths: Int[Tensor, " n"] | None = None, horizon: int = 0
    ) -> Float[Tensor, "*particles n all_time x_dim"]:
        """The generative program: observes x, draws ``horizon`` more frames, and returns them all."""

    @abstractmethod
    def guide(self, x: Float[Tensor, "n time x_dim"], lengths: Int[Tensor, " n"] | None = None) -> None:
        """The posterior's program: draws z for every frame of x."""

    @property
    @abstractmethod
    def output(self) -> nn.Linear:
        """The layer that gives the log odds of x."""

    @torch.no_grad()
    def start_from(self, frames: Float[Tensor, "frames x_dim"]) -> None:
        """Set the output's bias to the log odds of each feature among ``frames``, so that training starts there."""
        frequency = (frames.sum(0) + 0.5) / (len(frames) + 1)
        self.output.bias.copy_(torch.logit(frequency))

    def scan(
        self,
        step: Callable[[Any, Any], tuple[Any, Any]],
        init: Any,
        xs: Any,
        lengths: Int[Tensor, " n"] | None,
        horizon: int = 0,
    ) -> Any:
        """Register the parameters with Pyro, run ``step`` over a batch of sequences, and return its outs."""
        pyro.module(type(self).__name__.lower(), self)
        first = xs if isinstance(xs, Tensor) else xs[0]
        with pyro.plate("sequences", len(first)):
            return pe.scan(step, init, xs, lengths, horizon=horizon, dim=TIME)[1]

    @torch.no_grad()
    def forecast(self, x: Float[Tensor, "n time x_dim"], horizon: int) -> Float[Tensor, "n horizon x_dim"]:
        """Draw z of the given frames from the guide, and ``horizon`` more frames from the model.

        Networks with dropout should be in ``eval()``.
        """
        seen = poutine.trace(self.guide).get_trace(x)
        return poutine.replay(self.model, trace=seen)(x, horizon=horizon)[:, x.shape[1] :]

    @torch.no_grad()
    def generate(self, num_sequences: int, length: int) -> Float[Tensor, "num_sequences length x_dim"]:
        """Draw sequences from the model: forecasts without a past."""
        like = next(self.parameters())
        return self.model(like.new_zeros(num_sequences, 0, self.x_dim), horizon=length)
