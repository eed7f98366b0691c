"""Comparison of what a captured graph relies on with what is there now.

A graph holds tensors by identity and Python values as constants. A :class:`Guard` keeps the entries, attributes and
containers that they came from, with the values that they had, and says before each step whether one has changed.
:mod:`pyro_elbo.compile.reach` finds what to watch.
"""

import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain
from operator import contains, eq, getitem, is_
from typing import Any

import numpy as np
from torch import Tensor

VALUES = (bool, int, float, complex, str, bytes, type(None), Tensor, np.generic)


class Guard:
    """Watched entries of mappings, attributes and containers, and the values that they had.

    Attributes:
        generators: random generators of Python and NumPy that the programs can reach.
        refused: objects of the programs that cannot be watched, each with its cure.
    """

    def __init__(self) -> None:
        self.generators: list[Any] = []
        self.refused: list[str] = []
        self._mappings: list[tuple[Mapping | Callable[[], Mapping], tuple, tuple]] = []
        self._absent: list[tuple[Mapping, frozenset]] = []
        self._attributes: list[tuple[Any, str, Any, str]] = []
        self._containers: list[tuple[Collection, tuple]] = []
        self._watched: set[tuple[int, str]] = set()  # owners and names of attributes; containers
        self._contents: list[tuple[Any, Callable[[Any], Any], Any]] = []
        self._references: list[tuple[weakref.ReferenceType, bool]] = []

    def watch(self, holder: Mapping | Callable[[], Mapping], keys: Iterable) -> None:
        """Watch the entries of ``holder``, or of the mapping that it returns, under ``keys``."""
        keys = tuple(keys)
        if keys:
            self._mappings.append((holder, keys, tuple(map(_held(holder).__getitem__, keys))))

    def watch_absent(self, holder: Mapping, keys: Iterable) -> None:
        """Watch that ``holder`` gets no entry under ``keys``."""
        self._absent.append((holder, frozenset(keys)))

    def watch_container(self, container: Collection) -> None:
        """Watch the items of a list, set or deque, or the keys of a dictionary."""
        if (id(container), "") not in self._watched:
            self._watched.add((id(container), ""))
            self._containers.append((container, tuple(container)))

    def watch_gradient(self, p: Tensor) -> None:
        """Watch whether a parameter is trained, and the hooks on its gradient."""
        for name in ("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks"):
            self.watch_attributes(name, [p])
        for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks):
            if hooks is not None:
                self.watch_container(hooks)

    def watch_attributes(self, name: str, owners: Iterable[Any], called: str | None = None) -> None:
        """Watch one attribute of several objects; :meth:`broken` reports it as ``called``."""
        for owner in owners:
            if (id(owner), name) not in self._watched:
                self._watched.add((id(owner), name))
                self._attributes.append((owner, name, getattr(owner, name, None), called or name))

    def watch_contents(self, x: Any, read: Callable[[Any], Any]) -> None:
        """Watch by value what ``read(x)`` returns."""
        self._contents.append((x, read, read(x)))

    def watch_alive(self, reference: weakref.ReferenceType) -> None:
        """Watch whether the referent of a weak reference lives."""
        self._references.append((reference, reference() is not None))

    def broken(self) -> str | None:
        """Return the name of something watched that has changed, or None."""
        changed = None if self._columns.untouched() else self._changed()
        return changed or next((_describe(x) for x, read, old in self._contents if read(x) != old), None)

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

    @functools.cached_property
    def _columns(self) -> "_Columns":
        """The columns of everything watched when the guard is first asked."""
        return _Columns(self._mappings, self._attributes, self._absent, self._containers, self._references)

    def _changed(self) -> str | None:
        for holder, keys, values in self._mappings:
            held = _held(holder)
            for key, old in zip(keys, values, strict=True):
                try:
                    new = held[key]
                except KeyError:
                    return _describe(key)
                if not same(new, old):
                    return _describe(key)
        for owner, attribute, value, name in self._attributes:
            if not same(getattr(owner, attribute, None), value):
                return name
        for holder, names in self._absent:
            if not names.isdisjoint(holder):
                return _describe(next(iter(names & holder.keys())))
        if any((reference() is not None) != alive for reference, alive in self._references):
            return "a weak reference"
        for container, items in self._containers:
            if len(container) != len(items) or not all(map(is_, container, items)):
                return f"a {type(container).__name__} of length {len(items)}"
        return None


class _Columns:
    """The watched values in columns, which loops in C compare by identity: before most steps, nothing was touched."""

    def __init__(self, mappings: list, attributes: list, absent: list, containers: list, references: list) -> None:
        fixed = [mapping for mapping in mappings if not callable(mapping[0])]
        self._called = [mapping for mapping in mappings if callable(mapping[0])]
        entries = [(holder, *pair) for holder, keys, values in fixed for pair in zip(keys, values, strict=True)]
        self._entries = _transpose(entries, 3)
        self._attributes = _transpose([(owner, attribute, value) for owner, attribute, value, _ in attributes], 3)
        self._absent = _transpose([(holder, name) for holder, names in absent for name in names], 2)
        self._containers = [container for container, _ in containers]
        self._lengths = [len(items) for _, items in containers]
        self._items = [item for _, items in containers for item in items]
        self._references = references

    def untouched(self) -> bool:
        """Return whether every value is the same object as before."""
        try:
            return (
                all(map(is_, map(getitem, *self._entries[:2]), self._entries[2]))
                and all(map(is_, map(getattr, *self._attributes[:2]), self._attributes[2]))
                and not any(map(contains, *self._absent))
                and all(map(eq, map(len, self._containers), self._lengths))
                and all(map(is_, chain.from_iterable(self._containers), self._items))
                and all((reference() is not None) == alive for reference, alive in self._references)
                and all(all(map(is_, map(holder().__getitem__, keys), values)) for holder, keys, values in self._called)
            )
        except (KeyError, AttributeError):
            return False


def _held(holder: Any) -> Any:
    return holder() if callable(holder) else holder


def _transpose(rows: list[tuple], width: int) -> list[tuple]:
    return list(zip(*rows, strict=True)) or [()] * width


def _describe(x: Any) -> str:
    if isinstance(x, str):
        return x
    return f"a {type(x).__name__} of shape {x.shape}" if hasattr(x, "shape") else f"an entry of a {type(x).__name__}"


def same(a: Any, b: Any) -> bool:
    """Return whether two values are one object, or equal plain values."""
    plain = isinstance(a, VALUES) and not isinstance(a, Tensor)
    return a is b or (plain and type(a) is type(b) and repr(a) == repr(b))  # 0.0 == -0.0
