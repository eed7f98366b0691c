"""C++ expressions of operators on scalars, and operators that only move, add up or multiply scalars.

An array here is a NumPy array whose elements are names of C++ variables. A view of a tensor is then NumPy's view of the
array: it costs nothing at run time.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

aten = torch.ops.aten
Array = np.ndarray
TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.bool: "bool",
}


class UnsupportedError(Exception):
    """An operator, a type or a size for which no scalars are written out."""


Write = Callable[..., Array]
"""Writes a statement per element: (template, type of the results, arrays that broadcast) -> names of the results."""


def literal(value: Any, dtype: torch.dtype) -> str:
    """Return a number as a C++ literal."""
    if dtype is torch.bool:
        return "true" if value else "false"
    if not dtype.is_floating_point:
        return f"{TYPES[dtype]}({int(value)})"
    kind, value = TYPES[dtype], float(value)
    if math.isnan(value):
        return f"std::numeric_limits<{kind}>::quiet_NaN()"
    if math.isinf(value):
        return f"({'-' if value < 0 else ''}std::numeric_limits<{kind}>::infinity())"
    return f"{kind}({value!r})"


# --- pointwise: operands are converted to the type of the result ---------------------------------------------------

_MAXIMUM = "({0} != {0} ? {0} : ({0} > {1} ? {0} : {1}))"  # NaN passes through; one instruction and a choice
_MINIMUM = "({0} != {0} ? {0} : ({0} < {1} ? {0} : {1}))"
_FUNCTIONS = (
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "sin", "cos", "tan", "asin", "acos", "atan"),
    *("sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "lgamma", "floor", "ceil", "trunc"),
)
_POINTWISE: dict[str, str] = {
    **{name: f"std::{name}({{0}})" for name in _FUNCTIONS},
    **{name: "{0} + {1}" for name in ("add.Tensor", "add.Scalar")},
    **{name: "{0} - {1}" for name in ("sub.Tensor", "sub.Scalar")},
    **{name: "{0} * {1}" for name in ("mul.Tensor", "mul.Scalar")},
    **{name: "{0} / {1}" for name in ("div.Tensor", "div.Scalar")},
    **{name: "std::pow({0}, {1})" for name in ("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")},
    **{name: _MAXIMUM for name in ("maximum", "clamp_min", "clamp_min.Tensor")},
    **{name: _MINIMUM for name in ("minimum", "clamp_max", "clamp_max.Tensor")},
    "atan2": "std::atan2({0}, {1})",
    "neg": "-{0}",
    "abs": "std::abs({0})",
    "sign": "({0} > 0) - ({0} < 0)",
    "relu": "({0} < 0 ? 0 : {0})",
    "sigmoid": "1 / (1 + std::exp(-{0}))",
    "rsqrt": "1 / std::sqrt({0})",
    "reciprocal": "1 / {0}",
}
# Operands keep the type that they share; the result is a truth value.
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_TRUTH = {
    **{f"{name}.{kind}": f"{{0}} {sign} {{1}}" for name, sign in _COMPARISONS.items() for kind in ("Tensor", "Scalar")},
    "isnan": "{0} != {0}",
    "isinf": "{0} == {0} && {0} - {0} != {0} - {0}",
}
# Operands are truth values.
_LOGIC = {"not": "!{0}", "and": "{0} && {1}", "or": "{0} || {1}", "xor": "{0} != {1}"}
_POWERS = {2: "{0} * {0}", 3: "{0} * {0} * {0}", 1: "{0}", 0.5: "std::sqrt({0})", -1: "1 / {0}"}


def _overloads(table: dict[str, str]) -> dict[Any, str]:
    """Return operator -> template, for names such as ``exp`` (its default) and ``add.Tensor``."""
    split = {name: (*name.split("."), "default")[:2] for name in table}
    return {getattr(getattr(aten, split[name][0]), split[name][1]): template for name, template in table.items()}


POINTWISE, TRUTH = _overloads(_POINTWISE), _overloads(_TRUTH)
LOGIC = _overloads({f"logical_{name}": template for name, template in _LOGIC.items()})
# Operators that are logical ones if their results are truth values.
ON_TRUTH = _overloads({f"bitwise_{name}{'' if name == 'not' else '.Tensor'}": x for name, x in _LOGIC.items()})
ON_TRUTH |= {aten.mul.Tensor: _LOGIC["and"], aten.add.Tensor: _LOGIC["or"]}


def power(exponent: Any) -> str | None:
    """Return the expression of a power with a simple exponent."""
    return _POWERS.get(exponent) if isinstance(exponent, int | float) else None


# --- views and copies ----------------------------------------------------------------------------------------------


def _cut(x: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> tuple:
    index: list[slice] = [slice(None)] * x.ndim
    index[dim] = slice(start, end, step)
    return tuple(index)


def _scatter(x: Array, source: Array, index: tuple) -> Array:
    x = x.copy()
    x[(*index, ...)] = source  # an array without dimensions, too, gives its element
    return x


def _select(x: Array, dim: int, index: int) -> tuple:
    where: list[Any] = [slice(None)] * x.ndim
    where[dim] = index
    return tuple(where)


def _split(x: Array, size: Any, dim: int = 0) -> list[Array]:
    sizes = size if isinstance(size, list | tuple) else [size] * (x.shape[dim] // size)
    return np.split(x, np.cumsum(sizes)[: len(sizes) - (sum(sizes) == x.shape[dim])], axis=dim)


# Operators whose result is their first argument in the shape of the result.
SHAPES: Any = {
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default),
}
MOVES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((aten.clone.default, aten.alias.default, aten.detach.default), lambda x, **_: x),
    aten.permute.default: lambda x, dims: x.transpose(dims),
    aten.t.default: lambda x: x.T,
    aten.transpose.int: lambda x, a, b: x.swapaxes(a, b),
    aten.select.int: lambda x, dim, index: x[_select(x, dim, index)],
    aten.slice.Tensor: lambda x, *where: x[_cut(x, *where)],
    aten.select_scatter.default: lambda x, source, *where: _scatter(x, source, _select(x, *where)),
    aten.slice_scatter.default: lambda x, source, *where: _scatter(x, source, _cut(x, *where)),
    aten.cat.default: lambda xs, dim=0: np.concatenate(xs, axis=dim),
    aten.stack.default: lambda xs, dim=0: np.stack(xs, axis=dim),
    **dict.fromkeys((aten.flip.default, torch.ops.prims.rev.default), lambda x, dims: np.flip(x, dims)),
    aten.repeat.default: lambda x, times: np.tile(x, times),
    aten.unbind.int: lambda x, dim=0: list(np.moveaxis(x, dim, 0)),
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
}


# --- sums and products ---------------------------------------------------------------------------------------------

_ADD, _MULTIPLY = _POINTWISE["add.Tensor"], _POINTWISE["mul.Tensor"]
FOLDS: Any = {
    **dict.fromkeys((aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim), _ADD),
    **dict.fromkeys((aten.prod.default, aten.prod.dim_int), _MULTIPLY),
    **dict.fromkeys((aten.amax.default, aten.max.default), _MAXIMUM),
    **dict.fromkeys((aten.amin.default, aten.min.default), _MINIMUM),
    **dict.fromkeys((aten.any.default, aten.any.dim, aten.any.dims), _LOGIC["or"]),
    **dict.fromkeys((aten.all.default, aten.all.dim, aten.all.dims), _LOGIC["and"]),
}
PRODUCTS: Any = (aten.mm.default, aten.bmm.default, aten.addmm.default)
MEANS: Any = (aten.mean.default, aten.mean.dim)


def fold(write: Write, template: str, dtype: torch.dtype, rows: Sequence[Array]) -> Array:
    """Combine rows pairwise, which keeps chains of dependent statements short."""
    rows = list(rows)
    if not rows:
        raise UnsupportedError("a reduction of nothing")
    while len(rows) > 1:
        pairs = [write(template, dtype, a, b) for a, b in zip(rows[::2], rows[1::2], strict=False)]
        rows = pairs + rows[len(rows) - len(rows) % 2 :]
    return rows[0]


def rows_of(x: Array, dims: Any, keepdim: bool) -> list[Array]:
    """Return what a reduction over dimensions combines."""
    dims = range(x.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    axes = [d % x.ndim for d in dims] if x.ndim else []
    index: Iterable[tuple[int, ...]] = np.ndindex(*(x.shape[d] for d in axes))
    rows = [np.asarray(np.moveaxis(x, axes, range(len(axes)))[i], dtype=object) for i in index]
    return [np.expand_dims(row, sorted(axes)) for row in rows] if keepdim else rows


def product(write: Write, dtype: torch.dtype, *operands: Array) -> Array:
    """Return a matrix product, (..., n, k) times (..., k, m), and the first operand of three added to it."""
    *bias, a, b = operands
    terms = [write(_MULTIPLY, dtype, a[..., :, i, None], b[..., None, i, :]) for i in range(a.shape[-1])]
    return fold(write, _ADD, dtype, [*bias, *terms])
