"""Compiled SVI against Pyro's, NumPyro's and hand-written torch's, side by side.

Run with ``python -m tests.benchmarks.bench_svi``; needs ``pip install numpyro jax``. Every contender starts from the
same parameters, takes the same optimizer and number of particles, and must first show the same losses. Then they
alternate in blocks, in rotating order: times are medians of the blocks' means, ratios are medians of the ratios of
blocks of one round. The columns "our step" and "our run" hold our time over the contender's. ``--compile-times``
prints what a user waits for instead, ``--sites`` how that grows with the number of scalar sites.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyro_elbo as pe
from models.vae import VAEGuide, VAEModel
from tests.benchmarks import svi_numpyro, svi_torch

ROWS, COLUMNS, BATCH = 10_000, 50, 256
SIZES = {"x_dim": 784, "z_dim": 20, "hidden": 400, "total": 1}
CHECKED = 200  # steps of training whose mean loss every contender must share
PYRO, LOOPED = "Pyro, SVI.step", "Pyro, SVI.step, particles in a loop"  # the loop is Pyro's default
OURS, OURS_RUN, HAND = "pyro_elbo, step", "pyro_elbo, run", "torch by hand, compiled"
STEP, DONATED, RUN = "NumPyro, svi.update", "NumPyro, svi.update, donated state", "NumPyro, svi.run"

Contenders = dict[str, tuple[Callable[[], Any], int]]  # a call that trains, and its number of steps


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)


def hierarchical(x: Tensor, y: Tensor) -> None:
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    weights = [pyro.sample(f"weight_{i}", dist.Normal(mean, scale)) for i in range(x.shape[-1])]
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(intercept + x @ torch.stack(weights), noise), obs=y)


def logistic(rows: Tensor, x: Tensor, y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    with pyro.plate("data", ROWS, subsample=rows):
        pyro.sample("y", dist.Bernoulli(logits=intercept + x @ weights), obs=y)


class BinaryModel(VAEModel):
    """The VAE of ``models`` with Bernoulli pixels, as everyone writes it."""

    def latent(self, x: Tensor) -> Tensor:
        return pyro.sample("z", dist.Normal(x.new_zeros(self.z_dim), 1.0).to_event(1))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            logits = self.decoder(self.latent(x))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


class ScaledModel(BinaryModel):
    """Pyro's way to β = 4: the latent site is scaled, in the model and in the guide."""

    def latent(self, x: Tensor) -> Tensor:
        with poutine.scale(scale=4.0):
            return super().latent(x)


class ScaledGuide(VAEGuide):
    def forward(self, x: Tensor) -> Tensor:
        with poutine.scale(scale=4.0):
            return super().forward(x)


@dataclass(frozen=True)
class Work:
    title: str
    pyro: Callable[[], tuple]  # model, guide, loss
    ours: Callable[[], tuple]
    numpyro: Callable[[], tuple]
    args: tuple[Tensor, ...]
    lr: float
    run: int  # steps of one run
    tolerance: float  # of the mean loss of the first steps, a fraction
    targets: dict[str, float]  # rival -> largest time of ours over the rival's
    by_hand: Callable[[], Contenders] = dict
    looped: Callable[[], tuple] | None = None


def auto(model: Callable, loss: Callable) -> tuple:
    return model, AutoNormal(model), loss()


def networks(model: type, guide: type, loss: Callable) -> tuple:
    torch.manual_seed(0)
    return model(**SIZES), guide(**SIZES), loss()


def weights() -> dict[str, Tensor]:
    model, guide, _ = networks(BinaryModel, VAEGuide, Trace_ELBO)
    return {**model.state_dict(), **guide.state_dict()}


def small(title: str, model: Callable, twin: Callable, args: tuple[Tensor, ...], times: float) -> Work:
    return Work(
        title=f"{title}, AutoNormal",
        pyro=partial(auto, model, Trace_ELBO),
        ours=partial(auto, model, pe.TraceBeta_ELBO),
        numpyro=partial(svi_numpyro.auto, twin),
        args=args,
        lr=0.01,
        run=1000,
        tolerance=0.03,
        targets={PYRO: 1 / times, STEP: 1.0, DONATED: 1.0, RUN: 1.0},
    )


def vae(title: str, beta: float, particles: int, run: int, times: float, hand: float) -> Work:
    options = {"num_particles": particles, "vectorize_particles": particles > 1, "max_plate_nesting": 1}
    pair = (ScaledModel, ScaledGuide) if beta > 1 else (BinaryModel, VAEGuide)
    x = (torch.rand(128, 784) < 0.3).float()
    looped = partial(networks, *pair, partial(TraceMeanField_ELBO, num_particles=particles))
    return Work(
        title=f"{title} 784-400-20, batch 128",
        pyro=partial(networks, *pair, partial(TraceMeanField_ELBO, **options)),
        ours=partial(networks, BinaryModel, VAEGuide, partial(pe.TraceBeta_ELBO, beta=beta, **options)),
        numpyro=lambda: svi_numpyro.vae(weights(), beta, particles),
        args=(x,),
        lr=1e-3,
        run=run,
        tolerance=0.005,
        targets={PYRO: 1 / times, LOOPED: 1 / times, STEP: 1.0, DONATED: 1.0, RUN: 1.0, HAND: hand},
        by_hand=lambda: svi_torch.contenders(weights(), beta, particles, 1e-3, x),
        looped=looped if particles > 1 else None,
    )


