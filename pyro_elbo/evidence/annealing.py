r"""Annealed importance sampling: from a start to the posterior in many small steps.

.. math:: \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) \log r(u_{t-1}), \qquad
    u_t \sim T_{\beta_t}(\cdot \mid u_{t-1}), \qquad E[w] = p(x)

T_β is Hamiltonian Monte Carlo that leaves f_β unchanged. A pilot run of other chains finds its step sizes, and the
temperatures, at equal thermodynamic distance. Both are fixed afterwards: a walk that tuned itself would no longer be
unbiased.

References:
    Neal (2001), Annealed importance sampling, arXiv:physics/9803008; Grosse, Maddison, Salakhutdinov (2013), Annealing
    between distributions by averaging moments, NeurIPS.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from jaxtyping import Float64
from torch import Tensor
from tqdm import tqdm

from pyro_elbo.display import progress_bar
from pyro_elbo.errors import check_choice, check_count
from pyro_elbo.evidence.bridge import Bridge, Call, build_bridge
from pyro_elbo.evidence.hmc import PerChain, Point, Position, transition
from pyro_elbo.evidence.pilot import Plan, run_pilot
from pyro_elbo.evidence.result import LogEvidence, WeightSums
from pyro_elbo.programs import Program

MAX_ELEMENTS = 2**22  # of the chains of a latent that walk together


class Annealing(NamedTuple):
    """Settings of the walk: temperatures (None: as the pilot says), leapfrog steps of a transition, its start."""

    num_temperatures: int | None = None
    num_leapfrog: int = 2
    start: str = "prior"

    def check(self) -> None:
        """Raise ArgumentError for settings out of range."""
        if self.num_temperatures is not None:
            check_count("num_temperatures", self.num_temperatures, least=2)
        check_count("num_leapfrog", self.num_leapfrog)
        check_choice("start", self.start, ("prior", "guide"))


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
    plan = make_plan(bridge, groups[0], annealing, progress)
    with progress_bar(progress, total=len(groups) * (len(plan.betas) - 1)) as bar:
        for count in groups:
            sums.add(bridge.by_row(walk(bridge, bridge.draw(count), plan, annealing, bar)))
    return sums.result("ais", bridge.plate_name, bridge.shared)


def chain_groups(bridge: Bridge, chains: int) -> list[int]:
    """Split chains into groups whose latents fit into memory; a pilot needs two of them."""
    size = min(chains, max(2, MAX_ELEMENTS // bridge.largest))
    return [min(size, chains - i) for i in range(0, chains, size)]


def make_plan(bridge: Bridge, chains: int, annealing: Annealing, progress: bool) -> Plan:
    """Run a pilot, and plan the walks that count."""
    pilot = run_pilot(partial(evaluate_at, bridge), bridge.draw(chains), annealing.num_leapfrog, progress)
    return pilot.plan(annealing.num_temperatures)


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
    """Evaluate a position at a temperature; where a density is not finite there is no gradient.

    A trajectory that diverges has no density, and is rejected: validation would raise where it left the support.
    """
    inside = torch.isfinite(position).all(-1)
    with torch.enable_grad(), pyro.validation_enabled(False):
        position = position.detach().where(inside[..., None], 0.0).requires_grad_()
        start, ratio = bridge(position)
        log_density = start + beta * ratio
        finite = torch.isfinite(log_density) & inside
        (gradient,) = torch.autograd.grad(log_density.where(finite, 0.0).sum(), position)
    gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
    return Point(position.detach(), log_density.detach().where(finite, -torch.inf), ratio.detach(), gradient)
