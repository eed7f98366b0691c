"""Find out whether a variational posterior can be trusted, where the exact answer is known: eight schools.

A mean-field and a full-covariance Gaussian are fitted to the centered and to the non-centered program of the model.
k-hat says which of the four fits importance weights can repair; the repaired means are compared with the exact ones,
and the standard deviations of guides, linear response and weights with the exact ones. Importance sampling and
annealing estimate the evidence, and simulated data with known parameters show which procedures are calibrated.

Nothing but the exact column needs the exact answer: the checks would say the same about a posterior that nobody knows.
Run with ``python -m examples.trust_the_posterior``; figure and posterior are saved to
``runs/trust_the_posterior/``.
"""

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from jaxtyping import Float
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

import pyro_elbo as pe
from models.eight_schools import SIGMA, Exact, Y, centered, noncentered

PROGRAMS = {"centered": centered, "non-centered": noncentered}
GUIDES = {"mean field": AutoNormal, "full covariance": AutoMultivariateNormal}
SITES = ("mu", "tau", "theta")
COLUMNS = ("μ", "τ", *(f"θ{j + 1}" for j in range(len(Y))))
DRAWS = 20_000
COLORS = {
    "exact draws": "#9aa5b1",
    "centered, mean field": "#b3452c",
    "non-centered, mean field": "#d08c3f",
    "non-centered, mean field, PSIS": "#1f5fa8",
}
GOOD = 0.7
"""The largest k-hat of weights that can be used."""


@dataclass(frozen=True)
class Fit:
    """A guide and what trains it, to be trained again on other data."""

    program: Callable[..., None]
    guide: Any
    svi: pe.SVI
    steps: int

    def train(self, sigma: Tensor, y: Tensor) -> Any:
        """Train from the beginning, and return the guide."""
        self.svi.reset()
        self.svi.run(self.steps, sigma, y, progress=False)
        return self.guide

    def draw(self, sigma: Tensor, y: Tensor, count: int, resample: str | None, seed: int = 0) -> dict[str, np.ndarray]:
        """Draw from the guide as it is now, or in proportion to the smoothed importance weights."""
        options = {"num_samples": count, "resample": resample, "predictive": False, "prior": False, "seed": seed}
        posterior = pe.to_arviz(self.program, self.guide, sigma, y, **options)["posterior"]
        return {str(name): x.values[0] for name, x in posterior.data_vars.items()}


@dataclass(frozen=True)
class Row:
    """What is found out about one fit; errors of means are in exact standard deviations.

    Attributes:
        name: program and guide.
        k, ess: k-hat, and how many of the draws count.
        error, repaired_error: the largest error of a mean, before and after PSIS.
        ratios: standard deviations over the exact ones, by method, in the order of `COLUMNS`.
        evidence: by importance sampling from the guide.
    """

    name: str
    k: float
    ess: float
    error: float
    repaired_error: float
    ratios: dict[str, Float[np.ndarray, " columns"]]
    evidence: pe.LogEvidence

    @property
    def is_good(self) -> bool:
        """Whether k-hat lets the weights be used."""
        return self.k < GOOD


def prepare(program: Callable[..., None], kind: Callable[..., Any], steps: int, compile: bool) -> Fit:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = kind(program, init_scale=0.1)
    loss = pe.TraceBeta_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    return Fit(program, guide, pe.SVI(program, guide, pyro.optim.Adam({"lr": 0.03}), loss, compile=compile), steps)


def columns(draws: dict[str, np.ndarray]) -> Float[np.ndarray, "draws columns"]:
    """Put the draws of μ, τ and θ side by side."""
    return np.column_stack([draws[site] for site in SITES])


def judge(name: str, fit: Fit, exact: Exact) -> Row:
    """Train on the real data, and apply every check."""
    fit.train(SIGMA, Y)
    mean, sd = (x.numpy() for x in exact.moments)
    drawn, repaired = (columns(fit.draw(SIGMA, Y, DRAWS, resample)) for resample in (None, "psis"))
    error, repaired_error = (np.abs((x.mean(0) - mean) / sd).max() for x in (drawn, repaired))
    ratios = {"guide": drawn.std(0) / sd, "PSIS": repaired.std(0) / sd}
    if isinstance(fit.guide, AutoNormal):
        response = pe.linear_response(fit.program, fit.guide, SIGMA, Y, functions=effects).sd
        ratios["linear response"] = np.concatenate([response[site].values.reshape(-1) for site in SITES]) / sd
    judged = pe.pareto_k(fit.program, fit.guide, SIGMA, Y, num_samples=DRAWS)
    evidence = pe.log_evidence(fit.program, fit.guide, SIGMA, Y, num_samples=DRAWS, progress=False)
    return Row(name, float(judged), judged.ess.item(), error, repaired_error, ratios, evidence)


