"""Groups, dimensions and values of exported fits, program by program."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import nn

import pyro_elbo as pe
from models.posteriordb import eight_schools
from models.vae import VAEGuide, VAEModel
from pyro_elbo.errors import ArgumentError, GuideError
from pyro_elbo.posterior.draws import draw
from tests.support.exported import group_names

X = torch.tensor([0.3, -1.2, 0.8, 2.1], dtype=torch.float64)
SCHOOLS = (
    torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64),
    torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64),
)
CD = ("chain", "draw")


def mean_model(x):
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def wide_guide(x):
    pyro.sample("mu", dist.Normal(x.new_tensor(0.0), 0.8))


def nested_model(y, weight):
    scale = pyro.sample("scale", dist.Gamma(y.new_tensor(2.0), 1.0))
    with pyro.plate("group", y.shape[0], dim=-2):
        a = pyro.sample("a", dist.Normal(y.new_zeros(()), scale))
        with pyro.plate("unit", y.shape[1], dim=-1):
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("y", dist.Normal(b * weight, 1.0).mask(y > -9), obs=y)


def gap_model(x):
    with pyro.plate("first", 3, dim=-3), pyro.plate("last", 4, dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.deterministic("swallowed", z.exp())
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x.expand(3, 1, 4))


def discrete_model(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.4)))
        pyro.sample("x", dist.Normal(2 * k, 1.0), obs=x)


def discrete_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Bernoulli(logits=2 * x - 2))


def export(model, guide, *args, **options):
    guide(*args)
    return pe.to_arviz(model, guide, *args, **{"num_samples": 30, **options})


def dims(data, group):
    return {name: v.dims for name, v in data[group].data_vars.items()}


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, AutoDelta])
def test_every_group_of_eight_schools(kind):
    data = export(eight_schools, kind(eight_schools), *SCHOOLS)
    scalar, school = CD, (*CD, "school")
    latents = {"mu": scalar, "tau": scalar, "theta_trans": school}
    assert dims(data, "posterior") == dims(data, "prior") == latents | {"theta": school}
    assert dims(data, "unconstrained_posterior") == dims(data, "log_prior") == latents
    assert dims(data, "sample_stats") == dict.fromkeys(("lp", "lp_approx", "log_weight"), scalar)
    for group in ("log_likelihood", "posterior_predictive", "prior_predictive"):
        assert dims(data, group) == {"y": school}
    assert dims(data, "observed_data") == {"y": ("school",)}
    assert dims(data, "constant_data") == {"sigma": ("school",)}
    assert np.array_equal(data["constant_data"]["sigma"], SCHOOLS[0])
    assert np.array_equal(data["observed_data"]["y"], SCHOOLS[1])


def test_every_group_of_an_amortized_vae():
    x = torch.randint(0, 17, (6, 64)).float()
    data = export(VAEModel(z_dim=3), VAEGuide(z_dim=3), x)
    row = (*CD, "data")
    assert dims(data, "posterior") == dims(data, "unconstrained_posterior") == {"z": (*row, "z_dim_0")}
    assert dims(data, "log_likelihood") == {"x": row}
    assert dims(data, "log_prior") == {"z": row}
    assert dims(data, "posterior_predictive") == dims(data, "prior_predictive") == {"x": (*row, "x_dim_0")}
    assert dims(data, "sample_stats") == dict.fromkeys(("lp", "lp_approx", "log_weight"), CD) | {
        "log_weight_local": row
    }
    assert "constant_data" not in group_names(data)  # the only argument is observed
    local = data["sample_stats"]["log_weight_local"]
    # Sums of several hundred nats a row in single precision.
    assert np.allclose(local.sum("data"), data["sample_stats"]["log_weight"], rtol=1e-4)


def test_dims_of_nested_plates_and_of_plates_with_a_gap():
    y, weight = torch.randn(3, 5).double(), torch.tensor(0.7).double()
    data = export(nested_model, AutoNormal(nested_model), y, weight)
    inner = (*CD, "group", "unit")
    expected = {"scale": CD, "a": (*CD, "group"), "b": inner}
    assert dims(data, "posterior") == dims(data, "log_prior") == dims(data, "prior") == expected
    assert dims(data, "log_likelihood") == dims(data, "posterior_predictive") == {"y": inner}
    assert dims(data, "constant_data") == {"weight": ()}

    gap = export(gap_model, AutoNormal(gap_model), X)
    plates = (*CD, "first", "last")
    assert dims(gap, "posterior") == {"z": (*plates, "z_dim_0"), "swallowed": (*plates, "swallowed_dim_0")}
    assert np.allclose(gap["posterior"]["swallowed"], np.exp(gap["posterior"]["z"].values))
    assert dims(gap, "log_likelihood") == dims(gap, "posterior_predictive") == {"x": plates}
    assert dims(gap, "observed_data") == {"x": ("first", "last")}


def test_a_deterministic_without_event_dim_keeps_its_plates():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.deterministic("shifted", z + mu)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.deterministic("table", torch.stack([mu, 2 * mu], -1))

    posterior = export(model, AutoNormal(model), X)["posterior"]
    assert posterior["shifted"].dims == (*CD, "data")
    assert posterior["table"].dims == (*CD, "table_dim_0")
    assert np.allclose(posterior["shifted"], posterior["z"] + posterior["mu"])
    assert np.allclose(posterior["table"][..., 1], 2 * posterior["mu"])


def test_discrete_latents_have_no_unconstrained_values():
    data = export(discrete_model, discrete_guide, X)
    assert dims(data, "posterior") == {"k": (*CD, "data")}
    assert set(np.unique(data["posterior"]["k"])) == {0.0, 1.0}
    assert "unconstrained_posterior" not in group_names(data)


def test_a_variable_that_shares_the_name_of_its_dimension_stays_a_variable():
    def model(x, sigma):
        with pyro.plate("sigma", x.shape[-1]), pyro.plate("lp", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), sigma))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, sigma):
        with pyro.plate("sigma", x.shape[-1]), pyro.plate("lp", 3, dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), sigma))

    data = export(model, guide, X.expand(3, 4), torch.ones(4).double())
    assert dims(data, "posterior") == {"z": (*CD, "lp_dim", "sigma")}
    assert dims(data, "constant_data") == {"sigma": ("sigma_dim",)}
    assert dims(data, "sample_stats")["lp"] == CD


def test_densities_are_those_of_the_program_and_of_the_guide():
    def model(x):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Exponential(rate), obs=x)

    x = X.abs()
    guide = AutoNormal(model, init_scale=0.4)
    data = export(model, guide, x)
    rate = torch.tensor(data["posterior"]["rate"].values[0])
    loc, scale = guide.locs.rate.detach(), guide.scales.rate.detach()
    stats = {name: torch.tensor(v.values[0]) for name, v in data["sample_stats"].data_vars.items()}
    prior, likelihood = dist.Gamma(2.0, 3.0).log_prob(rate), dist.Exponential(rate[:, None]).log_prob(x)
    assert torch.allclose(stats["lp"], prior + likelihood.sum(1))
    assert torch.allclose(stats["lp_approx"], dist.LogNormal(loc, scale).log_prob(rate))  # with the Jacobian
    assert torch.allclose(stats["log_weight"], stats["lp"] - stats["lp_approx"])
    assert np.allclose(data["log_prior"]["rate"][0], prior)
    assert np.allclose(data["log_likelihood"]["x"][0], likelihood)
    assert np.allclose(data["unconstrained_posterior"]["rate"][0], rate.log())


def test_predictive_draws_have_the_moments_of_the_program():
    n = 20_000
    data = export(mean_model, wide_guide, X, num_samples=n)
    # Five standard errors of a mean and, for a normal, of a standard deviation: false alarm below 1e-5 in all.
    for group, variance in (("posterior_predictive", 0.8**2 + 1), ("prior_predictive", 2.0)):
        x = data[group]["x"].values[0]
        sd = math.sqrt(variance)
        assert np.abs(x.mean(0)).max() < 5 * sd / math.sqrt(n)
        assert np.abs(x.std(0) - sd).max() < 5 * sd / math.sqrt(2 * n)
    residual = data["posterior_predictive"]["x"][0] - data["posterior"]["mu"][0]
    assert abs(float(residual.std()) - 1) < 5 / math.sqrt(2 * n)  # every draw uses its own latents
    assert abs(float(data["prior"]["mu"].std()) - 1) < 5 / math.sqrt(2 * n)


@pytest.mark.parametrize("local", [False, True])
def test_resampling_corrects_the_guide_and_makes_the_weights_uniform(local):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x, 1.0))

    n = 20_000
    model, guide, name = (model, guide, "z") if local else (mean_model, wide_guide, "mu")
    data = export(model, guide, X, num_samples=n, resample="psis")
    draws = torch.tensor(data["posterior"][name].values[0])
    mean, sd = (X / 2, math.sqrt(0.5)) if local else (X.sum() / 5, math.sqrt(0.2))
    # Weights and resampling leave at least n / 25 effective draws here; five standard errors.
    assert (draws.mean(0) - mean).abs().max() < 5 * sd / math.sqrt(n / 25)
    assert data["posterior"].attrs["resampled"] == "psis"
    for variable in ("log_weight", "log_weight_local") if local else ("log_weight",):
        assert (data["sample_stats"][variable] == 0).all()
    if local:
        assert np.allclose(data["posterior"]["twice"], 2 * data["posterior"]["z"])
        lp = data["log_likelihood"]["x"].sum("data") + data["log_prior"]["z"].sum("data")
        assert np.allclose(data["sample_stats"]["lp"], lp)


def test_a_program_that_mixes_draws_is_mapped():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("y", dist.Normal(z.mean(), 1.0), obs=x.sum())

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    draws = draw(model, guide, (X,), {}, 20, seed=0)
    assert draws.way == "map"
    expected = dist.Normal(draws.latents["z"].mean(1), 1.0).log_prob(X.sum())
    assert torch.allclose(draws.log_likelihood["y"], expected)


def test_a_deterministic_that_mixes_draws_is_noticed_as_well():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.deterministic("largest", z.max())

    guide = AutoNormal(model)
    posterior = export(model, guide, X)["posterior"]
    assert np.array_equal(posterior["largest"], posterior["z"].max("data"))


def test_recurrent_programs_are_mapped():
    cell = nn.GRUCell(2, 3)

    def model(x):
        pyro.module("cell", cell)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(cell(z).sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 0.5).to_event(1))

    x = X.float()
    draws = draw(model, guide, (x,), {}, 12, seed=0)
    assert draws.way == "map"
    with torch.no_grad():
        loc = cell(draws.latents["z"].reshape(-1, 2)).sum(-1).reshape(12, 4)
    assert torch.allclose(draws.log_likelihood["x"], dist.Normal(loc, 1.0).log_prob(x), atol=1e-5)
    assert dims(export(model, guide, x), "posterior_predictive") == {"x": (*CD, "data")}


@pytest.mark.parametrize("chunk", [1, 7, 30])
def test_chunks_only_change_how_many_draws_run_at_once(chunk):
    draws = draw(mean_model, wide_guide, (X,), {}, 15, chunk_size=chunk, seed=0)
    assert torch.allclose(draws.log_likelihood["x"], dist.Normal(draws.latents["mu"][:, None], 1.0).log_prob(X))
    assert draws.latents["mu"].unique().shape == (15,)


def test_random_subsamples_are_the_same_rows_in_every_draw():
    x = torch.randn(50).double()

    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), subsample_size=6) as rows:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[rows])

    data = export(model, wide_guide, x, num_samples=600)
    observed = torch.tensor(data["observed_data"]["x"].values)
    mu = torch.tensor(data["posterior"]["mu"].values[0])
    likelihood = dist.Normal(mu[:, None], 1.0).log_prob(observed)
    assert np.allclose(data["log_likelihood"]["x"][0], likelihood)
    lp = dist.Normal(0.0, 1.0).log_prob(mu) + likelihood.sum(1) * 50 / 6
    assert np.allclose(data["sample_stats"]["lp"][0], lp)

    guides = [AutoNormal(mean_model), AutoNormal(mean_model)]
    for guide in guides:
        pyro.clear_param_store()
        guide(x)
    chains = pe.to_arviz(model, guides, x, num_samples=30)
    expected = dist.Normal(torch.tensor(chains["posterior"]["mu"].values)[..., None], 1.0)
    observed = torch.tensor(chains["observed_data"]["x"].values)
    assert np.allclose(chains["log_likelihood"]["x"], expected.log_prob(observed))


def two_restarts(local):
    guides = []
    with pyro.settings.context(module_local_params=local):
        for i, scale in enumerate((0.2, 0.6)):
            pyro.clear_param_store()
            pyro.set_rng_seed(i)
            guides.append(AutoNormal(mean_model, init_scale=scale))
            SVI(mean_model, guides[i], pyro.optim.Adam({"lr": 0.01}), pe.TraceBeta_ELBO()).step(X)
    return guides


@pytest.mark.parametrize("local", [True, False])
def test_restarts_are_chains_with_their_own_parameters(local):
    guides = two_restarts(local)
    pyro.clear_param_store()
    AutoNormal(mean_model, init_scale=0.9)(X)  # a third restart, whose values the store now holds under their names
    stored = {name: p.clone() for name, p in pyro.get_param_store().items()}
    data = pe.to_arviz(mean_model, guides, X, num_samples=4000)
    assert data["posterior"].sizes["chain"] == data["posterior_predictive"].sizes["chain"] == 2
    sd = data["posterior"]["mu"].std("draw").values
    # Adam's first step moves the scales by 1 %; 5 standard errors of a standard deviation are 5.6 %.
    assert np.allclose(sd, [0.2, 0.6], rtol=0.07)
    assert len(data["sample_stats"].attrs["pareto_k"]) == 2
    after = dict(pyro.get_param_store().items())
    assert stored.keys() == after.keys()
    assert all(torch.equal(stored[name], after[name]) for name in stored)


def test_restarts_that_share_parameters_or_never_ran_are_refused():
    for never in (AutoNormal(mean_model), [AutoNormal(mean_model), AutoNormal(mean_model)]):
        with pytest.raises(GuideError, match="AutoNormal"):
            pe.to_arviz(mean_model, never, X)
    guides = two_restarts(local=True)
    with pytest.raises(ArgumentError, match="share their parameters"):
        pe.to_arviz(mean_model, [guides[0], guides[0]], X)
    with pytest.raises(ArgumentError, match="2 and 1"):
        pe.to_arviz([mean_model] * 2, guides[:1], X)
    with pytest.raises(ArgumentError, match="parameter store"):
        pe.to_arviz(mean_model, [wide_guide, wide_guide], X)
    stored = [AutoNormal(mean_model), AutoNormal(mean_model)]
    for guide in stored:  # both take the parameters of that name in Pyro's store
        guide(X)
    with pytest.raises(ArgumentError, match="share their parameters"):
        pe.to_arviz(mean_model, stored, X)


def test_missing_observations_are_filled_and_masked():
    y, weight = torch.randn(3, 5).double(), torch.tensor(0.7).double()
    y[0, 1] = math.nan
    data = export(nested_model, AutoNormal(nested_model), y, weight)
    likelihood = data["log_likelihood"]["y"]
    assert (likelihood.sel(group=0, unit=1) == 0).all()
    assert dims(data, "constant_data") == {"weight": ()}


def test_names_and_labels_of_dimensions():
    x = torch.randint(0, 17, (3, 64)).float()
    options = {"coords": {"data": ["a", "b", "c"], "latent": [10, 20]}, "dims": {"z": ["latent"]}}
    data = export(VAEModel(z_dim=2), VAEGuide(z_dim=2), x, **options)
    assert data["posterior"]["z"].dims == (*CD, "data", "latent")
    assert list(data["log_likelihood"]["data"].values) == ["a", "b", "c"]
    assert list(data["posterior"]["latent"].values) == [10, 20]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_samples": 0}, "num_samples must be a whole number >= 1, got 0"),
        ({"resample": "sir"}, "'sir'"),
        ({"coords": {"data": [1, 2]}}, "got 2 labels, expected 4"),
        ({"coords": {"date": [1, 2]}}, "one of the dimensions .*'data'"),
        ({"dims": {"mu": ["k"]}}, "expected 0 names"),
        ({"dims": {"nu": ["k"]}}, "not among the variables"),
    ],
)
def test_bad_options_say_what_was_expected(options, words):
    with pytest.raises(ArgumentError, match=words):
        export(mean_model, wide_guide, X, **options)


def test_the_export_is_repeatable_and_leaves_the_random_stream():
    pyro.set_rng_seed(5)
    expected = torch.randn(2)
    pyro.set_rng_seed(5)
    first, second = (pe.to_arviz(mean_model, wide_guide, X, num_samples=30) for _ in range(2))
    assert torch.equal(torch.randn(2), expected)
    for group in group_names(first):
        assert first[group].equals(second[group]), group
