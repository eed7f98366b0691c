"""Write the recurrence of a scan as one C++ loop over scalars, where a step is a handful of numbers.

Calling machine code once per step costs microseconds, hundreds of times what a few additions take. Here the loop over
time is part of the code: every element of every tensor of a step is a local variable, the carry stays in registers,
and only the results of a step are written to memory. Views vanish while the code is written.
"""

import ctypes
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from pyro_elbo.compile.scan.scalar_ops import (
    FOLDS,
    LOGIC,
    MEANS,
    MOVES,
    ON_TRUTH,
    POINTWISE,
    PRODUCTS,
    SHAPES,
    TRUTH,
    TYPES,
    Array,
    UnsupportedError,
    fold,
    literal,
    power,
    product,
    rows_of,
)
from pyro_elbo.compile.store import load_library

aten = torch.ops.aten

_SOURCE = r"""
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>

extern "C" void loop(void** columns, int64_t steps) {{
{before}
  for (int64_t i = 0; i < steps; i++) {{
    const int64_t t = {time};
{body}
  }}
}}
"""


class _Code:
    """The statements of a step and the types of their variables.

    Args:
        limit: the work from which on a step is refused: 1 for a statement, 10 for one that calls a function.
    """

    def __init__(self, limit: int) -> None:
        self.lines: list[str] = []
        self._work, self._limit, self._types, self._names = 0, limit, {}, {}

    def declare(self, name: str, dtype: torch.dtype) -> str:
        """Note the type of a variable."""
        if dtype not in TYPES:
            raise UnsupportedError(f"the type {dtype}")
        self._types[name] = dtype
        return name

    def number(self, value: Any, dtype: torch.dtype) -> Array:
        """Return a number as an array without dimensions."""
        return np.array(self.declare(literal(value, dtype), dtype), dtype=object)

    def converted(self, x: Array, dtype: torch.dtype) -> Array:
        """Convert elements to a type."""
        if all(self._types[name] is dtype for name in x.flat):
            return x
        return self.apply(f"static_cast<{TYPES[dtype]}>({{0}})", dtype, x)

    def apply(self, template: str, dtype: torch.dtype, *operands: Array) -> Array:
        """Write a statement per element of the operands, which broadcast; return the names of the results."""
        parts = np.broadcast_arrays(*operands)
        result = np.empty(parts[0].shape, dtype=object)
        for index in np.ndindex(result.shape):
            result[index] = self._statement(template.format(*(x[index] for x in parts)), dtype)
        return result

    def operands(self, args: Sequence[Any], dtype: torch.dtype) -> list[Array]:
        """Return arrays and numbers as arrays of one type."""
        return [self.converted(x, dtype) if isinstance(x, np.ndarray) else self.number(x, dtype) for x in args]

    def _statement(self, expression: str, dtype: torch.dtype) -> str:
        if (key := (expression, dtype)) not in self._names:
            self._work += 10 if "std::" in expression else 1
            if self._work > self._limit:
                raise UnsupportedError(f"more work than {self._limit} additions")
            self._names[key] = self.declare(f"v{len(self.lines)}", dtype)
            self.lines.append(f"    const {TYPES[dtype]} {self._names[key]} = {expression};")
        return self._names[key]


