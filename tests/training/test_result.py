"""What a fit's result does after training: draws, predictions, terms, export; nothing is left changed."""

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, DataError, GuideError, SiteError
from tests.support.fitted import QUIET, VAE, X, _exact, _fitted, at_posterior, regression  # noqa: F401  (two fixtures)

# --- draws and predictions ------------------------------------------------------------------------------------


def test_draws_are_named_after_sites_plates_and_events(fitted):
    _, result = fitted
    draws = result.sample(7)
    assert draws.z.dims == ("draw", "data", "z_dim_0")
    assert draws.z.shape == (7, 40, 2)
    assert result.sample(7, X[:3]).z.shape == (7, 3, 2)
    for data in ({"x": X[:3].numpy()}, (X[:3],)):
        assert result.sample(7, data).z.shape == (7, 3, 2)
    assert result.sample(7, x=X[:3].numpy()).z.shape == (7, 3, 2)


def test_draws_follow_the_guide(exact):
    draws = exact.sample(4000)
    precision = float((X**2).sum() / 0.01 + 1 / 9)
    error = draws.slope.mean().item() - 2 * (precision - 1 / 9) / precision
    assert abs(error) < 5 * (precision * 4000) ** -0.5  # one in two million
    np.testing.assert_allclose(draws.double, 2 * draws.slope, rtol=1e-6)


def test_the_seed_of_the_fit_repeats_draws_and_leaves_the_callers_stream_alone(fitted):
    _, result = fitted
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draws = [result.sample(5), result.sample(5), result.sample(5, seed=4)]
    result.predict(num_samples=5), result.terms(), result.summary(num_samples=30), result.pareto_k(num_samples=30)
    assert torch.equal(torch.rand(3), expected)
    assert draws[0].equals(draws[1])
    assert not draws[0].equals(draws[2])


def test_new_responses_are_predicted_without_observations(exact):
    """y | x ~ Normal(slope x, 0.1) with the slope of the posterior: mean and variance in closed form."""
    x = torch.tensor([-3.0, 0.5, 4.0])
    drawn = exact.predict(x, num_samples=4000)
    assert list(drawn.data_vars) == ["y"]
    assert drawn.y.dims == ("draw", "rows")
    precision = float((X**2).sum() / 0.01 + 1 / 9)
    mean, scale = 2 * x * (precision - 1 / 9) / precision, (x**2 / precision + 0.01).sqrt()
    error = (drawn.y.mean("draw").values - mean.numpy()) / scale.numpy() * math.sqrt(4000)
    assert (abs(error) < 5).all()
    spread = drawn.y.std("draw").values / scale.numpy()
    assert (abs(spread - 1) < 5 / math.sqrt(8000)).all()


def test_observations_inform_the_guide_and_are_drawn_anew(fitted):
    _, result = fitted
    x = torch.tensor([3.0, -3.0, 3.0, -3.0])
    drawn = result.predict(x, num_samples=500)
    assert drawn.x.shape == (500, 4)
    assert (drawn.x.mean("draw").values * x.numpy() > 1).all()
    assert (drawn.x.std("draw").values > 0.4).all()


