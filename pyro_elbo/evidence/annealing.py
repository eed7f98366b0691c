r"""Annealed importance sampling: from a start to the posterior in many small steps.

.. math:: \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) \log r(u_{t-1}), \qquad
    u_t \sim T_{\beta_t}(\cdot \mid u_{t-1}), \qquad E[w] = p(x)

T_β is Hamiltonian Monte Carlo that leaves f_β unchanged. A pilot run of other chains finds its step sizes, and places
the temperatures at equal thermodynamic distance, :math:`d\beta \propto 1 / \sqrt{Var_\beta \log r}`. Both are fixed
afterwards: a walk that tuned itself would no longer be unbiased.

References:
    Neal (2001), Annealed importance sampling, arXiv:physics/9803008; Gelman, Meng (1998), Simulating normalizing
    constants, Statistical Science 13 (thermodynamic distance); Grosse, Maddison, Salakhutdinov (2013), Annealing
    between distributions by averaging moments, NeurIPS.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor
from tqdm import tqdm

from pyro_elbo.errors import ArgumentError, check_count, describe
from pyro_elbo.evidence.bridge import Bridge, Call, build_bridge
from pyro_elbo.evidence.hmc import PerChain, Point, Position, transition
from pyro_elbo.evidence.result import LogEvidence, WeightSums
from pyro_elbo.programs import Program

MAX_ELEMENTS = 2**22  # of the chains of a latent that walk together
ACCEPTANCE = 0.75
_SHORTEST_PILOT = 20
# How much of the temperatures is spread as in the pilot, whatever distance the pilot measured.
_SPREAD = 0.1


class Annealing(NamedTuple):
    """Settings of the walk: temperatures, leapfrog steps of a transition, and where it starts."""

    num_temperatures: int
    num_leapfrog: int
    start: str = "prior"

    def check(self) -> None:
        """Raise ArgumentError for settings out of range."""
        check_count("num_temperatures", self.num_temperatures, least=2)
        check_count("num_leapfrog", self.num_leapfrog)
        if self.start not in ("prior", "guide"):
            raise ArgumentError(f"start must be 'prior' or 'guide', got {describe(self.start)}.")


class Plan(NamedTuple):
    """Temperatures from 0 to 1 of every row, and the step size of the transition at each."""

    betas: Float64[Tensor, "temperatures rows"]
    step_sizes: Float64[Tensor, "temperatures rows"]


def anneal(
    model: Program,
    guide: Program | None,
    args: tuple,
    kwargs: Mapping[str, Any],
    chains: int,
    annealing: Annealing,
    rows: int | None,
    progress: bool,
) -> LogEvidence:
    """Estimate log p(x) from below: see :func:`pyro_elbo.log_evidence`."""
    bridge = build_bridge(Call(model, guide if annealing.start == "guide" else None, args, kwargs), rows)
    groups = chain_groups(bridge, chains)
    sums = WeightSums()
    with tqdm(total=pilot_length(annealing) + len(groups) * annealing.num_temperatures, disable=not progress) as bar:
        plan = make_plan(bridge, groups[0], annealing, bar)
        for count in groups:
            sums.add(bridge.by_row(walk(bridge, bridge.draw(count), plan, annealing, bar)))
    return sums.result("ais", bridge.plate_name, bridge.shared)


def chain_groups(bridge: Bridge, chains: int) -> list[int]:
    """Split chains into groups whose latents fit into memory; a pilot needs two of them."""
    size = min(chains, max(2, MAX_ELEMENTS // bridge.largest))
    return [min(size, chains - i) for i in range(0, chains, size)]


def pilot_length(annealing: Annealing) -> int:
    """Return the number of temperatures of a pilot run."""
    return max(_SHORTEST_PILOT, annealing.num_temperatures // 4)


def walk(
    bridge: Bridge, position: Position, plan: Plan, annealing: Annealing, bar: tqdm, reverse: bool = False
) -> PerChain:
    """Walk through the temperatures, and return the log weights; in reverse from a draw of the posterior."""
    last = len(plan.betas) - 1
    log_weight = torch.zeros(position.shape[:2], dtype=torch.float64)
    for t in range(last, 0, -1) if reverse else range(1, last + 1):
        here = t if reverse else t - 1  # where the position was drawn
        evaluate = partial(evaluate_at, bridge, plan.betas[here])
        point = evaluate(position)
        if here not in (0, last):
            point, _ = transition(point, evaluate, plan.step_sizes[here], annealing.num_leapfrog)
        log_weight = log_weight + (plan.betas[t] - plan.betas[t - 1]) * point.ratio
        position = point.position
        bar.update(1)
    return log_weight


def evaluate_at(bridge: Bridge, beta: Float64[Tensor, " rows"], position: Position) -> Point:
    """Evaluate a position at a temperature; where a density is not finite there is no gradient."""
    with torch.enable_grad():
        position = position.detach().requires_grad_()
        start, ratio = bridge(position)
        log_density = start + beta * ratio
        finite = torch.isfinite(log_density)
        (gradient,) = torch.autograd.grad(log_density.where(finite, 0.0).sum(), position)
    gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
    return Point(position.detach(), log_density.detach().where(finite, -torch.inf), ratio.detach(), gradient)


def make_plan(bridge: Bridge, chains: int, annealing: Annealing, bar: tqdm) -> Plan:
    """Walk once with adapting step sizes, dense where the start is left, and plan the walks to come."""
    length = pilot_length(annealing)
    grid = (torch.arange(length + 1, dtype=torch.float64) / length) ** 4
    position = bridge.draw(chains)
    log_size = torch.full(position.shape[1:2], 0.1, dtype=torch.float64).log()
    spread, sizes = [], []
    for beta in grid:
        evaluate = partial(evaluate_at, bridge, beta.expand_as(log_size))
        point, accepted = transition(evaluate(position), evaluate, log_size.exp(), annealing.num_leapfrog)
        spread.append(point.ratio.nan_to_num(0.0, 0.0, 0.0).std(0))
        sizes.append(log_size)
        log_size = log_size + 0.3 * (accepted.mean(0) - ACCEPTANCE)
        position = point.position
        bar.update(1)
    return _place(grid, torch.stack(spread), torch.stack(sizes), annealing.num_temperatures)


def _place(grid: Tensor, spread: Tensor, log_sizes: Tensor, count: int) -> Plan:
    """Place temperatures at equal distance, and interpolate the step sizes there."""
    pieces = 0.5 * (spread[1:] + spread[:-1]) * grid.diff()[:, None]
    distance = torch.cat([torch.zeros_like(spread[:1]), pieces.cumsum(0)])
    even = torch.linspace(0, 1, len(grid), dtype=torch.float64)[:, None]
    distance = (1 - _SPREAD) * distance / distance[-1:].clamp(min=1e-300) + _SPREAD * even
    distance = distance / distance[-1:]
    targets = torch.linspace(0, 1, count + 1, dtype=torch.float64)
    betas = _interpolate(targets, distance, grid[:, None].expand_as(distance))
    betas[0], betas[-1] = 0.0, 1.0
    return Plan(betas, _interpolate(targets, distance, log_sizes).exp())


def _interpolate(targets: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Interpolate every column of ``ys`` over ``xs``, which grow, at the same targets."""
    wanted = targets[:, None].expand(-1, xs.shape[1]).T.contiguous()
    right = torch.searchsorted(xs.T.contiguous(), wanted).T.clamp(1, len(xs) - 1)
    x0, x1, y0, y1 = xs.gather(0, right - 1), xs.gather(0, right), ys.gather(0, right - 1), ys.gather(0, right)
    share = ((targets[:, None] - x0) / (x1 - x0)).clamp(0, 1)
    return y0 + share * (y1 - y0)
