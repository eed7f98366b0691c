"""Translate failures of Pyro and torch into the library's errors, with the site or line and the cure."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.infer.util import zero_grads
from torch import Tensor
from torch.distributions import Distribution

from pyro_elbo.assumptions import is_capturing
from pyro_elbo.errors import (
    DataError,
    NonFiniteError,
    NoSamplerError,
    ProgramError,
    PyroElboError,
    SiteError,
    count_nonfinite,
    first_sentence,
)
from pyro_elbo.failures import FAILURES, describe_arguments, explained_elsewhere, failed_line, frames, reason_of

PARTICLE_PLATE = "num_particles_vectorized"
"""The name of the plate of vectorized particles."""

VINDEX = "Draw a latent that is indexed as one event (.to_event(n)), and write Vindex(latent)[..., k]."
"""The cure of an index that does not broadcast where particles stand side by side."""

NOTHING: Mapping[str, torch.Size] = {}

_NO_KERNEL = re.compile(r"not implemented for '|Could not run '")  # torch: of a dtype, a layout or a device
_PEER = re.compile(r"\bgloo\b|\bby peer\b")  # of processes that average their gradients
_CALL = re.compile(r"\(\) (missing|takes|got)")  # of arguments that do not fit
_BAD_VALUES = re.compile(r"\b(nan|inf)\b|positive-definite|positive definite|contains? non-finite|>= 0\.0", re.I)


@contextmanager
def explain_failure(
    args: tuple, kwargs: Mapping[str, Any], enumerated: Mapping[str, torch.Size] = NOTHING
) -> Iterator[None]:
    """Raise the library's error where the program inside the block fails on NaN in its data, on plates or on values.

    Args:
        args, kwargs: the arguments of the program.
        enumerated: the shape of the values of each site that has had all of them at once when the program failed.

    Raises:
        NonFiniteError: the arguments hold NaN that reached a distribution, or a parameter has diverged.
        SiteError: a plate is empty or does not fit, or the program fails on all values of a site at once.
        DataError: a batch of one row meets batch norm, or the arguments do not fit the program.
        NoSamplerError: a distribution lacks a method.
        ProgramError: the program fails for another reason. Exceptions of a user's own class pass.
    """
    token = explained_elsewhere.set(True)
    try:
        yield
    except PyroElboError:
        raise
    except FAILURES as error:
        if is_capturing() or type(error).__module__ != "builtins":
            raise
        explained = _explained(error, first_sentence(error), {**dict(enumerate(args)), **kwargs}, enumerated)
        raise _on_values(explained, enumerated) or _failed(error, args, kwargs) from error
    finally:
        explained_elsewhere.reset(token)


def _failed(error: Exception, args: tuple, kwargs: Mapping[str, Any]) -> PyroElboError:
    """Return the error for a program that fails for a reason of its own."""
    text = f"{failed_line(error)}: {reason_of(error)}"
    if isinstance(error, TypeError) and _CALL.search(str(error)) and not text.startswith(("Line", "Site")):
        called = f"A program was called with {describe_arguments(args, kwargs)}"
        return DataError(f"{called}: {error}. Give model and guide the arguments that both take.")
    if _lacks_method(error):
        return NoSamplerError(f"{text} A distribution lacks a method, such as its sampler: use another one.")
    return ProgramError(
        f"{text} The program was called with {describe_arguments(args, kwargs)}: give it arguments that it takes, "
        "or look at that line."
    )


_PARTS = {
    "The backward pass": "Look for hooks, a torch.autograd.Function, or tensors of the programs that are written in "
    "place; under torch.autograd.detect_anomaly() torch prints the line whose gradient fails.",
    "The optimizer": "Look at its options, its hooks and parameters without gradient. Some parameters may have moved.",
    "The scheduler": "Look at its options, and at the functions that it calls.",
}
"""The parts of a step beside the programs, with the cure where they fail."""


@contextmanager
def explain_update(part: str, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Raise the library's error where a ``part`` of a step beside the programs fails, and remove all gradients.

    Raises:
        ProgramError: the part fails, in code of the user's or in torch. Exceptions of a user's own class pass.
    """
    try:
        yield
    except BaseException as error:
        zero_grads(parameters.values())  # a later step would add to them
        if not isinstance(error, FAILURES) or type(error).__module__ != "builtins":
            raise
        reason, _, _ = reason_of(error).partition(" Hint: ")
        if _PEER.search(reason):
            raise ProgramError(f"Another process of this run has ended, whose own error says why: {reason}") from error
        raise ProgramError(f"{part} fails. {failed_line(error)}: {reason} {_PARTS[part]}") from error