def effects(z: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return μ, τ and θ from draws of the latents of either program."""
    theta = z["theta"] if "theta" in z else z["mu"][:, None] + z["tau"][:, None] * z["shift"]
    return {"mu": z["mu"], "tau": z["tau"], "theta": theta}


def calibrate(fits: dict[str, Fit], is_short: bool) -> dict[str, pe.Calibration]:
    """Rank true values among draws of the exact posterior, of the mean-field guides, and of the repaired one."""

    def exact(sigma: Tensor, y: Tensor) -> dict[str, Tensor]:
        return Exact.of(sigma, y).draw(99)

    def repaired(fit: Fit, sigma: Tensor, y: Tensor) -> dict[str, np.ndarray]:
        fit.train(sigma, y)
        return fit.draw(sigma, y, 1000 if is_short else 4000, "psis", seed=int(torch.randint(2**31, ())))

    centered_fit, shifted_fit = (fits[f"{name}, mean field"] for name in PROGRAMS)
    runs = {
        "exact draws": (centered, exact),
        "centered, mean field": (centered, centered_fit.train),
        "non-centered, mean field": (noncentered, shifted_fit.train),
        "non-centered, mean field, PSIS": (noncentered, partial(repaired, shifted_fit)),
    }
    names = ("exact draws", "non-centered, mean field, PSIS") if is_short else COLORS
    options = {"num_simulations": 20 if is_short else 100, "progress": False}
    return {name: pe.simulation_based_calibration(runs[name][0], runs[name][1], SIGMA, Y, **options) for name in names}


def report(rows: list[Row]) -> None:
    """Print k-hat, errors of means, and the smallest and largest ratio of standard deviations by method."""
    methods = ("guide", "linear response", "PSIS")
    print("errors of means in exact standard deviations; standard deviations over the exact ones, least to largest")
    print(f"{'':30}{'k-hat':>6}{'ess':>8}{'error':>8}{'PSIS':>8}" + "".join(f"{m:>18}" for m in methods))
    for row in rows:
        spans = (f"{x.min():.2f} to {x.max():.2f}" if (x := row.ratios.get(m)) is not None else "" for m in methods)
        figures = f"{row.k:6.2f}{row.ess:8.0f}{row.error:8.3f}{row.repaired_error:8.3f}"
        print(f"{row.name:30}{figures}" + "".join(f"{span:>18}" for span in spans))


def report_evidence(evidence: dict[str, pe.LogEvidence], exact: float) -> None:
    print(f"\nlog evidence in nats, exact: {exact:.3f}")
    for name, found in evidence.items():
        error, ess = found.total_standard_error.item(), found.ess.item()
        print(f"  {name:42}{float(found):9.3f} ± {error:.3f}   effective draws {ess:.0f} of {found.num_samples}")


def report_calibration(found: dict[str, pe.Calibration]) -> None:
    print("\ncalibration: mean position of the true value among the draws, and verdict")
    for name, calibration in found.items():
        verdicts = {v.name: v for v in calibration.verdicts}
        words = (f"{site} {verdicts[site].mean:.2f} {verdicts[site].words}" for site in ("mu", "tau"))
        print(f"  {name:32}" + "; ".join(words))


def draw(rows: list[Row], evidence: dict[str, pe.LogEvidence], exact: float, found: dict, path: Path) -> None:
    """Plot errors of means, standard deviations, evidence, and calibration of τ."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11.5, 7.2), layout="constrained")
    draw_means(rows, axes[0, 0])
    draw_spreads(rows, axes[0, 1])
    draw_evidence(evidence, exact, axes[1, 0])
    draw_calibration(found, axes[1, 1])
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_means(rows: list[Row], ax: Any) -> None:
    for y, row in enumerate(rows):
        color = "#1f5fa8" if row.is_good else "#b3452c"
        ax.annotate(
            "", (row.repaired_error, y), (row.error, y), arrowprops={"arrowstyle": "->", "color": color, "lw": 2}
        )
        ax.plot(row.error, y, "o", color=color)
    labels = [row.name.replace(", ", ",\n") + f"\nk-hat {row.k:.2f}" for row in rows]
    ax.set_yticks(range(len(rows)), labels, fontsize=9)
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel="largest error of a mean, in standard deviations", xlim=(0, None))
    ax.set_title(f"means: guide to PSIS (blue: k-hat below {GOOD})")


