"""Read digits from a hundred labels: the other images teach the classifier through the bound.

Of 1400 images 100 have a label, ten a class. A semi-supervised autoencoder averages the bound of the other 1300 over
the classes that its classifier holds for possible, exactly. Beside it the same classifier is trained on the hundred
labels alone. The script tables both accuracies on 397 test images for three splits, draws digits of every class in
fixed styles, and exports draws of class and style.

The images are the 8 x 8 digits of scikit-learn. Run with ``python -m examples.ss_vae_digits``; figure, history and
posterior are saved to ``runs/ss_vae_digits/``.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import NamedTuple

import pyro
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pyro_elbo as pe
from models.fair_vae import layers
from models.sequences import digits
from models.ss_vae import SSVAE, UNKNOWN

CLASSES, PER_CLASS, TOTAL = 10, 10, 16
BETA = 4.0  # pixels of a stroke are not independent given z: a bound at a temperature trusts them less


class Images(NamedTuple):
    """Images as counts from 0 to 16, their classes, and the labels that training sees."""

    x: Float[Tensor, "n pixels"]
    y: Int[Tensor, " n"]
    label: Int[Tensor, " n"]


class Outcome(NamedTuple):
    """Accuracies on the test images, and what was trained."""

    supervised: float
    semi_supervised: float
    vae: SSVAE
    result: pe.FitResult


def load(seed: int) -> tuple[Images, Images]:
    """Return 1400 images, of which the first ten of each class keep their label, and 397 others."""
    from sklearn.datasets import load_digits

    x, y = digits().flatten(1), torch.tensor(load_digits().target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1400], order[1400:]
    label = torch.full((len(train),), UNKNOWN)
    for c in range(CLASSES):
        label[(y[train] == c).nonzero()[:PER_CLASS, 0]] = c
    return Images(x[train], y[train], label), Images(x[test], y[test], torch.full((len(test),), UNKNOWN))


def accuracy(logits: Float[Tensor, "n classes"], images: Images) -> float:
    return (logits.argmax(1) == images.y).float().mean().item()


def supervised(train: Images, steps: int) -> nn.Module:
    """Return the classifier of the autoencoder, trained on the rows with a label alone."""
    known = train.label != UNKNOWN
    classifier = layers(train.x.shape[1], 128, CLASSES)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(classifier(train.x[known] / TOTAL), train.label[known]).backward()
        optimizer.step()
    return classifier


def run(seed: int, epochs: int, out: Path, compile: bool) -> Outcome:
    train, test = load(seed)
    torch.manual_seed(seed)
    classifier = supervised(train, steps=500)
    torch.manual_seed(seed)
    pyro.clear_param_store()  # it would hand the parameters of the split before to this one
    vae = SSVAE(train.x.shape[1], CLASSES, z_dim=32, total=TOTAL, alpha=100.0)
    result = pe.fit(
        vae.model,
        vae.guide,
        (train.x, train.label),
        loss=pe.TraceBeta_ELBO(beta=BETA),
        lr=3e-3,
        max_epochs=epochs,
        batch_size=128,
        dir=out / f"seed_{seed}",
        overwrite=True,
        seed=seed,
        compile=compile,
        progress=False,
    )
    q = result.terms(test.x).posterior["y"]
    return Outcome(accuracy(classifier(test.x / TOTAL), test), accuracy(q, test), vae, result)


def styles(vae: SSVAE, rows: int) -> Float[Tensor, "rows classes pixels"]:
    """Return mean images of every class in styles drawn from the prior, one style a row."""
    z = torch.randn(rows, 1, vae.z_dim, generator=torch.Generator().manual_seed(0)).expand(-1, CLASSES, -1)
    with torch.no_grad():
        return TOTAL * vae.decode(z, torch.arange(CLASSES)).sigmoid()


def draw(outcomes: list[Outcome], path: Path) -> None:
    """Plot both accuracies of each split, the bound over epochs, and digits of every class in fixed styles."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 3.9), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.35, 1])
    accuracies, bound = left.subplots(1, 2)
    for outcome in outcomes:
        accuracies.plot([0, 1], outcome[:2], marker="o", color="#2b5c8a")
        history = outcome.result.history
        bound.plot(history.epoch, history.elbo.sel(split="train"), color="#2b5c8a", linewidth=1.5)
    accuracies.set_xticks([0, 1], ["100 labels", "and 1300 images"])
    accuracies.set(xlim=(-0.3, 1.3), ylabel="accuracy on test images", title="a line for each split")
    bound.set(xlabel="epoch", ylabel="ELBO (nats per image)", title="training")
    images = styles(outcomes[0].vae, rows=5)
    axes = right.subplots(len(images), CLASSES)
    for line, row in zip(axes, images, strict=True):
        for ax, pixels in zip(line, row, strict=True):
            ax.imshow(pixels.reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=TOTAL)
            ax.set(xticks=[], yticks=[])
    right.suptitle("drawn: one style a line, one class a column")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(out: Path, *, smoke_test: bool = False) -> None:
    out.mkdir(parents=True, exist_ok=True)
    seeds, epochs, least = (1, 15, 0.8) if smoke_test else (3, 60, 0.9)
    outcomes = [run(seed, epochs, out, compile=not smoke_test) for seed in range(seeds)]

    print("accuracy on 397 test images")
    print(f"{'split':>7}{'100 labels alone':>20}{'with 1300 images':>20}{'ELBO':>10}")
    for seed, outcome in enumerate(outcomes):
        elbo = outcome.result.history.elbo.sel(split="train").values[-1]
        print(f"{seed:>7}{outcome.supervised:>20.1%}{outcome.semi_supervised:>20.1%}{elbo:>10.1f}")

    first, test = outcomes[0], load(0)[1]
    exported = pe.to_arviz(
        first.vae.model, first.vae.guide, test.x[:100], num_samples=200, history=first.result.history
    )
    exported.to_netcdf(str(out / "posterior.nc"))
    if importlib.util.find_spec("matplotlib") is not None:
        draw(outcomes, out / "ss_vae_digits.png")
    print(f"written to {out}/: " + ", ".join(sorted(path.name for path in out.iterdir())))

    alone = sum(o.supervised for o in outcomes) / len(outcomes)
    together = sum(o.semi_supervised for o in outcomes) / len(outcomes)
    worst = min(o.semi_supervised for o in outcomes)
    print(f"claim: accuracy {together:.1%} with the images that have no label, {alone:.1%} without; worst {worst:.1%}")
    assert worst >= least, f"100 labels must suffice for {least:.0%}, got {worst:.1%}"
    assert smoke_test or together > alone, f"images without a label must help, got {together:.1%} and {alone:.1%}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ss_vae_digits"))
    parser.add_argument("--smoke-test", action="store_true", help="one split and few epochs")
    args = parser.parse_args()
    main(args.out, smoke_test=args.smoke_test)