def _evaluate(code: _Code, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Write the statements of a node; return its array, or a list of arrays."""
    target: Any = node.target
    args: Any = fx.map_arg(node.args, values.__getitem__)
    kwargs: dict[str, Any] = dict(fx.map_arg(node.kwargs, values.__getitem__))
    if target is operator.getitem:
        return args[0][args[1]]
    if target in MOVES:
        return MOVES[target](*args, **kwargs)
    if not isinstance(like := node.meta.get("val"), Tensor):
        raise UnsupportedError(str(target))
    if target in SHAPES:
        return args[0].reshape(tuple(like.shape))
    if target is aten.expand.default:
        return np.broadcast_to(args[0], tuple(like.shape))
    if target in (aten.full.default, aten.scalar_tensor.default):
        value = args[1] if target is aten.full.default else args[0]
        return np.broadcast_to(code.number(value, like.dtype), tuple(like.shape))
    if target in FOLDS:
        return _reduced(code, target, like.dtype, args, kwargs)
    if target is torch.ops.prims.convert_element_type.default:
        return code.converted(args[0], args[1])
    if kwargs:
        raise UnsupportedError(f"{target} with {', '.join(kwargs)}")
    if target in PRODUCTS:
        return product(code.apply, like.dtype, *args)
    return _pointwise(code, node, args)


def _pointwise(code: _Code, node: fx.Node, args: Any) -> Array:
    target: Any = node.target
    dtype = node.meta["val"].dtype
    if target is aten.where.self:
        return code.apply("{0} ? {1} : {2}", dtype, args[0], *code.operands(args[1:], dtype))
    if target in TRUTH:
        examples: list[Any] = [x.meta["val"] if isinstance(x, fx.Node) else x for x in node.args]
        shared = examples[0].dtype if len(examples) == 1 else torch.result_type(*examples)
        return code.apply(TRUTH[target], dtype, *code.operands(args, shared))
    if target in LOGIC or (target in ON_TRUTH and dtype is torch.bool):
        return code.apply((LOGIC | ON_TRUTH)[target], dtype, *code.operands(args, torch.bool))
    if target not in POINTWISE or dtype is torch.bool:
        raise UnsupportedError(f"{target} of {dtype}")
    simple = power(args[1]) if target is aten.pow.Tensor_Scalar else None
    if simple is not None:
        return code.apply(simple, dtype, *code.operands(args[:1], dtype))
    return code.apply(POINTWISE[target], dtype, *code.operands(args, dtype))


def _reduced(code: _Code, target: Any, dtype: torch.dtype, args: Any, kwargs: dict[str, Any]) -> Array:
    dims = args[1] if len(args) > 1 else None
    keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    rows = rows_of(code.converted(args[0], dtype), dims, keepdim)
    result = fold(code.apply, FOLDS[target], dtype, rows)
    return code.apply("{0} / {1}", dtype, result, code.number(len(rows), dtype)) if target in MEANS else result


def _as_array(x: Any) -> Any:
    """Return arrays for the names that NumPy gives in place of arrays without dimensions."""
    return [_as_array(y) for y in x] if isinstance(x, list) else np.asarray(x, dtype=object)


@dataclass(frozen=True)
class Layout:
    """The arguments of a step: how many there are of each kind, and a tensor like each, in this order.

    Attributes:
        constants, carry, inputs: the numbers of constants, of parts of the carry and of inputs over time.
        like: a tensor in the layout of each constant, carry, input, next carry and export.
    """

    constants: int
    carry: int
    inputs: int
    like: Sequence[Tensor]

    @property
    def first_input(self) -> int:
        """The position of the first input."""
        return self.constants + self.carry

    @property
    def first_result(self) -> int:
        """The position of the first next carry."""
        return self.first_input + self.inputs


def scalar_loop(module: fx.GraphModule, layout: Layout, reverse: bool, limit: int) -> str:
    """Return the C++ source of the loop over a step.

    Args:
        module: a step that writes next carry and exports to its last arguments, functional otherwise.
        layout: its arguments.
        reverse: run from the last step to the first.
        limit: the work of a step from which on it is refused, in additions.

    Raises:
        UnsupportedError: the step is too large, or has operators or types of which no scalars are written.
    """
    code, places = _Code(limit), [n for n in module.graph.nodes if n.op == "placeholder"]
    if sum(x.numel() for x in layout.like) > limit:
        raise UnsupportedError(f"more than {limit} elements")
    values: dict[fx.Node, Any] = {
        n: _names(code, i, x) for i, (n, x) in enumerate(zip(places, layout.like, strict=True))
    }
    results: dict[fx.Node, Array] = {}
    for node in module.graph.nodes:
        if node.target is aten.copy_.default:
            room, value = node.args
            dtype = room.meta["val"].dtype
            results[room] = np.broadcast_to(code.converted(values[value], dtype), values[room].shape)
        elif node.op == "call_function":
            values[node] = _as_array(_evaluate(code, node, values))
        elif node.op == "get_attr":
            raise UnsupportedError("a tensor that the graph holds")
    split = layout.first_result
    return _source(code, layout, reverse, [values[n] for n in places[:split]], [results[n] for n in places[split:]])


def _names(code: _Code, position: int, like: Tensor) -> Array:
    names = [code.declare(f"x{position}_{i}", like.dtype) for i in range(like.numel())]
    return np.array(names, dtype=object).reshape(tuple(like.shape))


def _source(code: _Code, layout: Layout, reverse: bool, names: Sequence[Array], results: Sequence[Array]) -> str:
    """Return the source: what stands before the loop, then loads, statements, stores and the turn to the next step."""
    before = [f"  {TYPES[x.dtype]}* const __restrict p{p} = {_pointer(x, p)};" for p, x in enumerate(layout.like)]
    loads: list[str] = []
    stores: list[str] = []
    turns: list[str] = []
    first, after = ("steps", "t") if reverse else ("0", "t + 1")
    for p, (array, like) in enumerate(zip(names, layout.like, strict=False)):
        kind, size = TYPES[like.dtype], array.size
        if p < layout.constants:
            before += [f"  const {kind} {x} = p{p}[{at}];" for x, at in zip(array.flat, _offsets(like), strict=True)]
        elif p < layout.first_input:
            states = p + layout.first_result - layout.constants
            before += [
                f"  {kind} {x} = p{states}[{first} * {size} + {i}] = p{p}[{i}];" for i, x in enumerate(array.flat)
            ]
        else:
            loads += [f"    const {kind} {x} = p{p}[t * {size} + {i}];" for i, x in enumerate(array.flat)]
    for p, array in enumerate(results, layout.first_result):
        is_carry = p < layout.first_result + layout.carry
        kind, size, row = TYPES[layout.like[p].dtype], array.size, after if is_carry else "t"
        for i, x in enumerate(array.flat):
            stores += [f"    const {kind} y{p}_{i} = {x};", f"    p{p}[({row}) * {size} + {i}] = y{p}_{i};"]
        if is_carry:
            carry = names[p - layout.first_result + layout.constants]
            turns += [f"    {x} = y{p}_{i};" for i, x in enumerate(carry.flat)]
    return _SOURCE.format(
        before="\n".join(before),
        time="steps - 1 - i" if reverse else "i",
        body="\n".join([*loads, *code.lines, *stores, *turns]),
    )


def _pointer(x: Tensor, p: int) -> str:
    return f"static_cast<{TYPES[x.dtype]}*>(columns[{p}])"


def _offsets(x: Tensor) -> list[int]:
    return [sum(i * s for i, s in zip(index, x.stride(), strict=True)) for index in np.ndindex(*x.shape)]


class ScalarLoop:
    """The machine code of a loop over scalars."""

    def __init__(self, source: str) -> None:
        self._library = load_library(source)()
        self._library.loop.restype = None

    def __call__(self, columns: Sequence[Tensor], steps: int) -> None:
        """Run all steps.

        Args:
            columns: constants, carry, inputs, states around all steps and exports; time first in the last three.
            steps: the number of steps.
        """
        self._run([x.data_ptr() for x in columns], steps)

    def each(self, columns: Sequence[Tensor], steps: int) -> None:
        """Run all steps once per row of contiguous tensors."""
        first = [x.data_ptr() for x in columns]
        sizes = [x.stride(0) * x.element_size() for x in columns]
        for i in range(len(columns[0])):
            self._run([x + i * size for x, size in zip(first, sizes, strict=True)], steps)

    def _run(self, addresses: Sequence[int], steps: int) -> None:
        pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        self._library.loop(pointers, ctypes.c_int64(steps))
