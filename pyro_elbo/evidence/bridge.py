r"""The densities between which annealing walks, as functions of positions on the real line.

.. math:: \log f_\beta(u) = \log f_0(u) + \beta \log r(u), \qquad \log r = \log p(x, z) - \log f_0

From the prior, u are the model's latents and r is the likelihood. From the guide, u are what the guide draws itself
(the model's latents, or the auxiliary sites that an AutoGuide transforms into them) and r is the importance weight.
Constrained sites are transformed to the real line; the Jacobian belongs to f_0, and cancels in r.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import biject_to

from pyro_elbo.errors import GuideError, NonFiniteError, SiteError, count_nonfinite, first_line
from pyro_elbo.evidence.batches import check_rows
from pyro_elbo.masking import masked
from pyro_elbo.posterior import Weighting, find_weighting, is_discrete, sum_plates
from pyro_elbo.programs import Plate, Program, Site, TracePair, fixed_sites, is_point, trace_pair, trace_program
from pyro_elbo.sequences import StackedDistribution

Sites = Mapping[str, Site]
Position = Float[Tensor, "chains rows dims"]


class Call(NamedTuple):
    """A model, the guide to start from (None for the prior), and the arguments of both."""

    model: Program
    guide: Program | None
    args: tuple
    kwargs: Mapping[str, Any]


class Densities(NamedTuple):
    """Log f_0 and log r of every chain and row, nats in float64."""

    start: Float[Tensor, "chains rows"]
    ratio: Float[Tensor, "chains rows"]


@dataclass(frozen=True)
class Coordinate:
    """One site on the real line.

    Attributes:
        site: the site of a single run; that of a scan with time as a plate.
        over_time: whether it is that of a scan.
        transform: from the real line to its support.
        shape: the shape of its unconstrained value in a single run.
        batch: how many of these dimensions are plates, time aside.
    """

    site: Site
    over_time: bool
    transform: Any
    shape: torch.Size
    batch: int

    def log_jacobian(self, free: Tensor, value: Tensor) -> Tensor:
        """Return log |dz/du| where the site counts, summed over all but plates."""
        x = self.transform.log_abs_det_jacobian(free, value)
        batch = value.dim() - self.site.event_dim
        x = masked(x.flatten(batch).sum(-1) if x.dim() > batch else x, self.site.mask)
        return x.sum(-1) if self.over_time else x


@dataclass(frozen=True)
class Bridge:
    """The path of densities; calling it evaluates both of its ends.

    Attributes:
        call: the programs and their arguments.
        weighting: how the densities of sites add up.
        coordinates: the sites that are walked, by name.
        nesting: the number of batch dimensions that the plates use.
        vectorized: whether the programs run on all chains at once.
        shared: log density of what is given outside of the rows.
    """

    call: Call
    weighting: Weighting
    coordinates: Mapping[str, Coordinate]
    nesting: int
    vectorized: bool = True
    shared: float = 0.0

    @property
    def plate(self) -> Plate | None:
        """The data plate, whose rows walk on their own; None where all data walk together."""
        return self.weighting.plate if self.weighting.local else None

    @property
    def plate_name(self) -> str | None:
        """The name of the data plate; None where all data walk together."""
        return None if self.plate is None else self.plate.name

    def by_row(self, log_weights: Float[Tensor, "chains rows"]) -> Float[Tensor, "chains *rows"]:
        """Drop the dimension of rows where all data walk together."""
        return log_weights[:, 0] if self.plate is None else log_weights

    @property
    def largest(self) -> int:
        """The elements of the largest latent of one chain."""
        return max(c.site.value.numel() for c in self.coordinates.values())

    def draw(self, chains: int) -> Position:
        """Draw positions from the start."""
        if self.vectorized and chains > 1:
            return self.position(self._own(self._run(chains)), chains)
        return torch.cat([self.position(self._own(self._run(1)), 1) for _ in range(chains)])

    def __call__(self, position: Position) -> Densities:
        """Evaluate log f_0 and log r, with their gradients."""
        if self.vectorized or len(position) == 1:
            return self._evaluate(position)
        parts = [self._evaluate(x[None]) for x in position]
        return Densities(*(torch.cat(x) for x in zip(*parts, strict=True)))

    def _evaluate(self, position: Position) -> Densities:
        chains, free = len(position), self._values(position)
        values = {n: c.transform(free[n]) for n, c in self.coordinates.items()}
        jacobians = (c.log_jacobian(free[n], values[n]) for n, c in self.coordinates.items())
        start = sum((self._sum(x, chains) for x in jacobians), start=torch.zeros((), dtype=torch.float64))
        model, guide, args, kwargs = self.call
        if guide is None:
            sites = trace_program(model, args, kwargs, values, chains, self.nesting)
            latents = [sites[n] for n in self.coordinates]
            rest = [sites[n] for n in self.weighting.p if n not in self.coordinates]
            return Densities(start + self._total(latents, chains), self._total(rest, chains, sites))
        drawn = trace_program(guide, args, kwargs, values, chains, self.nesting)
        latents = {n: s.value for n, s in drawn.items() if n in self.weighting.p}
        sites = trace_program(model, args, kwargs, latents, chains, self.nesting)
        start = start + self._total([drawn[n] for n in self.coordinates], chains)
        joint = self._total([sites[n] for n in self.weighting.p], chains, sites)
        return Densities(start, joint - self._total([drawn[n] for n in self.weighting.q], chains))

    def _run(self, chains: int) -> Sites:
        model, guide, args, kwargs = self.call
        with torch.no_grad():
            return trace_program(guide or model, args, kwargs, None, chains, self.nesting)

    def _own(self, sites: Sites) -> dict[str, Tensor]:
        return {n: c.transform.inv(sites[n].value) for n, c in self.coordinates.items()}

    def _total(self, sites: list[Site], chains: int, model: Sites | None = None) -> Float[Tensor, "chains rows"]:
        """Sum the log densities of sites by row; those that no latent can change belong to no row."""
        if self.plate is not None and model is not None:
            fixed = fixed_sites(model.values())
            sites = [s for s in sites if s.name not in fixed]
        x = self.weighting.total(sites, self.plate, chains, self.nesting)
        return x if self.plate is not None else x[:, None]

    def _sum(self, x: Tensor, chains: int) -> Float[Tensor, "chains rows"]:
        x = sum_plates(x.double(), self.plate, chains, self.nesting)
        return x if self.plate is not None else x[:, None]

    def position(self, free: Mapping[str, Tensor], chains: int) -> Position:
        """Join unconstrained values to one position per chain and row."""
        parts = []
        for name, c in self.coordinates.items():
            x = free[name].reshape(chains, *self._full_shape(c))
            x = x[:, None] if self.plate is None else x.movedim(1 + self.nesting + self.plate.dim, 1)
            parts.append(x.reshape(chains, x.shape[1], -1))
        return torch.cat(parts, -1)

    def _values(self, position: Position) -> dict[str, Tensor]:
        """Split a position into the unconstrained values of its sites."""
        chains, rows, _ = position.shape
        sizes = [c.shape.numel() // rows for c in self.coordinates.values()]
        values = {}
        for (name, c), x in zip(self.coordinates.items(), position.split(sizes, -1), strict=True):
            shape = list(self._full_shape(c))
            if self.plate is not None:
                row = self.nesting + self.plate.dim
                x = x.reshape(chains, rows, *shape[:row], *shape[row + 1 :]).movedim(1, 1 + row)
            values[name] = x.reshape(chains, *shape) if chains > 1 else x.reshape(c.shape)
        return values

    def _full_shape(self, c: Coordinate) -> tuple[int, ...]:
        """Return the shape of one chain's unconstrained value with a dimension for every plate."""
        return (1,) * (self.nesting - c.batch) + tuple(c.shape)


