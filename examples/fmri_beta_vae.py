"""Find the contrasts of an experiment in brain volumes without its labels.

A contrast is the difference of mean volumes between two conditions. A β-VAE with a linear decoder sees volumes and
subjects, no conditions. Its columns are compared with the contrasts. A simulator with three known contrasts shows what
β buys: without it every rotation of the columns explains the data equally well. The script prints a sweep over β, with
the cosines of the exact optimum beside those after training, and walks along z_task between two conditions.

``--data haxby2001_slice.npz`` (x: volumes x voxels, condition, run) takes one slice of a subject who saw blocks of
faces, houses and six other categories in twelve runs. A trial is the mean of a block, and runs take the place of
subjects. The best cosine of a column with the contrast of faces and houses is judged by the same figure for blocks
relabeled within their runs. Haxby et al. (2001), Distributed and overlapping representations of faces and objects in
ventral temporal cortex, Science. Run with ``python -m examples.fmri_beta_vae``; figure and posterior are saved to
``runs/fmri_beta_vae/``.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

import pyro_elbo as pe
from models.fmri_beta_vae import Simulator, TaskVAE, Trials, covariance_within, matched_cosines, optimum

BETAS = (0.01, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
BETA = 4.0  # for real data: in the range where the simulator's sweep is best
LAG = 2  # volumes of 2.5 s: the response of the blood follows the stimulus by about 5 s
ACTIVE = 0.01  # nats per trial: a column with a smaller KL is unused


def train(
    x: Float[Tensor, "n voxels"], subject: Int[Tensor, " n"], beta: float, seed: int, steps: int
) -> tuple[TaskVAE, Float[Tensor, " task_dim"], pe.FitResult]:
    """Return the fitted model, the KL of each column of W (nats per trial), and the result of the fit."""
    pyro.clear_param_store()
    torch.manual_seed(seed)  # for the initial weights; pe.fit has its own seed
    vae = TaskVAE(x.shape[1], int(subject.max()) + 1)
    loss = pe.TraceBeta_ELBO(beta={"z_task": beta})
    options = {"batch_size": None, "max_epochs": steps, "lr": 5e-2, "seed": seed, "progress": False}
    result = pe.fit(vae.model, vae.guide, (x, subject), loss=loss, **options)
    with torch.no_grad():
        return vae, loss.terms(vae.model, vae.guide, x, subject).kl_per_dim["z_task"].mean(0), result


@dataclass(frozen=True)
class Found:
    """What one β yields: cosines with the true contrasts, after training and at the exact optimum.

    Attributes:
        columns: the column of W matched to each contrast.
        active: how many columns are in use.
    """

    vae: TaskVAE
    result: pe.FitResult
    cosines: Float[Tensor, " contrasts"]
    columns: Int[Tensor, " contrasts"]
    exact: Float[Tensor, " contrasts"]
    active: int


def sweep(simulator: Simulator, trials: Trials, betas: Sequence[float], seed: int, steps: int) -> dict[float, Found]:
    """Fit the trials with every β, and print how well the columns of W match the true contrasts."""
    cov = covariance_within(trials.x, trials.subject)
    found = {}
    print(
        "cosines of columns with the true contrasts\n     β    after training        exact optimum      active columns"
    )
    for beta in betas:
        vae, kl, result = train(trials.x, trials.subject, beta, seed, steps)
        maps = vae.task_maps.detach() * (kl > ACTIVE)
        cosines, columns = matched_cosines(maps, simulator.contrasts)
        best = optimum(cov, len(kl), beta).maps.float()
        exact = matched_cosines(best, simulator.contrasts)[0]
        found[beta] = Found(vae, result, cosines, columns, exact, int((kl > ACTIVE).sum()))
        texts = ("  ".join(f"{c:.3f}" for c in part.tolist()) for part in (cosines, exact))
        print(f"{beta:6g}  " + "    ".join(texts) + f"{found[beta].active:8d}")
    return found


@torch.no_grad()
def walk(
    vae: TaskVAE, x: Tensor, subject: Tensor, high: Bool[Tensor, " n"], low: Bool[Tensor, " n"], column: int
) -> Float[Tensor, "5 voxels"]:
    """Decode five steps along one dimension of z_task, from its mean in ``low`` trials to that in ``high`` ones.

    Volumes are less the decoded mean of all trials.
    """
    z = vae.encode(x, vae.subject_loc[subject])[0]
    path = z.mean(0).repeat(5, 1)
    path[:, column] = torch.linspace(z[low, column].mean().item(), z[high, column].mean().item(), 5)
    return vae.decode(path) - vae.decode(z.mean(0))


def correlation(a: Float[Tensor, " voxels"], b: Float[Tensor, " voxels"]) -> float:
    """Pearson's correlation of two maps over voxels."""
    return cosine_similarity(a - a.mean(), b - b.mean(), dim=0).item()


