"""Memory of a fit to a file that does not fit into it, and of an export of 100 000 data: MiB resident, Linux only.

    .venv/bin/python -m tests.benchmarks.bench_large fit [GiB] [epochs]
    .venv/bin/python -m tests.benchmarks.bench_large export
    .venv/bin/python -m tests.benchmarks.bench_large loo

The file lies in the folder for temporary files and is deleted. All but its first 64 MiB are zeros without a place on
the disk, which are read like any other.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import arviz
import lightning
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_elbo as pe

COLUMNS, LATENTS, BATCH = 256, 8, 4096
EXPORTS: dict[str, dict[str, Any]] = {
    "densities and weights": {"predictive": False, "prior": False},
    "with predictive draws": {"prior": False},
    "all groups": {},
    "all groups, to a file": {"file": "fit.nc"},
    "and a latent of each row": {"file": "fit.nc"},
}


def status(name: str) -> float:
    """Return a figure of this process in MiB: VmRSS, RssAnon, or VmHWM, the highest VmRSS so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1024


class Analysis(nn.Module):
    """Factor analysis with an amortized guide."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(COLUMNS, 2 * LATENTS), nn.Linear(LATENTS, COLUMNS)

    def model(self, x: torch.Tensor) -> None:
        pyro.module("analysis", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        pyro.module("analysis", self)
        loc, raw = self.encode(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw) + 1e-3).to_event(1))


class Watch(lightning.Callback):
    """Prints the memory after every epoch."""

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print a line."""
        figures = "".join(f"{status(name):>10.0f}" for name in ("VmRSS", "RssAnon", "VmHWM"))
        print(f"{trainer.current_epoch:>5} {time.perf_counter() - START:>9.0f}{figures}", flush=True)


def fit(gib: float, epochs: int) -> None:
    """Fit to a file of so many GiB."""
    rows = int(gib * 2**30) // (4 * COLUMNS)
    with tempfile.NamedTemporaryFile(suffix=".f32") as file:
        x = np.memmap(file.name, np.float32, "w+", shape=(rows, COLUMNS))
        x[: 2**24 // COLUMNS] = np.random.default_rng(0).normal(size=(2**24 // COLUMNS, COLUMNS))
        x.flush()
        x = np.memmap(file.name, np.float32, "r", shape=(rows, COLUMNS))
        print(f"{rows} rows of {COLUMNS} numbers, {x.nbytes / 2**30:.2f} GiB; at the start {status('VmRSS'):.0f} MiB")
        print(f"{'epoch':>5} {'seconds':>9}{'VmRSS':>10}{'RssAnon':>10}{'VmHWM':>10}")
        analysis = Analysis()
        options = {"batch_size": BATCH, "max_epochs": epochs, "progress": False, "callbacks": Watch()}
        result = pe.fit(analysis.model, analysis.guide, x, **options)
        print(
            f"elbo {result.history.elbo.values[-1, 0]:.3f} nats per datum; highest {status('VmHWM'):.0f} MiB resident"
        )


def regression(x: torch.Tensor, y: torch.Tensor) -> None:
    """A slope that all rows share."""
    slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


def errors(x: torch.Tensor, y: torch.Tensor) -> None:
    """A latent of each row."""
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def errors_guide(x: torch.Tensor, y: torch.Tensor) -> None:
    """A scale too small."""
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal((x + y) / 2, 0.6))


def export(name: str) -> None:
    """Export 1000 draws of a model of 100 000 rows."""
    torch.manual_seed(0)
    x = torch.randn(100_000)
    y = 2 * x + torch.randn(100_000)
    model, guide = (errors, errors_guide) if name.startswith("and") else (regression, AutoNormal(regression))
    guide(x, y)
    pe.to_arviz(model, guide, x[:10], y[:10], num_samples=10)  # imports
    before, start = status("VmRSS"), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        data = pe.to_arviz(model, guide, x, y, num_samples=1000, **EXPORTS[name])
        highest = status("VmHWM")
        result = sum(x.nbytes for group in data.groups() for x in data[group].data_vars.values()) / 2**20
        data.close()
    seconds = time.perf_counter() - start
    print(f"{name:24}{before:>12.0f}{highest:>12.0f}{result:>12.0f}{seconds:>10.1f}", flush=True)


def leave_one_out(path: str) -> None:
    """Print the memory of leave-one-out of an export; make the export first if there is none."""
    if not Path(path).exists():
        torch.manual_seed(0)
        x = torch.randn(100_000)
        y = 2 * x + torch.randn(100_000)
        (guide := AutoNormal(regression))(x, y)
        pe.to_arviz(regression, guide, x, y, num_samples=1000, predictive=False, prior=False, file=path).close()
        return
    pe.loo(pe.to_arviz(errors, errors_guide, torch.ones(9), torch.ones(9), num_samples=99))  # imports
    before, start, data = status("VmRSS"), time.perf_counter(), arviz.from_netcdf(path)
    elpd = pe.loo(data).elpd
    print(f"{Path(path).stat().st_size / 2**20:.0f} MiB, 1000 draws of 100 000 data: elpd {elpd:.1f} nats")
    print(f"before {before:.0f}, highest {status('VmHWM'):.0f} MiB, {time.perf_counter() - start:.1f} s")


START = time.perf_counter()

if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "fit":
        fit(float(rest[0]) if rest else 4.0, int(rest[1]) if len(rest) > 1 else 2)
    elif what == "loo" and rest:
        leave_one_out(rest[0])
    elif what == "loo":
        with tempfile.TemporaryDirectory() as scratch:
            for _ in ("make", "measure"):
                command = [sys.executable, "-m", "tests.benchmarks.bench_large", "loo", f"{scratch}/x.nc"]
                subprocess.run(command, check=True)
    elif rest:
        export(rest[0])
    else:
        print(f"{'1000 draws of 100 000':24}{'before':>12}{'highest':>12}{'result':>12}{'seconds':>10}", flush=True)
        for name in EXPORTS:
            subprocess.run([sys.executable, "-m", "tests.benchmarks.bench_large", "export", name], check=True)
