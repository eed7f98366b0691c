"""C++ statements on single numbers, or on vectors of them where equal statements follow one another.

An array of 20 numbers is two vectors of 16 and 4 lanes. A lane has a name like any other number, so an operator that
takes some lanes only, or in another order, finds them by their names; the vector that it needs is put together once.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pyro_elbo.compile.scan.scalar_ops import LOGIC, TRUTH, TYPES, Array, UnsupportedError, literal

_REAL = (torch.float32, torch.float64)
_FEWEST = 4  # lanes of a vector
_WIDTHS = {"AVX2": 32, "AVX512": 64}  # bytes of a vector by the capability of the processor
# Functions that torch has for vectors of this processor.
_FUNCTIONS = (
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "sin", "cos", "tan", "asin", "acos", "atan"),
    *("sinh", "cosh", "tanh", "erf", "erfc", "lgamma", "floor", "ceil", "trunc", "abs"),
)
_CALL = re.compile(r"(std|lanes)::(?!pick|join|Vector)")
_SCALAR_ONLY = ("std::pow", "std::atan2", "static_cast", "({0} > 0) -", "? 0 :", "asinh", "acosh", "atanh")

SOURCE = (
    r"""
#ifndef PYRO_ELBO_LANES
#define PYRO_ELBO_LANES
#include <ATen/cpu/vec/vec.h>
#include <cstring>
#include <type_traits>
#ifdef __AVX__
#include <immintrin.h>
#endif

namespace lanes {
template <class T, int n> struct Of { typedef T Type __attribute__((vector_size(n * sizeof(T)))); };
template <class T, int n> using Vector = typename Of<T, n>::Type;
template <class V> using Lane = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V&>()[0])>>;

template <class V> inline V load(const void* from) {
  V x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class V> inline void store(void* to, V x) { std::memcpy(to, &x, sizeof x); }

// A vector whose first lanes are those of x, in its register: GCC widens a vector by way of memory.
template <class W, class V> inline auto wide(V x) {
#ifdef __AVX__
  if constexpr (sizeof(V) == 16 && sizeof(W) == 32) return (W)_mm256_castps128_ps256((__m128)x); else
#endif
#ifdef __AVX512F__
  if constexpr (sizeof(V) == 16 && sizeof(W) == 64) return (W)_mm512_castps128_ps512((__m128)x); else
  if constexpr (sizeof(V) == 32 && sizeof(W) == 64) return (W)_mm512_castps256_ps512((__m256)x); else
#endif
  return x;
}

// Some lanes of a vector.
template <int... at, class V> inline auto pick(V x) {
#if defined(__clang__) || __GNUC__ >= 12
  const auto y = wide<Vector<Lane<V>, sizeof...(at)>>(x);
  return __builtin_shufflevector(y, y, at...);
#else
  return Vector<Lane<V>, sizeof...(at)>{x[at]...};
#endif
}

template <class V, int... at> inline auto joined(V a, V b, std::integer_sequence<int, at...>) {
  constexpr int n = sizeof...(at) / 2;
  using W = Vector<Lane<V>, 2 * n>;
#if defined(__clang__) || __GNUC__ >= 12
  const auto x = wide<W>(a), y = wide<W>(b);
  return __builtin_shufflevector(x, y, (at < n ? at : at - n + int(sizeof(x) / sizeof(x[0])))...);
#else
  return W{(at < n ? a[at % n] : b[at % n])...};
#endif
}

// The lanes of two vectors.
template <class V> inline auto join(V a, V b) {
  return joined(a, b, std::make_integer_sequence<int, 2 * sizeof(V) / sizeof(a[0])>());
}

template <class V, int... at, class W> inline V first(W x, std::integer_sequence<int, at...>) { return pick<at...>(x); }

template <class V, class F> inline V map(V x, F function) {
  using T = Lane<V>;
  using Vec = at::vec::Vectorized<T>;
  constexpr int n = sizeof(V) / sizeof(T);
  if constexpr (n < Vec::size()) {
    return first<V>(map(join(x, x), function), std::make_integer_sequence<int, n>());
  } else {
    T numbers[n];
    store(numbers, x);
    for (int i = 0; i < n; i += Vec::size()) function(Vec::loadu(numbers + i)).store(numbers + i);
    return load<V>(numbers);
  }
}
"""
    + "".join(
        f"template <class V> inline V {name}(V x) {{ return map(x, [](auto v) {{ return v.{name}(); }}); }}\n"
        for name in _FUNCTIONS
    )
    + r"""}
