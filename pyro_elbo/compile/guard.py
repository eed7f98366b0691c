"""What a captured program took from Python: watched, so that a change is noticed before a stale graph runs.

A graph holds tensors by identity and Python values as constants. Whatever the programs' code names and can reach is
watched: globals, cells of closures, attributes of objects and classes, entries of containers, parameters, buffers and
parts of modules, Pyro's settings. Of objects that belong to libraries only plain values and tensors are: the rest is
their own bookkeeping, which they renew as they like.
"""

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain
from operator import contains, eq, getitem, is_
from typing import Any

import numpy as np
import pyro
from torch import Tensor, nn

_STDLIB = sys.stdlib_module_names - {"__main__", "types", "argparse"}  # namespaces are the user's own
_LIBRARIES = frozenset(("torch", "pyro", "pyro_elbo", "numpy", "lightning")) | _STDLIB
_FOLLOWED = ("torch", "pyro", "pyro_elbo")  # libraries whose objects hold the user's
_VALUES = (bool, int, float, complex, str, bytes, type(None), Tensor, np.generic)
_MAKING = ("__init__", "__new__", "__repr__", "__init_subclass__", "__getstate__", "__setstate__", "__deepcopy__")
_GRADIENT = ("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")  # of a parameter
_SMALL = 1000  # elements of a NumPy array up to which its contents are compared


