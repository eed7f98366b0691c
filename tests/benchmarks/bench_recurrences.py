"""Compiled scans whose step is a handful of scalars against NumPyro's jitted ``lax.scan``.

Run with ``python -m tests.benchmarks.bench_recurrences``; needs ``pip install numpyro jax``. A step is loss, gradients
and Adam of a model with an AutoNormal guide on one series. Steps are called one by one (``pe.SVI.step`` against the
jitted ``svi.update``) or many at once (``pe.SVI.run`` against a jitted ``lax.scan`` over it). All train from the same
start, and the two libraries must first show the same losses. Then they alternate in blocks: times are medians
of the blocks' means, ratios are medians of the ratios of blocks of one round. The last columns hold the seconds of the
first three steps and the cores that other programs kept busy. ``--growth`` prints instead, for each model in new
processes without a disk cache, how seconds of compilation and milliseconds of a step of a run grow with the series;
``--looped`` how they grow with particles in a loop.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_elbo as pe
from tests.benchmarks.bench_svi import others_cpu
from tests.benchmarks.recurrences_ours import WORKS, data

LR = 0.01
CHECKED = 200  # steps whose mean loss, after as many others, must be shared
TOLERANCE = 0.05
LIMIT = 1.0  # our time over NumPyro's
RUN = 20  # steps of a run
GROWTH = (200, 1000, 10_000)

Call = Callable[[], Any]
Calls = dict[str, tuple[Call, int]]  # a call that trains, and its number of steps


def ours(name: str, steps: int, particles: int, looped: bool = False) -> Calls:
    model, y = WORKS[name], data(steps)
    options = {"num_particles": particles, "vectorize_particles": not looped, "max_plate_nesting": 0}
    svi = pe.SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": LR}), pe.TraceBeta_ELBO(**options), compile=True)
    return {"ours": (partial(svi.step, y), 1), "our run": (partial(svi.run, RUN, y, progress=False), RUN)}


def numpyro(name: str, steps: int, particles: int) -> Calls:
    import jax
    import jax.numpy as jnp
    from numpyro.infer import SVI, Trace_ELBO, init_to_feasible
    from numpyro.infer.autoguide import AutoNormal
    from numpyro.optim import Adam

    from tests.benchmarks import recurrences_numpyro

    model, y = recurrences_numpyro.WORKS[name], jnp.asarray(data(steps).numpy())
    guide = AutoNormal(model, init_loc_fn=init_to_feasible, init_scale=0.1)
    svi = SVI(model, guide, Adam(LR), Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1))
    state = svi.init(jax.random.key(0), y)

    def caller(update: Callable) -> Call:
        def call() -> jax.Array:
            nonlocal state
            state, loss = update(state, y)
            return jax.block_until_ready(loss)

        return call

    def many(state: Any, y: jax.Array) -> Any:
        return jax.lax.scan(lambda state, _: svi.update(state, y), state, None, length=RUN)

    return {"NumPyro": (caller(jax.jit(svi.update)), 1), "NumPyro's run": (caller(jax.jit(many)), RUN)}


def first_steps(call: Call) -> float:
    """Seconds of three steps: the first of ours is not a compiled one."""
    start = time.perf_counter()
    for _ in range(3):
        call()
    return time.perf_counter() - start


def timed(call: Call, calls: int) -> float:
    """Mean seconds of a call; one call before is not counted."""
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def check(name: str, calls: Calls) -> None:
    """Compare the libraries' mean losses."""
    means = {}
    for who in ("ours", "NumPyro"):
        losses = [float(calls[who][0]()) for _ in range(2 * CHECKED)]
        means[who] = statistics.fmean(losses[CHECKED:])
    a, b = means.values()
    if not abs(a - b) <= TOLERANCE * abs(b):
        raise RuntimeError(f"{name}: the two train something else, their mean losses are {means}.")


