"""An hour of fits, compiled runs, exports and resumed runs in one process: does it grow? Linux only.

    make soak [MINUTES=60]
    .venv/bin/python -m tests.benchmarks.soak [minutes]

A line shows the resident memory after a garbage collection, the objects that Python's collector knows, open files,
threads, and the seconds of the round. The verdict compares medians of the second quarter and of the last one.
"""

import gc
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import lightning
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_elbo as pe

MOST = 0.02  # growth of memory
X = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
QUIET = {"progress": False, "lr": 0.01}


class Reading(NamedTuple):
    """What may grow: MiB resident, objects, open files, threads."""

    mib: float
    objects: int
    files: int
    threads: int


def read() -> Reading:
    """Collect garbage, and measure this process."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    status = {name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines) if rest[-2:] == "kB"}
    threads = len(os.listdir("/proc/self/task"))
    return Reading(status["VmRSS"] / 1024, len(gc.get_objects()), len(os.listdir("/proc/self/fd")), threads)


class Autoencoder(nn.Module):
    """A small VAE with dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 4))
        self.decode = nn.Linear(2, 8)

    def model(self, x: torch.Tensor) -> None:
        pyro.module("autoencoder", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        pyro.module("autoencoder", self)
        loc, raw = self.encode(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw) + 0.01).to_event(1))


def regression(x: torch.Tensor) -> None:
    """A slope that all rows share."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(7), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x[:, :7] @ slope, 1.0), obs=x[:, 7])


def fit_batches(folder: Path) -> None:
    """Minibatches with validation, early stopping and a penalty, in Python."""
    programs = Autoencoder()
    loss = pe.TraceBeta_ELBO(pe.LinearWarmup(0.0, 1.0, steps=10), penalties=[pe.TotalCorrelation("z", 1.0)])
    options = {"batch_size": 64, "max_epochs": 5, "patience": 2} | QUIET
    pe.fit(programs.model, programs.guide, X, X[:64], loss=loss, **options)


def fit_compiled(folder: Path) -> None:
    """Epochs of one compiled step."""
    pe.fit(regression, AutoNormal(regression), X, batch_size=None, max_epochs=50, compile=True, **QUIET)


def run_compiled(folder: Path) -> None:
    """Steps of compiled SVI."""
    svi = pe.SVI(regression, AutoNormal(regression), pyro.optim.Adam({"lr": 0.01}), pe.TraceBeta_ELBO(), compile=True)
    svi.run(200, X, progress=False)


def export(folder: Path) -> None:
    """An export to memory, one to a file, leave-one-out, and a result that is saved and read."""
    guide = AutoNormal(regression)
    result = pe.fit(regression, guide, X, batch_size=None, max_epochs=5, **QUIET)
    pe.loo(result.to_arviz(num_samples=100))
    result.to_arviz(num_samples=2000, file=folder / "fit.nc").close()
    result.save(folder / "fit.pt")
    pe.load(folder / "fit.pt", regression, guide).predict(num_samples=10)


def resume(folder: Path) -> None:
    """A run that ends early, and goes on from its checkpoint."""
    for epochs, again in ((2, False), (4, True)):
        pyro.clear_param_store()
        programs = Autoencoder()
        options = {"batch_size": 64, "max_epochs": epochs, "dir": folder / "run", "resume": again} | QUIET
        pe.fit(programs.model, programs.guide, X, X[:64], **options)


WORK: tuple[Callable[[Path], None], ...] = (fit_batches, fit_compiled, run_compiled, export, resume)


def rounds(minutes: float) -> Iterator[tuple[str, Reading]]:
    """Repeat all work, for so many minutes."""
    start, number = time.perf_counter(), 0
    while number < 8 or time.perf_counter() - start < 60 * minutes:
        number += 1
        for work in WORK:
            pyro.clear_param_store()
            with tempfile.TemporaryDirectory() as folder:
                work(Path(folder))
        yield f"round {number}", read()


class Watch(lightning.Callback):
    """Measures every so many epochs."""

    def __init__(self, every: int) -> None:
        self.every, self.found = every, []

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure."""
        if (trainer.current_epoch + 1) % self.every == 0:
            self.found.append((f"epoch {trainer.current_epoch + 1}", read()))


def epochs() -> Iterator[tuple[str, Reading]]:
    """Train for 2000 epochs of Lightning's."""
    pyro.clear_param_store()
    programs, watch = Autoencoder(), Watch(100)
    options = {"batch_size": 128, "max_epochs": 2000, "callbacks": watch} | QUIET
    pe.fit(programs.model, programs.guide, X, X[:64], **options)
    yield from watch.found


def exports() -> Iterator[tuple[str, Reading]]:
    """Export 200 times, to memory and to a file."""
    pyro.clear_param_store()
    result = pe.fit(regression, AutoNormal(regression), X, batch_size=None, max_epochs=5, **QUIET)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(1, 101):
            result.to_arviz(num_samples=1000)
            result.to_arviz(num_samples=2000, file=Path(folder) / "fit.nc").close()
            if i % 5 == 0:
                yield f"export {2 * i}", read()


def watch(name: str, readings: Iterator[tuple[str, Reading]], lines: int = 20) -> bool:
    """Print at most so many of the readings, and the verdict."""
    print(f"\n{name:16}{'MiB':>10}{'objects':>12}{'files':>8}{'threads':>9}{'seconds':>9}")
    found: list[Reading] = []
    last, shown = time.perf_counter(), 0.0
    for label, reading in readings:
        found.append(reading)
        now = time.perf_counter()
        if len(found) >= shown:
            shown = max(len(found) + 1, len(found) * (1 + 1 / lines))
            figures = f"{reading.mib:>10.1f}{reading.objects:>12}{reading.files:>8}{reading.threads:>9}"
            print(f"{label:16}{figures}{now - last:>9.1f}", flush=True)
        last = now
    n = len(found)
    early, late = (
        Reading(*map(median, zip(*part, strict=True))) for part in (found[n // 4 : n // 2], found[-n // 4 :])
    )
    growth = late.mib / early.mib - 1
    flat = growth <= MOST and late.files <= early.files and late.threads <= early.threads
    more = f"objects {late.objects - early.objects:+.0f}, files {late.files - early.files:+.0f}"
    verdict = "flat" if flat else "IT GROWS"
    print(f"{name}: memory {growth:+.2%}, {more}, threads {late.threads - early.threads:+.0f}: {verdict}", flush=True)
    return flat


def main(minutes: float) -> None:
    """Print the tables, and fail if anything grows."""
    warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto")
    flat = [watch("mixed", rounds(minutes)), watch("2000 epochs", epochs()), watch("200 exports", exports())]
    sys.exit(0 if all(flat) else 1)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0)
