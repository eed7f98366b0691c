"""The rules on hand-made histories: each finding where it was put, no other, and nothing guessed."""

import re
import time
from typing import get_args

import numpy as np
import pytest

import pyro_elbo as pe
from pyro_elbo.diagnosis.evidence import Curve
from pyro_elbo.diagnosis.findings import FindingName
from tests.diagnosis.histories import CASES, EPOCHS, LATE, SETTLING, T, history


@pytest.mark.parametrize("name", CASES)
def test_each_finding_is_found_alone(name):
    found = pe.diagnose(history(**CASES[name]))
    assert found.names == (name,)
    assert found.is_healthy is (name == "healthy")
    assert found.unsaid == ()
    (finding,) = found.findings
    text = str(found)
    assert name in text
    assert finding.seen
    if name != "healthy":
        assert finding.why
        assert finding.cure
        assert finding.evidence
        assert all(np.isfinite(x) for x in finding.evidence.values())


def test_every_finding_has_a_case():
    assert {*CASES, "unused units"} == set(get_args(FindingName))


def test_a_rate_far_above_the_information_under_a_small_weight():
    seen = history(beta=0.1, rate=30.0)
    lower = (("epoch", "split", "latent", "side"), np.full((EPOCHS, 2, 1, 1), 2.0))
    found = pe.diagnose(seen.assign_coords(side=["lower"]).assign(information=lower))
    assert found.names == ("exploding KL",)
    assert found.findings[0].evidence == {"kl": pytest.approx(34, abs=0.1), "information": 2.0, "beta": 0.1}
    assert pe.diagnose(history(beta=0.1, rate=30.0)).names == ("healthy",)


def test_the_target_of_a_capacity_is_no_weight():
    seen = history(beta=20.0, kl_per_dim=(0.5, 0.0), exchange=2.0)
    assert pe.diagnose(seen).names[0] == "over-regularized"
    seen["beta"].attrs["targets"] = "z"  # a list of one name, as a file returns it
    assert pe.diagnose(seen).names[0] == "healthy"


@pytest.mark.parametrize("name", ["diverging", "overfitting", "KL shrinkage", "exploding KL"])
def test_the_epoch_of_a_fall_is_named(name):
    (finding,) = pe.diagnose(history(**CASES[name])).findings
    assert abs(finding.since - 20) <= 4
    assert finding.evidence["drop"] == pytest.approx(LATE[-1], rel=0.25)


@pytest.mark.parametrize(("name", "part"), [("overfitting", "distortion"), ("KL shrinkage", "rate")])
def test_a_validation_bound_that_does_not_fall_is_not_said_to(name, part):
    """The training rows gain 40 nats from epoch 10 to 20, or go on gaining, and new rows a part of that."""
    settled, rising = -40.0 * np.clip((T - 10) / 10, 0.0, 1.0), -3.0 * T
    for gained, words, since in ((settled, "it has not fallen", 15), (rising, "it still rises", 20)):
        (finding, *_) = pe.diagnose(history(**{part: (gained, gained / 3), "exchange": 1e3})).findings
        assert finding.name == name
        assert abs(finding.since - since) <= 2
        assert f"{words}, and the gap is over half as wide since epoch {finding.since}" in finding.seen
        assert "with every epoch" not in finding.why
        assert "Stopping early would not raise the validation bound" in finding.cure
    (fallen,) = pe.diagnose(history(**CASES[name])).findings
    assert "it has lost" in fallen.seen
    assert "patience=10" in fallen.cure


@pytest.mark.parametrize(("beta", "since"), [(20.0, 0), (np.where(T < 12, 1.0, 20.0), 12)])
def test_a_weight_is_too_large_since_it_was_raised(beta, since):
    """The units fall silent at the probe of epoch 20 only."""
    seen = history(beta=beta, kl_per_dim=(0.5, 0.0), exchange=2.0)
    seen["kl_per_dim"] = seen.kl_per_dim.where(seen.epoch >= 20, 1.0).where(seen.kl_per_dim.notnull())
    (finding, *_) = pe.diagnose(seen).findings
    assert (finding.name, finding.since, finding.units) == ("over-regularized", since, ("z[1]",))
    assert re.search(r"β = 20; the KL is [\d.]+ nats per datum, and 1 of 2 units carry less than 0.02", finding.seen)


def test_an_objective_that_falls_diverges_whichever_part_it_loses_to():
    """The same rate is sold for distortion under a small weight, and lost under one of 1."""
    (finding,) = pe.diagnose(history(rate=LATE)).findings
    assert (finding.name, finding.evidence["rate"]) == ("diverging", pytest.approx(LATE[-1], rel=0.25))
    assert pe.diagnose(history(rate=LATE, distortion=-0.1 * LATE, beta=0.01)).names == ("exploding KL",)
    assert pe.diagnose(history(distortion=LATE, rate=-0.9 * LATE, beta=1.4)).names == ("healthy",)


