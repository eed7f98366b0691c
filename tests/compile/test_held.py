"""Globals, closures, containers, attributes and defaults that programs hold are watched: a stale graph never runs."""

import collections
import copy
import functools
import logging
import re
import threading
import types

import beartype
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from tqdm import tqdm

import pyro_elbo as pe
from pyro_elbo.errors import CompileError
from tests.compile.test_guard import Level
from tests.support.compiled import (  # noqa: F401  (fixtures work by name)
    X,
    _as_captured,
    _double,
    _graphs,
    adam,
    assert_same,
    changes,
    guide,
    model,
    sampled,
    train,
    widths,
)
from tests.support.rows import every_other

WIDTH, TABLE, ROW, ARRAY, FAMILY, SQUASH = 1.0, {"width": 1.0}, [1.0], np.array([1.0]), dist.Normal, torch.tanh
POINT, LEVEL, PART, TENSORS = (
    types.SimpleNamespace(width=1.0),
    Level.LOW,
    functools.partial(abs, 1.0),
    [torch.tensor(1.0)],
)
HELPER_MODULE = types.ModuleType("helper_module")
HELPER_MODULE.width = 1.0


class Box:
    shared = 1.0
    __slots__ = ("__dict__", "slot")

    def __init__(self):
        self.width = self.slot = 1.0

    def method(self):
        return WIDTH

    @property
    def computed(self):
        return WIDTH


class AttributeDict(dict):
    """A mapping with attributes beside its entries."""

    width = 1.0


class Dynamic:
    """An object that looks its attributes up in a table and raises KeyError for others."""

    def __init__(self):
        self.table = {"width": 1.0}

    def __getattr__(self, name):
        return self.__dict__["table"][name]

    def __deepcopy__(self, memo):
        return Dynamic()


SPACE = types.SimpleNamespace(a=types.SimpleNamespace(b=1.0), family=dist.Normal, row=[1.0], _hidden=1.0)


def with_attribute():
    return with_attribute.width


with_attribute.width = 1.0


def with_default(width=1.0, *, more=0.0):
    return width + more


def set_default(value):
    with_default.__defaults__ = (value,)


HELD = {
    "global number": (lambda: WIDTH, {"WIDTH": 3.0}),
    "global NumPy number": (lambda: float(WIDTH), {"WIDTH": np.int64(3)}),
    "global dict, another": (lambda: TABLE["width"], {"TABLE": {"width": 3.0}}),
    "global list, another": (lambda: ROW[0], {"ROW": [3.0]}),
    "global class": (lambda: 1.0 if FAMILY is dist.Normal else 3.0, {"FAMILY": dist.Laplace}),
    "global builtin": (lambda: SQUASH(torch.ones(())), {"SQUASH": torch.exp}),
    "global partial": (lambda: PART(), {"PART": functools.partial(abs, -3.0)}),
    "global object": (lambda: POINT.width, {"POINT": types.SimpleNamespace(width=3.0)}),
    "global enum": (lambda: float(LEVEL.value), {"LEVEL": Level.HIGH}),
    "global array, another": (lambda: float(ARRAY[0]), {"ARRAY": np.array([3.0])}),
    "global tensor, another": (lambda: TENSORS[0], {"TENSORS": [torch.tensor(3.0)]}),
}
CHANGED = {
    "dict entry": (lambda t: t["width"], {"width": 1.0}, lambda t: t.update(width=3.0)),
    "dict key": (lambda t: t.get("more", 1.0), {}, lambda t: t.update(more=3.0)),
    "nested dict": (lambda t: t["a"]["b"], {"a": {"b": 1.0}}, lambda t: t.update(a={"b": 3.0})),
    "ordered dict": (lambda t: t["a"], collections.OrderedDict(a=1.0), lambda t: t.update(a=3.0)),
    "list entry": (lambda t: t[0], [1.0], lambda t: t.__setitem__(0, 3.0)),
    "list length": (lambda t: float(len(t)), [1.0], lambda t: t.append(1.0)),
    "tuple in a list": (lambda t: t[0][0], [(1.0,)], lambda t: t.__setitem__(0, (3.0,))),
    "tensor in a list": (lambda t: t[0], [torch.tensor(1.0)], lambda t: t.__setitem__(0, torch.tensor(3.0))),
    "tensor in place": (lambda t: t, torch.tensor(1.0), lambda t: t.fill_(3.0)),
    "data of a tensor": (lambda t: t, torch.tensor(1.0), lambda t: setattr(t, "data", torch.tensor(3.0))),
    "set": (max, {1.0}, lambda t: t.add(3.0)),
    "deque": (lambda t: t[0], collections.deque([1.0]), lambda t: t.appendleft(3.0)),
    "array entry": (lambda t: float(t[0]), np.ones(1), lambda t: t.__setitem__(0, 3.0)),
    "large array": (lambda t: float(t.mean()), np.ones(100_000), lambda t: t.__setitem__(slice(None), 3.0)),
    "attribute": (lambda t: t.width, Box(), lambda t: setattr(t, "width", 3.0)),
    "slot": (lambda t: t.slot, Box(), lambda t: setattr(t, "slot", 3.0)),
    "nested namespace": (lambda t: t.a.b, SPACE, lambda t: setattr(t, "a", types.SimpleNamespace(b=3.0))),
    "class in a namespace": (
        lambda t: 1.0 if t.family is dist.Normal else 3.0,
        SPACE,
        lambda t: setattr(t, "family", dist.Laplace),
    ),
    "list in a namespace": (lambda t: t.row[0], SPACE, lambda t: setattr(t, "row", [3.0])),
    "private in a namespace": (lambda t: t._hidden, SPACE, lambda t: setattr(t, "_hidden", 3.0)),
    "attributes of a dict": (lambda t: t.width, AttributeDict(), lambda t: setattr(t, "width", 3.0)),
    "dynamic attribute": (lambda t: t.width, Dynamic(), lambda t: t.table.update(width=3.0)),
    "attribute of a function": (lambda t: t.width, with_attribute, lambda t: setattr(t, "width", 3.0)),
    "shadowed class attribute": (lambda t: t.shared, Box(), lambda t: setattr(t, "shared", 3.0)),
    "module attribute": (lambda t: HELPER_MODULE.width, None, lambda t: setattr(HELPER_MODULE, "width", 3.0)),
    "default argument": (lambda t: with_default(), None, lambda t: set_default(3.0)),
}