def _lacks_method(error: Exception) -> bool:
    """Return whether a distribution of the program lacks a method, such as its sampler."""
    while isinstance(error.__cause__, Exception):  # Pyro's trace raises the error again, with its shapes
        error = error.__cause__
    if not isinstance(error, NotImplementedError) or _NO_KERNEL.search(str(error)):
        return False
    return any(isinstance(frame.f_locals.get("self"), Distribution) for frame in frames(error))


def _on_values(error: Exception, enumerated: Mapping[str, torch.Size]) -> PyroElboError | None:
    """Return an error that says which sites have all their values at once, where that may be why a program fails."""
    if not enumerated or isinstance(error, NonFiniteError | DataError):
        return error if isinstance(error, PyroElboError) else None
    shapes = ", ".join(f"'{n}' {tuple(shape)}" for n, shape in enumerated.items())
    text = str(error) if isinstance(error, SiteError) else f"{failed_line(error)}: {first_sentence(error)}"
    return SiteError(
        f"{text} All values of these sites stand side by side, in the shapes {shapes}, as they are summed out: index "
        "tensors with them (means[k], Vindex) and broadcast (torch.where), without if, lists or torch.cat."
    )


def _explained(
    error: Exception, reason: str, arguments: Mapping[Any, Any], enumerated: Mapping[str, torch.Size]
) -> Exception:
    """Return the library's error for one of Pyro or torch, or that error itself."""
    if isinstance(error, ZeroDivisionError):
        plate = _failed_plate(error)
        if plate is None:
            return error
        return SiteError(f"Plate '{plate}' is empty, expected at least one row. Skip empty batches.")
    if "more than 1 value per channel" in reason:
        return DataError(
            f"{failed_line(error)}: batch norm in training mode needs at least two rows, and the batch has one row. "
            "Choose a batch_size that leaves no single row, use DataLoader(..., drop_last=True), or call eval()."
        )
    if PARTICLE_PLATE in reason or "plate stack overflow" in reason:
        return SiteError(
            f"The particles' plate meets a plate of the program: {reason} {VINDEX} Set max_plate_nesting to the number "
            "of batch dimensions that the plates use, or leave it out."
        )
    if "plate" in reason.lower() or "subsample" in reason.lower():
        plate = _failed_plate(error)
        which = "of the program" if plate is None else f"'{plate}'"
        sizes = "give every plate the size of its dimension, and the same size in model and guide."
        if not enumerated:
            return SiteError(f"The program's plates do not fit (plate {which}): {reason} {sizes.capitalize()}")
        return SiteError(
            f"A shape does not fit the plates of the program (plate {which}): {reason} {VINDEX} Declare the dimensions "
            f"of one datum with .to_event(n). Or else {sizes}"
        )
    return _not_finite(error, reason, arguments) or error


def _not_finite(error: Exception, reason: str, arguments: Mapping[Any, Any]) -> NonFiniteError | None:
    """Return the error for NaN that made a program fail; None where the failure has another reason."""
    refused = _refused_value(error)
    spoilt = not bool(torch.isfinite(refused).all()) if refused is not None else bool(_BAD_VALUES.search(str(error)))
    if not spoilt:
        return None
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.is_floating_point() and not torch.isfinite(x).all():
            return NonFiniteError(
                f"{failed_line(error)}: {reason} Argument {name} of the program holds such values: "
                f"{count_nonfinite(x)}. Remove them, or fill them in before they reach an encoder and mask the "
                "observed site."
            )
    if not reason.startswith("Expected parameter"):
        return None
    return NonFiniteError(
        f"{failed_line(error)}: a distribution got NaN although the data are finite: {reason} A parameter has "
        "diverged, or the program computes 0/0: look at that line, lower the learning rate, or clip the gradient."
    )


def _failed_plate(error: Exception) -> str | None:
    """Return the name of the plate whose construction raised ``error``, which Pyro's messages leave out."""
    found = [f.f_locals for f in frames(error) if isinstance(f.f_locals.get("self"), pyro.plate)]
    names = [values["name"] for values in found if isinstance(values.get("name"), str)]
    return names[-1] if names else None


def _refused_value(error: Exception) -> Tensor | None:
    """Return the tensor that the validation of a distribution refused, if that is how a program failed."""
    while isinstance(error.__cause__, Exception):  # Pyro's trace raises the error again, with its shapes
        error = error.__cause__
    *_, last = frames(error)
    value = last.f_locals.get("value")
    from_validation = last.f_code.co_name in ("__init__", "_validate_sample") and "torch" in last.f_code.co_filename
    return value if from_validation and isinstance(value, Tensor) else None
