r"""Evaluate the terms of a run in which discrete sites have all their values at once.

Sites that the guide lacks are summed out exactly (``summed_out``). A site that the guide enumerates makes every term
below it an expectation,

.. math:: \sum_k q(k \mid x)\, \text{nats}(k),

with the gradient of q. It has all values of k side by side, or one in each run of the programs, a branch; ``branches``
adds their terms up. A site without pathwise gradient that is drawn for each value of k enters by the factor
:math:`1 + s - \bot(s)`, s its log q and ⊥ the same number as a constant, whose gradient rewards the draw by what it
changes, weighted by q(k).

References:
    Foerster, Farquhar, Al-Shedivat, Rocktäschel, Xing, Whiteson (2018), DiCE: The infinitely differentiable Monte Carlo
    estimator, arXiv:1802.05098.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import mul

import torch
from opt_einsum import contract, get_symbol
from torch import Tensor

from pyro_elbo.errors import SiteError
from pyro_elbo.programs import Plate, Site, TracePair, fixed_sites, step_before
from pyro_elbo.sequences import StackedDistribution
from pyro_elbo.terms.counted import choose_in_turn
from pyro_elbo.terms.evaluate import (
    KLForm,
    add_auxiliary,
    analytic_is_exact,
    auxiliary_term,
    evaluate_terms,
    factorizes,
    latent_term,
    likelihood_kind,
    log_density,
    log_density_per_dim,
    site_term,
    sum_over_time,
    term_of,
)
from pyro_elbo.terms.labeled import (
    Label,
    Labeled,
    combine,
    label,
    label_site,
    label_steps,
    plate_labels,
    sort_labels,
    unlabel,
    values_last,
)
from pyro_elbo.terms.summed_out import Joined, Posterior, WeightOf, choose_best, connected, log_prior, sum_out
from pyro_elbo.terms.term import Term, alike


def evaluate_run(run: TracePair, kl: KLForm, weight_of: WeightOf | None = None) -> dict[str, Term]:
    """Return the term of each site of a run, by name: :func:`evaluate_terms`, with enumerated sites summed out.

    The terms of a branch are its share in those of all branches.

    Args:
        run: the sites of model and guide.
        kl: the form of the KL.
        weight_of: the weights of the KL, for the posteriors of summed-out sites that maximize the weighted bound; None
            for the exact posteriors.

    Raises:
        SiteError: the scales or plates of enumerated sites do not allow to sum them out.
        ArgumentError: sites that are summed out together have different weights.
    """
    return _EnumeratedRun(run, kl).terms(weight_of) if run.enumerated else evaluate_terms(run, kl)


def most_probable(run: TracePair) -> dict[str, Tensor]:
    """Return the most probable joint values of all sites that are summed out, given all others.

    Rows and steps that a mask leaves out, and on which nothing that counts depends, have no part in the choice of the
    others; they have the most probable values given these.

    Args:
        run: the sites of model and guide; the guide enumerates none.

    Returns:
        By site, 1 at its value and 0 at the others, shaped like ``Term.posterior``.

    Raises:
        SiteError: as from :func:`evaluate_run`.
    """
    return _EnumeratedRun(run, "sampled").most_probable()


@dataclass(frozen=True)
class _Part:
    """The term of a site before its sums: nats = rest + E[log p], or rest - E[log p] for a KL.

    Attributes:
        term: the term, without its nats unless it is complete.
        rest: log q, or all nats of a site that no summed-out site changes; None where the term is complete.
        log_p: the log density that depends on summed-out sites; None without.
        score: log q of a draw without pathwise gradient at each enumerated value, or in this branch.
    """

    term: Term
    rest: Labeled | None = None
    log_p: Labeled | None = None
    score: Labeled | None = None


class _EnumeratedRun:
    """The evaluation of one run."""

    def __init__(self, run: TracePair, kl: KLForm) -> None:
        self.run, self.summed = run, run.summed_out
        self.exact = analytic_is_exact(run) if kl == "auto" else frozenset()
        self.fixed = fixed_sites(run.model.values())
        averaged = {n: s for n, s in run.guide.items() if s.is_enumerated}
        log_q = {n: label_site(replace(s, mask=None).log_prob(), s) for n, s in averaged.items()}
        self.log_q = {n: x for n, x in log_q.items() if averaged[n].turn is None}
        self.turns = [(s, log_q[n].map(log_q[n].x.exp())) for n, s in averaged.items() if s.turn is not None]
        names = list(run.guide)
        self.in_branch = names[names.index(self.turns[0][0].name) :] if self.turns else []
        self.values = {*self.summed, *map(step_before, self.summed)}
        for site in (*run.model.values(), *run.guide.values()):
            self._check_scan(site)

    def terms(self, weight_of: WeightOf | None) -> dict[str, Term]:
        """Return the terms under the posterior of the given weights."""
        parts = self._parts()
        auxiliary = {s.name: self._auxiliary_part(s) for s in self.run.guide.values() if s.role == "auxiliary"}
        scores = [p.score for p in (parts | auxiliary).values() if p.score is not None]
        posteriors = self._posteriors(parts, weight_of)
        terms = {n: self._term(self.run.model[n], p, posteriors.get(n), scores) for n, p in parts.items()}
        return add_auxiliary(terms, (self._term(self.run.guide[n], p, None, scores) for n, p in auxiliary.items()))

    def most_probable(self) -> dict[str, Tensor]:
        """Return the most probable values: see :func:`most_probable`."""
        best: dict[str, Labeled] = {}
        for group, summed in self._groups(self._parts()):
            choose = partial(choose_best, summed=summed, guide=self.run.guide, particle_dim=self.run.particle_dim)
            best |= choose_in_turn(group, summed, choose)
        return {n: self._probabilities(self.run.model[n], best[n], n) for n in self.summed}

    def _parts(self) -> dict[str, _Part]:
        return {n: self._part(s, self.run.guide.get(n)) for n, s in self.run.model.items() if s.has_density}

    def _part(self, site: Site, q: Site | None) -> _Part:
        name, changed = site.name, bool(site.depends_on.intersection(self.values))
        if not (site.depends_on or (q is not None and (q.depends_on or q.turn is not None))):
            return self._complete(site_term(site, q, name in self.exact, name in self.fixed), q)
        if name in self.summed:
            steps = site.stepwise()
            return _Part(term_of(steps, "latent", steps.value, is_analytic=True), None, log_prior(site))
        if site.role == "latent":
            assert q is not None
            return self._of_branch(_latent_part(site, q, name in self.exact, changed), q)
        kind = "auxiliary" if site.role == "deterministic" else likelihood_kind(site, name in self.fixed)
        steps = site.stepwise()
        log_p = label_steps(steps.log_prob(), site)
        term = term_of(steps, kind, log_p.x, draws=_single(site))
        if changed:
            return _Part(term, None, log_p)
        return _Part(term, log_p * -1.0 if term.is_kl else log_p)

    def _auxiliary_part(self, q: Site) -> _Part:
        if not q.depends_on and q.turn is None:
            return self._complete(auxiliary_term(q), q)
        log_q, score = (q.log_prob(), None) if q.is_enumerated else log_density(q)
        term = term_of(q, "auxiliary", log_q, draws=_single(q))
        return self._of_branch(_split(term, label_site(log_q, q), None, score, q), q)

    def _complete(self, term: Term, q: Site | None) -> _Part:
        return _Part(term) if q is None else self._of_branch(_Part(term), q)

    def _of_branch(self, part: _Part, q: Site) -> _Part:
        """Return the part of a site of the guide; what this branch draws alone is no single draw of the term."""
        if q.name not in self.in_branch:
            return part
        score, steps = part.term.score, part.term.steps
        named = part.score if score is None else label_site(score, q)
        steps = None if steps is None else replace(steps, score=None)
        return replace(part, term=replace(part.term, score=None, steps=steps, draws=()), score=named)

    def _posteriors(self, parts: Mapping[str, _Part], weight_of: WeightOf | None) -> dict[str, Posterior]:
        """Return the posterior that each site depends on, by the site."""
        found = {}
        for group, summed in self._groups(parts):
            found |= dict.fromkeys(group, sum_out(group, summed, self.run.guide, self.run.particle_dim, weight_of))
        return found

    def _groups(self, parts: Mapping[str, _Part]) -> Iterator[tuple[dict[str, Joined], list[str]]]:
        """Yield the sites that are summed out together with those that depend on them, and the names of the former."""
        joined = {n: Joined(self.run.model[n], p.log_p, p.term.scale) for n, p in parts.items() if p.log_p is not None}
        depends_on = {n: j.log_p.variables & self.values for n, j in joined.items()}
        now = {step_before(n): n for n in self.summed}
        for names in connected({n: {now.get(v, v) for v in variables} for n, variables in depends_on.items()}):
            yield {n: joined[n] for n in joined if n in names}, [n for n in self.summed if n in names]

    def _term(self, site: Site, part: _Part, posterior: Posterior | None, scores: list[Labeled]) -> Term:
        term, nats = part.term, part.rest
        if posterior is not None:
            inner = posterior.nats[site.name]
            nats = inner if not term.is_kl or site.name in self.summed else _minus(part.rest, inner)
            if not set(posterior.independent).issuperset(term.plates):
                term = replace(term, independent=posterior.independent)
        if nats is None:
            return self._weighted(site, term, scores) if self.turns else term
        nats = self._times_branch(site, nats)
        for factor in self._rewarded(term, nats.variables, scores):
            nats = nats * factor
        if nats.variables and isinstance(site.fn, StackedDistribution):
            raise _enumerated_outside(site.name, nats.variables)
        expected = bool(nats.variables or self.turns)
        term = replace(term, nats=unlabel(self._expect(site, nats)), expected=expected)
        if term.per_dim is not None:
            term = replace(term, per_dim=self._average_per_dim(site, term))
        if site.name in self.log_q or any(s.name == site.name for s, _ in self.turns):
            term = replace(term, averaged=lambda: self._averaged(site))
        if posterior is None or part.log_p is None:
            return term
        if site.name in self.summed:
            marginal, chain = posterior.marginals[site.name], posterior.chains.get(site.name)
            names = step_before(site.name), site.name
            pairs = None if chain is None else lambda: self._probabilities(site, chain.pairs(), *names)
            term = replace(term, posterior=self._probabilities(site, marginal, site.name), pairs=pairs)
            return _over_time(site, term) if isinstance(site.fn, StackedDistribution) else term
        if isinstance(site.fn, StackedDistribution):
            return _over_time(site, term)
        q = self.run.guide.get(site.name)
        if q is None or expected or not factorizes(site, q):
            return term
        return replace(term, per_dim=lambda: _per_dim(site, q, posterior.marginals[site.name]))

    def _weighted(self, site: Site, term: Term, scores: list[Labeled]) -> Term:
        """Return the share of this branch in a term that no enumerated site changes."""
        weight = reduce(mul, self._rewarded(term, set(), scores), self._branch_weight(site))
        w = unlabel(self._expect(site, weight))
        share = lambda x, w: torch.where(w > 0, x, torch.zeros_like(x)) * w  # noqa: E731
        steps = None if term.steps is None else replace(term.steps, nats=share(term.steps.nats, w.unsqueeze(-1)))
        steps = steps and replace(steps, per_dim=None)
        per_dim = None if term.per_dim is None else self._average_per_dim(site, term)
        return replace(term, nats=share(term.nats, w), steps=steps, per_dim=per_dim, expected=True)

    def _average_per_dim(self, site: Site, term: Term) -> Callable[[], Tensor]:
        """Return the KL per element of the event, averaged like its sum."""
        variables, per_dim = {**site.variables, **self.run.guide[site.name].variables}, term.per_dim
        assert per_dim is not None
        named = lambda: label(per_dim(), variables, None, site.event_dim)  # noqa: E731
        return lambda: unlabel(self._expect(site, self._times_branch(site, named())))

    def _branch_weight(self, site: Site) -> Labeled:
        """Return q of this branch; a site outside of a plate of it is met in all its branches, and counts once."""
        above = ((s, q, set(s.plates) <= set(site.plates)) for s, q in self.turns)
        one = Labeled(torch.ones(()), ())
        return reduce(mul, (q if inside else 1 / s.turn.count for s, q, inside in above), one)

    def _times_branch(self, site: Site, x: Labeled) -> Labeled:
        if not self.turns:
            return x
        return combine(lambda x, w: torch.where(w > 0, x, torch.zeros_like(x)) * w, x, self._branch_weight(site))

    def _rewarded(self, term: Term, variables: set[str], scores: list[Labeled]) -> list[Labeled]:
        """Return the factors of one by which draws at enumerated values are rewarded by a term."""
        rows = _labels(term.reward_plates)
        relevant = [s for s in scores if s.variables <= variables]
        summed = [s.sum([a for a in s.labels if self._is_row(a) and a not in rows]) for s in relevant]
        return [s.map(1 + s.x - s.x.detach()) for s in summed]

    def _averaged(self, site: Site) -> Tensor:
        """Return q of each value of a site that the guide enumerates, as the last dimension."""
        q, weight = self.run.guide[site.name], self._branch_weight(site)
        asked = weight.variables.union([] if q.turn else [site.name])
        joint = weight * self._probability(asked) if asked else weight
        alone = joint.sum([a for a in joint.labels if a.kind == "value" and a.name != site.name])
        if q.turn is None:
            return unlabel(values_last(alone, site.name))
        chosen = torch.arange(q.turn.count, device=alone.x.device) == q.turn.index
        event = Label("event", "", 0, q.turn.count)
        return unlabel(Labeled(alone.x.unsqueeze(-1) * chosen, (*alone.labels, event)))

    def _check_scan(self, site: Site) -> None:
        """Raise SiteError where a scan depends on what the guide enumerates, or its latent has no time in the guide."""
        if not isinstance(site.fn, StackedDistribution) or not site.depends_on:
            return
        if drawn := site.depends_on - self.values:
            raise _enumerated_outside(site.name, drawn)
        q = self.run.guide.get(site.name)
        if site.role == "latent" and q is not None and not isinstance(q.fn, StackedDistribution):
            raise SiteError(
                f"Site '{site.name}' of a pe.scan depends on {sorted(site.depends_on)}, which the model sums out step "
                "by step, but the guide draws it for all steps at once. Draw it in a pe.scan of the guide."
            )

    def _is_row(self, a: Label) -> bool:
        return a.kind == "batch" and a.dim != self.run.particle_dim

    def _probabilities(self, site: Site, marginal: Labeled, *names: str) -> Tensor:
        """Return the posterior over the values of variables, which are the last dimensions."""
        others = self.values.difference(names)
        alone = marginal.sum([a for a in marginal.labels if a.name in others])
        return unlabel(self._expect(site, self._times_branch(site, values_last(alone, *names))))

    def _expect(self, site: Site, x: Labeled) -> Labeled:
        """Return the expectation under the guide over the sites that it enumerates."""
        if not x.variables:
            return x
        weight = self._probability(x.variables)
        if wrong := [a for a in weight.labels if self._is_row(a) and a not in plate_labels(site)]:
            raise SiteError(
                f"Site '{site.name}' depends on {sorted(x.variables)}, which the guide enumerates in a plate "
                f"(dimension {wrong[0].dim}) that '{site.name}' lies outside of: all rows together have exponentially "
                f"many values. Put '{site.name}' into the plate, or remove the mark so that the guide draws them."
            )
        possible = combine(lambda nats, w: torch.where(w > 0, nats, torch.zeros_like(nats)), x, weight)
        return (possible * weight).sum([a for a in possible.labels if a.kind == "value"])

    def _probability(self, variables: set[str]) -> Labeled:
        """Return the joint probability of sites that the guide enumerates side by side."""
        above = _closure(variables, self.log_q)
        order = sort_labels({a for n in above for a in self.log_q[n].labels})
        symbols = {a: get_symbol(i) for i, a in enumerate(order)}
        kept = [a for a in order if a.kind == "batch" or a.name in variables]
        inputs = ",".join("".join(symbols[a] for a in self.log_q[n].labels) for n in above)
        operands = [self.log_q[n].x.exp() for n in above]
        return Labeled(contract(f"{inputs}->{''.join(symbols[a] for a in kept)}", *operands), tuple(kept))


def _enumerated_outside(name: str, variables: Iterable[str]) -> SiteError:
    return SiteError(
        f"Site '{name}' of a pe.scan depends on {sorted(variables)}, which the guide enumerates. Mark that site "
        "'sequential', which runs the scan once per value, or draw it in the guide without a mark."
    )


def _over_time(site: Site, steps: Term) -> Term:
    """Return the term of a scan's site from that of its steps, whose rows may be coupled."""
    whole = replace(sum_over_time(site, steps), draws=steps.draws, independent=steps.independent)
    if steps.independent is not None:
        moved = tuple(p._replace(dim=p.dim - 1) for p in steps.independent)
        whole = replace(whole, steps=replace(steps, independent=moved))
    return replace(whole, posterior=steps.posterior, pairs=steps.pairs, in_model=steps.in_model)


