r"""Networks that predict an attribute from a latent, r(s | z), each trained by an optimizer of its own.

A critic follows the gradient of its own loss, -E log r(s | z), while the programs see it as a constant. It takes one
step per step of the programs, whatever drives them.

References:
    Ganin, Lempitsky (2015), arXiv:1409.7495; Barber, Agakov (2003), The IM algorithm, NeurIPS.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import one_hot

from pyro_elbo.assumptions import check_or_defer
from pyro_elbo.errors import DataError

PerRow = Float[Tensor, "particles rows"]
Attribute = Float[Tensor, "rows columns"]
MOST_LEVELS = 100  # whole numbers beyond are counts rather than levels


@dataclass(frozen=True)
class CriticSpec:
    """The architecture and training settings of a critic.

    Attributes:
        inputs: elements of a row of z, and of the attribute that is conditioned on.
        columns: number of columns of the attribute.
        levels: number of levels of each column of whole numbers from 0; None for real numbers.
        hidden: widths of the hidden layers.
        lr: learning rate of Adam.
        seed: seed of the initial weights; torch's own random stream is left alone.
    """

    inputs: int
    columns: int
    levels: tuple[int, ...] | None
    hidden: tuple[int, ...]
    lr: float
    seed: int

    def make(self, s: "Attribute") -> "Critic":
        """Build the critic of an attribute whose first rows are ``s``."""
        critic = NumberCritic(self, 2 * self.columns) if self.levels is None else LevelCritic(self, prod(self.levels))
        return critic.to(s).standardize(s)


class Critic(nn.Module):
    """r(s | z): a network and its optimizer."""

    def __init__(self, spec: CriticSpec, outputs: int) -> None:
        super().__init__()
        self.spec, widths = spec, (spec.inputs, *spec.hidden)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
            self.network = nn.Sequential(*layers, nn.Linear(widths[-1], outputs))
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=spec.lr)

    def standardize(self, s: Attribute) -> "Critic":
        """Adopt the location and spread of the first rows, where the critic models numbers."""
        return self

    def frozen(self, z: Float[Tensor, "particles rows inputs"]) -> Tensor:
        """Return the parameters of r at z; their gradient reaches z and not the critic."""
        return functional_call(self.network, {n: p.detach() for n, p in self.network.named_parameters()}, (z,))

    def loss(self, z: Float[Tensor, "particles rows inputs"], s: Attribute, rows: Tensor) -> Float[Tensor, ""]:
        """Return the mean of -log r(s | z) in nats; its gradient reaches the critic and not z."""
        log_prob = self.log_prob(self.network(z.detach()), s)
        return -torch.where(rows, log_prob, 0.0).sum() / (rows.sum() * len(z))

    def accept(self, gradients: Sequence[Tensor]) -> None:
        """Store gradients for the next step."""
        for p, gradient in zip(self.network.parameters(), gradients, strict=True):
            p.grad = gradient

    def step(self) -> None:
        """Take an optimizer step along the gradient that was accepted last."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        """Return all that an exact continuation needs, as plain values and tensors."""
        return {"spec": asdict(self.spec), "critic": self.state_dict(), "optimizer": self.optimizer.state_dict()}

    @staticmethod
    def restored(state: dict[str, Any]) -> "Critic":
        """Return a critic that continues from the result of :meth:`state`."""
        like = next(iter(state["critic"].values()))
        spec = CriticSpec(**state["spec"])
        critic = spec.make(like.new_zeros(2, spec.columns))
        critic.load_state_dict(state["critic"])
        critic.optimizer.load_state_dict(state["optimizer"])
        return critic

    @abstractmethod
    def log_prob(self, out: Tensor, s: Attribute) -> PerRow:
        """Log r(s_i | z_i) in nats."""

    @abstractmethod
    def expected(self, out: Tensor, s: Attribute, peers: Float[Tensor, "#rows rows"]) -> PerRow:
        """Mean of log r(s_j | z_i) over the peers j of i, in nats."""

    @abstractmethod
    def entropy(self, s: Attribute, peers: Float[Tensor, "#rows rows"]) -> Float[Tensor, "rows"]:
        """-log of the attribute's density among the peers, in nats."""


