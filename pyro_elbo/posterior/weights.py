"""Importance weights log p(x, z) - log q(z) of draws, and the programs whose weights are not those of a posterior."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_elbo.errors import GuideError, NonFiniteError, PyroElboError, WeightsError, count_nonfinite
from pyro_elbo.programs import Plate, Site, TracePair, fixed_sites, is_point, shared_plate


@dataclass(frozen=True)
class Weighting:
    """How the log densities of sites add up to log p and log q.

    Attributes:
        p, q: names of the sites of the model and of the guide that have a density.
        plate: the data plate; None without one.
        local: whether every site lies in the data plate, so that each row has weights of its own.
        factor: the scale of all sites beside N/B, which weights do not take; 1 where sites differ in it.
        obstacle: why joint weights are not those of the posterior; None if they are.
        local_obstacle: the same for the weights of a row.
        eps: relative rounding error of the log densities.
    """

    p: tuple[str, ...]
    q: tuple[str, ...]
    plate: Plate | None
    local: bool
    factor: float
    obstacle: PyroElboError | None
    local_obstacle: PyroElboError | None
    eps: float

    def sums(self, pair: TracePair, count: int, nesting: int) -> dict[str, Tensor | None]:
        """Sum the log densities of ``count`` draws in float64, jointly and per row of the data plate."""
        p, q = [pair.model[n] for n in self.p], [pair.guide[n] for n in self.q]
        row, fixed = self.plate if self.local else None, fixed_sites(pair.model.values())
        return {
            "log_p": self.total(p, None, count, nesting),
            "log_q": self.total(q, None, count, nesting),
            "local_log_p": self.total((s for s in p if s.name not in fixed), row, count, nesting) if row else None,
            "local_log_q": self.total(q, row, count, nesting) if row else None,
        }

    def total(self, sites: Iterable[Site], keep: Plate | None, count: int, nesting: int) -> Tensor:
        """Sum log densities of ``count`` draws over sites, and over all their plates but ``keep``, in float64."""
        result = torch.zeros(count, *([keep.size] if keep else []), dtype=torch.float64)
        for s in sites:
            scale = s.scale / self.factor * (keep.size / keep.full_size if keep else 1.0)
            result = result + sum_plates(s.log_prob().double() * scale, keep, count, nesting)
        return result


def sum_plates(x: Tensor, keep: Plate | None, count: int, nesting: int) -> Tensor:
    """Sum over all batch dimensions but that of the draws and that of the plate to keep."""
    x = align(x, count, nesting)
    dims = [d for d in range(-nesting, 0) if keep is None or d != keep.dim]
    return x.sum(dims) if dims else x


def align(x: Tensor, count: int, nesting: int) -> Tensor:
    """Expand batch dimensions to (draws, nesting dims)."""
    x = x.reshape((1,) * (nesting + 1 - x.dim()) + x.shape)
    return x.expand(count, *x.shape[1:])


def find_weighting(pair: TracePair) -> Weighting:
    """Return the sites that weights sum up, and the obstacles that one run of the programs shows."""
    p = [s for s in pair.model.values() if s.has_density]
    q = [s for s in pair.guide.values() if s.role in ("latent", "auxiliary")]
    plate = shared_plate(s.plates for s in p if s.role == "observed")
    fixed = fixed_sites(pair.model.values())
    local = plate is not None and all(plate in s.plates for s in p + q if s.name not in fixed)
    scales = {s.name: _scale_beside_plates(s) for s in p + q}
    bounds = [x for pair in scales.values() for x in pair]
    uniform = not bounds or math.isclose(min(bounds), max(bounds), rel_tol=1e-5)
    factor = bounds[0] if uniform and bounds and bounds[0] > 0 else 1.0
    scaled = None if uniform and (not bounds or bounds[0] > 0) else _scale_error(scales)
    dtype = next((s.value.dtype for s in p + q if s.value.is_floating_point()), torch.get_default_dtype())
    return Weighting(
        p=tuple(s.name for s in p),
        q=tuple(s.name for s in q),
        plate=plate,
        local=local,
        factor=factor,
        obstacle=scaled or _subsample_error(p + q, None),
        local_obstacle=scaled or _subsample_error(p + q, plate),
        eps=torch.finfo(dtype).eps,
    )


def _scale_beside_plates(site: Site) -> tuple[float, float]:
    """Return the smallest and the largest factor of a site's log density, without N/B of its plates."""
    rows = math.prod(p.full_size / p.size for p in site.plates)
    scale = torch.as_tensor(site.scale).double() / rows
    return scale.min().item(), scale.max().item()


