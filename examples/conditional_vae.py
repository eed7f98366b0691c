"""Read the label of an image from the ELBO alone, and write a digit in the style of another.

A conditional VAE learns how the images of each class vary. Offered a wrong label it must explain, say, a 3 as an 8, and
the bound on log p(image, label) falls by so many nats. The script tables that drop for every true and offered label,
infers the labels of test images as those of the highest bound (no classifier is trained), and re-renders images as
other classes in their own style.

Without ``--data`` the images are the 8 x 8 digits of scikit-learn. ``--data fashion_mnist_20k.npz`` reads an archive of
``x_train``, ``y_train``, ``x_test`` and ``y_test`` (bytes, n x height x width, and labels from 0). Run with
``python -m examples.conditional_vae``; figure, history and posterior are saved to ``runs/conditional_vae/``.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import torch
from jaxtyping import Float, Int
from torch import Tensor

import pyro_elbo as pe
from models.conditional_vae import ConditionalVAE
from models.sequences import digits

FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


class Images(NamedTuple):
    """Labeled images as counts from 0 to ``total``, one row an image."""

    x: Float[Tensor, "n pixels"]
    c: Int[Tensor, " n"]


class Problem(NamedTuple):
    """Data, size of the model, plan of training, and the share of test labels that the bound must read."""

    train: Images
    test: Images
    names: tuple[str, ...]
    total: int
    z_dim: int
    epochs: int
    least: float


def load(data: Path | None, seed: int, quick: bool) -> Problem:
    """Return the bundled digits, split at random, or the archive with its own split."""
    if data is None:
        from sklearn.datasets import load_digits

        x, c = digits().flatten(1), torch.tensor(load_digits().target)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        train, test = (Images(x[rows], c[rows]) for rows in (order[:1400], order[1400:]))
        names = tuple(str(c) for c in range(10))
        return Problem(train, test, names, total=16, z_dim=4, epochs=30 if quick else 150, least=0.8 if quick else 0.95)
    train, test = read(data, "train", 2000 if quick else None), read(data, "test", 500 if quick else None)
    return Problem(train, test, FASHION, total=4, z_dim=6, epochs=5 if quick else 15, least=0.5 if quick else 0.75)


def read(path: Path, split: str, rows: int | None) -> Images:
    """Read one split of the archive; bytes become counts from 0 to 4, as coarse as a binomial likelihood needs."""
    with np.load(path, allow_pickle=False) as data:
        x, c = data[f"x_{split}"][:rows], data[f"y_{split}"][:rows]
    counts = np.round(4 / 255 * x.reshape(len(x), -1))
    return Images(torch.tensor(counts, dtype=torch.float32), torch.tensor(c.astype(np.int64)))


def train(problem: Problem, out: Path, seed: int, compile: bool) -> tuple[ConditionalVAE, pe.FitResult]:
    torch.manual_seed(seed)  # for the initial weights; pe.fit has its own seed
    images = problem.train
    vae = ConditionalVAE(images.x.shape[1], z_dim=problem.z_dim, total=problem.total)
    steps = problem.epochs * len(images.x) // 128
    result = pe.fit(
        vae.model,
        vae.guide,
        tuple(images),
        loss=pe.TraceBeta_ELBO(beta=pe.LinearWarmup(0.1, 1.0, steps=steps // 3)),
        lr=5e-3,
        max_epochs=problem.epochs,
        batch_size=128,
        dir=out,
        overwrite=True,
        seed=seed,
        compile=compile,
    )
    return vae, result


def report(drops: Float[Tensor, "classes classes"], names: tuple[str, ...]) -> None:
    """Print by how many nats the bound falls from the true label (line) to the offered one (column)."""
    print("\nnats lost per test image by a wrong label (line: true label, column: offered label)")
    print(" " * 10 + "".join(f"{name[:7]:>8}" for name in names))
    for name, line in zip(names, drops.tolist(), strict=True):
        print(f"{name:>10}" + "".join(f"{drop:8.1f}" for drop in line))


def average_drops(bounds: Float[Tensor, "n classes"], c: Int[Tensor, " n"]) -> Float[Tensor, "classes classes"]:
    """Average the bound of the true label less that of each offered label over the images of each class."""
    drops = bounds.gather(1, c[:, None]) - bounds
    return torch.stack([drops[c == true].mean(0) for true in range(bounds.shape[1])])


def restyled(vae: ConditionalVAE, images: Images) -> Float[Tensor, "n classes pixels"]:
    """Re-render every image as every class in its own style: mean counts."""
    n, classes = len(images.c), vae.classes
    x, c = images.x.repeat_interleave(classes, 0), images.c.repeat_interleave(classes)
    return vae.restyle(x, c, torch.arange(classes).repeat(n)).unflatten(0, (n, classes))


def strongest_styles(vae: ConditionalVAE, images: Images) -> Int[Tensor, " classes"]:
    """Return the row of each class whose z lies farthest from the prior's mean, in its standard deviations."""
    with torch.no_grad():
        style = (vae.encode(*images)[0] - vae.prior(images.c)[0]) / vae.prior(images.c)[1]
    return torch.stack([style.norm(dim=1).where(images.c == c, -1.0).argmax() for c in range(vae.classes)])