def on_simulator(out: Path, seed: int, smoke_test: bool) -> None:
    simulator = Simulator()
    trials, held_out = simulator.draw(seed), simulator.draw(seed + 1)
    betas, steps, least = ((0.01, 4.0, 16.0), 300, 0.8) if smoke_test else (BETAS, 600, 0.9)
    found = sweep(simulator, trials, betas, seed, steps)
    beta = max(found, key=lambda beta: found[beta].cosines.min().item())
    best = found[beta]

    walks, correlations = [], []
    for levels, column in zip(held_out.levels.T, best.columns.tolist(), strict=True):
        high, low = levels > 0, levels < 0
        walks.append(walk(best.vae, held_out.x, held_out.subject, high, low, column))
        contrast = held_out.x[high].mean(0) - held_out.x[low].mean(0)
        correlations.append(correlation(walks[-1][-1] - walks[-1][0], contrast))
    print(f"\nβ = {beta:g}: correlation of a walk from level -1 to +1 with the contrast in held-out trials")
    print("  " + "  ".join(f"{r:.3f}" for r in correlations))

    export(best.vae, best.result, trials.x, trials.subject, out)
    if importlib.util.find_spec("matplotlib") is not None:
        draw_sweep(found, beta, simulator, walks, out / "fmri_beta_vae.png")
    worst = {beta: f.cosines.min().item() for beta, f in found.items()}
    first, last = worst[min(betas)], worst[max(betas)]
    print(
        f"worst cosine {first:.3f} at β = {min(betas):g}, {worst[beta]:.3f} at {beta:g}, {last:.3f} at {max(betas):g}"
    )
    assert worst[beta] >= least, f"each contrast must have a column with a cosine of {least}, got {worst[beta]:.3f}"
    assert max(first, last) < worst[beta] - 0.1, "the cosines must rise with β up to an optimum, and fall beyond it"
    assert min(correlations) >= least, f"walks must follow the contrasts, got {correlations}"


def export(vae: TaskVAE, result: pe.FitResult, x: Tensor, subject: Tensor, out: Path) -> None:
    """Write the posterior of the latents to ``out/posterior.nc``."""
    out.mkdir(parents=True, exist_ok=True)
    options = {"num_samples": 100, "predictive": False, "prior": False, "history": result.history}
    pe.to_arviz(vae.model, vae.guide, x, subject, **options).to_netcdf(str(out / "posterior.nc"))


class Blocks(NamedTuple):
    """The mean volume of each block of stimuli, with its run, its category, and the place of voxels in the slice."""

    x: Float[Tensor, "n voxels"]
    run: Int[Tensor, " n"]
    category: NDArray[np.str_]
    mask: NDArray[np.bool_]


def read(path: Path) -> Blocks:
    """Read volumes, take a linear drift from each run, scale voxels to variance 1, and average over blocks.

    A block starts and ends ``LAG`` volumes after its stimuli.
    """
    with np.load(path, allow_pickle=False) as data:
        x, condition, run, mask = (data[name] for name in ("x", "condition", "run", "mask"))
    x = x.astype(np.float64)
    late = np.full_like(condition, "rest")
    for r in np.unique(run):
        rows = np.flatnonzero(run == r)
        line = np.stack([np.ones(len(rows)), np.arange(len(rows))], 1)
        x[rows] -= line @ np.linalg.lstsq(line, x[rows], rcond=None)[0]
        late[rows[LAG:]] = condition[rows[:-LAG]]
    starts = np.flatnonzero(np.r_[True, (late[1:] != late[:-1]) | (run[1:] != run[:-1])])
    blocks = [rows for rows in np.split(np.arange(len(x)), starts[1:]) if late[rows[0]] != "rest"]
    means = np.stack([x[rows].mean(0) for rows in blocks]) / x.std(0)
    first = [rows[0] for rows in blocks]
    return Blocks(torch.tensor(means, dtype=torch.float32), torch.tensor(run[first].astype(int)), late[first], mask)


def face_house(x: Float[Tensor, "n voxels"], category: NDArray[np.str_]) -> Float[Tensor, " voxels"]:
    """Return the mean volume of faces less that of houses."""
    return x[category == "face"].mean(0) - x[category == "house"].mean(0)


def permuted(blocks: Blocks, maps: Float[Tensor, "voxels k"], draws: int, seed: int) -> Float[Tensor, " draws"]:
    """Return best cosines of a column with the contrast of blocks whose categories are permuted within runs."""
    generator, run = np.random.default_rng(seed), blocks.run.numpy()
    best = []
    for _ in range(draws):
        order = np.lexsort((generator.random(len(run)), run))  # runs are in order: this permutes within each
        contrast = face_house(blocks.x, blocks.category[order])
        best.append(cosine_similarity(maps, contrast[:, None], dim=0).abs().max())
    return torch.stack(best)


