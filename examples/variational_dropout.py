"""How few weights does a classifier need, and does it know when it does not know?

A network with a log-uniform prior on each weight (variational dropout) learns to read handwritten digits, and to tell
malignant from benign tumors. While β grows from 0 to 1, the KL turns most weights into noise. They are pruned, and the
rest must classify held-out rows as well as before. The script then looks at the uncertainty of the digits' classifier:
are 90 % of its answers right where it is 90 % sure, and does it become less sure if the digits are rotated? It does,
several times more than the same network without a prior, but only up to 60 degrees. Beyond, digits light pixels that
are blank in training, and both networks are sure of a wrong answer.

The data are scikit-learn's digits and breast cancer. Run with ``python -m examples.variational_dropout``; files go to
``runs/variational_dropout/``. ``--data FILE.npz`` brings other data: arrays ``x`` (rows × columns) and ``y`` (classes
from 0). Needs ``pip install 'pyro-elbo[plot,probe]'``.
"""

import argparse
import importlib.util
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import torch
from jaxtyping import Float, Int
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

import pyro_elbo as pe
from models.variational_dropout import PRUNED, DropoutNet

ANGLES = range(0, 181, 15)
BATCH = 128


class Problem(NamedTuple):
    """Rows and their classes: 70 % to train on, the rest held out."""

    name: str
    x: Float[Tensor, "n columns"]
    y: Int[Tensor, " n"]
    x_test: Float[Tensor, "m columns"]
    y_test: Int[Tensor, " m"]
    hidden: int


def split(name: str, x: np.ndarray, y: np.ndarray, hidden: int, *, standardize: bool) -> Problem:
    """Shuffle and split the rows; mean and spread are those of the training rows."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    inputs, classes = torch.tensor(x, dtype=torch.float32)[order], torch.tensor(y, dtype=torch.int64)[order]
    n = int(0.7 * len(x))
    if standardize:
        spread = inputs[:n].std(0)
        inputs = (inputs - inputs[:n].mean(0)) / torch.where(spread > 0, spread, 1.0)
    return Problem(name, inputs[:n], classes[:n], inputs[n:], classes[n:], hidden)


def load(data: Path | None) -> list[Problem]:
    """Return scikit-learn's data, or those of a file."""
    if data is not None:
        with np.load(data, allow_pickle=False) as arrays:
            return [split(data.stem, arrays["x"], arrays["y"], 100, standardize=True)]
    digits, tumors = load_digits(), load_breast_cancer()
    return [
        split("digits", digits.data / 16, digits.target, 100, standardize=False),
        split("breast cancer", tumors.data, tumors.target, 50, standardize=True),
    ]


