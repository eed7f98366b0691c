"""Linear response against exact covariances, what it leaves as it was, and what it refuses."""

import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import nn

import pyro_elbo as pe
from models.posteriordb import eight_schools
from pyro_elbo.errors import ArgumentError, GuideError, NonFiniteError, SiteError, WeightsError
from pyro_elbo.posterior.fixed_noise import FixedNoise, antithetic_normal
from tests.support.refusing import refusing
from tests.support.untyped import _untyped  # noqa: F401  (a fixture)

refuses = refusing(
    re.compile(r"\b(use|remove|is called|give|sum|run|look|train|keep|call|choose|sample|must be)\b", re.I)
)

GENERATOR = torch.Generator().manual_seed(3)
MIX = torch.tensor([[1.0, 0.9, 0.5], [0.0, 0.4, 0.1], [0.0, 0.0, 1.0]], dtype=torch.float64)
X = torch.randn(30, 3, dtype=torch.float64, generator=GENERATOR) @ MIX + 0.5
Y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
COVARIANCE = torch.linalg.inv(X.T @ X + torch.eye(3) / 4)  # of N(0, 2² I) priors and unit noise
MEAN = COVARIANCE @ X.T @ Y
SIGMA = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)
SCHOOLS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)


def regression(x, y):
    b = pyro.sample("b", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((x * b).sum(-1), 1.0), obs=y)


def mean_field(x, y):
    loc = pyro.param("loc", lambda: x.new_zeros(3))
    log_scale = pyro.param("log_scale", lambda: x.new_zeros(3))
    pyro.sample("b", dist.Normal(loc, log_scale.exp()).to_event(1))


def structured(x, y):
    """Draw the first element and the others given it."""
    loc, slope = pyro.param("loc", lambda: x.new_zeros(3)), pyro.param("slope", lambda: x.new_zeros(2))
    scale = pyro.param("scale", lambda: x.new_ones(3), constraint=dist.constraints.positive)
    first = pyro.sample("first", dist.Normal(loc[0], scale[0]), infer={"is_auxiliary": True})
    rest = pyro.sample(
        "rest",
        dist.Normal(loc[1:] + slope * first[..., None], scale[1:]).to_event(1),
        infer={"is_auxiliary": True},
    )
    pyro.sample("b", dist.Delta(torch.cat([first[..., None], rest], -1), event_dim=1))


def started(guide, *args):
    guide(*args)
    return guide


GUIDES = {
    "mean-field": lambda: mean_field,
    "structured": lambda: structured,
    "AutoNormal": lambda: AutoNormal(regression),
    "AutoDiagonalNormal": lambda: AutoDiagonalNormal(regression),
    "AutoMultivariateNormal": lambda: AutoMultivariateNormal(regression),
    "AutoLowRankMultivariateNormal": lambda: AutoLowRankMultivariateNormal(regression),
}


@pytest.mark.parametrize("method", ["dense", "cg"])
@pytest.mark.parametrize("name", GUIDES)
def test_gaussian_posteriors_are_exact(name, method):
    guide = started(GUIDES[name](), X, Y)
    response = pe.linear_response(regression, guide, X, Y, method=method)
    np.testing.assert_allclose(response.covariance, COVARIANCE, atol=1e-7)
    np.testing.assert_allclose(response.mean["b"], MEAN, atol=1e-7)
    np.testing.assert_allclose(response.sd["b"], COVARIANCE.diagonal().sqrt(), atol=1e-7)
    assert response.error["b"].max() < 1e-7  # quadratic functions have no error over whitened draws
    assert (response.iterations > 0) == (method == "cg")
    assert response.decrement < 1e-6
    if name in ("mean-field", "AutoNormal", "AutoDiagonalNormal"):  # the conditional standard deviations
        np.testing.assert_allclose(response.guide_sd["b"], (X.T @ X + torch.eye(3) / 4).diagonal() ** -0.5, atol=1e-7)


def test_programs_that_do_not_vectorize_run_draw_by_draw():
    def stubborn(x, y):
        b = pyro.sample("b", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ b.reshape(3), 1.0), obs=y)

    response = pe.linear_response(stubborn, mean_field, X, Y, num_samples=16)
    np.testing.assert_allclose(response.covariance, COVARIANCE, atol=1e-7)


def test_single_precision():
    x, y = X.float(), Y.float()
    response = pe.linear_response(regression, started(AutoNormal(regression), x, y), x, y)
    np.testing.assert_allclose(response.covariance, COVARIANCE, rtol=1e-3, atol=1e-4)


