"""Audits: figures that are known exactly, intervals that cover, words that say what the figures say, bad input."""

import math
import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from fairlearn.metrics import demographic_parity_difference, equalized_odds_difference
from sklearn.linear_model import LogisticRegression

from pyro_elbo.errors import ArgumentError, DataError, PyroElboError
from pyro_elbo.representation import probes
from pyro_elbo.representation.audit import Audit, audit
from pyro_elbo.representation.fairness import (
    Fairness,
    _estimate_gap,
    _gap,
    _odds_rates,
    _parity_rates,
    count_cells,
    measure_fairness,
)
from pyro_elbo.representation.probes import PROBES, Estimate, ProbeScore, Readout, estimate_mean, estimate_share
from tests.support.refusing import refusing

CURE = re.compile(r"\b(merge|remove|give|use|choose|must be|pip install)\b", re.I)
refuses = refusing(CURE)
LOGISTIC = ["logistic"]


def shifted(rows: int, shift: float, share: float = 0.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A binary s and z ~ Normal(shift · s, 1)."""
    rng = np.random.default_rng(seed)
    s = (rng.random(rows) < share).astype(np.int64)
    return rng.normal(size=(rows, 1)) + shift * s[:, None], s


def attributes(rows: int = 240, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z tells of both s and y, which are independent."""
    rng = np.random.default_rng(seed)
    s, y = rng.integers(0, 2, (2, rows))
    return rng.normal(size=(rows, 2)) + 1.5 * np.stack([s, y], 1), s, y


# --- what probes find


@pytest.fixture(scope="module")
def copied() -> Audit:
    rng = np.random.default_rng(1)
    s = rng.integers(0, 2, 400)
    return audit(np.stack([rng.normal(size=400), s], 1), s, folds=2)


def test_a_copy_of_s_is_found_by_every_probe(copied):
    assert [p.name for p in copied.s.probes] == list(PROBES)
    assert [p.accuracy.value for p in copied.s.probes] == [1.0, 1.0, 1.0]
    assert copied.s.is_found
    assert "A fresh adversary still learns s: it is right for 100.0%" in copied.summary()


def test_every_bound_is_just_below_the_entropy(copied):
    for p in copied.s.probes:
        assert 0.95 * copied.s.entropy < p.information.value < copied.s.entropy
        assert p.information.value == pytest.approx(copied.s.entropy - p.cross_entropy.value, abs=1e-12)


def test_independent_noise_is_not_found():
    rng = np.random.default_rng(2)
    s = (rng.random(600) < 0.3).astype(int)
    result = audit(rng.normal(size=(600, 3)), s)
    # The interval of the best of three probes lies above the majority in at most 3 · 2.5 % of data sets.
    assert result.s.best.accuracy.low <= result.s.majority == pytest.approx(1 - s.mean())
    assert all(p.information.low <= 0 for p in result.s.probes)
    assert result.summary().startswith("No fresh probe finds s")


def test_probes_are_judged_out_of_fold():
    rng = np.random.default_rng(3)
    z, s = rng.normal(size=(120, 100)), np.arange(120) % 2  # in sample, 100 columns separate 120 rows
    found = audit(z, s, probes=LOGISTIC).s.best
    assert found.accuracy.low < 0.5 < found.accuracy.high
    assert found.information.value < 0


def mutual_information(shift: float) -> float:
    """I(z; s) of two equally likely levels, by quadrature: E log p(z | s) / p(z)."""
    z = np.linspace(-12.0, 12.0 + shift, 200_001)
    densities = [np.exp(-0.5 * (z - m) ** 2) / math.sqrt(2 * math.pi) for m in (0.0, shift)]
    mixture = 0.5 * (densities[0] + densities[1])
    return float(sum(0.5 * np.trapezoid(d * np.log(d / mixture), z) for d in densities))


@pytest.mark.parametrize("shift", [0.5, 1.5, 3.0])
def test_information_is_a_lower_bound_and_tight_where_the_probe_is_right(shift):
    z, s = shifted(6000, shift)
    found = audit(z, s, probes=LOGISTIC).s.information
    error = (found.high - found.low) / 2 / 1.96
    # Log odds are linear in z: the probe misses the truth by its two parameters only. False-alarm rate 1e-4.
    assert abs(found.value - mutual_information(shift)) < 3.9 * error + 2 / 6000


@pytest.mark.parametrize("probe", ["gradient boosting", "mlp"])
def test_no_probe_finds_more_than_there_is(probe):
    z, s = shifted(2000, 1.0)
    found = audit(z, s, probes=[probe], folds=2).s.information
    error = (found.high - found.low) / 2 / 1.96
    assert found.value < mutual_information(1.0) + 3.7 * error  # false-alarm rate 1e-4
    assert found.low > 0.5 * mutual_information(1.0)


def test_what_accuracy_does_not_show_the_bound_does():
    z, s = shifted(3000, 0.8, share=0.1)
    result = audit(z, s, probes=LOGISTIC)
    assert not result.s.is_found
    assert result.s.information.low > 0
    assert "s: it is not forgotten" in result.summary()


def test_nonlinear_traces_need_the_other_probes():
    rng = np.random.default_rng(4)
    z = rng.normal(size=(1000, 2))
    s = (z[:, 0] * z[:, 1] > 0).astype(int)
    logistic, boosting, mlp = (p.accuracy for p in audit(z, s, folds=2).s.probes)
    assert logistic.value < 0.6
    assert min(boosting.value, mlp.value) > 0.85


def test_several_attributes_are_predicted_jointly():
    z, s, y = attributes()
    result = audit(z, np.stack([s, y], 1), probes=LOGISTIC)
    assert result.s.levels == ("0 | 0", "0 | 1", "1 | 0", "1 | 1")
    shares = np.bincount(2 * s + y) / len(s)
    assert result.s.entropy == pytest.approx(-(shares * np.log(shares)).sum())


# --- a test split


def test_a_test_split_is_judged_by_probes_fitted_on_the_training_rows():
    s, judged = np.arange(100) % 2, np.arange(60) % 3 // 2
    result = audit(s[:, None], s, test=(1.0 - judged[:, None], judged), probes=LOGISTIC)
    assert (result.rows, result.folds) == (60, 0)
    assert result.s.best.accuracy.value == 0.0  # what the first rows teach is wrong for these
    assert result.s.majority_level == "0"
    assert result.s.majority == pytest.approx(40 / 60)


def test_the_majority_is_that_of_the_judged_rows():
    s = (np.arange(100) % 4 == 0).astype(int)
    judged = 1 - s
    result = audit(s[:, None], s, test=(judged[:, None], judged), probes=LOGISTIC)
    assert (result.s.majority_level, result.s.majority) == ("1", 0.75)


def test_a_test_split_with_target():
    z, s, y = attributes(600)
    result = audit(z[:400], s[:400], y[:400], test=(z[400:], s[400:], y[400:]), probes=LOGISTIC)
    model = LogisticRegression().fit((z[:400] - z[:400].mean(0)) / z[:400].std(0), y[:400])
    predicted = model.predict((z[400:] - z[:400].mean(0)) / z[:400].std(0))
    assert result.y.best.accuracy.value == (predicted == y[400:]).mean()
    gap = demographic_parity_difference(y[400:], predicted, sensitive_features=s[400:])
    assert result.fairness.demographic_parity.value == pytest.approx(gap, abs=1e-12)


# --- intervals


@pytest.mark.parametrize("hits", [0, 1, 37, 99, 100])
def test_accuracies_have_wilson_intervals(hits):
    found = estimate_share(hits, 100)
    assert found.value == hits / 100
    for end in (found.low, found.high):  # where the score test would just reject
        if 0 < end < 1:
            assert abs(found.value - end) / math.sqrt(end * (1 - end) / 100) == pytest.approx(1.959964, abs=1e-5)
    assert (found.low == 0.0) == (hits == 0)
    assert (found.high == 1.0) == (hits == 100)


def test_means_have_normal_intervals():
    values = np.random.default_rng(0).normal(size=50)
    found = estimate_mean(values)
    assert found.value == values.mean()
    assert found.high - found.value == pytest.approx(1.959964 * values.std(ddof=1) / math.sqrt(50), rel=1e-6)
    assert found.value - found.low == pytest.approx(found.high - found.value)


@pytest.mark.parametrize("rates", [(0.3, 0.3), (0.3, 0.35), (0.3, 0.6), (0.5, 0.5, 0.5, 0.5), (0.3, 0.5, 0.5)])
def test_bootstrap_intervals_cover(rates):
    """In at least 95 % of 300 data sets of 400 rows, up to 3 standard errors: false-alarm rate 1e-3."""
    rng = np.random.default_rng(5)
    truth, covered = max(rates) - min(rates), []
    for _ in range(300):
        groups = rng.integers(0, len(rates), 400)
        chosen = (rng.random(400) < np.array(rates)[groups]).astype(np.int64)
        counts = count_cells(groups, chosen, chosen)
        found = _estimate_gap(float(_gap(_parity_rates(counts[None]))[0]), _parity_rates, counts, seed=0)
        assert 0 <= found.low <= found.value <= found.high <= 1
        covered.append(found.low <= truth <= found.high)
    assert np.mean(covered) > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 300)


