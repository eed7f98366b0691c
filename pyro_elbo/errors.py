"""The library's errors: a base class and its children, and the checks that arguments share."""

import math
import os
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST_SHOWN = 120  # characters of an argument in a message


class PyroElboError(ValueError):
    """Base class of the errors that the library raises."""


class ArgumentError(PyroElboError):
    """An argument has a value that the call cannot use."""


class SiteError(PyroElboError):
    """A site of the model or guide is missing, unexpected or of the wrong shape."""


class NonFiniteError(PyroElboError):
    """Data or a term of the bound hold NaN or infinity."""


class ProgramError(PyroElboError):
    """The model or the guide fails in its own code, or in torch or Pyro, on the arguments that it got."""


class NoSamplerError(SiteError, NotImplementedError):
    """A distribution of a program cannot be sampled, or lacks another method that is needed."""


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
    """Return the first line of an error's message, or its type where it has none; of a program, of what it raised."""
    while isinstance(error, ProgramError | NoSamplerError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
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


def check_part(what: str, value: Any) -> None:
    """Raise ArgumentError unless ``value`` is a number between 0 and 1."""
    if not _is_finite(value) or not 0 <= value <= 1:
        raise ArgumentError(f"{what} must be between 0 and 1, got {describe(value)}.")


def _is_finite(value: Any) -> bool:
    """Return whether ``value`` is a number that torch computes with, which fractions are not, and finite."""
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def check_count(what: str, value: Any, least: int = 1, cure: str = "") -> None:
    """Raise ArgumentError unless ``value`` is a whole number of at least ``least``; ``cure`` is a sentence for it."""
    if type(value) is int and value >= least:
        return  # schedules ask at every step, and a test for Integral takes longer than theirs
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ArgumentError(f"{what} must be a whole number >= {least}, got {describe(value)}. {cure}".rstrip())


def check_flag(what: str, value: Any, optional: bool = False) -> None:
    """Raise ArgumentError unless ``value`` is True or False (or None if ``optional``): ``"no"`` would pass for True.

    Example:
        >>> check_flag("overwrite", "no")
        Traceback (most recent call last):
        pyro_elbo.errors.ArgumentError: overwrite must be True or False, got 'no' (str).
    """
    if not (isinstance(value, bool | np.bool_) or optional and value is None):
        known = "True, False or None" if optional else "True or False"
        raise ArgumentError(f"{what} must be {known}, got {describe(value)}.")


def check_seed(seed: Any, optional: bool = True) -> None:
    """Raise ArgumentError unless ``seed`` is a whole number that torch and NumPy take, or None if ``optional``."""
    if optional and seed is None:
        return
    check_count("seed", seed, least=0)
    if seed >= 2**32:
        raise ArgumentError(f"seed must be below 2**32, got {seed}. Use seed % 2**32.")


def check_path(what: str, value: Any, kind: str = "the name of a file") -> Path:
    """Return a path; raise ArgumentError unless ``value`` names one.

    Example:
        >>> check_path("dir", 3, "the name of a folder")
        Traceback (most recent call last):
        pyro_elbo.errors.ArgumentError: dir must be the name of a folder, got 3.
    """
    name = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(name, str) or "\0" in name:
        raise ArgumentError(f"{what} must be {kind}, got {describe(value)}.")
    return Path(name)


def check_choice(what: str, value: Any, known: Iterable[str], cure: str = "") -> None:
    """Raise ArgumentError unless ``value`` is one of a few names; ``cure`` is a sentence for the message.

    Example:
        >>> check_choice("gradient", "std", ("auto", "stl"))
        Traceback (most recent call last):
        pyro_elbo.errors.ArgumentError: gradient must be 'auto' or 'stl', got 'std' (str). Did you mean 'stl'?
    """
    known = list(known)
    if isinstance(value, str) and value in known:
        return
    names = " or ".join(map(repr, known)) if len(known) < 3 else f"one of {', '.join(map(repr, known))}"
    near = get_close_matches(value, known, n=1) if isinstance(value, str) else []
    cure = f"Did you mean {near[0]!r}? {cure}" if near else cure
    raise ArgumentError(f"{what} must be {names}, got {describe(value)}. {cure}".rstrip())


def check_name(what: str, value: Any, kind: str = "the name of a site") -> None:
    """Raise ArgumentError unless ``value`` is a string."""
    if not isinstance(value, str):
        raise ArgumentError(f"{what} must be {kind}, got {describe(value)}.")


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
    text = " ".join(repr(value).split())
    if len(text) > MOST_SHOWN:
        shape = getattr(value, "shape", None)
        text = f"{text[:MOST_SHOWN]}..." if shape is None else f"an array of shape {tuple(shape)}"
    return f"{text} ({type(value).__name__})"
