"""Importance weights are those of the posterior, or refused: point estimates, scales, subsamples, masks, precision."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from torch import Tensor

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, GuideError, WeightsError
from pyro_elbo.posterior.draws import draw
from tests.support.exported import group_names

X = torch.tensor([0.3, -1.2, 0.8, 2.1, 0.1, 1.4], dtype=torch.float64)
OPTIONS: dict[str, Any] = {"num_samples": 4000, "predictive": False, "prior": False}


def mean_model(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def mean_guide(x: Tensor) -> None:
    """1.3 times as wide as the posterior."""
    pyro.sample("mu", dist.Normal(x.sum() / (len(x) + 1), x.new_tensor(1.3 / math.sqrt(len(x) + 1))))


def exact_loo(x: Tensor) -> Tensor:
    return dist.Normal((x.sum() - x) / len(x), math.sqrt(1 + 1 / len(x))).log_prob(x)


# --- point estimates in some latents


def regression(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w.sum(-1, keepdim=True), s.unsqueeze(-1)), obs=x)


def point_in_w(kind: Callable) -> Callable:
    def make(model: Callable) -> autoguide.AutoGuide:
        guide = autoguide.AutoGuideList(model)
        guide.append(kind(poutine.block(model, expose=["w"])))
        guide.append(autoguide.AutoNormal(poutine.block(model, expose=["s"])))
        return guide

    return make


def structured(model: Callable) -> autoguide.AutoGuide:
    return autoguide.AutoStructured(model, conditionals={"w": "delta", "s": "normal"})


def half_of_w(model: Callable) -> Callable:
    def guide(x: Tensor) -> None:
        free = pyro.sample("free", dist.Normal(torch.zeros(1), 1.0).to_event(1), infer={"is_auxiliary": True})
        w = torch.cat([free, torch.zeros(*free.shape[:-1], 2)], -1)
        pyro.sample("w", dist.Delta(w, event_dim=1))
        pyro.sample("s", dist.LogNormal(0.0, 0.1))

    return guide


@pytest.mark.parametrize(
    "make", [point_in_w(autoguide.AutoDelta), point_in_w(autoguide.AutoLaplaceApproximation), structured, half_of_w]
)
def test_a_point_estimate_in_one_latent_has_no_weights(make: Callable) -> None:
    guide, x = make(regression), X.float()
    with torch.no_grad():
        guide(x)
    for call in (
        lambda: pe.pareto_k(regression, guide, x, num_samples=100),
        lambda: pe.to_arviz(regression, guide, x, num_samples=100, resample="psis"),
        lambda: pe.loo(pe.to_arviz(regression, guide, x, num_samples=100)),
    ):
        with pytest.raises(GuideError, match=r"point estimate in 'w' \(Delta\)"):
            call()
    stats = pe.to_arviz(regression, guide, x, num_samples=100)["sample_stats"]
    assert "pareto_k" not in stats.attrs
    assert "point estimate in 'w'" in stats.attrs["weights_skipped"]


@pytest.mark.parametrize(
    "make",
    [
        autoguide.AutoNormal,
        autoguide.AutoMultivariateNormal,
        autoguide.AutoLowRankMultivariateNormal,
        autoguide.AutoDiagonalNormal,
        lambda model: autoguide.AutoStructured(model, conditionals="mvn", dependencies="linear"),
        autoguide.AutoNormalMessenger,
    ],
)
def test_guides_that_pass_their_draws_on_by_deltas_have_weights(make: Callable) -> None:
    guide, x = make(regression), X.float()
    with torch.no_grad():
        guide(x)
    assert not pe.pareto_k(regression, guide, x, num_samples=100).k.isnan()


def test_a_simplex_from_fewer_free_elements_is_no_point() -> None:
    def model(x: Tensor) -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.ones(4)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Categorical(p.unsqueeze(-2)), obs=x)

    guide, x = autoguide.AutoNormal(model), torch.tensor([0, 1, 2, 3, 3])
    with torch.no_grad():
        guide(x)
    assert not pe.pareto_k(model, guide, x, num_samples=100).k.isnan()


# --- scales


@pytest.mark.parametrize("scale", [1 / 200, 3.0, torch.tensor(0.1)])
def test_a_scale_of_both_programs_does_not_reach_the_weights(scale: float | Tensor) -> None:
    programs = poutine.scale(mean_model, scale=scale), poutine.scale(mean_guide, scale=scale)
    plain, scaled = pe.pareto_k(mean_model, mean_guide, X), pe.pareto_k(*programs, X)
    torch.testing.assert_close(scaled.k, plain.k)
    torch.testing.assert_close(scaled.ess, plain.ess)
    loo = pe.loo(pe.to_arviz(*programs, X, **OPTIONS))
    # The standard error of log p(x_i | x_-i) from 4000 draws is below 0.015 a datum here; 5 of them.
    torch.testing.assert_close(torch.tensor(loo.elpd_i.values), exact_loo(X), atol=0.07, rtol=0.0)


def test_scales_that_differ_between_sites_are_refused() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)), poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    with pytest.raises(WeightsError, match=r"'x': '0.5'.*poutine.scale"):
        pe.pareto_k(model, mean_guide, X)
    data = pe.to_arviz(model, mean_guide, X, num_samples=50)
    with pytest.raises(WeightsError, match="poutine.scale"):
        pe.loo(data)
    assert "posterior" in group_names(data)


# --- subsamples


@pytest.mark.parametrize("rows", [None, torch.tensor([4, 0, 2])])
def test_joint_weights_need_all_rows(rows: Tensor | None) -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), subsample_size=3, subsample=rows):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=pyro.subsample(x, event_dim=0))

    data = pe.to_arviz(model, mean_guide, X, num_samples=50)
    for call in (lambda: pe.pareto_k(model, mean_guide, X), lambda: pe.loo(data)):
        with pytest.raises(WeightsError, match="Plate 'data' took 3 of its 6 rows.*full data"):
            call()
    labels = torch.tensor(data["observed_data"]["data"].values)
    assert torch.equal(torch.tensor(data["observed_data"]["x"].values), X[labels])
    assert rows is None or torch.equal(labels, rows)


def local_model(x: Tensor, rows: Tensor | None) -> None:
    with pyro.plate("data", len(x), subsample=rows):
        batch = pyro.subsample(x, event_dim=0)
        z = pyro.sample("z", dist.Normal(torch.zeros_like(batch), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=batch)


def local_guide(x: Tensor, rows: Tensor | None) -> None:
    with pyro.plate("data", len(x), subsample=rows):
        batch = pyro.subsample(x, event_dim=0)
        pyro.sample("z", dist.Normal(batch / 2, batch.new_tensor(0.8)))


def test_weights_of_rows_do_not_need_the_others() -> None:
    rows = torch.tensor([4, 0, 2])
    data = pe.to_arviz(local_model, local_guide, X, rows, **OPTIONS)
    loo = pe.loo(data)
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(X[rows])
    torch.testing.assert_close(torch.tensor(loo.elpd_i.values), exact, atol=0.07, rtol=0.0)
    assert loo.elpd_i["data"].values.tolist() == [4, 0, 2]


def test_a_minibatch_given_as_an_argument_has_no_rows_of_the_full_data() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 100, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 100, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    data = pe.to_arviz(model, guide, X, num_samples=30)
    assert data["posterior"]["data"].values.tolist() == list(range(6))


# --- masks


@pytest.mark.parametrize("hole", [math.nan, 7.0])
def test_masked_data_do_not_count(hole: float) -> None:
    def model(x: Tensor, mask: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    mask = torch.tensor([True, True, False, True, False, True])
    x = torch.where(mask, X, hole)
    data = pe.to_arviz(model, lambda x, mask: mean_guide(x[mask]), x, mask, **OPTIONS)
    plain = pe.loo(pe.to_arviz(mean_model, mean_guide, X[mask], **OPTIONS))
    loo = pe.loo(data)
    assert loo.n_data_points == plain.n_data_points == 4
    for name in ("elpd", "se", "p"):
        assert getattr(loo, name) == pytest.approx(getattr(plain, name))
    assert loo.elpd_i["data"].values.tolist() == [0, 1, 3, 5]
    torch.testing.assert_close(torch.tensor(data["observed_data"]["x"].values), x, equal_nan=True)


def test_masked_cells_of_two_plates_do_not_count() -> None:
    def model(x: Tensor, mask: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("column", x.shape[1], dim=-1), pyro.plate("row", x.shape[0], dim=-2), poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    mask = torch.tensor([[True, False, True], [True, True, False]])
    x = X.reshape(2, 3)
    data = pe.to_arviz(model, lambda x, mask: mean_guide(x[mask]), x, mask, **OPTIONS)
    plain = pe.loo(pe.to_arviz(mean_model, mean_guide, x[mask], **OPTIONS))
    loo = pe.loo(data)
    assert loo.n_data_points == 4
    assert loo.elpd == pytest.approx(plain.elpd)
    assert loo.se == pytest.approx(plain.se)
    with pytest.raises(ArgumentError, match="no datum that counts"):
        pe.loo(pe.to_arviz(model, lambda x, mask: mean_guide(x), x, torch.zeros_like(mask), num_samples=50))


# --- precision and few values


def test_joint_weights_stay_in_double_precision() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))

    def guide(x: Tensor) -> None:
        pyro.sample("mu", dist.Normal(x.mean(), 1.3 / math.sqrt(len(x))))

    draws = draw(mean_model, guide, (x,), {}, 100, chunk_size=50, seed=1)
    assert draws.log_weight.dtype == torch.float64
    assert draws.log_weight.unique().numel() == 100
    mu = draws.latents["mu"].double()
    n, mean = len(x), x.double().mean()
    exact = -0.5 * n * (mu - mean) ** 2 - 0.5 * mu**2 - dist.Normal(mean, 1.3 / math.sqrt(n)).log_prob(mu)
    difference = draws.log_weight - exact
    assert (difference - difference.mean()).abs().max() < 0.05  # float32 of -280 000 has steps of 0.03


def test_discrete_latents_are_judged_by_their_bounded_weights() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(c, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("c", dist.Bernoulli(torch.full((len(y),), 0.5)))

    y = torch.tensor([1.0, 2.0])
    trust = pe.pareto_k(model, guide, y)
    weights = torch.stack([dist.Normal(c, 1.0).log_prob(y).exp() for c in (0.0, 1.0)]).double()
    bound = (weights.max(0).values / weights.mean(0)).log() / math.log(4000)
    torch.testing.assert_close(trust.k, bound, atol=0.01, rtol=0.0)
    share = weights.mean(0) ** 2 / weights.square().mean(0)
    torch.testing.assert_close(trust.ess / 4000, share, atol=0.03, rtol=0.0)
    assert "0 of 2 rows" in str(trust)
    assert "usable" in str(trust)


# --- options


@pytest.mark.parametrize(("wrong", "right"), [("n_samples", "num_samples"), ("random_seed", "seed")])
def test_names_of_other_libraries_are_refused_with_ours(wrong: str, right: str) -> None:
    def model(x: Tensor, **kwargs: Any) -> None:
        mean_model(x)

    for call in (pe.pareto_k, pe.to_arviz):
        with pytest.raises(ArgumentError, match=rf"{wrong}=.*called {right}="):
            call(model, mean_guide, X, **{wrong: 10})
