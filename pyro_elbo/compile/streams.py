"""Noise of many steps, each with a seed of its own: the numbers that torch's generator on the CPU draws, in C++.

Torch seeds one generator at a time, which takes longer than a small step, and is asked by Python for every draw. Here
as many generators as fill a few vector registers go side by side. What torch computes from their numbers depends on its
version and the processor, so each kind of draw is compared with torch's own before it is used.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_elbo.compile.noise import Noise, NoiseKind, Segment, fill_noise

Seeds = NDArray[np.uint32]
FILLED = 16  # torch draws so many normal numbers or more another way than fewer

_SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#ifdef __AVX2__
#define CPU_CAPABILITY_AVX2
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")  // as torch is compiled
#include <ATen/native/cpu/avx_mathfun.h>
#pragma GCC pop_options
#endif

constexpr int64_t LANES = 32, STATES = 624;
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint64_t LongWords __attribute__((vector_size(8 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef double Doubles __attribute__((vector_size(8 * LANES)));

// MT19937 in several lanes (Matsumoto, Nishimura 1998); states are made and twisted as words are taken.
struct Generators {
  Words state[STATES];
  int64_t made = 1, taken = 0;
  Doubles kept;  // the second of two normal numbers
  bool has_kept = false;

  Words word() {
    for (; made < STATES && made <= taken + 397; made++)
      state[made] = 1812433253u * (state[made - 1] ^ (state[made - 1] >> 30)) + uint32_t(made);
    Words &x = state[taken % STATES], after = state[(taken + 1) % STATES], far = state[(taken + 397) % STATES];
    Words y = (x & 0x80000000u) | (after & 0x7fffffffu);
    x = y = far ^ (y >> 1) ^ ((y & 1u) * 0x9908b0dfu);
    taken++;
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
  }

  void uniform(Floats& x) { x = __builtin_convertvector(word() & 0xffffffu, Floats) * 0x1p-24f; }

  void uniform(Doubles& x) {
    const LongWords high = __builtin_convertvector(word(), LongWords), low = __builtin_convertvector(word(), LongWords);
    x = __builtin_convertvector(((high << 32) | low) & 0x1fffffffffffffull, Doubles) * 0x1p-53;
  }

  Doubles normal() {
    has_kept = !has_kept;
    if (!has_kept) return kept;
    Doubles u, v, x;
    uniform(u);
    uniform(v);
    for (int64_t l = 0; l < LANES; l++) {
      const double radius = std::sqrt(-2.0 * std::log1p(-v[l])), angle = 2.0 * M_PI * u[l];
      kept[l] = radius * std::sin(angle);
      x[l] = radius * std::cos(angle);
    }
    return x;
  }
};

// Turn sixteen uniform numbers into normal ones.
template <typename T> void turn(T* x) {
  for (int64_t i = 0; i < 8; i++) {
    const T radius = std::sqrt(-2 * std::log(1 - x[i])), angle = 2.0 * M_PI * x[i + 8];
    x[i] = radius * std::cos(angle);
    x[i + 8] = radius * std::sin(angle);
  }
}

#ifdef __AVX2__
template <> void turn(float* x) {
  const __m256 u = _mm256_sub_ps(_mm256_set1_ps(1.0f), _mm256_loadu_ps(x));
  const __m256 radius = _mm256_sqrt_ps(_mm256_mul_ps(_mm256_set1_ps(-2.0f), log256_ps(u)));
  __m256 sine, cosine;
  sincos256_ps(_mm256_mul_ps(_mm256_set1_ps(2.0 * M_PI), _mm256_loadu_ps(x + 8)), &sine, &cosine);
  _mm256_storeu_ps(x, _mm256_mul_ps(radius, cosine));
  _mm256_storeu_ps(x + 8, _mm256_mul_ps(radius, sine));
}
#endif

// Draw a segment of the rows of some steps.
template <typename T, typename Vector>
void segment(Generators& generators, bool is_normal, T* rows, int64_t stride, int64_t lanes, int64_t size) {
  auto uniform = [&](int64_t from) {
    for (int64_t i = from; i < size; i++) {
      Vector x;
      generators.uniform(x);
      for (int64_t l = 0; l < lanes; l++) rows[l * stride + i] = x[l];
    }
  };
  auto turned = [&](int64_t from) {
    for (int64_t l = 0; l < lanes; l++) turn(rows + l * stride + from);
  };
  if (is_normal && size < 16) {
    for (int64_t i = 0; i < size; i++) {
      const Doubles x = generators.normal();
      for (int64_t l = 0; l < lanes; l++) rows[l * stride + i] = x[l];
    }
    return;
  }
  uniform(0);
  if (!is_normal) return;
  for (int64_t i = 0; i + 16 <= size; i += 16) turned(i);
  if (size % 16) {
    uniform(size - 16);
    turned(size - 16);
  }
}

// Draw all segments for each seed: whether it is normal, whether double, address, elements between rows, size.
extern "C" void draw(const uint32_t* seeds, int64_t steps, const int64_t* segments, int64_t count) {
  for (int64_t step = 0; step < steps; step += LANES) {
    const int64_t lanes = std::min(LANES, steps - step);
    Generators generators;
    for (int64_t l = 0; l < LANES; l++) generators.state[0][l] = seeds[step + std::min(l, lanes - 1)];
    for (const int64_t* s = segments; s < segments + 5 * count; s += 5) {
      if (s[1])
        segment<double, Doubles>(generators, s[0], reinterpret_cast<double*>(s[2]) + step * s[3], s[3], lanes, s[4]);
      else
        segment<float, Floats>(generators, s[0], reinterpret_cast<float*>(s[2]) + step * s[3], s[3], lanes, s[4]);
    }
  }
}
"""


