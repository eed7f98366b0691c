r"""Evaluate the term of each site: the log-likelihood of the data, the KL of a latent.

A KL is analytic where a formula exists and is exact, otherwise it is :math:`\log q - \log p` at the draw.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import groupby
from typing import Any, Literal

import torch
from pyro.distributions import Unit
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import is_identically_zero
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Independent,
    OneHotCategorical,
    Pareto,
    Poisson,
    Uniform,
    constraints,
    kl_divergence,
)

from pyro_elbo.assumptions import check_or_defer, is_capturing
from pyro_elbo.masking import expand_to_event, mask_in_event, masked
from pyro_elbo.programs import Site, TracePair, fixed_sites, is_point
from pyro_elbo.sequences import StackedDistribution
from pyro_elbo.terms.term import Term, TermKind, alike

KLForm = Literal["auto", "sampled"]


def evaluate_terms(run: TracePair, kl: KLForm) -> dict[str, Term]:
    """Return the term of each site of a run, by name.

    With ``kl="auto"`` a latent's KL is analytic where a formula exists and is exact, that is, where no parent
    of the site in the model can be its descendant in the guide. With ``"sampled"`` it never is.
    """
    exact = analytic_is_exact(run) if kl == "auto" else frozenset()
    fixed = fixed_sites(run.model.values())
    counted = (site for site in run.model.values() if site.has_density)
    terms = {s.name: site_term(s, run.guide.get(s.name), s.name in exact, s.name in fixed) for s in counted}
    return add_auxiliary(terms, (auxiliary_term(site) for site in run.guide.values() if site.role == "auxiliary"))


def site_term(site: Site, q: Site | None, exact: bool, fixed: bool) -> Term:
    """Return the term of a site of the model that has a density.

    Args:
        site: the model's site.
        q: the guide's site of that name, for a latent.
        exact: whether an analytic KL is exact.
        fixed: whether no latent can change the density.
    """
    if site.role == "latent":
        assert q is not None
        if isinstance(site.fn, StackedDistribution) and isinstance(q.fn, StackedDistribution):
            over_time = sum_over_time(site, latent_term(site.stepwise(), q.stepwise(), exact))
            return replace(over_time, draws=(q,), in_model=site)
        return replace(latent_term(site, q, exact), draws=(q,), in_model=site)
    if site.role == "deterministic":  # a latent that poutine.reparam split into parts
        return _negated(replace(_likelihood(site, "auxiliary"), draws=(site,)))
    return replace(_likelihood(site, likelihood_kind(site, fixed)), draws=(site,))


def likelihood_kind(site: Site, fixed: bool) -> TermKind:
    """Return the kind of the term of a site that is no latent."""
    return "likelihood" if site.role == "observed" else "constant" if fixed else "factor"


def analytic_is_exact(run: TracePair) -> frozenset[str]:
    """Return the latents whose predecessors in the model all precede them in the guide: no parent is a descendant.

    E_q[log q(z|..) - log p(z|parents)] is E of the KL only while the parents do not depend on z under q.
    """
    order = {draw: i for i, draw in enumerate(_draws(run.guide))}
    drawn = {name for name, site in run.model.items() if site.role == "latent" and name in run.guide}
    exact, latest = set(drawn), -1
    for name, t in _draws(run.model):
        if name in drawn:
            position = order.get((name, t), order.get((name, 0), len(order)))
            if latest >= position:
                exact.discard(name)
            latest = max(latest, position)
    return frozenset(exact)


def _draws(sites: Mapping[str, Site]) -> Iterator[tuple[str, int]]:
    """Yield sites and steps in the order in which a program draws them; of a scan, two steps suffice."""
    runs = groupby(sites.items(), lambda item: item[1].fn.run if isinstance(item[1].fn, StackedDistribution) else None)
    for scan, members in runs:
        names = [name for name, _ in members]
        for t in (0,) if scan is None else (1, 0) if scan.reverse else (0, 1):
            yield from ((name, t) for name in names)


def term_of(site: Site, kind: TermKind, nats: Tensor, **more: Any) -> Term:
    """Return the term of a site with these nats."""
    event_shape = torch.Size(site.fn.event_shape)
    return Term(site.name, kind, site.plates, site.scale, site.mask, event_shape, nats, **more)


def sum_over_time(site: Site, steps: Term) -> Term:
    """Return the term of a site over time from the same term with time as a plate."""
    score = None if steps.score is None else steps.score.sum(-1)
    return term_of(site, steps.kind, steps.nats.sum(-1), is_analytic=steps.is_analytic, score=score, steps=steps)


def _likelihood(site: Site, kind: TermKind) -> Term:
    if isinstance(site.fn, StackedDistribution):
        return sum_over_time(site, _likelihood(site.stepwise(), kind))
    return term_of(site, kind, site.log_prob())


def _negated(term: Term) -> Term:
    return replace(term, nats=-term.nats, steps=term.steps and _negated(term.steps))


def latent_term(p: Site, q: Site, exact: bool) -> Term:
    """Return the KL of a latent; an analytic one only where that is ``exact``."""
    if exact and not is_point(q.fn) and alike(p.scale, q.scale) and _same_masks(p, q):
        analytic = _analytic_kl(q.fn, p.fn)
        if analytic is not None and _nested(p, q):
            nats, by_event = analytic
            score = None if q.fn.has_rsample else log_density(q)[1]
            per_dim = None if by_event is None else lambda: _masked_event(by_event, p)
            term = term_of(p, "latent", masked(nats, p.mask), is_analytic=True, score=score, per_dim=per_dim)
            return _unless_infinite(term, p, q) if _may_be_infinite(p.fn) or _may_be_infinite(q.fn) else term
    return _sampled_term(p, q)


def _sampled_term(p: Site, q: Site) -> Term:
    log_q, score = log_density(q)
    if not alike(p.scale, q.scale):
        log_q = log_q * (q.scale / p.scale)
    per_dim = (lambda: sampled_per_dim(p, q)) if factorizes(p, q) else None
    prior = p.fn if is_point(q.fn) and not is_point(p.fn) else None
    return term_of(p, "latent", log_q - p.log_prob(), score=score, per_dim=per_dim, prior=prior)


def _may_be_infinite(fn: Distribution) -> bool:
    """Return whether a KL may be infinite for some parameters: the support depends on them, or a mean may not exist."""
    while isinstance(fn, Independent | MaskedDistribution):
        fn = fn.base_dist
    return isinstance(fn, Uniform | Pareto | Bernoulli | Categorical | OneHotCategorical | Poisson)


def _unless_infinite(analytic: Term, p: Site, q: Site) -> Term:
    """Return log q - log p at the draw in place of an analytic term that is not finite, and say so once."""
    finite = torch.isfinite(analytic.nats).all()
    if not is_capturing() and finite:
        return analytic
    drawn = _sampled_term(p, q)
    if is_capturing():  # the graph decides
        exact, other = analytic.per_dim, drawn.per_dim
        per_dim = None if exact is None or other is None else lambda: torch.where(finite, exact(), other())
        return replace(analytic, nats=torch.where(finite, analytic.nats, drawn.nats), per_dim=per_dim)
    if torch.isfinite(drawn.nats).all():
        _warn_of_infinity(p.name, _kind(q.fn), _kind(p.fn))
    return drawn


def log_density(q: Site) -> tuple[Tensor, Tensor | None]:
    """Return log q at the draw with its pathwise gradient, and the factor of the score-function estimator."""
    parts = q.score_parts()
    score = None if is_identically_zero(parts.score_function) else parts.score_function
    if score is None and q.fixed is not None:
        return _less_gradient(parts.log_prob, q.fixed.log_prob()), None
    if parts.entropy_term is parts.log_prob or score is None or isinstance(q.fn, Unit):  # a factor is no density
        return parts.log_prob, score
    if is_identically_zero(parts.entropy_term):
        return parts.log_prob.detach(), score
    return parts.entropy_term + (parts.log_prob - parts.entropy_term).detach(), score


def _less_gradient(x: Tensor, other: Tensor) -> Tensor:
    """Return ``x`` without the gradient of ``other``."""
    return x - (other - other.detach())


def _analytic_kl(q: Distribution, p: Distribution) -> tuple[Tensor, Tensor | None] | None:
    """Return KL(q ‖ p) per row, and per element of the event where both factorize; None without a formula."""
    n = len(q.event_shape)
    q_base, p_base = univariate(q), univariate(p)
    try:
        if n and q_base is not None and p_base is not None:
            per_dim = _kl_divergence(q_base, p_base)
            return per_dim.flatten(per_dim.dim() - n).sum(-1), per_dim
        return _kl_divergence(q, p), None
    except (NotImplementedError, RuntimeError):
        # A RuntimeError: categories of different numbers, or, in a capture, a formula that depends on values (the
        # transforms of a Weibull, equal by chance only).
        return None


def _kl_divergence(q: Distribution, p: Distribution) -> Tensor:
    """Return torch's KL(q ‖ p); that of binomials without a branch on their counts, which a graph cannot have."""
    if not (isinstance(q, Binomial) and isinstance(p, Binomial)):
        return kl_divergence(q, p)
    if not check_or_defer((q.total_count == p.total_count).all()):
        raise NotImplementedError
    return q.total_count * (q.probs * (q.logits - p.logits) + (-q.probs).log1p() - (-p.probs).log1p())


