"""The library's errors: a base class and its children, and the checks that arguments share."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

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


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def first_sentence(error: Exception) -> str:
    r"""Return the first line of an error's message as a sentence.

    Example:
        >>> first_sentence(ValueError("Expected a number, but found:\n[nan]"))
        'Expected a number, but found.'
    """
    line = first_line(error).rstrip(" :")
    line = line.removesuffix(", but found invalid values")
    return line if line.endswith((".", "!", "?")) else f"{line}."


def check_number(what: str, value: Any, least: float = 0.0) -> None:
    """Raise ArgumentError unless ``value`` is a finite number of at least ``least``.

    Example:
        >>> check_number("lr", "1e-3")
        Traceback (most recent call last):
        pyro_elbo.errors.ArgumentError: lr must be a finite number >= 0, got '1e-3' (str).
    """
    if not _is_finite(value) or value < least:
        bound = f" >= {least:g}" if least > -math.inf else ""
        raise ArgumentError(f"{what} must be a finite number{bound}, got {describe(value)}.")


def check_positive(what: str, value: Any, cure: str = "") -> None:
    """Raise ArgumentError unless ``value`` is a finite number above 0; ``cure`` is a sentence for the message.

    Example:
        >>> check_positive("accuracy", 0, "0.1 is a good choice.")
        Traceback (most recent call last):
        pyro_elbo.errors.ArgumentError: accuracy must be a finite number > 0, got 0. 0.1 is a good choice.
    """
    if not _is_finite(value) or value <= 0:
        raise ArgumentError(f"{what} must be a finite number > 0, got {describe(value)}. {cure}".rstrip())


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_count(what: str, value: Any, least: int = 1) -> None:
    """Raise ArgumentError unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ArgumentError(f"{what} must be a whole number >= {least}, got {describe(value)}.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names what is most like a misspelled name, or all that is known.

    Example:
        >>> did_you_mean("gradients", ["beta", "gradient"]), did_you_mean("x", ["beta", "gradient"])
        ('Did you mean gradient=?', 'Its options are beta, gradient.')
    """
    near = get_close_matches(name, known := list(known), n=1)
    return f"Did you mean {near[0]}=?" if near else f"Its options are {', '.join(known)}."


def describe(value: Any) -> str:
    """Return an argument's value as an error shows it: a number as it is, anything else with its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}; give it its arguments, {value.__name__}(...)"
    if isinstance(value, Real) and not isinstance(value, bool):
        return str(value)
    return f"{value!r} ({type(value).__name__})"
