"""Gene programs of single cells, some seen by RNA, some by accessible chromatin, some by both.

Which latent programs switch genes and peaks together? What would be the RNA of a cell of which only the accessibility
was measured? :class:`~models.multi_omics.MultiOmics` multiplies what each modality says about a cell with one prior.

Without ``--data``, a simulator of four programs states the truth: half of the cells show both modalities, a quarter RNA
alone and a quarter accessibility alone. With ``--data scicar_a549_small.npz`` (sci-CAR, Cao et al. 2018) these are lung
cells at 0, 1 and 3 hours of dexamethasone. Then the script asks whether z tells the hours better than principal
components do, and whether one model of both modalities predicts unseen cells better than one model of each.

Run with ``python -m examples.multi_omics``. It prints the terms of the bound, the programs and the imputation, and
writes ``multi_omics.png`` and ``posterior.nc`` (ArviZ) to ``runs/multi_omics/``. Needs ``pip install
'pyro-elbo[plot,probe]'``; without matplotlib it leaves the figure out.
"""

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import pyro_elbo as pe
from models.multi_omics import Cells, MultiOmics, Simulator, clean, hide, load_scicar

TEST = 500  # cells kept from training
DIRECTIONS = ("RNA from accessibility", "accessibility from RNA")
MARGINS = (10.0, 2.0)  # claimed gains of imputation in nats per simulated cell, in the order of DIRECTIONS


@dataclass(frozen=True)
class Problem:
    """Data and training plan.

    Attributes:
        train, test: cells; those of ``test`` show both modalities.
        programs: the true activities of the test cells' programs, or None for real data.
        complete: all real cells with nothing hidden, those of ``test`` first, or None.
        hours: hours of treatment of the complete cells, or None.
        z_dim: latent dimensions.
        sparsity: scale of the loadings' prior; the smaller, the fewer genes and peaks a program has.
        lr: learning rate.
        batch_size: cells per step.
        epochs: training epochs.
    """

    train: Cells
    test: Cells
    programs: Float[Tensor, "n programs"] | None
    complete: Cells | None
    hours: Int[Tensor, " all"] | None
    z_dim: int
    sparsity: float
    lr: float
    batch_size: int
    epochs: int


def load(data: Path | None, seed: int, smoke_test: bool) -> Problem:
    """Return the problem of the simulator, or of the A549 cells."""
    if data is None:
        simulator = Simulator()
        train, _ = simulator.draw(600 if smoke_test else 1000, seed)
        test, programs = simulator.draw(TEST, seed + 1)
        return Problem(hide(train, 0.25, seed), test, programs, None, None, 6, 0.03, 2e-2, 64, 20 if smoke_test else 50)
    cells, hours = load_scicar(data)
    order = torch.randperm(len(hours), generator=torch.Generator().manual_seed(seed))
    complete, test = cells.rows(order), order[:TEST]
    train = hide(cells.rows(order[TEST:]), 0.1, seed)
    return Problem(train, cells.rows(test), None, complete, hours[order], 5, 0.05, 1e-2, 128, 30)


