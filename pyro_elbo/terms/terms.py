r"""The terms of the bound as users see them, and their reductions.

.. math:: \text{elbo} = \sum \log p(x \mid z) - \sum KL(q(z) \,\|\, p(z))

Weightings, penalties, importance bounds, the history and the export are functions of :class:`Terms`. All numbers are
nats. A :class:`Term` keeps one site's contribution before scaling and before any reduction; the properties of
:class:`Terms` reduce them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_elbo.display import html_table
from pyro_elbo.errors import NonFiniteError, count_nonfinite
from pyro_elbo.programs import Plate, sort_by_dim
from pyro_elbo.terms.dataset import to_dataset
from pyro_elbo.terms.term import Term, data_plate, num_data, num_frames, point_estimates, scaled_sum

if TYPE_CHECKING:
    import xarray


@runtime_checkable
class PenaltyValue(Protocol):
    """The value of a penalty, all that :class:`Terms` needs of it."""

    nats: Tensor


@dataclass(frozen=True)
class Terms:
    """Every term of the evidence lower bound, in nats.

    Per-site tensors have the shape of the site's plates (outermost plate first by dimension), then of time where the
    site has a dimension of time; they are unscaled and averaged over particles. Totals are scaled to the full data.

    Attributes:
        sites: the unreduced term of each site.
        particle_dim: the batch dimension of the particles, counted from the right; None for one particle.
        objective: what training maximizes: the weighted bound, with the gradient of the estimator. Differentiate
            this one; the other numbers carry pathwise gradients only.
        penalties: the value of each penalty of the objective, by its name.
        averages: the decaying averages of rewards after a step with these terms, by site with such a baseline.
        divisor: the number by which the objective is divided already (sequences, frames or steps); None for a total.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, pyro_elbo as pe
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.7))
        >>> _ = pyro.set_rng_seed(0)
        >>> pe.TraceBeta_ELBO(beta=0.5).terms(model, guide, torch.tensor([1.0, -2.0]))
        Terms of 2 data in nats; objective -2.73519
                                    total    per datum
          elbo                    -3.1494      -1.5747
          log_likelihood x        -2.3210      -1.1605
          kl z                     0.8283       0.4142
    """

    sites: Mapping[str, Term]
    particle_dim: int | None
    objective: Float[Tensor, ""]
    penalties: Mapping[str, PenaltyValue] = field(default_factory=dict)
    divisor: float | Tensor | None = None
    averages: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        """The bound and the share of every site, as totals and per datum, and the objective."""
        width = max(len(name) for name, *_ in self._figures)
        lines = [f"  {name:{width}} {total} {mean}{note}" for name, total, mean, note in self._figures]
        return "\n".join([self._title, f"  {'':{width}} {'total':>14} {'per datum':>12}", *lines])

    def _repr_html_(self) -> str:
        return html_table(self._title, ("", "total", "per datum", ""), self._figures)

    @property
    def _title(self) -> str:
        return f"Terms of {self.num_data} data in nats; objective {self.objective.item():.6g}"

    @cached_property
    def _figures(self) -> list[tuple[str, str, str, str]]:
        """The lines of the printed table: name, total, figure per datum, note."""
        figures = {name: x.item() for name, x in self.totals().items() if name not in ("rate", "distortion")}
        notes = {f"kl/{name}": "" if exact else "  (at the draw)" for name, exact in self.is_analytic.items()}
        notes |= {f"kl/{name}": "  (no KL: minus the log prior at a point)" for name in self.point_estimates}
        if self.point_estimates:
            notes["elbo"] = f"  (no bound: point estimate of {', '.join(map(repr, self.point_estimates))})"
        return [
            (name.replace("/", " ", 1), f"{x:14.4f}", f"{x / self.num_data:12.4f}", notes.get(name, ""))
            for name, x in figures.items()
        ]

    def totals(self) -> dict[str, Tensor]:
        """Every total by name, scaled to the full data, in nats.

        ``elbo``, ``rate``, ``distortion``, then ``log_likelihood/<site>``, ``kl/<site>`` and ``penalty/<name>``.
        """
        found = {"elbo": self.elbo, "rate": self.rate, "distortion": self.distortion}
        found |= {f"log_likelihood/{name}": x for name, x in self.log_likelihood_total.items()}
        found |= {f"kl/{name}": x for name, x in self.kl_total.items()}
        return found | {f"penalty/{name}": x.nats * self.num_data for name, x in self.penalties.items()}

    @cached_property
    def per_datum(self) -> "PerDatum":
        """The totals divided by the rows of the full data."""
        return PerDatum(self)

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
        """-distortion - rate: the bound at β = 1 without penalties, nats, to be maximized."""
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
        """KL per latent dimension, shape plates + event, for the sites whose KL factorizes."""
        result = {}
        for name, site in self.sites.items():
            term = site.steps or site
            if term.kind == "latent" and not term.event_shape:
                result[name] = self.kl[name]
            elif term.per_dim is not None:
                result[name] = self._by_plate(site, per_dim=True)
        return result

    @cached_property
    def posterior(self) -> dict[str, Tensor]:
        """Posterior probabilities of the values of each enumerated site, shape plates + (K,).

        Exact given data and latents for a site that is summed out of the model; q(k | x) for one that the guide has.
        """
        terms = {n: (t, t.steps or t) for n, t in self.sites.items()}
        found = {n: s.averaged() if s.averaged else s.posterior for n, (_, s) in terms.items()}
        return {n: self._shaped(*terms[n], x, 1) for n, x in found.items() if x is not None}

    @cached_property
    def is_analytic(self) -> dict[str, bool]:
        """True for each latent site whose KL is exact given its parents, False for an estimate at the draw."""
        return {name: t.is_analytic for name, t in self.sites.items() if t.is_kl}

    @cached_property
    def point_estimates(self) -> tuple[str, ...]:
        """The continuous latents of which the guide is a point estimate (Delta).

        Minus their log prior density stands where their KL should, which is infinite: ``elbo`` is then no bound of
        log p(x), but an objective of maximum a posteriori training.
        """
        return point_estimates(self.sites)

    @cached_property
    def scale(self) -> dict[str, float | Tensor]:
        """The factor by which each site's nats enter the totals (subsampling N/B, ``poutine.scale``)."""
        return {name: t.scale for name, t in self.sites.items()}

    @cached_property
    def plates(self) -> dict[str, tuple[Plate, ...]]:
        """The plates of each site, in the order of its tensor's dimensions, and its time as if it were one."""
        return {name: sort_by_dim((t.steps or t).plates) for name, t in self.sites.items()}

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
        return num_frames(self.sites, self.particle_dim)

    @property
    def num_data(self) -> int:
        """Rows of the full data by which totals are divided for a figure per datum; 1 without a data plate."""
        return num_data(self.sites)

    def to_dataset(self, per_datum: bool = False) -> "xarray.Dataset":
        """All terms as labeled arrays: dimensions are named after the plates.

        Variables: ``elbo``, ``objective``, ``rate``, ``distortion`` (scalars, totals in nats),
        ``log_likelihood_<site>``, ``kl_<site>`` (per plate) and ``kl_per_dim_<site>`` (with ``<site>_dim_0`` ...), in
        nats; with penalties, ``penalty`` (penalty_name), nats per datum, unweighted.

        Args:
            per_datum: divide the four totals by ``num_data``; the attribute ``totals`` and their units say so.
        """
        return to_dataset(self, per_datum)

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
        for name, penalty in self.penalties.items():
            if not torch.isfinite(penalty.nats):
                raise NonFiniteError(
                    f"The penalty {name} is {penalty.nats.item()} although every term is finite: look for levels of "
                    "one row only, and for a density that is narrower than its own rounding."
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
        term = site.steps or site
        if per_dim and term.per_dim is not None:
            return self._shaped(site, term, term.per_dim(), len(term.event_shape))
        return self._shaped(site, term, term.nats, 0)

    def _shaped(self, site: Term, term: Term, x: Tensor, event_dim: int) -> Tensor:
        particles = self.particle_dim
        if particles is not None and site.steps is not None:
            particles -= 1
        if particles is not None and x.dim() - event_dim >= -particles:
            x = x.mean(particles - event_dim, keepdim=True)
        dims = {p.dim for p in term.plates}
        for d in range(event_dim - x.dim(), 0):
            if d not in dims:
                x = x.squeeze(d - event_dim)
        shape = torch.Size(p.size for p in sort_by_dim(term.plates))
        return x.expand(shape + x.shape[x.dim() - event_dim :])


@dataclass(frozen=True)
class PerDatum:
    """The totals of :class:`Terms`, divided by the rows of the full data: nats per datum.

    The KL of a latent that all data share is divided like the rest: read it beside its total.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, pyro_elbo as pe
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        >>> terms = pe.TraceBeta_ELBO().terms(model, lambda x: None, torch.zeros(4))
        >>> round(terms.elbo.item(), 4), round(terms.per_datum.elbo.item(), 4)
        (-3.6758, -0.9189)
    """

    terms: Terms

    @property
    def elbo(self) -> Float[Tensor, ""]:
        """The bound at β = 1."""
        return self.terms.elbo / self.terms.num_data

    @property
    def objective(self) -> Float[Tensor, ""]:
        """The objective of training; one that is normalized already (per frame, ...) stays as it is."""
        return self.terms.objective / (self.terms.num_data if self.terms.divisor is None else 1)

    @property
    def rate(self) -> Float[Tensor, ""]:
        """Σ KL(q(z) ‖ p(z))."""
        return self.terms.rate / self.terms.num_data

    @property
    def distortion(self) -> Float[Tensor, ""]:
        """-Σ log p(x | z)."""
        return self.terms.distortion / self.terms.num_data

    def totals(self) -> dict[str, Tensor]:
        """:meth:`Terms.totals`, divided; with the ``divisor`` of a normalized objective, such as frames per datum."""
        found = {name: x / self.terms.num_data for name, x in self.terms.totals().items()}
        if self.terms.divisor is None:
            return found
        return found | {"divisor": torch.as_tensor(self.terms.divisor / self.terms.num_data).to(self.terms.elbo)}
