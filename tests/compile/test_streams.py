"""Noise of many steps with seeds of their own: the numbers of torch's generator."""

import numpy as np
import pytest
import torch

from pyro_elbo.compile.noise import Noise, fill_noise
from pyro_elbo.compile.streams import draw, reproduces


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_draws_are_those_of_torch(dtype):
    """Few and many numbers, an odd one between, beyond the 624 states of a generator, over lanes that are not full."""
    noise = [Noise("normal", dtype, 957), Noise("uniform", dtype, 23)]
    stream = [(0, 0, 5), (1, 0, 3), (0, 5, 6), (0, 6, 43), (0, 43, 46), (1, 3, 23), (0, 46, 949), (0, 949, 957)]
    seeds = np.array([0, 1, 5489, 2**31, 2**32 - 1, *range(100, 135)], np.uint32)
    assert reproduces(noise, stream)
    found, expected = ([n.rows(len(seeds), torch.device("cpu")).zero_() for n in noise] for _ in range(2))
    draw(seeds, noise, stream, found)
    for step, seed in enumerate(seeds.tolist()):
        generator = torch.Generator().manual_seed(seed)
        for row, start, stop in stream:
            fill_noise(noise[row].kind, expected[row][step, start:stop], generator)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_other_draws_are_left_to_torch():
    for noise in (Noise("exponential", torch.float32, 3), Noise("normal", torch.bfloat16, 3)):
        assert not reproduces([noise], [(0, 0, 3)])
