"""Layouts of the results of operators on fake tensors, computed once for each kind of call.

The mode of the fake tensors keeps such results too, but spells out every argument at every call: a fifth of a
millisecond, where the lookup here takes a tenth of that.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from pyro_elbo.compile._torch import FakeTensor, FakeTensorMode, OpOverload, in_kernel_invocation_manager, is_composite

aten = torch.ops.aten
_Layout = tuple[Any, ...]  # dtype, shape, stride, device
_UNLIKE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}


class Layouts:
    """Numbers the layouts of fake tensors, and remembers that of each result."""

    def __init__(self) -> None:
        self._numbers: dict[_Layout, int] = {}
        self._layouts: list[_Layout] = []
        self._results: dict[tuple[Any, ...], int] = {}

    def of(self, x: Any) -> int | None:
        """Return the number of a tensor's layout; None where more than that decides on results."""
        if type(x) is not FakeTensor or x.constant is not None or x.layout is not torch.strided:
            return None
        if x.is_conj() or x.is_neg():
            return None
        layout = x.dtype, x.shape, x.stride(), x.fake_device
        if layout not in self._numbers:
            self._numbers[layout] = len(self._layouts)
            self._layouts.append(layout)
        return self._numbers[layout]

    def call(
        self, function: OpOverload, args: tuple, kwargs: dict[str, Any], given: list[Any]
    ) -> tuple[Any, int | None]:
        """Call an operator on fake tensors; return its result, and the number of the result's layout.

        Args:
            function, args, kwargs: the call.
            given: the numbers of its tensors' layouts, and its other arguments.
        """
        kind, first = _kind(function), args[0] if args else None
        first = first[0] if isinstance(first, list) and first else first
        if kind is None or None in given or type(first) is not FakeTensor:
            return function(*args, **kwargs), None
        key = (function, torch.get_default_dtype(), *given)
        number = self._results.get(key)
        if number is None:
            result = function(*args, **kwargs)
            number = self.of(result)
            if number is not None and (kind == "view" or result is args[0] or result.storage_offset() == 0):
                self._results[key] = number
            return result, number
        if kind == "in place":
            return args[0], number
        return self._made(first.fake_mode, function if kind == "view" else None, args, kwargs, number), number

    def _made(
        self, mode: FakeTensorMode, view: OpOverload | None, args: tuple, kwargs: dict[str, Any], number: int
    ) -> Tensor:
        """Return a tensor of a layout, with memory of its own or as a view."""
        dtype, shape, stride, device = self._layouts[number]
        with in_kernel_invocation_manager(mode):
            if view is None:
                made = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            else:
                made = view(*args, **kwargs)
        return FakeTensor(mode, made, device)


@cache
def _kind(function: Any) -> str | None:
    """Return what an operator's result is: its first argument, a view of that, or fresh; None if nothing is known."""
    if not isinstance(function, OpOverload) or function.namespace not in ("aten", "prims"):
        return None
    schema = function._schema
    if len(schema.returns) != 1 or _UNLIKE.intersection(function.tags) or is_composite(function):
        return None
    if function in (aten._unsafe_view.default, aten.lift_fresh.default, aten.lift_fresh_copy.default):
        return None
    written = [i for i, x in enumerate(schema.arguments) if x.alias_info is not None and x.alias_info.is_write]
    if written:
        return "in place" if written == [0] and function._schema.name.endswith("_") else None
    return "view" if function.is_view else "fresh"
