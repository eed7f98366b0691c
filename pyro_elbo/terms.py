r"""Sites -> the terms of the bound.

.. math:: \text{elbo} = \sum \log p(x \mid z) - \sum KL(q(z) \,\|\, p(z))

Everything downstream (weighting, penalties, importance bounds, history, diagnosis, export) is a function of
:class:`Terms`. All numbers are nats. A :class:`Term` keeps one site's contribution before scaling and before
any reduction; the properties of :class:`Terms` reduce them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from pyro.distributions import Delta
from pyro.distributions.util import is_identically_zero
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence

from pyro_elbo.errors import ArgumentError, NonFiniteError, count_nonfinite
from pyro_elbo.over_time import OverTime, masked, over_event
from pyro_elbo.sites import Plate, Run, Site, by_dim
from pyro_elbo.tracing import holds

if TYPE_CHECKING:
    import xarray

KLForm = Literal["auto", "sampled"]
Kind = Literal["likelihood", "factor", "latent", "auxiliary"]


@dataclass(frozen=True)
class Term:
    """One site's contribution to the bound, unscaled and masked.

    Attributes:
        nats: log p for a ``likelihood`` or a ``factor``; the KL, or log q - log p at the draw, for a
            ``latent``; log q for an ``auxiliary`` site. Batch dimensions as in the run, particles on the left.
        score: log q of a site without pathwise gradient (times its reward it is the score-function
            estimator), otherwise None.
        per_dim: gives the KL per element of the event, where it factorises, otherwise None.
        steps: the same term with time as the innermost plate, if the site has a dimension of time; ``nats`` is its
            sum over time.
    """

    name: str
    kind: Kind
    plates: tuple[Plate, ...]
    scale: float | Tensor
    mask: Tensor | bool | None
    event_shape: torch.Size
    nats: Tensor
    is_analytic: bool = False
    score: Tensor | None = None
    per_dim: Callable[[], Tensor] | None = None
    steps: "Term | None" = None

    @property
    def is_kl(self) -> bool:
        """Whether the term belongs to the rate."""
        return self.kind in ("latent", "auxiliary")


def evaluate(run: Run, kl: KLForm) -> dict[str, Term]:
    """Turn the sites of a run into terms.

    With ``kl="auto"`` a latent's KL is analytic where a formula exists and is exact, that is, where no parent
    of the site in the model can be its descendant in the guide. With ``"sampled"`` it never is.
    """
    exact = _analytic_is_exact(run) if kl == "auto" else frozenset()
    terms = {}
    for name, site in run.model.items():
        if site.role == "latent":
            q = run.guide[name]
            if isinstance(site.fn, OverTime) and isinstance(q.fn, OverTime):
                terms[name] = over_time(site, _latent_term(site.stepwise(), q.stepwise(), name in exact))
            else:
                terms[name] = _latent_term(site, q, name in exact)
        elif site.role != "deterministic":
            terms[name] = _likelihood(site, "factor" if site.role == "factor" else "likelihood")
    for site in run.guide.values():
        if site.role == "auxiliary":
            _add_auxiliary(terms, site)
    return terms


def _analytic_is_exact(run: Run) -> frozenset[str]:
    """Latents whose predecessors in the model all precede them in the guide: then no parent is a descendant.

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
    """Sites and steps in the order in which a program draws them; two steps of a scan show all that matters."""
    runs = groupby(sites.items(), lambda item: item[1].fn.run if isinstance(item[1].fn, OverTime) else None)
    for scan, members in runs:
        names = [name for name, _ in members]
        for t in (0,) if scan is None else (1, 0) if scan.reverse else (0, 1):
            yield from ((name, t) for name in names)


def _term(site: Site, kind: Kind, nats: Tensor, **more: Any) -> Term:
    event_shape = torch.Size(site.fn.event_shape)
    return Term(site.name, kind, site.plates, site.scale, site.mask, event_shape, nats, **more)


def over_time(site: Site, steps: Term) -> Term:
    """The term of a site with a dimension of time from the one with time as a plate."""
    score = None if steps.score is None else steps.score.sum(-1)
    return _term(site, steps.kind, steps.nats.sum(-1), is_analytic=steps.is_analytic, score=score, steps=steps)


def _likelihood(site: Site, kind: Kind) -> Term:
    if isinstance(site.fn, OverTime):
        return over_time(site, _likelihood(site.stepwise(), kind))
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
    per_dim = (lambda: _sampled_per_dim(p, q)) if _factorises(p, q) else None
    return _term(p, "latent", log_q - p.log_prob(), score=score, per_dim=per_dim)


