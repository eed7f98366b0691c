"""Kinds of defects in a crystal, found without labels in patches of electron micrographs that scratches spoil.

Which likelihood finds them, Gaussian or Laplace? A convolutional autoencoder of two latents is trained with each, and
a Gaussian mixture with one component per kind clusters the latents. The adjusted Rand index compares the clusters with
the truth: 1 if they agree, 0 on average for chance.

Without ``--data``, a simulator draws five kinds of sites, among them four defects, and scratches 40 % of the patches.
With ``--data stem_mos2_se.npz`` (an image of MoS2 with vacancies and a hole) patches are cut at the sites of the
lattice, and the script asks how well the latents tell dark sites from the rest, and the hole from single vacancies.

Run with ``python -m examples.microscopy``. It prints the terms of the bound and both clusterings over seeds, and writes
``microscopy.png`` and ``posterior.nc`` (ArviZ) to ``runs/microscopy/``. Needs ``pip install 'pyro-elbo[plot,probe]'``;
without matplotlib it leaves the figure out.
"""

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pyro
import torch
from jaxtyping import Float
from scipy.stats import t as student
from sklearn.covariance import MinCovDet
from sklearn.metrics import adjusted_rand_score, roc_auc_score
from sklearn.mixture import GaussianMixture
from torch import Tensor

import pyro_elbo as pe
from models.microscopy import KINDS, Lattice, PatchVAE, brightness, cut_patches, find_sites, load_mos2

LIKELIHOODS = ("laplace", "gaussian")
Z_DIM = 2
HOLE = 60.0  # pixels from the darkest site within which dark sites belong to the hole
COLORS = ("#1f5fa8", "#d08c3f", "#4f8f5b", "#b3452c", "#7a5ea8")
DARK = -4.0  # brightness of a site, in robust standard deviations from its surroundings, below which no atom is there


def train(x: Float[Tensor, "n 16 16"], likelihood: str, seed: int, epochs: int) -> tuple[PatchVAE, pe.FitResult]:
    """Fit an autoencoder with one likelihood."""
    pyro.clear_param_store()
    torch.manual_seed(seed)  # for the initial weights; pe.fit has its own seed
    vae = PatchVAE(likelihood, z_dim=Z_DIM)
    return vae, pe.fit(vae.model, vae.guide, x, lr=5e-3, batch_size=64, max_epochs=epochs, seed=seed, progress=False)


@torch.no_grad()
def cluster(vae: PatchVAE, train: Float[Tensor, "n 16 16"], test: Float[Tensor, "m 16 16"]) -> np.ndarray:
    """Return the cluster of every test patch: a Gaussian mixture of the training patches' means of q(z | x)."""
    mixture = GaussianMixture(len(KINDS), n_init=5, random_state=0).fit(vae.encode(train)[0].numpy())
    return mixture.predict(vae.encode(test)[0].numpy())


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Return the mean over seeds and its 95 % interval by Student's t."""
    error = differences.std(ddof=1) / len(differences) ** 0.5
    return differences.mean(), *student.interval(0.95, len(differences) - 1, differences.mean(), error)


def compare(lattice: Lattice, seeds: range, rows: int, epochs: int) -> tuple[np.ndarray, PatchVAE, pe.FitResult]:
    """Print the adjusted Rand index of both likelihoods for every seed; return them and the last Laplace model."""
    scores = np.zeros((len(seeds), 2))
    print("seed" + "".join(f"{name:>12}" for name in LIKELIHOODS) + "   adjusted Rand index on new patches")
    for row, seed in zip(scores, seeds, strict=True):
        (x, _), (test, kinds) = lattice.draw(rows, seed), lattice.draw(600, seed + 1000)
        for column, likelihood in reversed(list(enumerate(LIKELIHOODS))):
            vae, result = train(x, likelihood, seed, epochs)
            row[column] = adjusted_rand_score(kinds.numpy(), cluster(vae, x, test))
        print(f"{seed:4}" + "".join(f"{score:12.3f}" for score in row))
    return scores, vae, result


def judge_kinds(scores: np.ndarray) -> None:
    """Print the gain of Laplace over the seeds and check that it is one."""
    mean, low, high = interval(scores[:, 0] - scores[:, 1])
    print(f"gain of Laplace: {mean:.3f}, 95 % interval over {len(scores)} seeds [{low:.3f}, {high:.3f}]")
    assert low > 0.1, f"Laplace must gain more than 0.1 in adjusted Rand index, got [{low:.3f}, {high:.3f}]"


