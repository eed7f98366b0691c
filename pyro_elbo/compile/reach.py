"""Search for what programs can read while they run: everything that their code names and can reach.

A :class:`~pyro_elbo.compile.execution.Execution` says which code ran. That code names globals, attributes of objects,
classes and modules; functions have cells and defaults; containers have entries; modules of torch have parameters,
buffers and parts. Each of them is watched, and searched for more in turn. What can be read but not watched is refused.
"""

import array
import ctypes
import functools
import gc
import operator
import random
import sys
import types
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import numpy as np
import pyro
import torch
from pyro.nn import PyroModule
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_elbo.compile.execution import (
    FROZEN,
    Execution,
    is_installed,
    is_library,
    package_of,
    volatile_name,
)
from pyro_elbo.compile.guard import VALUES, Guard
from pyro_elbo.objectives import TraceBeta_ELBO

_FOLLOWED = ("torch", "pyro", "pyro_elbo")  # libraries whose objects hold the user's
# modules whose objects hold the user's
_WRAPPERS = ("collections", "weakref", "_weakrefset", "configparser", "multiprocessing")
_MAKING = ("__init__", "__new__", "__repr__", "__init_subclass__", "__getstate__", "__setstate__", "__deepcopy__")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ANY_ATTRIBUTE = {"getattr", "vars", "__dict__", "dir", "attrgetter", "asdict", "astuple", "getmembers", "deepcopy"}
_BY_STRING = {"globals", "modules", "__dict__", "__import__", "vars"}  # what string constants of the code may index
_BUFFERS = (bytearray, array.array, memoryview, ctypes.c_int.__mro__[2])  # the last is the base of all of ctypes
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_SMALL = 1000  # elements of an array up to which its contents are compared


def guard_of(programs: Iterable[Any], execution: Execution | None) -> Guard:
    """Return a guard of everything that ``programs`` can reach, and of Pyro's settings.

    Args:
        programs: model, guide, their arguments, objective and whatever else runs in a step.
        execution: of a step; without it, code counts as executed where the programs' names lead to it.
    """
    guard = Guard()
    guard.generators.append(np.random.mtrand._rand)  # of the functions of numpy.random
    _Reach(guard, execution).follow(programs)
    for module, path, _ in pyro.settings._REGISTRY.values():
        *owners, name = path.split(".")
        guard.watch(vars(functools.reduce(getattr, owners, sys.modules[module])), [name])
    return guard


