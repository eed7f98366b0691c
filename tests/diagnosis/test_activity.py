"""Active units against the exact variance of the posterior mean of a linear-Gaussian model."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_elbo as pe
from pyro_elbo.diagnosis.activity import variance_of_means
from pyro_elbo.errors import ArgumentError

WEIGHTS = torch.tensor([1.0, 0.15, 0.05, 0.0])  # z_d ~ N(0, 1), x_d ~ N(w_d z_d, 1): Var_x E[z_d | x] = w² / (w² + 1)


def linear(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(WEIGHTS * z, 1.0).to_event(1), obs=x)


def posterior(x):
    precision = WEIGHTS.square() + 1
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(WEIGHTS * x / precision, precision.rsqrt()).to_event(1))


def rows(n):
    """Data whose moments are exactly those of the model."""
    z = torch.randn(n, 4, dtype=torch.float64)
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(z.T.cov())).T
    return (z * (WEIGHTS.double().square() + 1).sqrt()).float()


def test_the_exact_variance_decides():
    """The variances are 0.5, 0.022, 0.0025 and 0: two of them pass 0.01."""
    exact = WEIGHTS.square() / (WEIGHTS.square() + 1)
    assert (
        pe.active_units(linear, posterior, rows(400))["z"].tolist()
        == (exact > 0.01).tolist()
        == [True, True, False, False]
    )


@pytest.mark.parametrize("unit", [1e-3, 10.0])
def test_the_units_of_a_latent_do_not_matter(unit):
    """The latent in other units: the same bound, the same KL, the same active units, in the probes of a fit as well."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), unit).to_event(1))
            pyro.sample("x", dist.Normal(WEIGHTS * z / unit, 1.0).to_event(1), obs=x)

    def guide(x):
        precision = WEIGHTS.square() + 1
        with pyro.plate("data", len(x)):
            scale = unit * precision.rsqrt() + 0.0 * pyro.param("unused", torch.tensor(1.0))
            pyro.sample("z", dist.Normal(unit * WEIGHTS * x / precision, scale).to_event(1))

    x = rows(400)
    assert pe.active_units(model, guide, x)["z"].tolist() == [True, True, False, False]
    result = pe.fit(model, guide, x, batch_size=None, max_epochs=1, progress=False)
    assert result.history.active_units.values.ravel()[0] == 2
    assert result.summary(num_samples=200).sites[0].active_units == 2


@pytest.mark.parametrize("prior", [dist.Cauchy(0.0, 1.0), dist.Normal(0.0, 1.0)])
def test_a_prior_without_a_variance_counts_as_one_of_unit_variance(prior):
    def model(x, pull):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, pull):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pull * x, 0.1))

    x = torch.linspace(-1.0, 1.0, 200)
    for pull, active in ((0.3, True), (0.1, False)):  # variances of 0.030 and 0.003
        assert pe.active_units(model, guide, x, pull)["z"].item() is active


def test_the_variance_of_means_is_exact_without_noise():
    x = rows(400)
    means = (WEIGHTS * x / (WEIGHTS.square() + 1)).double()
    found = variance_of_means(torch.stack([means, means]), has_time=False)
    torch.testing.assert_close(found, (WEIGHTS.square() / (WEIGHTS.square() + 1)).double(), rtol=1e-5, atol=1e-9)


def test_noise_of_draws_is_subtracted():
    """Draws of one posterior for all rows: the variance of their mean of 30 is 1/30, of the true mean 0."""
    draws = torch.randn(30, 4000, 5, dtype=torch.float64)
    assert draws.mean(0).var(0).min() > 0.03
    se = (2 / 4000) ** 0.5 / 30
    assert variance_of_means(draws, has_time=False).abs().max() < 4 * se


def test_steps_that_do_not_count_are_left_out():
    means = torch.zeros(2, 4, 2, 1, dtype=torch.float64)
    means[:, :, 0, 0] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    means[:, 2:, 1] = torch.nan
    expected = (torch.tensor([0.0, 1.0, 2.0, 3.0]).var() + 0.0) / 2
    assert variance_of_means(means, has_time=True).item() == pytest.approx(expected.item())
    means[:, 1:, 1] = torch.nan  # one row alone has no variance
    assert variance_of_means(means, has_time=True).item() == pytest.approx(2 * expected.item())


def test_a_latent_that_all_rows_share_has_no_units():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    assert pe.active_units(model, guide, torch.randn(5)) == {}


def test_it_leaves_the_callers_stream_alone_and_repeats():
    x = rows(50)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = pe.active_units(linear, posterior, x)["z"]
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first, pe.active_units(linear, posterior, x)["z"])


def test_bad_input():
    with pytest.raises(ArgumentError, match="num_samples must be a whole number >= 2, got 1"):
        pe.active_units(linear, posterior, rows(20), num_samples=1)
