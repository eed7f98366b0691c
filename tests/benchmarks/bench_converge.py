"""`SVI.converge` on eight posteriors without a setting but the accuracy, against a long run and a fixed budget of Adam.

Run with ``PYRO_ELBO_DATA=... python -m tests.benchmarks.bench_converge``. For every posterior of ``models.posteriordb``
and two guides it prints the steps taken, the predicted distance and the true one: the largest error of a posterior
mean, in standard deviations of the reference draws, against the optimum. The optimum is the average of a run at a small
fixed rate that is twenty times as long; it is kept in ``--cache``. Beside it stands what 4000 steps of Adam at 0.01
reach. Two badly scaled versions have the same optimum in the units of the original, since both families of guides are
closed under scaling and shifts of a coefficient with a flat prior.

``--early N`` stops N runs after a random number of steps and counts those that claim to have converged and have not.
``--cost N`` compares the time of `converge` with that of `run` for the same number of steps.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from torch import Tensor

import pyro_elbo as pe
from models.posteriordb import POSTERIORS, Posterior, least_squares
from models.vae import VAEGuide, VAEModel
from pyro_elbo.posterior import sample_guide

GUIDES = {"AutoNormal": AutoNormal, "AutoMultivariateNormal": AutoMultivariateNormal}
RATE, ACCURACY, ADAM_STEPS, ADAM_RATE, LONG_RATE, DRAWS = 0.05, 0.1, 4000, 0.01, 0.003, 4000


@dataclass(frozen=True)
class Problem:
    """A posterior, perhaps in other units; ``back`` returns a draw of its coefficients to the original's."""

    name: str
    posterior: Posterior
    args: tuple[Tensor, ...]
    start: dict[str, Tensor]
    back: Callable[[Tensor], Tensor] = lambda beta: beta


def problems(folder: Path) -> list[Problem]:
    found = []
    for name, posterior in POSTERIORS.items():
        args = posterior.load(folder)
        found.append(Problem(name.split("-")[-1], posterior, args, posterior.init(*args)))
    nes, bushes = POSTERIORS["nes1972-nes"], POSTERIORS["mesquite-logmesquite"]
    design, party = nes.load(folder)
    units = torch.ones(design.shape[-1], dtype=design.dtype)
    units[1] = 1000.0
    start = {"beta": torch.zeros_like(units), "sigma": least_squares(design, party)[1]}
    found.append(Problem("nes, a coefficient x 1000", nes, (design / units, party), start, lambda b: b / units))
    design, weight = bushes.load(folder)
    start = bushes.init(design, weight)
    shift = torch.zeros(design.shape[-1], dtype=design.dtype)
    shift[0] = 90 * start["sigma"]
    found.append(
        Problem("logmesquite, start 90 sigma off", bushes, (design, weight + shift[0]), start, lambda b: b - shift)
    )
    return found


