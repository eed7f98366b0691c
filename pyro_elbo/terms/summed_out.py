r"""Terms of discrete latents that are summed out of the model, and of the sites that depend on them.

.. math:: \log \sum_k p(k)\, p(x \mid k) = E_{q^*}[\log p(x \mid k)] - KL(q^*(k) \,\|\, p(k)),
    \qquad q^*(k) = p(k \mid x)

The posterior q* is exact and needs no parameters: the E-step. It enters the terms as a constant. Since it maximizes the
right-hand side, values and first gradients are those of the left-hand side. With the weight β on the KL the best q is
the posterior at temperature β,

.. math:: \max_q E_q[\log p(x \mid k)] - \beta\, KL(q \,\|\, p) = \beta \log \sum_k p(k)\, p(x \mid k)^{1/\beta}.

q* is the derivative of log Z with respect to the logarithms of the factors: one backward pass through the sum.

References:
    Neal, Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants; Darwiche
    (2003), A differential approach to inference in Bayesian networks.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

from pyro_elbo.errors import ArgumentError, SiteError
from pyro_elbo.masking import masked
from pyro_elbo.programs import Plate, Site, step_before
from pyro_elbo.terms.elimination import Factor, Plates, log_sum_product, shared_rows
from pyro_elbo.terms.labeled import (
    Label,
    Labeled,
    combine,
    is_time,
    label,
    label_steps,
    plate_labels,
)
from pyro_elbo.terms.semiring import MAXIMUM, SUM, Semiring
from pyro_elbo.terms.term import alike

WeightOf = Callable[[str], float | Tensor]
"""The weight β of the KL of a site."""

COLDEST = 1e-9
"""The temperature in place of 0, where the sum becomes a maximum: the error is at most COLDEST · (-log p(k)) nats."""

Exponent = float | Labeled


@dataclass(frozen=True)
class Joined:
    """A site of the model that depends on summed-out sites, or is one.

    Attributes:
        site: the model's site.
        log_p: its log density over the values of those sites.
        scale: the scale of its term.
    """

    site: Site
    log_p: Labeled
    scale: float | Tensor


@dataclass(frozen=True)
class Posterior:
    """The exact posterior of connected summed-out sites, and what it makes of each site's density.

    Attributes:
        nats: the KL of each summed-out site, E_q*[log p] of each other site.
        marginals: the posterior over the values that each site depends on.
        independent: the plates by whose rows the sites are independent.
    """

    nats: Mapping[str, Labeled]
    marginals: Mapping[str, Labeled]
    independent: tuple[Plate, ...]


def connected(sites: Mapping[str, set[str]]) -> list[set[str]]:
    """Group sites that share a summed-out site, directly or through others.

    Args:
        sites: the summed-out sites that each one depends on.
    """
    groups: list[tuple[set[str], set[str]]] = []
    for name, depends_on in sites.items():
        joined = [g for g in groups if g[1] & depends_on]
        members = {name}.union(*(g[0] for g in joined))
        groups = [g for g in groups if g not in joined] + [(members, depends_on.union(*(g[1] for g in joined)))]
    return [members for members, _ in groups]


def log_prior(site: Site, mask: Tensor | bool | None = None) -> Labeled:
    """Return log p of a site over its support: without its mask, so that what is masked below it counts for nothing.

    Values of probability zero are impossible, where torch's distributions give them a tiny probability.

    Args:
        mask: zero is returned where it is false, aligned with ``site.stepwise()``.
    """
    steps = site.stepwise()
    log_p, support = steps.fn.log_prob(steps.value), _log_support(steps)
    log_p = log_p if support is None else torch.where(support > -torch.inf, log_p, -torch.inf)
    return label_steps(masked(log_p, mask), site)


def _log_support(site: Site) -> Tensor | None:
    """Return 0 at the values of positive ``probs``, -inf at the others; None for a site that gives no ``probs``."""
    fn: Any = site.fn
    categorical = fn._categorical if isinstance(fn, OneHotCategorical) else fn
    if "probs" not in categorical.__dict__:
        return None
    if isinstance(categorical, Categorical):
        return type(fn)(logits=_log_of(categorical.probs > 0), validate_args=False).log_prob(site.value)
    if isinstance(fn, Bernoulli):
        return torch.where(site.value > 0.5, _log_of(fn.probs > 0), _log_of(fn.probs < 1))
    return None


def _log_of(mask: Tensor) -> Tensor:
    return torch.where(mask, 0.0, -torch.inf).to(torch.get_default_dtype())


def sum_out(
    sites: Mapping[str, Joined],
    summed: list[str],
    guide: Mapping[str, Site],
    particle_dim: int | None,
    weight_of: WeightOf | None = None,
) -> Posterior:
    """Return the posterior of the summed-out sites of one connected group.

    Args:
        sites: the group's sites by name, in program order.
        summed: the names of the summed-out sites among them.
        guide: the sites of the guide.
        particle_dim: the batch dimension of vectorized particles, if any.
        weight_of: the weights of the KL, for the posterior that maximizes the weighted bound; None for β = 1.

    Raises:
        SiteError: the sites differ in scale, or their plates do not allow the sum.
        ArgumentError: the summed-out sites have different weights.
    """
    plates, rows = _arrange(sites, summed, guide, particle_dim)
    names = [*summed, *map(step_before, summed)]
    exponents = _exponents(sites, summed, guide, weight_of, rows)
    full = _expand(sites, summed, plates)
    logs = {n: _raise(_detached(x), exponents.get(n, 1.0)) for n, x in full.items()}
    log_z, marginals = _differentiate(logs, plates, names, SUM)
    nats = {n: _expected(marginals[n], x, names) for n, x in full.items()}
    nats |= {n: _entropy_term(n, marginals[n], names) - nats[n] for n in summed}
    shares = [_sum_rows(_raise(_detached(x), exponents.get(n, 1.0)), rows) for n, x in nats.items() if n not in summed]
    shares += [_detached(_sum_rows(nats[n], rows)) * -1.0 for n in summed]
    first = next((n for n in summed if plates[n] == rows), None)
    if first is not None:  # the states of a scan are a chain, whose conditionals are all of its posterior
        nats[first] = nats[first] + combine(_total, *shares, log_z.map(-log_z.x.detach()))
    independent = tuple(p for p in sites[summed[0]].site.plates if all(p in sites[n].site.plates for n in summed))
    return Posterior(nats, marginals, independent)


def choose_best(
    sites: Mapping[str, Joined], summed: list[str], guide: Mapping[str, Site], particle_dim: int | None
) -> dict[str, Labeled]:
    """Return the most probable joint values of the summed-out sites of one connected group.

    They are 1, and all others 0, over the values that each site depends on. Arguments and errors are those of
    :func:`sum_out`.
    """
    plates, _ = _arrange(sites, summed, guide, particle_dim)
    logs = {n: _detached(x) for n, x in _expand(sites, summed, plates).items()}
    return _differentiate(logs, plates, [*summed, *map(step_before, summed)], MAXIMUM)[1]


def _arrange(
    sites: Mapping[str, Joined], summed: list[str], guide: Mapping[str, Site], particle_dim: int | None
) -> tuple[dict[str, Plates], Plates]:
    """Return the plates of each site, and of each state at the step before, and the rows that all sites share."""
    names = [*summed, *map(step_before, summed)]
    beside = frozenset(a for j in sites.values() for a in j.log_p.labels if _is_beside(a, names, particle_dim))
    plates = {n: plate_labels(j.site) | beside for n, j in sites.items()}
    rows = shared_rows(plates.values())
    _check_scales(sites, rows)
    plates |= {step_before(n): plates[n] for n in summed}
    for name, joined in sites.items():
        for v in joined.log_p.variables:
            _check_plates(name, v, plates[v] if v in names else plate_labels(guide[v]), plates[name])
            if v not in names:
                _check_coupling(v, plate_labels(guide[v]), rows, summed)
    return plates, rows


def _expand(sites: Mapping[str, Joined], summed: list[str], plates: Mapping[str, Plates]) -> dict[str, Labeled]:
    """Return the log density of each site in all its plates, a state's also over its values at the step before."""
    joint = {n: _states_before(n, sites.values()) if n in summed else frozenset() for n in sites}
    return {n: joined.log_p.expand(plates[n] | joint[n]) for n, joined in sites.items()}


