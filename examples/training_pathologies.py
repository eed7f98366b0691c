"""What goes wrong in training, on purpose: each pathology, how ``pe.diagnose`` names it, and its cure.

Every case trains small programs twice: once with a mistake built in, and once without. The diagnosis reads the history
of the fit and nothing else. It must name the mistake of the first and find the second healthy; the script prints what
it says, and the validation bound before and after the cure.

Run with ``python -m examples.training_pathologies``; the figure is saved to ``runs/training_pathologies/``.
"""

import argparse
import importlib.util
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import pyro_elbo as pe
from examples.generalization import COLORS, DECAY, TRAINED, optimizer
from models.covariate_vae import CovariateVAE, simulate
from models.fair_vae import layers
from models.sequences import digits

VALID = 300
SICK, CURED = COLORS.values()


class ImageVAE(nn.Module):
    """Counts from 0 to 16 under a binomial or a Gaussian likelihood: ``model(x)`` and ``guide(x)``.

    Args:
        z_dim: latent dimensions.
        hidden: width of encoder and decoder.
        noise: σ of a Gaussian likelihood; binomial if omitted.
        learned: whether the noise is learned, pixel by pixel.
        deaf: whether the decoder's hidden units are silenced.
    """

    def __init__(
        self,
        z_dim: int = 4,
        hidden: int = 32,
        *,
        noise: float | None = None,
        learned: bool = False,
        deaf: bool = False,
    ) -> None:
        super().__init__()
        self.z_dim = z_dim
        fixed = None if noise is None else torch.full((64,), math.log(noise))
        self.log_noise = nn.Parameter(fixed) if learned else fixed
        self.encoder = layers(64, hidden, 2 * z_dim)
        self.decoder = layers(z_dim, hidden, 64)
        if deaf:
            nn.init.constant_(self.decoder[0].bias, -100.0)

    def model(self, x: Tensor) -> None:
        """Draw z and observe x."""
        pyro.module("image_vae", self)
        with pyro.plate("data", len(x)):
            y = self.decoder(pyro.sample("z", dist.Normal(x.new_zeros(self.z_dim), 1.0).to_event(1)))
            likelihood = dist.Binomial(16, logits=y) if self.log_noise is None else dist.Normal(y, self.log_noise.exp())
            pyro.sample("x", likelihood.to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Draw z as the encoder says."""
        pyro.module("image_vae", self)
        loc, raw = self.encoder(x / 16).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, softplus(raw) + 1e-4).to_event(1))


class Trained(NamedTuple):
    """A fit, and the bound of its validation rows in nats per row."""

    result: pe.FitResult
    elbo: float


def judged(result: pe.FitResult, *valid: Tensor) -> Trained:
    return Trained(result, result.terms(*valid).per_datum.elbo.item())


def falling(decay: float, epochs: int) -> Callable[[torch.optim.Optimizer], Any]:
    """Return what makes a schedule of the learning rate that ends at ``decay`` times its start."""
    return lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, decay ** (1 / epochs))


def on_digits(
    rows: int = 1200,
    lr: float = 5e-3,
    epochs: int = 40,
    batch_size: int = 100,
    decay: float = 0.02,
    beta: float | pe.Schedule = 1.0,
    free_bits: float = 0.0,
    **vae: Any,
) -> Trained:
    """Train an autoencoder of digits; the learning rate ends at ``decay`` times its start."""
    pyro.clear_param_store()
    torch.manual_seed(0)  # for the initial weights; pe.fit has its own seed
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    programs, x = ImageVAE(**vae), digits().flatten(1)[order]
    result = pe.fit(
        programs.model,
        programs.guide,
        x[:rows],
        x[-VALID:],
        loss=pe.TraceBeta_ELBO(beta, free_bits=free_bits),
        lr=lr,
        scheduler=falling(decay, epochs),
        max_epochs=epochs,
        batch_size=batch_size,
        progress=False,
    )
    return judged(result, x[-VALID:])


def on_covariates(decay: float, epochs: int = 120) -> Trained:
    """Train an autoencoder whose prior is a network of covariates, on few rows (see ``generalization``)."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    vae, data = CovariateVAE(), simulate(TRAINED + VALID)
    splits = [(data.x[rows], data.c[rows]) for rows in (slice(TRAINED), slice(TRAINED, None))]
    settings = {"scheduler": falling(0.05, epochs), "batch_size": 50, "max_epochs": epochs, "progress": False}
    return judged(pe.fit(vae.model, vae.guide, *splits, optimizer=optimizer(vae, decay), **settings), *splits[1])


def on_regression(batch_size: int, epochs: int, decay: float) -> Trained:
    """Train the posterior of 10 coefficients, which 400 rows share."""
    pyro.clear_param_store()
    generator, columns, rows = torch.Generator().manual_seed(0), 10, 400
    x, w = torch.randn(2 * rows, columns, generator=generator), torch.randn(columns, generator=generator)
    y = x @ w + torch.randn(2 * rows, generator=generator)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(columns), 1.0).to_event(1))
        with pyro.plate("rows", rows, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(columns))
        scale = pyro.param("scale", torch.full((columns,), 0.1), dist.constraints.positive)
        pyro.sample("w", dist.Normal(loc, scale).to_event(1))

    settings = {"lr": 0.1, "scheduler": falling(decay, epochs), "batch_size": batch_size, "max_epochs": epochs}
    splits = (x[:rows], y[:rows]), (x[rows:], y[rows:])
    return judged(pe.fit(model, guide, *splits, **settings, progress=False), *splits[1])