class Walk(nn.Module):
    """A random walk under an amortized guide; the next step starts from the data, which a forecast must not lose."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.0))

    def model(self, x, lengths=None, horizon=0):
        def step(level, x_t):
            z = pyro.sample("z", dist.Normal(0.0, 1e-3))
            x_t = pyro.sample("x", dist.Normal(level + 1 + z, 1e-3), obs=x_t)
            return x_t, None

        with pyro.plate("walks", len(x)):
            pe.scan(step, x.new_zeros(len(x)), x, lengths, horizon=horizon, dim=1)

    def guide(self, x, lengths=None):
        def step(carry, x_t):
            return pyro.sample("z", dist.Normal(self.weight, 1e-3)), None

        with pyro.plate("walks", len(x)):
            pe.scan(step, x.new_zeros(len(x)), x, lengths, dim=1)


@pytest.fixture
def walk():
    walk = Walk()
    lengths = torch.tensor([5, 2, 4])
    x = torch.arange(5.0) + torch.tensor([[1.0], [11.0], [21.0]])
    pyro.module("walk", walk)
    model = lambda *args, **kwargs: (pyro.module("walk", walk), walk.model(*args, **kwargs))[1]  # noqa: E731
    frozen = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}
    return pe.fit(model, walk.guide, (x, lengths), loss=pe.TraceTimestep_ELBO(), **frozen, **QUIET), x, lengths


def test_ragged_sequences_are_predicted_step_by_step(walk):
    result, x, lengths = walk
    drawn = result.predict(x, lengths, num_samples=6)
    assert drawn.x.dims == ("draw", "walks", "time")
    assert drawn.x_counted.values.tolist() == (torch.arange(5) < lengths[:, None]).tolist()
    # From the second step on, each is one above the one before, all of which are drawn.
    np.testing.assert_allclose(drawn.x[:, 0].values, np.tile(np.arange(1.0, 6.0), (6, 1)), atol=0.05)


def test_a_forecast_continues_each_sequence_from_its_own_end(walk):
    result, x, lengths = walk
    drawn = result.predict(x, lengths, num_samples=6, horizon=3)
    assert drawn.x.shape == (6, 3, 8)
    for i, n in enumerate(lengths.tolist()):
        np.testing.assert_array_equal(drawn.x[:, i, :n].values, x[i, :n].expand(6, n))
        future = x[i, n - 1] + torch.arange(1.0, 4.0)
        np.testing.assert_allclose(drawn.x[:, i, 5:].values, future.expand(6, 3), atol=0.05)
    assert drawn.x_counted.values[:, 5:].all()
    assert drawn.x[:, 0, 5:].std("draw").values.min() > 0


def test_a_horizon_that_reaches_no_scan_is_refused(exact, walk):
    with pytest.raises(DataError, match=r"takes \(x, y=None\).*Give the model an argument horizon"):
        exact.predict(X, horizon=3)
    result, x, lengths = walk
    with pytest.raises(ArgumentError, match="horizon must be a whole number >= 0, got -1"):
        result.predict(x, lengths, horizon=-1)


def test_a_guide_with_parameters_per_row_has_none_for_new_rows():
    def local(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    result = pe.fit(local, AutoNormal(local), X, batch_size=None, **QUIET)
    with pytest.raises(SiteError, match="Shape mismatch inside plate.'data'.*5 vs 40"):
        result.predict(X[:5])


# --- terms, export, k-hat -------------------------------------------------------------------------------------


def test_terms_are_those_of_the_objective_in_eval_mode(fitted):
    vae, result = fitted
    assert result.terms(X[:5]).elbo == result.terms(X[:5]).elbo
    vae.eval()
    kl = torch.distributions.kl_divergence(
        dist.Normal(vae.loc * vae.net(X[:5, None])[:, 0], 0.5), dist.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(result.terms(X[:5]).kl["z"], kl.detach())
    assert not result.terms().elbo.requires_grad


def test_modes_and_buffers_stay_as_they_were(fitted):
    vae, result = fitted
    vae.net[1].eval()
    before = {name: x.clone() for name, x in vae.state_dict().items()}
    modes = [part.training for part in vae.modules()]
    result.sample(3), result.predict(X[:4], num_samples=3), result.terms(), result.pareto_k(num_samples=30)
    result.to_arviz(num_samples=30), result.summary(num_samples=30)
    assert [part.training for part in vae.modules()] == modes
    assert all(torch.equal(x, before[name]) for name, x in vae.state_dict().items())


class Owner(nn.Module):
    """Its programs read the mode of a module that they neither register nor call."""

    def __init__(self):
        super().__init__()
        self.modes = set()

    def model(self, x, y=None):
        self.modes.add(self.training)
        regression(x, y)


def test_methods_that_read_their_mode_run_in_eval_mode():
    owner = Owner()
    result = pe.fit(owner.model, at_posterior, (X, 2 * X), batch_size=None, **QUIET)
    owner.modes.clear()
    result.predict(X, num_samples=3), result.predict(num_samples=3), result.sample(3, X), result.terms()
    assert owner.modes == {False}
    assert owner.training


def test_a_model_without_latents_predicts_and_sums_up():
    def plain(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    result = pe.fit(plain, lambda x: None, X, batch_size=None, **QUIET)
    assert result.predict(X[:3], num_samples=5).x.shape == (5, 3)
    assert not result.sample(3).data_vars
    assert result.summary(num_samples=30).sites == ()
    assert result.summary(num_samples=30).to_dataframe().empty


def test_the_export_holds_data_and_history(fitted):
    _, result = fitted
    data = result.to_arviz(num_samples=30)
    assert data["posterior"]["z"].shape == (1, 30, 40, 2)
    assert data["training"].equals(result.history)
    small = result.to_arviz(X[:3], num_samples=30, predictive=False, dims={"z": ["unit"]})
    assert small["posterior"]["z"].dims == ("chain", "draw", "data", "unit")
    with pytest.raises(ArgumentError, match="n_samples= is no argument"):
        result.to_arviz(n_samples=30)


def test_pareto_k_is_a_number(exact, fitted):
    assert float(exact.pareto_k(num_samples=1000)) == exact.pareto_k(num_samples=1000).k.item()
    rows = fitted[1].pareto_k(num_samples=100)
    assert float(rows) == rows.k.max().item()


def test_the_plot_is_that_of_the_history(fitted):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = fitted[1].plot()
    assert len(axes) == 2
    matplotlib.pyplot.close(axes[0].figure)


@pytest.mark.parametrize("kind", ["loader", "dataset"])
def test_data_of_a_loader_must_be_passed_again(kind):
    vae = VAE()
    rows = TensorDataset(X)
    result = pe.fit(vae.model, vae.guide, rows if kind == "dataset" else DataLoader(rows, 10), batch_size=10, **QUIET)
    for call in (result.sample, result.predict, result.terms, result.to_arviz, result.summary):
        with pytest.raises(DataError, match=r"Dataset or a DataLoader.*Pass the arguments"):
            call()
    assert result.sample(3, X[:2]).sizes["data"] == 2
    with pytest.raises(DataError, match=r"model\(tensor of shape \(2,\), tensor"):
        result.terms(X[:2], X[:2])


# --- bad input


def test_bad_numbers_are_refused(fitted):
    _, result = fitted
    with pytest.raises(ArgumentError, match="num_samples must be a whole number >= 1, got 0"):
        result.sample(0)
    with pytest.raises(ArgumentError, match="seed must be a whole number >= 0, got -1"):
        result.terms(seed=-1)


def test_a_model_without_data_predicts_nothing():
    result = pe.fit(lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)), at_z, torch.zeros(1), batch_size=None, **QUIET)
    with pytest.raises(SiteError, match="nothing to predict: the model observes no site"):
        result.predict()
    assert result.sample(3).z.shape == (3,)


def at_z(x):
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


def test_a_guide_that_has_never_run_is_refused(exact):
    with pytest.raises(GuideError, match="Not initialized yet"):
        replace(exact, guide=AutoNormal(regression)).sample(3)