class _Reach:
    """The search: what has been seen, what is still to be visited, and the names that the code uses."""

    def __init__(self, guard: Guard, execution: Execution | None) -> None:
        self._guard, self._execution = guard, execution
        self._seen: dict[int, Any] = {}  # kept alive: an id is unique among the living only
        self._own: set[str] = set()  # installed packages that are the user's
        # Names that the code of a package uses; those of the user's code are under "".
        self._named: dict[str, set[str]] = defaultdict(set, {"": {"forward", "__call__"}})
        self._owned: list[tuple[Mapping[str, Any], frozenset[str]]] = []  # attributes, and the packages of their class
        self._swept: list[dict[str, Any]] = []  # globals of code that looks them up by computed names
        self._todo: list[Any] = []

    def follow(self, programs: Iterable[Any]) -> None:
        """Watch everything that can be reached from ``programs``."""
        programs = tuple(programs)
        self._own |= {package_of(x if isinstance(x, types.FunctionType) else type(x)) for x in programs}
        self._visit_all(programs)
        self._drain()
        if self._execution is not None:
            self._follow_execution(self._execution)
        self._sweep()
        self._visit_named()

    def _sweep(self) -> None:
        """Watch every global of code that looks some up by a computed name; what else is there may be unwatchable."""
        refused = len(self._guard.refused)
        for namespace in self._swept:
            self._guard.watch(namespace, [name for name in namespace if not name.startswith("__")])
            self._visit_all(list(namespace.values()))
        self._drain()
        del self._guard.refused[refused:]

    def _follow_execution(self, execution: Execution) -> None:
        self._guard.refused += execution.volatile
        environment, read = vars(sys.modules["os"].environ)["_data"], execution.environment.keys()
        if None in read:
            self._visit_dict(environment)
        else:
            self._guard.watch(environment, read & environment.keys())
            self._guard.watch_absent(environment, read - environment.keys())
        self._visit_all((*execution.contexts, *execution.modules))
        ran = [entry for entry in execution.code.values() if not is_library(entry[2])]
        for entry in ran:
            self._visit_code(*entry)
        known = {id(x.__code__) for x in self._seen.values() if isinstance(x, types.FunctionType)}
        known |= {id(part) for code, *_ in ran for part in code.co_consts}  # made by the run itself
        if unknown := [code for code, *_ in ran if id(code) not in known and code.co_freevars]:
            self._visit_all(x for x in gc.get_referrers(*unknown) if isinstance(x, types.FunctionType))
        self._drain()

    def _visit(self, x: Any) -> None:
        if id(x) not in self._seen and not isinstance(x, VALUES):
            self._seen[id(x)] = x
            self._todo.append(x)

    def _visit_all(self, parts: Iterable) -> None:
        for part in parts:
            self._visit(part)

    def _drain(self) -> None:
        while self._todo:
            x = self._todo.pop()
            visit = next((visit for kinds, visit in self._visitors() if isinstance(x, kinds)), self._visit_other)
            visit(x)
            if isinstance(x, _CONTAINERS) and not is_library(package_of(type(x))):
                self._visit_object(x)  # subclasses may have attributes

    def _visitors(self) -> Iterator[tuple[Any, Callable[[Any], None]]]:
        yield weakref.ReferenceType, self._visit_reference
        yield torch.jit.ScriptModule | torch.jit.ScriptFunction, self._refuse_script
        yield nn.Module, self._visit_module
        yield weakref.ProxyTypes, self._visit_object
        yield types.BuiltinMethodType, lambda x: self._visit(x.__self__)
        yield types.MethodType, lambda x: self._visit_all((x.__self__, x.__func__))
        yield functools.partial, self._visit_partial
        yield types.FunctionType, self._visit_function
        yield property, lambda x: self._visit_all((x.fget,))
        yield functools.cached_property, lambda x: self._visit(x.func)
        yield staticmethod | classmethod, lambda x: self._visit(x.__func__)
        yield functools._lru_cache_wrapper, lambda x: self._visit_all(gc.get_referents(x))  # also what it remembers
        yield operator.attrgetter | operator.methodcaller, self._visit_getter
        yield type, self._visit_class
        yield types.ModuleType, self._visit_namespace
        yield pyro.params.param_store.ParamStoreDict | LRScheduler, lambda x: None  # watched by name
        yield Optimizer, self._visit_optimizer
        yield TraceBeta_ELBO, self._visit_objective
        yield dict, self._visit_dict
        yield list | tuple | set | frozenset | deque, self._visit_container
        yield types.MappingProxyType, lambda x: self._visit_all(gc.get_referents(x))
        yield np.ndarray, self._visit_array
        yield _BUFFERS, lambda x: self._guard.watch_contents(x, bytes)
        yield np.random.Generator | np.random.RandomState | random.Random, self._guard.generators.append
        yield ContextVar, self._visit_context

    def _visit_namespace(self, x: types.ModuleType) -> None:
        if not is_library(package := x.__name__.partition(".")[0]):
            self._owned.append((vars(x), frozenset([package])))

    def _visit_partial(self, x: functools.partial) -> None:
        self._visit_all((x.func, x.args, x.keywords))
        if (name := volatile_name(x.func)) is not None:  # C calls C: no record has it
            self._guard.refused.append(f"{name}() in a functools.partial, {FROZEN}")

    def _visit_getter(self, x: Any) -> None:
        self._named[""].update(name for part in x.__reduce__()[1] for name in str(part).split("."))

    def _visit_reference(self, x: weakref.ReferenceType) -> None:
        self._guard.watch_alive(x)
        self._visit(x())

    def _visit_context(self, x: ContextVar) -> None:
        read = lambda: {x.name: x.get(None)}  # noqa: E731
        self._guard.watch(read, [x.name])
        self._visit(x.get(None))

    def _visit_dict(self, x: dict) -> None:
        self._guard.watch_container(x)
        self._guard.watch(x, x)
        self._visit_all((*x.keys(), *x.values()))

    def _visit_container(self, x: Collection) -> None:
        if not isinstance(x, tuple | frozenset):
            self._guard.watch_container(x)
        self._visit_all(tuple(x))

    def _visit_array(self, x: Any) -> None:
        if x.size > _SMALL:
            kind = "NumPy array" if isinstance(x, np.ndarray) else type(x).__name__
            self._guard.refused.append(f"a {kind} of shape {x.shape}: make it a tensor (torch.as_tensor)")
        else:
            self._guard.watch_contents(x, _cells)
            if (items := np.asarray(x)).dtype == object:
                self._visit_all(items.flat)

    def _visit_other(self, x: Any) -> None:
        kind = type(x)
        library = is_library(package_of(kind)) or isinstance(x, types.GenericAlias | types.UnionType)
        if package_of(kind) == "pandas" and hasattr(x, "to_numpy") and hasattr(x, "size"):
            self._visit_array(x)
        elif hasattr(kind, "__next__"):
            self._refuse(x, "gives another value each time")
        elif library or hasattr(x, "__dict__") or any(map(_slots, kind.__mro__)) or not hasattr(kind, "__getitem__"):
            self._visit_object(x)
        else:
            self._refuse(x, "cannot be watched")

    def _refuse(self, x: Any, why: str) -> None:
        self._guard.refused.append(f"a {type(x).__name__}, which {why}: pass its values as arguments")

    def _refuse_script(self, x: Any) -> None:
        what = "TorchScript (torch.jit.script, torch.jit.trace), which runs outside of Python"
        self._guard.refused.append(f"{what}: call the module or function that it was made from")

    def _visit_object(self, x: Any) -> None:
        kind = x.__class__ if isinstance(x, weakref.ProxyTypes) else type(x)
        for name in {name for c in kind.__mro__ if not is_library(package_of(c)) for name in _slots(c)}:
            self._guard.watch_attributes(name, [x])
            self._visit(getattr(x, name, None))
        entries, package = getattr(x, "__dict__", None), package_of(kind)
        if type(entries) is not dict:
            return
        if package in _WRAPPERS:
            self._visit_dict(entries)
        else:
            self._visit_attributes(entries, kind)
            if package in _FOLLOWED:
                self._visit_all(list(entries.values()))

    def _visit_attributes(self, entries: dict, kind: type) -> None:
        if is_library(package_of(kind)):
            names = [name for name in entries if not name.startswith("_")]
        else:
            self._owned.append((entries, frozenset(map(package_of, kind.__mro__))))
            self._visit(kind)
            names = _settings(kind) & entries.keys()
        self._guard.watch(entries, (name for name in names if _is_plain(entries[name])))

    def _visit_module(self, module: nn.Module) -> None:
        for part in module.modules():
            self._seen[id(part)] = part
            for name in ("_pyro_params", "_pyro_samples"):  # of a PyroModule
                self._visit(vars(part).get(name))
            for entries in (part._parameters, part._buffers, part._modules):
                self._guard.watch_container(entries)
                self._guard.watch(entries, entries)
            for name in _HOOKS:
                self._visit(getattr(part, name))
            for p in part._parameters.values():
                if p is not None:
                    self._guard.watch_gradient(p)
            self._guard.watch_absent(vars(part), {"forward"} - vars(part).keys())
            self._visit_attributes(vars(part), type(part))

    def _visit_optimizer(self, x: Optimizer) -> None:
        """Watch what a step of the user's own reads beside the state and the settings, which are watched by name."""
        if not is_library(package_of(type(x))):
            self._seen |= {id(part): part for part in (x.state, x.param_groups, x.defaults)}
            self._visit_object(x)

    def _visit_objective(self, x: TraceBeta_ELBO) -> None:
        """Watch everything but what is an input of the graph: the count of steps and the schedules."""
        for schedule in x.schedules:
            self._seen[id(schedule)] = schedule
        self._guard.watch(vars(x), (name for name in vars(x) if name != "step"))
        self._visit_all((type(x), *vars(x).values()))

    def _visit_class(self, x: type) -> None:
        if not is_library(package := package_of(x)):
            self._owned.append((vars(x), frozenset([package])))
            self._visit_all((type(x), *x.__mro__[1:]))

    def _visit_function(self, x: types.FunctionType) -> None:
        package = str(x.__globals__.get("__name__") or "").partition(".")[0]
        if not is_library(package):
            self._owned.append((vars(x), frozenset([package])))
        if self._execution is not None and id(x.__code__) not in self._execution.code:
            return  # whoever holds it watches which function it is
        for name, cell in zip(x.__code__.co_freevars, x.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            self._guard.watch_attributes("cell_contents", [cell], called=name)
            self._visit(value)
        if is_library(package):
            return
        for attribute in ("__defaults__", "__kwdefaults__", "__code__"):
            self._guard.watch_attributes(attribute, [x], called=x.__name__)
        self._visit_all((x.__defaults__, x.__kwdefaults__))
        if self._execution is None and not (is_installed(package) and package not in self._own):
            self._visit_code(x.__code__, x.__globals__, package)

    def _visit_code(self, code: types.CodeType, namespace: dict[str, Any], package: str) -> None:
        """Watch what code can read: globals and modules now, attributes when all names are known."""
        names = set(_names(code))
        if "globals" in names and not any(isinstance(x, str) and x in namespace for x in code.co_consts):
            self._swept.append(namespace)
        self._named[package if is_installed(package) and package not in self._own else ""] |= names
        used = sorted(names & namespace.keys())
        self._guard.watch(namespace, used)
        self._visit_all(namespace[name] for name in used)
        around = str(namespace.get("__package__") or "").split(".")
        prefixes = ["", *(".".join(around[:n]) + "." for n in range(1, len(around) + 1))]
        imported = (sys.modules.get(prefix + name) for prefix in prefixes for name in names)
        self._visit_all(module for module in imported if module is not None)

    def _visit_named(self) -> None:
        """Follow the attributes that the code names, which may lead to more code, and watch them in the end."""
        followed: set[tuple[int, str]] = set()
        while todo := [
            (entries, name)
            for entries, packages in self._owned
            for name in self._used(entries, packages)
            if (id(entries), name) not in followed
        ]:
            for entries, name in todo:
                followed.add((id(entries), name))
                self._visit(entries[name])
            self._drain()
        attributes = {name for entries, _ in self._owned for name in entries} & self._named[""]
        inherited = {
            name for entries, _ in self._owned if not isinstance(entries, dict) for name in entries
        } & attributes
        for entries, packages in self._owned:
            self._guard.watch(entries, self._used(entries, packages))
            may_hide = attributes if isinstance(entries, dict) else inherited  # what the classes above have
            self._guard.watch_absent(entries, may_hide - entries.keys())

    def _used(self, entries: Mapping[str, Any], packages: frozenset[str]) -> list[str]:
        """Return the names among ``entries`` that the code of the programs may ask for."""
        names = [self._named[package] for package in ("", *packages) if package in self._named]
        every = any(not _ANY_ATTRIBUTE.isdisjoint(part) for part in names)
        return [
            name
            for name, value in entries.items()
            if every
            or any(name in part for part in names)
            or (name.startswith("__") and name not in _MAKING and callable(value))
        ]


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names that code uses, and the strings by which it may look things up."""
    yield from code.co_names
    by_string = not _BY_STRING.isdisjoint(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
        elif by_string and isinstance(constant, str):
            yield constant


def _slots(kind: type) -> set[str]:
    """Return the slots that a class defines itself."""
    slots = vars(kind).get("__slots__", ())
    names = {slots} if isinstance(slots, str) else set(slots)
    return {
        f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
        for name in names - {"__dict__", "__weakref__"}
    }


@functools.cache
def _settings(kind: type) -> frozenset[str]:
    """Return the names that the libraries' classes above a user's class use in their methods."""
    above = [c for c in kind.__mro__ if package_of(c) in _FOLLOWED and c not in (nn.Module, PyroModule)]
    methods = [f for c in above for f in vars(c).values() if isinstance(f, types.FunctionType)]
    return frozenset(name for method in methods for name in _names(method.__code__))


def _cells(x: Any) -> list:
    """Return the contents of an array or a table, with its labels, as values that compare."""
    parts = [np.asarray(part) for part in (x, *getattr(x, "axes", ()))]
    return [(p.shape, p.dtype, list(map(repr, p.flat)) if p.dtype == object else p.tobytes()) for p in parts]


def _is_plain(x: Any) -> bool:
    return isinstance(x, VALUES) or (isinstance(x, tuple) and all(isinstance(part, VALUES) for part in x))
