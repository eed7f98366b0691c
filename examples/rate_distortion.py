"""Trace the curve of rate against distortion by fitting at many β.

Rate is what a code of the datum costs, distortion what the code fails to say; both are nats per datum. Training with
the weight β on the rate looks for the point of the curve whose slope is -β. For the linear-Gaussian model with a known
decoder the curve is known in closed form, and the script compares nine trained encoders with it. For 8 x 8 digits,
encoder and decoder are trained together at each β, and the curve is what the fits say.

Run with ``python -m examples.rate_distortion``; figure and points are saved to ``runs/rate_distortion/``. An
interrupted run continues.
"""

import argparse
import importlib.util
from functools import partial
from pathlib import Path

import torch
import xarray
from jaxtyping import Float
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_elbo as pe
from models.linear_gaussian import LinearGaussian, LinearGuide, simulate
from models.sequences import digits
from models.vae import VAEGuide, VAEModel

LINEAR = (0.25, 0.4, 0.6, 0.8, 1.0, 1.5, 2.5, 4.0, 8.0)
DIGITS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


def fit_linear(model: LinearGaussian, x: Float[Tensor, "n d"], epochs: int, beta: float) -> pe.FitResult:
    """Train a linear encoder for the known decoder, whose columns are orthogonal: the posterior is diagonal."""
    return pe.fit(
        model,
        LinearGuide(*model.weight.shape, full=False),
        x,
        loss=pe.TraceBeta_ELBO(beta=beta),
        lr=0.1,
        scheduler=partial(CosineAnnealingLR, T_max=epochs),
        batch_size=None,
        max_epochs=epochs,
        progress=False,
    )


def fit_digits(train: Float[Tensor, "n 64"], test: Float[Tensor, "m 64"], epochs: int, beta: float) -> pe.Terms:
    """Train a VAE, and return its terms on images that it has not seen."""
    warmup = pe.LinearWarmup(min(beta, 0.1), beta, steps=epochs * len(train) // 128 // 3)
    result = pe.fit(
        VAEModel(),
        VAEGuide(),
        train,
        loss=pe.TraceBeta_ELBO(beta=warmup),
        lr=3e-3,
        max_epochs=epochs,
        progress=False,
    )
    loss = pe.TraceBeta_ELBO(beta=beta, num_particles=20, vectorize_particles=True)
    with torch.no_grad():
        return loss.terms(result.model, result.guide, test)


def exact_curve(model: LinearGaussian, x: Float[Tensor, "n d"], betas: Tensor) -> Float[Tensor, "betas 2"]:
    return torch.stack([torch.stack(model.rate_distortion(beta, x)) for beta in betas.tolist()])


def largest_error(points: xarray.Dataset, model: LinearGaussian, x: Float[Tensor, "n d"]) -> float:
    """Return the largest relative error of a rate or a distortion."""
    exact = exact_curve(model, x, torch.tensor(points.beta.values))
    found = torch.tensor(points[["rate", "distortion"]].to_array().values).T
    return (found / exact - 1).abs().max().item()


def draw(linear: pe.RateDistortion, exact: Tensor, images: pe.RateDistortion, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
    linear.plot(left)
    left.plot(*exact.T, color="#4f8f5b", lw=1, zorder=0, label="exact curve")
    left.set_title("linear-Gaussian model, known decoder")
    left.legend(frameon=False, fontsize=8)
    images.plot(right).set_title("held-out digits, trained decoders")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(out: Path, *, num_workers: int = 2, smoke_test: bool = False) -> None:
    model, x = simulate(1000, d=4, k=2, orthogonal=True)
    epochs = 40 if smoke_test else 400
    places = {"num_workers": num_workers, "progress": not smoke_test, "overwrite": smoke_test}
    linear = pe.sweep(partial(fit_linear, model, x, epochs), LINEAR, num_samples=50, dir=out / "linear", **places)
    curve = pe.rate_distortion(linear, entropy=-model.log_evidence(x).mean().item())
    print("Linear-Gaussian model\n", curve, "\n", sep="")

    images = digits().flatten(1)[torch.randperm(1797, generator=torch.Generator().manual_seed(0))]
    train, test = images[:1400], images[1400:]
    epochs, betas = (2, DIGITS[::4]) if smoke_test else (60, DIGITS)
    points = pe.sweep(partial(fit_digits, train, test, epochs), betas, dir=out / "digits", **places)
    held_out = pe.rate_distortion(points)
    print("Held-out digits\n", held_out, "\n", sep="")

    linear.to_netcdf(out / "linear.nc", engine="h5netcdf")
    points.to_netcdf(out / "digits.nc", engine="h5netcdf")
    if importlib.util.find_spec("matplotlib") is not None:
        grid = torch.logspace(-0.7, 1.0, 60, dtype=torch.float64)
        draw(curve, exact_curve(model, x, grid), held_out, out / "rate_distortion.png")
    error = largest_error(linear, model, x)
    print(f"claim: all {len(LINEAR)} points lie on the exact curve; the largest error is {error:.2%}")
    assert smoke_test or error < 0.01, f"rate and distortion must be within 1 %, got {error:.2%}"
    assert (points.rate.diff("beta") < 0).all(), "the rate must fall with β"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rate_distortion"))
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--smoke-test", action="store_true", help="few epochs, and a claim to match")
    args = parser.parse_args()
    main(args.out, num_workers=args.num_workers, smoke_test=args.smoke_test)
