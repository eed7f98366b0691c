"""Optimizers of the user's own, whose steps may do anything."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pyro_elbo.errors import ProgramError


def step_by(optimizer: Any, closure: Callable[[], Any]) -> None:
    """Step an optimizer, which Lightning may have wrapped, by a closure.

    Raises:
        ProgramError: the step does not call the closure.
    """
    results: list[Any] = []

    def noted() -> Any:
        results.append(closure())
        return results[-1]

    optimizer.step(closure=noted)
    if not results:
        raise ProgramError(
            f"The step of {type(getattr(optimizer, 'optimizer', optimizer)).__name__} did not call its closure, which "
            "evaluates the objective. Call closure() in every step(closure), also where no parameter shall move."
        )


@contextmanager
def stepped(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Have the optimizer's ``step`` call its closure and do no more, as its step is taken already."""
    held = vars(optimizer).get("step")  # a scheduler puts its own there
    optimizer.step = lambda closure: closure()
    try:
        yield
    finally:
        del optimizer.step
        if held is not None:
            optimizer.step = held
