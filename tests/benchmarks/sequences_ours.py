"""The VRNN of ``bench_sequences`` with pe.scan, compiled."""

from functools import partial

import pyro
import pyro.distributions as dist
from torch import Tensor

import pyro_elbo as pe
from tests.benchmarks.sequences_torch import LR, Cell, Step, data, start


def model(cell: Cell, x: Tensor) -> None:
    pyro.module("cell", cell)

    def step(h: Tensor, x_t: Tensor) -> tuple[Tensor, None]:
        z = pyro.sample("z", dist.Normal(*cell.prior(h)).to_event(1))
        features = cell.features_z(z)
        pyro.sample("x", dist.Bernoulli(logits=cell.decode(features, h)).to_event(1), obs=x_t)
        return cell.advance(cell.features_x(x_t), features, h), None

    with pyro.plate("sequences", x.shape[1]):
        pe.scan(step, cell.start(x.shape[1]), x)


def guide(cell: Cell, x: Tensor) -> None:
    pyro.module("cell", cell)

    def step(h: Tensor, x_t: Tensor) -> tuple[Tensor, None]:
        features = cell.features_x(x_t)
        z = pyro.sample("z", dist.Normal(*cell.encode(features, h)).to_event(1))
        return cell.advance(features, cell.features_z(z), h), None

    with pyro.plate("sequences", x.shape[1]):
        pe.scan(step, cell.start(x.shape[1]), x)


def make(steps: int, batch: int) -> Step:
    cell, x = start(), data(steps, batch)
    optim = pyro.optim.Adam({"lr": LR})
    svi = pe.SVI(partial(model, cell), partial(guide, cell), optim, pe.TraceTimestep_ELBO(), compile=True)
    return partial(svi.step, x)
