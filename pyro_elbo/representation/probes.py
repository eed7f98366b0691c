"""Probes: classifiers that predict an attribute from a representation, scored on held-out rows."""

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

PROBES = ("logistic", "gradient boosting", "mlp")
CONFIDENCE = 0.95
_SIGMAS = 1.959963984540054  # the normal quantile of CONFIDENCE


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True)
class ProbeScore:
    """The scores of one probe on held-out rows.

    Attributes:
        name: name of the probe.
        accuracy: share of correct predictions; Wilson interval.
        cross_entropy: mean of -log q(attribute | z), nats per row; normal interval.
        information: H(attribute) - cross_entropy, nats: a lower bound on I(z; attribute), which a bad probe can make
            negative; normal interval.
        converged: False if a fit ran out of iterations; a longer one may score higher.
    """

    name: str
    accuracy: Estimate
    cross_entropy: Estimate
    information: Estimate
    converged: bool


@dataclass(frozen=True)
class Readout:
    """The scores of all probes for one attribute.

    Attributes:
        name, levels: of the attribute.
        majority_level: the most frequent level among the judged rows.
        majority: its share, the accuracy of the best constant answer.
        entropy: H(attribute) of the judged rows, nats.
        probes: one score per probe.
    """

    name: str
    levels: tuple[str, ...]
    majority_level: str
    majority: float
    entropy: float
    probes: tuple[ProbeScore, ...]

    @property
    def best(self) -> ProbeScore:
        """The most accurate probe. Its interval does not account for the choice among probes."""
        return max(self.probes, key=lambda probe: probe.accuracy.value)

    @property
    def information(self) -> Estimate:
        """The largest of the probes' lower bounds on I(z; attribute), nats."""
        return max((probe.information for probe in self.probes), key=lambda bound: bound.value)

    @property
    def is_found(self) -> bool:
        """Return whether the best probe's interval lies above the accuracy of a constant answer."""
        return self.best.accuracy.low > self.majority

    def __str__(self) -> str:
        best = self.best
        others = ", ".join(f"{p.name} {p.accuracy.value:.3f}" for p in self.probes if p is not best)
        return (
            f"{self.name}: best fresh probe ({best.name}) {best.accuracy}, majority {self.majority:.3f}"
            + (f" (others: {others})" if others else "")
            + f"; I(z; {self.name}) ≥ {self.information} of {self.entropy:.3f} nats"
        )


class Labels(NamedTuple):
    """A discrete attribute: the level of each row by number, and the names of the levels."""

    codes: Int[np.ndarray, " row"]
    levels: tuple[str, ...]


