"""The arguments of a step: a key for its graph, and tensors taken out of them and put back."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_elbo.compile._torch import pytree
from pyro_elbo.errors import ArgumentError

Key = tuple[Any, ...]


def describe(kind: str, args: tuple, kwargs: dict[str, Any]) -> tuple[Key, list[Any], Any]:
    """Return the key of a step's graph, the leaves of its arguments, and their structure.

    The key holds the layout of tensors, the values of all other arguments, the default dtype and autocast. The leaves
    hold no lazy negative or conjugate bits.

    Raises:
        ArgumentError: an argument requires a gradient or is a NumPy array.
    """
    if kwargs or not all(isinstance(x, Tensor) for x in args):
        leaves, spec = pytree.tree_flatten((args, kwargs))
    else:
        leaves, spec = list(args), None
    autocast = [torch.get_autocast_dtype(x) for x in ("cpu", "cuda") if torch.is_autocast_enabled(x)]
    leaves = [_resolved(x) if isinstance(x, Tensor) else x for x in leaves]
    return (kind, spec, torch.get_default_dtype(), *autocast, *map(_describe_leaf, leaves)), leaves, spec


def with_tensors(leaves: list[Any], spec: Any, tensors: Iterable[Tensor]) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments with other tensors in place of theirs."""
    given = iter(tensors)
    replaced = [next(given) if isinstance(x, Tensor) else x for x in leaves]
    return (tuple(replaced), {}) if spec is None else pytree.tree_unflatten(replaced, spec)


def _resolved(x: Tensor) -> Tensor:
    """Write out the signs that torch keeps as a bit beside the memory: machine code reads the memory only."""
    return x.resolve_conj().resolve_neg() if x.is_conj() or x.is_neg() else x


def _describe_leaf(x: Any) -> Any:
    if isinstance(x, Tensor):
        if x.requires_grad:
            raise ArgumentError(
                "An argument of the programs requires a gradient: a compiled step trains parameters only. Pass "
                "x.detach(), or make it a pyro.param."
            )
        return x.shape, x.stride(), x.dtype, x.device
    if isinstance(x, np.ndarray):
        raise ArgumentError(
            f"An argument of the programs is a NumPy array of shape {x.shape}, whose values a graph would freeze. "
            "Pass torch.as_tensor(x)."
        )
    if isinstance(x, float | np.floating) and x == 0:
        return type(x), repr(x)  # 0.0 == -0.0
    if isinstance(x, bool | int | float | complex | str | None | np.generic):
        return type(x), x
    return _Identity(x)


def difference(old: Key, new: Key) -> str:
    """Return in words what differs between the arguments of two steps."""
    changed = [(a, b) for a, b in zip(old, new, strict=False) if a != b]
    for a, b in changed:
        if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) == 2:
            return f"an argument that is a Python {b[0].__name__} ({a[1]!r}, then {b[1]!r}) changes"
    return "the shapes of the data change"


@dataclass(frozen=True)
class _Identity:
    """An object that equals only itself; it stays alive as long as the graph that was made for it."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)
