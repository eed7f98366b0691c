r"""Ranks of true values among posterior draws.

.. math:: r = \#\{s : \theta^{(s)} < \theta^*\} + \text{ties at random}, \qquad u = (r + v) / (L + 1),\ v \sim U(0, 1)

If data are drawn from the model and the draws from the posterior, r is uniform on 0, ..., L and u on (0, 1), exactly.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int64
from torch import Tensor


class Ranks(NamedTuple):
    """Ranks of every element of a quantity, and the same as positions in (0, 1)."""

    rank: Int64[Tensor, "*shape"]
    pit: Float64[Tensor, "*shape"]


def rank_of(truth: Tensor, draws: Tensor, generator: torch.Generator) -> Ranks:
    """Rank a true value among draws, which come first; ties are broken at random."""
    below, ties = (draws < truth).sum(0), (draws == truth).sum(0)

    def uniform() -> Tensor:
        return torch.rand(truth.shape, generator=generator, dtype=torch.float64)

    rank = below + (uniform() * (ties + 1)).floor().to(below.dtype)
    return Ranks(rank, (rank + uniform()) / (len(draws) + 1))


def ranks_of(truth: Mapping[str, Tensor], draws: Mapping[str, Tensor], seed: int) -> dict[str, Ranks]:
    """Rank every quantity that both hold."""
    generator = torch.Generator().manual_seed(seed)
    return {name: rank_of(x.cpu(), draws[name].cpu(), generator) for name, x in truth.items() if name in draws}