@cache
def build_draws() -> Callable[[], ctypes.CDLL]:
    """Begin to build what :func:`draw` calls; return what waits for it.

    Raises:
        CompileError: the C++ compiler failed.
    """
    from pyro_elbo.compile.store import load_library  # needs Inductor's settings, which take a second to import

    return load_library(_SOURCE)


@cache
def _draw() -> Callable[..., None]:
    function = build_draws()().draw
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_int64] * 2
    return function


def draw(seeds: Seeds, noise: Sequence[Noise], stream: Sequence[Segment], rows: Sequence[Tensor]) -> None:
    """Draw the segments of a stream for each seed, in the rows of noise of as many steps.

    Args:
        seeds: a seed per step.
        noise: the kinds of noise.
        stream: the order in which a step draws.
        rows: per kind of noise a row per step.
    """
    segments = [
        number
        for row, start, stop in stream
        for kind, dtype, x in [(noise[row].kind, noise[row].dtype, rows[row])]
        for number in (
            kind == "normal",
            dtype == torch.float64,
            x.data_ptr() + start * x.element_size(),
            x.stride(0),
            stop - start,
        )
    ]
    _draw()(seeds.ctypes.data, len(seeds), (ctypes.c_int64 * len(segments))(*segments), len(stream))


def reproduces(noise: Sequence[Noise], stream: Sequence[Segment]) -> bool:
    """Return whether :func:`draw` draws what torch does."""
    kinds = {(noise[row].kind, noise[row].dtype, stop - start >= FILLED) for row, start, stop in stream}
    return all(_agrees(*kind) for kind in kinds)


@cache
def _agrees(kind: NoiseKind, dtype: torch.dtype, filled: bool) -> bool:
    if kind == "exponential" or dtype not in (torch.float32, torch.float64):
        return False
    sizes, seeds = ((16, 37) if filled else (5, 2)), np.arange(40, dtype=np.uint32)
    found, expected = torch.zeros(2, len(seeds), sum(sizes), dtype=dtype)
    segments = [(0, 0, sizes[0]), (0, sizes[0], sum(sizes))]
    draw(seeds, [Noise(kind, dtype, sum(sizes))], segments, [found])
    for seed, row in zip(seeds.tolist(), expected, strict=True):
        generator = torch.Generator().manual_seed(seed)
        for part in row.split(sizes):
            fill_noise(kind, part, generator)
    return torch.equal(found, expected)