class LevelCritic(Critic):
    """A categorical r(s | z) over the joint levels of whole-numbered columns."""

    def log_prob(self, out: Tensor, s: Attribute) -> PerRow:
        """Log r(s_i | z_i) in nats."""
        return (out.log_softmax(-1) * self._one_hot(s, out)).sum(-1)

    def expected(self, out: Tensor, s: Attribute, peers: Float[Tensor, "#rows rows"]) -> PerRow:
        """Mean of log r(s_j | z_i) over the peers j of i, in nats."""
        return (out.log_softmax(-1) * (peers @ self._one_hot(s, out))).sum(-1)

    def entropy(self, s: Attribute, peers: Float[Tensor, "#rows rows"]) -> Float[Tensor, "rows"]:
        """-log of the level's share among the peers, in nats."""
        levels = self._one_hot(s, peers)
        return -((peers @ levels) * levels).sum(-1).log()

    def _one_hot(self, s: Attribute, like: Tensor) -> Tensor:
        levels = self.spec.levels or ()
        if not check_or_defer(((s >= 0) & (s < torch.tensor(levels, device=s.device))).all()):
            raise DataError(
                f"The attribute has a level that its critic has not seen: expected whole numbers from 0 and below "
                f"{levels}, got {s.amin(0).tolist()} to {s.amax(0).tolist()}. Number the levels from 0, and pass "
                "levels=... if the first batch may lack some."
            )
        strides = [prod(levels[i + 1 :]) for i in range(len(levels))]
        return one_hot((s.long() * torch.tensor(strides, device=s.device)).sum(-1), prod(levels)).to(like)


class NumberCritic(Critic):
    """A normal r(s | z) with independent columns, standardized by the first batch."""

    loc: Tensor
    scale: Tensor

    def __init__(self, spec: CriticSpec, outputs: int) -> None:
        super().__init__(spec, outputs)
        self.register_buffer("loc", torch.zeros(spec.columns))
        self.register_buffer("scale", torch.ones(spec.columns))

    def standardize(self, s: Attribute) -> "Critic":
        """Adopt the columns' location and spread."""
        self.loc.copy_(s.mean(0))
        self.scale.copy_(s.std(0).clamp(min=torch.finfo(s.dtype).tiny))
        return self

    def log_prob(self, out: Tensor, s: Attribute) -> PerRow:
        """Log r(s_i | z_i) in nats."""
        s = (s - self.loc) / self.scale
        return self._mean_log_prob(out, s, s.square())

    def expected(self, out: Tensor, s: Attribute, peers: Float[Tensor, "#rows rows"]) -> PerRow:
        """Mean of log r(s_j | z_i) over the peers j of i, in nats."""
        s = (s - self.loc) / self.scale
        return self._mean_log_prob(out, peers @ s, peers @ s.square())

    def entropy(self, s: Attribute, peers: Float[Tensor, "#rows rows"]) -> Float[Tensor, "rows"]:
        """Entropy of normal columns with the variance of the peers, in nats."""
        variance = peers @ s.square() - (peers @ s).square()
        return 0.5 * (2 * math.pi * math.e * variance).log().sum(-1).expand(len(s))

    def _mean_log_prob(self, out: Tensor, first: Tensor, second: Tensor) -> PerRow:
        loc, log_scale = out.chunk(2, -1)
        square = (second - 2 * loc * first + loc.square()) * (-2 * log_scale).exp()
        return (-0.5 * square - log_scale - self.scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def count_levels(s: Attribute) -> tuple[int, ...] | None:
    """Count the levels of each column, from 0 to its largest value; None where the columns hold real numbers."""
    whole = bool(((s == s.round()) & (s >= 0) & (s < MOST_LEVELS)).all())
    return tuple(int(x) + 1 for x in s.amax(0)) if whole else None