def train(problem: Problem, cells: Cells, seed: int) -> tuple[MultiOmics, pe.FitResult]:
    """Fit a model; the prior's terms are warmed up, so that no program is given up before it is found."""
    pyro.clear_param_store()
    torch.manual_seed(seed)  # for the initial weights; pe.fit has its own seed
    omics = MultiOmics(cells, z_dim=problem.z_dim, sparsity=problem.sparsity)
    warmup = pe.LinearWarmup(0.0, 1.0, steps=problem.epochs * len(cells.seen) // problem.batch_size // 4)
    plan = {"lr": problem.lr, "max_epochs": problem.epochs, "batch_size": problem.batch_size, "progress": False}
    loss = pe.TraceBeta_ELBO(beta=warmup)
    return omics, pe.fit(omics.model, omics.guide, tuple(cells), loss=loss, seed=seed, **plan)


def train_means(problem: Problem, seed: int) -> MultiOmics:
    """Fit the profile and the dispersions of a model without programs, by maximum likelihood."""
    pyro.clear_param_store()
    means = MultiOmics(problem.train, z_dim=problem.z_dim)
    pe.fit(means.means, no_latents, tuple(problem.train), lr=2e-2, max_epochs=10, seed=seed, progress=False)
    return means


def no_latents(*cells: Tensor) -> None:
    """The guide of a program that draws nothing."""


@torch.no_grad()
def bound(omics: MultiOmics, cells: Cells) -> Float[Tensor, " n"]:
    """Return the ELBO of every cell in nats; the loadings, which all cells share, are not charged."""
    pyro.set_rng_seed(0)
    terms = pe.TraceBeta_ELBO(num_particles=8).terms(omics.model, omics.guide, *cells)
    return terms.log_likelihood["genes"] + terms.log_likelihood["peaks"] - terms.kl["z"]


def estimate(nats: Float[Tensor, " n"]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return nats.mean().item(), (nats.std() / len(nats) ** 0.5).item()


@torch.no_grad()
def impute(omics: MultiOmics, means: MultiOmics, test: Cells) -> list[tuple[float, float]]:
    """Return the gains over the mean profile in nats per cell with standard errors, in the order of DIRECTIONS.

    Each is log p(one modality | the other), less the log-likelihood under the mean profile, fitted by its own maximum
    likelihood. Both are given the size factor of the cell.
    """
    pyro.set_rng_seed(0)
    genes, _ = omics.log_predictive(test.only(peaks=True), test)
    _, peaks = omics.log_predictive(test.only(genes=True), test)
    plain = pe.TraceBeta_ELBO().terms(means.means, no_latents, *test).log_likelihood
    return [estimate(genes - plain["genes"]), estimate(peaks - plain["peaks"])]


def match(z: Float[Tensor, "n z_dim"], programs: Float[Tensor, "n programs"]) -> tuple[np.ndarray, np.ndarray]:
    """Return the latent of each program and all correlations, of shape (programs, z_dim)."""
    correlations = np.corrcoef(programs.T.numpy(), z.T.numpy())[: programs.shape[1], programs.shape[1] :]
    return linear_sum_assignment(-np.abs(correlations))[1], correlations


def accuracy(features: np.ndarray, hours: Int[Tensor, " n"]) -> float:
    """Return the accuracy of a logistic regression of the hours, cross-validated five times."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return float(cross_val_score(probe, features, hours.numpy(), cv=folds).mean())


def components(problem: Problem) -> np.ndarray:
    """Return principal components of both modalities: standardized log(1 + share) of genes, and standardized peaks."""
    genes, peaks = clean(problem.complete)
    shares = genes / genes.sum(1, keepdim=True) * genes.sum(1).median()
    x = torch.cat([torch.log1p(shares), peaks], 1).numpy()
    return make_pipeline(StandardScaler(), PCA(problem.z_dim, random_state=0)).fit(x[TEST:]).transform(x)


def judge_programs(omics: MultiOmics, problem: Problem) -> None:
    """Print which latent is which program, and check that there is one for each."""
    with torch.no_grad():
        latents, correlations = match(omics.encode(problem.test)[0], problem.programs)
    found = [abs(correlations[program, latent]) for program, latent in enumerate(latents)]
    print("\nprogram  latent    |r|  features whose loading is two standard deviations from 0")
    significant = (omics.loading_loc.abs() > 2 * omics.loading_scale).sum(1)
    for program, (latent, r) in enumerate(zip(latents, found, strict=True)):
        print(f"{program:7}  z[{latent}]  {r:7.3f}  {significant[latent]}")
    assert min(found) >= 0.9, f"every program must be one latent, with |r| of at least 0.9; got {np.round(found, 3)}"
    print(f"least |r| of the {len(found)} programs: {min(found):.3f}")


def judge_treatment(omics: MultiOmics, problem: Problem, seed: int) -> None:
    """Print what z tells of the hours and what sharing z is worth, and check that both are gains."""
    with torch.no_grad():
        ours = accuracy(omics.encode(problem.complete)[0].numpy(), problem.hours)
    theirs = accuracy(components(problem), problem.hours)
    print(f"\nhours predicted from {problem.z_dim} dimensions: z {ours:.3f}, principal components {theirs:.3f}")
    shared, apart = bound(omics, problem.test), torch.zeros(len(problem.test.seen))
    for name in ("genes", "peaks"):
        alone, _ = train(problem, problem.train.only(**{name: True}), seed)
        apart += bound(alone, problem.test.only(**{name: True}))
    gain, error = estimate(shared - apart)
    print(f"ELBO of unseen cells, nats: shared z {shared.mean():.2f}, two models {apart.mean():.2f}")
    print(f"gain of sharing z: {gain:.2f} ± {error:.2f} nats per cell")
    assert ours > theirs, f"z must tell the hours better than principal components, got {ours:.3f} and {theirs:.3f}"
    assert gain > 2 * error, f"sharing z must pay: expected a gain above {2 * error:.2f} nats, got {gain:.2f}"


def judge_imputation(gains: list[tuple[float, float]], margins: tuple[float, ...]) -> None:
    """Print the gains of imputation and check that they exceed their margins by two standard errors."""
    print("\nimputation of unseen cells, gain over the mean profile in nats per cell")
    for direction, (gain, error), margin in zip(DIRECTIONS, gains, margins, strict=True):
        print(f"  {direction:24}{gain:8.2f} ± {error:.2f}")
        assert gain - 2 * error > margin, f"{direction} must gain {margin:g} nats, got {gain:.2f} ± {error:.2f}"


@torch.no_grad()
def draw(omics: MultiOmics, problem: Problem, kl: list[float], gains: list[tuple[float, float]], path: Path) -> None:
    """Plot what the latents are, their loadings, and the gains of imputation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    options = {"figsize": (13, 3.8), "layout": "constrained", "width_ratios": [1.2, 1.8, 0.8]}
    figure, (left, middle, right) = plt.subplots(1, 3, **options)
    z, order = omics.encode(problem.test)[0], np.argsort(kl)[::-1].copy()
    colors = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1, "aspect": "auto", "interpolation": "nearest"}
    names = [f"z[{i}]\n{kl[i]:.1f} nats" for i in order]
    if problem.programs is not None:
        left.imshow(match(z, problem.programs)[1][:, order].T, **colors)
        left.set(xlabel="true program", title="correlation in unseen cells")
        left.set_xticks(range(problem.programs.shape[1]))
        left.set_yticks(range(problem.z_dim), names)
    else:
        treatment_map(left, z.numpy(), problem.hours[:TEST].numpy())
    image = middle.imshow(omics.loading_loc[order].numpy(), **colors)
    middle.axvline(omics.sizes[0] - 0.5, color="k", lw=0.8)
    middle.set_yticks(range(problem.z_dim), names)
    middle.set(xlabel=f"{omics.sizes[0]} genes | {omics.sizes[1]} peaks", title="loadings, posterior mean")
    figure.colorbar(image, ax=middle, label="correlation | effect on log rate or log odds", extend="both")
    means, errors = zip(*gains, strict=True)
    right.bar(["RNA", "accessibility"], means, yerr=2 * np.array(errors), capsize=5, color=["#1f5fa8", "#d08c3f"])
    right.set(ylabel="gain over the mean profile\n(nats per cell, ± 2 SE)", title="imputed from the other")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def treatment_map(axes: "matplotlib.axes.Axes", z: np.ndarray, hours: np.ndarray) -> None:
    """Scatter the cells over the two latents whose means differ most between the hours, in units of their spread."""
    means = np.stack([z[hours == h].mean(0) for h in np.unique(hours)])
    first, second = np.argsort(means.std(0) / z.std(0))[::-1][:2]
    for h, color in zip(np.unique(hours), ("#9aa5b1", "#d08c3f", "#1f5fa8"), strict=True):
        axes.scatter(*z[hours == h][:, [first, second]].T, s=6, color=color, label=f"{h} h")
    axes.set(xlabel=f"z[{first}]", ylabel=f"z[{second}]", title="unseen cells by hours of treatment")
    axes.legend(frameon=False)


def main(data: Path | None, out: Path, *, seed: int = 0, smoke_test: bool = False) -> None:
    problem = load(data, seed, smoke_test)
    omics, result = train(problem, problem.train, seed)
    with torch.no_grad():
        print(result.loss.terms(omics.model, omics.guide, *problem.train))
        kl = result.loss.terms(omics.model, omics.guide, *problem.test).kl_per_dim["z"].mean(0).tolist()
    print("KL per latent, nats per unseen cell: " + "  ".join(f"z[{i}] {nats:.2f}" for i, nats in enumerate(kl)))

    gains = impute(omics, train_means(problem, seed), problem.test)
    out.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("matplotlib"):
        draw(omics, problem, kl, gains, out / "multi_omics.png")
    names = {"z": ["latent"], "loadings": ["latent", "feature"]}
    some = problem.test.rows(torch.arange(100))
    exported = {"num_samples": 100, "dims": names, "predictive": False, "prior": False, "history": result}
    pe.to_arviz(omics.model, omics.guide, *some, **exported).to_netcdf(str(out / "posterior.nc"))
    print(f"written to {out}/: posterior.nc and, with matplotlib, multi_omics.png")

    judge_imputation(gains, MARGINS if data is None else (0.0, 0.0))
    if problem.hours is None:
        judge_programs(omics, problem)
    else:
        judge_treatment(omics, problem, seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="sci-CAR's A549 cells, scicar_a549_small.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/multi_omics"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="fewer cells and epochs")
    args = parser.parse_args()
    main(args.data, args.out, seed=args.seed, smoke_test=args.smoke_test)
