"""Processor time of a full-batch epoch of ``pe.fit``, its history included, and of a step of ``pe.SVI.run``.

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
import xarray  # noqa: F401  (imported here, so that the first history does not count it)
from pyro.infer.autoguide import AutoNormal

import pyro_elbo as pe
from pyro_elbo.diagnosis import Probe
from pyro_elbo.training.history import History

ROWS, COLUMNS = 100, 5
COUNTS = {False: (200,), True: (20_000, 1_000_000)}
FIRST = 10  # epochs and steps that do not count: they prepare and compile


def model(x, y):
    """A linear regression."""
    b = pyro.sample("b", dist.Normal(torch.zeros(COLUMNS), 1.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ b, s), obs=y)


def _fit(data: tuple, compile: bool, count: int) -> tuple[float, float]:
    """Return the time of an epoch, its history included, without probes; and that of its share of the probes."""
    ends, probes, added = [], [], 0
    add, probe, to_dataset = History.add, Probe.__call__, History.to_dataset

    def noted(times: list[float], function: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            start = time.process_time()
            try:
                return function(*arguments)
            finally:
                times.append(time.process_time() - start)

        return timed

    def note(history: History, split: str, first: int, columns: dict[str, Any]) -> None:
        nonlocal added
        add(history, split, first, columns)
        added += len(columns["elbo"])
        if added >= FIRST:
            ends.append((added, time.process_time(), sum(probes)))

    tables: list[float] = []
    History.add, Probe.__call__, History.to_dataset = note, noted(probes, probe), noted(tables, to_dataset)
    callbacks = [lightning.Callback()] if "--lightning" in sys.argv else None
    options = {"batch_size": None, "progress": False, "compile": compile, "callbacks": callbacks}
    pe.fit(model, AutoNormal(model), data, max_epochs=count + FIRST, **options)
    History.add, Probe.__call__, History.to_dataset = add, probe, to_dataset
    (epochs, spent, probed), (first, start, before) = ends[-1], ends[0]
    probed -= before
    return (spent - start - probed + sum(tables)) / (epochs - first), probed / (epochs - first)


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
    print(f"{'µs':10}{'steps':>10}{'epoch of pe.fit':>18}{'and its probes':>18}{'step of svi.run':>18}{'ratio':>8}")
    for compile, counts in COUNTS.items():
        for count in counts:
            pyro.clear_param_store()
            fit, probes = _fit(data, compile, count)
            pyro.clear_param_store()
            svi = _svi(data, compile, count)
            kind, numbers = "compiled" if compile else "Python", (1e6 * s for s in (fit, probes, svi))
            print(f"{kind:10}{count:10,}{''.join(f'{x:18.2f}' for x in numbers)}{fit / svi:8.2f}", flush=True)


if __name__ == "__main__":
    main()
