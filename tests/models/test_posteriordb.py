"""The programs of models/posteriordb.py against densities by hand and posteriordb's reference draws."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal, AutoNormal, init_to_value
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.optim import Adam
from pyro.poutine.util import prune_subsample_sites
from scipy import stats
from torch import Tensor
from torch.distributions import biject_to

from models.posteriordb import POSTERIORS, Posterior, Values
from tests.support.rows import every_other

pytestmark = pytest.mark.slow

Raw = dict[str, Any]
Row = dict[str, np.ndarray]

NAMES = sorted(POSTERIORS)


@pytest.fixture
def folder() -> Path:
    if "PYRO_ELBO_DATA" not in os.environ:
        pytest.skip("PYRO_ELBO_DATA names no data folder")
    return Path(os.environ["PYRO_ELBO_DATA"]) / "posteriordb"


# --- densities by hand: numpy and scipy, from the Stan programs, in the coordinates of the Stan parameters --


def hand_ark(raw: Raw, row: Row) -> float:
    y, order = np.array(raw["y"]), raw["K"]
    total = stats.norm.logpdf(row["alpha"], 0, 10) + stats.norm.logpdf(row["beta"], 0, 10).sum()
    total += stats.cauchy.logpdf(row["sigma"], 0, 2.5)
    for t in range(order, len(y)):
        mean = row["alpha"] + sum(row["beta"][k] * y[t - 1 - k] for k in range(order))
        total += stats.norm.logpdf(y[t], mean, row["sigma"])
    return float(total)


def hand_earnings(raw: Raw, row: Row) -> float:
    mean = row["beta"][0] + row["beta"][1] * np.array(raw["height"])
    return stats.norm.logpdf(raw["earn"], mean, row["sigma"]).sum()


def hand_kidiq(raw: Raw, row: Row) -> float:
    mean = row["beta"][0] + row["beta"][1] * np.array(raw["mom_iq"])
    prior = stats.cauchy.logpdf(row["sigma"], 0, 2.5)
    return prior + stats.norm.logpdf(raw["kid_score"], mean, row["sigma"]).sum()


def hand_eight_schools(raw: Raw, row: Row) -> float:
    theta_trans = (row["theta"] - row["mu"]) / row["tau"]
    prior = stats.norm.logpdf(theta_trans).sum()
    prior += stats.norm.logpdf(row["mu"], 0, 5) + stats.cauchy.logpdf(row["tau"], 0, 5)
    return prior + stats.norm.logpdf(raw["y"], row["theta"], raw["sigma"]).sum()


def hand_gp(raw: Raw, row: Row) -> float:
    x = np.array(raw["x"])
    cov = row["alpha"] ** 2 * np.exp(-0.5 * (x[:, None] - x[None, :]) ** 2 / row["rho"] ** 2)
    cov += row["sigma"] * np.eye(len(x))
    prior = stats.gamma.logpdf(row["rho"], 25, scale=1 / 4)
    prior += stats.norm.logpdf(row["alpha"], 0, 2) + stats.norm.logpdf(row["sigma"], 0, 1)
    return prior + stats.multivariate_normal.logpdf(raw["y"], np.zeros(len(x)), cov)


def hand_mixture(raw: Raw, row: Row) -> float:
    prior = stats.norm.logpdf(row["mu"], 0, 2).sum() + stats.norm.logpdf(row["sigma"], 0, 2).sum()
    prior += stats.beta.logpdf(row["theta"], 5, 5)
    first, second = (stats.norm.logpdf(raw["y"], row["mu"][k], row["sigma"][k]) for k in (0, 1))
    return prior + np.logaddexp(np.log(row["theta"]) + first, np.log1p(-row["theta"]) + second).sum()


def hand_mesquite(raw: Raw, row: Row) -> float:
    mean = row["beta"][0] + row["beta"][6] * np.array(raw["group"])
    for k, key in enumerate(("diam1", "diam2", "canopy_height", "total_height", "density"), start=1):
        mean = mean + row["beta"][k] * np.log(raw[key])
    return stats.norm.logpdf(np.log(raw["weight"]), mean, row["sigma"]).sum()


def hand_nes(raw: Raw, row: Row) -> float:
    age = np.array(raw["age_discrete"])
    predictors = [np.array(raw[key]) for key in ("real_ideo", "race_adj")] + [age == 2, age == 3, age == 4]
    predictors += [np.array(raw[key]) for key in ("educ1", "gender", "income")]
    mean = row["beta"][0] + sum(b * x for b, x in zip(row["beta"][1:], predictors, strict=True))
    return stats.norm.logpdf(raw["partyid7"], mean, row["sigma"]).sum()


HAND: dict[str, Callable[[Raw, Row], float]] = {
    "arK-arK": hand_ark,
    "earnings-earn_height": hand_earnings,
    "eight_schools-eight_schools_noncentered": hand_eight_schools,
    "gp_pois_regr-gp_regr": hand_gp,
    "kidiq-kidscore_momiq": hand_kidiq,
    "low_dim_gauss_mix-low_dim_gauss_mix": hand_mixture,
    "mesquite-logmesquite": hand_mesquite,
    "nes1972-nes": hand_nes,
}

COLUMNS: dict[str, dict[str, int]] = {
    "arK-arK": {"alpha": 0, "beta": 3, "sigma": 0},
    "earnings-earn_height": {"beta": 2, "sigma": 0},
    "eight_schools-eight_schools_noncentered": {"theta": 8, "mu": 0, "tau": 0},
    "gp_pois_regr-gp_regr": {"rho": 0, "alpha": 0, "sigma": 0},
    "kidiq-kidscore_momiq": {"beta": 2, "sigma": 0},
    "low_dim_gauss_mix-low_dim_gauss_mix": {"mu": 2, "sigma": 2, "theta": 0},
    "mesquite-logmesquite": {"beta": 7, "sigma": 0},
    "nes1972-nes": {"beta": 9, "sigma": 0},
}
"""Stan's parameters and their lengths (0: a scalar) for the invented data."""


