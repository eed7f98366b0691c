"""Masks: which entries of a log density count, and reductions that respect them."""

import math

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution


def masked(x: Tensor, mask: Tensor | bool | None) -> Tensor:
    """Put zero where ``mask`` is false (gradients there are zero as well)."""
    if mask is None or mask is True:
        return x
    if mask is False:
        return torch.zeros_like(x)
    return torch.where(mask, x, x.new_zeros(()))


def log_mean_exp(x: Tensor, dim: int) -> Tensor:
    """Log of the mean of exp(x) over a dimension, which stays with size one."""
    return x.logsumexp(dim, keepdim=True) - math.log(x.shape[dim])


def expand_to_event(mask: Tensor, event_dim: int) -> Tensor:
    """A mask over batches as one that broadcasts over the elements of an event."""
    return mask.reshape(mask.shape + (1,) * event_dim)


def unmask(fn: Distribution, mask: Tensor | bool | None) -> tuple[Distribution, Tensor | bool | None]:
    """Move the masks of ``fn.mask(...)`` to where ``poutine.mask`` puts them."""
    while isinstance(fn, MaskedDistribution):
        inner = fn._mask
        mask = inner if mask is None or mask is True else mask & inner
        fn = fn.base_dist
    return fn, mask
