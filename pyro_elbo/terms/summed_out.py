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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

from pyro_elbo.errors import ArgumentError, SiteError
from pyro_elbo.programs import Plate, Site, step_before
from pyro_elbo.sequences import StackedDistribution
from pyro_elbo.terms.chain import Paths, sum_paths
from pyro_elbo.terms.elimination import Factor, Plates, log_sum_product, shared_rows
from pyro_elbo.terms.labeled import Label, Labeled, add, combine, is_time, label, label_steps, plate_labels
from pyro_elbo.terms.semiring import MAXIMUM, Semiring, log_sum_exp
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
        marginals: the posterior over the values that each site depends on; of a state of a scan, over its own, and
            of other sites that depend on the state before none.
        chains: the posterior of the paths of states.
        independent: the plates by whose rows the sites are independent.
    """

    nats: Mapping[str, Labeled]
    marginals: Mapping[str, Labeled]
    chains: Mapping[str, "PathsPosterior"]
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


def log_prior(site: Site) -> Labeled:
    """Return log p of a site over its support: without its mask, so that what is masked below it counts for nothing.

    Values of probability zero are impossible, where torch's distributions give them a tiny probability.
    """
    fn: Any = site.fn
    fn, value = (fn.narrow or (fn.steps, fn.value)) if isinstance(fn, StackedDistribution) else (fn, site.value)
    log_p, support = fn.log_prob(value), _log_support(fn, value)
    log_p = log_p if support is None else torch.where(support > -torch.inf, log_p, -torch.inf)
    return label_steps(log_p, site)


def _log_support(fn: Any, value: Tensor) -> Tensor | None:
    """Return 0 at the values of positive ``probs``, -inf at the others; None where no ``probs`` are given."""
    categorical = fn._categorical if isinstance(fn, OneHotCategorical) else fn
    if "probs" not in categorical.__dict__:
        return None
    if isinstance(categorical, Categorical):
        return type(fn)(logits=_log_of(categorical.probs > 0), validate_args=False).log_prob(value)
    if isinstance(fn, Bernoulli):
        return torch.where(value > 0.5, _log_of(fn.probs > 0), _log_of(fn.probs < 1))
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
    full = {n: j.log_p if _joins_steps(j.log_p, summed) else j.log_p.expand(plates[n]) for n, j in sites.items()}
    logs = {n: _raise(_detached(x), exponents.get(n, 1.0)) for n, x in full.items()}
    log_z, marginals, chains = _sum(logs, plates, names)
    nats = {n: _expected(q, full[n], names) for n, q in marginals.items()}
    for n in full.keys() - marginals.keys():
        chain = next(c for state, c in chains.items() if step_before(state) in full[n].variables)
        nats[n] = _sum_values(chain.expect(full[n], plates[n]), names)
    entropies = {
        n: chains[n].entropy_term(n, full[n].variables, names) if n in chains else _entropy_term(n, marginals[n], names)
        for n in summed
    }
    nats |= {n: entropies[n] - nats[n] for n in summed}
    nats |= {n: nats[n] + chain.impossible(names) for n, chain in chains.items()}
    marginals |= {n: chain.now() for n, chain in chains.items()}
    shares = [_sum_rows(_raise(_detached(x), exponents.get(n, 1.0)), rows) for n, x in nats.items() if n not in summed]
    shares += [_detached(_sum_rows(nats[n], rows)) * -1.0 for n in summed]
    first = next((n for n in summed if plates[n] == rows), None)
    if first is not None:  # the states of a scan are a chain, whose conditionals are all of its posterior
        nats[first] = nats[first] + add([*shares, _detached(log_z) * -1.0])
    independent = tuple(p for p in sites[summed[0]].site.plates if all(p in sites[n].site.plates for n in summed))
    return Posterior(nats, marginals, chains, independent)


def choose_best(
    sites: Mapping[str, Joined], summed: list[str], guide: Mapping[str, Site], particle_dim: int | None
) -> dict[str, Labeled]:
    """Return the most probable joint values of the summed-out sites of one connected group.

    They are 1, and all others 0, over the values that each site depends on. Arguments and errors are those of
    :func:`sum_out`.
    """
    plates, _ = _arrange(sites, summed, guide, particle_dim)
    with torch.enable_grad():
        leaves = {n: x.map(x.x.detach().requires_grad_()) for n, x in _expand(sites, summed, plates).items()}
        best = _log_z(leaves, plates, [*summed, *map(step_before, summed)], MAXIMUM)
        gradients = torch.autograd.grad(best.x.sum(), [x.x for x in leaves.values()])
    return {n: x.map(g) for (n, x), g in zip(leaves.items(), gradients, strict=True)}


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


def _states_before(name: str, sites: Iterable[Joined]) -> Plates:
    """Return the label of a state at the step before, where a density depends on it."""
    return frozenset(a for j in sites for a in j.log_p.labels if a.kind == "value" and a.name == step_before(name))


def _joins_steps(log_p: Labeled, summed: list[str]) -> bool:
    """Return whether a density depends on a state at the step before."""
    return any(step_before(n) in log_p.variables for n in summed)


@dataclass(frozen=True)
class PathsPosterior:
    """The posterior of a scan's state: given what tells the rows of its paths apart, and that of the rows."""

    paths: Paths
    rows: Labeled

    def now(self) -> Labeled:
        """Return the posterior of the state."""
        return self.paths.now() * self.rows

    def pairs(self) -> Labeled:
        """Return the posterior of the state before and now, which has an entry for each row, step and pair."""
        return self.paths.pairs() * self.rows

    def expect(self, x: Labeled, plates: Plates) -> Labeled:
        """Return E[x] over both states, at each value of what tells rows apart, in all plates of x."""
        x = x.expand(plates.difference(self.paths.labels))
        if set(x.labels) <= {*self.paths.labels, *self.paths.own}:
            return self.paths.expect(x) * self.rows
        return combine(_possible, self.pairs(), x).sum(self.paths.own)

    def impossible(self, summed: list[str]) -> Labeled:
        """Return infinity from the first step on to which no path leads, whatever tells the rows apart; 0 before."""
        reached = _sum_values(self.paths.reached(), summed)
        return reached.map(torch.where(reached.x > 0, 0.0, torch.inf).to(reached.x.dtype))

    def entropy_term(self, name: str, variables: set[str], summed: list[str]) -> Labeled:
        """Return E[log q(k | k before, parents)] of the state, whose density depends on ``variables``."""
        if others := [a for a in _values(self.rows, summed) if a.name not in variables]:
            return _entropy_term(name, self.pairs().sum(others), summed)
        return _sum_values(self.paths.log_conditional() * self.rows, summed)