# --- invented data and parameters, so that the programs are tested without the data folder ------------------


def invented_data(name: str) -> Raw:
    rng = np.random.default_rng(20)
    n = 30
    data: dict[str, Raw] = {
        "arK-arK": {"K": 3, "y": rng.normal(size=n)},
        "earnings-earn_height": {"height": rng.normal(66, 4, n), "earn": rng.normal(2e4, 1e4, n)},
        "eight_schools-eight_schools_noncentered": {
            "y": 10 * rng.normal(size=8),
            "sigma": rng.uniform(9, 18, 8),
        },
        "gp_pois_regr-gp_regr": {"x": np.linspace(-10, 10, 11), "y": rng.normal(size=11)},
        "kidiq-kidscore_momiq": {"mom_iq": rng.normal(100, 15, n), "kid_score": rng.normal(87, 20, n)},
        "low_dim_gauss_mix-low_dim_gauss_mix": {"y": np.append(rng.normal(-2, 1, n), rng.normal(3, 1, n))},
        "mesquite-logmesquite": {
            key: rng.uniform(0.5, 3, n)
            for key in ("weight", "diam1", "diam2", "canopy_height", "total_height", "density", "group")
        },
        "nes1972-nes": {
            key: rng.integers(1, 5, n)
            for key in ("partyid7", "real_ideo", "race_adj", "age_discrete", "educ1", "gender", "income")
        },
    }
    return {key: np.asarray(value).tolist() for key, value in data[name].items()}


def invented_draws(name: str) -> tuple[list[str], np.ndarray]:
    """Parameters in (0, 1), each site in increasing order: inside the support of every program."""
    rng = np.random.default_rng(21)
    names, draws = [], []
    for site, length in COLUMNS[name].items():
        names += [f"{site}[{k + 1}]" for k in range(length)] if length else [site]
        draws.append(np.sort(rng.uniform(0.1, 0.9, (50, max(length, 1)))))
    return names, np.concatenate(draws, 1)


# --- from the reference's columns to the program's sites ----------------------------------------------------