def dark_sites(bright: np.ndarray, sites: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which sites are single vacancies, and which belong to the hole: the dark ones around the darkest."""
    dark = bright < DARK
    hole = dark & (np.linalg.norm(sites - sites[bright.argmin()], axis=1) < HOLE)
    return dark & ~hole, hole


@torch.no_grad()
def strangeness(vae: PatchVAE, x: Float[Tensor, "n 16 16"]) -> np.ndarray:
    """Return how far every site lies from the bulk in latent space: a robust Mahalanobis distance."""
    z = vae.encode(x)[0].numpy()
    return np.sqrt(MinCovDet(random_state=0).fit(z).mahalanobis(z))


def judge_sites(far: np.ndarray, vacancies: np.ndarray, hole: np.ndarray) -> None:
    """Print how well the distance tells vacancies and the hole from other sites, and check that it does."""
    print(f"{len(far)} sites: {vacancies.sum()} vacancies, {hole.sum()} in the hole")
    areas = [roc_auc_score(kind[~other], far[~other]) for kind, other in ((vacancies, hole), (hole, vacancies))]
    apart = roc_auc_score(hole[hole | vacancies], far[hole | vacancies])
    print(
        f"area under the ROC curve: vacancies {areas[0]:.3f}, hole {areas[1]:.3f}, hole against vacancies {apart:.3f}"
    )
    assert min(areas) > 0.95, f"dark sites must lie apart in latent space, got areas of {np.round(areas, 3)}"
    assert apart > 0.7, f"the hole must lie beyond single vacancies, got an area of {apart:.3f}"


@torch.no_grad()
def draw_kinds(vae: PatchVAE, lattice: Lattice, scores: np.ndarray, path: Path) -> None:
    """Plot a patch of every kind, the latents of new patches, and the index for every seed."""
    plt = pyplot()
    figure = plt.figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.7])
    x, kinds = lattice.draw(600, 1)
    z = vae.encode(x)[0]
    images = vae.decode(z)
    for kind, line in enumerate(left.subplots(len(KINDS), 4)):
        first = torch.nonzero(kinds == kind).flatten()[:2].tolist()
        line[0].set_ylabel(KINDS[kind], rotation=0, ha="right", va="center")
        for ax, image in zip(line, [part[i] for i in first for part in (x.numpy(), images.numpy())], strict=True):
            ax.imshow(image, cmap="gray", vmin=-1.5, vmax=4)
            ax.set(xticks=[], yticks=[])
    left.suptitle("patches, each with its reconstruction (Laplace)")
    latent, index = right.subplots(1, 2, width_ratios=[1.4, 1])
    for kind, name in enumerate(KINDS):
        latent.scatter(*z[kinds == kind].T.numpy(), s=8, label=name, color=COLORS[kind])
    latent.set(xlabel="z[0]", ylabel="z[1]", title="new patches by true kind")
    latent.legend(fontsize=8, markerscale=2)
    index.plot(scores.T, "o-", color=COLORS[0])
    index.set_xticks(range(2), LIKELIHOODS)
    index.set(ylabel="adjusted Rand index", ylim=(-0.05, 1), title="clusters, one line a seed", xlim=(-0.3, 1.3))
    figure.savefig(path, dpi=90)
    plt.close(figure)


@torch.no_grad()
def draw_sites(
    vae: PatchVAE,
    image: np.ndarray,
    nm: float,
    sites: np.ndarray,
    far: np.ndarray,
    kinds: tuple[np.ndarray, np.ndarray],
    path: Path,
) -> None:
    """Lay the distance in latent space over the image, beside the latents with rings around the dark sites."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.6), layout="constrained", width_ratios=[1.2, 1])
    size, z = nm * len(image), vae.encode(cut_patches(image, sites))[0].numpy()
    left.imshow(image, cmap="gray", vmax=np.quantile(image, 0.999), extent=(0, size, size, 0))
    colors = {"c": far, "cmap": "plasma", "vmax": np.quantile(far, 0.995)}
    marks = left.scatter(nm * sites[:, 1], nm * sites[:, 0], s=9, **colors)
    left.set(xlabel="nm", ylabel="nm", title="sites of the lattice")
    right.scatter(*z.T, s=9, **colors)
    right.set(xlabel="z[0]", ylabel="z[1]", title="the same sites in latent space")
    for name, kind, color in zip(("vacancies", "hole"), kinds, (COLORS[2], COLORS[3]), strict=True):
        right.scatter(*z[kind].T, s=50, facecolor="none", edgecolor=color, label=name)
    right.legend()
    figure.colorbar(marks, ax=right, label="distance from the bulk in latent space (robust standard deviations)")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def pyplot() -> ModuleType:
    """Return matplotlib's pyplot, drawing to files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def export(result: pe.FitResult, x: Float[Tensor, "n 16 16"], out: Path) -> None:
    """Print the terms of the bound and write the posterior of the first 100 patches."""
    with torch.no_grad():
        print(result.loss.terms(result.model, result.guide, x))
    data = pe.to_arviz(result.model, result.guide, x[:100], num_samples=200, prior=False, history=result)
    data.to_netcdf(str(out / "posterior.nc"))
    print(f"written to {out}/: posterior.nc and, with matplotlib, microscopy.png")


def main(data: Path | None, out: Path, *, seed: int = 0, smoke_test: bool = False) -> None:
    out.mkdir(parents=True, exist_ok=True)
    figure, plots = out / "microscopy.png", importlib.util.find_spec("matplotlib") is not None
    if data is None:
        lattice, seeds = Lattice(), range(seed, seed + (3 if smoke_test else 5))
        scores, vae, result = compare(lattice, seeds, 600 if smoke_test else 1000, 16 if smoke_test else 25)
        export(result, lattice.draw(600, seed + 1000)[0], out)
        if plots:
            draw_kinds(vae, lattice, scores, figure)
        judge_kinds(scores)
    else:
        image, nm = load_mos2(data)
        sites = find_sites(image)
        x = cut_patches(image, sites)
        vae, result = train(x, "laplace", seed, 3 if smoke_test else 15)
        far, kinds = strangeness(vae, x), dark_sites(brightness(image, sites), sites)
        export(result, x, out)
        if plots:
            draw_sites(vae, image, nm, sites, far, kinds, figure)
        judge_sites(far, *kinds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an image of MoS2, stem_mos2_se.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/microscopy"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="fewer patches, epochs and seeds")
    args = parser.parse_args()
    main(args.data, args.out, seed=args.seed, smoke_test=args.smoke_test)