def _log_q(q: Site) -> tuple[Tensor, Tensor | None]:
    """Log q at the draw whose gradient is the pathwise one, and the factor of the score-function estimator."""
    parts = q.score_parts()
    score = None if is_identically_zero(parts.score_function) else parts.score_function
    if parts.entropy_term is parts.log_prob or score is None:
        return parts.log_prob, score
    if is_identically_zero(parts.entropy_term):
        return parts.log_prob.detach(), score
    return parts.entropy_term + (parts.log_prob - parts.entropy_term).detach(), score


def _analytic_kl(q: Distribution, p: Distribution) -> tuple[Tensor, Tensor | None] | None:
    """KL(q || p) per batch element, and per element of the event where both factorise; None without formula."""
    n = len(q.event_shape)
    q_base, p_base = _univariate(q), _univariate(p)
    try:
        if n and q_base is not None and p_base is not None:
            per_dim = kl_divergence(q_base, p_base)
            return per_dim.flatten(per_dim.dim() - n).sum(-1), per_dim
        return kl_divergence(q, p), None
    except NotImplementedError:
        return None


def _univariate(fn: Distribution) -> Distribution | None:
    """The elementwise distribution inside ``fn.to_event(n)``, or None where the event does not factorise."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn if not fn.event_shape else None


def is_point(fn: Distribution) -> bool:
    """Whether a distribution puts all its mass on one value."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def _factorises(p: Site, q: Site) -> bool:
    return bool(
        p.event_dim
        and not is_point(q.fn)
        and _same(p.scale, q.scale)
        and _univariate(p.fn) is not None
        and _univariate(q.fn) is not None
    )


def _sampled_per_dim(p: Site, q: Site) -> Tensor:
    log_q, log_p = (_masked_event(_univariate(s.fn).log_prob(s.value), s) for s in (q, p))
    return log_q - log_p


def _masked_event(x: Tensor, site: Site) -> Tensor:
    """Mask values per element of the event by the site's mask over batches."""
    mask = site.mask
    return masked(x, over_event(mask, site.event_dim) if isinstance(mask, Tensor) else mask)


def _same(a: Tensor | float | None, b: Tensor | float | None) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and holds((a == b).all())
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _add_auxiliary(terms: dict[str, Term], site: Site) -> None:
    """Count log q of a site that only the guide has.

    AutoNormal draws ``z_unconstrained`` and passes it on as a Delta at ``z``: one latent, one KL.
    """
    log_q, score = _log_q(site)
    latent = terms.get(site.name.removesuffix("_unconstrained"))
    if latent is not None and latent.kind == "latent" and _same(latent.scale, site.scale) and latent.score is None:
        terms[latent.name] = replace(latent, nats=latent.nats + log_q, score=score)
    elif isinstance(site.fn, OverTime):
        steps = site.stepwise()
        nats, score = _log_q(steps)
        terms[site.name] = over_time(site, _term(steps, "auxiliary", nats, score=score))
    else:
        terms[site.name] = _term(site, "auxiliary", log_q, score=score)


def stack_particles(runs: list[dict[str, Term]]) -> tuple[dict[str, Term], int | None]:
    """Put the terms of several runs side by side, particles on the left of all plates.

    A site that some of the runs lack contributes nothing there.
    """
    if len(runs) == 1:
        return runs[0], None
    depth = max((t.nats.dim() for run in runs for t in run.values()), default=0)
    union = {name: term for run in runs for name, term in run.items()}
    merged = {name: _merge(term, [run.get(name) for run in runs], depth) for name, term in union.items()}
    return merged, -(depth + 1)


def _merge(term: Term, same: list[Term | None], depth: int) -> Term:
    """One term of several runs' terms of a site, with particles at dimension -(depth + 1)."""

    def stack(tensors: list[Tensor | None], event_dim: int) -> Tensor:
        like = next(x for x in tensors if x is not None)
        parts = [torch.zeros_like(like) if x is None else x for x in tensors]
        return torch.stack([x.reshape((1,) * (depth + event_dim - x.dim()) + x.shape) for x in parts])

    score = None if term.score is None else stack([t and t.score for t in same], 0)
    per_dim = None
    if term.per_dim is not None:
        per_dim = lambda: stack([t and t.per_dim and t.per_dim() for t in same], len(term.event_shape))  # noqa: E731
    steps = None if term.steps is None else _merge(term.steps, [t and t.steps for t in same], depth + 1)
    return replace(term, nats=stack([t and t.nats for t in same], 0), score=score, per_dim=per_dim, steps=steps)