def _differentiate(
    logs: Mapping[str, Labeled], plates: Mapping[str, Plates], names: list[str], semiring: Semiring
) -> tuple[Labeled, dict[str, Labeled]]:
    """Return log Z, and its derivatives with respect to the log factors of all sites."""
    with torch.enable_grad():
        leaves = {n: x.map(x.x.detach().requires_grad_()) for n, x in logs.items()}
        factors = [Factor(x, plates[n]) for n, x in leaves.items()]
        log_z = log_sum_product(factors, {v: plates[v] for v in names}, semiring)
        gradients = torch.autograd.grad(log_z.x.sum(), [x.x for x in leaves.values()])
    return log_z, {n: x.map(g) for (n, x), g in zip(logs.items(), gradients, strict=True)}


def _states_before(name: str, sites: Iterable[Joined]) -> Plates:
    """Return the label of a state at the step before, where a density depends on it."""
    return frozenset(a for j in sites for a in j.log_p.labels if a.kind == "value" and a.name == step_before(name))


def _is_beside(a: Label, summed: list[str], particle_dim: int | None) -> bool:
    """Return whether a run has a dimension beside those of plates and summed-out sites."""
    return a.name not in summed if a.kind == "value" else a.kind == "batch" and a.dim == particle_dim


def _detached(x: Labeled) -> Labeled:
    return x.map(x.x.detach())


