"""Compiled scans whose step is a handful of scalars against NumPyro's jitted ``lax.scan``.

Run with ``python -m tests.benchmarks.bench_recurrences``; needs ``pip install numpyro jax``. A step is loss, gradients
and Adam of a model with an AutoNormal guide on one series. Both train from the same start and must first show the same
losses. Then they alternate in blocks: times are medians of the blocks' means, ratios are medians (and quartiles) of the
ratios of neighboring blocks. ``--growth`` prints instead, for each model in new processes without a disk cache, how
seconds of compilation and milliseconds of a step grow with the length of the series.
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
GROWTH = (200, 1000, 10_000)

Step = Callable[[], Any]


def ours(name: str, steps: int, particles: int) -> Step:
    model = WORKS[name]
    options = {"num_particles": particles, "vectorize_particles": True, "max_plate_nesting": 0} if particles > 1 else {}
    svi = pe.SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": LR}), pe.TraceBeta_ELBO(**options), compile=True)
    return partial(svi.step, data(steps))


def numpyro(name: str, steps: int, particles: int) -> Step:
    import jax
    import jax.numpy as jnp
    from numpyro.infer import SVI, Trace_ELBO, init_to_feasible
    from numpyro.infer.autoguide import AutoNormal
    from numpyro.optim import Adam

    from tests.benchmarks import recurrences_numpyro

    model, y = recurrences_numpyro.WORKS[name], jnp.asarray(data(steps).numpy())
    guide = AutoNormal(model, init_loc_fn=init_to_feasible, init_scale=0.1)
    svi = SVI(model, guide, Adam(LR), Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1))
    update, state = jax.jit(svi.update), svi.init(jax.random.key(0), y)

    def step() -> jax.Array:
        nonlocal state
        state, loss = update(state, y)
        return jax.block_until_ready(loss)

    return step


def first_steps(step: Step) -> float:
    """Seconds of three steps: the first of ours is not a compiled one."""
    start = time.perf_counter()
    for _ in range(3):
        step()
    return time.perf_counter() - start


def timed(step: Step, calls: int) -> float:
    step()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def check(name: str, calls: dict[str, Step]) -> None:
    means = {}
    for who, step in calls.items():
        losses = [float(step()) for _ in range(2 * CHECKED)]
        means[who] = statistics.fmean(losses[CHECKED:])
    a, b = means.values()
    if not abs(a - b) <= TOLERANCE * abs(b):
        raise RuntimeError(f"{name}: the two train something else, their mean losses are {means}.")


def compare(name: str, steps: int, particles: int, blocks: int, seconds: float) -> None:
    torch.manual_seed(2)
    pyro.clear_param_store()
    calls = {"ours": ours(name, steps, particles), "NumPyro": numpyro(name, steps, particles)}
    ready = {who: first_steps(step) for who, step in calls.items()}
    check(name, calls)
    length = {who: max(1, round(seconds / timed(step, 3))) for who, step in calls.items()}
    times: dict[str, list[float]] = {who: [] for who in calls}
    start, others = time.perf_counter(), others_cpu()
    for turn in range(blocks):
        for who in list(calls)[:: 1 if turn % 2 else -1]:
            times[who].append(timed(calls[who], length[who]))
    busy = (others_cpu() - others) / (time.perf_counter() - start)
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    columns = " ".join(f"{1e3 * statistics.median(x):10.3f}" for x in times.values())
    print(
        f"{name:12} {steps:6} {particles:9} {columns} {middle:8.2f}  {f'{low:.2f} to {high:.2f}':14}"
        f" {'met' if middle <= LIMIT else 'MISSED':7} {ready['ours']:9.1f} {ready['NumPyro']:9.1f} {busy:7.1f}",
        flush=True,
    )


def growth(names: list[str], particles: int) -> None:
    """Time of the first steps and of a step, each in a new process with an empty cache."""
    for name in names:
        rows = []
        for steps in GROWTH:
            with tempfile.TemporaryDirectory() as cache:
                command = [sys.executable, "-m", "tests.benchmarks.bench_recurrences", "--cost", str(steps)]
                command += ["--work", name, "--particles", str(particles)]
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
                child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            rows.append([float(x) for x in child.stdout.splitlines()[-1].split()])
            print(f"{name:12} T = {steps:<6} first steps {rows[-1][0]:6.1f} s, a step {1e3 * rows[-1][1]:8.3f} ms")
        print(f"{'':12} from {GROWTH[0]} to {GROWTH[-1]}: {rows[-1][1] / rows[0][1]:.1f} x the time", flush=True)


def cost(name: str, steps: int, particles: int) -> None:
    step = ours(name, steps, particles)
    ready, calls = first_steps(step), max(1, round(0.2 / timed(step, 3)))
    print(f"\n{ready} {statistics.median(timed(step, calls) for _ in range(7))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--steps", nargs="+", type=int, default=[200, 5000], help="lengths of the series")
    parser.add_argument("--particles", nargs="+", type=int, default=[1, 8], help="particles, vectorized")
    parser.add_argument("--blocks", type=int, default=10, help="blocks of either library")
    parser.add_argument("--seconds", type=float, default=0.1, help="length of a block; at least one step")
    parser.add_argument("--growth", action="store_true", help="cost of long series, of ours alone")
    parser.add_argument("--cost", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cost:
        cost(options.work[0], options.cost, options.particles[0])
        return
    if options.growth:
        growth(options.work, options.particles[0])
        return
    print(
        f"{'model':12} {'T':>6} {'particles':>9} {'ours, ms':>10} {'NumPyro':>10} {'ratio':>8}  {'quartiles':14}"
        f" {f'<= {LIMIT:g}':7} {'first, s':>9} {'NumPyro':>9} {'others':>7}"
    )
    for name in options.work:
        for steps in options.steps:
            for particles in options.particles:
                compare(name, steps, particles, options.blocks, options.seconds)


if __name__ == "__main__":
    main()
