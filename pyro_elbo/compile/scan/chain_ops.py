r"""The forward-backward algorithm as two operators of a captured graph: messages, and averages over pairs of states.

On a CPU each is one loop in C++. A message is a product of probabilities with a matrix, scaled by the largest one,

.. math:: \log \sum_j e^{a_j - \max a} A_{jk} + \max a,

and the exact sum of logarithms for those k where less than ``LOST`` of the scale is left, such as where the transition
from the most probable state is impossible. No operator makes a tensor of rows, steps and pairs of states.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pyro_elbo.compile.scan.operators import library
from pyro_elbo.compile.store import load_library, on_cpu
from pyro_elbo.terms import Chain, messages

LOST = {torch.float32: "1e-18f", torch.float64: "1e-140"}
_TYPES = {torch.float32: "float", torch.float64: "double"}

_SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

using real = {real};
constexpr int64_t K = {size};
constexpr real LOST = {lost}, NEVER = -std::numeric_limits<real>::infinity();

static inline real top(const real* x) {{
  real m = x[0];
  for (int64_t k = 1; k < K; k++) m = std::max(m, x[k]);
  return m;
}}

static inline real bounded(real x) {{ return std::max(x, std::numeric_limits<real>::lowest()); }}

static inline real scaled(const real* x, real* p) {{
  const real m = bounded(top(x));
  for (int64_t k = 0; k < K; k++) p[k] = std::exp(x[k] - m);
  return m;
}}

// out[k] = log sum_j exp(x[j] + log_a[j][k]); log_a[j * along + k * across], a = exp(log_a) by rows of j
static inline void step(const real* x, const real* a, const real* log_a, int64_t along, int64_t across, real* out) {{
  real p[K], sum[K];
  const real m = scaled(x, p);
  for (int64_t k = 0; k < K; k++) sum[k] = 0;
  for (int64_t j = 0; j < K; j++) {{
#pragma omp simd
    for (int64_t k = 0; k < K; k++) sum[k] += p[j] * a[j * K + k];
  }}
  for (int64_t k = 0; k < K; k++) {{
    if (sum[k] > LOST) {{ out[k] = m + std::log(sum[k]); continue; }}
    real high = NEVER, total = 0;
    for (int64_t j = 0; j < K; j++) high = std::max(high, x[j] + log_a[j * along + k * across]);
    high = bounded(high);
    for (int64_t j = 0; j < K; j++) total += std::exp(x[j] + log_a[j * along + k * across] - high);
    out[k] = high + std::log(total);
  }}
}}

static inline void exponents(const real* log_a, real* a, int64_t along, int64_t across) {{
  for (int64_t j = 0; j < K; j++)
    for (int64_t k = 0; k < K; k++) a[j * K + k] = std::exp(log_a[j * along + k * across]);
}}

extern "C" void messages(const real* pair, const real* node, real* before, real* after, real* later, real* increments,
                         int64_t steps, int64_t rows, int64_t time, int64_t row) {{
  real x[K], a[K * K];
  for (int64_t r = 0; r < rows; r++)
    for (int64_t k = 0; k < K; k++) {{
      before[r * K + k] = k ? NEVER : 0;
      later[((steps - 1) * rows + r) * K + k] = 0;
    }}
  for (int64_t t = 0; t < steps; t++)
    for (int64_t r = 0; r < rows; r++) {{
      const int64_t at = t * rows + r;
      const real* log_a = pair + t * time + r * row;
      if (row || r == 0) exponents(log_a, a, K, 1);
      real* next = before + (at + rows) * K;
      step(before + at * K, a, log_a, K, 1, x);
      real p[K], total = 0;
      for (int64_t k = 0; k < K; k++) x[k] += node[at * K + k];
      const real m = scaled(x, p);
      for (int64_t k = 0; k < K; k++) total += p[k];
      increments[at] = m + std::log(total);
      for (int64_t k = 0; k < K; k++) next[k] = x[k] - bounded(increments[at]);
    }}
  for (int64_t t = steps - 1; t >= 0; t--)
    for (int64_t r = 0; r < rows; r++) {{
      const int64_t at = t * rows + r;
      const real* log_a = pair + t * time + r * row;
      if (row || r == 0) exponents(log_a, a, 1, K);
      for (int64_t k = 0; k < K; k++) x[k] = node[at * K + k] + later[at * K + k];
      step(x, a, log_a, 1, K, after + at * K);
      if (t == 0) continue;
      const real m = bounded(top(after + at * K));
      for (int64_t k = 0; k < K; k++) later[(at - rows) * K + k] = after[at * K + k] - m;
    }}
}}

// The posterior of each pair of states, one row of one step after the other
template <typename Use>
static void each(const real* pair, const real* node, const real* before, const real* later, int64_t steps, int64_t rows,
                 int64_t time, int64_t row, Use use) {{
  real x[K], a[K * K], u[K], v[K], q[K * K];
  for (int64_t t = 0; t < steps; t++)
    for (int64_t r = 0; r < rows; r++) {{
      const int64_t at = t * rows + r;
      const real* log_a = pair + t * time + r * row;
      if (row || r == 0) exponents(log_a, a, K, 1);
      for (int64_t k = 0; k < K; k++) x[k] = node[at * K + k] + later[at * K + k];
      scaled(before + at * K, u);
      scaled(x, v);
      real total = 0;
      for (int64_t j = 0; j < K; j++) {{
#pragma omp simd
        for (int64_t k = 0; k < K; k++) q[j * K + k] = u[j] * a[j * K + k] * v[k];
      }}
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < K * K; i++) total += q[i];
      if (total <= LOST) {{
        real high = NEVER;
        for (int64_t i = 0; i < K * K; i++) {{
          q[i] = before[at * K + i / K] + log_a[i] + x[i % K];
          high = std::max(high, q[i]);
        }}
        high = bounded(high);
        total = 0;
        for (int64_t i = 0; i < K * K; i++) total += q[i] = std::exp(q[i] - high);
      }}
      use(t, r, at, q, 1 / std::max(total, std::numeric_limits<real>::min()));
    }}
}}

extern "C" void average(const real* pair, const real* node, const real* before, const real* later, const real* f,
                        real* out, int64_t steps, int64_t rows, int64_t time, int64_t row, int64_t f_time,
                        int64_t f_row) {{
  each(pair, node, before, later, steps, rows, time, row, [=](int64_t t, int64_t r, int64_t at, real* q, real w) {{
    const real* x = f + t * f_time + r * f_row;
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < K * K; i++) sum += q[i] * x[i];
    out[at] = sum * w;
  }});
}}

extern "C" void spread(const real* pair, const real* node, const real* before, const real* later, const real* g,
                       real* out, int64_t steps, int64_t rows, int64_t time, int64_t row, int64_t f_time,
                       int64_t f_row) {{
  each(pair, node, before, later, steps, rows, time, row, [=](int64_t t, int64_t r, int64_t at, real* q, real w) {{
    real* x = out + t * f_time + r * f_row;
    const real scale = g[at] * w;
#pragma omp simd
    for (int64_t i = 0; i < K * K; i++) x[i] += scale * q[i];
  }});
}}
"""