def test_functions_of_latents():
    """For a Gaussian: Cov(aᵀb, cᵀb) = aᵀΣc, and Cov of a square follows from the mean-field scale s, with f = b²:

    J = (2m, 2s²) in (m, log s), H = diag(Σ⁻¹, 2): sd² = 4 m² Σ + 2 s⁴.
    """

    def functions(z):
        b = z["b"]
        return {"sum": b.sum(-1), "pair": b[..., :2] * 2, "square": b[..., 0] ** 2}

    response = pe.linear_response(regression, mean_field, X, Y, functions=functions, num_samples=64)
    to_sum = torch.tensor([[1.0, 1, 1], [2, 0, 0], [0, 2, 0]], dtype=torch.float64)
    exact = to_sum @ COVARIANCE @ to_sum.T
    np.testing.assert_allclose(response.covariance[:3, :3], exact, atol=1e-7)
    s2 = 1 / (X.T @ X + torch.eye(3) / 4)[0, 0]
    square = 4 * MEAN[0] ** 2 * COVARIANCE[0, 0] + 2 * s2**2
    np.testing.assert_allclose(response.sd["square"] ** 2, square, rtol=1e-3)
    assert response.covariance["element"].values.tolist() == ["sum", "pair[0]", "pair[1]", "square"]
    assert response.guide is None
    with refuses(ArgumentError, "without functions"):
        response.draws()


def test_many_parameters_are_left_to_conjugate_gradients():
    """A shared mean m ~ N(0, 1), z_i ~ N(m, 1), x_i ~ N(z_i, 1): given 220 data, Var(m) = 1 / (1 + 220 / 2)."""

    def model(x):
        m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.linspace(-1, 2, 220, dtype=torch.float64)
    guide = started(AutoNormal(model), x)
    response = pe.linear_response(model, guide, x, num_samples=64, functions=lambda z: {"m": z["m"]})
    assert response.num_parameters == 442
    assert response.iterations > 0
    np.testing.assert_allclose(response.sd["m"], (1 + 220 / 2) ** -0.5, rtol=1e-7)
    assert response.guide_sd["m"] < 0.9 * response.sd["m"]


def test_draws_and_the_guide_have_the_covariance_of_linear_response():
    response = pe.linear_response(regression, mean_field, X, Y)
    count = 20_000
    draws = response.draws(count, seed=1)
    assert draws["b"].dims == ("draw", "b_dim_0")
    found = np.cov(draws["b"].values.T)
    # SE of a covariance is √((Σ_ii Σ_jj + Σ_ij²) / n); false alarm at 5 SE: 9 × 6e-7
    d = COVARIANCE.diagonal()
    assert (np.abs(found - COVARIANCE.numpy()) < 5 * ((d[:, None] * d + COVARIANCE**2) / count).sqrt().numpy()).all()
    assert torch.equal(torch.as_tensor(draws["b"].values), torch.as_tensor(response.draws(count, seed=1)["b"].values))
    assert pe.pareto_k(regression, response.guide, X, Y).ess > 3999  # the exact posterior has equal weights


def test_quantities_are_labeled_with_deterministics_and_printed():
    guide = started(AutoNormal(eight_schools), SIGMA, SCHOOLS)
    response = pe.linear_response(eight_schools, guide, SIGMA, SCHOOLS)
    assert response.sd["theta"].dims == ("school",)
    assert set(response.sd.data_vars) == {"mu", "tau", "theta_trans", "theta"}
    assert response.covariance.sizes == {"element": 18, "element_2": 18}
    text = repr(response)
    assert text.startswith("Linear response of 20 parameters, 256 fixed draws.")
    assert "theta[7]" in text
    assert "sd of guide" in text
    assert "theta[7]" in response._repr_html_()
    assert 2.9 < float(response.sd["mu"]) < 3.7  # the reference says 3.31


def test_the_error_of_fixed_draws_covers_what_seeds_do():
    """Of 12 seeds, no mean is farther from their average than 4 errors (quasi-random draws make errors too large)."""

    def model(x):
        rate = pyro.sample("rate", dist.LogNormal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)

    x = torch.tensor(3.0, dtype=torch.float64)
    guide = started(AutoNormal(model), x)
    runs = [pe.linear_response(model, guide, x, num_samples=32, seed=s) for s in range(12)]
    means = np.array([float(r.mean["rate"]) for r in runs])
    errors = np.array([float(r.error["rate"]) for r in runs])
    assert 0 < np.abs(means - means.mean()).max() < 4 * errors.mean()


def test_nothing_is_left_behind():
    guide = started(AutoNormal(regression), X, Y).train()
    mean_field(X, Y)
    before = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}
    state = pyro.util.get_rng_state()
    for q in (guide, mean_field):
        pe.linear_response(regression, q, X, Y)
    after = dict(pyro.get_param_store().named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and after[n].grad is None for n in before)
    assert torch.equal(state["torch"], pyro.util.get_rng_state()["torch"])
    assert guide.training
    with pytest.raises(ArgumentError, match="boom"):
        pe.linear_response(regression, mean_field, X, Y, functions=lambda z: _boom())
    assert all(torch.equal(before[n], after[n]) for n in before)


