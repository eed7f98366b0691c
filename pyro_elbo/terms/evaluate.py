r"""Evaluate the term of each site: the log-likelihood of the data, the KL of a latent.

A KL is analytic where a formula exists and is exact, otherwise it is :math:`\log q - \log p` at the draw.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal

import torch
from pyro.distributions import Delta
from pyro.distributions.util import is_identically_zero
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence

from pyro_elbo.assumptions import check_or_defer
from pyro_elbo.masking import expand_to_event, masked
from pyro_elbo.programs import Site, TracePair
from pyro_elbo.sequences import StackedDistribution
from pyro_elbo.terms.term import Term, TermKind

KLForm = Literal["auto", "sampled"]


def evaluate_terms(run: TracePair, kl: KLForm) -> dict[str, Term]:
    """Return the term of each site of a run, by name.

    With ``kl="auto"`` a latent's KL is analytic where a formula exists and is exact, that is, where no parent
    of the site in the model can be its descendant in the guide. With ``"sampled"`` it never is.
    """
    exact = _analytic_is_exact(run) if kl == "auto" else frozenset()
    terms = {}
    for name, site in run.model.items():
        if site.role == "latent":
            q = run.guide[name]
            if isinstance(site.fn, StackedDistribution) and isinstance(q.fn, StackedDistribution):
                term = sum_over_time(site, _latent_term(site.stepwise(), q.stepwise(), name in exact))
            else:
                term = _latent_term(site, q, name in exact)
            terms[name] = replace(term, draws=(q,))
        elif site.role != "deterministic":
            likelihood = _likelihood(site, "factor" if site.role == "factor" else "likelihood")
            terms[name] = replace(likelihood, draws=(site,))
    for site in run.guide.values():
        if site.role == "auxiliary":
            _add_auxiliary(terms, site)
    return terms


def _analytic_is_exact(run: TracePair) -> frozenset[str]:
    """Return the latents whose predecessors in the model all precede them in the guide: no parent is a descendant.

    E_q[log q(z|..) - log p(z|parents)] is E of the KL only while the parents do not depend on z under q.
    """
    order = {draw: i for i, draw in enumerate(_draws(run.guide))}
    exact, latest = {name for name, site in run.model.items() if site.role == "latent"}, -1
    for name, t in _draws(run.model):
        if run.model[name].role == "latent":
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


def _term(site: Site, kind: TermKind, nats: Tensor, **more: Any) -> Term:
    event_shape = torch.Size(site.fn.event_shape)
    return Term(site.name, kind, site.plates, site.scale, site.mask, event_shape, nats, **more)


def sum_over_time(site: Site, steps: Term) -> Term:
    """Return the term of a site over time from the same term with time as a plate."""
    score = None if steps.score is None else steps.score.sum(-1)
    return _term(site, steps.kind, steps.nats.sum(-1), is_analytic=steps.is_analytic, score=score, steps=steps)


def _likelihood(site: Site, kind: TermKind) -> Term:
    if isinstance(site.fn, StackedDistribution):
        return sum_over_time(site, _likelihood(site.stepwise(), kind))
    return _term(site, kind, site.log_prob())


def _latent_term(p: Site, q: Site, exact: bool) -> Term:
    if exact and not is_point(q.fn) and _same(p.scale, q.scale) and _same(p.mask, q.mask):
        analytic = _analytic_kl(q.fn, p.fn)
        if analytic is not None:
            nats, by_event = analytic
            score = None if q.fn.has_rsample else _log_q(q)[1]
            per_dim = None if by_event is None else lambda: _masked_event(by_event, p)
            return _term(p, "latent", masked(nats, p.mask), is_analytic=True, score=score, per_dim=per_dim)
    log_q, score = _log_q(q)
    if not _same(p.scale, q.scale):
        log_q = log_q * (q.scale / p.scale)
    per_dim = (lambda: _sampled_per_dim(p, q)) if _factorizes(p, q) else None
    return _term(p, "latent", log_q - p.log_prob(), score=score, per_dim=per_dim)


def _log_q(q: Site) -> tuple[Tensor, Tensor | None]:
    """Return log q at the draw with its pathwise gradient, and the factor of the score-function estimator."""
    parts = q.score_parts()
    score = None if is_identically_zero(parts.score_function) else parts.score_function
    if parts.entropy_term is parts.log_prob or score is None:
        return parts.log_prob, score
    if is_identically_zero(parts.entropy_term):
        return parts.log_prob.detach(), score
    return parts.entropy_term + (parts.log_prob - parts.entropy_term).detach(), score


def _analytic_kl(q: Distribution, p: Distribution) -> tuple[Tensor, Tensor | None] | None:
    """Return KL(q ‖ p) per row, and per element of the event where both factorize; None without a formula."""
    n = len(q.event_shape)
    q_base, p_base = univariate(q), univariate(p)
    try:
        if n and q_base is not None and p_base is not None:
            per_dim = kl_divergence(q_base, p_base)
            return per_dim.flatten(per_dim.dim() - n).sum(-1), per_dim
        return kl_divergence(q, p), None
    except NotImplementedError:
        return None


def univariate(fn: Distribution) -> Distribution | None:
    """Return the elementwise distribution inside ``fn.to_event(n)``; None where the event does not factorize."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn if not fn.event_shape else None


