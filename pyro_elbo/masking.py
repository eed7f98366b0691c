"""Masks on log densities, and reductions under them."""

import math

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
    """Return the mask of ``fn.mask(...).to_event(n)``, over the elements of the event; None without one."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return unmask(fn, None)[1]


def unmask(fn: Distribution, mask: Tensor | bool | None) -> tuple[Distribution, Tensor | bool | None]:
    """Return the distribution inside ``fn.mask(...)``, and the product of all masks."""
    while isinstance(fn, MaskedDistribution):
        inner = fn._mask
        mask = inner if mask is None or mask is True else mask & inner
        fn = fn.base_dist
    return fn, mask
