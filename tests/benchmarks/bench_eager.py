"""One eager SVI step: TraceBeta_ELBO(beta=1) against Pyro's TraceMeanField_ELBO and Trace_ELBO.

Run with ``python -m tests.benchmarks.bench_eager``. The contenders alternate in blocks, in rotating order; medians of
the blocks' mean step times; the ratio is the median of the ratios of neighboring blocks.
"""

import statistics
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_elbo as pe
from models.vae import VAEGuide, VAEModel

Y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
SIGMA = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])


def eight_schools(y: torch.Tensor, sigma: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)


def schools_step(loss: pyro.infer.ELBO) -> Callable[[], float]:
    svi = SVI(eight_schools, AutoNormal(eight_schools), pyro.optim.Adam({"lr": 0.01}), loss)
    return lambda: svi.step(Y, SIGMA)


def vae_step(loss: pyro.infer.ELBO) -> Callable[[], float]:
    sizes = {"x_dim": 784, "z_dim": 20, "hidden": 400, "total": 1}
    x = (torch.rand(128, 784) < 0.3).float()
    svi = SVI(VAEModel(**sizes), VAEGuide(**sizes), pyro.optim.Adam({"lr": 1e-3}), loss)
    return lambda: svi.step(x)


LOSSES = {
    "pyro TraceMeanField_ELBO": TraceMeanField_ELBO,
    "pyro Trace_ELBO": Trace_ELBO,
    "pe.TraceBeta_ELBO(beta=1)": pe.TraceBeta_ELBO,
}


def measure(make: Callable, block: int, blocks: int = 20) -> dict[str, list[float]]:
    """Mean step times of blocks; every contender is created first once: the first gets the best memory layout."""
    times: dict[str, list[float]] = {name: [] for name in LOSSES}
    for turn in range(len(LOSSES)):
        order = list(LOSSES)[turn:] + list(LOSSES)[:turn]
        with pyro.get_param_store().scope():
            steps = {name: make(LOSSES[name]()) for name in order}
            for i in range(-1, blocks):
                for name in order[i % 3 :] + order[: i % 3]:
                    start = time.perf_counter()
                    for _ in range(block):
                        steps[name]()
                    if i >= 0:
                        times[name].append((time.perf_counter() - start) / block)
    return times


def main() -> None:
    print(f"{'one SVI step':60} {'ms':>8} {'ratio':>10}")
    for title, make, block in (
        ("VAE 784-400-20, batch 128", vae_step, 5),
        ("eight schools, AutoNormal", schools_step, 20),
    ):
        times = measure(make, block)
        base = times["pyro TraceMeanField_ELBO"]
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
            print(f"{title + ': ' + name:60} {1e3 * statistics.median(values):8.3f} {ratio:10.3f}")


if __name__ == "__main__":
    main()