def rows(posterior: Posterior, names: list[str], draws: np.ndarray) -> list[Row]:
    """Split columns into Stan's parameters by their names: all of beta[1], beta[2], … together."""
    index: dict[str, list[int]] = {}
    for column, name in enumerate(names):
        index.setdefault(name.split("[")[0], []).append(column)
    assert tuple(index) == posterior.sites
    scalars = {name for name in names if "[" not in name}
    return [{site: row[i[0]] if site in scalars else row[i] for site, i in index.items()} for row in draws]


def latents(posterior: Posterior, args: tuple[Tensor, ...], row: Row) -> Values:
    """Turn Stan's parameters into values of the program's latent sites."""
    values = {site: torch.as_tensor(value, dtype=torch.float64) for site, value in row.items()}
    sites = posterior.init(*args).keys()
    if "theta_trans" in sites:
        values["theta_trans"] = (values.pop("theta") - values["mu"]) / values["tau"]
    if "gap" in sites:
        mu = values.pop("mu")
        values["center"], values["gap"] = mu.mean(), mu[1] - mu[0]
    if "beta_std" in sites:
        x, y = (arg.numpy() for arg in args)
        intercept, slope = values.pop("beta").numpy()
        fitted_slope, fitted_intercept = np.polyfit(x, y, 1)
        error = np.std(y - fitted_intercept - fitted_slope * x) / len(y) ** 0.5
        level = intercept + slope * x.mean() - y.mean()
        values["beta_std"] = torch.tensor([level / error, (slope - fitted_slope) * np.std(x) / error])
    assert values.keys() == sites
    return values


def trace_of(posterior: Posterior, args: tuple[Tensor, ...], values: Values) -> poutine.Trace:
    return poutine.trace(poutine.condition(posterior.model, values)).get_trace(*args)


def values_of(posterior: Posterior, traces: list[poutine.Trace]) -> Values:
    """Collect the sites that the reference reports, one trace a draw."""
    return {site: torch.stack([trace.nodes[site]["value"] for trace in traces]) for site in posterior.sites}


def stacked(posterior: Posterior, args: tuple[Tensor, ...], values: list[Values]) -> Values:
    """Put draws on a dimension left of all plates, as vectorized particles are."""
    nodes = trace_of(posterior, args, values[0]).nodes
    result = {}
    for site, value in values[0].items():
        singletons = [1] * (1 + nodes[site]["fn"].event_dim - value.dim())
        stack = torch.stack([row[site] for row in values])
        result[site] = stack.reshape(len(values), *singletons, *value.shape)
    return result


def log_joints(posterior: Posterior, args: tuple[Tensor, ...], stack: Values) -> Tensor:
    """Log joint density of many draws in one run of the program, under a plate of draws."""
    size = len(next(iter(stack.values())))

    def many() -> None:
        with pyro.plate("draws", size, dim=-2):
            posterior.model(*args)

    trace = prune_subsample_sites(poutine.trace(poutine.condition(many, stack)).get_trace())
    trace.compute_log_prob()
    terms = [site["log_prob"] for site in trace.nodes.values() if "log_prob" in site]
    return torch.stack([term.reshape(size, -1).sum(-1) for term in terms]).sum(0)


# --- tests --------------------------------------------------------------------------------------------------


