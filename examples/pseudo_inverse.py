"""How much of each dye is in a pixel? Spectral unmixing by an encoder that learns a pseudo-inverse.

Three fluorescent dyes with overlapping spectra A shine into eight channels: x = A z + noise of variance λ. The
pseudo-inverse of A gives the amounts z back if there is no noise, and amplifies the noise otherwise. A linear encoder
trained on the ELBO finds (AᵀA + λI)⁻¹Aᵀ, which trades one for the other, and gives a posterior with it. The script
trains one encoder for each of six λ and compares it with that formula. At the λ of the noise it also optimizes a
posterior for every new pixel by itself: the same answer, but how long does it take?

Run with ``python -m examples.pseudo_inverse``; files go to ``runs/pseudo_inverse/``. ``--data FILE.npz`` brings other
spectra and pixels: arrays ``weight`` (channels × dyes), ``x`` (pixels × channels) and ``noise`` (its variance).
"""

import argparse
import importlib.util
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import torch
from jaxtyping import Float
from torch import Tensor

import pyro_elbo as pe
from models.linear_gaussian import LinearGaussian
from models.pseudo_inverse import AmortizedGuide, GaussianGuide, PerDatumGuide

LAMBDAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


class Problem(NamedTuple):
    """Spectra A, pixels to train on and others to unmix, their true amounts if known, and the variance of the noise."""

    weight: Float[Tensor, "d k"]
    train: Float[Tensor, "n d"]
    test: Float[Tensor, "m d"]
    amounts: Float[Tensor, "m k"] | None
    noise: float

    def model(self, variance: float) -> LinearGaussian:
        """Return the model whose noise has this variance."""
        return LinearGaussian(self.weight, self.weight.new_zeros(len(self.weight)), variance**0.5)


def simulate(seed: int, n: int = 200, noise: float = 0.1) -> Problem:
    """Draw amounts z ~ Normal(0, I), measured from the mean of each dye, and pixels of three bell-shaped spectra."""
    generator = torch.Generator().manual_seed(seed)
    channels, peaks = torch.linspace(0, 1, 8).double(), torch.tensor([0.25, 0.45, 0.75]).double()
    weight = torch.exp(-0.5 * ((channels[:, None] - peaks) / 0.16) ** 2)
    z, e = (torch.randn(2 * n, k, generator=generator, dtype=torch.float64) for k in (3, 8))
    x = z @ weight.T + noise**0.5 * e
    return Problem(weight, x[:n], x[n:], z[n:], noise)


def load(path: Path) -> Problem:
    """Read a problem from a file; every second pixel is for training."""
    with np.load(path, allow_pickle=False) as data:
        weight, x, noise = (torch.tensor(data[name]).double() for name in ("weight", "x", "noise"))
    return Problem(weight, x[::2], x[1::2], None, noise.item())


def train(model: LinearGaussian, guide: GaussianGuide, x: Tensor, steps: int) -> pe.TraceBeta_ELBO:
    """Maximize the exact bound on the sigma points, with a learning rate that falls to a thousandth of its start."""
    pyro.clear_param_store()
    points = 2 * model.weight.shape[1]
    loss = pe.TraceBeta_ELBO(num_particles=points, vectorize_particles=True, max_plate_nesting=1)
    settings = {"lr": 0.2, "betas": (0.9, 0.9), "lrd": 1e-3 ** (1 / steps), "clip_norm": math.inf}
    optimizer = pyro.optim.ClippedAdam(settings)
    pe.SVI(model, guide, optimizer, loss).run(steps, x, progress=False)
    return loss


def sweep(problem: Problem, variances: tuple[float, ...], steps: int) -> dict[float, AmortizedGuide]:
    """Train an encoder for each λ and print its distance to the ridge formula and to the pseudo-inverse."""
    guides = {}
    print(f"{'λ':>8}{'to ridge formula':>20}{'to pseudo-inverse':>20}   (relative distance of B)")
    for variance in variances:
        model = problem.model(variance)
        guides[variance] = AmortizedGuide(problem.train, model.weight.shape[1])
        train(model, guides[variance], problem.train, steps)
        learned, inverse = guides[variance].encoder, torch.linalg.pinv(problem.weight)
        print(f"{variance:8g}{distance(learned, model.encoder):20.1e}{distance(learned, inverse):20.2e}")
    return guides


def distance(found: Tensor, known: Tensor) -> float:
    """Return the Frobenius norm of the difference, relative to the second matrix."""
    return ((found - known).norm() / known.norm()).item()


class Comparison(NamedTuple):
    """Encoder and optimization for each pixel: means, bounds in nats per pixel, and CPU seconds per pixel."""

    amortized: Float[Tensor, "m k"]
    optimized: Float[Tensor, "m k"]
    bounds: tuple[float, float]
    seconds: tuple[float, float]
    apart: float  # largest difference of the means, in posterior standard deviations


@torch.no_grad()
def unmix(model: LinearGaussian, encoder: AmortizedGuide, x: Tensor, steps: int) -> Comparison:
    """Unmix new pixels both ways."""
    single = PerDatumGuide(len(x), model.weight.shape[1])
    start = time.process_time()
    with torch.enable_grad():
        loss = train(model, single, x, steps)
    optimized = time.process_time() - start
    start = time.process_time()
    for _ in range(1000):
        encoder.moments(x)
    amortized = (time.process_time() - start) / 1000
    means = [guide.moments(x)[0].detach() for guide in (encoder, single)]
    bounds = [loss.terms(model, guide, x).per_datum.elbo.item() for guide in (encoder, single)]
    apart = ((means[0] - means[1]).abs() / model.covariance.diagonal().sqrt()).max().item()
    return Comparison(*means, tuple(bounds), (amortized / len(x), optimized / len(x)), apart)


