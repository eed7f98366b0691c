"""to_arviz: groups, dimensions, restarts, resampling, and what other libraries read from it."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

import pyro_elbo as pe
from models.vae import VAEGuide, VAEModel
from pyro_elbo.errors import ArgumentError, GuideError
from pyro_elbo.posterior.draws import draw
from tests.programs import X2, bernoulli_guide, bernoulli_model, nested_guide, nested_model
from tests.support.exported import group_names

SIGMA = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)
Y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
GROUPS = {
    "posterior",
    "unconstrained_posterior",
    "sample_stats",
    "log_likelihood",
    "log_prior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
}


def schools(sigma, y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(torch.full((), 5.0, dtype=torch.float64)))
    with pyro.plate("school", len(y)):
        raw = pyro.sample("raw", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        theta = pyro.deterministic("theta", mu + tau * raw)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def fitted(kind, steps=1500, seed=0, **options):
    pyro.set_rng_seed(seed)
    guide = kind(schools, init_scale=0.1)
    loss = pe.TraceBeta_ELBO(kl="sampled", num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    optim = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.01 ** (1 / steps)})
    pe.SVI(schools, guide, optim, loss, **options).run(steps, SIGMA, Y, progress=False)
    return guide


@pytest.fixture(scope="module")
def full_rank():
    """A full-rank guide; it keeps its parameters when the store is cleared."""
    return fitted(AutoMultivariateNormal, 3000, compile=True)


def test_groups_and_dimensions(full_rank):
    data = pe.to_arviz(schools, full_rank, SIGMA, Y, num_samples=100)
    assert group_names(data) == GROUPS
    assert dict(data["posterior"].sizes) == {"chain": 1, "draw": 100, "school": 8}
    assert data["posterior"]["theta"].dims == ("chain", "draw", "school")
    assert data["posterior_predictive"]["y"].dims == ("chain", "draw", "school")
    assert data["prior"]["theta"].dims == ("chain", "draw", "school")
    assert set(data["posterior"].data_vars) == {"mu", "tau", "raw", "theta"}
    assert set(data["sample_stats"].data_vars) == {"lp", "lp_approx", "log_weight"}
    assert data["constant_data"]["sigma"].dims == ("school",)
    assert "y" not in data["constant_data"]
    post, free = data["posterior"], data["unconstrained_posterior"]
    np.testing.assert_allclose(np.log(post["tau"]), free["tau"], rtol=1e-9)
    np.testing.assert_allclose(post["theta"], post["mu"] + post["tau"] * post["raw"], rtol=1e-9)


def test_densities_are_those_of_the_programs(full_rank):
    data = pe.to_arviz(schools, full_rank, SIGMA, Y, num_samples=50, prior=False, predictive=False)
    stats = data["sample_stats"]
    total = sum(v.sum([d for d in v.dims if d not in ("chain", "draw")]) for v in data["log_prior"].data_vars.values())
    np.testing.assert_allclose(total + data["log_likelihood"]["y"].sum("school"), stats["lp"], rtol=1e-9)
    np.testing.assert_allclose(stats["lp"] - stats["lp_approx"], stats["log_weight"], rtol=1e-6, atol=1e-9)
    theta = torch.tensor(data["posterior"]["theta"].values)
    expected = dist.Normal(theta, SIGMA).log_prob(Y)
    np.testing.assert_allclose(data["log_likelihood"]["y"], expected, rtol=1e-9)


def test_vectorized_and_single_draws_agree_in_law(full_rank):
    """The same draws, replayed one by one, have the same densities."""
    draws = draw(schools, full_rank, (SIGMA, Y), {}, 200, chunk_size=60, seed=0)
    for i in (0, 77, 199):
        values = {name: x[i] for name, x in draws.latents.items()}
        trace = pyro.poutine.trace(pyro.poutine.condition(schools, values)).get_trace(SIGMA, Y)
        torch.testing.assert_close(draws.log_p[i], trace.log_prob_sum())


def test_programs_that_do_not_vectorize_are_drawn_one_by_one():
    cell = torch.nn.GRUCell(1, 2)

    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(cell(z).sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(torch.zeros(3, 1), 1.0).to_event(1))

    with pytest.raises(ValueError, match="GRUCell"):
        pe.TraceBeta_ELBO(num_particles=2, vectorize_particles=True).loss(model, guide, torch.zeros(3))
    data = pe.to_arviz(model, guide, torch.zeros(3), num_samples=30)
    assert data["posterior"]["z"].dims == ("chain", "draw", "data", "z_dim_0")
    assert data["sample_stats"]["log_weight_local"].dims == ("chain", "draw", "data")


def test_nested_plates_and_sparse_plates():
    data = pe.to_arviz(nested_model, nested_guide, X2, num_samples=20)
    post = data["posterior"]
    assert post["mu"].dims == ("chain", "draw")
    assert post["m"].dims == ("chain", "draw", "group")
    assert post["z"].dims == data["log_likelihood"]["x"].dims == ("chain", "draw", "group", "item")


def test_discrete_latents_have_no_unconstrained_value():
    data = pe.to_arviz(bernoulli_model, bernoulli_guide, torch.zeros(4, dtype=torch.float64), num_samples=20)
    assert set(np.unique(data["posterior"]["z"])) <= {0.0, 1.0}
    assert "unconstrained_posterior" not in group_names(data)


def test_local_latents_have_weights_per_row():
    torch.manual_seed(0)
    x = torch.distributions.Binomial(16, torch.full((12,), 0.4)).sample((6,))
    model, guide = VAEModel(12, 2, 8), VAEGuide(12, 2, 8)
    data = pe.to_arviz(model, guide, x, num_samples=100)
    stats = data["sample_stats"]
    np.testing.assert_allclose(stats["log_weight_local"].sum("data"), stats["log_weight"], rtol=1e-3, atol=1e-2)
    trust = pe.pareto_k(model, guide, x, num_samples=500)
    assert trust.k.shape == trust.ess.shape == (6,)
    assert "per row of 'data'" in str(trust)
    resampled = pe.to_arviz(model, guide, x, num_samples=100, resample="psis")
    assert not resampled["sample_stats"]["log_weight_local"].any()
    assert float(resampled["log_likelihood"]["x"].mean()) > float(data["log_likelihood"]["x"].mean())
    with pytest.warns(UserWarning, match="shape parameter"):
        assert pe.loo(data).n_data_points == 6


def test_a_variable_named_like_a_dimension_survives():
    def model(x):
        with pyro.plate("x", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x_obs", dist.Normal(z, 1.0), obs=x)
        pyro.deterministic("x_", z.sum())

    def guide(x):
        with pyro.plate("x", 3):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    def clash(data):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(data.mean(), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(3))

    def clash_guide(data):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    data = pe.to_arviz(model, guide, torch.zeros(3), num_samples=10)
    assert {"x_", "z"} <= set(data["posterior"].data_vars)
    data = pe.to_arviz(clash, clash_guide, torch.ones(3), num_samples=10)
    assert data["constant_data"]["data"].dims == ("data_dim",)
    assert data["posterior"]["z"].dims == ("chain", "draw", "data")


@pytest.mark.slow
def test_restarts_become_chains():
    guides = []
    for seed in range(3):
        guides.append(fitted(AutoNormal, 30, seed))
        pyro.clear_param_store()
    data = pe.to_arviz(schools, guides, SIGMA, Y, num_samples=200, prior=False)
    assert dict(data["posterior"].sizes) == {"chain": 3, "draw": 200, "school": 8}
    means = data["posterior"]["mu"].mean("draw").values
    expected = [g.locs.mu.item() for g in guides]
    np.testing.assert_allclose(means, expected, atol=5 * max(g.scales.mu.item() for g in guides) / 200**0.5)
    with pytest.raises(ArgumentError, match="share their parameters"):
        pe.to_arviz(schools, [guides[0], guides[0]], SIGMA, Y)
    with pytest.raises(ArgumentError, match="2 and 3"):
        pe.to_arviz([schools, schools], guides, SIGMA, Y)
    with pytest.raises(ArgumentError, match="modules"):
        pe.to_arviz(bernoulli_model, [bernoulli_guide, bernoulli_guide], Y)


def test_flat_priors_are_skipped_and_said():
    def model(x):
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoNormal(model, init_loc_fn=autoguide.init_to_value(values={"z": torch.tensor(0.0)}, fallback=None))
    guide(torch.zeros(5))
    data = pe.to_arviz(model, guide, torch.zeros(5), num_samples=20)
    assert "prior" not in group_names(data)
    assert "cannot be sampled" in data["posterior"].attrs["prior_skipped"]
    assert data["posterior_predictive"]["x"].shape == (1, 20, 5)


def test_refusals(full_rank):
    with pytest.raises(GuideError, match=r"AutoNormal.*call guide"):
        pe.to_arviz(schools, AutoNormal(schools), SIGMA, Y)
    point = AutoDelta(schools)
    point(SIGMA, Y)
    assert "posterior" in group_names(pe.to_arviz(schools, point, SIGMA, Y, num_samples=5))
    for call in (
        lambda: pe.pareto_k(schools, point, SIGMA, Y),
        lambda: pe.to_arviz(schools, point, SIGMA, Y, num_samples=50, resample="psis"),
    ):
        with pytest.raises(GuideError, match="point estimate"):
            call()
    with pytest.raises(ArgumentError, match="num_samples"):
        pe.to_arviz(schools, full_rank, SIGMA, Y, num_samples=0)


def test_history_becomes_a_group(full_rank):
    result = pe.fit(bernoulli_model, bernoulli_guide, torch.zeros(4, dtype=torch.float64), max_epochs=2, progress=False)
    data = pe.to_arviz(schools, full_rank, SIGMA, Y, num_samples=10, history=result.history, prior=False)
    assert dict(data["training"].sizes) == {"epoch": 2, "split": 2, "latent": 1}