def _boom():
    raise RuntimeError("boom")


def test_parameters_of_the_model_stay_fixed():
    def model(x, y):
        scale = pyro.param("noise", lambda: x.new_ones(()))
        b = pyro.sample("b", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal((x * b).sum(-1), scale), obs=y)

    response = pe.linear_response(model, mean_field, X, Y)
    assert response.num_parameters == 6
    np.testing.assert_allclose(response.covariance, COVARIANCE, atol=1e-7)


def test_export_draws_with_linear_response():
    guide = started(AutoNormal(regression), X, Y)
    options = {"num_samples": 400, "prior": False, "predictive": False}
    data = pe.to_arviz(regression, guide, X, Y, covariance="linear_response", **options)
    assert data["posterior"].attrs["covariance"] == "linear_response"
    weights = data["sample_stats"]["log_weight"]
    assert float(weights.max() - weights.min()) < 1e-8  # the Gaussian is the posterior
    assert pe.to_arviz(regression, guide, X, Y, **options)["posterior"].attrs["covariance"] == "guide"
    with refuses(ArgumentError, "'full'", "linear_response"):
        pe.to_arviz(regression, guide, X, Y, covariance="full")


def test_export_of_latents_in_plates_and_of_restarts():
    """The density of the Gaussian guide in the constrained space holds the Jacobian: lp_approx by hand."""
    guides = []
    for _ in range(2):
        pyro.clear_param_store()
        guides.append(started(AutoNormal(eight_schools), SIGMA, SCHOOLS))
    options = {"num_samples": 50, "prior": False, "predictive": False, "covariance": "linear_response"}
    data = pe.to_arviz(eight_schools, guides, SIGMA, SCHOOLS, **options)
    assert data["posterior"]["theta"].dims == ("chain", "draw", "school")
    pyro.clear_param_store()
    gaussian = pe.linear_response(eight_schools, guides[0], SIGMA, SCHOOLS).guide
    drawn = data["posterior"].isel(chain=0)
    log_tau = torch.as_tensor(np.log(drawn["tau"].values))
    free = torch.cat(
        [torch.as_tensor(drawn["mu"].values)[:, None], log_tau[:, None], torch.as_tensor(drawn["theta_trans"].values)],
        1,
    )
    fn = dist.MultivariateNormal(gaussian.mean, scale_tril=gaussian.scale_tril)
    np.testing.assert_allclose(data["sample_stats"]["lp_approx"][0], fn.log_prob(free) - log_tau, rtol=1e-6)


def test_fixed_noise():
    z = antithetic_normal(64, 5, seed=0)
    torch.testing.assert_close(z.mean(0), torch.zeros(5, dtype=z.dtype))
    torch.testing.assert_close(z.T @ z / 64, torch.eye(5, dtype=z.dtype))
    wide = antithetic_normal(8, 5, seed=0)
    torch.testing.assert_close(wide.square().mean(0), torch.ones(5, dtype=z.dtype))
    with FixedNoise([2, 3, 1, 1], 4, seed=1) as noise:
        x, u = torch.empty(4, 2).normal_(1.0, 2.0), torch.empty(4, 3).uniform_(-1, 1)
        e, r = torch.randn(4, 1), torch.rand(4, 1)
    blocks = [b.float() for b in noise.blocks]
    torch.testing.assert_close(x, 1 + 2 * blocks[0])
    torch.testing.assert_close(u, 2 * torch.special.ndtr(blocks[1]) - 1)
    torch.testing.assert_close(e, blocks[2])
    torch.testing.assert_close(r, torch.special.ndtr(blocks[3]))


# --- refusals


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def amortized(x):
    slope = pyro.param("slope", lambda: x.new_tensor(0.5))
    scale = pyro.param("scale", lambda: x.new_tensor(0.7), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, scale))


def test_amortized_guides():
    x = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)
    with refuses(GuideError, "plate 'data'", "'z'", "amortized"):
        pe.linear_response(local, amortized, x)
    response = pe.linear_response(local, started(AutoNormal(local), x), x)
    np.testing.assert_allclose(response.sd["z"], 0.5**0.5, rtol=1e-7)


def test_amortized_guides_whose_units_are_active_for_few_rows():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 1)).double()
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x[:, None])[:, 0], 0.7))

    with refuses(GuideError, "plate 'data'", "'z'", "amortized"):
        pe.linear_response(local, guide, x)


