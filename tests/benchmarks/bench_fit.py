"""Milliseconds of processor time of a full-batch epoch of ``pe.fit``, and of a step of ``pe.SVI.run``.

Run as ``python -m tests.benchmarks.bench_fit``; ``--lightning`` lets Lightning's loops run the epochs.
"""

import sys
import time
from functools import partial
from typing import Any

import lightning
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_elbo as pe
from pyro_elbo.training.lightning import LightningPrograms

ROWS, COLUMNS = 100, 5
COUNTS = {False: 200, True: 20_000}
FIRST = 10  # epochs and steps that do not count: they prepare and compile


def model(x, y):
    """A linear regression."""
    b = pyro.sample("b", dist.Normal(torch.zeros(COLUMNS), 1.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ b, s), obs=y)


def _fit(data: tuple, compile: bool, count: int) -> float:
    """Return the time of an epoch, history and probes included."""
    ends: list[float] = []
    record = LightningPrograms.record

    def note(*arguments: Any) -> None:
        record(*arguments)
        ends.append(time.process_time())

    LightningPrograms.record = note
    callbacks = [lightning.Callback()] if "--lightning" in sys.argv else None
    options = {"batch_size": None, "progress": False, "compile": compile, "callbacks": callbacks}
    pe.fit(model, AutoNormal(model), data, max_epochs=count + FIRST, **options)
    LightningPrograms.record = record
    return (ends[-1] - ends[FIRST - 1]) / count


def _svi(data: tuple, compile: bool, count: int) -> float:
    optim = pyro.optim.Adam({"lr": 1e-3})
    run = partial(pe.SVI(model, AutoNormal(model), optim, pe.TraceBeta_ELBO(), compile=compile).run, progress=False)
    run(FIRST, *data)
    start = time.process_time()
    run(count, *data)
    return (time.process_time() - start) / count


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, COLUMNS)
    data = x, x.sum(1) + torch.randn(ROWS)
    print(f"{'ms':10}{'pe.fit, epoch':>16}{'svi.run, step':>16}{'ratio':>8}")
    for compile, count in COUNTS.items():
        seconds = []
        for measure in (_fit, _svi):
            pyro.clear_param_store()
            seconds.append(measure(data, compile, count))
        fit, svi = (1e3 * s for s in seconds)
        print(f"{'compiled' if compile else 'Python':10}{fit:16.4f}{svi:16.4f}{fit / svi:8.2f}", flush=True)


if __name__ == "__main__":
    main()
