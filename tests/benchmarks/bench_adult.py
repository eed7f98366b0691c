"""Representations of UCI's Adult that keep income and forget sex: the trade-off over λ, for every estimator.

Run with ``python -m tests.benchmarks.bench_adult --data FILE --seeds 0 1 2 --save adult.nc``. A FairVAE trains on nine
tenths of the standard train split; the last tenth, which is validation, chooses λ for each estimator: the smallest at
which every seed meets the targets there. Test figures are of probes fitted on the whole train split and judged on the
test split. z is one draw of q(z | x, s) a row, with a seed of its own.

Curves are audited by logistic regression and gradient boosting. The headline, λ = 0 and the chosen λ, is audited by an
MLP too; and once more from means of q(z | x, s), of which no penalty speaks. ``bracket`` is the batch estimate of
I(z; s) with sampling error on 8192 test rows, ``bound`` the ELBO of x given s in nats per test row, ``low`` the best
probe's lower bound on I(z; s). Seconds are of the training alone, the first step's compilation included.

The variational estimator bounds I by the likelihoods of all that is observed, so of y also. Its runs weigh y by
1 / (1 + λ) of the recipe's weight: together the terms are then those of Moyer et al., ELBO(x) + weight · log p(y | z) -
λ (KL - log p(x | z, s)).
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import get_args

import numpy as np
import pyro
import torch
import xarray
from torch import Tensor

import pyro_elbo as pe
from models.fair_vae import FairVAE, Table, load_adult
from pyro_elbo.information.penalties import Estimator
from pyro_elbo.representation.audit import Audit, Fairness, audit
from pyro_elbo.representation.probes import PROBES, Estimate, ProbeScore, Readout

FAST = ("logistic", "gradient boosting")
SEX, INCOME = 0.69, 0.82  # the targets: at most, at least; and half of the parity difference at λ = 0
HELD_OUT = 0.1
WEIGHTS: dict[Estimator, tuple[float, ...]] = {
    "aggregate": (10.0, 30.0, 60.0, 100.0, 200.0),
    "variational": (3.0, 30.0, 100.0, 300.0, 1000.0),
    "club": (10.0, 30.0, 60.0, 100.0, 200.0),
    "adversarial": (10.0, 30.0, 60.0, 100.0, 200.0),
    "hsic": (3e3, 1e4, 3e4, 1e5, 3e5),
}


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: Adam, whose rate falls along a cosine to 0."""

    z_dim: int = 8
    hidden: tuple[int, ...] = (100,)
    target_weight: float = 60.0
    lr: float = 3e-3
    epochs: int = 30
    batch: int = 512


@dataclass(frozen=True)
class Data:
    """The standard split, of whose train rows some are held out for validation."""

    train: Table
    test: Table
    groups: dict[str, int]
    fitted: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Outcome:
    """A trained model's figures.

    Attributes:
        weight: λ.
        bracket: of I(z; s), nats.
        bound: nats per test row.
        seconds: of the training.
        draws, means: z of the train and of the test rows.
        valid, test: audits of the draws.
    """

    estimator: str
    weight: float
    seed: int
    bracket: tuple[float, float]
    bound: float
    seconds: float
    draws: tuple[Tensor, Tensor]
    means: tuple[Tensor, Tensor]
    valid: Audit
    test: Audit


def load(path: Path) -> Data:
    """Read the file, and hold a tenth of the train split out."""
    train, test, groups = load_adult(path)
    order = torch.randperm(len(train.x), generator=torch.Generator().manual_seed(0))
    held_out = round(HELD_OUT * len(order))
    return Data(train, test, groups, order[held_out:], order[:held_out])


