"""Products with matrices that are the same at all steps, as C++ in the code of a step.

A step multiplies a few rows by each of its weights. A BLAS rearranges the weights in every call, and may wake other
threads for a product that takes microseconds. Here the sizes are known, and sums stay in registers.
"""

from collections.abc import Collection
from operator import getitem

import torch
from torch import Tensor, fx

from pyro_elbo.compile.code import WRITTEN_OUT
from pyro_elbo.compile.scan.lanes import SOURCE as LANES
from pyro_elbo.compile.scan.lanes import vector_width

aten = torch.ops.aten
_LARGEST = 2**21  # multiplications, beyond which a BLAS has all threads share a product
_TYPES = {torch.float32: "float", torch.float64: "double"}

_SOURCE = r"""
#ifndef PYRO_ELBO_PRODUCTS
#define PYRO_ELBO_PRODUCTS

namespace products {
// Some rows of the result, and some vectors of its columns.
template <class T, int width, int inner, int columns, int vectors, int rows>
inline void block(const T* a, const T* b, T* out) {
  typedef lanes::Vector<T, width> Vec;
  Vec sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) sum[r][v] = Vec{};
#pragma GCC unroll 1
  for (int k = 0; k < inner; k++) {
    Vec right[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) right[v] = lanes::load<Vec>(b + k * columns + v * width);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; v++) sum[r][v] += a[r * inner + k] * right[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) lanes::store(out + r * columns + v * width, sum[r][v]);
}

// All rows of the result, up to 6 at a time, and some vectors of its columns.
template <class T, int width, int rows, int inner, int columns, int vectors>
inline void band(const T* a, const T* b, T* out) {
  constexpr int blocks = (rows + 5) / 6, height = (rows + blocks - 1) / blocks, rest = rows % height;
  for (int r = 0; r < rows - rest; r += height)
    block<T, width, inner, columns, vectors, height>(a + r * inner, b, out + r * columns);
  if constexpr (rest > 0)
    block<T, width, inner, columns, vectors, rest>(a + (rows - rest) * inner, b, out + (rows - rest) * columns);
}

// out[r][c] = sum_k a[r][k] b[k][c], with vectors of `width` numbers, `most` of them at a time
template <class T, int width, int most, int rows, int inner, int columns>
inline void multiply(const T* a, const T* b, T* out) {
  constexpr int vectors = columns / width, rest = vectors % most, single = columns % width;
  for (int c = 0; c < (vectors - rest) * width; c += most * width)
    band<T, width, rows, inner, columns, most>(a, b + c, out + c);
  if constexpr (rest > 0) {
    constexpr int c = (vectors - rest) * width;
    band<T, width, rows, inner, columns, rest>(a, b + c, out + c);
  }
  for (int r = 0; r < rows; r++)
    for (int c = columns - single; c < columns; c++) {
      T sum = 0;
      for (int k = 0; k < inner; k++) sum += a[r * inner + k] * b[k * columns + c];
      out[r * columns + c] = sum;
    }
}
}
#endif
"""


def write_out_products(graph: fx.Graph, constants: Collection[fx.Node]) -> None:
    """Replace products with constants by operators that are written into the code of a graph on a CPU.

    Args:
        graph: one step.
        constants: its inputs that are the same at all steps, contiguous.
    """
    for node in [n for n in graph.nodes if n.target in (aten.mm.default, aten.addmm.default) and not n.kwargs]:
        *bias, a, b = node.args
        value = node.meta["val"]
        sizes = (*a.meta["val"].shape, value.shape[1])
        if b not in constants or value.dtype not in _TYPES or not 0 < torch.Size(sizes).numel() <= _LARGEST:
            continue
        with graph.inserting_before(node):
            made = graph.call_function(_product, ([a, b], *sizes, value.dtype.itemsize))
            result = graph.call_function(getitem, (made, 0))
            made.meta["val"], result.meta["val"] = [value], value
            if bias:
                result = graph.call_function(aten.add.Tensor, (bias[0], result))
                result.meta["val"] = value
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _multiply(factors: list[Tensor], rows: int, inner: int, columns: int, bytes: int) -> list[Tensor]:
    return [factors[0] @ factors[1]]


def _written_out(rows: int, inner: int, columns: int, bytes: int) -> tuple[str, str, list[tuple[int, int]]]:
    """Return how a product of numbers of so many bytes is written into the code of a graph."""
    width = vector_width()
    kind, most = {x.itemsize: name for x, name in _TYPES.items()}[bytes], 4 if width == 64 else 2  # registers: 32, 16
    numbers = ", ".join(map(str, (width // bytes, most, rows, inner, columns)))
    a, b, out = (f"static_cast<{kind}*>(columns[{i}])" for i in range(3))
    return f"products::multiply<{kind}, {numbers}>({a}, {b}, {out})", LANES + _SOURCE, [(inner, 1), (columns, 1)]


library = torch.library.Library("pyro_elbo", "FRAGMENT")
library.define("product(Tensor[] factors, int rows, int inner, int columns, int bytes) -> Tensor[]")
library.impl("product", _multiply, "CompositeImplicitAutograd")
_product = torch.ops.pyro_elbo.product.default
WRITTEN_OUT[_product] = _written_out
