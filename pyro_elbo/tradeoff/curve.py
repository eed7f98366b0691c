r"""The curve of rate and distortion: points of several fits, and their lower convex hull.

.. math:: \min_q D + \beta R \quad\Rightarrow\quad \frac{dD}{dR} = -\beta

Every encoder and decoder is a point above the curve D(R) of the model class; where β is the weight of the KL, the line
of slope -β through the point touches the curve.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_elbo.display import count_noun, html_table
from pyro_elbo.errors import ArgumentError, check_count, check_number, check_seed, describe
from pyro_elbo.tradeoff.plot import plot_curve
from pyro_elbo.tradeoff.points import Point, measure
from pyro_elbo.tradeoff.sweep import to_dataset
from pyro_elbo.training import FitResult

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

_CLEAR = 3.0  # standard errors
_HEADER = ("beta", "rate", "± se", "distortion", "± se", "elbo", "hull")


@dataclass(frozen=True, repr=False, eq=False)
class RateDistortion:
    """The result of :func:`rate_distortion`: print it, plot it, take its hull.

    Attributes:
        points: Dataset over ``beta``: ``rate``, ``distortion``, ``elbo``, standard errors ``..._se``; nats a datum.
        entropy: the entropy of the data in nats per datum, if it is stated: D + R >= H, and the printed table says
            which points contradict that.
    """

    points: "xarray.Dataset"
    entropy: float | None = None

    @cached_property
    def hull(self) -> tuple[int, ...]:
        """Positions of the points on the lower convex hull, from the lowest rate to the lowest distortion."""
        return lower_hull(self.points.rate.values, self.points.distortion.values)

    @property
    def slopes(self) -> np.ndarray:
        """-dD/dR between neighbors on the hull: the β at which one would change from the one to the other."""
        at = self.points.isel(beta=list(self.hull))
        return -np.diff(at.distortion.values) / np.diff(at.rate.values)

    def to_dataset(self) -> "xarray.Dataset":
        """Return the points with ``on_hull``, and ``entropy`` as an attribute."""
        on_hull = np.isin(np.arange(self.points.sizes["beta"]), self.hull)
        data = self.points.assign(on_hull=("beta", on_hull))
        return data if self.entropy is None else data.assign_attrs(entropy=self.entropy)

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Plot distortion over rate with two standard errors, the hull, the line of slope -β, and the entropy."""
        return plot_curve(self.points, self.hull, self.entropy, axes)

    @property
    def _lines(self) -> list[tuple[str, ...]]:
        names = ("rate", "rate_se", "distortion", "distortion_se", "elbo")
        columns = zip(*(self.points[n].values for n in ("beta", *names)), strict=True)
        marks = ["yes" if i in self.hull else "" for i in range(self.points.sizes["beta"])]
        return [
            (f"{beta:g}", *(f"{x:.4f}" for x in figures), mark)
            for (beta, *figures), mark in zip(columns, marks, strict=True)
        ]

    @property
    def _title(self) -> str:
        stated = "" if self.entropy is None else f"; entropy {self.entropy:g}"
        return f"Rate and distortion of {count_noun(self.points.sizes['beta'], 'fit')} in nats per datum{stated}"

    def __repr__(self) -> str:
        """A line for each β: rate and distortion with their standard errors, the bound, whether it is on the hull."""
        rows = [
            f"  {a:>8} {b:>10} {c:>8} {d:>11} {e:>8} {f:>10}  {g}" for a, b, c, d, e, f, g in (_HEADER, *self._lines)
        ]
        notes = [line for note in self._notes for line in wrap(note, 98, initial_indent="  ", subsequent_indent="  ")]
        return "\n".join([self._title, *(row.rstrip() for row in rows), *notes])

    def _repr_html_(self) -> str:
        return html_table(self._title, _HEADER, self._lines, self._notes)

    @property
    def below_entropy(self) -> tuple[int, ...]:
        """Positions of the points whose D + R lies more than three standard errors below the stated entropy."""
        if self.entropy is None:
            return ()
        missing = self.entropy + self.points.elbo.values - _CLEAR * self.points.elbo_se.values
        return tuple(np.flatnonzero(missing > 0).tolist())

    @property
    def _notes(self) -> list[str]:
        below = self.points.isel(beta=list(self.below_entropy))
        if self.entropy is None or not below.sizes["beta"]:
            return []
        names = ", ".join(f"{beta:g}" for beta in dict.fromkeys(below.beta.values))
        return [
            f"D + R < H at β = {names}, by up to {self.entropy + below.elbo.values.min():.4g} nats: no code is shorter "
            "than the entropy, so that either the entropy is not that of these data, or these fits know their rows by "
            "heart. Measure them on new rows (result.terms(x_test))."
        ]


