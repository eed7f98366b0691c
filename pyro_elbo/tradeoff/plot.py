"""The plane of rate and distortion. Needs the extra ``plot``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_elbo.display import check_axes

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

_POINT, _HULL, _SLOPE, _ENTROPY = "#1f5fa8", "#9aa5b1", "#d08c3f", "#5f6b78"


def plot_curve(points: "xarray.Dataset", hull: Sequence[int], entropy: float | None, axes: Any = None) -> "Axes":
    """Draw points with two standard errors, the hull, a short line of slope -β at each point, and D + R = H."""
    if axes is None:
        import matplotlib.pyplot as plt

        axes = plt.subplots(figsize=(5.5, 4.2), layout="constrained")[1]
    (axes,) = check_axes("plot", axes, 1)
    at = points.isel(beta=list(hull))
    axes.plot(at.rate, at.distortion, color=_HULL, lw=1.5, label="lower convex hull", zorder=1)
    reach = 0.06 * float(np.ptp(points.rate.values) or 1.0)
    tall = 0.1 * float(np.ptp(points.distortion.values) or 1.0)
    for beta, rate, distortion in zip(points.beta.values, points.rate.values, points.distortion.values, strict=True):
        step = min(reach, tall / beta) if beta > 0 else reach
        axes.plot([rate - step, rate + step], [distortion + beta * step, distortion - beta * step], color=_SLOPE, lw=1)
        axes.annotate(f"{beta:g}", (rate, distortion), (5, 5), textcoords="offset points", fontsize=8)
    axes.plot([], [], color=_SLOPE, lw=1, label="slope -β")
    errors = {"xerr": 2 * points.rate_se, "yerr": 2 * points.distortion_se}
    axes.errorbar(points.rate, points.distortion, **errors, fmt="o", ms=4, lw=1, color=_POINT, label="fits, named by β")
    if entropy is not None:
        ends = np.array([0.0, float(points.rate.max())])
        axes.plot(ends, entropy - ends, color=_ENTROPY, ls=":", label="D + R = H")
    axes.set(xlabel="rate (nats per datum)", ylabel="distortion (nats per datum)")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return axes