# --- fairness


def test_differences_equal_counts_by_hand():
    # s = 0: of 4 rows with y = 1, 3 are hit; of 6 with y = 0, 3 are false alarms. s = 1: 1 of 5, and 0 of 5.
    groups = np.repeat([0, 1], 10)
    truth = np.array([1] * 4 + [0] * 6 + [1] * 5 + [0] * 5)
    predicted = np.array([1, 1, 1, 0] + [1, 1, 1, 0, 0, 0] + [1, 0, 0, 0, 0] + [0] * 5)
    found = measure_fairness(groups, truth, predicted, seed=0)
    assert found.demographic_parity.value == pytest.approx(0.6 - 0.1)
    assert found.equalized_odds.value == pytest.approx(0.75 - 0.2)
    assert found.label_parity.value == pytest.approx(0.5 - 0.4)


def test_a_constant_prediction_has_no_differences():
    rng = np.random.default_rng(6)
    groups, truth = rng.integers(0, 2, (2, 100))
    found = measure_fairness(groups, truth, np.zeros(100, dtype=np.int64), seed=0)
    assert found.demographic_parity == found.equalized_odds == Estimate(0.0, 0.0, 0.0)
    assert found.label_parity.high > 0


@pytest.mark.parametrize(("groups", "levels"), [(2, 2), (3, 2), (2, 3), (4, 5)])
def test_the_bootstrap_measures_what_fairlearn_does(groups, levels):
    rng = np.random.default_rng(7)
    s, y, predicted = rng.integers(0, groups, 500), rng.integers(0, levels, 500), rng.integers(0, levels, 500)
    counts = count_cells(s, y, predicted)[None]
    found = measure_fairness(s, y, predicted, seed=0)
    assert found.demographic_parity.value == pytest.approx(_gap(_parity_rates(counts))[0], abs=1e-12)
    assert found.equalized_odds.value == pytest.approx(_gap(_odds_rates(counts))[0], abs=1e-12)
    against_rest = [
        equalized_odds_difference((y == c).astype(int), (predicted == c).astype(int), sensitive_features=s)
        for c in range(levels)
    ]
    assert found.equalized_odds.value == pytest.approx(max(against_rest), abs=1e-12)


