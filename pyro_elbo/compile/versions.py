"""The torch versions under which compiled steps are tested, and what happens under others."""

import functools
from collections.abc import Callable

import torch

from pyro_elbo.errors import CompileError

OLDEST, NEWEST = (2, 13), (2, 13)  # the tests pass under these and those between


def check_version(self_check: Callable[[], None]) -> None:
    """Raise where compiled steps do not work with this torch; a version newer than the tested ones is tried once.

    Args:
        self_check: compiles a small program, and raises where that fails or is wrong.

    Raises:
        CompileError: torch is too old, or the self-check fails.
    """
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < OLDEST:
        raise CompileError(
            f"Compiled steps need torch {_name(OLDEST)} or later, this is {torch.__version__}: compile=False."
        )
    if found > NEWEST and (reason := _failure(self_check, torch.__version__)):
        raise CompileError(
            f"Compiled steps are tested up to torch {_name(NEWEST)}, this is {torch.__version__}, "
            f'where a small program fails ({reason}). Install a tested version, or use compile=False or compile="auto".'
        )


@functools.cache
def _failure(self_check: Callable[[], None], version: str) -> str:
    try:
        self_check()
    except Exception as error:
        return " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
    return ""


def _name(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
