"""A variational recurrent network (VRNN) that reads digits row by row.

The 8 x 8 digits of scikit-learn, in black and white, are sequences of 8 frames of 8 pixels. The script trains a small
VRNN, prints the bound of every step, draws digits from the model, and completes digits from their upper half. Run with
``python -m examples.vrnn_digits``; the figure is saved to ``runs/vrnn_digits/``.
"""

import argparse
import importlib.util
from pathlib import Path

import pyro
import torch
from torch import Tensor

import pyro_elbo as pe
from models.sequences import digits
from models.vrnn import VRNN

ROWS = 8
INK = 7  # pixels above this count are black


def load(seed: int) -> tuple[Tensor, Tensor]:
    """Shuffle the bundled digits in black and white and split them into 1500 training and 297 held-out images."""
    images = (digits() > INK).float()
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]
    return images[:1500], images[1500:]


def independent_pixels(train: Tensor, held_out: Tensor) -> Tensor:
    """Return log p of each held-out row under independent pixels, each with its own frequency: nats, shape (8,)."""
    frequency = (train.sum(0) + 1) / (len(train) + 2)
    return torch.distributions.Bernoulli(frequency).log_prob(held_out).sum(-1).mean(0)


def per_step(loss: pe.TraceTimestep_ELBO, vrnn: VRNN, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-likelihood and KL of each step in nats, averaged over digits: shapes (8,)."""
    with torch.no_grad():
        terms = loss.terms(vrnn.model, vrnn.guide, x)
    return terms.log_likelihood["x"].mean(0), terms.kl["z"].mean(0)


def report(likelihood: Tensor, kl: Tensor, baseline: Tensor) -> None:
    print(f"\n{'nats per frame, held out':26}{'log p(x | z)':>14}{'KL':>8}{'bound':>8}{'independent pixels':>20}")
    for t in range(ROWS):
        print(f"  row {t:<20}{likelihood[t]:14.2f}{kl[t]:8.2f}{likelihood[t] - kl[t]:8.2f}{baseline[t]:20.2f}")
    bound = likelihood - kl
    print(f"  {'mean':24}{likelihood.mean():14.2f}{kl.mean():8.2f}{bound.mean():8.2f}{baseline.mean():20.2f}")


def draw(vrnn: VRNN, held_out: Tensor, path: Path) -> None:
    """Plot held-out digits, the same digits with a drawn lower half, and digits drawn from the model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seen = held_out[:10, : ROWS // 2]
    rows = {
        "held out": held_out[:10],
        "lower half drawn": torch.cat([seen, vrnn.forecast(seen, ROWS - ROWS // 2)], 1),
        "drawn": vrnn.generate(10, ROWS),
        "drawn ": vrnn.generate(10, ROWS),
    }
    figure, axes = plt.subplots(len(rows), 10, figsize=(9, 1 + len(rows)), layout="constrained")
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(line, images, strict=True):
            ax.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(out: Path, *, seed: int = 0, quick: bool = False) -> None:
    torch.manual_seed(seed)  # for the initial weights; pe.fit has its own seed
    train, held_out = load(seed)
    vrnn = VRNN(x_dim=ROWS, z_dim=4, hidden=32 if quick else 64)
    epochs = 8 if quick else 80
    beta = pe.LinearWarmup(0.1, 1.0, steps=6 * epochs)  # half of the training; a shorter warm-up lets z collapse
    loss = pe.TraceTimestep_ELBO(beta, normalize="frame")
    pe.fit(
        vrnn.model,
        vrnn.guide,
        train,
        held_out,
        loss=loss,
        lr=5e-3,
        max_epochs=epochs,
        seed=seed,
        dir=out,
        overwrite=True,
        grad_clip=10.0,
    )

    pyro.set_rng_seed(seed)
    likelihood, kl = per_step(loss, vrnn, held_out)
    baseline = independent_pixels(train, held_out)
    report(likelihood, kl, baseline)
    drawn = vrnn.generate(1000, ROWS)
    print(f"\nink in drawn digits {drawn.mean():.3f}, in real ones {held_out.mean():.3f}")
    if importlib.util.find_spec("matplotlib") is not None:
        draw(vrnn, held_out, out / "vrnn_digits.png")
        print(f"written to {out}/: vrnn_digits.png, history.nc, best.ckpt and last.ckpt")

    bound = (likelihood - kl).mean()
    assert bound > baseline.mean() + 0.2, "earlier rows must help to predict a digit"
    assert (drawn.mean() - held_out.mean()).abs() < 0.1, "drawn digits must have as much ink as real ones"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/vrnn_digits"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small network and few epochs")
    args = parser.parse_args()
    main(args.out, seed=args.seed, quick=args.quick)