def draw_spreads(rows: list[Row], ax: Any) -> None:
    markers = {"guide": "o", "linear response": "^", "PSIS": "_"}
    for row, color in zip([r for r in rows if "linear response" in r.ratios], ("#b3452c", "#1f5fa8"), strict=True):
        for method, ratio in row.ratios.items():
            ax.plot(ratio, markers[method], color=color, ms=9 if method == "PSIS" else 6, label=f"{row.name}: {method}")
    ax.axhline(1.0, color="#9aa5b1", lw=1, zorder=0)
    ax.set_xticks(range(len(COLUMNS)), COLUMNS)
    ax.set(ylim=(0.1, None), title="standard deviations over the exact ones")
    ax.legend(frameon=False, fontsize=7, ncols=2, loc="lower right", columnspacing=0.5, handletextpad=0.1)


def draw_evidence(evidence: dict[str, pe.LogEvidence], exact: float, ax: Any) -> None:
    for y, found in enumerate(evidence.values()):
        color = "#4f8f5b" if found.method == "ais" else "#1f5fa8"
        ax.errorbar(float(found), y, xerr=2 * found.total_standard_error.item(), fmt="o", color=color, capsize=3)
    ax.axvline(exact, color="#9aa5b1", lw=1, zorder=0)
    ax.set_yticks(range(len(evidence)), [name.replace(", ", ",\n", 1) for name in evidence], fontsize=8)
    ax.set(ylim=(len(evidence) - 0.5, -0.5), xlabel="nats, ± 2 standard errors", title="log evidence (line: exact)")


def draw_calibration(found: dict[str, pe.Calibration], ax: Any) -> None:
    grid = np.linspace(0, 1, 201)
    for name, calibration in found.items():
        positions = calibration.positions["tau"].values
        ax.plot(grid, (positions[:, None] <= grid).mean(0) - grid, color=COLORS[name], label=name)
    limit = 1.36 / len(positions) ** 0.5  # of Kolmogorov's test, at 5 %
    ax.axhspan(-limit, limit, color="#9aa5b1", alpha=0.25, lw=0)
    ax.set(xlabel="position of the true τ among the draws", title="calibration: ECDF less the diagonal", xlim=(0, 1))
    ax.legend(frameon=False, fontsize=8)


def conclude(rows: list[Row], evidence: dict[str, pe.LogEvidence], exact: float, found: dict, is_short: bool) -> None:
    """Print what the checks said and whether the exact answer agrees, and fail where it does not."""
    good = [row for row in rows if row.is_good]
    told = [evidence[name] for name in evidence if "annealing" in name] + [row.evidence for row in good]
    farthest = max(abs(float(x) - exact) / x.total_standard_error.item() for x in told)
    errors = [[row.repaired_error for row in rows if row.is_good is side] or [0.0] for side in (True, False)]
    print(
        f"claim: {len(good)} of {len(rows)} fits have a k-hat below {GOOD}; PSIS brings their means within "
        f"{max(errors[0]):.3f} standard deviations of the exact ones, those of the others within {max(errors[1]):.3f}; "
        f"log evidence is off by {farthest:.1f} standard errors at most"
    )
    assert farthest < 5, f"log evidence must lie within 5 standard errors of the exact one, got {farthest:.1f}"
    assert found["exact draws"].is_calibrated, "exact draws must be calibrated"
    assert is_short or max(errors[0]) < 0.1 < min(errors[1]), f"k-hat must tell which means are repaired, got {errors}"
    assert is_short or not found["centered, mean field"].is_calibrated, "a mean field on a funnel is not calibrated"


def main(out: Path, *, smoke_test: bool = False) -> None:
    out.mkdir(parents=True, exist_ok=True)
    steps = 20 if smoke_test else 3000
    kinds = [(p, g) for p in PROGRAMS for g in GUIDES]
    fits = {f"{p}, {g}": prepare(PROGRAMS[p], GUIDES[g], steps, not smoke_test) for p, g in kinds}
    exact = Exact.of(SIGMA, Y)
    rows = [judge(name, fit, exact) for name, fit in fits.items()]
    report(rows)

    truth = exact.log_evidence.item()
    evidence = {f"{row.name}, importance": row.evidence for row in rows}
    for name, program in PROGRAMS.items():
        evidence[f"{name}, annealing"] = pe.log_evidence(program, None, SIGMA, Y, method="ais", progress=False)
    report_evidence(evidence, truth)

    best = fits["non-centered, mean field"]
    pe.to_arviz(best.program, best.guide, SIGMA, Y, resample="psis").to_netcdf(str(out / "posterior.nc"))
    found = calibrate(fits, smoke_test)
    report_calibration(found)
    if importlib.util.find_spec("matplotlib") is not None:
        draw(rows, evidence, truth, found, out / "trust_the_posterior.png")
    print(f"\nwritten to {out}/: " + ", ".join(sorted(path.name for path in out.iterdir())))
    conclude(rows, evidence, truth, found, smoke_test)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/trust_the_posterior"))
    parser.add_argument("--smoke-test", action="store_true", help="few steps and simulations, and a claim to match")
    args = parser.parse_args()
    main(args.out, smoke_test=args.smoke_test)