def build_bridge(call: Call, rows: int | None) -> Bridge:
    """Run the programs once and return the path from the prior, or from the guide, to the posterior.

    Raises:
        SiteError: a latent is discrete, has a support that depends on others, or a plate is subsampled.
        GuideError: the guide is a point estimate, or masks its sites.
        WeightsError: the scales of sites differ.
        NonFiniteError: data are NaN, or have no density.
    """
    pair, other = (_sites(call) for _ in range(2))
    weighting = find_weighting(pair)
    check_rows(weighting.plate, weighting.local, rows)
    _check_densities(pair.model)
    obstacle = weighting.local_obstacle if weighting.local else weighting.obstacle
    if obstacle is not None:
        raise obstacle
    source, again = (pair.model, other.model) if call.guide is None else (pair.guide, other.guide)
    names = _latents(source) if call.guide is None else _own_sites(pair)
    coordinates = {n: _coordinate(source[n], again[n]) for n in names}
    if not coordinates:
        raise SiteError("The model has no latent to anneal: log p(x) is the sum of its log-likelihoods.")
    given = [pair.model[n] for n in fixed_sites(pair.model.values())] if weighting.local else []
    shared = weighting.total(given, None, 1, pair.nesting).item()
    bridge = Bridge(call, weighting, coordinates, pair.nesting, shared=shared)
    return bridge if _vectorizes(bridge) else replace(bridge, vectorized=False)


