"""Masks on log densities, and reductions under them."""

import math
from collections.abc import Sequence

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent


def masked(x: Tensor, mask: Tensor | bool | None) -> Tensor:
    """Return ``x`` with zeros, and zero gradients, where ``mask`` is false."""
    if mask is None or mask is True:
        return x
    if mask is False:
        return torch.zeros_like(x)
    return torch.where(mask, x, x.new_zeros(()))


def log_mean_exp(x: Tensor, dim: int) -> Tensor:
    """Return log mean exp(x) over a dimension, kept with size one."""
    return x.logsumexp(dim, keepdim=True) - math.log(x.shape[dim])


def expand_to_event(mask: Tensor, event_dim: int) -> Tensor:
    """Return a mask over batches that broadcasts over the elements of an event."""
    return mask.reshape(mask.shape + (1,) * event_dim)


def mask_in_event(fn: Distribution) -> Tensor | bool | None:
    """Return the product of the masks in ``fn.mask(...).to_event(n)``, over the elements of the event; None without."""
    mask = None
    while isinstance(fn, Independent | MaskedDistribution):
        if isinstance(fn, MaskedDistribution):
            inner = fn._mask
            mask = both(mask, expand_to_event(inner, len(fn.event_shape)) if isinstance(inner, Tensor) else inner)
        fn = fn.base_dist
    return mask


def both(a: Tensor | bool | None, b: Tensor | bool | None) -> Tensor | bool | None:
    """Return the product of two masks; None and True count all."""
    if a is None or a is True:
        return b
    return a if b is None or b is True else a & b


def unmask(fn: Distribution, mask: Tensor | bool | None) -> tuple[Distribution, Tensor | bool | None]:
    """Return the distribution inside ``fn.mask(...)``, and the product of all masks."""
    while isinstance(fn, MaskedDistribution):
        mask = both(mask, fn._mask)
        fn = fn.base_dist
    return fn, mask


def broadcasts(small: Tensor, shape: Sequence[int]) -> bool:
    """Return whether a tensor can be expanded to a shape."""
    try:
        return torch.broadcast_shapes(small.shape, tuple(shape)) == tuple(shape)
    except RuntimeError:
        return False