@pytest.fixture
def names(monkeypatch):
    """Return a function that sets globals of this file until the test ends."""
    return lambda values: [monkeypatch.setitem(globals(), name, value) for name, value in values.items()]


@pytest.mark.parametrize("name", HELD)
def test_globals(interpreted, names, name):
    width, new = HELD[name]
    old = {n: globals()[n] for n in new}

    def fresh():
        names(old)
        return widths(width)

    assert not changes(fresh, lambda _: names(new))


@pytest.mark.parametrize("name", every_other(CHANGED))
def test_contents(interpreted, monkeypatch, name):
    width, held, change = CHANGED[name]
    holder = []
    monkeypatch.setattr(HELPER_MODULE, "width", 1.0)
    monkeypatch.setattr(with_default, "__defaults__", (1.0,))

    def fresh():
        HELPER_MODULE.width = 1.0
        set_default(1.0)
        with_attribute.width = 1.0
        mine = copy.deepcopy(held)
        holder[:] = [mine]
        return widths(lambda: width(mine))

    message = changes(fresh, lambda _: change(holder[0]))
    assert not message or (name == "large array" and "torch.as_tensor" in message)


@pytest.mark.parametrize(
    "width", [Box().method, lambda: Box().computed, lambda: BOX.computed], ids=["method", "new", "property"]
)
def test_globals_behind_methods_and_properties(interpreted, names, width):
    def fresh():
        names({"WIDTH": 1.0})
        return widths(width)

    assert not changes(fresh, lambda _: names({"WIDTH": 3.0}))


BOX = Box()


def test_class_attributes(interpreted, monkeypatch):
    def fresh():
        monkeypatch.setattr(Box, "shared", 1.0)
        return widths(lambda: BOX.shared)

    assert not changes(fresh, lambda _: monkeypatch.setattr(Box, "shared", 3.0))


def test_a_closure_that_is_assigned_anew(interpreted):
    def fresh():
        width, table = 1.0, {"a": 1.0}

        def change():
            nonlocal width, table
            width, table = 2.0, {"a": 2.0}

        program = widths(lambda: width * table["a"])
        program.change = change
        return program

    assert not changes(fresh, lambda program: program.change())


class Trainer:
    """A class that owns its programs, and counters that they do not read."""

    def __init__(self, svi_of):
        self.epoch, self.losses = 0, []
        self.svi = svi_of(self.model, guide, adam(), sampled())

    def model(self, x):
        model(x)

    def fit(self, steps):
        for _ in range(steps):
            self.epoch += 1
            self.losses.append(self.svi.step(X))
        return self.losses


def test_counters_beside_the_programs_cost_no_graph(interpreted, graphs):
    assert_same(lambda svi_of: Trainer(svi_of).fit(20))
    assert len(graphs) == 1


def test_a_number_that_changes_at_every_step_is_refused(interpreted, graphs):
    """The step is refused before graphs add up."""
    count = [0]

    def width():
        count[0] += 1
        return 1.0 + count[0] % 3

    svi = pe.SVI(widths(width), guide, adam(), sampled(), compile=True)
    with pytest.raises(CompileError, match="list|width|count"):
        train(svi, 40, X)
    assert len(graphs) <= 2


def logs():
    logging.getLogger(__name__).debug("not shown")
    return 1.0


@beartype.beartype
def checked(width: float = 1.0) -> float:
    return width


def nest(depth):
    inner = []
    for _ in range(depth):
        inner = [inner]
    return inner


DEEP = nest(3000)
BAR = tqdm(total=1, disable=True)
HARMLESS = {
    "logging": logs,
    "a checked function": checked,
    "deep nesting": lambda: float(len(DEEP)),
    "a progress bar": lambda: float(BAR.total),
    "a compiled pattern": lambda: float(len(re.findall("a", "a"))),
    "a lock": lambda: 1.0 if threading.Lock() else 2.0,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_objects_of_libraries_cost_no_graph(interpreted, graphs, name):
    def scenario(svi_of):
        svi = svi_of(widths(HARMLESS[name]), guide, adam(), sampled())
        return train(svi, 5, X)

    assert_same(scenario)
    assert len(graphs) == 1