def draw(drops: Tensor, shown: Images, rendered: Tensor, problem: Problem, path: Path) -> None:
    """Plot the table of drops, and one image of each class with its renderings as every class."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.05])
    upright = {"rotation": 0 if len(problem.names[0]) == 1 else 90}
    ax = left.subplots()
    ax.imshow(drops.numpy(), cmap="Blues", vmin=0)
    ax.set(xlabel="offered label", ylabel="true label", title="ELBO lost per test image by a wrong label (nats)")
    ax.set_xticks(range(len(drops)), problem.names, **upright)
    ax.set_yticks(range(len(drops)), problem.names)
    for (true, offered), drop in np.ndenumerate(drops.numpy()):
        color = "white" if drop > drops.max() / 2 else "black"
        ax.text(offered, true, f"{drop:.0f}", ha="center", va="center", color=color, fontsize=8)

    side = round(shown.x.shape[1] ** 0.5)
    axes = right.subplots(len(drops), 1 + len(drops))
    for line, c, image, images in zip(axes, shown.c, shown.x, rendered, strict=True):
        for ax, pixels in zip(line, (image, *images), strict=True):
            ax.imshow(pixels.reshape(side, side).numpy(), cmap="gray_r", vmin=0, vmax=problem.total)
            ax.set(xticks=[], yticks=[])
        line[1 + c].spines[:].set(edgecolor="#b3452c", linewidth=2.5)
    for ax, title in zip(axes[0], ("image", *problem.names), strict=True):
        ax.set_title(title, fontsize=9, **upright)
    right.suptitle("test images, and their style as every class (red: their own)")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(data: Path | None, out: Path, *, seed: int = 0, smoke_test: bool = False) -> None:
    problem = load(data, seed, smoke_test)
    vae, result = train(problem, out, seed, compile=data is not None and not smoke_test)

    pyro.set_rng_seed(seed)
    x, c = problem.test
    bounds = vae.elbo_per_label(x)
    drops = average_drops(bounds, c)
    report(drops, problem.names)
    right = (bounds.argmax(1) == c).float().mean().item()

    some = Images(x[:100], c[:100])
    rendered = restyled(vae, some)
    targets = torch.arange(vae.classes).repeat(len(some.c))
    read_back = (vae.elbo_per_label(rendered.flatten(0, 1).round()).argmax(1) == targets).float().mean().item()

    exported = pe.to_arviz(vae.model, vae.guide, x[:100], c[:100], num_samples=200, history=result.history)
    exported.to_netcdf(str(out / "posterior.nc"))
    if importlib.util.find_spec("matplotlib") is not None:
        rows = strongest_styles(vae, some)
        draw(drops, Images(some.x[rows], some.c[rows]), rendered[rows], problem, out / "conditional_vae.png")
    print(f"\nwritten to {out}/: " + ", ".join(sorted(path.name for path in out.iterdir())))

    own = bounds.gather(1, c[:, None]).mean()
    print(
        f"ELBO {own:.1f} nats per test image; the true label has the highest for {right:.1%} of {len(c)} images; "
        f"{read_back:.1%} of re-rendered images are read as their new class"
    )
    assert right >= problem.least, f"the ELBO must read {problem.least:.0%} of the labels, got {right:.1%}"
    assert smoke_test or read_back > 0.9, f"a re-rendered image must look like its new class, got {read_back:.1%}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="labeled images, such as fashion_mnist_20k.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/conditional_vae"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="few epochs, and a claim to match")
    args = parser.parse_args()
    main(args.data, args.out, seed=args.seed, smoke_test=args.smoke_test)
