"""Seconds of 200 simulations of an 8-parameter model on two processes, with one compiled SVI that begins again.

Run with ``python -m tests.benchmarks.bench_calibration``. The model is a linear regression with an intercept, six
slopes and a scale; each simulation takes 2000 compiled steps of Adam with AutoMultivariateNormal. ``--simulations N``
runs fewer and prints the time of 200 by proportion, without that of the compilation, which it prints beside it.
``--python N`` times N simulations of the same fit in Python.
"""

import argparse
import time

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

import pyro_elbo as pe

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
STEPS, WANTED = 2000, 200


def regression(x: Tensor, y: Tensor) -> None:
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(torch.zeros(6), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(intercept + (slope * x).sum(-1), noise), obs=y)


class Fit:
    """Fits data sets one after the other; a process captures its steps once."""

    def __init__(self, compile: bool) -> None:
        self.guide = AutoMultivariateNormal(regression)
        optim = pyro.optim.Adam({"lr": 0.02})
        self.svi = pe.SVI(regression, self.guide, optim, pe.TraceBeta_ELBO(), compile=compile)

    def __call__(self, x: Tensor, y: Tensor) -> AutoMultivariateNormal:
        self.svi.reset()
        self.svi.run(STEPS, x, y, progress=False)
        return self.guide


def seconds(count: int, workers: int, compile: bool) -> tuple[float, pe.Calibration]:
    start = time.perf_counter()
    y = torch.zeros(len(X))
    found = pe.simulation_based_calibration(
        regression, Fit(compile), X, y, num_simulations=count, num_workers=workers, progress=False
    )
    return time.perf_counter() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=WANTED)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--python", type=int, metavar="N", help="also time N simulations without compilation")
    options = parser.parse_args()
    total, found = seconds(options.simulations, options.workers, compile=True)
    print(found)
    print(f"compiled: {options.simulations} simulations on {options.workers} processes {total:.1f} s", flush=True)
    if options.simulations < WANTED:
        base, _ = seconds(20, options.workers, compile=True)
        each = (total - base) / (options.simulations - 20)
        print(
            f"by proportion: {each:.3f} s each, {each * WANTED:.0f} s for {WANTED}, and {base - 20 * each:.1f} s once"
        )
    if options.python:
        total, _ = seconds(options.python, options.workers, compile=False)
        print(f"in Python: {options.python} simulations {total:.1f} s, {total / options.python:.2f} s each")


if __name__ == "__main__":
    main()
