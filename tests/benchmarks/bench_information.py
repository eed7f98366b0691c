"""What the penalties cost: a compiled step with the penalty against one without, and the memory of large batches.

Run with ``python -m tests.benchmarks.bench_information``. The program is a VAE 784-400-20 with Bernoulli pixels. Steps
alternate in blocks, in rotating order: times are medians of the blocks' means, ratios medians of the ratios of blocks
of one round. ``--memory`` prints instead the peak memory that a penalty adds, in a process of its own per row.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pyro
import torch

import pyro_elbo as pe
from models.vae import VAEGuide
from tests.benchmarks.bench_svi import SIZES, BinaryModel


class Model(BinaryModel):
    """The VAE beside an attribute."""

    def forward(self, x: torch.Tensor, s: torch.Tensor) -> None:
        super().forward(x)


class Guide(VAEGuide):
    def forward(self, x: torch.Tensor, s: torch.Tensor) -> None:
        super().forward(x)


def attribute(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return s


PENALTIES: dict[str, Callable[[], list[pe.MutualInformation | pe.TotalCorrelation]]] = {
    "none": lambda: [],
    "aggregate": lambda: [pe.MutualInformation("z", attribute, 1.0)],
    "I(z; x)": lambda: [pe.MutualInformation("z", weight=1.0)],
    "variational": lambda: [pe.MutualInformation("z", attribute, 1.0, "variational")],
    "club": lambda: [pe.MutualInformation("z", attribute, 1.0, "club")],
    "adversarial": lambda: [pe.MutualInformation("z", attribute, 1.0, "adversarial")],
    "hsic": lambda: [pe.MutualInformation("z", attribute, 1.0, "hsic")],
    "total correlation": lambda: [pe.TotalCorrelation("z", 1.0)],
}
TARGETS = {"aggregate": 1.3}


def stepper(name: str, rows: int, compile: bool) -> Callable[[], float]:
    """A step of training with a penalty."""
    pyro.settings.set(module_local_params=True)  # several such programs live in one process
    pyro.set_rng_seed(0)
    x = torch.rand(rows, SIZES["x_dim"]).round()
    model, guide, s = Model(**SIZES), Guide(**SIZES), (torch.rand(rows) < 0.5).float()
    optim = pyro.optim.Adam({"lr": 1e-3})
    svi = pe.SVI(model, guide, optim, pe.TraceBeta_ELBO(penalties=PENALTIES[name]()), compile=compile)
    return lambda: svi.step(x, s)


def times(names: list[str], rows: int, blocks: int, seconds: float) -> dict[str, list[float]]:
    """Mean milliseconds of a step, block by block."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for order in (names, names[::-1]):  # who is allocated first may get the better memory layout
        steps = {name: stepper(name, rows, compile=True) for name in order}
        for step in steps.values():
            for _ in range(4):
                step()
        for block in range(blocks // 2):
            for i in range(len(names)):
                name = names[(i + block) % len(names)]
                start, count = time.perf_counter(), 0
                while time.perf_counter() - start < seconds:
                    steps[name]()
                    count += 1
                found[name].append((time.perf_counter() - start) / count * 1e3)
    return found


def peak(name: str, rows: int, compile: bool) -> float:
    """MiB of the process at its largest, in steps of training."""
    step = stepper(name, rows, compile)
    for _ in range(3):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peaks(names: list[str], rows: int, compile: bool) -> dict[str, float]:
    """The same for each penalty, each in its own process."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_information", "--rows", str(rows), "--peak-of"]
    options = [] if compile else ["--eager"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # count no gaps of the heap
    return {
        name: float(subprocess.check_output([*command, name, *options], text=True, env=environment)) for name in names
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PENALTIES), default=list(PENALTIES))
    parser.add_argument("--rows", type=int, default=512, help="of a batch")
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.25)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", action="store_true", help="peak memory instead of times")
    parser.add_argument("--eager", action="store_true", help="without compilation (with --memory)")
    parser.add_argument("--peak-of", choices=list(PENALTIES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chosen = list(dict.fromkeys(["none", *args.only]))
    if args.peak_of:
        print(peak(args.peak_of, args.rows, not args.eager))
    elif args.memory:
        memory = peaks(chosen, args.rows, not args.eager)
        print(f"{args.rows} rows of {SIZES['z_dim']} dimensions, {'eager' if args.eager else 'compiled'}")
        print(f"{'penalty':20}{'peak MiB':>10}{'more':>8}")
        for key, value in memory.items():
            print(f"{key:20}{value:10.0f}{value - memory['none']:8.0f}")
    else:
        blocks = times(chosen, args.rows, args.blocks, args.seconds)
        print(f"{args.rows} rows\n{'penalty':20}{'ms a step':>10}{'ratio':>8}  quartiles       target")
        for key, value in blocks.items():
            ratios = sorted(a / b for a, b in zip(value, blocks["none"], strict=True))
            low, _, high = statistics.quantiles(ratios, n=4)
            ratio = statistics.median(ratios)
            verdict = ""
            if key in TARGETS:
                verdict = f"<= {TARGETS[key]} x: {'met' if ratio <= TARGETS[key] else 'MISSED'}"
            print(f"{key:20}{statistics.median(value):10.2f}{ratio:8.3f}  {low:.2f} to {high:.2f}    {verdict}")
