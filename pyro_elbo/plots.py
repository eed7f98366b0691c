"""Matplotlib figures of training histories and audits. Needs the extra ``plot``."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pyro_elbo.diagnosis import Finding, diagnose, read_history
from pyro_elbo.display import check_axes
from pyro_elbo.errors import ArgumentError, check_number, describe
from pyro_elbo.representation import Audit, Estimate, Fairness, Readout

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

_COLORS = {"train": "#9aa5b1", "valid": "#1f5fa8"}
_CURVES = ("#1f5fa8", "#d08c3f", "#4f8f5b", "#b3452c", "#7a5ea8", "#5f6b78")
_REFERENCE: dict[str, Any] = {"color": "#5f6b78", "lw": 1.0, "ls": ":"}
_SICK = "#b3452c"
_MOST_TICKS = 8
# Positions of a label beside its point: offset in points, horizontal and vertical alignment.
_SIDES = (
    (6, 4, "left", "bottom"),
    (-6, 4, "right", "bottom"),
    (6, -4, "left", "top"),
    (-6, -4, "right", "top"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
)


def plot_history(history: "xarray.Dataset | Any", axes: "list[Axes] | None" = None) -> "list[Axes]":
    """Plot training curves: the bound with its two parts, and the KL of every latent site beside its weight.

    What :func:`diagnose` finds is named in the legends, those of single latents beside their KL; a vertical line marks
    the first epoch. Legends stand below the curves: a figure of your own needs room there (layout="constrained").

    Args:
        history: the result of :func:`fit`, or its ``history``, or some of its epochs.
        axes: two matplotlib axes to draw into; a new figure if omitted.

    Returns:
        The two axes.

    Raises:
        ArgumentError: ``history`` is none, has no epochs or lacks training, or ``axes`` are not two.
    """
    history = read_history("plot_history", history)
    if axes is None:
        import matplotlib.pyplot as plt

        axes = list(plt.subplots(1, 2, figsize=(10, 4), layout="constrained")[1])
    bound, kl = check_axes("plot_history", axes, 2)
    for split in history.split.values:
        curve = history.elbo.sel(split=split)
        if bool(curve.notnull().any()):
            _plot_epochs(bound, curve, color=_COLORS[str(split)], label=f"elbo, {split}")
    distortion = -history.distortion.sel(split="train")
    _plot_epochs(bound, distortion, color="#d08c3f", lw=1, ls=":", label="-distortion, train")
    bound.set(xlabel="epoch", ylabel="nats per datum", title="evidence lower bound (β = 1)")
    findings = [f for f in diagnose(history).findings if not f.is_harmless]
    _mark(bound, [f for f in findings if f.site is None])
    _legend_below(bound)
    for site in history.latent.values:
        _plot_epochs(kl, history.kl.sel(split="train", latent=site), label=f"KL of {site}")
    kl.set(xlabel="epoch", ylabel="nats per datum", title="rate, site by site")
    weight = kl.twinx()
    _plot_epochs(weight, history.beta.mean("latent"), color="#b3452c", lw=1, ls="--")
    weight.set(ylim=(0, None))
    weight.set_ylabel("β", color="#b3452c")
    _mark(kl, [f for f in findings if f.site is not None])
    _legend_below(kl)
    return axes


def _plot_epochs(axes: "Axes", curve: "xarray.DataArray", **style: Any) -> None:
    """Plot a curve over epochs; one that is known in a single epoch is a point."""
    single = int(curve.notnull().sum()) == 1
    axes.plot(curve.epoch, curve, marker="o" if single else None, **style)
    locator: Any = axes.xaxis.get_major_locator()
    locator.set_params(integer=True, min_n_ticks=1)


def _legend_below(axes: "Axes") -> None:
    """Put the legend where it covers no curve."""
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)


def _mark(axes: "Axes", findings: Sequence[Finding]) -> None:
    """Name findings in the legend of a figure over epochs, with a line where each begins."""
    for finding in findings:
        if finding.since is None:
            axes.plot([], [], " ", label=finding.title)
        else:
            axes.axvline(finding.since, color=_SICK, lw=1, ls=":", label=finding.title)


def plot_tradeoff(curves: Mapping[str, Mapping[float, Audit]], axes: "list[Axes] | None" = None) -> "list[Axes]":
    """Plot audits over the weight λ of a penalty, for one penalty or several.

    Four views: accuracy of the best fresh probe of s, and of y, over λ; differences of predictions of y between levels
    of s, over λ; and both accuracies against each other, one point per λ. Bands are 95 % intervals, dotted lines show a
    constant prediction. The axis of λ is logarithmic and includes 0.

    Args:
        curves: audits by weight, for each penalty's label: ``{"aggregate": {0.0: audit, ...}}``. All audits have the
            same s and y.
        axes: four matplotlib axes to draw into; a new figure if omitted.

    Returns:
        The four axes.

    Raises:
        ArgumentError: curves that are not audits by weight by label, a curve without audits, audits without a target y,
            or ``axes`` that are not four.

    Example:
        >>> import numpy as np
        >>> from pyro_elbo.representation.audit import audit
        >>> rng = np.random.default_rng(0)
        >>> s, y = rng.integers(0, 2, (2, 200))
        >>> z = rng.normal(size=(200, 2)) + np.stack([s, y], 1)
        >>> audits = {weight: audit(z / [1 + weight, 1], s, y, probes=["logistic"]) for weight in (0.0, 10.0)}
        >>> [axes.get_ylabel() for axes in plot_tradeoff({"aggregate": audits})][:2]
        ['accuracy', 'accuracy']
    """
    if not isinstance(curves, Mapping) or not all(map(_are_audits, curves.values())):
        raise ArgumentError(
            f"plot_tradeoff: curves must be {{label: {{weight: audit}}}}, got {describe(curves)}. Give audits."
        )
    lines = {label: _points(label, audits) for label, audits in curves.items()}
    if not lines:
        raise ArgumentError("plot_tradeoff: no curves. Give {label: {weight: audit}}.")
    if axes is None:
        import matplotlib.pyplot as plt

        axes = list(plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")[1].flat)
    forget, keep, gaps, both = check_axes("plot_tradeoff", axes, 4)
    _plot_accuracy(forget, {label: [(p.weight, p.s) for p in points] for label, points in lines.items()})
    _plot_accuracy(keep, {label: [(p.weight, p.y) for p in points] for label, points in lines.items()})
    _plot_gaps(gaps, lines)
    for over_weight in (forget, keep, gaps):
        _scale_weights(over_weight, sorted({p.weight for points in lines.values() for p in points}))
    _plot_accuracies(both, lines)
    return axes


def _are_audits(audits: Any) -> bool:
    return isinstance(audits, Mapping) and all(isinstance(audit, Audit) for audit in audits.values())


class _Point(NamedTuple):
    """An audit with a target, and the weight of its penalty."""

    weight: float
    s: Readout
    y: Readout
    fairness: Fairness


def _points(label: str, audits: Mapping[float, Audit]) -> list[_Point]:
    if not audits:
        raise ArgumentError(f"plot_tradeoff: curves: {label!r} has no audits. Give {{weight: audit}}.")
    points = []
    for weight in audits:
        check_number(f"every weight of curves[{label!r}]", weight)
    for weight in sorted(audits):
        audit = audits[weight]
        if audit.y is None or audit.fairness is None:
            raise ArgumentError(f"plot_tradeoff: the audit of {label!r} at {weight:g} has no target. Give y to audit.")
        points.append(_Point(float(weight), audit.s, audit.y, audit.fairness))
    return points


def _plot_band(
    axes: "Axes", weights: Sequence[float], estimates: Sequence[Estimate], color: str, label: str | None, ls: str = "-"
) -> None:
    axes.plot(weights, [e.value for e in estimates], color=color, ls=ls, marker="o", ms=4, label=label)
    axes.fill_between(weights, [e.low for e in estimates], [e.high for e in estimates], color=color, alpha=0.15, lw=0)


def _plot_accuracy(axes: "Axes", lines: Mapping[str, Sequence[tuple[float, Readout]]]) -> None:
    for i, (label, points) in enumerate(lines.items()):
        weights, readouts = [w for w, _ in points], [r for _, r in points]
        _plot_band(axes, weights, [r.best.accuracy for r in readouts], _CURVES[i % len(_CURVES)], label)
    readout = next(iter(lines.values()))[0][1]
    axes.axhline(readout.majority, label="majority", **_REFERENCE)
    axes.set(xlabel="weight λ", ylabel="accuracy", title=f"{readout.name} from z, best fresh probe")
    axes.legend(frameon=False)


def _plot_gaps(axes: "Axes", lines: Mapping[str, Sequence[_Point]]) -> None:
    from matplotlib.lines import Line2D

    for i, points in enumerate(lines.values()):
        weights, color = [p.weight for p in points], _CURVES[i % len(_CURVES)]
        _plot_band(axes, weights, [p.fairness.demographic_parity for p in points], color, None)
        _plot_band(axes, weights, [p.fairness.equalized_odds for p in points], color, None, "--")
    first = next(iter(lines.values()))[0]
    axes.axhline(first.fairness.label_parity.value, **_REFERENCE)
    black: dict[str, Any] = {"color": "black", "lw": 1.2}
    styles = {
        "demographic parity": Line2D([], [], **black),
        "equalized odds": Line2D([], [], ls="--", **black),
        "parity of the labels": Line2D([], [], **_REFERENCE),
    }
    axes.set(xlabel="weight λ", ylabel=f"difference between levels of {first.s.name}")
    axes.set_ylim(0.0, 1.3 * axes.get_ylim()[1])  # room for the legend above all lines
    axes.legend(list(styles.values()), list(styles), frameon=False, loc="upper right")
    axes.set_title(f"predictions of {first.y.name}")


def _scale_weights(axes: "Axes", weights: Sequence[float]) -> None:
    """Scale the axis logarithmically, and linearly up to the smallest positive weight so that it includes 0."""
    positive = [w for w in weights if w > 0]
    if positive and positive[-1] > positive[0]:
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
        # The scale continues below 0, where the default margin would take a third of the axis.
        axes.set_xlim((weights[0] or -0.2 * positive[0]) - 0.05 * positive[0], 1.25 * weights[-1])
    if len(weights) <= _MOST_TICKS:
        axes.set_xticks(weights)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def _plot_accuracies(axes: "Axes", lines: Mapping[str, Sequence[_Point]]) -> None:
    for i, (label, points) in enumerate(lines.items()):
        x, y = [p.s.best.accuracy for p in points], [p.y.best.accuracy for p in points]
        axes.errorbar(
            [e.value for e in x],
            [e.value for e in y],
            xerr=[[e.value - e.low for e in x], [e.high - e.value for e in x]],
            yerr=[[e.value - e.low for e in y], [e.high - e.value for e in y]],
            **{"color": _CURVES[i % len(_CURVES)], "marker": "o", "ms": 4, "elinewidth": 0.6, "label": label},
        )
    first = next(iter(lines.values()))[0]
    axes.axvline(first.s.majority, **_REFERENCE)
    axes.axhline(first.y.majority, **_REFERENCE)
    axes.set(
        xlabel=f"accuracy of {first.s.name}", ylabel=f"accuracy of {first.y.name}", title="trade-off, labeled by λ"
    )
    axes.margins(0.12)
    axes.legend(frameon=False)
    _label_points(axes, lines)


def _label_points(axes: "Axes", lines: Mapping[str, Sequence[_Point]]) -> None:
    """Write λ beside points; leave out labels without a free side."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # the layout fixes positions
    colored = [(_CURVES[i % len(_CURVES)], p) for i, points in enumerate(lines.values()) for p in points]
    places = [(p.s.best.accuracy.value, p.y.best.accuracy.value) for _, p in colored]
    taken = [Bbox([place - 3, place + 3]) for place in axes.transData.transform(places)]
    taken.append(axes.get_legend().get_window_extent())
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}
    for (color, point), place in zip(colored, places, strict=True):
        for dx, dy, horizontal, vertical in _SIDES:
            label = axes.annotate(
                f"{point.weight:g}", place, (dx, dy), color=color, ha=horizontal, va=vertical, **style
            )
            box = label.get_window_extent()
            if box.count_overlaps(taken) == 0:
                taken.append(box)
                break
            label.remove()
