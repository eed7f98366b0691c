"""Batches in parts: several processes hold the rows of one batch, and their gradients are averaged.

Where the loss of a step is not a mean over rows, each process needs the rows of all. Gathered rows are the same in
every process, and so is what is computed from them. The gradient of :func:`gather_rows` is its adjoint, a sum over
processes: the average of the processes' gradients is that of one process with the whole batch.

What processes exchange are operators of torch, so that a captured graph holds them. Each takes the result of the one
before, which keeps their order in every process.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyro_elbo.errors import ArgumentError

Sizes = dict[int, list[int]]  # the rows of every process, by those of this one


@dataclass
class _Parts:
    """What the processes of a group exchange in one step.

    Attributes:
        sizes: what is known of the sizes of parts; filled unless ``captured``.
        before: the result of the last exchange.
    """

    sizes: Sizes
    captured: bool
    before: list[Tensor]

    def gather(self, x: Tensor, sizes: list[int]) -> Tensor:
        return self._next(torch.ops.pyro_elbo_ranks.gather(x, sizes, self.before))

    def total(self, x: Tensor) -> Tensor:
        return self._next(torch.ops.pyro_elbo_ranks.total(x, self.before))

    def _next(self, found: Tensor) -> Tensor:
        self.before = [found.detach()]  # autograd marks the tensor that a function returns
        return found


_parts: ContextVar[_Parts | None] = ContextVar("_parts", default=None)


@contextmanager
def in_parts(sizes: Sizes | None = None, captured: Tensor | None = None) -> Iterator[None]:
    """Take the batches of all processes, if there are several, for the parts of one.

    Args:
        sizes: receives the sizes of the parts; gives them to a capture.
        captured: an input of the graph, where the step is captured as one.
    """
    before = [] if captured is None else [captured]
    parts = _Parts({} if sizes is None else sizes, captured is not None, before)
    token = _parts.set(parts if is_grouped() else None)
    try:
        yield
    finally:
        _parts.reset(token)


def is_in_parts() -> bool:
    """Return whether this process holds a part of the batch only."""
    return _parts.get() is not None


def is_grouped() -> bool:
    """Return whether this process belongs to a group of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def group_of_one() -> Iterator[None]:
    """Make a group of this process alone, unless there is one: some optimizers ask for it when they are made."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_alone() -> None:
    """Raise ArgumentError for a step of SVI in a group of processes, which would part silently."""
    if is_grouped():
        raise ArgumentError(
            f"SVI trains in one process, and this is one of {dist.get_world_size()}: its steps do not average "
            "gradients, and every process would train programs of its own. Use pe.fit(..., devices=n), under torchrun "
            "too, or the objective as a module under torch's DistributedDataParallel."
        )


def part_sizes(rows: int) -> list[int]:
    """Return the rows that each process holds of a batch, of which this one holds ``rows``."""
    parts = _parts.get()
    if parts is None:
        return [rows]
    if not parts.captured:
        found = _numbers(rows)
        if parts.sizes.setdefault(rows, found) != found:
            parts.sizes[rows] = []
    if not parts.sizes[rows]:
        raise ArgumentError(
            f"Two dimensions of {rows} rows have other sizes in the other processes: use compile=False."
        )
    return parts.sizes[rows]


def gather_rows(x: Tensor, dim: int) -> Tensor:
    """Join the parts of a batch along a dimension, in the order of the ranks; the gradient reaches each part."""
    parts = _parts.get()
    if parts is None:
        return x
    return _Gather.apply(x.movedim(dim, 0), part_sizes(x.shape[dim]), parts).movedim(0, dim)


def total(x: Tensor) -> Tensor:
    """Return the sum over the parts of a batch, a constant."""
    parts = _parts.get()
    return x if parts is None else parts.total(x.detach())


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


def all_states(state: Any) -> list[Any]:
    """Return what each process passes: tensors and plain values."""
    found = [state]
    if is_grouped():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, state)
    return found


def digests(text: str) -> list[int]:
    """Return a digest of what each process passes."""
    return _numbers(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little"))


def all_of(condition: bool) -> bool:
    """Return whether a condition holds in every process."""
    return all(_numbers(int(condition)))


def _numbers(x: int) -> list[int]:
    found = torch.zeros(dist.get_world_size(), dtype=torch.long)
    found[dist.get_rank()] = x
    dist.all_reduce(found)
    return found.tolist()


class _Gather(torch.autograd.Function):
    """Gathers parts of different length along the first dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], parts: _Parts) -> Tensor:
        ctx.sizes, ctx.parts = sizes, parts
        return parts.gather(x, sizes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.parts.total(gradient).split(ctx.sizes)[dist.get_rank()], None, None


def _gather(x: Tensor, sizes: list[int], before: list[Tensor]) -> Tensor:
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])


def _total(x: Tensor, before: list[Tensor]) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


_library = torch.library.Library("pyro_elbo_ranks", "DEF")
for _schema, _run, _fake in (
    (
        "gather(Tensor x, int[] sizes, Tensor[] before) -> Tensor",
        _gather,
        lambda x, sizes, before: x.new_empty(sum(sizes), *x.shape[1:]),
    ),
    ("total(Tensor x, Tensor[] before) -> Tensor", _total, lambda x, before: x.new_empty(x.shape)),
):
    _name = _schema.split("(")[0]
    _library.define(_schema)
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyro_elbo_ranks::{_name}", _fake, lib=_library)