def _latent_part(p: Site, q: Site, exact: bool, changed: bool) -> _Part:
    """Return the part of a latent that the guide has too."""
    variables = {**p.variables, **q.variables}
    if exact and not changed and not q.is_enumerated and all(variables[d] == v for d, v in p.variables.items()):
        term = replace(latent_term(p, q, True), draws=_single(q), in_model=p)
        return _split(term, label(term.nats, variables), None, term.score, q)
    log_q, score = (q.log_prob(), None) if q.is_enumerated else log_density(q.stepwise())
    if not alike(p.scale, q.scale):
        log_q = log_q * (q.scale / p.scale)
    steps = p.stepwise()
    rest, log_p = label_steps(log_q, q), label_steps(steps.log_prob(), p)
    term = term_of(steps, "latent", log_q, is_analytic=q.is_enumerated, draws=_single(q), in_model=p)
    return _split(term, rest if changed else rest - log_p, log_p if changed else None, score, q)


def _split(term: Term, rest: Labeled, log_p: Labeled | None, score: Tensor | None, q: Site) -> _Part:
    """Return a part; the score of a draw at each enumerated value is kept apart from that of one draw."""
    named = None if score is None else label_site(score, q)
    if named is None or not named.variables:
        return _Part(replace(term, score=score), rest, log_p)
    return _Part(replace(term, score=None), rest, log_p, named)