def draw(problem: Problem, guides: dict[float, AmortizedGuide], found: Comparison, path: Path) -> None:
    """Plot the distance to the pseudo-inverse, the error of the amounts, and both posterior means."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    inverse, between = torch.linalg.pinv(problem.weight), np.geomspace(min(guides), max(guides), 60)
    formula = {variance: problem.model(variance).encoder for variance in between}
    learned = {variance: guide.encoder for variance, guide in guides.items()}

    def error(encoder: Tensor) -> float:
        """Return the root mean square error of the amounts in new pixels."""
        return (problem.test @ encoder.T - problem.amounts).square().mean().sqrt().item()

    for encoders, style, label in ((formula, "-", "ridge formula"), (learned, "o", "learned")):
        axes[0].loglog(encoders.keys(), [distance(b, inverse) for b in encoders.values()], style, label=label)
        if problem.amounts is not None:
            axes[1].semilogx(encoders.keys(), [error(b) for b in encoders.values()], style, label=label)
    axes[0].set(title="λ → 0: the pseudo-inverse", xlabel="λ", ylabel="relative distance of B to A⁺")
    axes[0].legend()
    if problem.amounts is not None:
        axes[1].axhline(error(inverse), color="0.5", linestyle="--", label="pseudo-inverse")
        axes[1].axvline(problem.noise, color="0.8", label="variance of the noise")
        axes[1].set(title="error of the amounts in new pixels", xlabel="λ", ylabel="root mean square, prior sd")
        axes[1].legend()
    else:
        axes[1].set_axis_off()
    axes[2].plot(found.optimized, found.amortized, "o", markersize=3)
    axes[2].axline((0, 0), slope=1, color="0.5", linewidth=0.8)
    optimized, amortized = (1e6 * seconds for seconds in reversed(found.seconds))
    axes[2].set(title=f"{optimized:.0f} µs against {amortized:.1f} µs per pixel", ylabel="posterior mean, encoder")
    axes[2].set_xlabel("posterior mean, optimized for the pixel")
    axes[2].legend([f"dye {i + 1}" for i in range(found.amortized.shape[1])])
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(data: Path | None, out: Path, *, seed: int = 0, smoke_test: bool = False) -> None:
    torch.manual_seed(seed)  # for the initial encoders
    problem = simulate(seed) if data is None else load(data)
    steps = 300 if smoke_test else 500
    variances = sorted({*(LAMBDAS[2:3] if smoke_test else LAMBDAS), problem.noise})
    guides = sweep(problem, tuple(variances), steps)

    model, encoder = problem.model(problem.noise), guides[problem.noise]
    found = unmix(model, encoder, problem.test, steps)
    evidence = model.log_evidence(problem.test).mean().item()
    print(f"\n{len(problem.test)} new pixels at λ = {problem.noise:g}   elbo, nats per pixel   CPU time per pixel")
    for name, bound, seconds in zip(("encoder", "optimized"), found.bounds, found.seconds, strict=True):
        print(f"  {name:10}{bound:38.6f}{1e6 * seconds:18.2f} µs")
    print(f"  {'exact':10}{evidence:38.6f}")

    out.mkdir(parents=True, exist_ok=True)
    posterior = pe.to_arviz(model, encoder.drawing_guide, problem.test, num_samples=200, seed=seed)
    posterior.to_netcdf(str(out / "posterior.nc"))
    if importlib.util.find_spec("matplotlib") is not None:
        draw(problem, guides, found, out / "pseudo_inverse.png")
    print(f"\nwritten to {out}/: posterior.nc (ArviZ), pseudo_inverse.png")

    errors = [distance(guide.encoder, problem.model(v).encoder) for v, guide in guides.items()]
    assert max(errors) < 0.01, f"each encoder must be the ridge formula to 1 %, distances {errors}"
    far = [distance(guide.encoder, torch.linalg.pinv(problem.weight)) for guide in guides.values()]
    assert far == sorted(far), f"the encoder must approach the pseudo-inverse as λ falls, distances {far}"
    assert found.apart < 0.01, f"both posterior means must agree to 0.01 sd, differ by {found.apart:.4f}"
    loss = evidence - min(found.bounds)
    assert loss < 1e-3, f"both bounds must reach the evidence to 0.001 nats, fall short by {loss:.1e}"
    print(
        f"claim: {len(errors)} encoders within {max(errors):.1e} of the ridge formula (bound 1e-2), at λ = "
        f"{min(guides):g} within {far[0]:.1e} of A⁺; both posteriors' means within {found.apart:.1e} sd, encoder "
        f"{found.seconds[1] / found.seconds[0]:.0f} times faster per pixel"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="spectra and pixels: arrays weight, x and noise")
    parser.add_argument("--out", type=Path, default=Path("runs/pseudo_inverse"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="two λ and few steps")
    args = parser.parse_args()
    main(args.data, args.out, seed=args.seed, smoke_test=args.smoke_test)
