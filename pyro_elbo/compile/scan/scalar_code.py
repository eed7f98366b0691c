"""Write the recurrence of a scan as one C++ loop over scalars, where a step is a handful of numbers.

Calling machine code once per step costs microseconds, hundreds of times what a few additions take. Here the loop over
time is part of the code: every element of every tensor of a step is a local variable, the carry stays in registers,
and only the results of a step are written to memory. Views vanish while the code is written.
"""

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from pyro_elbo.compile.scan.lanes import SOURCE as LANES
from pyro_elbo.compile.scan.lanes import Code, vector_width
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
{lanes}
#ifndef {name}
#define {name} {name}
extern "C" void {name}(void** columns, int64_t steps) {{
{before}
  for (int64_t i = 0; i < steps; i++) {{
    const int64_t t = {time};
{body}
  }}
}}

// The same for each of `count` rows.
extern "C" void {name}_each(void** columns, int64_t steps, int64_t count) {{
  const int64_t sizes[] = {{{sizes}}};
  for (int64_t row = 0; row < count; row++) {{
    void* now[{width}];
    for (int64_t i = 0; i < {width}; i++) now[i] = static_cast<char*>(columns[i]) + row * sizes[i];
    {name}(now, steps);
  }}
}}
#endif
"""


def _evaluate(code: Code, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
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


def _pointwise(code: Code, node: fx.Node, args: Any) -> Array:
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


def _reduced(code: Code, target: Any, dtype: torch.dtype, args: Any, kwargs: dict[str, Any]) -> Array:
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
        like: a contiguous tensor like each constant, carry, input, next carry and export.
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


def scalar_loop(name: str, module: fx.GraphModule, layout: Layout, reverse: bool, limit: int) -> str:
    """Return the C++ source of the loop over a step: functions of the addresses of tensors and the number of steps.

    The tensors are constants, carry, inputs, states around all steps, and exports; the last three with time first.

    Args:
        name: of the function; with ``_each`` at its end, it runs for each row of tensors.
        module: a step that writes next carry and exports to its last arguments, functional otherwise.
        layout: its arguments.
        reverse: run from the last step to the first.
        limit: the work of a step from which on it is refused, in additions.

    Raises:
        UnsupportedError: the step is too large, or has operators or types of which no scalars are written.
    """
    code = Code(limit, vector_width())
    if sum(x.numel() for x in layout.like) > limit:
        raise UnsupportedError(f"more than {limit} elements")
    places = [n for n in module.graph.nodes if n.op == "placeholder"]
    variables = [code.variables(f"x{i}", x.numel(), x.dtype) for i, x in enumerate(layout.like)]
    values: dict[fx.Node, Any] = {
        n: np.array([x for *_, names in held for x in names], dtype=object).reshape(tuple(like.shape))
        for n, held, like in zip(places, variables, layout.like, strict=True)
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
    stored = [results[n] for n in places[layout.first_result :]]
    return _source(name, code, layout, reverse, variables, stored)


Variables = list[tuple[str, str, list[str]]]
"""The type and the name of variables, and the names of the numbers that each holds."""


def _source(
    name: str, code: Code, layout: Layout, reverse: bool, variables: Sequence[Variables], results: Sequence[Array]
) -> str:
    """Return the source: what stands before the loop, then loads, statements, stores and the turn to the next step."""
    before = [f"  {TYPES[x.dtype]}* const __restrict p{p} = {_pointer(x, p)};" for p, x in enumerate(layout.like)]
    loads: list[str] = []
    stores: list[str] = []
    turns: list[str] = []
    first, after = ("steps", "t") if reverse else ("0", "t + 1")
    for p, like in enumerate(layout.like[: layout.first_result]):
        size, starts = like.numel(), itertools.accumulate((len(x) for *_, x in variables[p]), initial=0)
        for (kind, x, numbers), start in zip(variables[p], starts, strict=False):
            if p < layout.constants:
                before.append(f"  const {kind} {x} = {_load(kind, p, str(start), len(numbers))};")
            elif p < layout.first_input:
                state = p + layout.first_result - layout.constants
                before.append(f"  {kind} {x} = {_load(kind, p, str(start), len(numbers))};")
                before.append(f"  {_store(state, f'{first} * {size} + {start}', x, len(numbers))}")
            else:
                loads.append(f"    const {kind} {x} = {_load(kind, p, f't * {size} + {start}', len(numbers))};")
    for p, array in enumerate(results, layout.first_result):
        is_carry = p < layout.first_result + layout.carry
        size, row = array.size, after if is_carry else "t"
        for i, (start, length, value) in enumerate(code.stored([*array.flat], layout.like[p].dtype)):
            stores.append(f"    const auto y{p}_{start} = {value};")
            stores.append(f"    {_store(p, f'({row}) * {size} + {start}', f'y{p}_{start}', length)}")
            if is_carry:
                turns.append(f"    {variables[p - layout.first_result + layout.constants][i][1]} = y{p}_{start};")
    lengths = ["1"] * layout.first_input + ["steps"] * layout.inputs
    lengths += ["(steps + 1)"] * layout.carry + ["steps"] * (len(results) - layout.carry)
    sizes = [f"{length} * {x.numel() * x.element_size()}" for length, x in zip(lengths, layout.like, strict=True)]
    body = "\n".join([*loads, *code.lines, *stores, *turns])
    return _SOURCE.format(
        name=name,
        lanes=LANES if "lanes::" in body else "",
        sizes=", ".join(sizes),
        width=len(sizes),
        before="\n".join(before),
        time="steps - 1 - i" if reverse else "i",
        body=body,
    )


def _load(kind: str, p: int, at: str, length: int) -> str:
    return f"p{p}[{at}]" if length == 1 else f"lanes::load<{kind}>(p{p} + {at})"


def _store(p: int, at: str, value: str, length: int) -> str:
    return f"p{p}[{at}] = {value};" if length == 1 else f"lanes::store(p{p} + {at}, {value});"


def _pointer(x: Tensor, p: int) -> str:
    return f"static_cast<{TYPES[x.dtype]}*>(columns[{p}])"


@cache
def function_in(source: str, name: str) -> Callable[..., None]:
    """Compile the source of a loop and return its function ``name``."""
    function = getattr(load_library(source)(), name)
    function.restype = None
    return function
