"""Terms by row: what every row of the data adds to the bound, scaled as the figures per datum are."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from pyro_elbo.errors import ArgumentError, DataError, GuideError, SiteError, describe
from pyro_elbo.programs import Plate
from pyro_elbo.terms import Term, Terms, frames, is_one

PerRow = Float64[Tensor, " rows"]
PerElement = Float64[Tensor, "rows elements"]


class Rows(NamedTuple):
    """The nats of every row by site, averaged over particles, and the totals of what rows share.

    Attributes:
        log_likelihood, kl: of the sites inside the data plate; the mean over rows is the figure per datum.
        kl_per_dim: of the units of a latent whose KL factorizes, by their names ``z[0]``, ``z[1]``, ...
        entries: how many entries of each observed site a row counts: steps, inner plates, what no mask hides.
        shared: totals of the sites outside the data plate, nats.
    """

    log_likelihood: dict[str, PerRow]
    kl: dict[str, PerRow]
    kl_per_dim: dict[str, dict[str, PerRow]]
    entries: dict[str, PerRow]
    shared: dict[str, float]


def rows_of(terms: Terms, split: str) -> Rows:
    """Return the terms of a split by row; ``split`` names the argument in errors.

    Raises:
        ArgumentError, SiteError, DataError, GuideError: as :func:`pyro_elbo.compare_splits`.
    """
    plate = _checked_plate(terms, split)
    rows = Rows({}, {}, {}, {}, {})
    for name, group in _groups(terms).items():
        is_kl = group[0].is_kl
        if _are_local(group, plate, split):
            nats = torch.stack([_nats(term, plate, terms.particle_dim) for term in group]).sum(0)
            (rows.kl if is_kl else rows.log_likelihood)[name] = nats.squeeze(-1)
        else:
            kind, totals = ("kl", terms.kl_total) if is_kl else ("log_likelihood", terms.log_likelihood_total)
            rows.shared[f"{kind} {name}"] = sum(totals[term.name].item() for term in group)
    for name, site in terms.sites.items():
        if name in rows.kl and (site.steps or site).per_dim is not None and not site.joint:
            per_dim = _nats(site, plate, terms.particle_dim, per_dim=True)
            rows.kl_per_dim[name] = dict(zip(_units(site), per_dim.T, strict=True))
        if name in rows.log_likelihood and site.kind == "likelihood":
            counted = frames(site).double().unsqueeze(-1)
            rows.entries[name] = _by_row(counted, site, plate, terms.particle_dim).squeeze(-1)
    return rows


def check_alike(train: Terms, valid: Terms) -> None:
    """Raise SiteError unless both terms are those of the same programs."""
    sites, others = ({n: _signature(t) for n, t in terms.sites.items()} for terms in (train, valid))
    for name in sites | others:
        if name not in sites or name not in others:
            has = "train_terms" if name in sites else "valid_terms"
            raise SiteError(f"Site '{name}': only {has} has it. Give both splits terms of the same model and guide.")
        if sites[name] != others[name]:
            raise SiteError(
                f"Site '{name}': expected {sites[name]} as in train_terms, got {others[name]} in valid_terms. Give "
                "both splits terms of the same model and guide."
            )


def _signature(site: Term) -> str:
    term = site.steps or site
    return f"a {term.kind} in plates {[p.name for p in term.plates]} with event shape {tuple(term.event_shape)}"


def _checked_plate(terms: Terms, split: str) -> Plate:
    if not isinstance(terms, Terms):
        raise ArgumentError(f"{split} must be terms of a bound, loss.terms(model, guide, x), got {describe(terms)}.")
    plate = terms.data_plate
    if plate is None:
        plates = {name: [p.name for p in terms.plates[name]] for name in terms.log_likelihood}
        raise SiteError(
            f"{split}: expected a plate around all observed sites, whose rows are compared, got {plates}. Put the "
            'sites of a row into pyro.plate("data", len(x)).'
        )
    if plate.size < 2:
        raise DataError(f"{split}: expected at least 2 rows of '{plate.name}' for a standard error, got {plate.size}.")
    if points := [n for n in terms.point_estimates if any(p.name == plate.name for p in terms.plates[n])]:
        raise GuideError(
            f"{split}: the guide is a point estimate in {points} (Delta): no row has a KL there, nor a bound. Use a "
            "guide with a density for the latents of a row."
        )
    return plate


def _groups(terms: Terms) -> dict[str, Sequence[Term]]:
    """Return the terms of every part: one, or all of the sites that the guide draws together, whose sum is a KL."""
    joint = [term for term in terms.sites.values() if term.joint]
    first = next((term.name for term in joint if term.kind == "auxiliary"), None)
    groups: dict[str, Sequence[Term]] = {name: [term] for name, term in terms.sites.items() if not term.joint}
    return groups if first is None else groups | {first: joint}


def _units(site: Term) -> list[str]:
    """Return the names of the elements of an event: ``z[0]``, or ``z[0,1]``."""
    index = product(*(range(n) for n in (site.steps or site).event_shape))
    return [f"{site.name}[{','.join(map(str, i))}]" for i in index]


def _are_local(group: Sequence[Term], plate: Plate, split: str) -> bool:
    """Return whether the sites of a part belong to rows; refuse a part of which only some do."""
    local = [any(p.name == plate.name for p in term.plates) for term in group]
    if any(local) and not all(local):
        raise SiteError(
            f"{split}: the guide draws {[term.name for term in group]} together, of which some belong to a row of "
            f"'{plate.name}' and some to all rows, so no row has a KL of its own. Give the latents of a row a guide "
            "of their own, such as AutoGuideList with an AutoNormal for them."
        )
    return all(local)


def _nats(site: Term, plate: Plate, particle_dim: int | None, per_dim: bool = False) -> PerElement:
    """Return a site's nats of every row, and of every element of the event if asked for."""
    term = site.steps or site
    if per_dim and term.per_dim is not None:
        x = term.per_dim().flatten(-len(term.event_shape))
    else:
        x = term.nats.unsqueeze(-1)
    x = x.detach().double()
    if not is_one(term.scale):
        x = x * (term.scale.detach().unsqueeze(-1) if isinstance(term.scale, Tensor) else term.scale)
    return _by_row(x, site, plate, particle_dim) * (plate.size / plate.full_size)


def _by_row(x: Tensor, site: Term, plate: Plate, particle_dim: int | None) -> PerElement:
    """Sum values over all batch dimensions but that of the rows, and average them over particles."""
    term = site.steps or site
    if particle_dim is not None:
        dim = particle_dim - (1 if site.steps is None else 2)  # the elements, and time, lie to its right
        x = x.mean(dim) if x.dim() >= -dim else x
    dim = next(p.dim for p in term.plates if p.name == plate.name)
    return x.movedim(dim - 1, 0).reshape(plate.size, -1, x.shape[-1]).sum(1)
