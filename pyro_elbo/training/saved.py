"""Objectives and reports as plain values, which a file can hold and give back without running code from it."""

from collections.abc import Mapping
from dataclasses import astuple, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_elbo import schedules
from pyro_elbo.information import MutualInformation, TotalCorrelation
from pyro_elbo.objectives import TraceBeta_ELBO, TraceIW_ELBO, TraceMI_ELBO, TraceTimestep_ELBO
from pyro_elbo.training.convergence import ConvergenceReport, Window
from pyro_elbo.training.data import RunArguments

if TYPE_CHECKING:
    import xarray

OBJECTIVES = {cls.__name__: cls for cls in (TraceBeta_ELBO, TraceIW_ELBO, TraceTimestep_ELBO)}
SCHEDULES = [x for x in vars(schedules).values() if isinstance(x, type) and issubclass(x, schedules.Schedule)]
VARIABLES = ("coords", "data_vars")
PARTS = {cls.__name__: cls for cls in (*SCHEDULES, MutualInformation, TotalCorrelation)}


def encode_loss(loss: TraceBeta_ELBO) -> dict[str, Any] | None:
    """Return an objective as plain values; None for one that holds functions or classes of the user.

    Example:
        >>> encode_loss(TraceBeta_ELBO(beta=4.0))["settings"]["beta"]
        4.0
    """
    kind = TraceBeta_ELBO if type(loss) is TraceMI_ELBO else type(loss)
    try:
        if OBJECTIVES.get(kind.__name__) is not kind:
            return None
        return {"class": kind.__name__, "settings": {n: _encode(x) for n, x in loss.settings.items()}}
    except TypeError:
        return None


def decode_loss(plain: Mapping[str, Any]) -> TraceBeta_ELBO:
    """Return the objective that :func:`encode_loss` described."""
    return OBJECTIVES[plain["class"]](**{name: _decode(x) for name, x in plain["settings"].items()})


def encode_history(history: "xarray.Dataset") -> dict[str, Any]:
    """Return a history as plain values, with its numbers as tensors: lists take a hundred times as long."""
    plain = history.to_dict("array")
    for variable in (x for kind in VARIABLES for x in plain[kind].values()):
        values = np.asarray(variable["data"])
        variable["data"] = torch.tensor(values) if values.dtype.kind in "biuf" else values.tolist()
    return plain


def encode_report(report: ConvergenceReport) -> dict[str, Any]:
    """Return a report as plain values."""
    return vars(report) | {"windows": [astuple(window) for window in report.windows]}


def decode_report(plain: Mapping[str, Any]) -> ConvergenceReport:
    """Return the report that :func:`encode_report` described."""
    return ConvergenceReport(**{**plain, "windows": tuple(Window(*window) for window in plain["windows"])})


class SavedResult(NamedTuple):
    """What a file of a result holds; ``loss`` is described by plain values, or None with ``loss_repr`` alone."""

    states: dict[str, dict[str, Any]]
    holds: Any
    loss: dict[str, Any] | None
    loss_repr: str
    history: "xarray.Dataset"
    best_epoch: int
    stopped_early: bool
    seed: int
    data: RunArguments | None
    convergence: ConvergenceReport | None


def decode_result(plain: Mapping[str, Any]) -> SavedResult:
    """Return what the plain values of a file stand for.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: they are not those of a result.
    """
    states = {_typed(name, str, "states"): _typed(state, dict, "states") for name, state in plain["states"].items()}
    history = _decode_history(plain["history"])
    if not {"epoch", "split", "latent"} <= set(history.dims) or "elbo" not in history:
        raise ValueError(f"the history has the dimensions {list(history.dims)}")
    report = plain.get("convergence")
    return SavedResult(
        states,
        {name: name for name in states}[plain["holds"]],
        None if plain["loss"] is None else _typed(plain["loss"], dict, "loss"),
        _typed(plain["loss_repr"], str, "loss_repr"),
        history,
        _typed(plain["best_epoch"], int, "best_epoch"),
        _typed(plain["stopped_early"], bool, "stopped_early"),
        _typed(plain["seed"], int, "seed"),
        None if plain["data"] is None else _decode_data(*plain["data"]),
        None if report is None else decode_report(report),
    )


def _decode_history(plain: Mapping[str, Any]) -> "xarray.Dataset":
    import xarray

    parts = {kind: {n: x | {"data": _as_array(x["data"])} for n, x in plain[kind].items()} for kind in VARIABLES}
    return xarray.Dataset.from_dict({**plain, **parts})


def _as_array(x: Any) -> Any:
    return x.detach().numpy() if isinstance(x, Tensor) else x


def _decode_data(args: Any, kwargs: Any, rows: Any, whole: Any) -> RunArguments:
    parts = zip((args, kwargs, rows, whole), (tuple, dict, int, bool), strict=True)
    found = RunArguments(*(_typed(x, kind, "data") for x, kind in parts))
    if not found.is_plain():
        raise TypeError("data: expected tensors, numbers and strings")
    return found


def _typed(x: Any, kind: type, what: str) -> Any:
    if not isinstance(x, kind) or isinstance(x, bool) != (kind is bool):
        raise TypeError(f"{what}: expected {kind.__name__}, got {type(x).__name__}")
    return x


def _encode(x: Any) -> Any:
    if x is None or isinstance(x, bool | int | float | str | Tensor):
        return x
    if isinstance(x, tuple | list):
        return tuple(_encode(part) for part in x)
    if isinstance(x, Mapping):
        return {"mapping": {name: _encode(part) for name, part in x.items()}}
    if PARTS.get(type(x).__name__) is not type(x):
        raise TypeError(type(x).__name__)
    return {"class": type(x).__name__, "settings": {f.name: _encode(getattr(x, f.name)) for f in fields(x)}}


def _decode(x: Any) -> Any:
    if isinstance(x, tuple | list):
        return tuple(_decode(part) for part in x)
    if not isinstance(x, dict):
        return x
    if "mapping" in x:
        return {name: _decode(part) for name, part in x["mapping"].items()}
    return PARTS[x["class"]](**{name: _decode(part) for name, part in x["settings"].items()})