def _scale_error(scales: Mapping[str, tuple[float, float]]) -> WeightsError:
    found = {n: f"{low:g}" if low == high else f"{low:g} to {high:g}" for n, (low, high) in scales.items()}
    return WeightsError(
        f"Sites have different scales beside those of their plates: {found}. Such densities are not those of one "
        "posterior, so that importance weights, k-hat and leave-one-out mean nothing. Run the programs without "
        "poutine.scale and with all rows of sequential plates, or scale both programs as a whole."
    )


def _subsample_error(sites: Iterable[Site], data: Plate | None) -> WeightsError | None:
    """Return the error about the first plate that takes a part of its rows, those of ``data`` aside."""
    for plate in dict.fromkeys(p for s in sites for p in s.plates):
        if plate != data and plate.size < plate.full_size:
            return WeightsError(
                f"Plate '{plate.name}' took {plate.size} of its {plate.full_size} rows: the importance weights of "
                "latents outside it need all rows, so that k-hat, PSIS and leave-one-out are not defined. Run the "
                "programs on the full data, without a subsample."
            )
    return None


def _check_draws(latents: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteError for draws of a latent that are NaN or infinite."""
    for name, x in latents.items():
        if x.is_floating_point() and not torch.isfinite(x).all():
            raise NonFiniteError(
                f"Site '{name}': of its draws, {count_nonfinite(x)}. Look for data of the guide that are not finite, "
                "and for a parameter that has diverged."
            )


def find_point_error(latents: Mapping[str, Tensor], pair: TracePair) -> GuideError | None:
    """Return the error about latents of which the guide is a point estimate; None without any.

    AutoGuides pass a draw on to a latent by a Delta. A Delta is a point where its value is the same in every draw, and
    somewhere where there are more free elements in Deltas than in the auxiliary sites that could drive them.

    Raises:
        NonFiniteError: a draw is NaN or infinite.
    """
    _check_draws(latents)
    if len(next(iter(latents.values()), ())) < 2:  # a single draw shows no difference
        return None
    drawn = {n: s for n, s in pair.model.items() if s.role == "latent" and n in pair.guide}  # others are summed out
    deltas = [n for n, s in drawn.items() if is_point(pair.guide[n].fn) and not is_point(s.fn)]
    points = [n for n in deltas if bool((latents[n] == latents[n][:1]).all())]
    drivers = [s for s in pair.guide.values() if s.role == "auxiliary" and not is_point(s.fn)]
    if not points and sum(_num_free(pair.model[n]) for n in deltas) > sum(s.value.numel() for s in drivers):
        points = deltas
    if not points:
        return None
    names = ", ".join(f"'{n}'" for n in points)
    return GuideError(
        f"The guide is a point estimate in {names} (Delta): it has no density there that could be compared with the "
        "posterior's. Use a guide with a density for every latent, e.g. AutoNormal."
    )


def _num_free(site: Site) -> int:
    """Count the elements of a value in its unconstrained form."""
    shape: Any = unconstrained_shape(site)
    return site.value.numel() if shape is None else math.prod(shape)


def unconstrained_shape(site: Site) -> torch.Size | None:
    """Return the shape of a latent on the real line; None for discrete sites and supports without a transform."""
    value = unconstrain(site)
    return None if value is None else value.shape


def is_discrete(site: Site) -> bool:
    """Return whether a site's support is known to be discrete."""
    try:
        return bool(site.fn.support.is_discrete)
    except NotImplementedError:
        return False


def unconstrain(site: Site) -> Tensor | None:
    """Map a latent to the real line; None for discrete sites and supports without a transform."""
    try:
        support: Any = site.fn.support
        return None if support.is_discrete else biject_to(support).inv(site.value)
    except NotImplementedError:
        return None