def check_density(name: str, raw: Raw, names: list[str], draws: np.ndarray) -> None:
    posterior = POSTERIORS[name]
    args = posterior.tensors(raw)
    split = rows(posterior, names, draws)
    values = [latents(posterior, args, row) for row in split]
    hand = np.array([HAND[name](raw, row) for row in split])
    traces = [trace_of(posterior, args, value) for value in values]
    program = np.array([float(trace.log_prob_sum()) for trace in traces])
    assert np.ptp(hand) > 1.0
    assert np.ptp(program - hand) <= 1e-6 * np.ptp(hand)
    columns = posterior.columns(values_of(posterior, traces))
    np.testing.assert_allclose(columns.numpy(), draws, rtol=1e-9, atol=1e-12)
    vectorized = log_joints(posterior, args, stacked(posterior, args, values))
    np.testing.assert_allclose(vectorized.numpy(), program, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_density_equals_the_one_by_hand_on_invented_data(name: str) -> None:
    check_density(name, invented_data(name), *invented_draws(name))


@pytest.mark.parametrize("name", NAMES)
def test_density_equals_the_one_by_hand_at_reference_draws(name: str, folder: Path) -> None:
    raw = json.loads((folder / f"{name}.data.json").read_text())
    names, draws = POSTERIORS[name].reference(folder)
    assert draws.shape == (10000, len(names))
    check_density(name, raw, names, draws[::200])


@pytest.mark.parametrize("name", NAMES)
def test_reference_draws_obey_the_identities_of_the_program(name: str, folder: Path) -> None:
    """Under p, in unconstrained coordinates u: E[∂ᵢ log p] = 0 and E[uᵢ ∂ᵢ log p] = -1.

    The draws come from Stan, so this holds only if the program's posterior is Stan's. 98 means of 1000 draws
    over the eight posteriors, each within 4.5 SE: a false alarm in 1 of 1500 sets of draws.
    """
    posterior = POSTERIORS[name]
    args = posterior.load(folder)
    names, draws = posterior.reference(folder)
    values = [latents(posterior, args, row) for row in rows(posterior, names, draws[::10])]
    nodes = trace_of(posterior, args, values[0]).nodes
    to_support = {site: biject_to(nodes[site]["fn"].support) for site in values[0]}
    stack = stacked(posterior, args, values)
    free = {site: to_support[site].inv(value).requires_grad_() for site, value in stack.items()}
    total = log_joints(posterior, args, {site: to_support[site](u) for site, u in free.items()}).sum()
    for site, u in free.items():
        total = total + to_support[site].log_abs_det_jacobian(u, to_support[site](u)).sum()
    total.backward()
    for u in free.values():
        point, slope = (tensor.reshape(len(values), -1) for tensor in (u.detach(), u.grad))
        centered = point - point.mean(0)
        for identity in (slope, centered * slope + 1):
            error = identity.mean(0).abs() / (identity.std(0) / len(values) ** 0.5)
            assert error.max() < 4.5


@pytest.mark.parametrize("family", every_other([AutoMultivariateNormal, AutoNormal]))
@pytest.mark.parametrize("name", NAMES)
def test_automatic_guides_start_at_init_and_train(name: str, family: type[AutoGuide]) -> None:
    """Adam raises the bound, and draws of the guide come back as the reference's columns."""
    posterior = POSTERIORS[name]
    args = posterior.tensors(invented_data(name))
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    init = posterior.init(*args)
    guide = family(posterior.model, init_loc_fn=init_to_value(values=init, fallback=None), init_scale=0.01)
    loss = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(posterior.model, guide, Adam({"lr": 0.02}), loss)
    losses = [svi.step(*args) for _ in range(200)]
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 0.5
    traces = []
    for _ in range(7):
        replayed = poutine.replay(posterior.model, poutine.trace(guide).get_trace(*args))
        traces.append(poutine.trace(replayed).get_trace(*args))
    columns = posterior.columns(values_of(posterior, traces))
    assert columns.dtype == torch.float64
    assert columns.shape == (7, len(invented_draws(name)[0]))
    assert columns.isfinite().all()


def test_init_covers_every_latent_site() -> None:
    for name, posterior in POSTERIORS.items():
        args = posterior.tensors(invented_data(name))
        init = posterior.init(*args)
        with InitMessenger(init_to_value(values=init, fallback=None)):
            trace = prune_subsample_sites(poutine.trace(posterior.model).get_trace(*args))
        assert set(trace.stochastic_nodes) == init.keys()
        assert trace.log_prob_sum().isfinite(), name


def test_columns_need_every_site_of_the_reference() -> None:
    with pytest.raises(KeyError, match="sigma"):
        POSTERIORS["nes1972-nes"].columns({"beta": torch.zeros(3, 9)})