def works() -> dict[str, Work]:
    torch.manual_seed(1)
    y, sigma = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]), torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
    x, rows, columns = torch.randn(1000, 36), torch.randperm(ROWS)[:BATCH], torch.randn(BATCH, COLUMNS)
    response = 1.0 + x @ (0.1 + 0.2 * torch.randn(36)) + 0.5 * torch.randn(1000)
    labels = torch.bernoulli(torch.sigmoid(columns @ torch.randn(COLUMNS)))
    schools = (eight_schools, svi_numpyro.eight_schools, (y, sigma))
    regression = (hierarchical, svi_numpyro.hierarchical, (x, response))
    classes = (logistic, partial(svi_numpyro.logistic, ROWS), (rows, columns, labels))
    return {
        "schools": small("eight schools", *schools, times=40),
        "hierarchical": small("hierarchical regression, 40 sites, 1000 data", *regression, times=30),
        "logistic": small(f"logistic regression, {ROWS} x {COLUMNS}, minibatch {BATCH}", *classes, times=10),
        "vae": vae("VAE", beta=1.0, particles=1, run=20, times=1.7, hand=1.02),
        "beta-vae": vae("beta-VAE, 8 particles,", beta=4.0, particles=8, run=10, times=3, hand=1.05),
    }


def ours(work: Work) -> pe.SVI:
    model, guide, loss = work.ours()
    return pe.SVI(model, guide, pyro.optim.Adam({"lr": work.lr}), loss, compile=True)


def contenders(work: Work) -> Contenders:
    def base(make: Callable[[], tuple]) -> tuple[Callable[[], Any], int]:
        model, guide, loss = make()
        return partial(SVI(model, guide, pyro.optim.Adam({"lr": work.lr}), loss).step, *work.args), 1

    steps, runs = ours(work), ours(work)
    return {
        PYRO: base(work.pyro),
        **({LOOPED: base(work.looped)} if work.looped else {}),
        OURS: (lambda: steps.step(*work.args), 1),
        OURS_RUN: (lambda: runs.run(work.run, *work.args, progress=False), work.run),
        **svi_numpyro.contenders(work.numpyro(), work.lr, work.args, work.run),
        **work.by_hand(),
    }


