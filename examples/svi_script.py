"""An existing SVI loop with the loss of this library: one line changes.

Run with ``python -m examples.svi_script``.
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal

import pyro_elbo as pe

heights = torch.tensor([1.61, 1.74, 1.82, 1.69, 1.77, 1.58, 1.91, 1.72])


def model(x: torch.Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(1.7, 0.5))
    spread = pyro.sample("spread", dist.HalfNormal(0.5))
    with pyro.plate("person", len(x)):
        pyro.sample("x", dist.Normal(mean, spread), obs=x)


def main() -> None:
    pyro.set_rng_seed(0)
    guide = AutoNormal(model)
    loss = pe.TraceBeta_ELBO(beta=pe.LinearWarmup(0.0, 1.0, steps=200), num_particles=8, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.996}), loss)  # the loop itself is unchanged
    for step in range(800):
        svi.step(heights)
        if step % 200 == 0:
            elbo, beta = loss.terms(model, guide, heights).elbo.item(), loss.beta_at(loss.step, ["mean"])["mean"]
            print(f"step {step:4d}  beta {beta:.2f}  elbo {elbo:7.2f} nats")
    terms = loss.terms(model, guide, heights)
    print("KL in nats:", {name: round(kl.item(), 2) for name, kl in terms.kl.items()})
    median = guide.median(heights)["mean"].item()
    print(f"posterior median of the mean: {median:.3f} m; sample mean: {heights.mean():.3f} m")
    assert abs(median - heights.mean()) < 0.02, "the posterior must agree with the data"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
