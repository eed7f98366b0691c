"""The difference between the ECDF of positions and the uniform distribution, with a simultaneous band."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_elbo.display import check_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINE, _OUTSIDE, _BAND = "#1f5fa8", "#b3452c", "#9aa5b1"
_PER_ROW, _BANDS = 4, 20_000


def plot_ecdf(
    sites: Mapping[str, Sequence[np.ndarray]], false_alarm: float, axes: "list[Axes] | None" = None
) -> "list[Axes]":
    """Draw a panel for each site; lines that leave the band are red: see :meth:`Calibration.plot`."""
    panels = _panels(len(sites), axes)
    lines = sum(map(len, sites.values()))
    count = len(next(iter(sites.values()))[0])
    points, low, high = band(count, 1 - false_alarm / lines)
    for ax, (name, elements) in zip(panels, sites.items(), strict=True):
        ax.fill_between(points, low - points, high - points, color=_BAND, alpha=0.35, lw=0, step="mid")
        ax.axhline(0.0, color=_BAND, lw=0.8)
        for u in elements:
            ecdf = np.searchsorted(np.sort(u), points, side="right") / count
            inside = bool(((low <= ecdf) & (ecdf <= high)).all())
            ax.plot(points, ecdf - points, color=_LINE if inside else _OUTSIDE, lw=1.0)
        ax.set(title=name, xlim=(0, 1), xticks=(0, 0.5, 1), xlabel="position of the true value")
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ECDF less the diagonal")
    return panels


def band(count: int, probability: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return points, and the band that holds the whole ECDF of ``count`` uniform numbers with a probability."""
    from arviz_stats.ecdf_utils import ecdf_pit

    simulations = int(min(_BANDS, max(1000, 20 / (1 - probability))))
    rng = np.random.default_rng(0)
    points, _, low, high = ecdf_pit(np.zeros(count), probability, n_simulations=simulations, rng=rng)
    return points, low, high


def _panels(count: int, axes: Any) -> "list[Axes]":
    if axes is None:
        import matplotlib.pyplot as plt

        columns = min(count, _PER_ROW)
        rows = -(-count // columns)
        size = (2.6 * columns + 0.6, 2.3 * rows + 0.3)
        grid = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, layout="constrained", squeeze=False)
        panels = list(grid[1].flat)
        for unused in panels[count:]:
            unused.set_visible(False)
        return panels[:count]
    return check_axes("Calibration.plot", axes, count)
