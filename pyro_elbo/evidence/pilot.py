r"""A pilot run of annealing: it finds the temperatures and step sizes that the walks that count will use.

Its chains go from 0 to 1 at a constant thermodynamic speed, row by row: with s(β) the standard deviation of log r over
the chains at β,

.. math:: \beta \leftarrow \beta + c / s(\beta), \qquad D = \int_0^1 s(\beta) \, d\beta

Log weights of T temperatures at equal distance D / T have the variance D² / T if chains mix at once, and two to four
times that where they mix as they do here: so D tells how many temperatures a row needs. Chains lag behind the
temperature a little, which makes D a fifth too large. On the way every coordinate gets a step size of its own: the
spread of the chains in it (a diagonal metric) times a size that steers the acceptance of each row.

References:
    Gelman, Meng (1998), Simulating normalizing constants, Statistical Science 13 (thermodynamic distance).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from pyro_elbo.display import progress_bar
from pyro_elbo.evidence.hmc import Point, Position, transition

EvaluateAt = Callable[[Float64[Tensor, " rows"], Position], Point]

# High, so that the two leapfrog steps of a default transition, of 0.7 to 0.8 standard deviations each, are a quarter of
# a period. After that a Gaussian has forgotten its energy; after half a period it is mirrored, with the same energy.
ACCEPTANCE = 0.9
LEAST_TEMPERATURES, MOST_TEMPERATURES = 100, 4000
_VARIANCE = 0.25  # of log weights, D² / T, for which temperatures are chosen
_PACE = 0.25  # c, the thermodynamic distance between temperatures of the pilot
# However broad log r is at the start, as under a heavy-tailed prior, the pilot reaches 1 within 940 temperatures.
_FIRST, _GROWTH = 1e-12, 1.03
_WARM_UP, _SETTLE = 20, 10  # temperatures of the pilot at 0 and at 1, where only step sizes change
_SIZE = 0.5  # the first step, in spreads
_RATE = 0.3  # of changes of the logarithmic step size
_MEMORY = 0.2  # the weight of the newest spread of the chains among those before
# How much of the temperatures is spread as in the pilot, whatever distance the pilot measured.
_SPREAD = 0.1


class Plan(NamedTuple):
    """Temperatures from 0 to 1 of every row, and the step sizes of the transition at each."""

    betas: Float64[Tensor, "temperatures rows"]
    step_sizes: Float64[Tensor, "temperatures rows dims"]


@dataclass
class Pilot:
    """The state of the run, and what it has seen at every temperature."""

    position: Position
    beta: Float64[Tensor, " rows"]
    log_size: Float64[Tensor, " rows"]
    log_spread: Float64[Tensor, "rows dims"]
    betas: list[Tensor]
    spreads: list[Tensor]
    log_sizes: list[Tensor]

    @classmethod
    def start(cls, position: Position) -> "Pilot":
        """Start where walks start."""
        beta = torch.zeros(position.shape[1], dtype=torch.float64)
        return cls(position, beta, torch.full_like(beta, math.log(_SIZE)), _log_spread(position), [], [], [])

    def visit(self, evaluate_at: EvaluateAt, num_leapfrog: int) -> None:
        """Make a transition at the present temperatures, note what it shows, and adapt step sizes."""
        evaluate = partial(evaluate_at, self.beta)
        log_sizes = self.log_size[:, None] + self.log_spread
        point, accepted = transition(evaluate(self.position), evaluate, log_sizes.exp(), num_leapfrog)
        self.betas.append(self.beta)
        self.spreads.append(point.ratio.nan_to_num(0.0, 0.0, 0.0).std(0))
        self.log_sizes.append(log_sizes)
        self.position = point.position
        self.log_size = self.log_size + _RATE * (accepted.mean(0) - ACCEPTANCE)
        self.log_spread = self.log_spread + _MEMORY * (_log_spread(point.position) - self.log_spread)

    def advance(self) -> None:
        """Raise the temperatures by the pace."""
        step = self.beta + _PACE / self.spreads[-1].clamp(min=_PACE)
        self.beta = torch.maximum(step, self.beta * _GROWTH).clamp(_FIRST, 1.0)

    def plan(self, count: int | None) -> Plan:
        """Place temperatures at equal distance, as many as the farthest row needs where no count is given."""
        grid, log_sizes = (torch.stack(x[_WARM_UP - 1 :]) for x in (self.betas, self.log_sizes))
        pieces, taken = self.pieces, (grid.diff(dim=0) > 0).double()
        total = pieces.sum(0)
        if count is None:
            needed = math.ceil(total.max().item() ** 2 / _VARIANCE)
            count = min(max(needed, LEAST_TEMPERATURES), MOST_TEMPERATURES)
        shares = (1 - _SPREAD) * pieces / total.clamp(min=1e-300) + _SPREAD * taken / taken.sum(0)
        distance = torch.cat([torch.zeros_like(grid[:1]), shares.cumsum(0)])
        distance = distance / distance[-1:]
        targets = torch.linspace(0, 1, count + 1, dtype=torch.float64)
        betas = _interpolate(targets, distance, grid[..., None])[..., 0]
        betas[0], betas[-1] = 0.0, 1.0
        return Plan(betas, _interpolate(targets, distance, log_sizes).exp())

    @property
    def pieces(self) -> Float64[Tensor, "moves rows"]:
        """The thermodynamic distance of every move: they add up to D."""
        grid, spread = (torch.stack(x[_WARM_UP - 1 :]) for x in (self.betas, self.spreads))
        return 0.5 * (spread[1:] + spread[:-1]) * grid.diff(dim=0)


def run_pilot(evaluate_at: EvaluateAt, position: Position, num_leapfrog: int, progress: bool) -> Pilot:
    """Walk from the start to the posterior, and return what the run has seen."""
    pilot, at_end = Pilot.start(position), 0
    with progress_bar(progress, desc="pilot", unit=" temperatures") as bar:
        while at_end < _SETTLE:
            if len(pilot.betas) >= _WARM_UP:
                pilot.advance()
            pilot.visit(evaluate_at, num_leapfrog)
            at_end += bool((pilot.beta == 1).all())
            bar.update(1)
    return pilot


def _log_spread(position: Position) -> Float64[Tensor, "rows dims"]:
    """Return the logarithm of the spread of chains in each coordinate, drawn towards that of all coordinates.

    That of n draws has a standard error of 1 / sqrt(2 n): two chains know little of their differences.
    """
    log_spread = position.double().std(0).clamp(min=1e-30).log()
    return torch.lerp(log_spread, log_spread.mean(-1, keepdim=True), 1 / len(position))


def _interpolate(
    targets: Float64[Tensor, " targets"], xs: Float64[Tensor, "points rows"], ys: Float64[Tensor, "points rows dims"]
) -> Float64[Tensor, "targets rows dims"]:
    """Interpolate every row of ``ys`` over its ``xs``, which grow, at the same targets."""
    wanted = targets[:, None].expand(-1, xs.shape[1]).T.contiguous()
    right = torch.searchsorted(xs.T.contiguous(), wanted).T.clamp(1, len(xs) - 1)
    x0, x1 = xs.gather(0, right - 1), xs.gather(0, right)
    share = ((targets[:, None] - x0) / (x1 - x0).clamp(min=1e-300)).clamp(0, 1)[..., None]
    row = torch.arange(xs.shape[1])
    return ys[right - 1, row] + share * (ys[right, row] - ys[right - 1, row])