class Case(NamedTuple):
    """A pathology, what causes it, what cures it, and both trainings."""

    name: str
    cause: str
    cure: str
    sick: Callable[[], Trained]
    cured: Callable[[], Trained]


SETTLED = {"lr": 1e-2, "epochs": 100, "batch_size": 200}


@cache
def healthy() -> Trained:
    return on_digits(**SETTLED)


def warming(steps: int) -> Trained:
    schedule = pe.LinearWarmup(0.0, 1.0, steps=steps)
    return on_digits(beta=schedule, lr=2e-2, decay=1e-3, epochs=100, batch_size=200)


CASES = (
    Case(
        "not converged",
        "few and small steps",
        "more and larger steps",
        partial(on_digits, lr=2e-4, epochs=15, decay=1.0),
        healthy,
    ),
    Case(
        "posterior collapse",
        "Gaussian noise of σ = 16, more than the images spread in any direction",
        "a binomial likelihood",
        partial(on_digits, noise=16.0, epochs=20),
        healthy,
    ),
    Case("over-regularized", "β = 40", "β = 1", partial(on_digits, beta=40.0, epochs=20), healthy),
    Case(
        "overfitting",
        "a noise of every pixel that is learned from 40 rows",
        "1200 rows, and a binomial likelihood",
        partial(on_digits, rows=40, batch_size=8, noise=4.0, learned=True, epochs=50, lr=2e-2, decay=1.0),
        healthy,
    ),
    Case(
        "KL shrinkage",
        "a network of the prior that learns 100 rows by heart",
        "weight decay of the prior network",
        partial(on_covariates, 0.0),
        partial(on_covariates, DECAY),
    ),
    Case(
        "warm-up too long",
        "β rises until the last step",
        "β rises for a third of the steps",
        partial(warming, 600),
        partial(warming, 200),
    ),
    Case(
        "diverging",
        "a learning rate that grows 300-fold",
        "a learning rate that falls",
        partial(on_digits, decay=300.0),
        healthy,
    ),
    Case(
        "dead decoder",
        "hidden units that never fire, under free bits that force a KL",
        "units that fire",
        partial(on_digits, deaf=True, free_bits=1.0, epochs=20),
        healthy,
    ),
    Case(
        "noisy objective",
        "two rows a step at a learning rate of 0.1",
        "all rows a step, and a rate that falls",
        partial(on_regression, batch_size=2, epochs=8, decay=1.0),
        partial(on_regression, batch_size=400, epochs=50, decay=0.02),
    ),
)


class Outcome(NamedTuple):
    """Both trainings of a case, with their diagnoses."""

    case: Case
    before: Trained
    after: Trained
    found: pe.Diagnosis
    left: pe.Diagnosis

    @property
    def gain(self) -> float:
        """What the cure adds to the validation bound, nats per row."""
        return self.after.elbo - self.before.elbo


def run(case: Case) -> Outcome:
    """Train a case both ways and print what the diagnosis says."""
    before, after = case.sick(), case.cured()
    outcome = Outcome(case, before, after, pe.diagnose(before.result), pe.diagnose(after.result))
    print(f"\n{case.name}: {case.cause}\n{outcome.found}")
    print(f"cure: {case.cure}. Then: {outcome.left.summary}")
    print(f"validation bound, nats per row: {before.elbo:.2f} before, {after.elbo:.2f} after")
    return outcome


def draw(outcomes: list[Outcome], path: Path) -> None:
    """Plot the validation bound of every case, before and after its cure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(outcomes), 3)
    lines = -(-len(outcomes) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.3 * columns, 2.9 * lines), layout="constrained", squeeze=False
    )
    for ax, outcome in zip(axes.flat, outcomes, strict=True):
        curves = {}
        for name, trained, color in (("before", outcome.before, SICK), ("after", outcome.after, CURED)):
            elbo = trained.result.history.elbo.sel(split="valid")
            curves[name] = elbo.values
            ax.plot(elbo.epoch, elbo, color=color, label=f"{name}: {trained.elbo:.1f}")
        top, bottom = (end([end(values) for values in curves.values()]) for end in (max, min))
        usual = top - min(np.median(values) for values in curves.values())
        ax.set_ylim(max(bottom - 0.1 * (top - bottom), top - 2.5 * usual), top + 0.1 * usual)
        ax.set(title=f"{outcome.case.name}\nafter: {outcome.case.cure}", xlabel="epoch", ylabel="ELBO, nats per row")
        ax.legend(fontsize=8, loc="lower right")
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(out: Path, *, smoke_test: bool = False) -> None:
    chosen = [case for case in CASES if not smoke_test or case.name == "noisy objective"]
    outcomes = [run(case) for case in chosen]

    out.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("matplotlib") is not None:
        draw(outcomes, out / "training_pathologies.png")
    print(f"\nwritten to {out}/: training_pathologies.png")

    for outcome in outcomes:
        name = outcome.case.name
        assert name in outcome.found.names, f"{name}: the diagnosis must name it, says {outcome.found.names}"
        assert outcome.left.is_healthy, f"{name}: the cured fit must be healthy, got {outcome.left.summary}"
        assert outcome.gain > 0, f"{name}: the cure must raise the validation bound, gains {outcome.gain:.2f}"
    least = min(outcome.gain for outcome in outcomes)
    print(
        f"claim: {len(outcomes)} of {len(chosen)} pathologies are named and found healthy once cured; every cure "
        f"raises the validation bound, by {least:.1f} nats per row at least"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/training_pathologies"))
    parser.add_argument("--smoke-test", action="store_true", help="the noisy objective alone")
    args = parser.parse_args()
    main(args.out, smoke_test=args.smoke_test)