def is_point(fn: Distribution) -> bool:
    """Return True for a distribution with all its mass on one value."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def _factorizes(p: Site, q: Site) -> bool:
    return bool(
        p.event_dim
        and not is_point(q.fn)
        and _same(p.scale, q.scale)
        and univariate(p.fn) is not None
        and univariate(q.fn) is not None
    )


def _sampled_per_dim(p: Site, q: Site) -> Tensor:
    log_q, log_p = (_masked_event(univariate(s.fn).log_prob(s.value), s) for s in (q, p))
    return log_q - log_p


def _masked_event(x: Tensor, site: Site) -> Tensor:
    """Mask values per element of the event by the site's mask over batches."""
    mask = site.mask
    return masked(x, expand_to_event(mask, site.event_dim) if isinstance(mask, Tensor) else mask)


def _same(a: Tensor | float | None, b: Tensor | float | None) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and check_or_defer((a == b).all())
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _add_auxiliary(terms: dict[str, Term], site: Site) -> None:
    """Add log q of a site that the guide alone has.

    AutoNormal draws ``z_unconstrained`` and passes it on as a Delta at ``z``: one latent, one KL.
    """
    log_q, score = _log_q(site)
    latent = terms.get(site.name.removesuffix("_unconstrained"))
    if latent is not None and latent.kind == "latent" and _same(latent.scale, site.scale) and latent.score is None:
        terms[latent.name] = replace(latent, nats=latent.nats + log_q, score=score)
    elif isinstance(site.fn, StackedDistribution):
        steps = site.stepwise()
        nats, score = _log_q(steps)
        terms[site.name] = sum_over_time(site, _term(steps, "auxiliary", nats, score=score))
    else:
        terms[site.name] = _term(site, "auxiliary", log_q, score=score)


def stack_particles(runs: list[dict[str, Term]]) -> tuple[dict[str, Term], int | None]:
    """Stack the terms of several runs: particles become a dimension on the left of all plates.

    A site contributes nothing to the runs that lack it.
    """
    if len(runs) == 1:
        return runs[0], None
    depth = max((t.nats.dim() for run in runs for t in run.values()), default=0)
    union = {name: term for run in runs for name, term in run.items()}
    merged = {name: _merge(term, [run.get(name) for run in runs], depth) for name, term in union.items()}
    return merged, -(depth + 1)


def _merge(term: Term, same: list[Term | None], depth: int) -> Term:
    """Stack one site's terms of several runs, with particles at dimension -(depth + 1)."""

    def stack(tensors: list[Tensor | None], event_dim: int) -> Tensor:
        like = next(x for x in tensors if x is not None)
        parts = [torch.zeros_like(like) if x is None else x for x in tensors]
        return torch.stack([x.reshape((1,) * (depth + event_dim - x.dim()) + x.shape) for x in parts])

    score = None if term.score is None else stack([t and t.score for t in same], 0)
    per_dim = None
    if term.per_dim is not None:
        per_dim = lambda: stack([t and t.per_dim and t.per_dim() for t in same], len(term.event_shape))  # noqa: E731
    steps = None if term.steps is None else _merge(term.steps, [t and t.steps for t in same], depth + 1)
    draws = tuple(site for t in same if t is not None for site in t.draws)
    nats = stack([t and t.nats for t in same], 0)
    return replace(term, nats=nats, score=score, per_dim=per_dim, steps=steps, draws=draws)