@dataclass(frozen=True)
class Terms:
    """Every term of the evidence lower bound, in nats.

    Per-site tensors have the shape of the site's plates (outermost plate first by dimension), then of time where the
    site has a dimension of time; they are unscaled and averaged over particles. Totals are scaled to the full data.

    Attributes:
        sites: the unreduced term of each site.
        particle_dim: the batch dimension of the particles, counted from the right; None for one particle.
        objective: what training maximises: the weighted bound, with the gradient of the estimator. Differentiate
            this one; the other numbers carry pathwise gradients only.
    """

    sites: Mapping[str, Term]
    particle_dim: int | None
    objective: Float[Tensor, ""]

    @cached_property
    def distortion(self) -> Float[Tensor, ""]:
        """-Σ log p(x | z), scaled to the full data: nats, smaller is better."""
        return -self._sum(t for t in self.sites.values() if not t.is_kl)

    @cached_property
    def rate(self) -> Float[Tensor, ""]:
        """Σ KL(q(z) ‖ p(z)), scaled to the full data: nats."""
        return self._sum(t for t in self.sites.values() if t.is_kl)

    @cached_property
    def elbo(self) -> Float[Tensor, ""]:
        """-distortion - rate: the bound at β = 1 without penalties, nats, to be maximised."""
        return -self.distortion - self.rate

    @cached_property
    def log_likelihood(self) -> dict[str, Tensor]:
        """Log p(x | z) of each observed site and factor, shaped like its plates."""
        return {name: self._by_plate(t) for name, t in self.sites.items() if not t.is_kl}

    @cached_property
    def kl(self) -> dict[str, Tensor]:
        """KL of each latent site (log q of an auxiliary site of the guide), shaped like its plates.

        A single-draw estimate (``is_analytic`` False) may be negative: that is noise, not an error.
        """
        return {name: self._by_plate(t) for name, t in self.sites.items() if t.is_kl}

    @cached_property
    def kl_per_dim(self) -> dict[str, Tensor]:
        """KL per latent dimension, shape plates + event, for the sites whose KL factorises."""
        result = {}
        for name, site in self.sites.items():
            term = site.steps or site
            if term.kind == "latent" and not term.event_shape:
                result[name] = self.kl[name]
            elif term.per_dim is not None:
                result[name] = self._by_plate(site, per_dim=True)
        return result

    @cached_property
    def is_analytic(self) -> dict[str, bool]:
        """Whether the KL of each latent site is exact given its parents (True) or an estimate at the draw."""
        return {name: t.is_analytic for name, t in self.sites.items() if t.is_kl}

    @cached_property
    def scale(self) -> dict[str, float | Tensor]:
        """The factor by which each site's nats enter the totals (subsampling N/B, ``poutine.scale``)."""
        return {name: t.scale for name, t in self.sites.items()}

    @cached_property
    def plates(self) -> dict[str, tuple[Plate, ...]]:
        """The plates of each site, in the order of its tensor's dimensions, and its time as if it were one."""
        return {name: by_dim((t.steps or t).plates) for name, t in self.sites.items()}

    @cached_property
    def kl_total(self) -> dict[str, Tensor]:
        """Each site's share of ``rate``: a scalar, scaled to the full data."""
        return {name: self._sum([t]) for name, t in self.sites.items() if t.is_kl}

    @cached_property
    def log_likelihood_total(self) -> dict[str, Tensor]:
        """Each observed site's and factor's share of ``-distortion``: a scalar, scaled to the full data."""
        return {name: self._sum([t]) for name, t in self.sites.items() if not t.is_kl}

    @property
    def data_plate(self) -> Plate | None:
        """The outermost plate that all observed sites share: one row of it is a datum."""
        return data_plate(self.sites)

    @property
    def num_frames(self) -> Float[Tensor, ""]:
        """Real frames, scaled to the full data: steps of sequences that some observed site counts (lengths, masks)."""
        return num_frames(self.sites)

    @property
    def num_data(self) -> int:
        """Rows of the full data by which totals are divided for a figure per datum; 1 without a data plate."""
        return num_data(self.sites)

    def to_dataset(self) -> "xarray.Dataset":
        """All terms as labelled arrays: dimensions are named after the plates.

        Variables: ``elbo``, ``objective``, ``rate``, ``distortion`` (scalars), ``log_likelihood_<site>``,
        ``kl_<site>`` (per plate) and ``kl_per_dim_<site>`` (with ``<site>_dim_0`` ...), all in nats.
        """
        import xarray

        totals = {n: ((), getattr(self, n)) for n in ("elbo", "objective", "rate", "distortion")}
        sites = {
            f"{group}_{name}": (self._dims(name, values), values)
            for group in ("log_likelihood", "kl", "kl_per_dim")
            for name, values in getattr(self, group).items()
        }
        variables = {
            name: (dims, x.detach().cpu().numpy(), {"units": "nats"}) for name, (dims, x) in (totals | sites).items()
        }
        return xarray.Dataset(variables, attrs={"num_data": self.num_data})

    def check_finite(self) -> None:
        """Raise NonFiniteError for the first site whose term holds NaN or infinity."""
        for name, term in self.sites.items():
            if not torch.isfinite(term.nats).all():
                what = "log q - log p" if term.is_kl else "log-likelihood"
                per_row = self._by_plate(term)
                dims = ", ".join(p.name for p in self.plates[name])
                raise NonFiniteError(
                    f"Site '{name}': {what}: {count_nonfinite(per_row)}{dims and f' of ({dims})'}. Look for data "
                    "outside the support, NaN in the data or a diverged parameter; missing values belong under "
                    "pyro.poutine.mask."
                )
        if not torch.isfinite(self.objective):
            raise NonFiniteError(
                f"The objective is {self.objective.item()} although every term is finite: a weight (β or scale) is "
                "too large."
            )

    def _sum(self, terms: Iterable[Term]) -> Tensor:
        total = sum((scaled_sum(t, t.nats, self.particle_dim) for t in terms), start=0.0)
        return total if isinstance(total, Tensor) else self.objective.new_zeros(())

    def _by_plate(self, site: Term, per_dim: bool = False) -> Tensor:
        """Average over particles and keep exactly the dimensions of the plates and of time (and of the event)."""
        term, particles = site.steps or site, self.particle_dim
        if particles is not None and site.steps is not None:
            particles -= 1
        x, event_dim = term.nats, 0
        if per_dim and term.per_dim is not None:
            x, event_dim = term.per_dim(), len(term.event_shape)
        if particles is not None and x.dim() - event_dim >= -particles:
            x = x.mean(particles - event_dim, keepdim=True)
        dims = {p.dim for p in term.plates}
        for d in range(event_dim - x.dim(), 0):
            if d not in dims:
                x = x.squeeze(d - event_dim)
        shape = torch.Size(p.size for p in by_dim(term.plates))
        return x.expand(shape + x.shape[x.dim() - event_dim :])

    def _dims(self, name: str, values: Tensor) -> tuple[str, ...]:
        plates = tuple(p.name for p in self.plates[name])
        return plates + tuple(f"{name}_dim_{i}" for i in range(values.dim() - len(plates)))