def on_haxby(data: Path, out: Path, seed: int, smoke_test: bool) -> None:
    blocks = read(data)
    vae, kl, result = train(blocks.x, blocks.run, BETA, seed, steps=600 if smoke_test else 2000)
    maps = vae.task_maps.detach()[:, kl > ACTIVE]
    contrast = face_house(blocks.x, blocks.category)
    cosines = cosine_similarity(maps, contrast[:, None], dim=0)
    best = int(cosines.abs().argmax())
    observed, null = cosines[best].abs().item(), permuted(blocks, maps, 200 if smoke_test else 2000, seed)
    exact = optimum(covariance_within(blocks.x, blocks.run), len(kl), BETA).maps.float()
    reachable = cosine_similarity(exact, contrast[:, None], dim=0).abs().max().item()
    p = (1 + (null >= observed).sum().item()) / (1 + len(null))

    high, low = (torch.as_tensor(blocks.category == name) for name in ("face", "house"))
    path = walk(vae, blocks.x, blocks.run, high, low, int((kl > ACTIVE).nonzero()[best]))
    r = correlation(path[-1] - path[0], contrast)
    export(vae, result, blocks.x, blocks.run, out)
    if importlib.util.find_spec("matplotlib") is not None:
        column = maps[:, best] * cosines[best].sign()
        draw_null(contrast, column, blocks.mask, observed, null, p, out / "fmri_beta_vae.png")
    print(
        f"β = {BETA:g}, {maps.shape[1]} active columns; best cosine with faces - houses {observed:.3f} "
        f"(exact optimum {reachable:.3f}); "
        f"blocks permuted within runs: mean {null.mean():.3f}, 95 % below {null.quantile(0.95):.3f}, "
        f"p = {p:.4f} of {len(null)}; "
        f"a walk from houses to faces correlates at {r:.3f}"
    )
    assert p < 0.05, f"a column must follow the contrast more closely than under permuted labels, got p = {p:.3f}"


def draw_sweep(found: dict[float, Found], beta: float, simulator: Simulator, walks: list[Tensor], path: Path) -> None:
    """Plot cosines over β, true maps beside matched columns, and the walk along the first of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 4.7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15])
    ax, betas = left.subplots(), list(found)
    for k, color in enumerate(("#1f5fa8", "#d08c3f", "#4f8f5b")):
        label = f"contrast {k + 1}, amplitude {simulator.amplitudes[k]:g} σ"
        ax.plot(betas, [f.cosines[k] for f in found.values()], "o-", color=color, label=label)
        ax.plot(betas, [f.exact[k] for f in found.values()], ":", color=color)
    ax.plot([], [], "k:", label="exact optimum")
    ax.axvline(beta, color="#9aa5b1", lw=1, zorder=0)
    ax.text(beta, 0.02, f" best β = {beta:g}", color="#5f6b78")
    ax.set(xscale="log", xlabel="β of z_task", ylabel="|cosine| of matched column and contrast", ylim=(0, 1.03))
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 0.06))
    ax.set_title("small β: columns rotated; large β: weak contrasts pruned")

    axes = right.subplots(len(walks), 7)
    maps = normalize(found[beta].vae.task_maps.detach(), dim=0)[:, found[beta].columns]
    maps = maps * (maps * simulator.contrasts).sum(0).sign()
    for line, true, own, steps in zip(axes, simulator.contrasts.T, maps.T, walks, strict=True):
        for ax, image in zip(line, (true, own, *(steps / steps.abs().max() * true.abs().max())), strict=True):
            limit = true.abs().max()
            ax.imshow(image.reshape(simulator.side, -1).numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
            ax.set(xticks=[], yticks=[])
    for k, line in enumerate(axes):
        line[0].set_ylabel(f"contrast {k + 1}")
    titles = ("truth", "column", "level -1", "", "half-way", "", "level +1")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=10)
    right.suptitle(f"β = {beta:g}: true maps, matched columns, walks along z_task (red > 0 > blue)")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_null(
    contrast: Tensor, column: Tensor, mask: NDArray[np.bool_], observed: float, null: Tensor, p: float, path: Path
) -> None:
    """Plot the contrast and the best column in the slice, and the observed cosine in its null distribution."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 4), width_ratios=[1, 1, 2.2], layout="constrained")
    for ax, title, values in zip(axes, ("faces - houses", "best column of W"), (contrast, column), strict=False):
        image = np.full(mask.shape, np.nan)
        image[mask] = values / values.norm()
        picture = ax.imshow(image, cmap="RdBu_r", vmin=-0.15, vmax=0.15)
        ax.set(xticks=[], yticks=[], title=title)
    figure.colorbar(picture, ax=axes[:2], shrink=0.7, label="map of length 1 (red: faces)")
    axes[2].hist(null.numpy(), bins=40, color="#9aa5b1", label="blocks permuted within runs")
    axes[2].axvline(observed, color="#b3452c", lw=2, label=f"observed {observed:.3f}, p = {p:.4f}")
    axes[2].set(xlabel="best |cosine| of a column with the contrast", ylabel="permutations")
    axes[2].legend(frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(data: Path | None, out: Path, *, seed: int = 0, smoke_test: bool = False) -> None:
    if data is None:
        on_simulator(out, seed, smoke_test)
    else:
        on_haxby(data, out, seed, smoke_test)
    print(f"written to {out}/: fmri_beta_vae.png (with matplotlib), posterior.nc")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a slice of Haxby's volumes, haxby2001_slice.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/fmri_beta_vae"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="three β, few steps, and a claim to match")
    args = parser.parse_args()
    main(args.data, args.out, seed=args.seed, smoke_test=args.smoke_test)
