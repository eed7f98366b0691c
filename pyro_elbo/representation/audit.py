"""A representation -> what fresh probes still read out of it: an attribute that it should forget, a target to keep.

An objective that makes a latent forget an attribute cannot judge itself: its own adversary or bound is what the encoder
was trained to defeat. An audit fits classifiers that the encoder has never met, judges them on rows that they were not
fitted on, and states every figure with its interval and beside what a constant prediction reaches.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_elbo.errors import ArgumentError, DataError, PyroElboError, count_nonfinite
from pyro_elbo.representation.probes import CONFIDENCE, PROBES, Estimate, Labels, ProbeRows, Readout, read_out

if TYPE_CHECKING:
    import xarray

_RESAMPLES = 1000
_LEAST_ROWS = 4  # of a level: early stopping sets rows of every level aside, from what is left of the folds
_ROWS_PER_LEVEL = 20  # on average: the tenth that early stopping sets aside must hold one row per level


@dataclass(frozen=True)
class Fairness:
    """How much the best probe's predictions of y differ between levels of s; a constant prediction has 0.

    Attributes:
        demographic_parity: largest difference of P(prediction = c | s) between two levels of s.
        equalized_odds: the same of P(prediction = c | s, y = c) or of P(prediction = c | s, y ≠ c), whichever is more.
        label_parity: largest difference of P(y = c | s): what a perfect prediction would have as demographic parity.

    Each is the largest over the levels c of y, which for two levels are equal.
    """

    demographic_parity: Estimate
    equalized_odds: Estimate
    label_parity: Estimate


@dataclass(frozen=True, repr=False)
class Audit:
    """What fresh probes read out of a representation; print it for plain words.

    Attributes:
        rows: that the probes are judged on.
        folds: of the cross-validation, 0 where a test split was given.
        s: the sensitive attribute.
        y: the target, None if none was given.
        fairness: of predictions of the target, None if none was given.
    """

    rows: int
    folds: int
    s: Readout
    y: Readout | None = None
    fairness: Fairness | None = None

    @property
    def readouts(self) -> tuple[Readout, ...]:
        """Of the sensitive attribute, and of the target if there is one."""
        return (self.s,) if self.y is None else (self.s, self.y)

    def __repr__(self) -> str:
        how = f"{self.folds}-fold cross-validation" if self.folds else "a test split"
        lines = [f"Audit of {self.rows} rows by {how}, 95 % intervals"]
        lines += [f"  {readout}" for readout in self.readouts]
        if self.y is not None and self.fairness is not None:
            lines.append(
                f"  {self.y.name} between levels of {self.s.name}: demographic parity difference "
                f"{self.fairness.demographic_parity}, equalized odds difference {self.fairness.equalized_odds}, "
                f"labels' own difference {self.fairness.label_parity}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self!r}\n{self.summary()}"

    def summary(self) -> str:
        """In plain words: what is left of s, what is kept of y, how fair predictions are, and how far to trust this."""
        sentences = [_describe_leak(self.s)]
        if self.y is not None and self.fairness is not None:
            sentences += [_describe_target(self.y), _describe_fairness(self.s, self.y, self.fairness)]
        sentences += [
            f"The {p.name} probe of {r.name} ran out of iterations and may read more."
            for r in self.readouts
            for p in r.probes
            if not p.converged
        ]
        caution = f"A probe gives a lower bound: failing to find {self.s.name} is no proof of its absence."
        return " ".join([*sentences, caution])

    def to_dataset(self) -> "xarray.Dataset":
        """All figures over ``target`` × ``probe`` × ``part`` (value, low, high); entropies and bounds in nats."""
        import xarray

        def gather(name: str) -> list[list[Any]]:
            return [[astuple(getattr(p, name)) for p in r.probes] for r in self.readouts]

        data: dict[str, Any] = {
            name: (("target", "probe", "part"), gather(name)) for name in ("accuracy", "cross_entropy", "information")
        }
        data["converged"] = (("target", "probe"), [[p.converged for p in r.probes] for r in self.readouts])
        data["majority"] = ("target", [r.majority for r in self.readouts])
        data["entropy"] = ("target", [r.entropy for r in self.readouts])
        if self.fairness is not None:
            data |= {f.name: ("part", list(astuple(getattr(self.fairness, f.name)))) for f in fields(self.fairness)}
        coords = {
            "target": [r.name for r in self.readouts],
            "probe": [p.name for p in self.s.probes],
            "part": ["value", "low", "high"],
        }
        return xarray.Dataset(data, coords, {"rows": self.rows, "folds": self.folds})


def audit(
    z: Any,
    s: Any,
    y: Any = None,
    *,
    test: Sequence[Any] | None = None,
    probes: Sequence[str] = PROBES,
    folds: int = 5,
    seed: int = 0,
    name_s: str = "s",
    name_y: str = "y",
) -> Audit:
    r"""Judge by fresh probes what a representation still tells about a sensitive attribute, and about a target.

    Every probe q is fitted on some rows and judged on others, by accuracy and by cross-entropy. Since
    :math:`I(z; s) = H(s) - H(s \mid z) \ge H(s) + E \log q(s \mid z)`, the latter gives a lower bound on the
    information in nats: what this family of probes can use of it.

    Accuracies have Wilson intervals, cross-entropies normal ones; both take the fitted probes as given, out-of-fold
    predictions as independent, and the majority's share as known. For differences between groups, judged rows are drawn
    again: the interval reaches to both sides as far as the 95 % quantile of the largest difference between errors of
    two groups' rates. (A difference is never negative, so that the percentiles of its bootstrap could not reach 0.)

    Args:
        z: draws or means of the latent, N × D, array or tensor.
        s: the sensitive attribute, N discrete labels; or N × k, whose joint levels are then predicted.
        y: discrete target of any number of levels, shaped like s.
        test: ``(z, s)`` or ``(z, s, y)`` of a test split: probes are then fitted on all of the first rows and judged on
            these, in place of cross-validation.
        probes: which of ``"logistic"``, ``"gradient boosting"`` and ``"mlp"``, all on standardized z.
        folds: of the cross-validation, shuffled and stratified.
        seed: of folds, probes and bootstrap. The same seed gives the same audit.
        name_s, name_y: what to call s and y in the result.

    Returns:
        The figures, which print as plain words.

    Raises:
        ArgumentError: z is not N × D, lengths differ, a continuous attribute, unknown probes.
        DataError: missing values, one level only, a level of too few rows.
        PyroElboError: scikit-learn or fairlearn is not installed.

    Example:
        >>> import numpy as np
        >>> from pyro_elbo.representation.audit import audit
        >>> rng = np.random.default_rng(0)
        >>> s = rng.integers(0, 2, 400)
        >>> z = rng.normal(size=(400, 2)) + s[:, None]
        >>> found = audit(z, s, probes=["logistic"]).s
        >>> found.is_found, round(found.majority, 2), found.best.accuracy.value > 0.7
        (True, 0.55, True)

    References:
        Hardt, Price, Srebro (2016), Equality of opportunity in supervised learning, arXiv:1610.02413; Moyer, Gao,
        Brekelmans, Galstyan, Ver Steeg (2018), Invariant representations without adversarial training,
        arXiv:1805.09458; Wilson (1927), Probable inference, the law of succession, and statistical inference, JASA 22;
        Xu, Zhao, Song, Stewart, Ermon (2020), A theory of usable information under computational constraints,
        arXiv:2002.10689.
    """
    _check_options(probes, folds, (name_s, name_y))
    given = (z, s) if y is None else (z, s, y)
    rows = _gather(given, test, folds, (name_s, name_y))
    found, _ = read_out(name_s, rows.labels[0], rows, probes, seed)
    judged = len(rows.z) - rows.start
    if y is None:
        return Audit(judged, rows.folds, found)
    kept, predicted = read_out(name_y, rows.labels[1], rows, probes, seed)
    groups, truth = (labels.codes[rows.start :] for labels in rows.labels)
    return Audit(judged, rows.folds, found, kept, _measure_fairness(groups, truth, predicted, seed))


# --- what was given


def _check_options(probes: Sequence[str], folds: int, names: tuple[str, str]) -> None:
    if missing := [name for name in ("sklearn", "fairlearn") if find_spec(name) is None]:
        raise PyroElboError(f"audit needs {' and '.join(missing)}: pip install 'pyro-elbo[probe]'.")
    if isinstance(probes, str) or not probes or (set(probes) - set(PROBES)):
        raise ArgumentError(f"probes: got {probes!r}. Choose some of {PROBES}.")
    if folds < 2:
        raise ArgumentError(f"folds must be at least 2, got {folds}.")
    if names[0] == names[1]:
        raise ArgumentError(f"s and y are both named {names[0]!r}. Give name_s and name_y that differ.")


def _gather(given: Sequence[Any], test: Sequence[Any] | None, folds: int, names: tuple[str, str]) -> ProbeRows:
    parts = [_check_rows(given, "", names)]
    if test is not None:
        if len(test) != len(given):
            what = "(z, s, y)" if len(given) == 3 else "(z, s)"
            raise ArgumentError(f"test must be {what}, as given for training; got {len(test)} values.")
        parts.append(_check_rows(test, "test: ", names))
        if any(a.shape[1:] != b.shape[1:] for a, b in zip(*parts, strict=True)):
            shapes = [[x.shape for x in part] for part in parts]
            raise ArgumentError(f"test has shapes {shapes[1]}, the rows to fit on {shapes[0]}. Give the same columns.")
    z, *columns = (np.concatenate(both) for both in zip(*parts, strict=True))
    start, folds = (0, folds) if test is None else (len(parts[0][0]), 0)
    labels = tuple(_encode(x, name, start, folds) for x, name in zip(columns, names, strict=False))
    if len(labels) == 2:
        _check_cells(labels, start, names)
    return ProbeRows(z, labels, start, folds)


def _check_rows(given: Sequence[Any], where: str, names: tuple[str, str]) -> list[np.ndarray]:
    try:
        z = _array(given[0]).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{where}z must be an array of numbers, N × D: {error}.") from error
    if z.ndim != 2 or not z.size:
        raise ArgumentError(f"{where}z must be N × D, got shape {z.shape}. Use z.reshape(N, -1) or z[:, None].")
    if not np.isfinite(z).all():
        raise DataError(f"{where}z: {count_nonfinite(torch.tensor(z))}. Remove those rows from z, s and y.")
    columns = [_discrete(x, where + name) for x, name in zip(given[1:], names, strict=False)]
    for x, name in zip(columns, names, strict=False):
        if len(x) != len(z):
            raise ArgumentError(f"{where}{name}: got {len(x)} values for {len(z)} rows of z. Give one value per row.")
    return [z, *columns]


def _array(x: Any) -> np.ndarray:
    if not isinstance(x, Tensor):
        return np.asarray(x)
    x = x.detach().cpu()
    return (x.double() if x.is_floating_point() else x).numpy()  # numpy has no bfloat16


def _discrete(x: Any, name: str) -> np.ndarray:
    """Check that labels are discrete and complete; whole numbers in floats are labels too."""
    import pandas as pd

    values = _array(x)
    if values.ndim not in (1, 2):
        raise ArgumentError(f"{name} must be N labels, or N × k of several attributes; got shape {values.shape}.")
    if missing := int(pd.isna(values).sum()):
        raise DataError(
            f"{name}: {missing} of {values.size} values are missing. Remove those rows from z, s and y, or give "
            "'missing' a level of its own."
        )
    if values.dtype.kind == "O":
        return values.astype(str)
    if values.dtype.kind == "f":
        if not (np.isfinite(values) & (values == np.round(values))).all():
            raise ArgumentError(
                f"{name} is continuous; the probes are classifiers. Give its levels, such as those between its "
                "quartiles: np.digitize(x, np.quantile(x, [0.25, 0.5, 0.75]))."
            )
        return values.astype(np.int64)
    return values


def _encode(values: np.ndarray, name: str, start: int, folds: int) -> Labels:
    """Number the levels; make sure that all can be fitted, and that more than one is judged."""
    rows, codes = np.unique(values, axis=0, return_inverse=True)
    labels = Labels(codes.reshape(-1), tuple(" | ".join(map(str, np.atleast_1d(row))) for row in rows))
    for part, where in ((labels.codes[: start or None], ""), (labels.codes[start:], "test: ")):
        if len(present := np.unique(part)) < 2:
            raise DataError(
                f"{where}{name} has one level only, {labels.levels[present[0]]!r}: nothing can be predicted. Give rows "
                "of at least two."
            )
    fitted = labels.codes[: start or None]
    counts = np.bincount(fitted, minlength=len(labels.levels))
    rarest, least = int(counts.argmin()), max(folds, _LEAST_ROWS)
    if counts[rarest] < least:
        raise DataError(
            f"{name}: level {labels.levels[rarest]!r} has {counts[rarest]} rows to fit on, expected at least {least}. "
            "Merge rare levels, remove their rows, or use fewer folds."
        )
    if len(fitted) < _ROWS_PER_LEVEL * len(counts):
        raise DataError(
            f"{name}: {len(fitted)} rows are too few for {len(counts)} levels, expected {_ROWS_PER_LEVEL} a level. "
            "Merge levels, or give more rows."
        )
    return labels


def _check_cells(labels: Sequence[Labels], start: int, names: tuple[str, str]) -> None:
    """Equalized odds compare rates within levels of y: every level of s needs rows of each."""
    s, y = labels
    cells = _count(s.codes[start:], y.codes[start:], y.codes[start:]).sum(-1)
    empty = (cells == 0) & (cells.sum(1, keepdims=True) > 0) & (cells.sum(0, keepdims=True) > 0)
    if empty.any():
        i, j = (int(k) for k in np.argwhere(empty)[0])
        raise DataError(
            f"no judged row has {names[0]} = {s.levels[i]!r} and {names[1]} = {y.levels[j]!r}: equalized odds are not "
            "defined. Merge levels, or leave y out and give it to an audit of its own."
        )


# --- fairness


def _measure_fairness(
    groups: Int[np.ndarray, " judged"],
    truth: Int[np.ndarray, " judged"],
    predicted: Int[np.ndarray, " judged"],
    seed: int,
) -> Fairness:
    from fairlearn.metrics import demographic_parity_difference, equalized_odds_difference

    def largest(metric: Callable[..., float], predictions: np.ndarray) -> float:
        levels = np.unique([truth, predictions])
        levels = levels[1:] if len(levels) == 2 else levels  # the rate of one level is 1 less that of the other
        pairs = [((truth == c).astype(int), (predictions == c).astype(int)) for c in levels]
        return max(float(metric(*pair, sensitive_features=groups)) for pair in pairs)

    counts, labels = _count(groups, truth, predicted), _count(groups, truth, truth)
    return Fairness(
        _estimate_gap(largest(demographic_parity_difference, predicted), _parity_rates, counts, seed),
        _estimate_gap(largest(equalized_odds_difference, predicted), _odds_rates, counts, seed),
        _estimate_gap(largest(demographic_parity_difference, truth), _parity_rates, labels, seed),
    )


def _estimate_gap(value: float, rates: Callable[[np.ndarray], np.ndarray], counts: np.ndarray, seed: int) -> Estimate:
    """The interval of the largest difference between groups, whose error is at most that between their errors.

    ProbeRows are drawn again by the multinomial counts of what they are like.
    """
    rows = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(rows, counts.ravel() / rows, _RESAMPLES)
    errors = rates(drawn.reshape(-1, *counts.shape)) - rates(counts[None])
    width = float(np.nanquantile(_gap(errors), CONFIDENCE))
    return Estimate(value, max(0.0, value - width), min(1.0, value + width))


def _count(
    groups: Int[np.ndarray, " row"], truth: Int[np.ndarray, " row"], predicted: Int[np.ndarray, " row"]
) -> Int[np.ndarray, "group level level"]:
    """ProbeRows by level of s, level of y and prediction."""
    levels = int(max(truth.max(), predicted.max())) + 1
    counts = np.zeros((int(groups.max()) + 1, levels, levels), dtype=np.int64)
    np.add.at(counts, (groups, truth, predicted), 1)
    return counts


def _parity_rates(counts: Int[np.ndarray, "draw group level level"]) -> Float[np.ndarray, "draw group rate"]:
    """P(prediction = c | s) for every level c."""
    chosen = counts.sum(-2)
    return _divide(chosen, chosen.sum(-1, keepdims=True))


def _odds_rates(counts: Int[np.ndarray, "draw group level level"]) -> Float[np.ndarray, "draw group rate"]:
    """P(prediction = c | s, y = c), then P(prediction = c | s, y ≠ c), for every level c."""
    true, hits = counts.sum(-1), np.diagonal(counts, axis1=-2, axis2=-1)
    false_alarms, others = counts.sum(-2) - hits, true.sum(-1, keepdims=True) - true
    return np.concatenate([_divide(hits, true), _divide(false_alarms, others)], -1)


def _divide(
    part: Int[np.ndarray, "draw group rate"], whole: Int[np.ndarray, "draw group #rate"]
) -> Float[np.ndarray, "draw group rate"]:
    """Rates; NaN where a resample holds no row of a group."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _gap(rates: Float[np.ndarray, "draw group rate"]) -> Float[np.ndarray, " draw"]:
    """The largest difference between two groups, of any rate; groups without a rate are left out."""
    return np.fmax.reduce(np.fmax.reduce(rates, axis=1) - np.fmin.reduce(rates, axis=1), axis=-1)