#endif
"""
)


def vector_width() -> int:
    """Return the bytes of this processor's vectors."""
    return _WIDTHS.get(torch.backends.cpu.get_cpu_capability(), 16)


class _Place(NamedTuple):
    """Where a number stands: the vector, its lane, and the size of the lanes in bytes."""

    vector: str
    lane: int
    size: int


class Code:
    """The statements of a step and the types of their variables.

    Args:
        limit: the work from which on a step is refused: 1 for a statement, 10 for one that calls a function.
        width: the bytes of a vector; 0 for none.

    Attributes:
        lines: the statements.
    """

    def __init__(self, limit: int, width: int) -> None:
        self.lines: list[str] = []
        self._work, self._limit, self._width = 0, limit, width
        self._types: dict[str, torch.dtype] = {}
        self._known: dict[Any, str] = {}  # expressions -> their variables
        self._places: dict[str, _Place] = {}
        self._lengths: dict[str, int] = {}  # of vectors

    def declare(self, name: str, dtype: torch.dtype) -> str:
        """Note the type of a number."""
        if dtype not in TYPES:
            raise UnsupportedError(f"the type {dtype}")
        self._types[name] = dtype
        return name

    def number(self, value: Any, dtype: torch.dtype) -> Array:
        """Return a number as an array without dimensions."""
        return np.array(self.declare(literal(value, dtype), dtype), dtype=object)

    def variables(self, name: str, count: int, dtype: torch.dtype) -> list[tuple[str, str, list[str]]]:
        """Return variables that hold some numbers: the type and the name of each, and the names of its numbers."""
        found, kind = [], TYPES.get(dtype, "")
        for start, length in self._chunks(count, dtype):
            variable = f"{name}_{start}"
            numbers = [variable] if length == 1 else self._declare_vector(variable, length, dtype, dtype.itemsize)
            found.append((kind if length == 1 else _vector_type(dtype, length), variable, numbers))
            if length == 1:
                self.declare(variable, dtype)
        return found

    def stored(self, numbers: Sequence[str], dtype: torch.dtype) -> Iterator[tuple[int, int, str]]:
        """Yield values to be stored: where each starts among the numbers, its length, and its expression."""
        for start, length in self._chunks(len(numbers), dtype):
            part = numbers[start : start + length]
            yield start, length, part[0] if length == 1 else self._gathered(part, dtype)

    def converted(self, x: Array, dtype: torch.dtype) -> Array:
        """Convert elements to a type."""
        if all(self._types[name] is dtype for name in x.flat):
            return x
        return self.apply(f"static_cast<{TYPES[dtype]}>({{0}})", dtype, x)

    def operands(self, args: Sequence[Any], dtype: torch.dtype) -> list[Array]:
        """Return arrays and numbers as arrays of one type."""
        return [self.converted(x, dtype) if isinstance(x, np.ndarray) else self.number(x, dtype) for x in args]

    def apply(self, template: str, dtype: torch.dtype, *operands: Array) -> Array:
        """Write the statements of an operator on each element of arrays, which broadcast; return their names."""
        parts = np.broadcast_arrays(*operands)
        elements = [*zip(*(x.flat for x in parts), strict=True)]
        distinct = [*dict.fromkeys(elements)]
        like, names = self._lane_type(template, dtype, distinct), []
        for start, length in self._chunks(len(distinct), like):
            part = distinct[start : start + length]
            if length > 1:
                names += self._on_vectors(template, dtype, like, [*zip(*part, strict=True)])
            else:
                names.append(self._statement(template.format(*part[0]), dtype))
        found = dict(zip(distinct, names, strict=True))
        result = np.empty(parts[0].shape, dtype=object)
        result.flat = [found[x] for x in elements]
        return result

    def _chunks(self, count: int, dtype: torch.dtype | None) -> Iterator[tuple[int, int]]:
        """Yield start and length of the vectors that hold some numbers; a length of 1 stands for a number alone."""
        longest = self._width // dtype.itemsize if dtype in _REAL else 1
        start = 0
        while start < count:
            length = 1
            while length * 2 <= min(longest, count - start):
                length *= 2
            length = length if length >= _FEWEST else 1
            yield start, length
            start += length

    def _lane_type(self, template: str, dtype: torch.dtype, rows: Sequence[Sequence[str]]) -> torch.dtype | None:
        """Return the type of the lanes if an operator can act on vectors, otherwise None."""
        if any(part in template for part in _SCALAR_ONLY):
            return None
        types = {self._types[name] for row in rows for name in row}
        if template in LOGIC.values() or template in TRUTH.values() or dtype in _REAL:
            masks = [name for row in rows for name in row if self._types[name] is torch.bool]
            real = types - {torch.bool} or {x for x in _REAL if masks and self._size(masks[0]) == x.itemsize}
            if len(real) == 1 and (dtype is torch.bool or {dtype} == real):
                (found,) = real
                if found in _REAL and all(self._size(name) == found.itemsize for name in masks):
                    return found
        return None

    def _size(self, name: str) -> int:
        return self._places[name].size if name in self._places else 0

    def _on_vectors(self, template: str, dtype: torch.dtype, like: Any, rows: Sequence[Sequence[str]]) -> list[str]:
        length = len(rows[0])
        parts = [self._gathered(row, like if self._types[row[0]] is not torch.bool else torch.bool) for row in rows]
        return self._vector(template.replace("std::", "lanes::").format(*parts), length, dtype, like.itemsize)

    def _vector(self, expression: str, length: int, dtype: torch.dtype, size: int) -> list[str]:
        """Write a vector; return the names of its lanes."""
        if (key := (expression, length, dtype)) not in self._known:
            self._count(expression)
            self._known[key] = vector = f"w{len(self.lines)}"
            self.lines.append(f"    const auto {vector} = {expression};")
            self._declare_vector(vector, length, dtype, size)
        return self._lanes(self._known[key], dtype)

    def _declare_vector(self, vector: str, length: int, dtype: torch.dtype, size: int) -> list[str]:
        self._lengths[vector] = length
        for lane, name in enumerate(self._lanes(vector, dtype)):
            self._places[self.declare(name, dtype)] = _Place(vector, lane, size)
        return self._lanes(vector, dtype)

    def _lanes(self, vector: str, dtype: torch.dtype) -> list[str]:
        names = [f"{vector}[{lane}]" for lane in range(self._lengths[vector])]
        return [f"bool({name})" for name in names] if dtype is torch.bool else names

    def _gathered(self, names: Sequence[str], dtype: torch.dtype) -> str:
        """Return a vector of numbers."""
        places = [self._places.get(name) for name in names]
        found = [place for place in places if place is not None]
        vectors = {place.vector for place in found}
        if len(found) < len(names):
            if len(set(names)) == 1:
                return self._part(f"{names[0]} - {_vector_type(dtype, len(names))}{{}}")
            return self._part(f"{_vector_type(dtype, len(names))}{{{', '.join(names)}}}")
        if len(vectors) == 1:
            (vector,), lanes = vectors, [place.lane for place in found]
            if lanes == [*range(self._lengths[vector])]:
                return vector
            return self._part(f"lanes::pick<{', '.join(map(str, lanes))}>({vector})")
        half = len(names) // 2
        if half == 1:
            kind = f"int{8 * found[0].size}_t" if dtype is torch.bool else TYPES[dtype]
            return self._part(f"lanes::Vector<{kind}, 2>{{{', '.join(f'{x.vector}[{x.lane}]' for x in found)}}}")
        return self._part(f"lanes::join({self._gathered(names[:half], dtype)}, {self._gathered(names[half:], dtype)})")

    def _part(self, expression: str) -> str:
        if expression not in self._known:
            self._count(expression)
            self._known[expression] = f"w{len(self.lines)}"
            self.lines.append(f"    const auto {self._known[expression]} = {expression};")
        return self._known[expression]

    def _statement(self, expression: str, dtype: torch.dtype) -> str:
        if (key := (expression, dtype)) not in self._known:
            self._count(expression)
            self._known[key] = self.declare(f"v{len(self.lines)}", dtype)
            self.lines.append(f"    const {TYPES[dtype]} {self._known[key]} = {expression};")
        return self._known[key]

    def _count(self, expression: str) -> None:
        self._work += 10 if _CALL.search(expression) else 1
        if self._work > self._limit:
            raise UnsupportedError(f"more work than {self._limit} additions")


def _vector_type(dtype: torch.dtype, length: int) -> str:
    return f"lanes::Vector<{TYPES[dtype]}, {length}>"
