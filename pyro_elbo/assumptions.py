"""Conditions assumed where tensors have no values to test: a step is captured as a graph, or draws are mapped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

_assumptions: ContextVar[list[Tensor] | None] = ContextVar("assumptions", default=None)
_validating: ContextVar[bool] = ContextVar("validating", default=False)
_loop: ContextVar[Callable[..., Any] | None] = ContextVar("loop", default=None)


def check_or_defer(condition: Tensor) -> bool:
    """Return whether a scalar condition is true; while capturing, assume it and let every step check it."""
    assumed = _assumptions.get()
    if assumed is None:
        return bool(condition)
    assumed.append(condition)
    return True


def defer_check(condition: Callable[[], Tensor]) -> None:
    """While capturing, let every step check a condition that an eager run checks elsewhere."""
    assumed = _assumptions.get()
    if assumed is not None and _validating.get():
        assumed.append(condition())


def is_capturing() -> bool:
    """Return whether a step is being captured, or draws are being mapped."""
    return _assumptions.get() is not None


class NotAlikeError(Exception):
    """What a capture takes as equal runs of one function is not: they are captured one by one."""


@contextmanager
def capturing_inside(loop: Callable[..., Any]) -> Iterator[list[Tensor]]:
    """Collect the conditions of a part of the captured program, whose loops another function captures."""
    with capturing(_validating.get(), loop) as assumed:
        yield assumed


def assume(condition: Tensor) -> None:
    """Let every step of a capture check a condition."""
    assumed = _assumptions.get()
    assert assumed is not None
    assumed.append(condition)


def active_loop() -> Any:
    """Return the function that captures the loop of a scan; None outside a capture."""
    return _loop.get()


@contextmanager
def capturing(validate: bool, loop: Callable[..., Any] | None = None) -> Iterator[list[Tensor]]:
    """Collect the conditions that the captured program assumes; with ``validate`` also those on the data."""
    assumed: list[Tensor] = []
    tokens = _assumptions.set(assumed), _validating.set(validate), _loop.set(loop)
    try:
        yield assumed
    finally:
        _assumptions.reset(tokens[0])
        _validating.reset(tokens[1])
        _loop.reset(tokens[2])
