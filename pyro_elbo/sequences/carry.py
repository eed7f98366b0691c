"""The carry of a scan: its structure from step to step, and its values where sequences have ended."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_elbo.errors import ArgumentError
from pyro_elbo.masking import broadcasts


def pair_carries(old: Any, new: Any, t: int, grows: bool) -> tuple[list[tuple[Any, Any]], Any]:
    """Return the leaves of the old and the new carry side by side, and their structure.

    Raises:
        ArgumentError: if structure, shapes or dtypes differ; after the first step (``grows``) it may be larger.
    """
    olds, spec = pytree.tree_flatten(old)
    news, new_spec = pytree.tree_flatten(new)
    if spec != new_spec:
        raise ArgumentError(f"pe.scan: step {t} changes the structure of the carry: expected {spec}, got {new_spec}.")
    pairs = list(zip(olds, news, strict=True))
    for i, (a, b) in enumerate(pairs):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if isinstance(a, Tensor) or isinstance(b, Tensor) or differ(a, b):
                raise ArgumentError(
                    f"pe.scan: part {i} of the carry changes from {a!r} to {b!r} in step {t}. Make it a tensor."
                )
        elif a.dtype != b.dtype or not (a.shape == b.shape or (grows and broadcasts(a, b.shape))):
            raise ArgumentError(
                f"pe.scan: part {i} of the carry changes in step {t}: expected {a.dtype} of shape {tuple(a.shape)}, "
                f"got {b.dtype} of shape {tuple(b.shape)}. Let init have the shape and dtype that step returns."
            )
    return pairs, spec


def possible_event_dims(shape: torch.Size, sequences: torch.Size, sizes: Mapping[int, int]) -> list[int]:
    """Return the possible numbers of dimensions of a tensor to the right of those of the sequences.

    Only dimensions of plates (``sizes`` by dimension) may stand to the left of the sequences.
    """
    n, rank = len(sequences), max((-dim for dim in sizes), default=0)
    found = []
    for left in range(max(rank - n, 0) + 1):
        outer = zip(shape[:left], range(-n - left, -n), strict=False)
        if shape[left : left + n] == sequences and all(size in (1, sizes.get(dim, 1)) for size, dim in outer):
            found.append(len(shape) - n - left)
    return found


def find_event_dim(init: Any, x: Any, sequences: torch.Size, sizes: Mapping[int, int], i: int) -> int:
    """Return the number of dimensions of a part of the carry to the right of those of the sequences.

    Where the shape leaves a choice, init decides: it may lack the plates to the left of the sequences.

    Raises:
        ArgumentError: if the carry does not have the dimensions of the sequences, or may have them in several places.
    """
    if not isinstance(x, Tensor):
        return 0
    found = possible_event_dims(x.shape, sequences, sizes)
    if len(found) > 1:
        found = [0] if init.dim() < len(sequences) else possible_event_dims(init.shape, sequences, sizes)
    if len(found) == 1:
        return found[0]
    shape, expected = tuple(x.shape), tuple(sequences)
    if found:
        raise ArgumentError(
            f"pe.scan: part {i} of the carry has shape {shape}, where sequences of shape {expected} may stand in "
            f"{len(found)} places, next to plates of sizes {sorted(sizes.values())}. Choose another size of these "
            "plates (num_particles), or let init have the dimensions of the sequences and of its event alone."
        )
    raise ArgumentError(
        f"pe.scan: part {i} of the carry has shape {shape}, but lengths are given for sequences of shape {expected}. "
        "Let the carry begin with the dimensions of the sequences."
    )


def hold_ended(valid: Tensor, old: Any, new: Any, event_dim: int) -> tuple[Any, Any]:
    """Return both carries, with the old one in place of the new one where sequences have ended."""
    if not isinstance(new, Tensor):
        return old, new
    return old, torch.where(valid.reshape(valid.shape + (1,) * event_dim), new, old)


def differ(a: Any, b: Any) -> bool:
    """Return whether two constants differ."""
    try:
        return bool(a != b)
    except ValueError:  # arrays
        return a is not b