def test_a_resample_without_a_group_leaves_it_out():
    counts = np.zeros((2, 3, 2, 2), dtype=np.int64)
    counts[:, 0], counts[:, 1] = [[4, 0], [0, 4]], [[4, 4], [0, 0]]  # nothing of the third group
    counts[1, 1] = 0  # of the second draw, of the second group either
    np.testing.assert_allclose(_gap(_parity_rates(counts)), [0.0, 0.0])
    np.testing.assert_allclose(_gap(_odds_rates(counts)), [0.5, 0.0])


def test_y_is_kept_and_its_predictions_are_compared():
    z, s, y = attributes()
    result = audit(z, s, y, name_s="sex", name_y="income", probes=LOGISTIC)
    assert result.y.is_found
    assert result.fairness.demographic_parity.low <= 0.05 <= result.fairness.demographic_parity.high
    assert "income can be predicted" in result.summary()
    assert "Between levels of sex its predictions differ" in result.summary()


def test_y_may_have_many_levels():
    rng = np.random.default_rng(8)
    s, y = rng.integers(0, 2, 300), rng.integers(0, 3, 300)
    result = audit(np.eye(3)[y] + 0.01 * rng.normal(size=(300, 3)), s, y, probes=LOGISTIC)
    rates = np.array([[(y[s == group] == c).mean() for c in range(3)] for group in range(2)])
    assert result.y.best.accuracy.value == 1.0
    assert result.fairness.equalized_odds.value == 0.0
    assert result.fairness.demographic_parity.value == pytest.approx(np.abs(rates[0] - rates[1]).max())
    assert result.fairness.demographic_parity == result.fairness.label_parity


# --- the result


@pytest.mark.slow
def test_the_same_seed_gives_the_same_audit():
    z, s, y = attributes(100)
    first = audit(z, s, y, seed=1, folds=2)
    assert audit(z, s, y, seed=1, folds=2) == first
    assert audit(z, s, y, seed=2, folds=2) != first


