r"""The rate and the distortion of one fit, per datum, with their standard errors over rows.

.. math:: R = \frac1N \sum_n KL(q(z \mid x_n) \,\|\, p(z)), \qquad D = -\frac1N \sum_n E_q \log p(x_n \mid z)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_elbo.diagnosis import rows_of
from pyro_elbo.errors import ArgumentError, GuideError, describe
from pyro_elbo.programs import evaluating, seeded, trace_program
from pyro_elbo.terms import Terms
from pyro_elbo.training import FitResult


class Point(NamedTuple):
    """Nats per datum, and standard errors over rows; ``elbo`` is -rate - distortion."""

    rate: float
    rate_se: float
    distortion: float
    distortion_se: float
    elbo: float
    elbo_se: float


def measure(fitted: Any, num_samples: int, seed: int, where: str) -> Point:
    """Return the point of a fit on its training data, averaged over evaluations, or of terms as they are.

    Raises:
        ArgumentError: neither a fit nor terms, or a prior whose KL is known up to a constant only.
        GuideError: the guide is a point estimate in some latent.
        SiteError, DataError: no plate of data, or a single row.
    """
    if isinstance(fitted, FitResult):
        _check_priors(fitted, where)
        return _point([fitted.terms(seed=seed + i) for i in range(num_samples)], where)
    if isinstance(fitted, Terms):
        return _point([fitted], where)
    raise ArgumentError(
        f"{where}: expected a FitResult or Terms, got {describe(fitted)}. Return the result of pe.fit, or "
        "result.terms(x) for other data."
    )


def _point(evaluations: list[Terms], where: str) -> Point:
    if points := evaluations[0].point_estimates:
        raise GuideError(
            f"{where}: the guide is a point estimate in {list(points)} (Delta), whose rate is infinite: it is no point "
            "of a curve. Use a guide with a density for every latent, or pyro.param for what is no latent."
        )
    rows = [rows_of(terms, where) for terms in evaluations]
    count = evaluations[0].num_data

    def mean(part: Callable[[Any], dict[str, Tensor]], shared: str) -> Tensor:
        """Average over evaluations what every row adds, and its share of what rows share."""
        each = []
        for r in rows:
            common = sum(x for name, x in r.shared.items() if name.startswith(shared)) / count
            each.append(
                torch.stack([*part(r).values(), torch.zeros(len(_any_row(r)), dtype=torch.float64)]).sum(0) + common
            )
        return torch.stack(each).mean(0)

    rate, distortion = mean(lambda r: r.kl, "kl "), -mean(lambda r: r.log_likelihood, "log_likelihood ")
    figures = [f.item() for x in (rate, distortion, -rate - distortion) for f in (x.mean(), x.std() / len(x) ** 0.5)]
    return Point(*figures)


def _any_row(rows: Any) -> Tensor:
    return next(iter((rows.log_likelihood | rows.kl).values()))


def _check_priors(result: FitResult, where: str) -> None:
    """Refuse improper priors, which cannot be sampled: their KL has an arbitrary constant, and so has the rate."""
    model, guide, data = result.model, result.guide, result.data
    with torch.no_grad(), seeded(0), evaluating(model, guide):
        drawn = {name: site.value for name, site in trace_program(guide, data.args, data.kwargs).items()}
        sites = trace_program(model, data.args, data.kwargs, drawn)
        for name, site in sites.items():
            try:
                if site.role == "latent":
                    site.fn.sample()
            except NotImplementedError as error:
                raise ArgumentError(
                    f"{where}: the prior of '{name}' ({type(site.fn).__name__}) cannot be sampled. The KL to an "
                    "improper prior is known up to a constant only, so that its rate is no information. Use a "
                    "proper prior, or leave this fit out."
                ) from error