def univariate(fn: Distribution) -> Distribution | None:
    """Return the elementwise distribution inside ``fn.to_event(n)``; None where the event does not factorize."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn if not fn.event_shape else None


def factorizes(p: Site, q: Site) -> bool:
    """Return whether the KL of a latent is a sum over the elements of its event."""
    return bool(
        p.event_dim
        and not is_point(q.fn)
        and alike(p.scale, q.scale)
        and univariate(p.fn) is not None
        and univariate(q.fn) is not None
    )


def sampled_per_dim(p: Site, q: Site) -> Tensor:
    """Return log q - log p at the draw per element of the event."""
    log_q, log_p = log_density_per_dim(q), log_density_per_dim(p)
    if q.scored:
        log_q = log_q.detach()
    elif q.fixed is not None:
        log_q = _less_gradient(log_q, log_density_per_dim(q.fixed))
    return log_q - log_p


def log_density_per_dim(site: Site) -> Tensor:
    """Return the log density per element of an event that factorizes."""
    base = univariate(site.fn)
    assert base is not None
    return _masked_event(base.log_prob(site.value), site)


def _masked_event(x: Tensor, site: Site) -> Tensor:
    """Mask values per element of the event by the site's mask over batches."""
    mask = site.mask
    return masked(x, expand_to_event(mask, site.event_dim) if isinstance(mask, Tensor) else mask)