class Bench:
    """One problem with one guide, compiled once; every run starts from the same parameters with new noise."""

    def __init__(self, problem: Problem, kind: str, folder: Path) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        self.problem, self.kind = problem, kind
        _, draws = problem.posterior.reference(folder)
        self.spread = draws.std(0)
        self.guide = GUIDES[kind](
            problem.posterior.model, init_loc_fn=init_to_value(values=problem.start, fallback=None), init_scale=0.1
        )
        self.guide(*problem.args)
        self.parameters = [p for p in self.guide.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=RATE)
        self.svi = pe.SVI(problem.posterior.model, self.guide, self.optimizer, pe.TraceBeta_ELBO(), compile=True)
        self.initial = [p.detach().clone() for p in self.parameters]
        self.svi.run(3, *problem.args, progress=False)

    def reset(self, seed: int, rate: float) -> None:
        pyro.set_rng_seed(seed)
        self.optimizer.param_groups[0]["lr"] = rate
        with torch.no_grad():
            for p, x in zip(self.parameters, self.initial, strict=True):
                p.copy_(x)
            for state in self.optimizer.state.values():
                for x in state.values():
                    x.zero_()

    def means(self) -> np.ndarray:
        draws = sample_guide(self.problem.posterior.model, self.guide, self.problem.args, {}, DRAWS, 1)
        values = {**draws.latents, **draws.deterministics}
        if "beta" in values:
            values["beta"] = self.problem.back(values["beta"])
        return self.problem.posterior.columns(values).mean(0).numpy()

    def converge(self, seed: int, max_steps: int = 100_000) -> pe.ConvergenceReport:
        self.reset(seed, RATE)
        return self.svi.converge(*self.problem.args, accuracy=ACCURACY, max_steps=max_steps, progress=False)

    def adam(self, seed: int) -> np.ndarray:
        self.reset(seed, ADAM_RATE)
        self.svi.run(ADAM_STEPS, *self.problem.args, progress=False)
        return self.means()

    def long_run(self, steps: int) -> np.ndarray:
        """The means at the average of the second half of a long run from where a converged one ended."""
        self.reset(1000, RATE)
        self.svi.converge(*self.problem.args, accuracy=ACCURACY, progress=False)
        self.optimizer.param_groups[0]["lr"] = LONG_RATE
        self.svi.run(steps // 2, *self.problem.args, progress=False)
        total, count = [torch.zeros_like(p) for p in self.parameters], steps // 200
        for _ in range(count):
            self.svi.run(100, *self.problem.args, progress=False)
            for x, p in zip(total, self.parameters, strict=True):
                x.add_(p.detach(), alpha=1 / count)
        with torch.no_grad():
            for p, x in zip(self.parameters, total, strict=True):
                p.copy_(x)
        return self.means()

    def error(self, means: np.ndarray, optimum: np.ndarray) -> float:
        return float((np.abs(means - optimum) / self.spread).max())


def optimum(bench: Bench, cache: Path, steps: int) -> np.ndarray:
    """The means at the optimum, from the cache or from a run of twenty times ``steps``."""
    path = cache / f"{bench.problem.posterior.name}.{bench.kind}.npy"
    if not path.exists():
        np.save(path, bench.long_run(20 * steps))
    return np.load(path)


def table(chosen: list[Problem], kinds: list[str], seeds: int, folder: Path, cache: Path) -> None:
    columns = ("posterior", "guide", "steps", "seconds", "predicted", "error", "Adam 4000", "converged")
    print("{:32}{:24}{:>9}{:>9}{:>11}{:>8}{:>11}{:>11}".format(*columns))
    wrong = 0
    for problem in chosen:
        for kind in kinds:
            bench = Bench(problem, kind, folder)
            reports, means, seconds = [], [], []
            for seed in range(seeds):
                start = time.perf_counter()
                reports.append(bench.converge(seed))
                seconds.append(time.perf_counter() - start)
                means.append(bench.means())
            best = optimum(bench, cache, max(r.steps for r in reports))
            errors = [bench.error(m, best) for m in means]
            adam = statistics.median(bench.error(bench.adam(seed), best) for seed in range(min(seeds, 3)))
            wrong += sum(r.converged and e > ACCURACY for r, e in zip(reports, errors, strict=True))
            for report, error in zip(reports, errors, strict=True):
                print(f"  {report.steps} steps, predicted {report.distance:.3f}, error {error:.3f}", file=sys.stderr)
            steps, predicted = (statistics.median(getattr(r, what) for r in reports) for what in ("steps", "distance"))
            done = f"{sum(r.converged for r in reports)} of {seeds}"
            print(
                f"{problem.name:32}{kind:24}{steps:9.0f}{statistics.median(seconds):9.2f}{predicted:11.3f}"
                f"{max(errors):8.3f}{adam:11.3f}{done:>11}",
                flush=True,
            )
    print(f"runs that claim to have converged and are more than {ACCURACY} off: {wrong}")


def early(chosen: list[Problem], kinds: list[str], runs: int, folder: Path, cache: Path) -> None:
    """Stop runs after a random number of steps and count the false claims."""
    rng, claims, false = np.random.default_rng(0), 0, 0
    pairs = [(problem, kind) for problem in chosen for kind in kinds]
    for i, (problem, kind) in enumerate(pairs):
        bench = Bench(problem, kind, folder)
        best = optimum(bench, cache, 50_000)
        for seed in range(len(range(i, runs, len(pairs)))):
            report = bench.converge(100 + seed, max_steps=int(10 ** rng.uniform(3.6, 4.9)))
            claims += report.converged
            false += report.converged and bench.error(bench.means(), best) > ACCURACY
    print(f"{runs} runs stopped early: {claims} claim to have converged, {false} of them falsely")


def cost(rounds: int) -> None:
    """Alternate `converge` and the same number of steps of `run`, and print the median of the ratios."""
    from tests.benchmarks.bench_eager import eight_schools

    y, sigma = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]), torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
    x = (torch.rand(128, 64) < 0.3).float()
    works = {
        "eight schools": (lambda: (eight_schools, AutoNormal(eight_schools)), (y, sigma)),
        "VAE 64-128-8, batch 128": (lambda: (VAEModel(total=1), VAEGuide(total=1)), (x,)),
    }
    for title, (make, args) in works.items():
        for compiled, limit in ((True, 1_000_000), (True, 100_000), (False, 3100)):
            limit = limit if len(args) == 2 else limit // 10 if compiled else limit
            pyro.clear_param_store()
            svi = pe.SVI(*make(), pyro.optim.Adam({"lr": RATE}), pe.TraceBeta_ELBO(), compile=compiled)
            svi.run(3, *args, progress=False)
            ratios, extra = [], []
            for _ in range(rounds if compiled else 1 + rounds // 4):
                start = time.process_time()
                steps = svi.converge(*args, accuracy=1e-3, max_steps=limit, progress=False).steps
                middle = time.process_time()
                svi.run(steps, *args, progress=False)
                end = time.process_time()
                ratios.append((middle - start) / (end - middle))
                extra.append(2 * middle - start - end)
            kind = "compiled" if compiled else "in Python"
            print(
                f"{title:24} {kind:10} {steps:9,} steps of {(end - middle) / steps * 1e6:7.1f} µs: "
                f"{statistics.median(ratios):.3f} x run, {1e3 * statistics.median(extra):.0f} ms more",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="parts of the names of posteriors")
    parser.add_argument("--guides", nargs="+", choices=GUIDES, default=list(GUIDES))
    parser.add_argument("--cache", type=Path, default=Path("runs/bench_converge"), help="folder of the optima")
    parser.add_argument("--early", type=int, metavar="N", help="stop N runs early")
    parser.add_argument("--cost", type=int, metavar="N", help="time N rounds")
    options = parser.parse_args()
    if options.cost:
        cost(options.cost)
        return
    folder = Path(os.environ["PYRO_ELBO_DATA"]) / "posteriordb"
    options.cache.mkdir(parents=True, exist_ok=True)
    chosen = [p for p in problems(folder) if not options.only or any(part in p.name for part in options.only)]
    if options.early:
        early(chosen, options.guides, options.early, folder, options.cache)
    else:
        table(chosen, options.guides, options.seeds, folder, options.cache)


if __name__ == "__main__":
    main()