def fit(estimator: Estimator, weight: float, seed: int, recipe: Recipe, data: Data) -> FairVAE:
    """Train a model."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    shrunk = recipe.target_weight / (1 + weight) if estimator == "variational" else recipe.target_weight
    numeric = data.train.x.shape[1] - sum(data.groups.values())
    vae = FairVAE(numeric, data.groups, z_dim=recipe.z_dim, hidden=recipe.hidden, target_weight=shrunk)
    optim = torch.optim.Adam(vae.parameters(), lr=recipe.lr)
    # As a schedule, λ is an input of the compiled step, and one graph serves all weights.
    loss = pe.TraceMI_ELBO("z", attribute="s", weight=pe.Constant(weight), estimator=estimator)
    svi = pe.SVI(vae.model, vae.guide, optim, loss, compile=True)
    batches = len(data.fitted) // recipe.batch
    for epoch in range(recipe.epochs):
        optim.param_groups[0]["lr"] = recipe.lr * 0.5 * (1 + np.cos(np.pi * epoch / recipe.epochs))
        order = data.fitted[torch.randperm(len(data.fitted))[: batches * recipe.batch]]
        for rows in order.view(batches, recipe.batch):
            svi.step(*data.train.rows(rows))
    return vae


@torch.no_grad()
def measure(vae: FairVAE, test: Table) -> tuple[tuple[float, float], float]:
    """The bracket of I(z; s), and the bound of x given s."""
    pyro.set_rng_seed(0)
    some = test.rows(torch.arange(8192))
    terms = pe.TraceMI_ELBO("z", attribute="s", weight=0.0).terms(vae.model, vae.guide, *some)
    of_x = sum(x.mean().item() for name, x in terms.log_likelihood.items() if name.startswith("x_"))
    return terms.penalties["I(z; s)"].bracket, of_x - terms.kl["z"].mean().item()


def judge(z: Tensor, table: Table, z_judged: Tensor, judged: Table, probes: Sequence[str] = FAST) -> Audit:
    """What probes fitted on one table read out of another."""
    y, y_judged = table.y.long(), judged.y.long()
    return audit(z, table.s, y, test=(z_judged, judged.s, y_judged), probes=probes, name_s="sex", name_y="income")


def run(estimator: Estimator, weight: float, seed: int, recipe: Recipe, data: Data) -> Outcome:
    """Train, measure and judge."""
    start = time.perf_counter()
    vae = fit(estimator, weight, seed, recipe, data)
    seconds = time.perf_counter() - start
    bracket, bound = measure(vae, data.test)
    tables = (data.train, data.test)
    train, test = (vae.draw(t.x, t.s, seed=i) for i, t in enumerate(tables))
    with torch.no_grad():
        mean_train, mean_test = (vae.encode(t.x, t.s)[0] for t in tables)
    fitted, valid = data.fitted, data.valid
    validation = judge(train[fitted], data.train.rows(fitted), train[valid], data.train.rows(valid))
    return Outcome(
        estimator,
        weight,
        seed,
        bracket,
        bound,
        seconds,
        draws=(train, test),
        means=(mean_train, mean_test),
        valid=validation,
        test=judge(train, data.train, test, data.test),
    )


# --- figures and targets


Figures = tuple[float, float, float]  # accuracy of sex and of income, demographic-parity difference


def figures(audits: Sequence[Audit]) -> Figures:
    """Means over audits."""
    return (
        fmean(a.s.best.accuracy.value for a in audits),
        fmean(a.y.best.accuracy.value for a in audits),
        fmean(a.fairness.demographic_parity.value for a in audits),
    )


def meets(found: Figures, free: Figures) -> bool:
    """Whether the targets are met; ``free`` is at λ = 0."""
    return found[0] <= SEX and found[1] >= INCOME and found[2] <= free[2] / 2


def where_met(outcomes: Sequence[Outcome], of: Callable[[Outcome], Audit]) -> list[float]:
    """The λ at which every seed meets the targets."""
    free = {o.seed: figures([of(o)]) for o in outcomes if o.weight == 0}
    missed = {o.weight for o in outcomes if not meets(figures([of(o)]), free[o.seed])}
    return sorted({o.weight for o in outcomes} - missed)


# --- tables


HEAD = (
    f"{'estimator':12}{'λ':>8}{'seed':>5}{'bracket of I, nats':>20}{'low':>8}{'sex, best probe':>23}"
    f"{'income':>8}{'parity':>8}{'odds':>8}{'bound':>9}{'seconds':>9}"
)


def describe(outcome: Outcome) -> str:
    """A row of the table of test figures."""
    found, (low, high) = outcome.test, outcome.bracket
    return (
        f"{outcome.estimator:12}{outcome.weight:8g}{outcome.seed:5}{f'[{low:.3f}, {high:.3f}]':>20}"
        f"{found.s.information.value:8.3f}{f'{found.s.best.accuracy}':>23}{found.y.best.accuracy.value:8.3f}"
        f"{found.fairness.demographic_parity.value:8.3f}{found.fairness.equalized_odds.value:8.3f}"
        f"{outcome.bound:9.2f}{outcome.seconds:9.1f}"
    )


def describe_means(outcomes: Sequence[Outcome]) -> list[str]:
    """For every λ the means over seeds, on test and on validation rows."""
    rows = [
        f"{'mean over seeds':20}{'sex':>8}{'income':>8}{'parity':>8}{'validation: sex':>18}{'income':>8}{'parity':>8}"
    ]
    for weight in sorted({o.weight for o in outcomes}):
        chosen = [o for o in outcomes if o.weight == weight]
        test, valid = figures([o.test for o in chosen]), figures([o.valid for o in chosen])
        numbers = "".join(f"{x:8.3f}" for x in test) + f"{valid[0]:18.3f}" + "".join(f"{x:8.3f}" for x in valid[1:])
        rows.append(f"{f'λ = {weight:g}':20}{numbers}")
    return rows


def headline(outcomes: Sequence[Outcome], of_free: Callable[[Outcome], Audit], data: Data) -> list[str]:
    """Judge the chosen λ by all probes, against λ = 0, for every seed and on average."""
    on_test, on_valid = where_met(outcomes, lambda o: o.test), where_met(outcomes, lambda o: o.valid)
    rows = [f"every seed meets the targets at λ in {on_test} on the test rows, {on_valid} on the validation rows"]
    if not on_valid:
        return [*rows, "no λ chosen: MISSED"]
    weight = on_valid[0]
    rows.append(f"chosen on the validation rows: λ = {weight:g}; all probes")
    free = {o.seed: of_free(o) for o in outcomes if o.weight == 0}
    chosen = {o.seed: judge_all(o, data) for o in outcomes if o.weight == weight}
    for seed in (None, *chosen):
        found, without = (figures(list(a.values()) if seed is None else [a[seed]]) for a in (chosen, free))
        numbers = ", ".join(
            f"{name} {a:.3f} -> {b:.3f}" for name, a, b in zip(("sex", "income", "parity"), without, found, strict=True)
        )
        rows.append(f"  {'mean' if seed is None else f'seed {seed}'}: {numbers}: {met(meets(found, without))}")
    rows += [f"  seed {seed}: {found!r}" for seed, found in chosen.items()]
    for o in (o for o in outcomes if o.weight in (0.0, weight)):
        sex, income, parity = figures([judge(o.means[0], data.train, o.means[1], data.test)])
        rows.append(
            f"  means of q at λ = {o.weight:g}, seed {o.seed}: sex {sex:.3f}, income {income:.3f}, parity {parity:.3f}"
        )
    return rows


def judge_all(outcome: Outcome, data: Data) -> Audit:
    """The audit by all probes."""
    return judge(outcome.draws[0], data.train, outcome.draws[1], data.test, PROBES)


def met(reached: bool) -> str:
    return "met" if reached else "MISSED"


# --- files


def to_dataset(outcomes: Sequence[Outcome]) -> xarray.Dataset:
    """The test audits of all runs, one after the other."""
    runs = []
    for o in outcomes:
        found = o.test.to_dataset().assign(bound=o.bound, seconds=o.seconds, bracket=("side", list(o.bracket)))
        found.attrs |= {"majority_levels": [r.majority_level for r in o.test.readouts]}
        found.attrs |= {f"levels_{r.name}": list(r.levels) for r in o.test.readouts}
        runs.append(found.assign_coords(estimator=o.estimator, weight=o.weight, seed=o.seed))
    return xarray.concat(runs, "run", combine_attrs="drop_conflicts")


def read_curves(path: Path, seed: int = 0) -> dict[str, dict[float, Audit]]:
    """What ``--save`` wrote, as ``pyro_elbo.plots.plot_tradeoff`` takes it: audits by weight, by estimator."""
    curves: dict[str, dict[float, Audit]] = {}
    with xarray.open_dataset(path, engine="h5netcdf") as saved:
        runs = saved.load()
    chosen = [runs.isel(run=i) for i in range(runs.sizes["run"]) if int(runs.seed[i]) == seed]
    free = [run for run in chosen if float(run.weight) == 0]
    for run in chosen:
        curve = curves.setdefault(str(run.estimator.values), {float(f.weight): to_audit(f) for f in free})
        curve[float(run.weight)] = to_audit(run)
    return {name: curve for name, curve in curves.items() if len(curve) > 1}


def to_audit(found: xarray.Dataset) -> Audit:
    """The inverse of ``Audit.to_dataset``."""

    def estimate(values: xarray.DataArray) -> Estimate:
        return Estimate(*map(float, values.values))

    def readout(name: str, majority_level: str) -> Readout:
        one = found.sel(target=name)
        scores = [
            ProbeScore(
                str(probe),
                *(estimate(one[figure].sel(probe=probe)) for figure in ("accuracy", "cross_entropy", "information")),
                bool(one.converged.sel(probe=probe)),
            )
            for probe in found.probe.values
        ]
        levels = tuple(map(str, found.attrs[f"levels_{name}"]))
        return Readout(name, levels, majority_level, float(one.majority), float(one.entropy), tuple(scores))

    s, y = (
        readout(str(n), str(level))
        for n, level in zip(found.target.values, found.attrs["majority_levels"], strict=True)
    )
    gaps = (estimate(found[name]) for name in ("demographic_parity", "equalized_odds", "label_parity"))
    return Audit(int(found.attrs["rows"]), int(found.attrs["folds"]), s, y, Fairness(*gaps))


def main(
    data: Data,
    estimators: Sequence[Estimator],
    weights: Mapping[Estimator, Sequence[float]],
    seeds: Sequence[int],
    recipe: Recipe,
    save: Path | None,
) -> None:
    """All runs, the tables and the file."""
    free = [run("aggregate", 0.0, seed, recipe, data) for seed in seeds]  # at λ = 0 all estimators are one
    free = [replace(outcome, estimator="none") for outcome in free]
    print(HEAD, *map(describe, free), sep="\n", flush=True)
    of_free = cache(lambda seed: judge_all(free[seeds.index(seed)], data))
    outcomes = list(free)
    for estimator in estimators:
        print(f"\n{HEAD}", flush=True)
        curve = list(free)
        for weight in weights[estimator]:
            for seed in seeds:
                curve.append(run(estimator, weight, seed, recipe, data))
                print(describe(curve[-1]), flush=True)
        print(*describe_means(curve), *headline(curve, lambda o: of_free(o.seed), data), sep="\n", flush=True)
        outcomes += curve[len(free) :]
        if save is not None:
            to_dataset(outcomes).to_netcdf(save, engine="h5netcdf")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="adult.npz")
    parser.add_argument("--estimators", nargs="+", choices=get_args(Estimator), default=list(WEIGHTS))
    parser.add_argument("--weights", nargs="+", type=float, help="λ beside 0, in place of each estimator's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--save", type=Path, help="NetCDF file for the test audits of all runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(False)  # the data are known
    grid = {name: tuple(args.weights or WEIGHTS[name]) for name in args.estimators}
    chosen_recipe = Recipe(epochs=args.epochs)
    print(chosen_recipe, flush=True)
    main(load(args.data), args.estimators, grid, args.seeds, chosen_recipe, args.save)
