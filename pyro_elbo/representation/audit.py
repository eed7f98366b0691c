"""Audit of a representation: fresh probes predict an attribute to forget and a target to keep.

An objective that makes a latent forget an attribute cannot judge itself: the encoder was trained to defeat its
adversary or bound. An audit fits new classifiers, judges them on held-out rows, and reports every figure with its
interval and beside the figure of a constant prediction.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_elbo.display import html_table
from pyro_elbo.errors import (
    ArgumentError,
    DataError,
    PyroElboError,
    check_choice,
    check_count,
    check_name,
    check_seed,
    count_nonfinite,
    describe,
)
from pyro_elbo.programs import as_array
from pyro_elbo.representation.fairness import Fairness, count_cells, describe_fairness, measure_fairness
from pyro_elbo.representation.probes import PROBES, Labels, ProbeRows, Readout, read_out

if TYPE_CHECKING:
    import xarray

_LEAST_ROWS = 4  # of a level: early stopping sets rows of every level aside, from what is left of the folds
_ROWS_PER_LEVEL = 20  # on average: the tenth that early stopping sets aside must hold one row per level


@dataclass(frozen=True, repr=False)
class Audit:
    """Predictions of fresh probes from a representation; print it for a verdict in plain words.

    Attributes:
        rows: number of rows that the probes are judged on.
        folds: number of folds of the cross-validation, 0 with a test split.
        s: readout of the sensitive attribute.
        y: readout of the target, None without one.
        fairness: fairness of the best probe's predictions of the target, None without one.
    """

    rows: int
    folds: int
    s: Readout
    y: Readout | None = None
    fairness: Fairness | None = None

    @property
    def readouts(self) -> tuple[Readout, ...]:
        """The readouts of the sensitive attribute, and of the target if there is one."""
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

    def _repr_html_(self) -> str:
        title, *figures = repr(self).splitlines()
        return html_table(title, (), [], [*figures, self.summary()])

    def summary(self) -> str:
        """Say in plain words how much of s is left and of y is kept, and how fair predictions are."""
        sentences = [_describe_leak(self.s)]
        if self.y is not None and self.fairness is not None:
            sentences += [_describe_target(self.y), describe_fairness(self.s, self.y, self.fairness)]
        sentences += [
            f"The {p.name} probe of {r.name} ran out of iterations and may read more."
            for r in self.readouts
            for p in r.probes
            if not p.converged
        ]
        caution = f"A probe gives a lower bound: failing to find {self.s.name} is no proof of its absence."
        return " ".join([*sentences, caution])

    def to_dataset(self) -> "xarray.Dataset":
        """Return all figures over ``target`` × ``probe`` × ``part`` (value, low, high), information in nats."""
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
    r"""Measure by fresh probes how well a representation predicts a sensitive attribute, and a target.

    Every probe q is fitted on some rows and judged on others, by accuracy and by cross-entropy. Since
    :math:`I(z; s) = H(s) - H(s \mid z) \ge H(s) + E \log q(s \mid z)`, the latter gives a lower bound on the
    information in nats: the part that this family of probes can use.

    Accuracies have Wilson intervals, cross-entropies normal ones; both treat the fitted probes as fixed, out-of-fold
    predictions as independent, and the majority's share as known. Differences between groups have bootstrap intervals
    over judged rows: the half-width is the 95 % quantile of the largest difference between the errors of two groups'
    rates. (A difference is never negative, so percentiles of its bootstrap could not reach 0.)

    Args:
        z: draws or means of the latent, N × D, array or tensor.
        s: the sensitive attribute, N discrete labels; or N × k, whose joint levels are then predicted.
        y: discrete target of any number of levels, shaped like s.
        test: ``(z, s)`` or ``(z, s, y)`` of a test split, in place of cross-validation: probes are fitted on all rows
            of z and judged on these.
        probes: which of ``"logistic"``, ``"gradient boosting"`` and ``"mlp"``, all on standardized z.
        folds: number of folds of the cross-validation, shuffled and stratified.
        seed: seed of folds, probes and bootstrap. The same seed gives the same audit.
        name_s, name_y: names of s and y in the result.

    Returns:
        The figures; printing them gives a verdict in plain words.

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
    _check_options(probes, folds, seed, (name_s, name_y))
    given = (z, s) if y is None else (z, s, y)
    rows = _gather(given, test, folds, (name_s, name_y))
    found, _ = read_out(name_s, rows.labels[0], rows, probes, seed)
    judged = len(rows.z) - rows.start
    if y is None:
        return Audit(judged, rows.folds, found)
    kept, predicted = read_out(name_y, rows.labels[1], rows, probes, seed)
    groups, truth = (labels.codes[rows.start :] for labels in rows.labels)
    return Audit(judged, rows.folds, found, kept, measure_fairness(groups, truth, predicted, seed))