def _check_densities(model: Sites) -> None:
    """Raise NonFiniteError for data without a density, which no walk would find.

    A draw of the start may make the data impossible: that is a density.
    """
    for name, site in model.items():
        log_p = site.log_prob() if site.role == "observed" else torch.zeros(())
        if torch.isnan(log_p).any():
            raise NonFiniteError(
                f"Site '{name}': log-likelihood: {count_nonfinite(log_p)}. Look for a diverged parameter of the model."
            )


def _sites(call: Call) -> TracePair:
    model, guide, args, kwargs = call
    with torch.no_grad():
        if guide is not None:
            return trace_pair(model, guide, args, kwargs)
        try:
            sites = trace_program(model, args, kwargs)
        except NotImplementedError as error:
            raise SiteError(
                f"The prior cannot be sampled ({first_line(error)}), so that annealing cannot start from it. Use "
                "start='guide'."
            ) from error
    plates = [p for s in sites.values() for p in s.plates]
    return TracePair(sites, {}, None, max((-p.dim for p in plates), default=0))


def _latents(sites: Sites) -> list[str]:
    return [n for n, s in sites.items() if s.role == "latent"]


def _own_sites(pair: TracePair) -> list[str]:
    """Return the sites that the guide draws itself; the others are functions of them.

    Raises:
        GuideError: they are not as many as the latents, or masked.
    """
    own = {n: s for n, s in pair.guide.items() if s.is_drawn}
    if masks := [n for n, s in pair.guide.items() if not (s.mask is None or s.mask is True)]:
        raise GuideError(f"The guide masks {masks}, which is no density to start from. Use start='prior'.")
    drawn, needed = (
        sum(s.value.numel() for s in sites)
        for sites in (own.values(), (pair.model[n] for n in _latents(pair.model) if not is_point(pair.model[n].fn)))
    )
    points = [n for n in _latents(pair.model) if is_point(pair.guide[n].fn)]
    if points and drawn < needed and not _simplex(pair, points):
        raise GuideError(
            f"The guide is a point estimate in {points} (Delta): it draws {drawn} numbers for {needed} of the latents, "
            "so that it has no density to start from. Use start='prior', or a guide with a density for every latent."
        )
    return list(own)


def _simplex(pair: TracePair, points: list[str]) -> bool:
    """Return whether latents have fewer degrees of freedom than elements, as those on a simplex do."""
    return any(_coordinate(pair.model[n], pair.model[n]).shape != pair.model[n].value.shape for n in points)


def _coordinate(site: Site, again: Site) -> Coordinate:
    """Return the transform of a latent to the real line; ``again`` is the same site of another run."""
    over_time = isinstance(site.fn, StackedDistribution)
    first, second = (s.stepwise() for s in (site, again))
    if is_discrete(first):
        raise SiteError(
            f"Site '{site.name}' is a discrete latent ({type(first.fn).__name__}): annealing needs gradients in every "
            "latent, and has no sum over marked sites. Use method='importance', which has it, or write the sum as the "
            "distribution of the data in the site's place, such as MixtureSameFamily or DiscreteHMM."
        )
    try:
        transform, other = (biject_to(s.fn.support) for s in (first, second))
    except NotImplementedError as error:
        raise SiteError(
            f"Site '{site.name}': the support of {type(first.fn).__name__} has no transform to the real line. Use "
            "method='importance'."
        ) from error
    free = transform.inv(site.value)
    if not torch.allclose(other(free), site.value, equal_nan=True):
        raise SiteError(
            f"Site '{site.name}': its support depends on other latents, so that it has no fixed coordinates to anneal "
            "in. Rescale it (z = low + (high - low) * u with u in [0, 1]), or use method='importance'."
        )
    return Coordinate(first, over_time, transform, free.shape, site.value.dim() - site.event_dim)


def _vectorizes(bridge: Bridge) -> bool:
    """Return whether two chains together have the densities that each has alone."""
    try:
        position = bridge.draw(2)
        with torch.no_grad():
            together = bridge(position)
            alone = replace(bridge, vectorized=False)(position)
    except Exception:  # single chains raise it again if the program itself is at fault
        return False
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True) for a, b in zip(together, alone, strict=True))
