"""Arrange arrays of many draws like those of one run: draws first, then the site's plates, then its event."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pyro_elbo.posterior.weights import align, unconstrained_shape
from pyro_elbo.programs import Plate, Site, sort_by_dim


def largest_site(sites: Iterable[Site]) -> int:
    """Return the number of elements of the largest site; 1 where there is none."""
    return max((s.value.numel() for s in sites if s.value.numel()), default=1)


def lead(x: Tensor, shape: torch.Size, count: int, like: Site, event_dim: int | None = None) -> Tensor:
    """Reshape an array of ``count`` draws to the shape of a single run, draws in front.

    Plates and particles add dimensions of size one, and ``pyro.deterministic`` counts all of them as event: only a
    single run shows the dimensions that belong to the site.
    """
    if x.numel() == count * shape.numel():
        return x.reshape((count, *drop_gaps(x.new_empty(shape), like, event_dim).shape))
    if x.numel() == shape.numel():
        alone = drop_gaps(x.reshape(shape), like, event_dim)
        return alone.expand(count, *alone.shape)
    raise RuntimeError(f"site '{like.name}' has shape {tuple(x.shape)} for {count} draws of shape {tuple(shape)}")


def drop_gaps(x: Tensor, like: Site, event_dim: int | None = None) -> Tensor:
    """Remove the size-one batch dimensions between plates; a deterministic keeps all dimensions as event."""
    if like.role == "deterministic":
        return x
    event_dim = like.event_dim if event_dim is None else event_dim
    dims = {p.dim for p in like.plates}
    for d in range(event_dim - x.dim(), 0):
        if d not in dims:
            x = x.squeeze(d - event_dim)
    return x


def per_plate(x: Tensor, plates: tuple[Plate, ...], count: int, nesting: int) -> Tensor:
    """Reshape a density of ``count`` draws to draws and plates."""
    return align(x, count, nesting).reshape((count, *(p.size for p in sort_by_dim(plates))))


def lead_unconstrained(free: Tensor, count: int, like: Site) -> Tensor:
    """Reshape unconstrained values of ``count`` draws like :func:`lead`; their event has a shape of its own."""
    shape: Any = unconstrained_shape(like)
    event_dim = len(shape) - (like.value.dim() - like.event_dim)
    return lead(free, shape, count, like, event_dim)


def with_gaps(x: Tensor, plates: tuple[Plate, ...], count: int, nesting: int) -> Tensor:
    """Restore the size-one batch dimensions of a run with ``count`` draws (no dimension of draws for one)."""
    sizes = {p.dim: p.size for p in plates}
    depth = nesting if count > 1 else -min(sizes, default=0)
    batch = [sizes.get(d, 1) for d in range(-depth, 0)]
    return x.reshape((*([count] if count > 1 else []), *batch, *x.shape[1 + len(plates) :]))


def count_data(site: Site, nesting: int) -> Tensor:
    """Return the mask of an observed site, shaped like its plates."""
    mask, sizes = torch.as_tensor(site.mask), {p.dim: p.size for p in site.plates}
    shape = torch.broadcast_shapes(mask.shape, [sizes.get(d, 1) for d in range(min(sizes, default=0), 0)])
    return per_plate(mask.expand(shape), site.plates, 1, nesting)[0]
