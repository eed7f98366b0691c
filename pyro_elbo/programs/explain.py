"""Translate failures of Pyro and torch into the library's errors, with the site or line and the cure."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from traceback import extract_tb
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_elbo.assumptions import is_capturing
from pyro_elbo.errors import DataError, NonFiniteError, PyroElboError, SiteError, count_nonfinite

PARTICLE_PLATE = "num_particles_vectorized"
"""The name of the plate of vectorized particles."""


@contextmanager
def explain_failure(args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Raise the library's error where the program inside the block fails on NaN in its data or on plates.

    Raises:
        NonFiniteError: the arguments hold NaN, or a parameter has diverged.
        SiteError: a plate is empty or does not fit.
    """
    try:
        yield
    except PyroElboError:
        raise
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        if is_capturing():
            raise
        reason = str(error).splitlines()[0]
        shapes_differ = re.search("(dimension|size)", reason) and "invalid values" not in str(error)
        arguments = {} if shapes_differ else {**dict(enumerate(args)), **kwargs}  # NaN may be padding
        for name, x in arguments.items():
            if isinstance(x, Tensor) and x.is_floating_point() and not torch.isfinite(x).all():
                raise NonFiniteError(
                    f"Argument {name} of the program: {count_nonfinite(x)}, and the program failed on it: {reason} "
                    "Remove them, or fill them in before they reach an encoder and mask the observed site."
                ) from error
        raise _explained(error, reason) from error


def _explained(error: Exception, reason: str) -> Exception:
    """Return the library's error for one of Pyro or torch, or that error itself."""
    if isinstance(error, ZeroDivisionError):
        return SiteError(f"Plate {_failed_plate(error)} is empty, expected at least one row. Skip empty batches.")
    if "more than 1 value per channel" in reason:
        return DataError(
            f"{failed_line(error)}: batch norm in training mode needs at least two rows, and the batch has one row. "
            "Choose a batch_size that leaves no single row, use DataLoader(..., drop_last=True), or call eval()."
        )
    if PARTICLE_PLATE in reason or "plate stack overflow" in reason:
        return SiteError(
            f"The particles' plate meets a plate of the program: {reason} Set max_plate_nesting to the number of "
            "batch dimensions that the plates use, or leave it out."
        )
    if "plate" in reason.lower() or "subsample" in reason.lower():
        return SiteError(
            f"The program's plates do not fit (plate {_failed_plate(error)}): {reason} Give every plate the size of "
            "its dimension, and the same size in model and guide."
        )
    if reason.startswith("Expected parameter") and "nan" in str(error):
        return NonFiniteError(
            f"{failed_line(error)}: a distribution got NaN although the data are finite: {reason} A parameter has "
            "diverged, or the program computes 0/0: look at that line, lower the learning rate, or clip the gradient."
        )
    return error


def failed_line(error: Exception) -> str:
    """Return the site, or else the line, of the program that raised ``error``."""
    libraries = ("pyro/", "torch/", "pyro_elbo/", "contextlib.py", "jaxtyping/", "beartype")
    frames = [f for f in extract_tb(error.__traceback__) if not any(name in f.filename for name in libraries)]
    line = frames[-1].line or "" if frames else ""
    named = re.search(r"(?:sample|factor)\(\s*f?['\"]([^'\"]+)", line)
    return f"Site '{named.group(1)}'" if named else f"Line {line!r}"


def _failed_plate(error: Exception) -> str:
    """Return the name of the plate whose construction raised ``error``, which Pyro's messages leave out."""
    traceback, name = error.__traceback__, "of the program"
    while traceback is not None:
        values = traceback.tb_frame.f_locals
        if isinstance(values.get("self"), pyro.plate) and isinstance(values.get("name"), str):
            name = f"'{values['name']}'"
        traceback = traceback.tb_next
    return name
