"""Milliseconds per training step of programs whose discrete latents are summed out, and Pyro's own ways.

A semi-supervised autoencoder of digits, whose guide enumerates the class; and a hidden Markov model, as a scan that
sums its state out.

Run as ``python -m tests.benchmarks.bench_discrete``; with ``--growth`` for milliseconds, memory and seconds of
compilation of the scan over its length. NumPyro's row needs NumPyro and funsor on the path. It differentiates
``contrib.funsor.log_density``: NumPyro's own ``TraceEnum_ELBO`` does not sum a scan's state over its paths.
"""

import argparse
import ctypes
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate

import pyro_elbo as pe
from models.ss_vae import SSVAE, UNKNOWN

K = 8


def parameters():
    start = lambda *shape: lambda: 0.3 * torch.randn(shape)  # noqa: E731
    return pyro.param("step", start(K, K)).log_softmax(-1), pyro.param("loc", start(K))


@config_enumerate
def scanned(x):
    logits, loc = parameters()

    def step(k, x_t):
        k = pyro.sample("k", dist.Categorical(logits=logits[k]))
        pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x_t)
        return k, None

    with pyro.plate("sequences", x.shape[1]):
        pe.scan(step, torch.tensor(0), x)


@config_enumerate
def looped(x):
    logits, loc = parameters()
    k = torch.tensor(0)
    with pyro.plate("sequences", x.shape[1]):
        for t in pyro.markov(range(len(x))):
            k = pyro.sample(f"k_{t}", dist.Categorical(logits=logits[k]))
            pyro.sample(f"x_{t}", dist.Normal(loc[k], 1.0), obs=x[t])


def built_in(x):
    logits, loc = parameters()
    with pyro.plate("sequences", x.shape[1]):
        # DiscreteHMM begins with the state before the first step.
        pyro.sample("x", dist.DiscreteHMM(torch.eye(K)[0].log(), logits, dist.Normal(loc, 1.0), len(x)), obs=x.T)


def nothing(x):
    """All latents are summed out."""


def timed(make: Callable[[], Callable[[], float]], repeats: int) -> tuple[float, float]:
    """Return seconds per step after the first three, in which compilation falls, and the loss of the first step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    step = make()
    first, *_ = [step() for _ in range(3)]
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - begin) / repeats, first


def ours(x: torch.Tensor, compile: bool) -> Callable[[], float]:
    svi = pe.SVI(scanned, nothing, pyro.optim.Adam({"lr": 0.01}), pe.TraceBeta_ELBO(), compile=compile)
    return lambda: float(svi.step(x))


def pyros(model, x: torch.Tensor) -> Callable[[], float]:
    svi = SVI(model, nothing, pyro.optim.Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1))
    return lambda: float(svi.step(x))


def semi_supervised(batch: int, repeats: int) -> None:
    """Print the step of the autoencoder, one label in ten rows, and how many of them Pyro's takes."""
    torch.manual_seed(0)
    x, label = torch.randint(17, (batch, 64)).float(), torch.arange(batch) % 10
    label = torch.where(label == 0, label, UNKNOWN)

    def step(compile: bool | None) -> Callable[[], float]:
        programs = SSVAE(z_dim=32, alpha=100.0)
        optim = pyro.optim.Adam({"lr": 1e-3})
        if compile is None:
            svi = SVI(programs.model, programs.guide, optim, TraceEnum_ELBO(max_plate_nesting=1))
        else:
            svi = pe.SVI(programs.model, programs.guide, optim, pe.TraceBeta_ELBO(kl="sampled"), compile=compile)
        return lambda: float(svi.step(x, label))

    rows = {"pyro_elbo, compiled": True, "pyro_elbo": False, "Pyro's TraceEnum_ELBO": None}
    found = {name: timed(lambda compile=compile: step(compile), repeats) for name, compile in rows.items()}
    theirs, _ = found["Pyro's TraceEnum_ELBO"]
    for name, (seconds, loss) in found.items():
        ratio = f"Pyro's takes {theirs / seconds:4.1f} times as long" if rows[name] is not None else ""
        print(
            f"SS-VAE, batch {batch:4d}  {name:22s} {1e3 * seconds:8.2f} ms  first loss {loss:.2f}  {ratio}", flush=True
        )