def compare(name: str, steps: int, particles: int, blocks: int, seconds: float) -> None:
    torch.manual_seed(2)
    pyro.clear_param_store()
    calls = ours(name, steps, particles) | numpyro(name, steps, particles)
    ready = {who: first_steps(call) for who, (call, _) in calls.items()}
    check(name, calls)
    length = {who: max(1, round(seconds / timed(call, 3))) for who, (call, _) in calls.items()}
    times: dict[str, list[float]] = {who: [] for who in calls}
    start, others = time.perf_counter(), others_cpu()
    for turn in range(blocks):
        at = turn % len(calls)
        for who in [*calls][at:] + [*calls][:at]:
            times[who].append(timed(calls[who][0], length[who]) / calls[who][1])
    busy = (others_cpu() - others) / (time.perf_counter() - start)
    report(f"{name:12} {steps:6} {particles:9}", times, f"{ready['ours']:9.1f} {ready['NumPyro']:9.1f} {busy:7.1f}")


def report(title: str, times: dict[str, list[float]], rest: str) -> None:
    line = title
    for mine, other in (("ours", "NumPyro"), ("our run", "NumPyro's run")):
        ratio = statistics.median(a / b for a, b in zip(times[mine], times[other], strict=True))
        milliseconds = (1e3 * statistics.median(times[who]) for who in (mine, other))
        line += "".join(f"{x:9.3f}" for x in milliseconds) + f" {ratio:6.2f} {'met' if ratio <= LIMIT else 'MISSED':6}"
    print(line, rest, flush=True)


def growth(names: list[str], particles: int) -> None:
    """Time of the first steps and of a step, each in a new process with an empty cache."""
    for name in names:
        rows = []
        for steps in GROWTH:
            rows.append(in_new_process(name, steps, particles))
            ready, each = rows[-1]
            print(f"{name:12} T = {steps:<6} first steps {ready:6.1f} s, a step of a run {1e3 * each:8.3f} ms")
        print(f"{'':12} from {GROWTH[0]} to {GROWTH[-1]}: {rows[-1][1] / rows[0][1]:.1f} x the time", flush=True)


def in_new_process(name: str, steps: int, particles: int, *more: str) -> list[float]:
    """Seconds of the first steps and of a step, with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "tests.benchmarks.bench_recurrences", "--cost", str(steps), "--work", name]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        child = subprocess.run(
            [*command, "--particles", str(particles), *more],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return [float(x) for x in child.stdout.splitlines()[-1].split()]


def loop_over_particles(names: list[str], steps: int) -> None:
    """Time of the first steps and of a step with one particle and with eight in a loop."""
    for name in names:
        one, eight = (in_new_process(name, steps, particles, "--looped") for particles in (1, 8))
        for particles, row in ((1, one), (8, eight)):
            seconds, each = row[0], 1e3 * row[1]
            print(f"{name:12} {particles} particles: first steps {seconds:6.1f} s, a step of a run {each:8.3f} ms")
        print(f"{'':12} eight over one: {eight[0] / one[0]:.2f} x, {eight[1] / one[1]:.1f} x", flush=True)


def cost(name: str, steps: int, particles: int, looped: bool) -> None:
    calls = ours(name, steps, particles, looped)
    ready, (run, each) = first_steps(calls["ours"][0]), calls["our run"]
    count = max(1, round(0.2 / timed(run, 3)))
    print(f"\n{ready} {statistics.median(timed(run, count) for _ in range(7)) / each}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--steps", nargs="+", type=int, default=[200, 5000], help="lengths of the series")
    parser.add_argument("--particles", nargs="+", type=int, default=[1, 8], help="particles, vectorized")
    parser.add_argument("--blocks", type=int, default=10, help="blocks of either library")
    parser.add_argument("--seconds", type=float, default=0.1, help="length of a block; at least one step")
    parser.add_argument("--growth", action="store_true", help="cost of long series, of ours alone")
    parser.add_argument("--looped", action="store_true", help="cost of particles in a loop, of ours alone")
    parser.add_argument("--cost", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cost:
        cost(options.work[0], options.cost, options.particles[0], options.looped)
        return
    if options.looped:
        loop_over_particles(options.work, options.steps[0])
        return
    if options.growth:
        growth(options.work, options.particles[0])
        return
    columns = "".join(f"{what:>9}{'NumPyro':>9} {'ratio':>6} {f'<= {LIMIT:g}':6}" for what in ("step, ms", "run"))
    print(f"{'model':12} {'T':>6} {'particles':>9}{columns} {'first, s':>9} {'NumPyro':>9} {'others':>7}")
    for name in options.work:
        for steps in options.steps:
            for particles in options.particles:
                compare(name, steps, particles, options.blocks, options.seconds)


if __name__ == "__main__":
    main()