# --- inputs


def _check_options(probes: Sequence[str], folds: int, seed: int, names: tuple[str, str]) -> None:
    if missing := [name for name in ("sklearn", "fairlearn") if find_spec(name) is None]:
        raise PyroElboError(f"audit needs {' and '.join(missing)}: pip install 'pyro-elbo[probe]'.")
    if not isinstance(probes, Sequence) or isinstance(probes, str) or not probes:
        raise ArgumentError(f"probes must be a list of some of {PROBES}, got {describe(probes)}.")
    for probe in probes:
        check_choice("every one of probes", probe, PROBES)
    check_count("folds", folds, least=2)
    check_seed(seed, optional=False)
    for what, name in zip(("name_s", "name_y"), names, strict=True):
        check_name(what, name, "a string")
    if names[0] == names[1]:
        raise ArgumentError(f"s and y are both named {names[0]!r}. Give name_s and name_y that differ.")


def _gather(given: Sequence[Any], test: Sequence[Any] | None, folds: int, names: tuple[str, str]) -> ProbeRows:
    parts = [_check_rows(given, "", names)]
    if test is not None:
        if not isinstance(test, Sequence) or isinstance(test, str):
            raise ArgumentError(f"test must be (z, s) or (z, s, y), got {describe(test)}.")
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
    if test is not None:
        _check_apart(*parts)
    return ProbeRows(z, labels, start, folds)


def _check_apart(fitted: Sequence[np.ndarray], judged: Sequence[np.ndarray]) -> None:
    """Raise DataError where all judged rows are among the fitted ones, unless z takes few values anyway."""
    known = {row.tobytes() for row in fitted[0]}
    if len(known) > len(fitted[0]) / 2 and all(row.tobytes() in known for row in judged[0]):
        raise DataError(
            "test: all of its rows are among those that the probes are fitted on: a probe that remembers them would "
            "look right. Give rows that are held out, or leave test out for cross-validation."
        )


def _check_rows(given: Sequence[Any], where: str, names: tuple[str, str]) -> list[np.ndarray]:
    try:
        z = _array(given[0])
        z = z.astype(np.float64, casting="unsafe" if z.dtype.kind in "biufO" else "safe")
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{where}z must be an array of real numbers, N × D: {error}.") from error
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
    return as_array(x.double() if x.is_floating_point() else x)


def _discrete(x: Any, name: str) -> np.ndarray:
    """Check that labels are discrete and complete; whole numbers in floats are labels too."""
    import pandas as pd

    try:
        values = _array(x)
    except ValueError as error:
        raise ArgumentError(f"{name} must be N labels, or N × k of several attributes: {error}.") from error
    if values.dtype.kind == "c":
        raise ArgumentError(f"{name} must hold labels, got complex numbers. Number its levels.")
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
    """Number the levels; check that all can be fitted, and that more than one is judged."""
    rows, codes = np.unique(values, axis=0, return_inverse=True)
    labels = Labels(codes.reshape(-1), tuple(" | ".join(map(str, np.atleast_1d(row))) for row in rows))
    for part, where in ((labels.codes[: start or None], ""), (labels.codes[start:], "test: ")):
        if len(present := np.unique(part)) < 2:
            raise DataError(
                f"{where}{name} has one level only, {labels.levels[present[0]]!r}: there is nothing to predict. Give "
                "rows of at least two."
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
    """Raise DataError where a level of s lacks a level of y: equalized odds compare rates within levels of y."""
    s, y = labels
    cells = count_cells(s.codes[start:], y.codes[start:], y.codes[start:]).sum(-1)
    empty = (cells == 0) & (cells.sum(1, keepdims=True) > 0) & (cells.sum(0, keepdims=True) > 0)
    if empty.any():
        i, j = (int(k) for k in np.argwhere(empty)[0])
        raise DataError(
            f"no judged row has {names[0]} = {s.levels[i]!r} and {names[1]} = {y.levels[j]!r}: equalized odds are not "
            "defined. Merge levels, or leave y out and give it to an audit of its own."
        )


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
            f"{constant}. But its probabilities still carry at least {s.information} nats on {s.name}: it is not "
            "forgotten."
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
