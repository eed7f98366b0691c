r"""Bounds of log p(x) from both sides, on data that the model simulates.

Simulated data x come with one exact draw of their posterior, the z that they were made from. A walk that starts there
and anneals back to the prior has weights of mean 1 / p(x), so that it bounds log p(x) from above.

.. math:: E[\log \hat p(x)] \le \log p(x) \le E[-\log \widehat{1 / p(x)}]
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_elbo.display import html_table, progress_bar
from pyro_elbo.errors import SiteError, check_count
from pyro_elbo.evidence.annealing import Annealing, chain_groups, make_plan, walk
from pyro_elbo.evidence.bridge import Bridge, Call, build_bridge
from pyro_elbo.evidence.result import LogEvidence, WeightSums
from pyro_elbo.programs import (
    Program,
    ResampleObserved,
    Site,
    check_arguments,
    check_options,
    check_programs,
    evaluating,
    program_arguments,
    seeded,
    trace_program,
)

_CLEAR = 3.0  # standard errors by which a bound may cross the other one


@dataclass(frozen=True, repr=False)
class EvidenceBracket:
    """Log p(x) of simulated data from below and from above; print it for the gap.

    Attributes:
        lower: annealed from the prior to the posterior.
        upper: annealed back, from the draw that made the data.
        observed: the simulated data, by site.
    """

    lower: LogEvidence
    upper: LogEvidence
    observed: dict[str, Tensor]

    @property
    def gap(self) -> Tensor:
        """Upper less lower, per row where the lower one is: nats. What is left of it bounds the error of AIS."""
        return self.upper.log_evidence - self.lower.log_evidence

    @property
    def gap_standard_error(self) -> Tensor:
        """Standard error of the sum of ``gap``; the chains of both sides are independent."""
        return torch.hypot(self.upper.total_standard_error, self.lower.total_standard_error)

    def __repr__(self) -> str:
        """Both totals with their standard errors, and the mean gap."""
        lines = [f"  {name:6} {total} {error}" for name, total, error in self._figures]
        notes = [f"  {note}" for note in self._notes]
        return "\n".join([self._title, f"  {'':6} {'total':>14} {'standard error':>14}", *lines, *notes])

    def _repr_html_(self) -> str:
        return html_table(self._title, ("", "total", "standard error"), self._figures, self._notes)

    @property
    def _title(self) -> str:
        return f"Log evidence of simulated data in nats, between bounds of {self.lower.num_samples} chains each way"

    @property
    def _figures(self) -> list[tuple[str, str, str]]:
        return [(n, f"{float(x):14.4f}", f"{x.total_standard_error.item():14.4f}") for n, x in self._sides.items()]

    @property
    def _sides(self) -> dict[str, LogEvidence]:
        return {"lower": self.lower, "upper": self.upper}

    @property
    def _notes(self) -> list[str]:
        """The gap, what it means where the lower estimate is above the upper one, and cautions about either."""
        gap, error = self.gap.sum().item(), self.gap_standard_error.item()
        if self.lower.plate is None:
            notes = [f"gap {gap:.4f} ± {error:.4f}, one number for all data"]
        else:
            mean = f"mean {self.gap.mean():.4f} ± {error / len(self.gap):.4f}"
            notes = [f"gap per row of '{self.lower.plate}': {mean}, largest {self.gap.max():.4f}"]
        if gap < 0:
            noise = "noise of the chains, which leaves no gap to see: bounds hold on average."
            noise = noise if -gap <= _CLEAR * error else "more than their noise: more num_temperatures help."
            notes.append(f"The lower estimate lies above the upper one: {noise}")
        return notes + [f"{name}: {x.caution}" for name, x in self._sides.items() if x.caution is not None]


def bidirectional_evidence(
    model: Program,
    *args: Any,
    num_samples: int = 16,
    num_temperatures: int | None = None,
    num_leapfrog: int = 2,
    progress: bool = True,
    seed: int | None = 0,
    **kwargs: Any,
) -> EvidenceBracket:
    r"""Check annealed importance sampling: simulate data from the model, and bound their log p(x) from both sides.

    What the gap leaves open is how far ``log_evidence(method="ais")`` of the same settings can be off, on data like
    the model's own. The arguments of the model give the number of rows; their observed values are not used.

    Args:
        model: the generative program.
        args, kwargs: its arguments.
        num_samples: chains per row, each way.
        num_temperatures, num_leapfrog: as for :func:`pyro_elbo.log_evidence`.
        progress: show a progress bar.
        seed: seed of data and draws; None continues the caller's random stream.

    Returns:
        ``EvidenceBracket``: both estimates in nats, and the data.

    Raises:
        DataError: the arguments are not those of the model.
        ArgumentError, SiteError, WeightsError: as :func:`pyro_elbo.log_evidence` with ``method="ais"``; SiteError also
            where an observed site cannot be sampled.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.1), obs=x)
        >>> both = bidirectional_evidence(model, torch.zeros(3), num_temperatures=200, progress=False)
        >>> exact = dist.Normal(0.0, 1.01**0.5).log_prob(both.observed["x"]).sum().item()
        >>> float(both.lower) - 0.1 < exact < float(both.upper) + 0.1
        True

    References:
        Grosse, Ancha, Roy (2016), Measuring the reliability of MCMC inference with bidirectional Monte Carlo,
        arXiv:1606.02275; Wu, Burda, Salakhutdinov, Grosse (2017), arXiv:1611.04273.
    """
    check_options(model, kwargs)
    check_programs(model, model)
    check_count("num_samples", num_samples, least=2)
    annealing = Annealing(num_temperatures, num_leapfrog)
    annealing.check()
    args, kwargs = program_arguments(model, args, kwargs)
    cure = "It simulates from the model alone, without a guide. "
    check_arguments("bidirectional_evidence", {"model": model}, args, kwargs, cure)
    with seeded(seed), evaluating(model):
        sites = _simulate(model, args, kwargs)
        observed = {n: s.value for n, s in sites.items() if s.role == "observed"}
        bridge = build_bridge(Call(poutine.condition(model, data=observed), None, args, kwargs), None)
        made = bridge.position({n: c.transform.inv(sites[n].value) for n, c in bridge.coordinates.items()}, 1)
        return EvidenceBracket(*_both_ways(bridge, made, num_samples, annealing, progress), observed)


def _simulate(model: Program, args: tuple, kwargs: dict[str, Any]) -> dict[str, Site]:
    """Run the model with its observed sites drawn anew; they keep their role."""
    with torch.no_grad():
        sites = trace_program(model, args, kwargs)
        names = {n for n, s in sites.items() if s.role == "observed"}
        resampling = ResampleObserved(names)
        try:
            drawn = trace_program(resampling(model), args, kwargs)
        except NotImplementedError as error:
            raise SiteError(
                f"Site '{resampling.current}' cannot be sampled, so that there are no simulated data with a known "
                "posterior draw. Give its distribution a sample method."
            ) from error
    return {n: replace(s, role="observed") if n in names else s for n, s in drawn.items()}


def _both_ways(
    bridge: Bridge, made: Tensor, chains: int, annealing: Annealing, progress: bool
) -> tuple[LogEvidence, LogEvidence]:
    groups = chain_groups(bridge, chains)
    up, down = WeightSums(), WeightSums()
    plan = make_plan(bridge, groups[0], annealing, progress)
    with progress_bar(progress, total=2 * len(groups) * (len(plan.betas) - 1)) as bar:
        for count in groups:
            up.add(bridge.by_row(walk(bridge, bridge.draw(count), plan, annealing, bar)))
            back = walk(bridge, made.expand(count, -1, -1), plan, annealing, bar, reverse=True)
            down.add(-bridge.by_row(back))
    name, shared = bridge.plate_name, bridge.shared
    return up.result("ais", name, shared), down.result("reverse ais", name, shared)