def test_a_small_fall_of_training_counts_if_it_is_unlike_any_before():
    """A fiftieth of what was gained after the first tenth; not where as deep a fall has been made up for."""
    last = np.maximum(T - 35, 0.0) / 12
    assert pe.diagnose(history(distortion=last)).names == ("diverging",)
    assert pe.diagnose(history(distortion=(0.0, last))).names == ("healthy",)
    assert pe.diagnose(history(distortion=last + 0.4 * ((T >= 20) & (T < 25)))).names == ("healthy",)


def test_a_bound_that_wanders_on_its_way_is_no_noise():
    """The same noise, where the second half of the epochs still gains ten times as much."""
    noise = -30 * SETTLING + 5 * np.random.default_rng(1).normal(size=EPOCHS)
    assert pe.diagnose(history(distortion=noise, gradient=(1.0, 50.0))).names == ("noisy objective",)
    assert pe.diagnose(history(distortion=noise - 3.0 * T, gradient=(1.0, 50.0))).names == ("not converged",)


def test_a_bound_that_wanders_below_its_best_epoch_diverges_only_if_its_gradient_says_so():
    """The second half of the epochs lies below the second quarter, by three times the noise of an epoch."""
    noise = -30 * SETTLING + np.random.default_rng(1).normal(size=EPOCHS) - 3.0 * ((T >= 10) & (T < 20))
    assert pe.diagnose(history(distortion=noise, gradient=(1.0, 0.5))).names == ("diverging",)
    assert pe.diagnose(history(distortion=noise, gradient=(1.0, 50.0))).names == ("noisy objective",)


def test_the_pace_of_the_end_tells_a_slow_rise_after_a_fast_one():
    """A fit slows down and goes on: the gains of its quarters shrink tenfold, and those to come do not."""
    slow = history(distortion=-0.2 * T)
    (finding,) = pe.diagnose(slow).findings
    assert finding.name == "not converged"
    assert finding.evidence["ahead"] == pytest.approx(0.2 * EPOCHS, rel=0.05)
    assert pe.diagnose(history(distortion=-0.05 * T)).names == ("healthy",)


def test_a_bound_that_still_rises_a_little_is_not_said_to_have_settled():
    assert "has settled at" in str(pe.diagnose(history()))
    assert "raised it by 0.5" in " ".join(str(pe.diagnose(history(distortion=-0.05 * T))).split())


def test_a_fit_that_settles_at_once_is_neither_noisy_nor_on_its_way():
    """Its later epochs gain nothing but noise, whatever the gradient's noise is."""
    at_once = 30.0 * (T == 0) + 0.05 * np.random.default_rng(2).normal(size=EPOCHS) - 30 * SETTLING
    found = pe.diagnose(history(distortion=at_once, rate=2 * SETTLING, gradient=(1.0, 50.0)))
    assert found.names == ("healthy",)


def test_latents_that_all_rows_share_make_no_gap():
    """The KL of a coefficient, a hundred nats at most, is divided by the rows of a split: by 10 000 and by 25."""
    of_all = history(rate=(-3.99 + 2 * SETTLING, -3.99 + 2 * SETTLING + 0.1 * T))
    assert pe.diagnose(of_all).names == ("KL shrinkage",)
    unprobed = of_all.drop_dims("unit").assign(swapped_distortion=np.nan * of_all.swapped_distortion)
    assert pe.diagnose(unprobed).names == ("healthy",)


def test_a_decoder_that_is_misled_is_not_dead():
    """Rows that exchange their latents may gain, while the encoder is not trained yet: their decoder looks at them."""
    assert pe.diagnose(history(exchange=-3.0)).names == ("healthy",)
    assert pe.diagnose(history(exchange=-0.01)).names == ("dead decoder",)


def test_noise_hides_no_collapse():
    wandering = history(**{**CASES["posterior collapse"], **CASES["noisy objective"]})
    assert pe.diagnose(wandering).names == ("noisy objective", "posterior collapse")


def test_a_gap_within_the_noise_of_the_two_curves_is_no_overfitting():
    for seed in range(20):
        noise = 3.0 * np.random.default_rng(seed).normal(size=(2, EPOCHS))
        found = pe.diagnose(history(distortion=(noise[0], noise[1] + 0.02 * T), gradient=(1.0, 0.5)))
        assert "overfitting" not in found.names


def test_rows_of_another_kind_are_noted():
    found = pe.diagnose(history(distortion=(0.0, 50.0)))
    assert found.names == ("healthy",)
    assert any("50 nats per datum behind" in text for text in found.unsaid)
    assert pe.diagnose(history()).unsaid == ()


def test_a_capacity_is_cured_as_one():
    asked = history(**CASES["exploding KL"])
    asked.beta.attrs["targets"] = ["z"]
    (finding,) = pe.diagnose(asked).findings
    assert (finding.name, "lower the target" in finding.cure) == ("exploding KL", True)


