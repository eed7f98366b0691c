"""A training step of a VRNN: the per-timestep bound against Pyro's loop, NumPyro's scan and hand-written torch.

Run with ``python -m tests.benchmarks.bench_sequences``; needs ``pip install numpyro jax``. The VRNN is Chung's with x
88, h 64, z 16; a step is loss, gradients and Adam on sequences of full length. Every contender starts from the same
weights and must first show the same losses. Then they alternate in blocks, in rotating order: times are medians (and
quartiles) of the blocks' means, ratios are medians (and quartiles) of the ratios of blocks of one round, ours over the
contender's. ``--growth`` prints instead how time and memory of a step grow with the number of steps in time.
"""

import argparse
import ctypes
import importlib
import importlib.util
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyro
import torch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks import sequences_numpyro, sequences_pyro, sequences_torch
from tests.benchmarks.bench_svi import others_cpu
from tests.benchmarks.sequences_torch import Step

OURS, OURS_MODULE = "pyro_elbo", "tests.benchmarks.sequences_ours"
PYRO, NUMPYRO, TORCH = "Pyro", "NumPyro", "torch"  # what the names of the contenders begin with
CHECKED = 5  # steps whose losses every contender must share
TOLERANCE = 0.003  # of the mean of those after the first
MAKERS: dict[str, Callable[[int, int], Step]] = {
    "Pyro, loop, SVI.step": sequences_pyro.make,
    "NumPyro, scan": sequences_numpyro.make_scan,
    "NumPyro, scan, decoder batched": sequences_numpyro.make_batched,
    "NumPyro, lax.scan in one factor": sequences_numpyro.make_factor,
    "torch by hand, batched over time": sequences_torch.make_eager,
    "torch by hand, weights split": sequences_torch.make_split,
    "torch by hand, step compiled": sequences_torch.make_compiled,
}
# Time x batch -> the largest time of ours over that of each rival.
WORKS = {
    "50x20": {PYRO: 1 / 5, NUMPYRO: 1.0, TORCH: 0.5},
    "50x128": {PYRO: 1 / 3, NUMPYRO: 0.8, TORCH: 0.7},
    "1000x20": {PYRO: 1 / 6, NUMPYRO: 1.0, TORCH: 0.5},
}

Times = dict[str, list[float]]


def makers() -> dict[str, Callable[[int, int], Step]]:
    """All contenders; ours comes first."""
    if importlib.util.find_spec(OURS_MODULE) is None:
        print(f"{OURS_MODULE} is missing: only the others run")
        return MAKERS
    return {OURS: importlib.import_module(OURS_MODULE).make, **MAKERS}


def shape(work: str) -> tuple[int, int]:
    steps, batch = map(int, work.split("x"))
    return steps, batch


class Runner:
    """The contenders of a work; each trains in a parameter store of its own, for their parameters share names."""

    def __init__(self, work: str, names: Sequence[str], seconds: float) -> None:
        self.work, self.names = work, list(names)
        self.stores = {name: None for name in names}
        self.calls: dict[str, Step] = {}
        self.block: dict[str, int] = {}
        available, (steps, batch) = makers(), shape(work)
        expected, spread = self._first_loss(steps, batch)
        later = {}
        for name in names:
            with pyro.get_param_store().scope() as store:
                self.calls[name] = available[name](steps, batch)
                losses = [self.calls[name]() for _ in range(CHECKED)]
            self.stores[name], later[name] = store, statistics.fmean(losses[1:])
            self._check(name, "first loss", losses[0], expected, 5 * spread)  # a false alarm once in 2 million
            self.block[name] = max(1, round(seconds / self.timed(name, 3)))
        middle = statistics.median(later.values())
        for name, value in later.items():
            self._check(name, f"mean loss of steps 2 to {CHECKED}", value, middle, TOLERANCE * middle)
        print(f"first loss {expected:.1f} +- {spread:.1f}, then {middle:.1f} (mean of {CHECKED - 1}): all agree")

    @staticmethod
    def _first_loss(steps: int, batch: int) -> tuple[float, float]:
        """Mean and spread of the loss at the start, over its noise."""
        with torch.no_grad():
            cell, x = sequences_torch.start(), sequences_torch.data(steps, batch)
            losses = [sequences_torch.loss(cell, x).item() for _ in range(20)]
        return statistics.fmean(losses), statistics.stdev(losses)

    def _check(self, name: str, what: str, got: float, expected: float, tolerance: float) -> None:
        if not abs(got - expected) <= tolerance:
            raise RuntimeError(
                f"{self.work}: {name!r} trains something else: its {what} is {got:.1f}, expected {expected:.1f}"
                f" +- {tolerance:.1f}."
            )

    def timed(self, name: str, calls: int) -> float:
        """Mean seconds of a block's steps; one step before it is not counted."""
        call = self.calls[name]
        with pyro.get_param_store().scope(self.stores[name]) as store:
            call()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            seconds = time.perf_counter() - start
        self.stores[name] = store
        return seconds / calls

    def rounds(self, blocks: int) -> Times:
        times: Times = {name: [] for name in self.names}
        start, others = time.perf_counter(), others_cpu()
        for turn in range(blocks):
            at = turn % len(self.names)
            for name in self.names[at:] + self.names[:at]:
                times[name].append(self.timed(name, self.block[name]))
        busy = (others_cpu() - others) / (time.perf_counter() - start)
        print(f"other programs kept {max(busy, 0.0):.2f} of {os.cpu_count()} cores busy meanwhile", flush=True)
        return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def verdict(work: str, name: str, ratio: float) -> str:
    limit = next((limit for rival, limit in WORKS[work].items() if name.startswith(rival)), None)
    if limit is None or name == OURS:
        return ""
    goal = f">= {1 / limit:g} x faster" if name.startswith(PYRO) else f"<= {limit:g} x"
    return f"{goal}: {'met' if ratio <= limit else 'MISSED'}"