class Runner:
    """The contenders of a work; each trains in a parameter store of its own, for their parameters share names."""

    def __init__(self, work: Work, backwards: bool) -> None:
        self.work, self.calls = work, contenders(work)
        # Who is compiled and allocated first may get the better memory layout.
        self.names = list(self.calls)[::-1] if backwards else list(self.calls)
        self.stores = {name: None for name in self.names}
        self.block: dict[str, int] = {}

    def timed(self, name: str, calls: int) -> tuple[list[float], float]:
        """Losses and mean seconds per step of a block; three steps before it are not counted: they may compile."""
        call, steps = self.calls[name]
        with pyro.get_param_store().scope(self.stores[name]) as store:
            results = [call() for _ in range(-(-3 // steps))]
            start = time.perf_counter()
            results += [call() for _ in range(calls)]
            seconds = time.perf_counter() - start
        self.stores[name] = store
        return [float(loss) for result in results for loss in np.atleast_1d(result)], seconds / (calls * steps)

    def prepare(self, seconds: float) -> None:
        """Compile, compare the losses of the first steps, and choose lengths of blocks."""
        means = dict.fromkeys(self.calls, 0.0)
        for name in self.names:
            losses, _ = self.timed(name, -(-CHECKED // self.calls[name][1]))
            means[name] = statistics.fmean(losses[:CHECKED])
            _, each = self.timed(name, -(-20 // self.calls[name][1]))  # whatever compiles late has now compiled
            self.block[name] = max(1, round(seconds / (each * self.calls[name][1])))
        for name, mean in means.items():
            if not abs(mean / means[PYRO] - 1) <= self.work.tolerance:
                raise RuntimeError(
                    f"{self.work.title}: {name!r} trains something else: its mean loss over the first {CHECKED} steps"
                    f" is {mean:.3f}, Pyro's is {means[PYRO]:.3f} (tolerance {self.work.tolerance:.1%})."
                )
        worst = max(means, key=lambda name: abs(means[name] / means[PYRO] - 1))
        print(
            f"mean loss of {CHECKED} steps: {means[PYRO]:.2f}, farthest off {worst!r}: {means[worst]:.2f}", flush=True
        )

    def rounds(self, blocks: int) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in self.calls}
        for turn in range(blocks):
            at = turn % len(self.names)
            for name in self.names[at:] + self.names[:at]:
                times[name].append(self.timed(name, self.block[name])[1])
        return times


def others_cpu() -> float:
    """CPU seconds that other programs have taken (Linux); a second program slows torch's thread pool most of all."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def measure(work: Work, blocks: int, seconds: float) -> dict[str, list[float]]:
    """Mean step times of blocks, half of them from contenders created in reverse order."""
    halves = []
    for backwards in (False, True):
        torch.manual_seed(2)
        runner = Runner(work, backwards)
        runner.prepare(seconds)
        start, others = time.perf_counter(), others_cpu()
        halves.append(runner.rounds(blocks // 2))
        busy = (others_cpu() - others) / (time.perf_counter() - start)
        print(f"other programs kept {max(busy, 0.0):.2f} of {os.cpu_count()} cores busy meanwhile", flush=True)
    return {name: halves[0][name] + halves[1][name] for name in halves[0]}


def ratio(times: dict[str, list[float]], name: str, rival: str) -> float:
    return statistics.median(a / b for a, b in zip(times[name], times[rival], strict=True))


def verdict(work: Work, times: dict[str, list[float]], rival: str) -> str:
    """The target against a rival, met or missed; among the compiled by hand only the fastest counts."""
    by_hand = [name for name in times if name.startswith(HAND)]
    limit = work.targets.get(rival)
    if by_hand and rival == min(by_hand, key=lambda name: statistics.median(times[name])):
        limit = work.targets[HAND]
    if limit is None:
        return ""
    value = ratio(times, OURS_RUN if rival == RUN else OURS, rival)
    goal = f">= {1 / limit:g} x faster" if rival in (PYRO, LOOPED) else f"<= {limit:g} x"
    return f"{'run' if rival == RUN else 'step'} {goal}: {'met' if value <= limit else 'MISSED'}"


def report(work: Work, times: dict[str, list[float]]) -> None:
    print(f"\n{work.title:38} {'ms a step':>10} {'x Pyro':>8} {'our step':>9} {'our run':>8}  target")
    for name, values in times.items():
        columns = (1 / ratio(times, name, PYRO), ratio(times, OURS, name), ratio(times, OURS_RUN, name))
        print(
            f"{name:38} {1e3 * statistics.median(values):10.4f} {columns[0]:8.1f} {columns[1]:9.3f} {columns[2]:8.3f}"
            f"  {verdict(work, times, name)}"
        )
    print(flush=True)


def first_calls(work: Work) -> None:
    """Seconds that a user waits in this process for the first steps, and for the first run of another SVI."""
    start, svi = time.perf_counter(), ours(work)
    for _ in range(3):  # the first step is not a compiled one
        svi.step(*work.args)
    pyro.clear_param_store()
    middle = time.perf_counter()
    ours(work).run(work.run, *work.args, progress=False)
    print(f"\n{middle - start} {time.perf_counter() - middle}")


def compile_times(key: str, title: str) -> None:
    """First calls in new processes: with an empty disk cache, then with the cache that this one left."""
    with tempfile.TemporaryDirectory() as cache:
        for state, limit in (("cold", 20.0), ("from the disk cache", 2.5)):
            command = [sys.executable, "-m", "tests.benchmarks.bench_svi", "--first-calls", key]
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            step, run = (float(seconds) for seconds in child.stdout.splitlines()[-1].split())
            mark = "met" if max(step, run) < limit else "MISSED"
            print(
                f"{title}, {state}: first steps {step:.1f} s, first run {run:.1f} s; < {limit:g} s: {mark}", flush=True
            )


def sites(count: int) -> Work:
    """The hierarchical regression with another number of scalar sites."""
    x = torch.randn(1000, count - 4)
    response = 1.0 + x @ (0.1 + 0.2 * torch.randn(count - 4)) + 0.5 * torch.randn(1000)
    return small(f"{count} scalar sites", hierarchical, svi_numpyro.hierarchical, (x, response), times=30)


def growth(counts: list[int]) -> None:
    """First steps of regressions of more and more sites, each in a new process with an empty disk cache."""
    for count in counts:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, "-m", "tests.benchmarks.bench_svi", "--first-calls", str(count)]
            for state in ("cold", "from the disk cache"):
                environment, before = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}, children_cpu()
                child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                seconds, cpu = float(child.stdout.split()[-2]), children_cpu() - before
                print(f"{count} sites, {state}: first steps {seconds:.1f} s; processor {cpu:.1f} s", flush=True)


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    available = works()
    parser.add_argument("--work", nargs="+", choices=available, default=list(available))
    parser.add_argument("--blocks", type=int, default=20, help="blocks of every contender")
    parser.add_argument("--seconds", type=float, default=0.15, help="length of a block")
    parser.add_argument("--compile-times", action="store_true", help="time the first calls in new processes")
    parser.add_argument("--sites", nargs="*", type=int, help="time the first calls of regressions with so many sites")
    parser.add_argument("--first-calls", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if key := options.first_calls:
        first_calls(sites(int(key)) if key.isdecimal() else available[key])
        return
    if options.sites is not None:
        growth(options.sites or [20, 80, 320])
        return
    for key in options.work:
        if options.compile_times:
            compile_times(key, available[key].title)
        else:
            report(available[key], measure(available[key], options.blocks, options.seconds))


if __name__ == "__main__":
    main()