def train(problem: Problem, epochs: int, *, prior: bool, seed: int) -> tuple[DropoutNet, pe.FitResult]:
    """Fit a network. β rises to 1 during the first half; without ``prior`` it stays 0: weights cost nothing."""
    pyro.clear_param_store()
    torch.manual_seed(seed)  # for the initial weights; pe.fit has its own seed
    classes = int(problem.y.max()) + 1
    net = DropoutNet(problem.x.shape[1], problem.hidden, classes, size=len(problem.x))
    steps = epochs * math.ceil(len(problem.x) / BATCH)
    beta = pe.LinearWarmup(0.0, 1.0, steps=steps // 2) if prior else 0.0
    loss = pe.TraceBeta_ELBO(beta=beta, num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    options = {"lr": 0.01, "batch_size": BATCH, "max_epochs": epochs, "seed": seed, "progress": False}
    return net, pe.fit(net.model, net.guide, (problem.x, problem.y), loss=loss, **options)


def accuracy(probabilities: Float[Tensor, "m classes"], y: Int[Tensor, " m"]) -> float:
    return (probabilities.argmax(-1) == y).float().mean().item()


def entropy(probabilities: Float[Tensor, "m classes"]) -> float:
    """Return the mean entropy of predictions in nats."""
    return torch.special.entr(probabilities).sum(-1).mean().item()


class Calibration(NamedTuple):
    """Mean confidence and accuracy of the predictions in each bin of confidence, and how many these are."""

    confidence: np.ndarray
    accuracy: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, probabilities: Float[Tensor, "m classes"], y: Int[Tensor, " m"], bins: int = 10) -> "Calibration":
        """Sort predictions by their confidence into bins of one width."""
        confidence, answer = (t.numpy() for t in probabilities.max(-1))
        bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
        counts = np.bincount(bin_of, minlength=bins)
        sums = (np.bincount(bin_of, weights=w, minlength=bins) for w in (confidence, answer == y.numpy()))
        return cls(*(total / np.maximum(counts, 1) for total in sums), counts)

    @property
    def error(self) -> float:
        """The expected calibration error: the mean distance between confidence and accuracy."""
        return float(np.average(np.abs(self.confidence - self.accuracy), weights=self.counts))


def rotate(images: Float[Tensor, "m 64"], degrees: float) -> Float[Tensor, "m 64"]:
    """Rotate 8 x 8 images; what comes in from outside is blank."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    grid = affine_grid(torch.tensor([[[c, -s, 0], [s, c, 0]]]), [1, 1, 8, 8], align_corners=False)
    turned = grid_sample(images.view(-1, 1, 8, 8), grid.expand(len(images), -1, -1, -1), align_corners=False)
    return turned.flatten(1)


class Fitted(NamedTuple):
    """A problem with its network, and one that was trained without a prior."""

    problem: Problem
    net: DropoutNet
    free: DropoutNet

    def predictions(self, x: Float[Tensor, "m columns"]) -> dict[str, Float[Tensor, "m classes"]]:
        """Return p(y | x) of the network without a prior, and averaged over the posterior."""
        pyro.set_rng_seed(0)
        return {
            "no prior, mean weights": self.free.predict_at_mean(x, pruned=False),
            "variational dropout": self.net.predict(x),
        }


def report(fitted: Fitted, loss: pe.TraceBeta_ELBO) -> tuple[float, float]:
    """Print terms and accuracies; return the share of weights pruned and the accuracy lost by that."""
    problem, net, free = fitted
    with torch.no_grad():
        terms = loss.terms(net.model, net.guide, problem.x, problem.y)
    rates = ", ".join(f"{name} {kl.item():.1f}" for name, kl in terms.kl.items())
    print(f"\n{problem.name}: {len(problem.x)} rows to train on, {len(problem.x_test)} held out")
    print(f"  distortion {terms.per_datum.distortion:.3f} nats a row; KL in nats, 0 for pure noise: {rates}")
    kept, pruned = (accuracy(net.predict_at_mean(problem.x_test, pruned=p), problem.y_test) for p in (False, True))
    print(
        f"  weights pruned {net.pruned:.1%}; accuracy on held-out rows with all weights {kept:.4f}, pruned {pruned:.4f}"
    )
    for name, p in fitted.predictions(problem.x_test).items():
        error = Calibration.of(p, problem.y_test).error
        print(f"  {name:24} accuracy {accuracy(p, problem.y_test):.4f}, calibration error {error:.4f}")
    for angle in (0, 45, 90) if problem.name == "digits" else ():
        found = fitted.predictions(rotate(problem.x_test, angle)).items()
        print(f"  rotated by {angle} degrees: " + ", ".join(f"entropy {entropy(p):.2f} nats ({n})" for n, p in found))
    return net.pruned, kept - pruned


def draw(fitted: Fitted, path: Path) -> None:
    """Plot log α of the weights, the calibration on held-out rows, and for digits the entropy under rotation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    problem, images = fitted.problem, fitted.problem.name == "digits"
    figure, axes = plt.subplots(1, 3 if images else 2, figsize=(13 if images else 9, 4), layout="constrained")
    for i, weight in enumerate(fitted.net.weights):
        axes[0].hist(
            weight.log_alpha.detach().flatten().numpy(), np.linspace(-10, 25, 71), alpha=0.6, label=f"layer {i}"
        )
    axes[0].axvline(PRUNED, color="black", label="pruned beyond")
    axes[0].set(title=f"{problem.name}: {fitted.net.pruned:.1%} of weights are noise", xlabel="log α", ylabel="weights")
    axes[0].legend()
    for name, p in fitted.predictions(problem.x_test).items():
        found = Calibration.of(p, problem.y_test)
        used = found.counts > 0
        label = f"{name}, error {found.error:.3f}"
        axes[1].plot(found.confidence[used], found.accuracy[used], "o-", label=label)
    axes[1].plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
    axes[1].set(title="held-out rows", xlabel="confidence of the answer", ylabel="share of right answers")
    axes[1].set_ylim(-0.05, 1.35)
    axes[1].legend(loc="upper left")
    if images:
        draw_rotations(axes[2], fitted)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_rotations(ax: "matplotlib.axes.Axes", fitted: Fitted) -> None:
    turned = [fitted.predictions(rotate(fitted.problem.x_test, angle)) for angle in ANGLES]
    for name in turned[0]:
        ax.plot(ANGLES, [entropy(p[name]) for p in turned], "o-", label=name)
    right = [accuracy(p["variational dropout"], fitted.problem.y_test) for p in turned]
    ax.plot(ANGLES, right, color="0.6", linestyle="--", label="accuracy (a share)")
    ax.set(title="rotated digits", xlabel="angle, degrees", ylabel="entropy of the prediction, nats")
    ax.set(xticks=ANGLES[::2], ylim=(-0.05, 1.5))
    ax.legend(loc="upper left")


def main(data: Path | None, out: Path, *, seed: int = 0, smoke_test: bool = False) -> None:
    fits, outcomes = [], []
    for problem in load(data)[-1:] if smoke_test else load(data):
        net, result = train(problem, 80 if smoke_test else 120, prior=True, seed=seed)
        free, _ = train(problem, 40, prior=False, seed=seed)
        fits.append(Fitted(problem, net, free))
        outcomes.append(report(fits[-1], result.loss))

    out.mkdir(parents=True, exist_ok=True)
    (problem, net, _), dims = fits[0], {"weight_0": ["unit", "column"], "weight_1": ["class", "unit"]}
    posterior = pe.to_arviz(net.model, net.guide, problem.x_test, problem.y_test, num_samples=100, dims=dims, seed=seed)
    posterior.to_netcdf(str(out / "posterior.nc"))
    if importlib.util.find_spec("matplotlib") is not None:
        draw(fits[0], out / "variational_dropout.png")
    print(f"\nwritten to {out}/: posterior.nc (ArviZ), variational_dropout.png")

    for fitted, (pruned, lost) in zip(fits, outcomes, strict=True):
        name = fitted.problem.name
        assert pruned >= 0.9, f"{name}: at least 90 % of the weights must be pruned, got {pruned:.1%}"
        assert lost <= 0.01, f"{name}: pruning must cost at most 1 % of accuracy, costs {lost:.2%}"
    figures = (
        f"{f.problem.name} {p:.1%} pruned at {lost:.2%} lost" for f, (p, lost) in zip(fits, outcomes, strict=True)
    )
    print(f"claim: {'; '.join(figures)} (bounds 90 % and 1 %)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="other data: arrays x and y")
    parser.add_argument("--out", type=Path, default=Path("runs/variational_dropout"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="breast cancer alone, for fewer epochs")
    args = parser.parse_args()
    main(args.data, args.out, seed=args.seed, smoke_test=args.smoke_test)