class ProbeRows(NamedTuple):
    """Rows to fit on and to judge.

    Attributes:
        z: the representation.
        labels: its attributes.
        start: the first row of the test split; 0 for cross-validation.
        folds: number of folds of cross-validation; 0 for a test split.
    """

    z: Float[np.ndarray, "row dim"]
    labels: tuple[Labels, ...]
    start: int
    folds: int

    def split(self, codes: Int[np.ndarray, " row"], seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return pairs of rows to fit on and rows to judge."""
        from sklearn.model_selection import StratifiedKFold

        if self.start:
            rows = np.arange(len(codes))
            return [(rows[: self.start], rows[self.start :])]
        return list(StratifiedKFold(self.folds, shuffle=True, random_state=seed).split(codes, codes))


def read_out(
    name: str, labels: Labels, rows: ProbeRows, probes: Sequence[str], seed: int
) -> tuple[Readout, Int[np.ndarray, " judged"]]:
    """Fit and judge all probes; also return the best probe's predictions for the judged rows."""
    codes = labels.codes[rows.start :]
    splits = rows.split(labels.codes, seed)
    fits = [_predict(probe, rows.z, labels, splits, seed) for probe in probes]
    scores = tuple(
        _score(probe, chances[rows.start :], codes, converged)
        for probe, (chances, converged) in zip(probes, fits, strict=True)
    )
    shares = np.bincount(codes, minlength=len(labels.levels)) / len(codes)
    most = int(shares.argmax())
    entropy = -sum(p * math.log(p) for p in shares.tolist() if p)
    readout = Readout(name, labels.levels, labels.levels[most], float(shares[most]), entropy, scores)
    return readout, fits[scores.index(readout.best)][0][rows.start :].argmax(1)


def _make_probe(name: str, seed: int) -> Any:
    """Build a classifier; those that could overfit stop early."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression

    stopping: Any = {"early_stopping": True, "max_iter": 500}
    probes: dict[str, Any] = {
        "logistic": LogisticRegression(max_iter=1000),
        "gradient boosting": HistGradientBoostingClassifier(**stopping, random_state=seed),
        "mlp": _MLP(seed),
    }
    return probes[name]


class _MLP:
    """Scikit-learn's MLP with the weights of the epoch of least cross-entropy on a tenth of the rows.

    Scikit-learn's early stopping watches accuracy. Where a level is too rare to be predicted, or as soon as every
    prediction is right, it stops at once, and the probabilities carry far less information than they could.
    """

    max_iter = 200
    _PATIENCE = 10
    _BATCH = 128

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fit(self, z: np.ndarray, codes: np.ndarray) -> None:
        from sklearn.metrics import log_loss
        from sklearn.model_selection import train_test_split
        from sklearn.neural_network import MLPClassifier

        parts: Any = train_test_split(z, codes, test_size=0.1, stratify=codes, random_state=self.seed)
        z, z_valid, codes, valid = parts
        levels = np.unique(codes)
        batch: Any = {"batch_size": min(self._BATCH, len(z))}
        self.model = MLPClassifier((64, 64), learning_rate_init=2e-3, random_state=self.seed, **batch)
        least, self.n_iter_, since = math.inf, 0, 0
        weights: Any = None
        while since < self._PATIENCE and self.n_iter_ < self.max_iter:
            self.model.partial_fit(z, codes, classes=levels)
            loss = log_loss(valid, self.model.predict_proba(z_valid), labels=levels)
            self.n_iter_, since = self.n_iter_ + 1, since + 1
            if loss < least - 1e-4:
                least, since = loss, 0
                weights = copy.deepcopy((self.model.coefs_, self.model.intercepts_))
        self.model.coefs_, self.model.intercepts_ = weights

    def predict_proba(self, z: np.ndarray) -> Any:
        return self.model.predict_proba(z)


def _predict(
    probe: str,
    z: Float[np.ndarray, "row dim"],
    labels: Labels,
    splits: Sequence[tuple[np.ndarray, np.ndarray]],
    seed: int,
) -> tuple[Float[np.ndarray, "row level"], bool]:
    """Return the probabilities of every level, NaN in rows that are only fitted on, and whether all fits converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    chances = np.full((len(z), len(labels.levels)), np.nan)
    converged = True
    for fitted, judged in splits:
        scaler, model = StandardScaler().fit(z[fitted]), _make_probe(probe, seed)
        # Fits are small: threads cost more than they save and change the order of sums.
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)  # the result records it
            model.fit(scaler.transform(z[fitted]), labels.codes[fitted])
            chances[judged] = model.predict_proba(scaler.transform(z[judged]))
        converged &= bool(np.max(model.n_iter_) < model.max_iter)
    chances = chances.clip(np.finfo(np.float64).eps)  # a certain and wrong prediction has infinite cross-entropy
    return chances / chances.sum(1, keepdims=True), converged


def _score(
    name: str, chances: Float[np.ndarray, "judged level"], codes: Int[np.ndarray, " judged"], converged: bool
) -> ProbeScore:
    log_q = np.log(chances[np.arange(len(codes)), codes])
    shares = np.bincount(codes, minlength=chances.shape[1]) / len(codes)
    hits = int((chances.argmax(1) == codes).sum())
    gain = log_q - np.log(shares[codes])  # its mean is H - cross-entropy
    return ProbeScore(name, estimate_share(hits, len(codes)), estimate_mean(-log_q), estimate_mean(gain), converged)


def estimate_share(hits: int, rows: int) -> Estimate:
    """Return a share with its Wilson interval.

    Example:
        >>> f"{estimate_share(80, 100):.2f}"
        '0.80 [0.71, 0.87]'
    """
    from scipy.stats import binomtest

    interval = binomtest(hits, rows).proportion_ci(CONFIDENCE, "wilson")
    return Estimate(hits / rows, float(interval.low), float(interval.high))


def estimate_mean(values: Float[np.ndarray, " row"]) -> Estimate:
    """Return a mean with its normal interval."""
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    return Estimate(mean, mean - _SIGMAS * error, mean + _SIGMAS * error)