def rate_distortion(
    results: "Mapping[float, Any] | Sequence[FitResult] | xarray.Dataset",
    *,
    entropy: float | None = None,
    num_samples: int = 10,
    seed: int = 0,
) -> RateDistortion:
    r"""Put fits at several β into the plane of rate and distortion.

    .. math:: R = E_x KL(q(z \mid x) \,\|\, p(z)), \qquad D = -E_x E_q \log p(x \mid z), \qquad H \le R + D

    Args:
        results: ``FitResult`` or ``Terms`` by their β, a list of fits whose objectives have a single β (several may
            have the same one), or the Dataset of :func:`sweep`. A ``FitResult`` is measured on its training data; for
            others, give ``result.terms(x)``.
        entropy: the entropy H of the data, if it is known: nats per datum. Points below D + R = H are said to be.
        num_samples: evaluations of the terms of a ``FitResult``, whose average is the point.
        seed: of these evaluations.

    Returns:
        Points with standard errors over rows, their lower convex hull, a figure; see :class:`RateDistortion`. The
        standard error is that of a mean over rows like these; the share of latents that all rows share has none.

    Raises:
        ArgumentError: no results, results without β, or a prior that is improper, like the log-uniform one of
            variational dropout: its rate has an arbitrary constant. (Terms do not tell; keep such terms out.)
        GuideError: a guide is a point estimate in some latent.
        SiteError, DataError: no plate of data, or a single row.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, pyro_elbo as pe
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> x = torch.linspace(-2.0, 2.0, 50)
        >>> terms = {beta: pe.TraceBeta_ELBO(beta=beta).terms(model, guide, x) for beta in (0.5, 2.0)}
        >>> pe.rate_distortion(terms).points.sizes["beta"]
        2

    References:
        Alemi, Poole, Fischer, Dillon, Saurous, Murphy (2018), Fixing a broken ELBO, arXiv:1711.00464.
    """
    if entropy is not None:
        check_number("entropy", entropy, -np.inf)
    check_count("num_samples", num_samples)
    check_seed(seed, optional=False)
    if hasattr(results, "data_vars"):
        return RateDistortion(_checked_points(results), entropy)
    by_beta = _by_beta(results)
    points = [measure(fitted, num_samples, seed, f"results[{beta:g}]") for beta, fitted in by_beta]
    return RateDistortion(to_dataset([beta for beta, _ in by_beta], points), entropy)


def _by_beta(results: Any) -> list[tuple[float, Any]]:
    """Return fits beside their β, of which several may have the same one."""
    if isinstance(results, FitResult):
        results = [results]
    if not isinstance(results, Mapping):
        if not isinstance(results, Sequence) or not all(isinstance(r, FitResult) for r in results):
            raise ArgumentError(f"results: expected fits, or {{beta: fit}}, got {describe(results)}.")
        found = [(_beta_of(result), result) for result in results]
    else:
        found = list(results.items())
    for beta, _ in found:
        check_number("every beta of results", beta)
    if not found:
        raise ArgumentError("results: there are no fits. Give {beta: result}.")
    return [(float(beta), fitted) for beta, fitted in found]


def _beta_of(result: FitResult) -> float:
    beta = result.loss.settings["beta"]
    if not isinstance(beta, Real):
        raise ArgumentError(f"results: the objective {result.loss!r} has no single β. Give {{beta: result}}.")
    return float(beta)


def _checked_points(points: Any) -> Any:
    missing = {*Point._fields, "beta"} - set(map(str, points.variables))
    if missing or points.rate.dims != ("beta",):
        raise ArgumentError(f"results: the Dataset lacks {sorted(missing)} over beta. Give the one of pe.sweep.")
    return points


def lower_hull(rate: np.ndarray, distortion: np.ndarray) -> tuple[int, ...]:
    """Return the points on the decreasing part of the lower convex hull, from low to high rate.

    Example:
        >>> lower_hull(np.array([0.0, 1.0, 2.0, 3.0]), np.array([4.0, 3.5, 1.0, 2.0]))
        (0, 2)
    """
    hull: list[int] = []
    for i in np.lexsort((distortion, rate)).tolist():
        while len(hull) > 1 and _turns_up(rate, distortion, hull[-2], hull[-1], i):
            hull.pop()
        if not hull or distortion[i] < distortion[hull[-1]]:
            if hull and rate[i] == rate[hull[-1]]:
                hull.pop()
            hull.append(i)
    return tuple(hull)


def _turns_up(rate: np.ndarray, distortion: np.ndarray, a: int, b: int, c: int) -> bool:
    """Return whether b lies on or above the line from a to c."""
    ab, ac = (rate[b] - rate[a], distortion[b] - distortion[a]), (rate[c] - rate[a], distortion[c] - distortion[a])
    return bool(distortion[c] < distortion[b] and ab[0] * ac[1] - ab[1] * ac[0] <= 0)