class Guard:
    """Watched entries of mappings, attributes and containers, and the values that they had."""

    def __init__(self, *programs: Any) -> None:
        self.generators: list[Any] = []
        self.refused: list[str] = []  # what cannot be watched
        self._mappings: list[tuple[Mapping | Callable[[], Mapping], tuple, tuple]] = []
        self._absent: list[tuple[Mapping, frozenset[str]]] = []
        self._attributes: list[tuple[Any, str, Any, str]] = []
        self._containers: list[tuple[Collection, tuple]] = []
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self._seen: dict[int, Any] = {}  # kept alive: an id is unique among the living only
        self._named = {"forward", "__call__"}  # every name that occurs in the code of the programs
        self._owned: list[Mapping[str, Any]] = []  # attributes of the user's objects and classes
        self._todo: list[Any] = []
        self._visit_all(programs)
        self._drain()
        self._visit_named()
        for module, path, _ in pyro.settings._REGISTRY.values():
            *owners, name = path.split(".")
            self.watch(vars(functools.reduce(getattr, owners, sys.modules[module])), [name])

    def watch(self, holder: Mapping | Callable[[], Mapping], keys: Iterable) -> None:
        """Watch the entries of ``holder``, or of the mapping that it returns, under ``keys``."""
        keys = tuple(keys)
        if keys:
            self._mappings.append((holder, keys, tuple(map(_held(holder).__getitem__, keys))))

    def watch_container(self, container: Collection) -> None:
        """Watch which items a list, set or dictionary (its keys) holds."""
        self._containers.append((container, tuple(container)))

    def watch_attributes(self, name: str, owners: Iterable[Any]) -> None:
        """Watch one attribute of several objects."""
        self._attributes += [(owner, name, getattr(owner, name), name) for owner in owners]

    def broken(self) -> str | None:
        """The name of something watched that has changed, or None."""
        changed = None if self._columns.untouched() else self._changed()
        return changed or next(
            (f"an array of shape {x.shape}" for x, old in self._arrays if not np.array_equal(x, old)), None
        )

    def _changed(self) -> str | None:
        for holder, keys, values in self._mappings:
            held = _held(holder)
            for key, old in zip(keys, values, strict=True):
                try:
                    new = held[key]
                except KeyError:
                    return str(key)
                if not _same(new, old):
                    return key if isinstance(key, str) else f"the state of {type(key).__name__}"
        for owner, attribute, value, name in self._attributes:
            if not _same(getattr(owner, attribute, None), value):
                return name
        for holder, names in self._absent:
            if not names.isdisjoint(holder):
                return next(iter(names & holder.keys()))
        for container, items in self._containers:
            if len(container) != len(items) or not all(map(is_, container, items)):
                return f"a {type(container).__name__} of length {len(items)}"
        return None

    @functools.cached_property
    def _columns(self) -> "_Columns":
        """All that is watched when the guard is first asked."""
        return _Columns(self._mappings, self._attributes, self._absent, self._containers)

    def restore(self) -> None:
        """Put back what has changed in dictionaries and lists."""
        for holder, keys, values in self._mappings:
            if isinstance(holder, dict):
                holder.update(zip(keys, values, strict=True))
        for container, items in self._containers:
            if isinstance(container, list):
                container[:] = items
            elif isinstance(container, dict):
                for key in container.keys() - set(items):
                    del container[key]

    def visit(self, x: Any) -> None:
        """Remember to watch everything that can be reached from ``x``."""
        if id(x) not in self._seen and not isinstance(x, _VALUES):
            self._seen[id(x)] = x
            self._todo.append(x)

    def _drain(self) -> None:
        while self._todo:
            x = self._todo.pop()
            visit = next((visit for kinds, visit in self._visitors() if isinstance(x, kinds)), None)
            if visit is not None:
                visit(x)
            elif hasattr(type(x), "__next__"):
                self.refused.append(
                    f"a {type(x).__name__}, which gives another value each time: pass its values as arguments"
                )
            else:
                self._visit_object(x)
            if isinstance(x, dict | list) and type(x) not in (dict, list):
                self._visit_object(x)  # subclasses may have attributes

    def _visitors(self) -> Iterator[tuple[Any, Callable[[Any], None]]]:
        yield nn.Module, self._visit_module
        yield types.BuiltinMethodType, lambda x: self.visit(x.__self__)
        yield types.MethodType, lambda x: self._visit_all((x.__self__, x.__func__))
        yield functools.partial, lambda x: self._visit_all((x.func, x.args, x.keywords))
        yield types.FunctionType, self._visit_function
        yield property, lambda x: self._visit_all((x.fget,))
        yield staticmethod | classmethod, lambda x: self.visit(x.__func__)
        yield type, self._visit_class
        yield types.ModuleType, self._visit_library
        yield pyro.params.param_store.ParamStoreDict, lambda x: None
        yield dict, self._visit_dict
        yield list | tuple | set | frozenset | deque, self._visit_container
        yield np.ndarray, self._visit_array
        yield np.random.Generator | np.random.RandomState | random.Random, self.generators.append

    def _visit_library(self, x: types.ModuleType) -> None:
        """Note the generators behind the functions of ``random`` and ``numpy.random``."""
        if x.__name__ == "random":
            self.generators.append(random.random.__self__)
        elif x.__name__ in ("numpy", "numpy.random"):
            self.generators.append(np.random.mtrand._rand)

    def _visit_all(self, parts: Iterable) -> None:
        for part in parts:
            self.visit(part)

    def _visit_dict(self, x: dict) -> None:
        self.watch_container(x)
        self.watch(x, x)
        self._visit_all(list(x.values()))

    def _visit_container(self, x: Collection) -> None:
        if not isinstance(x, tuple):
            self.watch_container(x)
        self._visit_all(tuple(x))

    def _visit_array(self, x: np.ndarray) -> None:
        if x.size <= _SMALL:
            self._arrays.append((x, x.copy()))
        else:
            self.refused.append(f"a NumPy array of shape {x.shape}: make it a tensor (torch.as_tensor)")

    def _visit_object(self, x: Any) -> None:
        own, entries = not _is_library(type(x)), getattr(x, "__dict__", None)
        slots = getattr(type(x), "__slots__", ()) if own else ()
        for name in (slots,) if isinstance(slots, str) else set(slots) - {"__dict__", "__weakref__"}:
            self._attributes.append((x, name, getattr(x, name, None), name))
            self.visit(getattr(x, name, None))
        if type(entries) is dict:
            self._visit_attributes(entries, type(x))
            if type(x).__module__.partition(".")[0] in _FOLLOWED:
                self._visit_all(list(entries.values()))

    def _visit_attributes(self, entries: dict, kind: type) -> None:
        if _is_library(kind):
            self.watch(entries, (k for k, v in entries.items() if _is_plain(v) and not k.startswith("_")))
        else:
            self._owned.append(entries)
            self.visit(kind)

    def _visit_module(self, module: nn.Module) -> None:
        for part in module.modules():
            self._seen[id(part)] = part
            for entries in (part._parameters, part._buffers, part._modules):
                self.watch_container(entries)
                self.watch(entries, entries)
            hooks_of_part = (
                part._forward_hooks,
                part._forward_pre_hooks,
                part._backward_hooks,
                part._backward_pre_hooks,
            )
            for hooks in hooks_of_part:
                self.watch_container(hooks)
            for p in part._parameters.values():
                for name in _GRADIENT if p is not None else ():
                    self.watch_attributes(name, [p])
            self._absent.append((vars(part), frozenset(["forward"]) - vars(part).keys()))
            self._visit_attributes(vars(part), type(part))

    def _visit_class(self, x: type) -> None:
        if not _is_library(x):
            self._owned.append(vars(x))
            self._visit_all(x.__mro__[1:])

    def _visit_named(self) -> None:
        """Follow the attributes that the code names, which may lead to more code, and watch them in the end."""
        followed: set[tuple[int, str]] = set()
        while todo := [(e, name) for e in self._owned for name in self._used(e) if (id(e), name) not in followed]:
            for entries, name in todo:
                followed.add((id(entries), name))
                self.visit(entries[name])
            self._drain()
        attributes = {name for entries in self._owned for name in entries} & self._named
        for entries in self._owned:
            self.watch(entries, self._used(entries))
            if isinstance(entries, dict):  # of an instance, which may come to hide what its class has
                self._absent.append((entries, frozenset(attributes - entries.keys())))

    def _used(self, entries: Mapping[str, Any]) -> list[str]:
        """The names among ``entries`` that the code of the programs may ask for."""
        every = not self._named.isdisjoint(("getattr", "vars", "__dict__"))
        return [
            name
            for name, value in entries.items()
            if every or name in self._named or (name.startswith("__") and name not in _MAKING and callable(value))
        ]

    def _visit_function(self, x: types.FunctionType) -> None:
        for name, cell in zip(x.__code__.co_freevars, x.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            self._attributes.append((cell, "cell_contents", value, name))
            self.visit(value)
        if _is_library(x):
            return
        self._owned.append(vars(x))
        for attribute in ("__defaults__", "__kwdefaults__", "__code__"):
            self._attributes.append((x, attribute, getattr(x, attribute), x.__name__))
        self._visit_all((x.__defaults__, x.__kwdefaults__))
        names = set(_names(x.__code__))
        self._named |= names
        self._visit_names(x.__globals__, names)
        for used in [v for n in sorted(names) if isinstance(v := x.__globals__.get(n), types.ModuleType)]:
            if not _is_installed(used.__name__.partition(".")[0]):
                self._visit_names(vars(used), names)

    def _visit_names(self, holder: dict, names: Iterable[str]) -> None:
        used = [n for n in sorted(names) if n in holder]
        self.watch(holder, used)
        self._visit_all(holder[n] for n in used)


class _Columns:
    """All that is watched, in columns: loops in C say whether nothing at all was touched, which is nearly always so."""

    def __init__(self, mappings: list, attributes: list, absent: list, containers: list) -> None:
        fixed = [mapping for mapping in mappings if not callable(mapping[0])]
        self._called = [mapping for mapping in mappings if callable(mapping[0])]
        entries = [(holder, *pair) for holder, keys, values in fixed for pair in zip(keys, values, strict=True)]
        self._entries = _transpose(entries, 3)
        self._attributes = _transpose([(owner, attribute, value) for owner, attribute, value, _ in attributes], 3)
        self._absent = _transpose([(holder, name) for holder, names in absent for name in names], 2)
        self._containers = [container for container, _ in containers]
        self._lengths = [len(items) for _, items in containers]
        self._items = [item for _, items in containers for item in items]

    def untouched(self) -> bool:
        """Whether everything is the very object that it was."""
        try:
            return (
                all(map(is_, map(getitem, *self._entries[:2]), self._entries[2]))
                and all(map(is_, map(getattr, *self._attributes[:2]), self._attributes[2]))
                and not any(map(contains, *self._absent))
                and all(map(eq, map(len, self._containers), self._lengths))
                and all(map(is_, chain.from_iterable(self._containers), self._items))
                and all(all(map(is_, map(holder().__getitem__, keys), values)) for holder, keys, values in self._called)
            )
        except (KeyError, AttributeError):
            return False


def _held(holder: Any) -> Any:
    return holder() if callable(holder) else holder


def _transpose(rows: list[tuple], width: int) -> list[tuple]:
    return list(zip(*rows, strict=True)) or [()] * width


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_library(x: Any) -> bool:
    return _is_installed((x.__module__ or "").partition(".")[0])


@functools.cache
def _is_installed(package: str) -> bool:
    """Whether a top-level package is the standard library's or was installed, rather than being the user's own."""
    path = getattr(sys.modules.get(package), "__file__", None) or ""
    return package in _LIBRARIES or "site-packages" in path


def _is_plain(x: Any) -> bool:
    return isinstance(x, _VALUES) or (isinstance(x, tuple) and all(isinstance(part, _VALUES) for part in x))


def _same(a: Any, b: Any) -> bool:
    plain = isinstance(a, _VALUES) and not isinstance(a, Tensor)
    return a is b or (plain and type(a) is type(b) and a == b)
