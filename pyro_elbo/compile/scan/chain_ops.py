r"""The forward-backward algorithm as two operators of a captured graph: messages, and averages over pairs of states.

On a CPU each is one loop in C++. A message is a product of probabilities with a matrix, scaled by the largest one,

.. math:: \log \sum_j e^{a_j - \max a} A_{jk} + \max a,

and the sum of logarithms for those k where less than ``_LOST`` of the scale is left, such as where the transition from
the most probable state is impossible. No operator makes a tensor of rows, steps and pairs of states.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pyro_elbo.compile.scan.operators import library
from pyro_elbo.compile.store import load_library, on_cpu
from pyro_elbo.terms import Chain, messages

_LOST = {torch.float32: "1e-18f", torch.float64: "1e-140"}
_TYPES = {torch.float32: "float", torch.float64: "double"}

_SOURCE = r"""
#include <ATen/cpu/vec/functional.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

using real = {real};
using Vec = at::vec::Vectorized<real>;
constexpr int64_t K = {size};
constexpr real LOST = {lost}, NEVER = -std::numeric_limits<real>::infinity();

static inline real top(const real* x) {{
  real m = x[0];
  for (int64_t k = 1; k < K; k++) m = std::max(m, x[k]);
  return m;
}}

static inline real bounded(real x) {{ return std::max(x, std::numeric_limits<real>::lowest()); }}

static inline void exp_all(real* x, int64_t n) {{ at::vec::map([](Vec v) {{ return v.exp(); }}, x, x, n); }}

// p = exp(x - top) for each row, tops = top
static inline void scaled(const real* x, real* p, real* tops, int64_t rows) {{
  for (int64_t r = 0; r < rows; r++) {{
    tops[r] = bounded(top(x + r * K));
    for (int64_t k = 0; k < K; k++) p[r * K + k] = x[r * K + k] - tops[r];
  }}
  exp_all(p, rows * K);
}}

// log A of each row of one step: its element of states j and k stands at j * along + k * across
struct Matrix {{
  const real* log;
  int64_t row, along, across;
  real exponents[K * K];

  const real* operator()(int64_t r) {{
    if (row || r == 0) {{
      for (int64_t j = 0; j < K; j++)
        for (int64_t k = 0; k < K; k++) exponents[j * K + k] = log[r * row + j * along + k * across];
      exp_all(exponents, K * K);
    }}
    return exponents;
  }}
}};

// out[k] = log sum_j exp(x[j]) A[j][k] for each row
static void step(const real* x, Matrix matrix, real* out, real* p, real* tops, int64_t rows) {{
  scaled(x, p, tops, rows);
  for (int64_t r = 0; r < rows; r++) {{
    const real* a = matrix(r);
    real sum[K] = {{}};
    for (int64_t j = 0; j < K; j++) {{
      const real w = p[r * K + j];
#pragma omp simd
      for (int64_t k = 0; k < K; k++) sum[k] += w * a[j * K + k];
    }}
    for (int64_t k = 0; k < K; k++) out[r * K + k] = sum[k];
  }}
  at::vec::map([](Vec v) {{ return v.log(); }}, p, out, rows * K);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t k = 0; k < K; k++) {{
      real& value = out[r * K + k];
      if (value > LOST) {{
        value = tops[r] + p[r * K + k];
        continue;
      }}
      const real* log = matrix.log + r * matrix.row + k * matrix.across;
      real high = NEVER, total = 0;
      for (int64_t j = 0; j < K; j++) high = std::max(high, x[r * K + j] + log[j * matrix.along]);
      high = bounded(high);
      for (int64_t j = 0; j < K; j++) total += std::exp(x[r * K + j] + log[j * matrix.along] - high);
      value = high + std::log(total);
    }}
}}

extern "C" void messages(const real* pair, const real* node, real* before, real* after, real* later, real* increments,
                         int64_t steps, int64_t rows, int64_t time, int64_t row) {{
  const int64_t n = rows * K;
  std::vector<real> x(n), p(n), tops(rows);
  for (int64_t i = 0; i < n; i++) {{
    before[i] = i % K ? NEVER : 0;
    later[(steps - 1) * n + i] = 0;
  }}
  for (int64_t t = 0; t < steps; t++) {{
    real* next = before + (t + 1) * n;
    step(before + t * n, {{pair + t * time, row, K, 1}}, next, p.data(), tops.data(), rows);
    for (int64_t i = 0; i < n; i++) next[i] += node[t * n + i];
    scaled(next, p.data(), tops.data(), rows);
    for (int64_t r = 0; r < rows; r++) {{
      real total = 0;
      for (int64_t k = 0; k < K; k++) total += p[r * K + k];
      increments[t * rows + r] = tops[r] + std::log(total);
      for (int64_t k = 0; k < K; k++) next[r * K + k] -= bounded(increments[t * rows + r]);
    }}
  }}
  for (int64_t t = steps - 1; t >= 0; t--) {{
    for (int64_t i = 0; i < n; i++) x[i] = node[t * n + i] + later[t * n + i];
    step(x.data(), {{pair + t * time, row, 1, K}}, after + t * n, p.data(), tops.data(), rows);
    for (int64_t r = 0; t && r < rows; r++) {{
      const real* now = after + t * n + r * K;
      for (int64_t k = 0; k < K; k++) later[(t - 1) * n + r * K + k] = now[k] - bounded(top(now));
    }}
  }}
}}

