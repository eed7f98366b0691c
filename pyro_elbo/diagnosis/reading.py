"""A training history as it was given, checked and put in order: both splits, epochs that rise, figures that belong."""

from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_elbo.errors import ArgumentError, describe

if TYPE_CHECKING:
    import xarray

BY_SPLIT = ("epoch", "split")
TOTALS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("elbo", "loss", "distortion", "rate"), BY_SPLIT),
    "kl": (*BY_SPLIT, "latent"),
    "beta": ("epoch", "latent"),
}
"""The dimensions of the figures that every history has."""
PROBED: dict[str, tuple[str, ...]] = {
    "kl_per_dim": (*BY_SPLIT, "unit"),
    "active_units": (*BY_SPLIT, "latent"),
    "information": (*BY_SPLIT, "latent", "side"),
    **dict.fromkeys(("own_distortion", "swapped_distortion"), BY_SPLIT),
    **dict.fromkeys(("gradient_norm", "gradient_noise"), ("epoch",)),
}
"""The dimensions of the figures that probes add."""
TOGETHER = (
    ("elbo", "loss", "distortion", "rate"),
    ("own_distortion", "swapped_distortion"),
    ("gradient_norm", "gradient_noise"),
)
"""Figures that tell something together only."""
LABELED = {"epoch", "split", "latent"}
BOTH = ["train", "valid"]


def read_history(call: str, history: Any) -> "xarray.Dataset":
    """Return the history of a fit over both splits, NaN where one is missing, in the order of its epochs.

    Figures that mean something together only, such as the distortion of rows under their own latents and under those
    of others, are NaN where one of them is unknown, and left out where the history lacks one.

    Args:
        call: what reads it, for errors.
        history: the result of a fit, or its history, or some of its epochs.

    Raises:
        ArgumentError: it is no history, or one without epochs, labels, the training split or numbers.
    """
    import xarray

    found = history if isinstance(history, xarray.Dataset) else getattr(history, "history", history)
    if not isinstance(found, xarray.Dataset):
        raise ArgumentError(
            f"{call}: history must be a history over epoch, split and latent, got {describe(found)}. Give the result "
            "of pe.fit, or its history."
        )
    _check_parts(call, found)
    _check_labels(call, found)
    kept = [name for name in (*TOTALS, *PROBED) if _is_whole(found, name)]
    for name in kept:
        _check_figure(call, name, found[name])
    ordered = found[kept].assign_attrs(found.attrs).sortby("epoch").reindex(split=BOTH)
    for names in TOGETHER:
        known = [np.isfinite(ordered[name].astype(float)) for name in names if name in kept]
        for name in set(names) & set(kept):
            ordered[name] = ordered[name].where(np.logical_and.reduce(known))
    return ordered.transpose("epoch", "split", "latent", ...)


def _check_parts(call: str, history: "xarray.Dataset") -> None:
    """Raise ArgumentError for a history that lacks a dimension, a figure, or all epochs."""
    lacking = sorted(LABELED - set(history.dims)) or sorted(set(TOTALS) - set(history.data_vars))
    if lacking:
        raise ArgumentError(
            f"{call}: expected a history over epoch, split and latent with {', '.join(TOTALS)}, got one without "
            f"{', '.join(lacking)}. Give the result of pe.fit, or its history; choose a part of it by a list, as in "
            'history.sel(split=["train"]).'
        )
    if not history.sizes["epoch"]:
        raise ArgumentError(f"{call}: the history has no epochs. Give the history of a fit, or some of its epochs.")


def _check_labels(call: str, history: "xarray.Dataset") -> None:
    """Raise ArgumentError unless epochs, splits and latents have labels, each one of its own."""
    for dim in sorted(LABELED):
        if dim not in history.indexes or not history.indexes[dim].is_unique:
            what = "twice" if dim in history.indexes else "not at all"
            raise ArgumentError(f"{call}: the history labels some {dim} {what}. Give the history as pe.fit returns it.")
    if history.epoch.dtype.kind not in "iuf":
        raise ArgumentError(f"{call}: the epochs of a history are numbers, got {describe(history.epoch.values)}.")
    splits = history.split.values.tolist()
    if "train" not in splits or not set(splits) <= set(BOTH):
        raise ArgumentError(
            f"{call}: the splits of a history are 'train', from which training is judged, and 'valid' if there is "
            f"validation, got {splits}. Give both, or 'train' alone."
        )


def _is_whole(history: "xarray.Dataset", name: str) -> bool:
    """Return whether the history holds a figure, and what belongs to it."""
    labels = {"kl_per_dim": {"unit", "unit_latent"}, "information": {"side"}}.get(name, set())
    together = next((names for names in TOGETHER if name in names), (name,))
    return set(together) <= set(history.data_vars) and labels <= set(history.coords)


def _check_figure(call: str, name: str, figure: "xarray.DataArray") -> None:
    """Raise ArgumentError for a figure over other dimensions, or one that holds no numbers."""
    dims = (TOTALS | PROBED)[name]
    if set(figure.dims) != set(dims):
        raise ArgumentError(f"{call}: expected '{name}' of the history over {dims}, got {figure.dims}.")
    if figure.dtype.kind not in "iuf":
        raise ArgumentError(f"{call}: expected numbers in '{name}' of the history, got {describe(figure.values)}.")