@pytest.mark.parametrize(
    "form",
    [
        lambda s: s.tolist(),
        lambda s: s.astype(bool),
        lambda s: s.astype(float),
        lambda s: torch.tensor(s),
        lambda s: torch.tensor(s, dtype=torch.bfloat16, requires_grad=True),
        lambda s: np.array(["no", "yes"])[s],
        lambda s: pd.Series(["no", "yes"]).iloc[s],
        lambda s: pd.Categorical.from_codes(s, ["no", "yes"]),
    ],
)
def test_forms_of_labels_are_one(form):
    z, s, _ = attributes()
    found = audit(torch.tensor(z, requires_grad=True), form(s), probes=LOGISTIC).s
    assert found.probes == audit(z, s, probes=LOGISTIC).s.probes
    assert found.levels in [("0", "1"), ("False", "True"), ("no", "yes")]


def test_z_may_hold_constant_columns():
    z, s, _ = attributes()
    dead = np.concatenate([z, np.ones((len(z), 1))], 1)
    assert audit(dead, s, probes=LOGISTIC).s.best.accuracy == audit(z, s, probes=LOGISTIC).s.best.accuracy


def test_a_probe_that_does_not_converge_is_said_to(monkeypatch):
    z, s, _ = attributes()
    monkeypatch.setattr(probes, "_make_probe", lambda name, seed: LogisticRegression(max_iter=1))
    result = audit(z, s, probes=LOGISTIC)
    assert not result.s.best.converged
    assert "The logistic probe of s ran out of iterations and may read more." in result.summary()
    monkeypatch.undo()
    assert audit(z, s, probes=LOGISTIC).s.best.converged


def test_other_warnings_of_probes_get_out(monkeypatch):
    class Loud(LogisticRegression):
        def fit(self, x, y):
            import warnings

            warnings.warn("loud", RuntimeWarning, stacklevel=2)
            return super().fit(x, y)

    z, s, _ = attributes()
    monkeypatch.setattr(probes, "_make_probe", lambda name, seed: Loud())
    with pytest.warns(RuntimeWarning, match="loud"):
        audit(z, s, probes=LOGISTIC)


def known(accuracy: float = 0.8, majority: float = 0.6) -> Audit:
    def estimate(value: float) -> Estimate:
        return Estimate(value, value - 0.01, value + 0.01)

    def readout(name: str, value: float) -> Readout:
        scores = [
            ProbeScore(probe, estimate(value - drop), estimate(0.4), estimate(0.2 - drop), True)
            for probe, drop in (("logistic", 0.1), ("mlp", 0.0))
        ]
        return Readout(name, ("a", "b"), "a", majority, 0.6, tuple(scores))

    return Audit(
        100, 5, readout("s", accuracy), readout("y", 0.9), Fairness(estimate(0.1), estimate(0.2), estimate(0.3))
    )


def test_words_and_figures():
    lines = repr(known()).splitlines()
    assert len(lines) == 4
    assert lines[0] == "Audit of 100 rows by 5-fold cross-validation, 95 % intervals"
    assert "best fresh probe (mlp) 0.800 [0.790, 0.810], majority 0.600 (others: logistic 0.700)" in lines[1]
    assert "I(z; s) ≥ 0.200 [0.190, 0.210] of 0.600 nats" in lines[1]
    assert str(known()).startswith(repr(known()))
    assert "its interval excludes" in known().summary()
    assert "cannot be predicted better than by a constant" in known(majority=0.9).summary()


@pytest.mark.parametrize("accuracy", [0.8, 0.6, 0.5])
def test_caution_is_always_given(accuracy):
    assert known(accuracy).summary().endswith("failing to find s is no proof of its absence.")


def test_datasets_hold_all_figures():
    data = known().to_dataset()
    assert dict(data.sizes) == {"target": 2, "probe": 2, "part": 3}
    assert data.accuracy.sel(target="y", probe="logistic", part="value") == pytest.approx(0.8)
    assert data.information.sel(target="s", probe="mlp", part="low") == pytest.approx(0.19)
    assert data.equalized_odds.sel(part="high") == pytest.approx(0.21)
    assert data.attrs == {"rows": 100, "folds": 5}


def test_without_a_target_there_is_nothing_to_keep():
    z, s, _ = attributes()
    result = audit(z, s, probes=LOGISTIC)
    assert result.y is None
    assert result.fairness is None
    assert len(repr(result).splitlines()) == 2
    assert "demographic_parity" not in result.to_dataset()


# --- bad input

