"""Ranks of exact, narrow, shifted and mean-field posteriors; the false-alarm rate is the one that is stated."""

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import pyro_elbo as pe
from pyro_elbo.calibration.plots import band
from pyro_elbo.calibration.ranks import rank_of
from pyro_elbo.calibration.verdicts import judge
from tests.calibration.programs import (
    SIGMA,
    AutoNormalFit,
    Y,
    centered_schools,
    correlated,
    exact,
    mean_field,
    narrow,
    normal,
    shifted,
)

QUIET = {"progress": False, "num_simulations": 100}


@pytest.fixture(scope="module", name="calibrated")
def _calibrated():
    return pe.simulation_based_calibration(normal, exact, Y, **QUIET | {"num_simulations": 300})


def test_ranks_of_the_exact_posterior_are_uniform(calibrated):
    """False alarms: 5 % for the verdicts (three tests of three quantities), 1 % for the histogram of all ranks."""
    assert calibrated.is_calibrated, calibrated
    assert [v.name for v in calibrated.verdicts] == ["mean", "square", "log_likelihood"]
    ranks = calibrated.ranks["mean"].values
    assert ranks.min() >= 0
    assert ranks.max() <= calibrated.num_draws
    assert stats.chisquare(np.histogram(ranks, 20, (-0.5, 99.5))[0]).pvalue > 0.01


def test_true_values_are_draws_of_the_prior(calibrated):
    assert stats.kstest(calibrated.truth["mean"].values, "norm").pvalue > 0.001
    assert np.allclose(calibrated.truth["square"], calibrated.truth["mean"] ** 2)


def test_a_narrow_and_a_shifted_posterior_are_named():
    found = pe.simulation_based_calibration(normal, narrow, Y, **QUIET)
    assert found.verdicts[0].words == "too narrow"
    found = pe.simulation_based_calibration(normal, shifted, Y, **QUIET)
    assert "draws too low" in found.verdicts[0].words
    assert found.verdicts[0].mean > 0.6


def test_mean_field_is_too_narrow_for_a_correlated_gaussian_and_not_biased():
    y = torch.zeros((), dtype=torch.float64)
    found = pe.simulation_based_calibration(correlated, mean_field, y, **QUIET)
    assert [v.words for v in found.verdicts[:2]] == ["too narrow"] * 2
    assert all(v.bias > 0.001 for v in found.verdicts[:2])


def test_a_fit_that_ignores_the_data_shows_in_the_log_likelihood_alone():
    def prior(y):
        return lambda y: pyro.sample("mean", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))

    verdicts = pe.simulation_based_calibration(normal, prior, Y, **QUIET).verdicts
    assert verdicts[0].is_calibrated
    assert not verdicts[2].is_calibrated


@pytest.mark.slow
def test_auto_normal_is_not_calibrated_on_centered_eight_schools():
    fit = AutoNormalFit(centered_schools, 1500, compile=True)
    found = pe.simulation_based_calibration(centered_schools, fit, SIGMA, torch.zeros(8), **QUIET)
    verdicts = {v.name: v for v in found.verdicts}
    assert verdicts["tau"].words != "calibrated", found
    assert found.ranks["theta"].dims == ("simulation", "school")


def test_the_tests_reject_uniform_numbers_as_often_as_stated():
    """At level 0.1 each, over 300 sets of 100: within 4 standard errors of a binomial (false alarm 2e-4)."""
    rng = np.random.default_rng(0)
    verdicts = [judge("z", rng.random(100), 0.1) for _ in range(300)]
    for p in ("uniform", "bias", "spread"):
        rejected = np.mean([getattr(v, p) < 0.1 for v in verdicts])
        assert abs(rejected - 0.1) < 4 * (0.09 / 300) ** 0.5, p


def test_the_band_holds_whole_curves_with_the_stated_probability():
    rng = np.random.default_rng(1)
    points, low, high = band(100, 0.9)
    curves = (np.searchsorted(np.sort(rng.random(100)), points, side="right") / 100 for _ in range(2000))
    inside = np.mean([bool(((low <= c) & (c <= high)).all()) for c in curves])
    assert abs(inside - 0.9) < 0.03


def test_ties_are_broken_evenly():
    generator = torch.Generator().manual_seed(0)
    truth, draws = torch.ones(4000), torch.ones(9, 4000)
    counts = np.bincount(rank_of(truth, draws, generator).rank.numpy(), minlength=10)
    assert stats.chisquare(counts).pvalue > 0.001
    draws[:3] = 0.0
    assert rank_of(truth, draws, generator).rank.min() == 3


def test_discrete_latents_are_ranked():
    def model(y):
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    def fit(y):
        odds = 0.3 / 0.7 * torch.exp(y - 0.5)
        return lambda y: pyro.sample("k", dist.Bernoulli(odds / (1 + odds)))

    assert pe.simulation_based_calibration(model, fit, torch.tensor(0.0), **QUIET).is_calibrated


def test_integer_data_keep_their_dtype():
    seen = []

    def model(y):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    def fit(y):
        seen.append(y.dtype)
        return {"rate": dist.Gamma(2.0 + y.sum(), 1.0 + len(y)).sample((99,))}

    data = torch.zeros(4, dtype=torch.long)
    assert pe.simulation_based_calibration(model, fit, data, **QUIET).is_calibrated
    assert set(seen) == {torch.long}


def test_results_datasets_and_dictionaries_are_draws_too(calibrated):
    import xarray

    def dataset(y):
        draws = dist.Normal(y.sum() / 6, 6**-0.5).sample((4, 50))
        return xarray.Dataset({"mean": (("chain", "draw"), draws.numpy())})

    found = pe.simulation_based_calibration(normal, dataset, Y, **QUIET)
    assert list(found.ranks) == ["mean"]
    assert found.is_calibrated

    def fitted(y):
        return pe.fit(normal, exact(y), y, batch_size=None, max_epochs=1, progress=False)

    with pytest.raises(pe.PyroElboError, match="20 of 20 simulations"):
        pe.simulation_based_calibration(normal, fitted, Y, **QUIET | {"num_simulations": 20})  # nothing to train


def test_what_is_printed_drawn_and_exported(calibrated):
    text = repr(calibrated)
    assert "Calibration over 300 simulations of 99 draws" in text
    assert "probability 0.05 at most" in text
    assert "<table>" in calibrated._repr_html_()
    panels = calibrated.plot()
    assert [ax.get_title() for ax in panels] == ["mean", "square", "log_likelihood"]
    with pytest.raises(pe.PyroElboError, match="expected 3 matplotlib axes"):
        calibrated.plot(panels[:2])
    data = calibrated.to_arviz()
    assert data["prior_sbc"]["mean"].dims == ("chain", "draw")
    assert data["prior_sbc_ranks"]["mean"].sizes["draw"] == 300
    assert az.__version__.startswith("1") or isinstance(data, az.InferenceData)