def report(work: str, times: Times) -> None:
    columns = ("ms a step", "quartiles", "ours over it", "quartiles")
    print("\n{:34}{:>10}  {:18}{:>12}  {:16}target".format(f"{work} (time x batch)", *columns))
    for name, values in times.items():
        low, middle, high = (1e3 * value for value in quartiles(values))
        line = f"{name:34}{middle:10.2f}  {f'{low:.2f} to {high:.2f}':18}"
        if OURS in times:
            low, middle, high = quartiles([a / b for a, b in zip(times[OURS], values, strict=True)])
            line += f"{middle:12.3f}  {f'{low:.2f} to {high:.2f}':16}{verdict(work, name, middle)}"
        print(line)
    print(flush=True)


def resident(key: str) -> int:
    """Bytes of this process's memory, from Linux: ``VmRSS``, what it holds; ``VmHWM``, the most it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def live(step: Step) -> int:
    """Most bytes of torch's tensors that live at once during a step, beyond those that outlive it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    changes = [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


def cost(name: str, steps: int, batch: int) -> None:
    """Print seconds until three steps are done, of a step, and the bytes that it needs: of the process, of tensors."""
    start = time.perf_counter()
    step = makers()[name](steps, batch)
    for _ in range(3):
        step()
    ready = time.perf_counter() - start
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, times = resident("VmRSS"), []
    for _ in range(7):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    # What lies there between two steps, such as data and weights, is not counted.
    most = resident("VmHWM") - before
    print(f"\n{ready} {statistics.median(times)} {most} {live(step)}")


def growth(name: str, batch: int) -> None:
    """Time and memory of T = 100 and 1000 steps in time, each in a new process."""
    rows = []
    for steps in (100, 1000):
        command = [sys.executable, "-m", "tests.benchmarks.bench_sequences", "--cost", name, f"{steps}x{batch}"]
        command += ["--threads", str(torch.get_num_threads())]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        ready, *found = (float(value) for value in child.stdout.splitlines()[-1].split())
        rows.append(found)
        each, memory, tensors = found
        print(
            f"{name:34} T = {steps:<5} first three steps {ready:6.1f} s, a step {1e3 * each:8.1f} ms, "
            f"peak memory of a step {memory / 2**20:7.1f} MiB, of its tensors {tensors / 2**20:7.1f} MiB",
            flush=True,
        )
    for what, small, large in zip(("time", "memory of the process", "memory of tensors"), *rows, strict=True):
        print(f"    {what}: {large / small:.1f} x, <= 11 x: {'met' if large <= 11 * small else 'MISSED'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    available = makers()
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--only", nargs="+", choices=available, default=list(available), help="contenders")
    parser.add_argument("--blocks", type=int, default=14, help="blocks of every contender")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a block; at least one step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, for all contenders")
    parser.add_argument("--growth", action="store_true", help="cost of T = 100 and 1000, of ours or of --only")
    parser.add_argument("--cost", nargs=2, metavar=("NAME", "TxB"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.cost:
        cost(options.cost[0], *shape(options.cost[1]))
    elif options.growth:
        for name in options.only if options.only != list(available) else [next(iter(available))]:
            growth(name, batch=20)
    else:
        for work in options.work:
            torch.manual_seed(2)
            report(work, Runner(work, options.only, options.seconds).rounds(options.blocks))


if __name__ == "__main__":
    main()