def test_batch_norm():
    net = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1)).double()

    def guide(x):
        pyro.module("net", net)
        own = pyro.param("own", lambda: torch.zeros_like(x))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(own + net(x[:, None])[:, 0], 0.7))

    with refuses(GuideError, "batch norm"):
        pe.linear_response(local, guide, torch.randn(4, dtype=torch.float64))
    assert net.training


def test_guides_that_are_points_or_discrete_or_have_no_parameters():
    with refuses(GuideError, "point estimate", "'b'"):
        pe.linear_response(regression, started(AutoDelta(regression), X, Y), X, Y)
    with refuses(GuideError, "Not initialized"):
        pe.linear_response(regression, AutoNormal(regression), X, Y)
    with refuses(GuideError, "no parameter"):
        pe.linear_response(
            regression, lambda x, y: pyro.sample("b", dist.Normal(x.new_zeros(3), 1.0).to_event(1)), X, Y
        )

    def only_scale(x, y):
        scale = pyro.param("scale", lambda: x.new_ones(3), constraint=dist.constraints.positive)
        pyro.sample("b", dist.Normal(torch.zeros_like(scale), scale).to_event(1))

    with refuses(GuideError, "No parameter", "'b'"):
        pe.linear_response(regression, only_scale, X, Y)

    def coin(x):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def coin_guide(x):
        pyro.sample("z", dist.Bernoulli(pyro.param("p", lambda: x.new_tensor(0.5))))

    with refuses(SiteError, "'z'", "discrete"):
        pe.linear_response(coin, coin_guide, X[0, 0])
    with refuses(SiteError, "no latent"):
        pe.linear_response(lambda x: pyro.sample("x", dist.Normal(0.0, 1.0), obs=x), lambda x: None, X[0, 0])


def test_draws_without_second_derivatives():
    def model(x):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x):
        a = pyro.param("a", lambda: x.new_tensor(2.0), constraint=dist.constraints.positive)
        pyro.sample("rate", dist.Gamma(a, 1.0))

    with refuses(GuideError, "second derivatives", "Gamma"):
        pe.linear_response(model, guide, torch.tensor(3.0, dtype=torch.float64))


def test_a_part_of_the_rows():
    def model(x):
        m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", 10, subsample_size=3):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    with refuses(WeightsError, "all data", "'data'"):
        pe.linear_response(model, started(AutoNormal(model), X[:3, 0]), X[:3, 0])


def test_posteriors_that_are_not_proper():
    def model(x):
        a = pyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
        b = pyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x):
        for name in "ab":
            pyro.sample(name, dist.Normal(pyro.param(f"{name}_loc", lambda: x.new_zeros(())), 1.0))

    with refuses(GuideError, "flat"):
        pe.linear_response(model, guide, X[0, 0])


def test_a_guide_that_grows_without_end():
    def model(x):
        a = pyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("x", dist.Normal(0 * a, 1.0), obs=x)

    def guide(x):
        scale = pyro.param("scale", lambda: x.new_ones(()), constraint=dist.constraints.positive)
        pyro.sample("a", dist.Normal(pyro.param("loc", lambda: x.new_zeros(())), scale))

    with refuses(GuideError, "optimum"):
        pe.linear_response(model, guide, X[0, 0])


def test_data_that_are_not_finite():
    y = Y.clone()
    guide = started(AutoNormal(regression), X, Y)
    y[2] = float("nan")
    with refuses(NonFiniteError, "'y'"):
        pe.linear_response(regression, guide, X, y)
    with refuses(NonFiniteError, "functions", "'value'"):
        pe.linear_response(regression, guide, X, Y, functions=lambda z: z["b"].log())


def test_arguments(untyped):
    guide = started(AutoNormal(regression), X, Y)
    for options, part in (
        ({"num_samples": 0}, "num_samples must be"),
        ({"num_samples": 2}, "num_samples must be a whole number >= 4, got 2"),
        ({"num_samples": 7}, "even"),
        ({"method": "newton"}, "'newton'"),
        ({"functions": "b"}, "functions must be"),
        ({"functions": lambda z: z["c"]}, "KeyError 'c'. Use the latents and deterministics ['b'"),
        ({"functions": lambda z: z["b"].sum()}, "first dimension"),
        ({"functions": lambda z: {"n": 3}}, "'n'"),
    ):
        with refuses(ArgumentError, part):
            pe.linear_response(regression, guide, X, Y, **options)
    with refuses(ArgumentError, "num_samples="):
        pe.linear_response(regression, guide, X, Y, draws=7)


def test_results_of_a_fit_pass_it_on():
    guide = AutoNormal(regression)
    result = pe.fit(regression, guide, (X, Y), batch_size=None, max_epochs=1, progress=False)
    data = result.to_arviz(num_samples=50, prior=False, predictive=False, covariance="linear_response")
    assert data["posterior"].attrs["covariance"] == "linear_response"
