"""Why is the bound of new data lower than that of the training data, and what helps?

A VAE of simulated rows has a prior that is a network of 40 covariates. One hundred rows are few for it: the network
learns their codes by heart. The KL of the training rows shrinks to almost nothing, which looks like success, and that
of new rows grows. ``pe.compare_splits`` splits the gap between both bounds by distortion, rate and latent dimension,
each with its standard error, and names KL shrinkage. The cure is weight decay of the network that encodes the
covariates, and of no other. The rows come from a linear-Gaussian model, so that their exact log p(x | c) is known.

Run with ``python -m examples.generalization``; the figure is saved to ``runs/generalization/``.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

import pyro_elbo as pe
from models.covariate_vae import CovariateVAE, Simulated, simulate

TRAINED, HELD_OUT, DECAY = 100, 500, 10.0
LOSS = pe.TraceBeta_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
COLORS = {"no decay": "#b3452c", "weight decay": "#1f5fa8"}


class Fitted(NamedTuple):
    """A fit with the comparison of its splits and the bound of every held-out row, nats."""

    result: pe.FitResult
    comparison: pe.SplitComparison
    bounds: Tensor


def optimizer(vae: CovariateVAE, decay: float) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
    """Return what makes AdamW with weight decay of the prior's network alone."""
    network = {id(p) for p in vae.prior.parameters()}

    def make(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        parameters = list(parameters)
        decayed = {"params": [p for p in parameters if id(p) in network], "weight_decay": decay}
        others = {"params": [p for p in parameters if id(p) not in network], "weight_decay": 0.0}
        return torch.optim.AdamW([decayed, others], lr=5e-3)

    return make


def fit(data: Simulated, decay: float, epochs: int, seed: int) -> Fitted:
    """Train on the first rows, and compare them with the others."""
    pyro.clear_param_store()
    torch.manual_seed(seed)  # for the initial weights; pe.fit has its own seed
    vae, splits = CovariateVAE(), [(data.x[rows], data.c[rows]) for rows in (slice(TRAINED), slice(TRAINED, None))]
    settings = {"batch_size": 25, "max_epochs": epochs, "seed": seed, "progress": False}
    result = pe.fit(vae.model, vae.guide, *splits, optimizer=optimizer(vae, decay), **settings)
    pyro.set_rng_seed(seed)
    with torch.no_grad():
        train, valid = (LOSS.terms(vae.model, vae.guide, *split) for split in splits)
    return Fitted(result, pe.compare_splits(train, valid), valid.log_likelihood["x"] - valid.kl["z"])


def draw(fits: dict[str, Fitted], exact: float, path: Path) -> None:
    """Plot both bounds over the epochs, the gap by part, and the KL of every latent dimension in both splits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, parts, units) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for i, (name, fitted) in enumerate(fits.items()):
        for split, style in (("train", "--"), ("valid", "-")):
            elbo = fitted.result.history.elbo.sel(split=split)
            curves.plot(elbo.epoch, elbo, style, color=COLORS[name], label=f"{name}, {split}")
        found, side = fitted.comparison, (i - 0.5) * 0.4
        gaps = (found.elbo, found.distortion, found.rate)
        parts.bar(
            [x + side for x in range(3)],
            [gap.gap for gap in gaps],
            0.4,
            yerr=[2 * gap.standard_error for gap in gaps],
            color=COLORS[name],
            label=name,
        )
        for offset, split in ((-0.1, "train"), (0.1, "valid")):
            kl = [getattr(gap, split) for gap in found.kl_per_dim["z"].values()]
            fill = {"facecolor": COLORS[name] if split == "valid" else "none", "edgecolor": COLORS[name]}
            units.bar([x + side + offset for x in range(len(kl))], kl, 0.2, **fill, label=f"{name}, {split}")
    curves.axhline(exact, color="0.5", lw=1, label="exact log p(x | c), valid")
    curves.set(xlabel="epoch", ylabel="ELBO, nats per row", title="bound", ylim=(2.5 * exact, None))
    parts.set_yscale("symlog")
    parts.set_xticks(range(3), ("elbo", "distortion", "rate"))
    parts.set(ylabel="gap, nats per row (± 2 s.e.)", title="training less validation, by part")
    units.set_yscale("log")
    units.set_xticks(range(4), fits["no decay"].comparison.kl_per_dim["z"])
    units.set(ylabel="KL, nats per row", title="KL of every latent dimension")
    units.set_ylim(top=5 * units.get_ylim()[1])
    curves.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0.1, 0.0))
    for ax in (parts, units):
        ax.legend(fontsize=8, loc="upper center")
    for ax in (curves, parts, units):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(out: Path, *, seed: int = 0, smoke_test: bool = False) -> None:
    data, epochs = simulate(TRAINED + HELD_OUT, seed=seed), 30 if smoke_test else 60
    exact = data.log_evidence[TRAINED:].mean().item()
    fits = {name: fit(data, decay, epochs, seed) for name, decay in (("no decay", 0.0), ("weight decay", DECAY))}
    for name, fitted in fits.items():
        print(f"\n{name} of the prior's network\n{fitted.comparison}")
    before, after = fits["no decay"].comparison, fits["weight decay"].comparison
    print(f"\nexact log p(x | c) of a validation row: {exact:.2f} nats")

    out.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("matplotlib") is not None:
        draw(fits, exact, out / "generalization.png")
    print(f"written to {out}/: generalization.png")

    gain = fits["weight decay"].bounds - fits["no decay"].bounds  # row by row
    error = gain.std().item() / len(gain) ** 0.5
    assert before.kl_shrinkage, f"the rate must explain the gap before: {before.reading}"
    assert not after.kl_shrinkage, f"weight decay must end the KL shrinkage: {after.reading}"
    assert gain.mean() > 4 * error, f"new rows must gain, got {gain.mean():.2f} ± {error:.2f} nats"
    assert after.elbo.gap < before.elbo.gap / 2, "weight decay must close half of the gap"
    print(
        f"claim: KL shrinkage explains {before.rate.gap / before.elbo.gap:.0%} of a gap of {before.elbo.size}; weight "
        f"decay leaves {after.elbo.size} and raises the bound of new rows by {gain.mean():.2f} ± {error:.2f} nats"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/generalization"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="fewer epochs")
    args = parser.parse_args()
    main(args.out, seed=args.seed, smoke_test=args.smoke_test)
