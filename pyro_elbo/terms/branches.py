"""Add up the terms of the branches of a run: one for each value of the sites that a guide marks ``"sequential"``."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_elbo.assumptions import is_capturing
from pyro_elbo.errors import SiteError
from pyro_elbo.programs import Site, TracePair
from pyro_elbo.terms.enumerated import evaluate_run
from pyro_elbo.terms.evaluate import KLForm
from pyro_elbo.terms.summed_out import WeightOf
from pyro_elbo.terms.term import Term, alike

Share = tuple[TracePair, Term]


def evaluate_branches(branches: Sequence[TracePair], kl: KLForm, weight_of: WeightOf | None = None) -> dict[str, Term]:
    """Return the term of each site of a run, by name, averaged over its branches: see :func:`evaluate_run`.

    A site contributes nothing to the branches that lack it.

    Raises:
        SiteError: a site outside of a plate depends on a value inside, or its plates or scale change with a value.
    """
    found = [evaluate_run(branch, kl, weight_of) for branch in branches]
    if len(branches) == 1:
        return found[0]
    names = dict.fromkeys(name for terms in found for name in terms)
    return {n: _add([(b, t[n]) for b, t in zip(branches, found, strict=True) if n in t]) for n in names}


def _add(shares: Sequence[Share]) -> Term:
    terms = [term for _, term in shares]
    first = terms[0]
    for branch, term in shares:
        if (term.kind, set(term.plates)) != (first.kind, set(first.plates)) or not alike(term.scale, first.scale):
            raise SiteError(
                f"Site '{first.name}': its plates or its scale change with the value of {_names(_turns(branch))}, "
                "which the guide enumerates value by value. Give the site one scale and the same plates in every run, "
                "or another name."
            )
    if not is_capturing():
        _check_outside(shares)
    per_dim = [t.per_dim for t in terms if t.per_dim is not None and t.event_shape == first.event_shape]
    steps = [t.steps for t in terms if t.steps is not None]
    return replace(
        _sum_terms(terms),
        steps=_sum_terms(steps) if steps else None,
        per_dim=(lambda: _sum(x() for x in per_dim)) if len(per_dim) == len(terms) else None,
        is_analytic=all(t.is_analytic for t in terms),
        averaged=_sum_later(t.averaged for t in terms),
    )


def _sum_terms(terms: Sequence[Term]) -> Term:
    return replace(
        terms[0],
        nats=_sum(t.nats for t in terms),
        mask=_any([t.mask for t in terms]),
        posterior=_sum_known(t.posterior for t in terms),
        pairs=_sum_later(t.pairs for t in terms),
    )


def _sum_known(parts: Iterable[Tensor | None]) -> Tensor | None:
    known = [x for x in parts if x is not None]
    return _sum(known) if known else None


def _sum_later(parts: Iterable[Callable[[], Tensor] | None]) -> Callable[[], Tensor] | None:
    known = [x for x in parts if x is not None]
    return (lambda: _sum(x() for x in known)) if known else None


def _sum(parts: Iterable[Tensor]) -> Tensor:
    first, *others = parts
    return sum(others, start=first)


def _any(masks: Sequence[Tensor | bool | None]) -> Tensor | bool | None:
    """Return the entries that count in some branch."""
    if all(alike(m, masks[0]) for m in masks):
        return masks[0]
    return None if any(m is None for m in masks) else _sum(map(torch.as_tensor, masks)) > 0


def _turns(branch: TracePair) -> list[Site]:
    return [s for s in branch.guide.values() if s.turn is not None]


def _names(sites: Iterable[Site]) -> list[str]:
    return [s.name for s in sites]


def _check_outside(shares: Sequence[Share]) -> None:
    """Raise SiteError for a site whose density changes with a value in a plate that it lies outside of.

    All rows of the plate together have exponentially many values. Draws in between hide the change.
    """
    known: dict[tuple, Tensor] = {}
    for branch, term in shares:
        turns, plates = _turns(branch), set(term.plates)
        inside = [s for s in turns if not set(s.plates) <= plates]
        if not inside or _draws_between(branch, turns[0], plates):
            return
        above = tuple((s.name, s.turn) for s in turns if set(s.plates) <= plates)
        nats = term.nats.detach() * math.prod(s.turn.count for s in inside if s.turn is not None)
        if not torch.allclose(nats, known.setdefault(above, nats), rtol=1e-4, atol=1e-6, equal_nan=True):
            raise SiteError(
                f"Site '{term.name}' depends on {_names(inside)}, which the guide enumerates in a plate that "
                f"'{term.name}' lies outside of: all rows together have exponentially many values. Put the site into "
                "the plate, or remove the mark so that the guide draws these values."
            )


def _draws_between(branch: TracePair, first: Site, plates: set) -> bool:
    """Return whether the guide draws something from ``first`` on that a site in these plates may depend on."""
    names = list(branch.guide)
    later = (branch.guide[n] for n in names[names.index(first.name) :])
    return any(s.is_drawn and s.turn is None and set(s.plates) <= plates for s in later)
