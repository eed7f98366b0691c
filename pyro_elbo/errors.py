"""The library's errors: a base class and its children."""

import torch
from torch import Tensor


class PyroElboError(ValueError):
    """Base class of the errors that the library raises."""


class ArgumentError(PyroElboError):
    """An argument has a value that the call cannot use."""


class SiteError(PyroElboError):
    """A site of the model or guide is missing, unexpected or of the wrong shape."""


class NonFiniteError(PyroElboError):
    """Data or a term of the bound hold NaN or infinity."""


class GuideError(PyroElboError):
    """A guide is not initialized yet, has no density, or does not suit the model."""


class DataError(PyroElboError):
    """Training or validation data cannot be used."""


class CheckpointError(PyroElboError):
    """A checkpoint or a results folder cannot be read or written."""


class CompileError(PyroElboError):
    """A program, an optimizer or an argument cannot become part of one compiled graph."""


class WeightsError(PyroElboError):
    """Importance weights carry no information, or too little."""


def count_nonfinite(x: Tensor) -> str:
    """Describe the entries of ``x`` that are not finite.

    Example:
        >>> count_nonfinite(torch.tensor([1.0, float("nan"), float("inf")]))
        '2 of 3 values are not finite (1 nan, 1 inf); the first is at index (1,)'
    """
    bad = ~torch.isfinite(x)
    nan = int(torch.isnan(x).sum())
    first = tuple(bad.nonzero()[0].tolist()) if x.dim() else ()
    kinds = f"{nan} nan, {int(bad.sum()) - nan} inf"
    return f"{int(bad.sum())} of {x.numel()} values are not finite ({kinds}); the first is at index {first}"
