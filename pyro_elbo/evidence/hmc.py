r"""Hamiltonian Monte Carlo for many chains and rows at once, every coordinate of a row with a step size of its own.

A step size per coordinate is a diagonal mass matrix: the walk is the one of equal steps in rescaled coordinates.

References:
    Neal (2011), MCMC using Hamiltonian dynamics, arXiv:1206.1901.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Position = Float[Tensor, "chains rows dims"]
PerChain = Float[Tensor, "chains rows"]


class Point(NamedTuple):
    """A position with the log density that a transition keeps, the log ratio r, and the density's gradient."""

    position: Position
    log_density: PerChain
    ratio: PerChain
    gradient: Position


Evaluate = Callable[[Position], Point]


def transition(
    point: Point, evaluate: Evaluate, step_size: Float[Tensor, "rows dims"], num_leapfrog: int
) -> tuple[Point, PerChain]:
    """Propose by leapfrog steps of random momentum; return the points and the probabilities of acceptance.

    The length of the steps varies from chain to chain by a fifth, so that no orbit closes.
    """
    momentum = torch.randn_like(point.position)
    jitter = 0.8 + 0.4 * torch.rand_like(point.log_density)
    size = (step_size * jitter[..., None]).to(momentum)
    proposed, moved = point, momentum
    for _ in range(num_leapfrog):
        half = moved + 0.5 * size * proposed.gradient
        proposed = evaluate(proposed.position + size * half)
        moved = half + 0.5 * size * proposed.gradient
    change = proposed.log_density - point.log_density + _kinetic(momentum) - _kinetic(moved)
    probability = change.nan_to_num(nan=-torch.inf, posinf=-torch.inf).clamp(max=0).exp()
    accepted = torch.rand_like(probability) < probability
    kept = (
        torch.where(accepted if new.dim() == 2 else accepted[..., None], new, old)
        for new, old in zip(proposed, point, strict=True)
    )
    return Point(*kept), probability


def _kinetic(momentum: Position) -> PerChain:
    return 0.5 * momentum.double().square().sum(-1)
