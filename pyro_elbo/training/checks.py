"""Checks of the programs, the objective and the numbers that a user passes to a training loop."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from pyro_elbo.errors import ArgumentError, GuideError, check_count, check_positive, describe
from pyro_elbo.objectives import TraceBeta_ELBO


def check_loss(loss: Any) -> None:
    """Raise ArgumentError unless ``loss`` is an objective of this library."""
    if inspect.isclass(loss):
        raise ArgumentError(
            f"loss must be an objective, got the class {loss.__name__}. Make one: pe.{loss.__name__}()."
        )
    if not isinstance(loss, TraceBeta_ELBO):
        raise ArgumentError(
            f"loss must be an objective of this library such as pe.TraceBeta_ELBO(), got {type(loss).__name__}. "
            "Pyro's own objectives train with pyro.infer.SVI."
        )


def with_python_numbers(options: Any) -> None:
    """Replace the numbers of NumPy among the fields of a frozen dataclass: Lightning takes Python's alone."""
    for name, x in vars(options).items():
        if isinstance(x, np.generic):
            object.__setattr__(options, name, x.item())


def check_counts(required: Mapping[str, Any], optional: Mapping[str, Any]) -> None:
    """Raise ArgumentError unless all values are whole numbers of at least 1, or None for the optional ones."""
    for name, count in required.items():
        check_count(name, count)
    for name, count in optional.items():
        if count is not None:
            check_count(f"{name}, unless it is None,", count)


def check_compile(compile: Any) -> None:
    """Raise ArgumentError unless ``compile`` is True, False or ``"auto"``."""
    if not isinstance(compile, bool) and not (isinstance(compile, str) and compile == "auto"):
        raise ArgumentError(f'compile must be True, False or "auto", got {describe(compile)}.')


def check_grad_clip(grad_clip: Any) -> None:
    """Raise ArgumentError unless ``grad_clip`` is None or positive and finite."""
    if grad_clip is not None:
        check_positive("grad_clip", grad_clip, "Leave it out, or lower the learning rate.")


def check_depends(depends: bool) -> None:
    """Raise GuideError if the objective depends on no parameter."""
    if not depends:
        raise GuideError(
            "The objective depends on none of the parameters, so there is nothing to train. Use the parameters in the "
            "distributions of model or guide, or evaluate the terms: loss.terms(model, guide, ...)."
        )
