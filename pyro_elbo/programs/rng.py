"""Derive random seeds and use them inside a block."""

import functools
import itertools
import random
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray

from pyro_elbo.errors import check_seed


def mix_seed(*parts: int) -> int:
    """Derive one seed from several numbers; different numbers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def mix_seeds(first: int, numbers: range, last: int) -> NDArray[np.uint32]:
    """Return ``mix_seed(first, n, last)`` for each n: the arithmetic of NumPy's SeedSequence, on arrays.

    All numbers are below 2**32.

    Example:
        >>> mix_seeds(0, range(3), 0).tolist() == [mix_seed(0, n, 0) for n in range(3)]
        True
    """
    constant = 0x43B0D7E5

    def hashed(x: NDArray[Any]) -> NDArray[Any]:
        nonlocal constant
        x = x ^ constant
        constant = constant * 0x931E8875 % 2**32
        return _folded(x * constant)

    words = (np.array(x, np.uint32, ndmin=1) for x in (first, numbers, last, 0))
    pool = [hashed(word) for word in words]
    for source, target in itertools.permutations(range(4), 2):
        pool[target] = _folded(0xCA01F9DD * pool[target] - 0x4973F715 * hashed(pool[source]))
    return _folded((pool[0] ^ 0x8B51F9DD) * (0x8B51F9DD * 0x58F38DED % 2**32))


def _folded(x: NDArray[Any]) -> NDArray[Any]:
    return x ^ (x >> 16)


def seed_cpu(seed: int) -> None:
    """Seed what draws on the CPU like ``pyro.set_rng_seed``, without the stack traces that torch keeps for GPUs."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (programs may draw from the global generator)
    torch.default_generator.manual_seed(seed)


class seeded:  # noqa: N801  (used as a statement)
    """Use a seed inside the block and restore the caller's random state; None continues the caller's stream.

    Raises:
        ArgumentError: the seed is no whole number from 0 to 2**32 - 1.
    """

    def __init__(self, seed: int | None) -> None:
        check_seed(seed)
        self.seed = seed

    def __enter__(self) -> None:
        self.state = pyro.util.get_rng_state()
        if self.seed is not None:
            # mixed: data simulated under the same seed must not return as noise
            (pyro.set_rng_seed if _has_accelerator() else seed_cpu)(mix_seed(self.seed, 1))

    def __exit__(self, *_: object) -> None:
        if self.seed is not None:
            pyro.util.set_rng_state(self.state)


@functools.cache
def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