def test_what_is_left_is_measured_against_the_gain_of_the_whole_fit():
    """A warm-up gains 30 nats; of the 3 after it a tenth is left, which is much of 3 and little of 33."""
    warm, slow = {"beta": np.minimum(T / 12, 1.0)}, 4.0 * np.exp(-T / 15)
    assert pe.diagnose(history(distortion=slow, **warm)).names == ("healthy",)
    late = history(distortion=slow, **warm).isel(epoch=slice(12, None))
    assert pe.diagnose(late).names == ("not converged",)


def test_collapse_names_site_and_units():
    (finding,) = pe.diagnose(history(**CASES["posterior collapse"])).findings
    assert (finding.site, finding.units) == ("z", ("z[0]", "z[1]"))
    assert finding.seen.endswith("nats per datum, and 0 of them move their posterior means with the data.")
    assert "posterior collapse of 'z', since epoch 0" in str(pe.diagnose(history(**CASES["posterior collapse"])))


def test_a_unit_that_is_not_needed_is_noted_and_harmless():
    found = pe.diagnose(history(kl_per_dim=(4.0, 0.0)))
    assert found.names == ("healthy", "unused units")
    assert found.is_healthy is True
    assert found.findings[1].units == ("z[1]",)


def test_a_split_that_lacks_validation_says_so():
    found = pe.diagnose(history(splits=("train",)))
    assert found.names == ("healthy",)
    assert found.unsaid == ("whether it overfits: no validation bound is known.",)


def test_epochs_without_validation_are_told():
    some = history()
    some["elbo"][36:, 1] = np.nan
    assert pe.diagnose(some).unsaid == ("how validation went in 4 of 40 epochs: its bound is not known there.",)


def test_noise_of_the_size_of_the_gradient_is_called_so():
    found = pe.diagnose(history(**CASES["noisy objective"] | {"gradient": (1.0, 1.2)}))
    assert "standard deviation is as large as its norm" in found.findings[0].seen


def test_a_history_of_before_the_probes():
    old = history().drop_dims("unit").drop_vars(["active_units", "own_distortion", "swapped_distortion"])
    found = pe.diagnose(old.drop_vars(["gradient_norm", "gradient_noise"]))
    assert found.names == ("healthy",)
    assert any("collapse" in text for text in found.unsaid)


def test_epochs_without_a_probe_say_so():
    """Epochs 1 to 9 of a history that is probed in epoch 0 and from epoch 10 on."""
    found = pe.diagnose(history().isel(epoch=slice(1, 10)))
    assert found.unsaid == ("what latents carry, and whether they collapse: no probe falls into these epochs.",)
    assert pe.diagnose(history().isel(epoch=slice(0, 10))).unsaid == ()


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_few_epochs_show_nothing(epochs):
    found = pe.diagnose(history(distortion=-3.0 * T).isel(epoch=slice(epochs)))
    assert found.findings == ()
    assert found.is_healthy is None
    assert found.unsaid
    assert str(found).startswith(f"Diagnosis of {epochs} epoch{'s' * (epochs > 1)}: cannot be said\n")
    assert found.summary == f"cannot be said from {epochs} epoch{'s' * (epochs > 1)}"


def test_epochs_that_are_not_finite():
    gone = history()
    gone["elbo"][30:, 0] = np.nan
    (finding,) = pe.diagnose(gone).findings
    assert (finding.name, finding.since) == ("diverging", 30)
    gone["elbo"][33:, 0] = -100.0
    (finding,) = pe.diagnose(gone).findings
    assert (finding.name, finding.since) == ("diverging", None)
    assert "in 3 of the epochs 30 to 32" in finding.seen
    gone = history()
    gone["elbo"][:] = np.nan
    assert pe.diagnose(gone).names == ("diverging",)


def test_noise_of_a_settled_fit_is_nothing():
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(size=(2, EPOCHS))
        assert pe.diagnose(history(distortion=tuple(0.3 * noise))).names == ("healthy",)


def test_a_notebook_shows_what_print_shows():
    found = pe.diagnose(history(**CASES["overfitting"]))
    words = re.sub(r"<[^>]*>", " ", found._repr_html_())
    assert found.findings[0].seen in words
    assert "overfitting" in words


def test_a_history_of_many_epochs_is_judged_in_the_time_of_a_sort():
    """Averages over a tenth of the epochs once took 7 s here, and four times as long for twice as many."""
    epochs = 200_000
    long = history().interp(epoch=np.linspace(0, EPOCHS - 1, epochs)).assign_coords(epoch=np.arange(epochs))
    start = time.process_time()
    pe.diagnose(long)
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("epochs", [6, 40, 157, 1000])
def test_averages_over_neighbors_are_those_of_a_convolution(epochs):
    values = np.random.default_rng(0).normal(size=epochs)
    values[0] = -1e12  # a first epoch that is far off costs later averages no digit
    curve = Curve(np.arange(epochs), values)
    expected = np.convolve(values, np.ones(curve.window) / curve.window, mode="valid")
    np.testing.assert_allclose(curve.smooth.values, expected, rtol=1e-11, atol=1e-14)
