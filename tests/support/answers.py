"""The numbers of an answer, whatever holds them."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from numbers import Number
from typing import Any

import arviz
import numpy as np
import torch
import xarray

import pyro_elbo as pe

HISTORY = "training"  # the group of a history, NaN where there were no validation data


def numbers(answer: Any) -> Iterator[np.ndarray]:
    """Yield every array of numbers in an answer."""
    answer = _as_plain(answer)
    if isinstance(answer, Number | np.ndarray):
        if np.asarray(answer).dtype.kind in "fciu":
            yield np.asarray(answer)
    elif isinstance(answer, Mapping | list | tuple):
        for x in answer.values() if isinstance(answer, Mapping) else answer:
            yield from numbers(x)


def _as_plain(answer: Any) -> Any:
    """Return an answer as an array, or as a container of answers."""
    if isinstance(answer, torch.Tensor):
        return (answer.detach().double() if answer.is_floating_point() else answer.detach()).numpy()
    if isinstance(answer, xarray.DataArray):
        return answer.values
    if isinstance(answer, xarray.Dataset):
        return dict(answer.data_vars)
    if isinstance(answer, xarray.DataTree):
        return {name: x.to_dataset() for name, x in answer.children.items() if name != HISTORY}
    if isinstance(answer, getattr(arviz, "InferenceData", ())):
        return {name: answer[name] for name in answer.groups() if name != HISTORY}
    if isinstance(answer, pe.FitResult):
        return dict(answer.history[["elbo", "kl"]].sel(split="train").data_vars)
    if isinstance(answer, pe.Terms):
        return dict(answer.to_dataset().data_vars)
    if is_dataclass(answer) and not isinstance(answer, pe.Penalty | pe.Schedule):
        return [getattr(answer, field.name) for field in fields(answer)]
    return answer
