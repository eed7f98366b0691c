"""Milliseconds of a full-batch epoch of ``pe.fit`` beside a step of ``pe.SVI.run``, in Python and compiled.

Run as ``python -m tests.benchmarks.bench_fit``; ``--lightning`` lets Lightning's loops run the epochs.
"""

import sys
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_elbo as pe

ROWS, COLUMNS = 100, 5
EPOCHS = {False: 300, True: 2000}


def model(x, y):
    """A linear regression."""
    b = pyro.sample("b", dist.Normal(torch.zeros(COLUMNS), 1.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ b, s), obs=y)


def _fit(data: tuple, compile: bool) -> Callable[[int], object]:
    def run(epochs: int) -> object:
        pyro.clear_param_store()
        options = {"batch_size": None, "progress": False, "compile": compile}
        callbacks = [__import__("lightning").Callback()] if "--lightning" in sys.argv else None
        return pe.fit(model, AutoNormal(model), data, max_epochs=epochs, callbacks=callbacks, **options)

    return run


def _svi(data: tuple, compile: bool) -> Callable[[int], object]:
    def run(steps: int) -> object:
        pyro.clear_param_store()
        svi = pe.SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 1e-3}), pe.TraceBeta_ELBO(), compile=compile)
        return svi.run(steps, *data, progress=False)

    return run


def _seconds(run: Callable[[int], object], count: int) -> float:
    start = time.perf_counter()
    run(count)
    return time.perf_counter() - start


def main() -> None:
    """Print the table: the slope between two lengths, so that preparation and compilation do not count."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, COLUMNS)
    data = x, x.sum(1) + torch.randn(ROWS)
    print(f"{'ms':10}{'pe.fit, epoch':>16}{'svi.run, step':>16}{'ratio':>8}")
    for compile, count in EPOCHS.items():
        runs = [make(data, compile) for make in (_fit, _svi)]
        for run in runs:
            run(10)
        found = [[_seconds(run, 2 * count) - _seconds(run, count) for run in runs] for _ in range(3)]
        ms = [sorted(times)[1] / count * 1e3 for times in zip(*found, strict=True)]
        print(f"{'compiled' if compile else 'Python':10}{ms[0]:16.4f}{ms[1]:16.4f}{ms[0] / ms[1]:8.2f}", flush=True)


if __name__ == "__main__":
    main()