def _nested(p: Site, q: Site) -> bool:
    """Return False, and say so once, where q is unbounded on a side on which p is bounded: its KL is infinite.

    The term at the draw is finite wherever the draw falls into the support of p.
    """
    inner, outer = _bounds(q.fn), _bounds(p.fn)
    if inner is None or outer is None or all(a or not b for a, b in zip(inner, outer, strict=True)):
        return True
    _warn_of_support(p.name, _kind(q.fn), _kind(p.fn))
    return False


def _kind(fn: Distribution) -> str:
    while isinstance(fn, Independent | MaskedDistribution):
        fn = fn.base_dist
    return type(fn).__name__


def _same_masks(p: Site, q: Site) -> bool:
    return alike(p.mask, q.mask) and alike(mask_in_event(p.fn), mask_in_event(q.fn))


def _bounds(fn: Distribution) -> tuple[bool, bool] | None:
    """Return whether the support is bounded below and above; None where its kind does not tell."""
    base = univariate(fn)
    try:
        support = None if base is None else base.support
    except NotImplementedError:
        return None
    if support is constraints.real:
        return False, False
    if support is constraints.boolean:
        return True, True
    bounds = hasattr(support, "lower_bound"), hasattr(support, "upper_bound")
    return bounds if any(bounds) else None


@cache
def _warn_of_support(name: str, q: str, p: str) -> None:
    warnings.warn(
        f"Site '{name}': the guide's {q} reaches beyond the support of the model's {p}, so that KL(q || p) is "
        "infinite. The term is log q - log p at the draw, as with kl='sampled'. Give the guide the support of the "
        "prior, as AutoNormal does.",
        stacklevel=2,
    )


@cache
def _warn_of_infinity(name: str, q: str, p: str) -> None:
    warnings.warn(
        f"Site '{name}': KL(q || p) of the guide's {q} and the model's {p} is not finite. The term is log q - log p at "
        "the draw, as with kl='sampled'. Give the guide the support of the prior.",
        stacklevel=2,
    )


def auxiliary_term(site: Site) -> Term:
    """Return log q of a site that the guide alone has."""
    steps = site.stepwise()
    nats, score = log_density(steps)
    term = term_of(steps, "auxiliary", nats, score=score)
    return replace(term if steps is site else sum_over_time(site, term), draws=(site,))


def _is_passed_on(auxiliary: Term, latent: Term | None) -> bool:
    """Return True where an auxiliary site is one latent before its transform (AutoNormal's ``z_unconstrained``)."""
    return (
        latent is not None
        and _is_determined(latent)
        and latent.score is None
        and set(latent.plates) == set(auxiliary.plates)
        and (latent.steps is None) == (auxiliary.steps is None)
        and alike(latent.scale, auxiliary.scale)
    )


def _is_determined(term: Term) -> bool:
    """Return True for a latent that the guide does not draw but gives as a point."""
    if term.kind != "latent" or not term.draws:
        return False
    return is_point(term.draws[0].fn)


def _add_log_q(latent: Term, auxiliary: Term) -> Term:
    """Return one KL for a latent and the auxiliary site that it was drawn as."""
    steps = latent.steps
    if steps is not None and auxiliary.steps is not None:
        steps = replace(steps, nats=steps.nats + auxiliary.steps.nats, score=auxiliary.steps.score)
    nats = latent.nats + auxiliary.nats
    return replace(latent, nats=nats, score=auxiliary.score, steps=steps, transformed=True)


def add_auxiliary(terms: dict[str, Term], auxiliary: Iterable[Term]) -> dict[str, Term]:
    """Add log q of the sites that the guide alone has, to the latent that one is passed on to, else as terms."""
    joint: dict[str, Term] = {}
    single = set()
    for term in auxiliary:
        name = term.name.removesuffix("_unconstrained")
        if name != term.name and _is_passed_on(term, terms.get(name)):
            terms = terms | {name: _add_log_q(terms[name], term)}
            single.add(name)
        else:
            joint[term.name] = term
    if not joint:
        return terms
    latents = {n: t for n, t in terms.items() if t.kind == "latent" and n not in single and t.posterior is None}
    joint |= {n: t for n, t in latents.items() if _is_determined(t)} or latents
    return terms | {n: replace(t, joint=True) for n, t in joint.items()}
