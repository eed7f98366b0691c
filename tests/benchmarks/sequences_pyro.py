"""The VRNN of ``bench_sequences`` as one writes it in Pyro: a loop over time, with two sites a step."""

from functools import partial

import pyro
import pyro.distributions as dist
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor

from tests.benchmarks.sequences_torch import LR, Cell, Step, data, start


def model(cell: Cell, x: Tensor) -> None:
    pyro.module("cell", cell)
    h = cell.start(x.shape[1])
    with pyro.plate("sequences", x.shape[1]):
        for t, x_t in enumerate(x):
            z = pyro.sample(f"z_{t}", dist.Normal(*cell.prior(h)).to_event(1))
            features = cell.features_z(z)
            pyro.sample(f"x_{t}", dist.Bernoulli(logits=cell.decode(features, h)).to_event(1), obs=x_t)
            h = cell.advance(cell.features_x(x_t), features, h)


def guide(cell: Cell, x: Tensor) -> None:
    pyro.module("cell", cell)
    h = cell.start(x.shape[1])
    with pyro.plate("sequences", x.shape[1]):
        for t, x_t in enumerate(x):
            features = cell.features_x(x_t)
            z = pyro.sample(f"z_{t}", dist.Normal(*cell.encode(features, h)).to_event(1))
            h = cell.advance(features, cell.features_z(z), h)


def make(steps: int, batch: int) -> Step:
    cell, x = start(), data(steps, batch)
    svi = SVI(partial(model, cell), partial(guide, cell), pyro.optim.Adam({"lr": LR}), TraceMeanField_ELBO())
    return partial(svi.step, x)  # a float