// The posterior of each pair of states, one row of one step after the other
template <typename Use>
static void each(const real* pair, const real* node, const real* before, const real* later, int64_t steps, int64_t rows,
                 int64_t time, int64_t row, Use use) {{
  const int64_t n = rows * K;
  std::vector<real> x(n), u(n), v(n), tops(rows);
  real q[K * K];
  for (int64_t t = 0; t < steps; t++) {{
    Matrix matrix{{pair + t * time, row, K, 1}};
    for (int64_t i = 0; i < n; i++) x[i] = node[t * n + i] + later[t * n + i];
    scaled(before + t * n, u.data(), tops.data(), rows);
    scaled(x.data(), v.data(), tops.data(), rows);
    for (int64_t r = 0; r < rows; r++) {{
      const real* a = matrix(r);
      real total = 0;
      for (int64_t j = 0; j < K; j++) {{
        const real w = u[r * K + j];
#pragma omp simd
        for (int64_t k = 0; k < K; k++) q[j * K + k] = w * a[j * K + k] * v[r * K + k];
      }}
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < K * K; i++) total += q[i];
      if (total <= LOST) {{
        real high = NEVER;
        for (int64_t i = 0; i < K * K; i++) {{
          q[i] = before[t * n + r * K + i / K] + matrix.log[r * row + i] + x[r * K + i % K];
          high = std::max(high, q[i]);
        }}
        high = bounded(high);
        total = 0;
        for (int64_t i = 0; i < K * K; i++) total += q[i] = std::exp(q[i] - high);
      }}
      use(t, r, t * rows + r, q, 1 / std::max(total, std::numeric_limits<real>::min()));
    }}
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
    found = load_library(_SOURCE.format(real=_TYPES[dtype], size=size, lost=_LOST[dtype]))()
    found.messages.restype = found.average.restype = found.spread.restype = None
    return found


def _has_code(x: Tensor) -> bool:
    return on_cpu([x]) and x.dtype in _TYPES


def _call(name: str, tensors: Sequence[Tensor], *numbers: int) -> None:
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in tensors)
    getattr(_machine(tensors[0].dtype, tensors[0].shape[-1]), name)(*pointers, *map(ctypes.c_int64, numbers))


def _strides(x: Tensor) -> tuple[int, int]:
    """Return how far apart the matrices of two steps and of two rows lie in memory; 0 where they are one."""
    steps, rows, k, _ = x.shape
    return (0 if steps == 1 else rows * k * k), (0 if rows == 1 else k * k)


def _room(pair: Tensor, node: Tensor) -> list[Tensor]:
    steps, rows, k = node.shape
    return [node.new_empty(x) for x in ((steps + 1, rows, k), node.shape, node.shape, (steps, rows))]


def _messages(pair: Tensor, node: Tensor) -> list[Tensor]:
    if not _has_code(node):
        return list(messages(pair, node)[2:])
    room = _room(pair, node)
    pair, node = pair.contiguous(), node.contiguous()
    _call("messages", [pair, node, *room], *node.shape[:2], *_strides(pair))
    return room


def _average(chain: list[Tensor], x: Tensor) -> Tensor:
    pair, node, before, later = (y.contiguous() for y in chain)
    if not _has_code(node):
        return Chain(pair, node, before, later, later, later).average(x)
    out, x = node.new_empty(node.shape[:2]), x.contiguous()
    _call("average", [pair, node, before, later, x, out], *node.shape[:2], *_strides(pair), *_strides(x))
    return out


def _spread(chain: list[Tensor], g: Tensor, steps: int, rows: int) -> Tensor:
    pair, node, before, later = (y.contiguous() for y in chain)
    if not _has_code(node):
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


@dataclass(frozen=True)
class ChainCode:
    """The loops of a chain with numbers of one type and so many states, which are compiled with its graph."""

    dtype: torch.dtype
    size: int
    on_cpu: bool

    def compile(self) -> None:
        """Compile the loops, unless another graph has done so."""
        if self.on_cpu and self.dtype in _TYPES:
            _machine(self.dtype, self.size)


def captured_messages(pair: Tensor, node: Tensor) -> CapturedChain:
    """Return a chain with its messages, as nodes of a captured graph."""
    return CapturedChain(pair, node, *torch.ops.pyro_elbo.messages(pair, node))
