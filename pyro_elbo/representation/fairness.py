"""Group fairness of a classifier's predictions: demographic parity and equalized odds, with intervals."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from pyro_elbo.representation.probes import CONFIDENCE, Estimate, Readout

_RESAMPLES = 1000


@dataclass(frozen=True)
class Fairness:
    """Differences of the best probe's predictions of y between levels of s; a constant prediction has 0.

    Attributes:
        demographic_parity: largest difference of P(prediction = c | s) between two levels of s.
        equalized_odds: the same of P(prediction = c | s, y = c) or of P(prediction = c | s, y ≠ c), the larger one.
        label_parity: largest difference of P(y = c | s): the demographic parity of a perfect prediction.

    Each is the largest over the levels c of y; two levels have equal differences.
    """

    demographic_parity: Estimate
    equalized_odds: Estimate
    label_parity: Estimate


def measure_fairness(
    groups: Int[np.ndarray, " judged"],
    truth: Int[np.ndarray, " judged"],
    predicted: Int[np.ndarray, " judged"],
    seed: int,
) -> Fairness:
    """Measure the fairness of predictions of y between groups of s.

    Args:
        groups: level of s of each judged row, by number.
        truth: its level of y.
        predicted: the predicted level of y.
        seed: seed of the bootstrap.
    """
    from fairlearn.metrics import demographic_parity_difference, equalized_odds_difference

    def largest(metric: Callable[..., float], predictions: np.ndarray) -> float:
        levels = np.unique([truth, predictions])
        levels = levels[1:] if len(levels) == 2 else levels  # the rate of one level is 1 less that of the other
        pairs = [((truth == c).astype(int), (predictions == c).astype(int)) for c in levels]
        return max(float(metric(*pair, sensitive_features=groups)) for pair in pairs)

    counts, labels = count_cells(groups, truth, predicted), count_cells(groups, truth, truth)
    return Fairness(
        _estimate_gap(largest(demographic_parity_difference, predicted), _parity_rates, counts, seed),
        _estimate_gap(largest(equalized_odds_difference, predicted), _odds_rates, counts, seed),
        _estimate_gap(largest(demographic_parity_difference, truth), _parity_rates, labels, seed),
    )


def _estimate_gap(value: float, rates: Callable[[np.ndarray], np.ndarray], counts: np.ndarray, seed: int) -> Estimate:
    """Return the largest difference between groups with its interval.

    Its error is at most the largest difference between the errors of two groups' rates. The bootstrap draws the counts
    of the cells from a multinomial distribution.
    """
    rows = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(rows, counts.ravel() / rows, _RESAMPLES)
    errors = rates(drawn.reshape(-1, *counts.shape)) - rates(counts[None])
    width = float(np.nanquantile(_gap(errors), CONFIDENCE))
    return Estimate(value, max(0.0, value - width), min(1.0, value + width))


def count_cells(
    groups: Int[np.ndarray, " row"], truth: Int[np.ndarray, " row"], predicted: Int[np.ndarray, " row"]
) -> Int[np.ndarray, "group level level"]:
    """Count rows by level of s, level of y and prediction."""
    levels = int(max(truth.max(), predicted.max())) + 1
    counts = np.zeros((int(groups.max()) + 1, levels, levels), dtype=np.int64)
    np.add.at(counts, (groups, truth, predicted), 1)
    return counts


def _parity_rates(counts: Int[np.ndarray, "draw group level level"]) -> Float[np.ndarray, "draw group rate"]:
    """Return P(prediction = c | s) for every level c."""
    chosen = counts.sum(-2)
    return _divide(chosen, chosen.sum(-1, keepdims=True))


def _odds_rates(counts: Int[np.ndarray, "draw group level level"]) -> Float[np.ndarray, "draw group rate"]:
    """Return P(prediction = c | s, y = c), then P(prediction = c | s, y ≠ c), for every level c."""
    true, hits = counts.sum(-1), np.diagonal(counts, axis1=-2, axis2=-1)
    false_alarms, others = counts.sum(-2) - hits, true.sum(-1, keepdims=True) - true
    return np.concatenate([_divide(hits, true), _divide(false_alarms, others)], -1)


def _divide(
    part: Int[np.ndarray, "draw group rate"], whole: Int[np.ndarray, "draw group #rate"]
) -> Float[np.ndarray, "draw group rate"]:
    """Divide counts; NaN where a resample holds no row of a group."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _gap(rates: Float[np.ndarray, "draw group rate"]) -> Float[np.ndarray, " draw"]:
    """Return the largest difference between two groups over all rates; groups without a rate are left out."""
    return np.fmax.reduce(np.fmax.reduce(rates, axis=1) - np.fmin.reduce(rates, axis=1), axis=-1)


def describe_fairness(s: Readout, y: Readout, fairness: Fairness) -> str:
    """Describe the differences in a sentence."""
    return (
        f"Between levels of {s.name} its predictions differ by up to {fairness.demographic_parity.value:.3f} in "
        f"frequency and {fairness.equalized_odds.value:.3f} in rates of hits or false alarms; the labels themselves "
        f"differ by {fairness.label_parity.value:.3f}, a constant prediction by 0."
    )
