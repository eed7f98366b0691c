"""One site's term of the bound, and the figures that need several terms: rows, frames, scaled sums."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, biject_to

from pyro_elbo.assumptions import check_or_defer
from pyro_elbo.errors import ArgumentError
from pyro_elbo.programs import Plate, Site, is_point, shared_plate

TermKind = Literal["likelihood", "factor", "constant", "latent", "auxiliary"]


@dataclass(frozen=True)
class Term:
    """One site's contribution to the bound, unscaled and masked.

    Attributes:
        nats: log p for a ``likelihood``, a ``factor`` or a ``constant`` (a fixed number of the run); the KL, or
            log q - log p at the draw, for a ``latent``; log q for an ``auxiliary`` site. Batch dimensions as in the
            run, particles on the left.
        score: log q of a site without pathwise gradient (times its reward it is the score-function
            estimator), otherwise None.
        per_dim: a function that returns the KL per element of the event, where it factorizes, otherwise None.
        steps: the same term with time as the innermost plate, if the site has a dimension of time; ``nats`` is its
            sum over time.
        draws: the site that was drawn or observed, the guide's for latents: one per run of the programs (one per
            particle, unless particles are vectorized).
        joint: True for the auxiliary sites of the guide and the latents whose values they determine: only the sum of
            their terms is a KL.
        direct: ``nats`` with the gradient of the model's own parameters alone, as if the draws and log q were
            constants; None where no estimator of the gradient needs it.
        transformed: True for a latent that the guide draws under another name, whose log q ``nats`` holds (AutoNormal).
        posterior: of a site that is summed out: the probabilities of its values given data and latents, on the right
            of the batch dimensions; otherwise None.
        pairs: of the state of a scan that is summed out: gives the probabilities of its values at the step before and
            now, on the right of ``posterior``'s batch dimensions and time; otherwise None.
        averaged: of a site that the guide enumerates: a function that returns the guide's probabilities of its values,
            on the right of the batch dimensions; otherwise None.
        independent: the plates whose rows are independent in this term, where they are not all its plates: the rows
            of others are coupled by a site that is summed out.
        expected: True for an expectation over sites that the guide enumerates.
        prior: the model's distribution of a latent that the guide gives as a point (Delta), drawn elsewhere or nowhere;
            None for one that it draws.
        in_model: the model's site of a latent that the guide draws under the same name, in the first run.
    """

    name: str
    kind: TermKind
    plates: tuple[Plate, ...]
    scale: float | Tensor
    mask: Tensor | bool | None
    event_shape: torch.Size
    nats: Tensor
    is_analytic: bool = False
    score: Tensor | None = None
    per_dim: Callable[[], Tensor] | None = None
    steps: "Term | None" = None
    draws: tuple[Site, ...] = ()
    joint: bool = False
    direct: Tensor | None = None
    transformed: bool = False
    posterior: Tensor | None = None
    pairs: Callable[[], Tensor] | None = None
    averaged: Callable[[], Tensor] | None = None
    independent: tuple[Plate, ...] | None = None
    expected: bool = False
    prior: Distribution | None = None
    in_model: Site | None = None

    @property
    def reward_plates(self) -> tuple[Plate, ...]:
        """The plates by whose rows the term may be split among the draws that it rewards."""
        return self.plates if self.independent is None else self.independent

    @property
    def is_kl(self) -> bool:
        """True for a term of the rate."""
        return self.kind in ("latent", "auxiliary")


def point_estimates(sites: Mapping[str, Term]) -> tuple[str, ...]:
    """Return the continuous latents of which the guide is a point estimate: their terms are no KL.

    AutoGuides pass draws of auxiliary sites on as points. Where more free elements are passed on than drawn, some are
    points of the guide's own.
    """
    given = {n: count for n, t in sites.items() if (count := _count_given(t.steps or t))}
    passed_on = [n for n in given if sites[n].joint]
    drawn = sum(_count_drawn(t) for t in sites.values() if t.joint and t.kind == "auxiliary")
    hidden = passed_on if sum(given[n] for n in passed_on) > drawn else []
    return tuple(n for n in given if n in hidden or not (sites[n].joint or sites[n].transformed))


def _count_given(term: Term) -> int:
    """Count the free elements of a continuous latent that the guide gives as a point."""
    if term.prior is None:
        return 0
    try:
        support: Any = term.prior.support
        shape = () if support.is_discrete else biject_to(support).inverse_shape(term.event_shape)
        return 0 if support.is_discrete else _rows(term) * math.prod(shape)
    except NotImplementedError:
        return _rows(term) * term.event_shape.numel()


def _count_drawn(term: Term) -> int:
    steps = term.steps or term
    return 0 if is_point((term.draws or steps.draws)[0].fn) else _rows(steps) * steps.event_shape.numel()


def _rows(term: Term) -> int:
    return math.prod(p.size for p in term.plates)


def data_plate(sites: Mapping[str, Term]) -> Plate | None:
    """Return the outermost plate shared by all observed sites that lie in plates."""
    return shared_plate(t.plates for t in sites.values() if t.kind == "likelihood")


def num_data(sites: Mapping[str, Term]) -> int:
    """Count the rows of the full data: those of the data plate, 1 without one."""
    plate = data_plate(sites)
    return plate.full_size if plate else 1


def num_frames(sites: Mapping[str, Term], particle_dim: int | None) -> Float[Tensor, ""]:
    """Count the steps of sequences that some observed site counts, scaled to the full data, mean over particles."""
    steps = [t.steps for t in sites.values() if t.kind == "likelihood" and t.steps is not None]
    if not steps:
        raise ArgumentError("No observed site has a dimension of time: there are no frames to count.")
    counted = (sum(frames(t).to(torch.float64) for t in steps) > 0).to(torch.float64)
    return scaled_sum(steps[0], counted, None if particle_dim is None else particle_dim - 1)


def frames(term: Term) -> Tensor:
    """Return the mask of the rows and steps that a term counts, with the dimensions of its plates and time."""
    steps = term.steps or term
    shape = [1] * -min((p.dim for p in steps.plates), default=0)
    for plate in steps.plates:
        shape[plate.dim] = plate.size
    counted = torch.ones(shape, dtype=torch.bool, device=steps.nats.device)
    return counted if steps.mask is None else counted & steps.mask


def alike(a: Tensor | float | None, b: Tensor | float | None) -> bool:
    """Return True for equal scales or masks; a capture assumes that of two tensors and has every step check it."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and check_or_defer((a == b).all())
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def scaled_sum(term: Term, x: Tensor, particle_dim: int | None) -> Tensor:
    """Sum over data, scaled to the full data, averaged over particles."""
    total = (x if is_one(term.scale) else x * term.scale).sum()
    if particle_dim is not None and x.dim() >= -particle_dim:
        total = total / x.shape[particle_dim]
    return total


def is_one(scale: float | Tensor) -> bool:
    """Return True for a scale that is the plain number one."""
    return not isinstance(scale, Tensor) and scale == 1