def _single(site: Site) -> tuple[Site, ...]:
    """Return a site that has one value; none where it has one for each value of enumerated sites."""
    shape = site.value.shape[: site.value.dim() - site.event_dim]
    return () if any(len(shape) >= -d and shape[d] > 1 for d in site.variables) else (site,)


def _minus(rest: Labeled | None, inner: Labeled) -> Labeled:
    return inner * -1.0 if rest is None else rest - inner


def _labels(plates: Iterable[Plate]) -> frozenset[Label]:
    return frozenset(Label("batch", "", p.dim, p.size) for p in plates)


def _closure(variables: set[str], log_q: Mapping[str, Labeled]) -> list[str]:
    """Return sites that the guide enumerates, with those that their probabilities depend on, in program order."""
    found, new = set(variables), set(variables)
    while new:
        new = {v for n in new for v in log_q[n].variables} - found
        found |= new
    return [n for n in log_q if n in found]


def _per_dim(p: Site, q: Site, marginal: Labeled) -> Tensor:
    """Return log q - E_q*[log p] per element of the event, under the posterior of summed-out sites."""
    log_p = label_site(log_density_per_dim(p), p, p.event_dim)
    expected = (marginal * log_p).sum([a for a in marginal.labels if a.kind == "value"])
    return unlabel(label_site(log_density_per_dim(q), q, q.event_dim) - expected)