def numpyros(x: torch.Tensor) -> Callable[[], float]:
    if torch.get_num_threads() == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as numpyro_dist
    from numpyro.contrib.control_flow import scan
    from numpyro.contrib.funsor import config_enumerate, enum, log_density

    @config_enumerate
    def model(x):
        logits, loc = jax.nn.log_softmax(numpyro.param("step", jnp.zeros((K, K)))), numpyro.param("loc", jnp.zeros(K))

        def step(k, x_t):
            with numpyro.plate("sequences", x.shape[1]):
                k = numpyro.sample("k", numpyro_dist.Categorical(logits=logits[k]))
                numpyro.sample("x", numpyro_dist.Normal(loc[k], 1.0), obs=x_t)
            return k, None

        scan(step, jnp.zeros(x.shape[1], int), x)

    optimizer, data = numpyro.optim.Adam(0.01), jnp.asarray(x.numpy())
    first = {"step": jnp.asarray(0.3 * torch.randn(K, K).numpy()), "loc": jnp.asarray(0.3 * torch.randn(K).numpy())}
    state = optimizer.init(first)

    @jax.jit
    def update(state):
        def loss(p):
            return -log_density(enum(model, first_available_dim=-2), (data,), {}, p)[0]

        value, gradient = jax.value_and_grad(loss)(optimizer.get_params(state))
        return optimizer.update(gradient, state), value

    def step() -> float:
        nonlocal state
        state, loss = update(state)
        return float(loss)

    return step


def memory(name: str) -> float:
    """Return a figure of this process in MiB, such as VmHWM, the highest memory in use since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(name)) / 1024


def grow(total: int, batch: int, threads: int) -> None:
    """Print what a compiled scan of one length takes, in a process of its own."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    pyro.set_rng_seed(0)
    step = ours(torch.randn(total, batch), True)
    step()
    begin = time.perf_counter()
    step()
    compiled = time.perf_counter() - begin
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, seconds = memory("VmRSS"), []
    for _ in range(5):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    peak = memory("VmHWM") - before
    milliseconds = 1e3 * min(seconds)
    print(f"T = {total:6d}  {milliseconds:8.1f} ms  {peak:8.1f} MiB  compiled in {compiled:5.1f} s", flush=True)


def grow_all(lengths: list[int], batch: int) -> None:
    context = multiprocessing.get_context("spawn")
    for total in lengths:
        with tempfile.TemporaryDirectory() as folder:  # holds no machine code of earlier runs
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
            process = context.Process(target=grow, args=(total, batch, torch.get_num_threads()))
            process.start()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="*", default=[100, 500, 2000])
    parser.add_argument("--longest-loop", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, nargs="*", default=[32, 128], help="batches of the autoencoder")
    parser.add_argument("--growth", action="store_true")
    options = parser.parse_args()
    print(f"K = {K}, batch {options.batch}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    if options.growth:
        grow_all([100, 300, 1000, 3000, 10000], options.batch)
        return
    for batch in options.images:
        semi_supervised(batch, 40 * options.repeats)
    for total in options.lengths:
        torch.manual_seed(0)
        x = torch.randn(total, options.batch)
        rows = {
            "pe.scan, compiled": lambda x=x: ours(x, True),
            "pe.scan": lambda x=x: ours(x, False),
            "Pyro's DiscreteHMM": lambda x=x: pyros(built_in, x),
        }
        if find_spec("funsor") is not None:
            rows["NumPyro's scan"] = lambda x=x: numpyros(x)
        if total <= options.longest_loop:
            rows["TraceEnum_ELBO, pyro.markov"] = lambda x=x: pyros(looped, x)
        for name, make in rows.items():
            seconds, loss = timed(make, options.repeats)
            print(f"T = {total:6d}  {name:28s} {1e3 * seconds:10.1f} ms  first loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
