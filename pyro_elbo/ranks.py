"""Batches in parts: several processes hold the rows of one batch, and their gradients are averaged.

Where the loss of a step is not a mean over rows, each process needs the rows of all. Gathered rows are the same in
every process, and so is what is computed from them. The gradient of :func:`gather_rows` is its adjoint, a sum over
processes: the average of the processes' gradients is that of one process with the whole batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyro_elbo.errors import ArgumentError

_in_parts: ContextVar[bool] = ContextVar("_in_parts", default=False)


@contextmanager
def in_parts() -> Iterator[None]:
    """Take the batches of all processes, if there are several, for the parts of one."""
    token = _in_parts.set(is_grouped())
    try:
        yield
    finally:
        _in_parts.reset(token)


def is_in_parts() -> bool:
    """Return whether this process holds a part of the batch only."""
    return _in_parts.get()


def is_grouped() -> bool:
    """Return whether this process belongs to a group of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_alone() -> None:
    """Raise ArgumentError for a step of SVI in a group of processes, which would part silently."""
    if is_grouped():
        raise ArgumentError(
            f"SVI trains in one process, and this is one of {dist.get_world_size()}: its steps do not average "
            "gradients, and every process would train programs of its own. Use pe.fit(..., devices=n), under torchrun "
            "too, or the objective as a module under torch's DistributedDataParallel."
        )


def gather_rows(x: Tensor, dim: int) -> Tensor:
    """Join the parts of a batch along a dimension, in the order of the ranks; the gradient reaches each part."""
    if not is_in_parts():
        return x
    sizes = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([x.shape[dim]], device=x.device))
    return _Gather.apply(x.movedim(dim, 0), [int(n) for n in sizes]).movedim(0, dim)


def total(x: Tensor) -> Tensor:
    """Return the sum over the parts of a batch, a constant."""
    if not is_in_parts():
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def weighed(loss: Tensor, count: float | Tensor) -> Tensor:
    """Weigh a mean over the ``count`` rows of a part, so that the average over parts is the mean over all rows."""
    if not is_in_parts():
        return loss
    own = torch.as_tensor(count, dtype=loss.dtype, device=loss.device).detach()
    return loss * (own * dist.get_world_size() / total(own))


def mean_of_parts(tensors: list[Tensor]) -> list[Tensor]:
    """Average tensors over the processes that hold the parts of a batch, as constants, all at once."""
    if not is_in_parts():
        return tensors
    flat = total(torch.cat([x.flatten() for x in tensors])) / dist.get_world_size()
    return [x.view_as(y) for x, y in zip(flat.split([y.numel() for y in tensors]), tensors, strict=True)]


class _Gather(torch.autograd.Function):
    """Gathers parts of different length along the first dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.split(ctx.sizes)[dist.get_rank()], None
