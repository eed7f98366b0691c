"""From a Pyro program to a fitted, explained and exported posterior, in one script.

A β-VAE learns the 8 x 8 digits of scikit-learn, whose pixels are counts from 0 to 16. Run with ``make demo``; the
script writes its files to ``runs/quickstart/``.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.datasets import load_digits

import pyro_elbo as pe
from models.vae import VAEGuide, VAEModel

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

Z_DIM = 8


def load() -> tuple[torch.Tensor, torch.Tensor]:
    """Shuffle the bundled digits and split them into 1500 training and 297 validation images."""
    images = torch.tensor(load_digits().data, dtype=torch.float32)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return images[:1500], images[1500:]


def describe(terms: dict[str, pe.Terms], active: torch.Tensor) -> int:
    """Print the bound, its parts and the KL of every latent dimension; return the number of active units."""
    print(f"\n{'nats per image':22}" + "".join(f"{split:>12}" for split in terms))
    for name in ("elbo", "distortion", "rate"):
        values = (getattr(t.per_datum, name).item() for t in terms.values())
        print(f"{name:22}" + "".join(f"{v:12.2f}" for v in values))
    per_dim = terms["validation"].kl_per_dim["z"].mean(0)
    print("\nKL per latent dimension (nats, validation mean)")
    for i, kl in enumerate(per_dim.tolist()):
        print(f"  z[{i}] {kl:6.2f}  {'#' * round(10 * kl)}{'' if active[i] else '  (unused: its mean is constant)'}")
    print(f"\nactive units: {int(active.sum())} of {len(active)}  (variance of the posterior mean above 0.01)")
    return int(active.sum())


def draw(result: pe.FitResult, images: torch.Tensor, path: Path) -> None:
    """Plot training curves, reconstructions, and a walk along each of the four most active latent dimensions."""
    figure = plt.figure(figsize=(11, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.15])
    pe.plot_history(result.history, list(top.subplots(1, 2)))
    left, right = bottom.subfigures(1, 2)
    with torch.no_grad():
        locs, scales = result.guide.encode(images)
        means = 16 * torch.sigmoid(result.model.decoder(locs[:16]))
        grids = [x.reshape(-1, 8, 8) for i in (0, 8) for x in (images[i : i + 8], means[i : i + 8])]
        busiest = locs.var(0).argsort(descending=True)[:4]
        steps = torch.linspace(-2.5, 2.5, 8)
        walks = torch.zeros(4, 8, Z_DIM)
        for row, dim in enumerate(busiest):
            walks[row, :, dim] = steps
        walked = 16 * torch.sigmoid(result.model.decoder(walks)).reshape(4, 8, 8, 8)
    show(left, grids, ["image", "mean"] * 2, "held-out images and their reconstructions")
    show(right, list(walked), [f"z[{d}]" for d in busiest.tolist()], "latent walks, -2.5 to 2.5")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(figure: "matplotlib.figure.SubFigure", rows: list, labels: list[str], title: str) -> None:
    """Draw rows of 8 x 8 images with a label on the left of each row."""
    axes = figure.subplots(len(rows), len(rows[0]))
    for images, label, line in zip(rows, labels, axes, strict=True):
        for image, ax in zip(images, line, strict=True):
            ax.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=16)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(label)
    figure.suptitle(title)


def main(out: Path, max_epochs: int = 60) -> None:
    torch.manual_seed(0)  # for the initial weights; pe.fit has its own seed
    train, valid = load()
    beta = pe.LinearWarmup(0.0, 1.0, steps=240)
    result = pe.fit(
        VAEModel(z_dim=Z_DIM),
        VAEGuide(z_dim=Z_DIM),
        train,
        valid,
        loss=pe.TraceBeta_ELBO(beta=beta),
        lr=3e-3,
        max_epochs=max_epochs,
        patience=10,
        dir=out,
        overwrite=True,
        seed=0,
    )

    with torch.no_grad():
        terms = {
            split: result.loss.terms(result.model, result.guide, x)
            for split, x in (("train", train), ("validation", valid))
        }
        locs, _ = result.guide.encode(valid)
    active = describe(terms, pe.active_units(result.model, result.guide, valid)["z"])
    print(f"\n{result.diagnosis}")

    trust = pe.pareto_k(result.model, result.guide, valid, num_samples=4000)
    print(f"\n{trust}")
    data = pe.to_arviz(result.model, result.guide, valid, num_samples=400, history=result.history)
    data.to_netcdf(str(out / "posterior.nc"))
    draw(result, valid, out / "quickstart.png")
    print(f"\nwritten to {out}/: posterior.nc (ArviZ), history.nc, quickstart.png, best.ckpt and last.ckpt")

    shuffled = np.random.default_rng(0).permutation(len(valid))
    with torch.no_grad():
        right = result.model.decoder(locs).sigmoid()
    own = torch.distributions.Binomial(16, right).log_prob(valid).sum(-1)
    other = torch.distributions.Binomial(16, right[shuffled]).log_prob(valid).sum(-1)
    assert (own > other).float().mean() > 0.95, "an image must be more likely under its own code"
    assert active >= 4, "the model must use its latent space"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    main(parser.parse_args().out)
