"""Refuse what a graph cannot hold, with the line of the program and the cure."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pyro_elbo.compile._torch import DataDependentOutputException, DynamicOutputShapeException
from pyro_elbo.compile.guard import Guard
from pyro_elbo.errors import CompileError, PyroElboError
from pyro_elbo.failures import failed_line


def check_reachable(guard: Guard) -> None:
    """Raise CompileError if the programs use something that cannot be watched."""
    if guard.refused:
        raise CompileError(f"The programs use {guard.refused[0]}, or use compile=False.")


def check_sites(expected: tuple[str, ...], found: tuple[str, ...]) -> None:
    """Raise CompileError if two runs of the programs have other sites."""
    if changed := sorted(set(expected) ^ set(found)):
        raise CompileError(
            f"The sites {changed} are in some runs of the programs and not in others: a compiled step is one graph "
            "with fixed sites. Keep the sites and mask them (pyro.poutine.mask), or use compile=False."
        )


@contextmanager
def refuse_side_effects(guard: Guard) -> Iterator[None]:
    """Restore the Python state that a captured run changed, and raise since later steps would not change it."""
    try:
        yield
    finally:
        changed = guard.broken()
        guard.restore()
    if changed is not None:
        raise CompileError(
            f"The program sets '{changed}' as it runs, which a compiled step would not do. Change tensors in place "
            "(buffer.copy_(...)), keep records outside of the programs, or use compile=False."
        )


@contextmanager
def explain_capture(generators: list[Any]) -> Iterator[None]:
    """Raise errors of a capture with the line of the program and the reason."""
    before = _states(generators)
    try:
        yield
    except PyroElboError:
        raise
    except Exception as error:
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        unknown = isinstance(error, DataDependentOutputException | DynamicOutputShapeException)
        what = "needs a value that only a run knows" if unknown else f"fails while it is captured ({reason})"
        raise CompileError(
            f"{failed_line(error)} {what}: a compiled step is one graph on tensors. Write torch.where or "
            "pyro.poutine.mask for a branch on a value, pass sizes as Python numbers, or use compile=False."
        ) from error
    if before != _states(generators):
        raise CompileError(
            "The program seeds torch, or draws random numbers from Python or NumPy, which a graph would freeze. Draw "
            "with pyro.sample or torch, pass the numbers as tensors, or use compile=False."
        )


def _states(generators: list[Any]) -> list[str]:
    """Return the states of torch's random generator and of every Python or NumPy generator in reach."""
    states: list[Any] = [torch.get_rng_state().tolist()]  # fake draws leave it alone, seeding does not
    for generator in generators:
        if isinstance(generator, random.Random):
            states.append(generator.getstate())
        elif isinstance(generator, np.random.RandomState):
            states.append(generator.get_state(legacy=False))
        else:
            states.append(generator.bit_generator.state)
    with np.printoptions(threshold=sys.maxsize):
        return [repr(state) for state in states]