# --- plain words


def _describe_leak(s: Readout) -> str:
    best, constant = s.best, f"always answering {s.majority_level!r} is right for {s.majority:.1%}"
    if s.is_found:
        return (
            f"A fresh adversary still learns {s.name}: it is right for {best.accuracy.value:.1%} of rows where "
            f"{constant}, which its interval excludes."
        )
    if s.information.low > 0:
        return (
            f"No fresh probe names {s.name} more often than a constant answer: {best.accuracy.value:.1%} of rows where "
            f"{constant}. But its probabilities still tell {s.information} nats of {s.name} at least: {s.name} has not "
            "gone."
        )
    return (
        f"No fresh probe finds {s.name}: the best is right for {best.accuracy.value:.1%} of rows where {constant}, "
        "which its interval does not exclude."
    )


def _describe_target(y: Readout) -> str:
    verdict = "can be predicted" if y.is_found else "cannot be predicted better than by a constant"
    return (
        f"{y.name} {verdict}: {y.best.accuracy.value:.1%} of rows by the best probe, {y.majority:.1%} by always "
        f"answering {y.majority_level!r}."
    )


def _describe_fairness(s: Readout, y: Readout, fairness: Fairness) -> str:
    return (
        f"Between levels of {s.name} its predictions differ by up to {fairness.demographic_parity.value:.3f} in "
        f"frequency and {fairness.equalized_odds.value:.3f} in rates of hits or false alarms; the labels themselves "
        f"differ by {fairness.label_parity.value:.3f}, a constant prediction by 0."
    )
