"""What does an autoencoder lack that reconstructs better than a VAE? Its bound says it in nats.

A deterministic autoencoder of handwritten digits learns to reconstruct, in plain PyTorch. After training it gets a
prior and a posterior around its codes, and with them an ELBO: at a stated width of the posterior, close to a point, and
at the width of the largest bound. A VAE of the same networks stands beside it. The autoencoder reconstructs better, but
its codes cost many more nats than they save, so its bound is lower. Nothing keeps its codes together, and what it
decodes from a draw of the prior, or halfway between two codes, is less of a digit. Two judges that know images alone
say so: the distance to the nearest held-out image, and how sure a classifier of digits is.

Every figure is a mean over seeds (split of the data, initial weights, order of batches) with its 95 % interval. Run
with ``python -m examples.autoencoder``; figure and posteriors are saved to ``runs/autoencoder/``. Needs
``pip install 'pyro-elbo[plot,probe]'``; without matplotlib it leaves the figure out.
"""

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from scipy.stats import t as student
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor

import pyro_elbo as pe
from models.autoencoder import Autoencoder, PostHoc, around_codes, best_width
from models.autoencoder import train as train_autoencoder
from models.vae import VAEGuide, VAEModel

TOTAL, Z_DIM = 16, 32
NARROW = 0.01  # standard deviations of the codes: the stated width
LOSS = pe.TraceBeta_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
PARTS = ("distortion", "rate", "elbo")
COLORS = {"autoencoder": "#b3452c", "VAE": "#1f5fa8"}


class Digits(NamedTuple):
    """Images as counts from 0 to 16 and their classes: rows to train on, and rows to judge by."""

    x: Float[Tensor, "n 64"]
    c: Int[Tensor, " n"]
    x_test: Float[Tensor, "m 64"]
    c_test: Int[Tensor, " m"]


class Coder(NamedTuple):
    """One of the two: its programs, the code of a row, the mean image of a code, and the prior of codes."""

    model: Callable
    guide: Callable
    encode: Callable[[Tensor], Tensor]
    render: Callable[[Tensor], Tensor]
    prior: dist.Normal

    def per_image(self, x: Float[Tensor, "n 64"]) -> dict[str, float]:
        """Return distortion, rate and bound in nats per image."""
        with torch.no_grad():
            terms = LOSS.terms(self.model, self.guide, x).per_datum
        return {part: getattr(terms, part).item() for part in PARTS}


