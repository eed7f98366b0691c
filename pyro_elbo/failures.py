"""What fails in code of the user's: the line, the reason, and the arguments that it got."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from traceback import FrameSummary, extract_tb
from types import FrameType
from typing import Any

import jaxtyping
import pyro
import torch
from torch import Tensor

from pyro_elbo.errors import first_sentence

_ROOTS = [Path(str(module.__file__)).parent for module in (torch, pyro, jaxtyping)] + [Path(__file__).parent]
_LIGHTNING: Any = find_spec("lightning")  # slow to import, and so never imported here
_ROOTS.append(Path(_LIGHTNING.origin).parent)
_LIBRARIES = tuple(f"{root.resolve()}{os.sep}" for root in _ROOTS) + (os.path.realpath(contextlib.__file__),)
FAILURES = (
    ValueError,
    RuntimeError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    StopIteration,  # data that a program takes from an iterator run out
)
"""What code fails by; exceptions of a user's own class pass."""

explained_elsewhere: ContextVar[bool] = ContextVar("explained_elsewhere", default=False)
"""Whether a program runs whose failures are explained where it was called."""


def reason_of(error: Exception) -> str:
    """Return the first sentence of an error, after its type unless it is a plain one."""
    kind = "" if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: "
    return f"{kind}{first_sentence(error)}"


def failed_line(error: Exception) -> str:
    """Return the site, or else the line, of the program that raised ``error``.

    Example:
        >>> try:
        ...     torch.zeros(2) + torch.zeros(3)
        ... except RuntimeError as error:
        ...     failed_line(error)
        "Line 'torch.zeros(2) + torch.zeros(3)'"
    """
    found = zip(frames(error), extract_tb(error.__traceback__), strict=True)
    for frame, summary in reversed(list(found)):
        if not _is_library(summary):
            if not summary.line:
                return f"Function '{summary.name}' ({summary.filename}, line {summary.lineno})"
            named = re.search(r"(?:sample|factor)\(\s*f?['\"]([^'\"]+)", summary.line)
            return f"Site '{named.group(1)}'" if named else f"Line {summary.line!r}"
        message = frame.f_locals.get("msg")
        if isinstance(message, dict) and message.get("type") == "sample" and message.get("name"):
            return f"Site '{message['name']}'"
    return f"{type(error).__name__} inside pyro or torch"


def _is_library(frame: FrameSummary) -> bool:
    """Return whether a frame belongs to torch, Pyro or this library, by where they are installed."""
    return frame.filename.startswith("<@beartype") or os.path.realpath(frame.filename).startswith(_LIBRARIES)


def frames(error: Exception) -> Iterator[FrameType]:
    """Yield the frames from where an error was caught to where it was raised."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def describe_arguments(args: tuple, kwargs: Mapping[str, Any]) -> str:
    """Return the arguments of a call with the shapes of tensors and the types of everything else, in parentheses."""
    return f"({', '.join([*map(_describe, args), *(f'{name}={_describe(x)}' for name, x in kwargs.items())])})"


def _describe(x: Any) -> str:
    return f"tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
