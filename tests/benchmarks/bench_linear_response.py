"""Standard deviations by linear response against those of posteriordb's reference draws.

Run with ``PYRO_ELBO_DATA=... python -m tests.benchmarks.bench_linear_response``. For each posterior and its parameters:
median and largest |log(sd / reference sd)| of the mean-field guide and of linear response, the same for draws of the
Gaussian on the real line, k-hat of the full-rank guide that examples.posteriordb fits, seconds of linear response.
"""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoNormal, init_to_value

import pyro_elbo as pe
from examples.posteriordb import fit_guide
from models.posteriordb import POSTERIORS, Posterior

DRAWS = 20_000


def columns(posterior: Posterior, data: Any) -> np.ndarray:
    """Return one number per column of the reference."""
    return posterior.columns({s: torch.as_tensor(data[s].values)[None] for s in posterior.sites}).numpy()[0]


def respond(posterior: Posterior, args: tuple) -> tuple[pe.LinearResponse, float]:
    """Return the linear response of a mean-field guide from its initial parameters, and its time."""
    pyro.clear_param_store()
    start = init_to_value(values=posterior.init(*args), fallback=None)
    guide = AutoNormal(posterior.model, init_loc_fn=start, init_scale=0.1)
    guide(*args)
    began = time.perf_counter()
    return pe.linear_response(posterior.model, guide, *args), time.perf_counter() - began


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(os.environ["PYRO_ELBO_DATA"]) / "posteriordb"
    heads = ("mean-field", "linear response", "draws")
    print(f"{'':42}{'':>4}" + "".join(f"{h:>18}" for h in heads))
    print(f"{'posterior':42}{'n':>4}" + f"{'median':>10}{'worst':>8}" * 3 + f"{'k-hat':>8}{'seconds':>9}")
    every = []
    for posterior in POSTERIORS.values():
        args = posterior.load(folder)
        _, reference = posterior.reference(folder)
        response, seconds = respond(posterior, args)
        draws = response.draws(DRAWS).std("draw")
        found = [columns(posterior, x) for x in (response.guide_sd, response.sd, draws)]
        errors = [np.abs(np.log(x / reference.std(0))) for x in found]
        every.append(errors)
        full = fit_guide(posterior, args, "AutoMultivariateNormal")
        k = float(pe.pareto_k(posterior.model, full, *args, num_samples=DRAWS, seed=1))
        figures = "".join(f"{np.median(e):10.3f}{e.max():8.3f}" for e in errors)
        print(f"{posterior.name:42}{len(errors[0]):4}{figures}{k:8.2f}{seconds:9.1f}", flush=True)
    together = [np.concatenate(e) for e in zip(*every, strict=True)]
    figures = "".join(f"{np.median(e):10.3f}{e.max():8.3f}" for e in together)
    print(f"{'all':42}{len(together[0]):4}{figures}")


if __name__ == "__main__":
    main()
