"""A variational recurrent network (VRNN) that reads images row by row.

An image in black and white is a sequence of rows. The script trains a small VRNN, prints the bound of every row beside
that of independent pixels, draws images from the model, and completes images from their upper half. What the bound of a
row gains over independent pixels is what the rows above it tell.

Without ``--data`` the images are the 8 x 8 digits of scikit-learn. ``--data fashion_mnist_20k.npz`` reads an archive of
``x_train`` and ``x_test`` (bytes, n x height x width). Run with ``python -m examples.vrnn_digits``; figure, history and
posterior (ArviZ, dimension ``time``) are saved to ``runs/vrnn_digits/``.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import torch
from jaxtyping import Float
from torch import Tensor

import pyro_elbo as pe
from models.sequences import digits
from models.vrnn import VRNN

INK = 7  # pixels above this count, of 16, are black
SHOWN = 10  # images a line of the figure

Images = Float[Tensor, "n rows pixels"]


class Problem(NamedTuple):
    """Images of zeros and ones, size of the model, plan of training, and the nats a row that earlier rows must save."""

    train: Images
    held_out: Images
    z_dim: int
    hidden: int
    epochs: int
    least: float


def load(data: Path | None, seed: int, smoke_test: bool) -> Problem:
    """Return the bundled digits, 1500 to train on and 297 held out at random, or the archive with its own split."""
    if data is None:
        images = (digits() > INK).float()
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]
        hidden, epochs = (32, 8) if smoke_test else (64, 80)
        return Problem(images[:1500], images[1500:], 4, hidden, epochs, least=0.2)
    train, held_out = read(data, "train", 2000 if smoke_test else 10_000), read(data, "test", 500)
    return Problem(train, held_out, 16, 64, 2 if smoke_test else 12, least=5.0)


def read(path: Path, split: str, rows: int) -> Images:
    """Read the first images of a split; pixels above half of the brightest are black."""
    with np.load(path, allow_pickle=False) as data:
        return torch.tensor(data[f"x_{split}"][:rows] > 127).float()


def independent_pixels(train: Images, held_out: Images) -> Float[Tensor, " rows"]:
    """Return log p of each held-out row under independent pixels, each with its own frequency, in nats."""
    frequency = (train.sum(0) + 1) / (len(train) + 2)
    return torch.distributions.Bernoulli(frequency).log_prob(held_out).sum(-1).mean(0)


def train(problem: Problem, out: Path, seed: int, compile: bool) -> tuple[VRNN, pe.FitResult]:
    torch.manual_seed(seed)  # for the initial weights; pe.fit has its own seed
    vrnn = VRNN(problem.train.shape[-1], problem.z_dim, problem.hidden)
    vrnn.start_from(problem.train.flatten(0, 1))
    steps = problem.epochs * (len(problem.train) // 128)
    beta = pe.LinearWarmup(0.1, 1.0, steps=steps // 2)  # a shorter warm-up lets z collapse
    return vrnn, pe.fit(
        vrnn.model,
        vrnn.guide,
        problem.train,
        problem.held_out,
        loss=pe.TraceTimestep_ELBO(beta, normalize="frame"),
        lr=5e-3,
        max_epochs=problem.epochs,
        seed=seed,
        dir=out,
        overwrite=True,
        grad_clip=10.0,
        compile=compile,
    )


@torch.no_grad()
def per_row(vrnn: VRNN, images: Images) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Return log-likelihood and KL of each row in nats, averaged over images."""
    terms = pe.TraceTimestep_ELBO().terms(vrnn.model, vrnn.guide, images)
    return terms.log_likelihood["x"].mean(0), terms.kl["z"].mean(0)


def report(likelihood: Tensor, kl: Tensor, baseline: Tensor) -> None:
    print(f"\n{'nats per row, held out':26}{'log p(x | z)':>14}{'KL':>8}{'bound':>8}{'independent pixels':>20}")
    for t, (fit, cost, plain) in enumerate(zip(likelihood, kl, baseline, strict=True)):
        print(f"  row {t:<20}{fit:14.2f}{cost:8.2f}{fit - cost:8.2f}{plain:20.2f}")
    bound = (likelihood - kl).mean()
    print(f"  {'mean':24}{likelihood.mean():14.2f}{kl.mean():8.2f}{bound:8.2f}{baseline.mean():20.2f}")


def draw(vrnn: VRNN, held_out: Images, path: Path) -> None:
    """Plot held-out images, the same images with a drawn lower half, and images drawn from the model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = held_out.shape[1]
    seen = held_out[:SHOWN, : rows // 2]
    lines = {
        "held out": held_out[:SHOWN],
        "lower half drawn": torch.cat([seen, vrnn.forecast(seen, rows - rows // 2)], 1),
        "drawn": vrnn.generate(SHOWN, rows),
        "drawn ": vrnn.generate(SHOWN, rows),
    }
    figure, axes = plt.subplots(len(lines), SHOWN, figsize=(9, 1 + len(lines)), layout="constrained")
    for line, (label, images) in zip(axes, lines.items(), strict=True):
        for ax, image in zip(line, images, strict=True):
            ax.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(data: Path | None, out: Path, *, seed: int = 0, smoke_test: bool = False) -> None:
    problem = load(data, seed, smoke_test)
    vrnn, result = train(problem, out, seed, compile=data is not None and not smoke_test)

    pyro.set_rng_seed(seed)
    likelihood, kl = per_row(vrnn, problem.held_out)
    baseline = independent_pixels(problem.train, problem.held_out)
    report(likelihood, kl, baseline)
    drawn = vrnn.generate(1000, problem.train.shape[1])
    ink, real = drawn.mean().item(), problem.held_out.mean().item()
    if importlib.util.find_spec("matplotlib") is not None:
        draw(vrnn, problem.held_out, out / "vrnn_digits.png")
    exported = pe.to_arviz(vrnn.model, vrnn.guide, problem.held_out[:50], num_samples=100, history=result)
    exported.to_netcdf(str(out / "posterior.nc"))
    print(f"\nwritten to {out}/: " + ", ".join(sorted(path.name for path in out.iterdir())))

    gain = (likelihood - kl - baseline).mean().item()
    print(f"earlier rows save {gain:.2f} nats a row; ink of drawn images {ink:.3f}, of real ones {real:.3f}")
    assert abs(ink - real) < 0.1, f"drawn images must have as much ink as real ones, got {ink:.3f} for {real:.3f}"
    assert gain > problem.least, f"earlier rows must save {problem.least:g} nats a row, got {gain:.2f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="images, such as fashion_mnist_20k.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/vrnn_digits"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="a small network and few epochs")
    args = parser.parse_args()
    main(args.data, args.out, seed=args.seed, smoke_test=args.smoke_test)