def _sum(
    logs: Mapping[str, Labeled], plates: Mapping[str, Plates], names: list[str]
) -> tuple[Labeled, dict[str, Labeled], dict[str, PathsPosterior]]:
    """Return log Z, the posterior over what each site depends on, and that of states; of sites that join steps none."""
    found: dict[str, Paths] = {}

    def over_paths(pairs: Sequence[Labeled], nodes: Labeled, state: str) -> Labeled:
        found[state] = sum_paths(pairs, nodes, state)
        return found[state].shares

    def total(leaves: dict[str, Tensor], shares: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        moved = Semiring(log_sum_exp, lambda _, nodes, state: found[state].move(shares[state], nodes))
        log_z = _log_z({n: x.map(leaves.get(n, x.x)) for n, x in logs.items()}, plates, names, moved)
        labels[:] = log_z.labels
        return log_z.x.sum(), log_z.x

    labels: list[Label] = []
    apart = {n: x for n, x in logs.items() if not _joins_steps(x, names)}
    if len(apart) < len(logs):
        _log_z(logs, plates, names, Semiring(log_sum_exp, over_paths))  # finds the paths
    inputs = {n: x.x for n, x in apart.items()}, {n: p.shares.x for n, p in found.items()}
    # torch.autograd does not work in a mapped run
    (q, rows), log_z = torch.func.grad(total, (0, 1), has_aux=True)(*inputs)
    chains = {n: PathsPosterior(p, p.shares.map(rows[n])) for n, p in found.items()}
    return Labeled(log_z, tuple(labels)), {n: x.map(q[n]) for n, x in apart.items()}, chains


def _log_z(logs: Mapping[str, Labeled], plates: Mapping[str, Plates], names: list[str], semiring: Semiring) -> Labeled:
    factors = [Factor(x, plates[n]) for n, x in logs.items()]
    return log_sum_product(factors, {v: plates[v] for v in names}, semiring)


def _is_beside(a: Label, summed: list[str], particle_dim: int | None) -> bool:
    """Return whether a run has a dimension beside those of plates and summed-out sites."""
    return a.name not in summed if a.kind == "value" else a.kind == "batch" and a.dim == particle_dim


def _detached(x: Labeled) -> Labeled:
    return x.map(x.x.detach())


def _raise(log: Labeled, exponent: Exponent) -> Labeled:
    """Return the logarithm of a power."""
    return log if isinstance(exponent, float) and exponent == 1.0 else log * exponent


def _values(x: Labeled, summed: list[str]) -> list[Label]:
    return [a for a in x.labels if a.kind == "value" and a.name in summed]


def _sum_values(x: Labeled, summed: list[str]) -> Labeled:
    return x.sum(_values(x, summed))


def _sum_rows(x: Labeled, rows: Plates) -> Labeled:
    return x.sum([a for a in x.labels if a not in rows])


def _expected(q: Labeled, log_p: Labeled, summed: list[str]) -> Labeled:
    """Return E_q[log p]; what is impossible counts zero."""
    return _sum_values(combine(_possible, q, log_p), summed)


def _possible(q: Tensor, x: Tensor) -> Tensor:
    return q * torch.where(q > 0, x, torch.zeros_like(x))


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
