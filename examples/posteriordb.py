"""Eight reference posteriors, fitted by SVI, judged by k-hat and corrected by importance resampling.

For every posterior and guide the script prints the largest |mean - reference| in reference standard deviations, before
and after PSIS resampling, then k-hat and the effective sample size. Without ``--data`` it fits only eight schools and
compares the means with those of a long NUTS run. Run with ``python -m examples.posteriordb [--data FOLDER]``.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value

import pyro_elbo as pe
from models.posteriordb import POSTERIORS, Posterior

SCHOOLS = "eight_schools-eight_schools_noncentered"
SCHOOLS_DATA = (
    torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64),
    torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64),
)
# Mean and standard deviation of mu and tau, from 10 chains of 1000 draws.
SCHOOLS_REFERENCE = {"mu": (4.41, 3.31), "tau": (3.60, 3.20)}
GUIDES = {"AutoMultivariateNormal": AutoMultivariateNormal, "AutoNormal": AutoNormal}
STEPS, DRAWS = 3000, 20_000


@dataclass(frozen=True)
class Row:
    """The result of one guide on one posterior."""

    posterior: str
    guide: str
    error: float
    resampled_error: float
    k: float
    ess: float


def fit_guide(posterior: Posterior, args: tuple, kind: str, seed: int = 0) -> object:
    """Train a guide for 3000 steps of Adam; the learning rate decays from 0.02 to 0.0002."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    start = init_to_value(values=posterior.init(*args), fallback=None)
    guide = GUIDES[kind](posterior.model, init_loc_fn=start, init_scale=0.1)
    loss = pe.TraceBeta_ELBO(kl="sampled", num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    optim = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.01 ** (1 / STEPS)})
    svi = pe.SVI(posterior.model, guide, optim, loss, compile=True, fallback_random=True)
    svi.run(STEPS, *args, progress=False)
    return guide


def columns(posterior: Posterior, data: object) -> np.ndarray:
    """Return the posterior draws in the column order of the reference."""
    draws = {site: torch.as_tensor(data["posterior"][site].values.copy()).flatten(0, 1) for site in posterior.sites}
    return posterior.columns(draws).numpy()


def judge(posterior: Posterior, args: tuple, kind: str, mean: np.ndarray, sd: np.ndarray) -> Row:
    """Fit a guide, export raw and resampled draws, and compare both means with the reference."""
    guide = fit_guide(posterior, args, kind)
    options = {"num_samples": DRAWS, "seed": 1, "prior": False, "predictive": False}
    plain = pe.to_arviz(posterior.model, guide, *args, **options)
    resampled = pe.to_arviz(posterior.model, guide, *args, resample="psis", **options)
    error, resampled_error = (np.abs(columns(posterior, d).mean(0) - mean) / sd for d in (plain, resampled))
    trust = pe.pareto_k(posterior.model, guide, *args, num_samples=DRAWS, seed=1)
    return Row(posterior.name, kind, error.max(), resampled_error.max(), float(trust.k), float(trust.ess))


def show(rows: list[Row]) -> None:
    print(f"{'posterior':42}{'guide':24}{'error/sd':>9}{'after PSIS':>11}{'k-hat':>7}{'ESS':>7}")
    for r in rows:
        print(f"{r.posterior:42}{r.guide:24}{r.error:9.3f}{r.resampled_error:11.3f}{r.k:7.2f}{r.ess:7.0f}")
    for r in rows:
        if r.k < 0.7:
            assert r.resampled_error < 0.1, f"{r}: a good k-hat must come with good resampled means"
        assert r.error < 0.3 or r.k >= 0.7, f"{r}: a bad fit must show in k-hat"


def main(folder: Path | None) -> list[Row]:
    rows = []
    if folder is None:
        posterior, means = POSTERIORS[SCHOOLS], SCHOOLS_REFERENCE
        guide = fit_guide(posterior, SCHOOLS_DATA, "AutoMultivariateNormal")
        data = pe.to_arviz(
            posterior.model, guide, *SCHOOLS_DATA, num_samples=DRAWS, resample="psis", seed=1, predictive=False
        )
        for site, (mean, sd) in means.items():
            found = float(data["posterior"][site].mean())
            print(f"{site}: {found:.2f}; reference {mean:.2f} ± {sd:.2f}")
            assert abs(found - mean) < 0.1 * sd, "PSIS-resampled means lie within a tenth of a standard deviation"
        return rows
    for posterior in POSTERIORS.values():
        args = posterior.load(folder)
        _, reference = posterior.reference(folder)
        for kind in GUIDES:
            rows.append(judge(posterior, args, kind, reference.mean(0), reference.std(0)))
            print(f"done: {posterior.name}, {kind}", flush=True)
    show(rows)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="the folder posteriordb/ of data and reference draws")
    main(parser.parse_args().data)
