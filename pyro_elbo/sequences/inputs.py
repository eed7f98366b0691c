"""The inputs of all steps of a scan."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_elbo.assumptions import check_or_defer
from pyro_elbo.errors import ArgumentError, check_count, describe


@dataclass(frozen=True)
class Inputs:
    """The inputs of all steps.

    Attributes:
        xs: the inputs, time first, with padding replaced by each sequence's last valid frame.
        given: the number of steps that have an input.
        total: the number of steps, the forecast included.
        valid: the valid steps of each sequence, shape (T, *batch); None if all are.
    """

    xs: Any
    given: int
    total: int
    valid: Tensor | None

    @staticmethod
    def make(xs: Any, lengths: Any, length: int | None, horizon: int, dim: int) -> "Inputs":
        """Check the inputs of a scan and give them the form of this class."""
        check_count("pe.scan: horizon", horizon, least=0)
        if length is not None:
            check_count("pe.scan: length", length, least=0)
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise ArgumentError(f"pe.scan: dim must be the number of a dimension of xs, got {describe(dim)}.")
        leaves = pytree.tree_leaves(xs)
        if bad := [type(x).__name__ for x in leaves if x is not None and not isinstance(x, Tensor)]:
            raise ArgumentError(f"pe.scan: xs must hold tensors, got {bad[0]}. Pass torch.as_tensor(x).")
        sizes = [_size(x, dim) for x in leaves if x is not None] + ([] if length is None else [length])
        if len(set(sizes)) != 1 or sizes[0] + horizon < 1:
            raise ArgumentError(
                f"pe.scan: expected inputs of one length T >= 1 in dimension {dim}, got lengths {sizes} and a "
                f"horizon of {horizon}. Skip empty sequences; pass length=T where xs is None."
            )
        given = sizes[0]
        xs = pytree.tree_map(lambda x: None if x is None else x.movedim(dim, 0), xs)
        if lengths is None:
            return Inputs(xs, given, given + horizon, None)
        lengths = _check_lengths(lengths, given, [x for x in pytree.tree_leaves(xs) if x is not None])
        times = torch.arange(given, device=lengths.device).reshape(-1, *(1,) * lengths.dim())
        last = torch.minimum(times, lengths - 1)
        valid = times < lengths
        forecast = valid.new_ones((horizon, *valid.shape[1:]))
        return Inputs(
            pytree.tree_map(lambda x: _take(x, last), xs), given, given + horizon, torch.cat([valid, forecast])
        )

    def at(self, t: int) -> Any:
        """Return the inputs of step ``t``, with None in place of each tensor in the forecast."""
        return pytree.tree_map(lambda x: x[t] if t < self.given and x is not None else None, self.xs)

    def valid_at(self, t: int) -> Tensor | None:
        """Return which sequences have a step ``t``; None if all do."""
        return None if self.valid is None else self.valid[t]

    def order(self, reverse: bool) -> range:
        """Return the steps in the order in which they run."""
        return range(self.total - 1, -1, -1) if reverse else range(self.total)


def _size(x: Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ArgumentError(
            f"pe.scan: xs holds a tensor of shape {tuple(x.shape)}, which has no dimension {dim} for time. Pass the "
            "time dimension as dim."
        )
    return x.shape[dim]


def _check_lengths(lengths: Any, total: int, xs: Sequence[Tensor]) -> Tensor:
    try:
        lengths = torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"pe.scan: lengths must be integers, got {describe(lengths)}.") from error
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ArgumentError(f"pe.scan: lengths must be integers, got {lengths.dtype}.")
    for x in xs:
        if x.shape[1 : 1 + lengths.dim()] != lengths.shape:
            raise ArgumentError(
                f"pe.scan: lengths of shape {tuple(lengths.shape)} do not fit inputs of shape {tuple(x.shape)} (time "
                f"first). Expected time, then the dimensions of lengths. Pass dim=1 if time is second."
            )
    if not check_or_defer(((lengths >= 1) & (lengths <= total)).all()):
        bad = lengths[(lengths < 1) | (lengths > total)]
        cures = ["Leave empty sequences out of the batch."] if bool((bad < 1).any()) else []
        cures += (
            [f"Pass xs padded to the longest sequence (it has {total} steps)."] if bool((bad > total).any()) else []
        )
        raise ArgumentError(
            f"pe.scan: lengths must lie between 1 and T = {total}, got {bad.flatten()[:5].tolist()}. {' '.join(cures)}"
        )
    return lengths


def _take(x: Tensor | None, last: Tensor) -> Tensor | None:
    """Return each sequence at the times ``last``, shape (T, *batch)."""
    if x is None:
        return None
    index = last.reshape(last.shape + (1,) * (x.dim() - last.dim())).expand(last.shape + x.shape[last.dim() :])
    return x.gather(0, index)
