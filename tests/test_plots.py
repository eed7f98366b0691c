"""Figures: what they draw is what they were given, and nothing written on them covers anything else."""

import inspect
import itertools
import re

import matplotlib
import numpy as np
import pytest
import xarray
from matplotlib import pyplot as plt

from pyro_elbo.errors import ArgumentError
from pyro_elbo.plots import plot_history, plot_tradeoff
from pyro_elbo.representation import Audit, Fairness
from pyro_elbo.representation.probes import Estimate, ProbeScore, Readout
from tests.diagnosis.histories import CASES, history
from tests.support.refusing import refusing

refuses = refusing(re.compile(r"\bgive\b", re.I))
WEIGHTS = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0)


@pytest.fixture(autouse=True)
def _figures_in_memory():
    matplotlib.use("Agg")
    yield
    plt.close("all")


def estimate(value: float) -> Estimate:
    return Estimate(value, value - 0.01, value + 0.01)


def readout(name: str, accuracy: float, majority: float) -> Readout:
    score = ProbeScore("mlp", estimate(accuracy), estimate(0.5), estimate(0.1), True)
    return Readout(name, ("a", "b"), "a", majority, 0.63, (score,))


def tradeoff(cost: float) -> dict[float, Audit]:
    """Audits that lose s fast and y slowly as the weight grows."""
    left = {weight: 1 / (1 + cost * weight / 3) for weight in WEIGHTS}
    return {
        weight: Audit(
            1000,
            0,
            readout("sex", 0.68 + 0.16 * x, 0.675),
            readout("income", 0.82 + 0.03 * x, 0.752),
            Fairness(estimate(0.05 + 0.13 * x), estimate(0.03 + 0.06 * x), estimate(0.2)),
        )
        for weight, x in left.items()
    }


def test_tradeoff_draws_the_audits():
    audits = tradeoff(1.0)
    forget, keep, gaps, both = plot_tradeoff({"aggregate": dict(reversed(audits.items()))})
    of_s, of_y = ([getattr(audits[w], name).best.accuracy.value for w in WEIGHTS] for name in ("s", "y"))
    np.testing.assert_allclose(forget.lines[0].get_xydata(), np.stack([WEIGHTS, of_s], 1))
    np.testing.assert_allclose(keep.lines[0].get_xydata(), np.stack([WEIGHTS, of_y], 1))
    np.testing.assert_allclose(both.lines[0].get_xydata(), np.stack([of_s, of_y], 1))
    np.testing.assert_allclose(
        gaps.lines[0].get_ydata(), [a.fairness.demographic_parity.value for a in audits.values()]
    )
    np.testing.assert_allclose(gaps.lines[1].get_ydata(), [a.fairness.equalized_odds.value for a in audits.values()])
    assert list(forget.lines[1].get_ydata()) == [0.675, 0.675]
    assert list(keep.lines[1].get_ydata()) == [0.752, 0.752]
    band = forget.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((min(of_s) - 0.01, max(of_s) + 0.01))


def test_weight_zero_has_its_own_place():
    forget = plot_tradeoff({"aggregate": tradeoff(1.0)})[0]
    forget.figure.draw_without_rendering()
    places = forget.transData.transform([(w, 0.7) for w in WEIGHTS])[:, 0]
    assert (np.diff(places) > 0.05 * forget.bbox.width).all()
    assert [label.get_text() for label in forget.get_xticklabels()] == ["0", "1", "3", "10", "30", "100"]


def texts(axes):
    named = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, axes.get_legend()]
    ticks = [label for label in [*axes.get_xticklabels(), *axes.get_yticklabels()] if label.get_text()]
    return [artist for artist in [*named, *ticks] if artist is not None]


@pytest.mark.parametrize("names", [["aggregate"], ["aggregate", "adversarial", "club"]])
def test_no_text_covers_another(names):
    axes = plot_tradeoff({name: tradeoff(cost) for name, cost in zip(names, (1.0, 0.5, 3.0), strict=False)})
    axes[0].figure.draw_without_rendering()
    boxes = [(artist, artist.get_window_extent()) for one in axes for artist in texts(one)]
    for (first, a), (second, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), f"{first} covers {second}"


def test_points_are_labeled_by_weight():
    both = plot_tradeoff({"aggregate": tradeoff(1.0)})[3]
    labels = {text.get_text(): text.xy for text in both.texts}
    assert {"0", "1", "3"} <= set(labels)
    audit = tradeoff(1.0)[3.0]
    assert labels["3"] == (audit.s.best.accuracy.value, audit.y.best.accuracy.value)