@cache
def _machine(dtype: torch.dtype, size: int) -> ctypes.CDLL:
    """Compile the loops for one type and number of states."""
    found = load_library(_SOURCE.format(real=_TYPES[dtype], size=size, lost=LOST[dtype]))
    found.messages.restype = found.average.restype = found.spread.restype = None
    return found


def _call(name: str, tensors: Sequence[Tensor], *numbers: int) -> None:
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in tensors)
    getattr(_machine(tensors[0].dtype, tensors[0].shape[-1]), name)(*pointers, *map(ctypes.c_int64, numbers))


def _strides(x: Tensor) -> tuple[int, int]:
    """Return how far apart the matrices of two steps and of two rows lie in memory; 0 where they are one."""
    steps, rows, k, _ = x.shape
    return (0 if steps == 1 else rows * k * k), (0 if rows == 1 else k * k)


def _room(pair: Tensor, node: Tensor) -> list[Tensor]:
    steps, rows, k = node.shape
    return [
        node.new_empty(steps + 1, rows, k),
        *(node.new_empty(node.shape) for _ in "al"),
        node.new_empty(steps, rows),
    ]


def _messages(pair: Tensor, node: Tensor) -> list[Tensor]:
    if not on_cpu([node]):
        return list(messages(pair, node)[2:])
    room = _room(pair, node)
    pair, node = pair.contiguous(), node.contiguous()
    _call("messages", [pair, node, *room], *node.shape[:2], *_strides(pair))
    return room


def _average(chain: list[Tensor], x: Tensor) -> Tensor:
    pair, node, before, later = (y.contiguous() for y in chain)
    if not on_cpu([node]):
        return Chain(pair, node, before, later, later, later).average(x)
    out, x = node.new_empty(node.shape[:2]), x.contiguous()
    _call("average", [pair, node, before, later, x, out], *node.shape[:2], *_strides(pair), *_strides(x))
    return out


def _spread(chain: list[Tensor], g: Tensor, steps: int, rows: int) -> Tensor:
    pair, node, before, later = (y.contiguous() for y in chain)
    if not on_cpu([node]):
        q = Chain(pair, node, before, later, later, later).pairs() * g[..., None, None]
        return q.sum_to_size(steps, rows, *pair.shape[2:])
    out, g = pair.new_zeros(steps, rows, *pair.shape[2:]), g.contiguous()
    _call("spread", [pair, node, before, later, g, out], *node.shape[:2], *_strides(pair), *_strides(out))
    return out


def _define(schema: str, run: Any, fake: Any) -> None:
    name = schema.split("(")[0]
    library.define(schema)
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyro_elbo::{name}", fake, lib=library)


_define("messages(Tensor pair, Tensor node) -> Tensor[]", _messages, _room)
_define("average(Tensor[] chain, Tensor x) -> Tensor", _average, lambda chain, x: x.new_empty(chain[1].shape[:2]))
_define(
    "spread(Tensor[] chain, Tensor g, int steps, int rows) -> Tensor",
    _spread,
    lambda chain, g, steps, rows: g.new_empty(steps, rows, *chain[0].shape[2:]),
)


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *chain: Tensor) -> Tensor:
        ctx.chain, ctx.shape = list(chain), x.shape[:2]
        return torch.ops.pyro_elbo.average(list(chain), x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return torch.ops.pyro_elbo.spread(ctx.chain, g, *ctx.shape), *(None for _ in ctx.chain)


class CapturedChain(Chain):
    """A chain in a captured graph."""

    def average(self, x: Tensor) -> Tensor:
        """Return the mean of x (T or 1, rows or 1, K, K) under the posterior of each pair of states, (T, rows)."""
        return _Average.apply(x, self.pair, self.node, self.before, self.later)


def captured_messages(pair: Tensor, node: Tensor) -> CapturedChain:
    """Return a chain with its messages, as nodes of a captured graph."""
    return CapturedChain(pair, node, *torch.ops.pyro_elbo.messages(pair, node))
