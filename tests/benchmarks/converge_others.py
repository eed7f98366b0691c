"""The stopping rules of viabel and PyMC on two posteriors of ``bench_converge``, with mean-field guides.

Run with ``PYRO_ELBO_DATA=... python -m tests.benchmarks.converge_others``, after ``bench_converge`` has left the optima
in ``--cache``. viabel runs at a fixed step size until the Monte Carlo errors of its averages are small (FASO); PyMC
runs ADVI with ``CheckParametersConvergence``. Neither gets another setting. Prints the steps, the seconds, and the
largest error of a posterior mean in standard deviations of the reference draws.
"""

import argparse
import os
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from models.posteriordb import POSTERIORS

LIMIT = 100_000
Result = tuple[int, np.ndarray]  # steps, and posterior means in the order of the reference


def schools_viabel(sigma: np.ndarray, y: np.ndarray, seed: int) -> Result:
    import autograd.numpy as anp

    def log_density(x: Any) -> Any:
        mu, log_tau, theta = x[:, :1], x[:, 1:2], x[:, 2:]
        tau = anp.exp(log_tau)
        prior = -(mu**2) / 50 - anp.log1p((tau / 5) ** 2) + log_tau
        residual = (y - mu - tau * theta) / sigma
        return prior[:, 0] - (anp.sum(theta**2, 1) + anp.sum(residual**2, 1)) / 2

    def means(x: np.ndarray) -> np.ndarray:
        mu, tau = x[:, :1], np.exp(x[:, 1:2])
        return np.concatenate([mu + tau * x[:, 2:], mu, tau], 1).mean(0)

    return viabel(log_density, 10, means, seed)


def bushes_viabel(design: np.ndarray, y: np.ndarray, seed: int) -> Result:
    import autograd.numpy as anp

    def log_density(x: Any) -> Any:
        residual = (y - anp.dot(x[:, :-1], design.T)) / anp.exp(x[:, -1:])
        return -(len(y) - 1) * x[:, -1] - anp.sum(residual**2, 1) / 2

    def means(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[:, :-1], np.exp(x[:, -1:])], 1).mean(0)

    return viabel(log_density, design.shape[1] + 1, means, seed)


def viabel(log_density: Callable, dimension: int, means: Callable, seed: int) -> Result:
    """Run viabel at its fixed step size until its averages are certain enough; lowering it takes Stan."""
    import autograd.numpy as anp

    anp.product = anp.prod  # a name that NumPy 2 has dropped
    sys.modules.setdefault("pystan", types.ModuleType("pystan"))  # imported, but for Stan's models only
    from viabel import MFGaussian, bbvi

    np.random.seed(seed)  # noqa: NPY002  (viabel draws from the global generator)
    found = bbvi(dimension, log_density=log_density, n_iters=LIMIT, fixed_lr=True)
    draws = MFGaussian(dimension).sample(found["opt_param"], 4000)
    return len(found["value_history"]), means(draws)


def schools_pymc(sigma: np.ndarray, y: np.ndarray, seed: int) -> Result:
    import pymc

    with pymc.Model():
        mu, tau = pymc.Normal("mu", 0, 5), pymc.HalfCauchy("tau", 5)
        trans = pymc.Normal("trans", 0, 1, shape=8)
        theta = pymc.Deterministic("theta", mu + tau * trans)
        pymc.Normal("y", theta, sigma, observed=y)
        return advi(seed, ("theta", "mu", "tau"))


def bushes_pymc(design: np.ndarray, y: np.ndarray, seed: int) -> Result:
    import pymc

    with pymc.Model():
        beta, sigma = pymc.Flat("beta", shape=design.shape[1]), pymc.HalfFlat("sigma")
        pymc.Normal("y", design @ beta, sigma, observed=y)
        return advi(seed, ("beta", "sigma"))


def advi(seed: int, names: tuple[str, ...]) -> Result:
    """Run ADVI until its callback ends it."""
    import pymc

    ends = [pymc.callbacks.CheckParametersConvergence()]
    fitted = pymc.fit(LIMIT, method="advi", callbacks=ends, random_seed=seed, progressbar=False)
    draws = fitted.sample(4000, random_seed=seed).posterior
    return len(fitted.hist), np.concatenate([np.atleast_1d(draws[n].mean(("chain", "draw")).values) for n in names])


RUNS = {
    "eight_schools-eight_schools_noncentered": {"viabel": schools_viabel, "PyMC": schools_pymc},
    "mesquite-logmesquite": {"viabel": bushes_viabel, "PyMC": bushes_pymc},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=["viabel", "PyMC"], default=["viabel", "PyMC"])
    parser.add_argument("--cache", type=Path, default=Path("runs/bench_converge"), help="folder of the optima")
    options = parser.parse_args()
    folder = Path(os.environ["PYRO_ELBO_DATA"]) / "posteriordb"
    print(f"{'posterior':44}{'rule':8}{'steps':>9}{'seconds':>9}{'error (worst)':>15}")
    for name, rules in RUNS.items():
        arrays = [x.numpy() for x in POSTERIORS[name].load(folder)]
        columns, draws = POSTERIORS[name].reference(folder)
        best = np.load(options.cache / f"{name}.AutoNormal.npy")
        for rule in options.only:
            steps, seconds, errors = [], [], []
            for seed in range(options.seeds):
                start = time.perf_counter()
                taken, means = rules[rule](*arrays, seed)
                seconds.append(time.perf_counter() - start)
                steps.append(taken)
                errors.append(np.abs((means - best) / draws.std(0)).max())
            print(
                f"{name:44}{rule:8}{statistics.median(steps):9.0f}{statistics.median(seconds):9.1f}{max(errors):15.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