def test_points_in_one_place_share_a_label():
    same = dict.fromkeys((float(w) for w in range(9)), tradeoff(1.0)[0.0])
    axes = plot_tradeoff({"aggregate": same})
    assert 1 <= len(axes[3].texts) < 9


def test_one_weight_and_given_axes():
    given = list(plt.subplots(1, 4)[1])
    assert plot_tradeoff({"aggregate": {1.0: tradeoff(1.0)[1.0]}}, given) == given
    assert given[0].get_xscale() == "linear"


def test_bad_curves():
    alone = Audit(1000, 0, readout("sex", 0.7, 0.675))
    with refuses(ArgumentError, "no curves"):
        plot_tradeoff({})
    with refuses(ArgumentError, "'aggregate' has no audits"):
        plot_tradeoff({"aggregate": {}})
    with refuses(ArgumentError, "'aggregate' at 3 has no target"):
        plot_tradeoff({"aggregate": {3.0: alone}})


def test_history_draws_the_bound_and_its_parts():
    epochs, split = np.arange(3), ["train", "valid"]
    curve = np.array([[-3.0, -3.5], [-2.0, -2.5], [-1.0, np.nan]])
    history = xarray.Dataset(
        {
            "elbo": (("epoch", "split"), curve),
            "loss": (("epoch", "split"), -curve),
            "distortion": (("epoch", "split"), -curve - 0.5),
            "rate": (("epoch", "split"), np.full((3, 2), 0.5)),
            "kl": (("epoch", "split", "latent"), np.full((3, 2, 1), 0.5)),
            "beta": (("epoch", "latent"), np.ones((3, 1))),
        },
        {"epoch": epochs, "split": split, "latent": ["z"]},
    )
    bound, kl = plot_history(history)
    np.testing.assert_allclose(bound.lines[0].get_ydata(), curve[:, 0])
    np.testing.assert_allclose(bound.lines[1].get_ydata(), curve[:, 1])
    np.testing.assert_allclose(bound.lines[2].get_ydata(), curve[:, 0] + 0.5)
    np.testing.assert_allclose(kl.lines[0].get_ydata(), [0.5] * 3)


@pytest.mark.parametrize("name", ["healthy", "overfitting", "over-regularized", "posterior collapse"])
def test_legends_of_a_history_cover_no_curve(name):
    for axes in plot_history(history(**CASES[name])):
        axes.figure.draw_without_rendering()
        legend, curves = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert legend.y1 < curves.y0
        assert legend.y0 > 0


def test_a_history_of_one_epoch_is_seen_as_points():
    bound, kl = plot_history(history().isel(epoch=[3]))
    shown = [line for line in bound.lines if len(line.get_xdata())]
    assert [line.get_marker() for line in shown] == ["o"] * len(shown)
    assert shown
    assert kl.lines[0].get_marker() == "o"
    bound.figure.draw_without_rendering()
    assert all(float(tick).is_integer() for tick in bound.get_xticks())
    assert all(line.get_marker() == "None" for line in plot_history(history())[0].lines)
    with refuses(ArgumentError, "plot_history: the history has no epochs"):
        plot_history(history().isel(epoch=slice(0)))


def test_what_is_no_axes_is_called_so():
    plot = inspect.unwrap(plot_history)  # without the tests' type checks
    with pytest.raises(ArgumentError, match=r"expected 2 matplotlib axes, got \[1, 2\] \(list\)"):
        plot(history(), [1, 2])


def test_the_distortion_is_said_to_be_that_of_training():
    bound, _ = plot_history(history())
    assert [line.get_label() for line in bound.lines] == ["elbo, train", "elbo, valid", "-distortion, train"]


def test_inputs_that_are_no_history_or_no_audits_are_refused():
    audits = tradeoff(1.0)
    history, curves = inspect.unwrap(plot_history), inspect.unwrap(plot_tradeoff)  # without the tests' type checks
    with refuses(ArgumentError, "epoch, split and latent", "dict"):
        history({"elbo": [1.0]})
    with refuses(ArgumentError, "label", "weight"):
        curves(audits)
    with pytest.raises(ArgumentError, match="expected 4 matplotlib axes, got 2"):
        plot_tradeoff({"aggregate": audits}, plt.subplots(1, 2)[1])
    with refuses(ArgumentError, "label", "weight"):
        curves({"aggregate": {0.0: 1.0}})