def split(seed: int) -> Digits:
    """Split the digits of scikit-learn at random."""
    digits = load_digits()
    x, c = torch.tensor(digits.data, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return Digits(x[order[:1400]], c[order[:1400]], x[order[1400:]], c[order[1400:]])


def likelihood(logits: Tensor) -> dist.TorchDistribution:
    return dist.Binomial(TOTAL, logits=logits).to_event(1)


def fit_autoencoder(digits: Digits, epochs: int, seed: int) -> PostHoc:
    """Train an autoencoder on reconstruction and put a posterior of the stated width around its codes."""
    torch.manual_seed(seed)
    net = Autoencoder(z_dim=Z_DIM)
    train_autoencoder(net, digits.x / TOTAL, epochs=epochs, lr=5e-3, seed=seed)
    return around_codes(lambda x: net.encoder(x / TOTAL), net.decoder, likelihood, digits.x, NARROW)


def fit_vae(digits: Digits, epochs: int, seed: int) -> Coder:
    """Train a VAE of the same networks, for as many epochs."""
    pyro.clear_param_store()
    torch.manual_seed(seed)  # for the initial weights; pe.fit has its own seed
    model, guide = VAEModel(z_dim=Z_DIM), VAEGuide(z_dim=Z_DIM)
    pe.fit(model, guide, digits.x, lr=5e-3, max_epochs=epochs, seed=seed, progress=False)
    prior = dist.Normal(torch.zeros(Z_DIM), torch.ones(Z_DIM))
    return Coder(model, guide, lambda x: guide.encode(x)[0], lambda z: model.decoder(z).sigmoid(), prior)


def as_coder(programs: PostHoc) -> Coder:
    prior = dist.Normal(programs.loc, programs.scale)
    return Coder(programs.model, programs.guide, programs.encode, lambda z: programs.decode(z).sigmoid(), prior)


@torch.no_grad()
def images(coder: Coder, digits: Digits, seed: int) -> dict[str, Float[Tensor, "m 64"]]:
    """Render draws of the prior, and the points halfway between the codes of test images of two classes."""
    pyro.set_rng_seed(seed)
    codes, other = coder.encode(digits.x_test), torch.randperm(len(digits.x_test))
    apart = digits.c_test != digits.c_test[other]
    halfway = (codes + codes[other])[apart] / 2
    return {"samples": coder.render(coder.prior.sample((len(codes),))), "midpoints": coder.render(halfway)}


class Judges(NamedTuple):
    """What knows images alone: held-out images, and a classifier of digits."""

    held_out: Float[Tensor, "m 64"]
    classifier: RandomForestClassifier

    def distance(self, x: Float[Tensor, "n 64"]) -> float:
        """Return the mean Euclidean distance to the nearest held-out image, intensities from 0 to 1."""
        return torch.cdist(x, self.held_out).amin(1).mean().item()

    def certainty(self, x: Float[Tensor, "n 64"]) -> float:
        """Return the mean probability that the classifier gives its answer."""
        return self.classifier.predict_proba(x.numpy()).max(1).mean().item()


class Fits(NamedTuple):
    """Both models of one seed: the autoencoder at the stated and at the best width, and the VAE."""

    digits: Digits
    narrow: PostHoc
    wide: PostHoc
    vae: Coder

    def coders(self) -> dict[str, Coder]:
        """Return all three by name."""
        return {f"width {NARROW}": as_coder(self.narrow), "best width": as_coder(self.wide), "VAE": self.vae}


def fit(seed: int, epochs: int) -> Fits:
    digits = split(seed)
    narrow = fit_autoencoder(digits, epochs, seed)
    return Fits(digits, narrow, replace(narrow, width=best_width(narrow, digits.x)), fit_vae(digits, epochs, seed))


def measure(fits: Fits, seed: int) -> dict[str, dict[str, float]]:
    """Return the terms and the judges' figures of each coder; the width does not change what is decoded."""
    x, c, x_test, _ = fits.digits
    judges = Judges(x_test / TOTAL, RandomForestClassifier(200, random_state=seed).fit(x / TOTAL, c))
    rows = {}
    for name, coder in fits.coders().items():
        pyro.set_rng_seed(seed)
        rows[name] = coder.per_image(x_test)
        for kind, shown in images(coder, fits.digits, seed).items():
            rows[name] |= {f"{kind}, distance": judges.distance(shown), f"{kind}, certainty": judges.certainty(shown)}
    return rows


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the mean over seeds and the half width of its 95 % interval by Student's t."""
    n = len(values)
    return float(values.mean()), float(student.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5)


def report(found: list[dict[str, dict[str, float]]]) -> dict[str, tuple[float, float]]:
    """Print every figure; return the VAE's less those of the autoencoder at its best width, with half widths."""
    names, differences = list(found[0]), {}
    print(f"means over {len(found)} seeds ± half of a 95 % interval: nats per test image, distance of intensities")
    print(f"{'':22}" + "".join(f"{name:>18}" for name in (*names, "VAE - best width")))
    for figure in found[0]["VAE"]:
        values = {name: np.array([rows[name][figure] for rows in found]) for name in names}
        differences[figure] = interval(values["VAE"] - values["best width"])
        columns = [*(interval(x) for x in values.values()), differences[figure]]
        print(f"{figure:22}" + "".join(f"{mean:10.2f} ± {half:<5.2f}" for mean, half in columns))
    return differences


def draw(fits: Fits, path: Path) -> None:
    """Plot both models in the plane of rate and distortion, draws of their priors, and walks between two images."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.3])
    draw_plane(left.subplots(), fits)
    samples, walks = right.subfigures(2, 1)
    pyro.set_rng_seed(0)
    coders = {"autoencoder": as_coder(fits.wide), "VAE": fits.vae}
    show(samples, {name: coder.render(coder.prior.sample((24,))) for name, coder in coders.items()}, 12)
    samples.suptitle("draws of the prior")
    show(walks, {name: walk(coder, fits.digits) for name, coder in coders.items()}, 12)
    walks.suptitle("from the code of one held-out image to that of another")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_plane(ax: "matplotlib.axes.Axes", fits: Fits) -> None:
    """Plot the autoencoder over widths, its two widths, and the VAE, with a line of equal bound through each."""
    widths = np.geomspace(0.003, 1.0, 12)
    curve = [as_coder(replace(fits.wide, width=float(w))).per_image(fits.digits.x_test) for w in widths]
    ax.plot(*zip(*((row["rate"], row["distortion"]) for row in curve), strict=True), color=COLORS["autoencoder"])
    for name, coder in fits.coders().items():
        row = coder.per_image(fits.digits.x_test)
        color = COLORS.get(name, COLORS["autoencoder"])
        ax.plot(row["rate"], row["distortion"], "o", color=color)
        ax.axline((0, -row["elbo"]), slope=-1, color=color, lw=0.7, ls=":")
        label, offset = f"{name}: ELBO {row['elbo']:.0f}", (-36, -28) if name == "VAE" else (8, 8)
        ax.annotate(label, (row["rate"], row["distortion"]), offset, textcoords="offset points")
    ax.set(xlim=(0, 1.1 * curve[0]["rate"]), ylim=(0.7 * curve[0]["distortion"], 2.5 * curve[0]["distortion"]))
    ax.set(xlabel="rate, nats per test image", ylabel="distortion, nats per test image")
    ax.set_title("autoencoder over posterior width; dotted: equal ELBO")
    ax.spines[["top", "right"]].set_visible(False)


@torch.no_grad()
def walk(coder: Coder, digits: Digits) -> Float[Tensor, "24 64"]:
    """Decode 12 equal steps between the codes of two images, of a 0 and a 1, and of a 3 and a 4."""
    first = torch.stack([digits.x_test[digits.c_test == c][0] for c in (0, 3, 1, 4)])
    start, end = coder.encode(first).chunk(2)
    steps = torch.linspace(0, 1, 12)[:, None]
    return torch.cat([coder.render(a + steps * (b - a)) for a, b in zip(start, end, strict=True)])


@torch.no_grad()
def show(figure: "matplotlib.figure.SubFigure", rendered: dict[str, Tensor], columns: int) -> None:
    """Draw the images of each coder in two lines."""
    axes = figure.subplots(4, columns)
    for lines, (name, x) in zip((axes[:2], axes[2:]), rendered.items(), strict=True):
        for ax, image in zip(lines.flat, x, strict=True):
            ax.imshow(image.reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        lines[0, 0].set_ylabel(name, rotation=0, ha="right", va="top", color=COLORS[name])


def main(out: Path, *, seeds: int = 5, smoke_test: bool = False) -> None:
    found = []
    for seed in range(2 if smoke_test else seeds):
        fits = fit(seed, epochs=40 if smoke_test else 100)
        found.append(measure(fits, seed))
        print(f"seed {seed}: best width {fits.wide.width:.3f}")
    differences = report(found)

    out.mkdir(parents=True, exist_ok=True)
    for name, coder in (("autoencoder", as_coder(fits.wide)), ("vae", fits.vae)):
        data = pe.to_arviz(coder.model, coder.guide, fits.digits.x_test, num_samples=100)
        data.to_netcdf(str(out / f"{name}.nc"))
    if importlib.util.find_spec("matplotlib") is not None:
        draw(fits, out / "autoencoder.png")
    print(f"written to {out}/: autoencoder.nc and vae.nc (ArviZ), autoencoder.png")
    check(differences, found)


def check(differences: dict[str, tuple[float, float]], found: list[dict[str, dict[str, float]]]) -> None:
    """Check that every difference has the sign of the claim, with 0 outside of its interval.

    Two seeds and few epochs must show the signs alone, and no difference between midpoints.
    """
    full = len(found) > 2
    better = ("distortion", "elbo", "samples, certainty", "midpoints, certainty")  # the VAE's figure is the larger one
    for figure, (mean, half) in differences.items():
        if "midpoints" in figure and not full:
            continue
        sign, half = 1 if figure in better else -1, half if full else 0.0
        assert sign * mean > half, (
            f"{figure}: expected a {'positive' if sign > 0 else 'negative'} difference, got {mean:.2f} ± {half:.2f}"
        )
    rate = np.mean([rows["best width"]["rate"] / rows["VAE"]["rate"] for rows in found])
    print(
        f"claim: over {len(found)} seeds the autoencoder's distortion is {differences['distortion'][0]:.1f} nats lower "
        f"and its rate {rate:.1f} times as large, its ELBO {differences['elbo'][0]:.1f} ± {differences['elbo'][1]:.1f} "
        f"nats lower; its {'samples and midpoints' if full else 'samples'} lie farther from real digits and are read "
        "with less certainty"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/autoencoder"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--smoke-test", action="store_true", help="two seeds, few epochs")
    args = parser.parse_args()
    main(args.out, seeds=args.seeds, smoke_test=args.smoke_test)
