"""Collect the torch modules that programs use."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import pyro
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


def owners(program: Any) -> Iterator[nn.Module]:
    """Yield the module that a program is, or whose method it is, and those of the programs that it wraps."""
    if isinstance(program, nn.Module):
        yield program
    elif isinstance(program, MethodType):
        yield from owners(program.__self__)
    elif isinstance(program, partial):
        for wrapped in (program.func, *program.args):
            yield from owners(wrapped)


def program_name(program: Any) -> str:
    """Return the name of a program for people: that of a function or method, or of a module's class."""
    return getattr(program, "__qualname__", type(program).__name__).rpartition("<locals>.")[2]


@contextmanager
def collect_modules(
    *programs: Any, on_found: Callable[[nn.Module], Any] = lambda module: None
) -> Iterator[list[nn.Module]]:
    """Collect the modules that ``programs`` use while they run in the block, without modules inside of another.

    These are the programs themselves, the owners of methods, the arguments of ``pyro.module``, and all modules that
    are called. The list is in the order of their first use, so it repeats from process to process. ``on_found`` is
    called with each module before its first use.
    """
    found: list[nn.Module] = []
    known: set[int] = set()

    def add(module: nn.Module, *_: Any) -> None:
        if id(module) not in known:
            inside = set(map(id, module.modules()))
            found[:] = [m for m in found if id(m) not in inside] + [module]
            known.update(inside)
            on_found(module)

    for program in programs:
        for module in owners(program):
            add(module)
    hook = register_module_forward_pre_hook(add)
    try:
        with _Registered(add):
            yield found
    finally:
        hook.remove()


class _Registered(Messenger):
    """Pass the argument of every ``pyro.module`` in the block to ``add``: its messages show only parameters."""

    def __init__(self, add: Any) -> None:
        super().__init__()
        self.add = add

    def _pyro_param(self, msg: Any) -> None:
        frame = sys._getframe()
        while frame is not None and frame.f_code is not pyro.module.__code__:
            frame = frame.f_back
        if frame is not None:
            self.add(frame.f_locals["nn_module"])
