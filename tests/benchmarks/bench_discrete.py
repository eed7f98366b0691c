"""Milliseconds per training step of programs whose discrete latents are summed out, and Pyro's own ways.

A semi-supervised autoencoder of digits, whose guide enumerates the class; and a hidden Markov model, as a scan that
sums its state out.

Run as ``python -m tests.benchmarks.bench_discrete``.
"""

import argparse
import time
from collections.abc import Callable

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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="*", default=[100, 500, 2000])
    parser.add_argument("--longest-loop", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, nargs="*", default=[32, 128], help="batches of the autoencoder")
    options = parser.parse_args()
    print(f"K = {K}, batch {options.batch}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
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
        if total <= options.longest_loop:
            rows["TraceEnum_ELBO, pyro.markov"] = lambda x=x: pyros(looped, x)
        for name, make in rows.items():
            seconds, loss = timed(make, options.repeats)
            print(f"T = {total:6d}  {name:28s} {1e3 * seconds:10.1f} ms  first loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