def _total(*parts: Tensor) -> Tensor:
    return sum(parts[1:], start=parts[0])


def _raise(log: Labeled, exponent: Exponent) -> Labeled:
    """Return the logarithm of a power."""
    return log if isinstance(exponent, float) and exponent == 1.0 else log * exponent


def _values(x: Labeled, summed: list[str]) -> list[Label]:
    return [a for a in x.labels if a.kind == "value" and a.name in summed]


def _sum_rows(x: Labeled, rows: Plates) -> Labeled:
    return x.sum([a for a in x.labels if a not in rows])


def _expected(q: Labeled, log_p: Labeled, summed: list[str]) -> Labeled:
    """Return E_q[log p]; what is impossible counts zero."""
    nats = q.x * torch.where(q.x > 0, log_p.x, torch.zeros_like(log_p.x))
    return q.map(nats).sum(_values(q, summed))


def _entropy_term(name: str, q: Labeled, summed: list[str]) -> Labeled:
    """Return E_q[log q(k | parents)] of a site, from the posterior over itself and its parents."""
    parents = q.sum([a for a in _values(q, summed) if a.name == name])
    joint, above = (x.map(torch.xlogy(x.x, x.x)) for x in (q, parents))
    return joint.sum(_values(q, summed)) - above.sum(_values(above, summed))


def _exponents(
    sites: Mapping[str, Joined],
    summed: list[str],
    guide: Mapping[str, Site],
    weight_of: WeightOf | None,
    rows: Plates,
) -> dict[str, Exponent]:
    """Return the power β_f / β of every factor that is no summed-out site, whose β is the temperature."""
    if weight_of is None:
        return {}
    weights = {n: weight_of(n) for n in sites if n in summed or n in guide}
    for a, b in pairwise(summed):
        if not alike(weights[a], weights[b]):
            raise ArgumentError(
                f"beta differs between '{a}' and '{b}', which are summed out together, at one temperature. Give both "
                "the same beta, or draw one of them in the guide."
            )
    beta = _labeled(weights[summed[0]])
    if wrong := [a for a in beta.labels if a not in rows]:
        raise ArgumentError(
            f"Site '{summed[0]}': beta varies along batch dimension {wrong[0].dim}, whose rows {summed} couple: they "
            "are summed out together, at one temperature. Give one beta for these rows."
        )
    inverse = beta.map(1 / beta.x.clamp(min=COLDEST))
    return {n: inverse * _labeled(weights.get(n, 1.0)) for n in sites if n not in summed}


def _labeled(weight: float | Tensor) -> Labeled:
    return label(torch.as_tensor(weight, dtype=torch.get_default_dtype()), {})


def _check_scales(sites: Mapping[str, Joined], rows: Plates) -> None:
    """Raise SiteError unless one scale stands outside of the logarithm."""
    scales = {n: j.scale for n, j in sites.items()}
    if any(not alike(a, b) for a, b in pairwise(scales.values())):
        shown = {n: x.tolist() if isinstance(x, Tensor) else x for n, x in scales.items()}
        raise SiteError(
            f"Sites that are summed out together need one scale, got {shown}: with other scales the logarithm of the "
            "sum is no bound. A latent that all data share needs all data: do not subsample; or scale these sites "
            "alike, or draw the latent in the guide."
        )
    scale = next(iter(scales.values()))
    if isinstance(scale, Tensor) and not rows.issuperset(label(scale, {}).labels):
        raise SiteError(
            f"The sites {list(sites)} are summed out together, and their scale differs between rows that they couple. "
            "Scale them by one number."
        )


def _check_plates(name: str, variable: str, above: Plates, plates: Plates) -> None:
    if any(map(is_time, above - plates)):
        raise SiteError(
            f"Site '{name}' lies outside of the pe.scan whose state '{variable}' is summed out, and depends on that "
            f"state. Move '{name}' into the step, or draw '{variable}' in the guide without a mark."
        )
    if not above <= plates:
        raise SiteError(
            f"Site '{name}' depends on '{variable}', which is enumerated in a plate that '{name}' lies outside of: all "
            f"rows of '{variable}' together have exponentially many values. Put '{name}' into the plate, or draw "
            f"'{variable}' in the guide without a mark."
        )


def _check_coupling(variable: str, above: Plates, rows: Plates, summed: list[str]) -> None:
    if not above <= rows:
        raise SiteError(
            f"The guide enumerates '{variable}' row by row, but {summed}, which the model sums out, couple these rows. "
            f"Remove '{variable}' from the guide so that it is summed out too, or its mark."
        )
