"""Held-out log p(x) of a VAE, IWAE-5 and IWAE-50, by importance sampling and by annealing side by side.

Run with ``python -m tests.benchmarks.bench_iwae``: the digits of scikit-learn, counts from 0 to 16. ``--fashion`` takes
a subset of Fashion-MNIST from PYRO_ELBO_DATA, binarized at one half. One latent layer, three seeds; figures are nats
per image, mean over seeds and half the range.
"""

import argparse
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor

import pyro_elbo as pe
from models.sequences import digits as load_digits
from models.vae import VAEGuide, VAEModel

PARTICLES = {"VAE": 1, "IWAE-5": 5, "IWAE-50": 50}


class Setting(NamedTuple):
    """Images, sizes of the networks, and lengths of training and annealing."""

    train: Tensor
    test: Tensor
    sizes: dict[str, int]
    steps: int
    temperatures: int


def digits(steps: int) -> Setting:
    x = load_digits().flatten(1)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return Setting(x[:1400], x[1400:1450], {"z_dim": 8, "hidden": 128, "total": 16}, steps, 400)


def fashion(steps: int) -> Setting:
    with np.load(Path(os.environ["PYRO_ELBO_DATA"]) / "fashion_mnist_20k.npz") as data:
        train, test = (torch.tensor(data[f"x_{s}"]).flatten(1).float() > 127 for s in ("train", "test"))
    sizes = {"x_dim": 784, "z_dim": 16, "hidden": 200, "total": 1}
    return Setting(train[:5000].float(), test[:20].float(), sizes, steps, 400)


def train(setting: Setting, particles: int, seed: int) -> tuple[VAEModel, VAEGuide]:
    """Train on minibatches of 100 rows, compiled."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, guide = VAEModel(**setting.sizes), VAEGuide(**setting.sizes)
    options = {"vectorize_particles": True, "max_plate_nesting": 1} if particles > 1 else {}
    loss = pe.TraceIW_ELBO(num_particles=particles, **options)
    svi = pe.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss, compile=True)
    for _ in range(setting.steps):
        svi.step(setting.train[torch.randint(len(setting.train), (100,))])
    return model, guide


def judge(setting: Setting, model: VAEModel, guide: VAEGuide, seed: int) -> list[float]:
    """ELBO, log p(x) by 5000 draws and by 16 chains, per image; the worst row's effective draws of each."""
    bound = pe.TraceBeta_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad(), pyro.poutine.block():
        elbo = bound.terms(model, guide, setting.test).per_datum.elbo.item()
    options = {"seed": seed, "progress": False}
    drawn = pe.log_evidence(model, guide, setting.test, num_samples=5000, **options)
    annealing = {"method": "ais", "num_temperatures": setting.temperatures}
    walked = pe.log_evidence(model, None, setting.test, **annealing, **options)
    found = [elbo]
    for result in (drawn, walked):
        found += [result.log_evidence.mean().item(), result.ess.median().item()]
    return found


def main(setting: Setting, seeds: int) -> None:
    print(f"{len(setting.train)} images to train, {len(setting.test)} held out, {setting.steps} steps, {seeds} seeds")
    header = ("ELBO", "importance", "ess of 5000", "annealed", "ess of 16")
    print(f"{'':9}" + "".join(f"{name:>18}" for name in header) + f"{'s':>6}")
    for name, particles in PARTICLES.items():
        start, rows = time.perf_counter(), []
        for seed in range(seeds):
            model, guide = train(setting, particles, seed)
            rows.append(judge(setting, model, guide, seed))
        columns = torch.tensor(rows).T
        cells = (f"{x.mean():.2f} ± {(x.max() - x.min()) / 2:.2f}" for x in columns)
        print(
            f"{name:9}" + "".join(f"{cell:>18}" for cell in cells) + f"{time.perf_counter() - start:6.0f}", flush=True
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fashion", action="store_true")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    main((fashion if args.fashion else digits)(args.steps), args.seeds)