def shared_plate(stacks: Iterable[tuple[Plate, ...]]) -> Plate | None:
    """The outermost plate that all stacks of plates hold."""
    first, *others = list(stacks) or [()]
    return next((p for p in first if all(p in stack for stack in others)), None)


def data_plate(sites: Mapping[str, Term]) -> Plate | None:
    """The outermost plate that all observed sites share."""
    return shared_plate(t.plates for t in sites.values() if t.kind == "likelihood")


def num_data(sites: Mapping[str, Term]) -> int:
    """Rows of the full data: those of the data plate, 1 without one."""
    plate = data_plate(sites)
    return plate.full_size if plate else 1


def num_frames(sites: Mapping[str, Term]) -> Float[Tensor, ""]:
    """Steps of sequences that some observed site counts, scaled to the full data."""
    terms = [t for t in sites.values() if t.kind == "likelihood" and t.steps is not None]
    if not terms:
        raise ArgumentError("No observed site has a dimension of time: there are no frames to count.")
    counted = sum(frames(t).to(torch.float64) for t in terms) > 0
    return (counted * terms[0].scale).sum()


def frames(term: Term) -> Tensor:
    """Which steps of which sequences a term counts, with the dimensions of its plates and time."""
    steps = term.steps or term
    shape = [1] * -min(p.dim for p in steps.plates)
    for plate in steps.plates:
        shape[plate.dim] = plate.size
    counted = torch.ones(shape, dtype=torch.bool, device=steps.nats.device)
    return counted if steps.mask is None else counted & steps.mask


def scaled_sum(term: Term, x: Tensor, particle_dim: int | None) -> Tensor:
    """Sum over data, scaled to the full data, averaged over particles."""
    total = (x if is_one(term.scale) else x * term.scale).sum()
    if particle_dim is not None and x.dim() >= -particle_dim:
        total = total / x.shape[particle_dim]
    return total


def is_one(scale: float | Tensor) -> bool:
    """Whether a scale is the plain number one."""
    return not isinstance(scale, Tensor) and scale == 1