Z, S, Y = attributes(80)
GAP = np.where(np.arange(80) == 3, np.nan, S.astype(float))
BAD = {
    "one level": (lambda: audit(Z, np.ones(80, dtype=int)), DataError, ("s has one level only, '1'",)),
    "one level of y": (lambda: audit(Z, S, ["a"] * 80), DataError, ("y has one level only, 'a'",)),
    "one level in test": (lambda: audit(Z, S, test=(Z[:5], S[:5] * 0)), DataError, ("test: s has one level",)),
    "one level to fit": (lambda: audit(Z, S * 0, test=(Z, S)), DataError, ("s has one level only, '0'",)),
    "missing in s": (lambda: audit(Z, GAP), DataError, ("s: 1 of 80 values are missing",)),
    "missing in y": (lambda: audit(Z, S, torch.tensor(GAP)), DataError, ("y: 1 of 80",)),
    "none in s": (lambda: audit(Z, [None, "a"] * 40), DataError, ("s: 40 of 80",)),
    "nan in z": (
        lambda: audit(np.where(np.arange(80)[:, None] == 7, np.nan, Z), S),
        DataError,
        ("z: 2 of 160", "2 nan"),
    ),
    "infinite test": (lambda: audit(Z, S, test=(Z / 0.0, S)), DataError, ("test: z: 160 of 160",)),
    "lengths": (lambda: audit(Z, S[:70]), ArgumentError, ("s: got 70 values for 80 rows",)),
    "length of y": (lambda: audit(Z, S, Y[:70]), ArgumentError, ("y: got 70 values",)),
    "one-dimensional z": (lambda: audit(Z[:, 0], S), ArgumentError, ("z must be N × D", "(80,)")),
    "no columns": (lambda: audit(Z[:, :0], S), ArgumentError, ("(80, 0)",)),
    "words in z": (lambda: audit([["a", "b"]] * 80, S), ArgumentError, ("z must be an array of real numbers",)),
    "scalar s": (lambda: audit(Z, 1), ArgumentError, ("s must be N labels", "()")),
    "continuous s": (lambda: audit(Z, Z[:, 0]), ArgumentError, ("s is continuous", "np.digitize")),
    "infinite s": (lambda: audit(Z, np.where(S > 0, np.inf, 0.0)), ArgumentError, ("s is continuous",)),
    "rare level": (
        lambda: audit(Z, np.where(np.arange(80) < 4, 2, S)),
        DataError,
        ("level '2' has 4 rows", "at least 5"),
    ),
    "rare level, few folds": (lambda: audit(Z, np.where(np.arange(80) < 3, 2, S), folds=2), DataError, ("at least 4",)),
    "unseen level": (
        lambda: audit(Z, S, test=(Z, np.where(S > 0, 3, 0))),
        DataError,
        ("level '3' has 0 rows to fit on",),
    ),
    "many levels": (lambda: audit(Z, np.arange(80) % 8), DataError, ("80 rows are too few for 8 levels",)),
    "empty cell": (lambda: audit(Z, S, np.where(S > 0, 1, Y)), DataError, ("no judged row has s = '1' and y = '0'",)),
    "unknown probe": (lambda: audit(Z, S, probes=["svm"]), ArgumentError, ("svm", "gradient boosting")),
    "no probe": (lambda: audit(Z, S, probes=[]), ArgumentError, ("probes must be a list", "got []")),
    "probe as text": (lambda: audit(Z, S, probes="mlp"), ArgumentError, ("'mlp'",)),
    "folds": (lambda: audit(Z, S, folds=1), ArgumentError, (">= 2, got 1",)),
    "names": (lambda: audit(Z, S, name_s="y"), ArgumentError, ("both named 'y'",)),
    "test without y": (lambda: audit(Z, S, Y, test=(Z, S)), ArgumentError, ("(z, s, y)", "got 2")),
    "test with y": (lambda: audit(Z, S, test=(Z, S, Y)), ArgumentError, ("(z, s),", "got 3")),
    "columns of test": (lambda: audit(Z, S, test=(Z[:, :1], S)), ArgumentError, ("(80, 2)", "(80, 1)")),
}


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # of Z / 0, not of the audit
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, parts = BAD[case]
    with refuses(error, *parts):
        call()


@pytest.mark.parametrize("missing", ["sklearn", "fairlearn"])
def test_a_missing_extra_is_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with refuses(PyroElboError, f"audit needs {missing}", "pip install 'pyro-elbo[probe]'"):
        audit(Z, S)


def test_a_test_split_that_was_fitted_on_is_refused() -> None:
    z, s = shifted(200, 1.0)
    for rows in (slice(None), slice(0, 50)):
        with pytest.raises(DataError, match="test: all of its rows are among those that the probes are fitted on"):
            audit(z, s, test=(z[rows], s[rows]), probes=LOGISTIC)
    levels = np.repeat(s[:, None], 2, 1)  # few values: rows repeat in any split
    assert audit(levels[:100], s[:100], test=(levels[100:], s[100:]), probes=LOGISTIC).rows == 100
