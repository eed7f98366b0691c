"""Whatever Python froze in a graph is noticed when it changes: a stale graph never runs.

Each case trains, changes one thing, trains on, and must give what the uncompiled steps give.
"""

import collections
import copy
import enum
import functools
import gc
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_elbo as pe
from pyro_elbo.errors import CompileError
from tests.compiled import (  # noqa: F401  (fixtures work by name)
    X,
    _double,
    _graphs,
    _interpreted,
    adam,
    any_guide,
    assert_same,
    changes,
    exact_or_refused,
    guide,
    model,
    parameters,
    sampled,
    train,
    widths,
)

# --- arguments ---------------------------------------------------------------------------------------------------


def of_arguments(program, calls):
    """Each call three times in turn: the same without and with compilation."""

    def scenario(svi_of):
        svi = svi_of(program, any_guide, adam(), sampled())
        return [svi.step(*args, **kwargs) for args, kwargs in calls for _ in range(3)], parameters()

    assert_same(scenario)


class Level(enum.Enum):
    LOW = 1
    HIGH = 3


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (1.0, 3.0),
        (1, 3),
        (True, 3),
        (np.int64(1), np.int64(3)),
        (np.float64(1), np.float32(3)),
        (Level.LOW, Level.HIGH),
    ],
)
def test_plain_arguments(interpreted, low, high):
    def number(level=1.0):
        return float(level.value if isinstance(level, Level) else level)

    of_arguments(widths(number), [((X, low), {}), ((X, high), {}), ((X,), {"level": low}), ((X,), {})])


def test_temporary_arguments_are_not_confused_by_their_address(interpreted):
    def scenario(svi_of):
        svi = svi_of(widths(lambda box: box.level), any_guide, adam(), sampled())
        first = [svi.step(X, types.SimpleNamespace(level=1.0)) for _ in range(3)]
        gc.collect()
        return first, [svi.step(X, types.SimpleNamespace(level=level)) for level in (5.0, 2.0, 7.0)]

    message = exact_or_refused(scenario)
    assert not message or "compile=False" in message


def test_nested_arguments(interpreted, graphs):
    def from_nest(nest, *, options):
        (first, second), table = nest
        return (first + second * 2 + table["width"]) * options["factor"]

    one, two = torch.tensor(1.0), torch.tensor(2.0)
    calls = [
        ((X, ((one, two), {"width": one})), {"options": {"factor": 1.0}}),
        ((X, ((one, one), {"width": two})), {"options": {"factor": 1.0}}),
        ((X, ((one, two), {"width": one})), {"options": {"factor": 2.0}}),
        ((X, [(one, two), {"width": two, "more": 1}]), {"options": {"factor": 2.0}}),
    ]
    of_arguments(widths(from_nest), calls)
    assert len(graphs) == 3


def test_one_tensor_as_two_arguments(interpreted, graphs):
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    of_arguments(widths(lambda a, b: a + 2 * b), [((X, one, one), {}), ((X, one, two), {}), ((X, two, one), {})])


@pytest.mark.parametrize("together", [False, True])
def test_an_argument_that_the_program_changes(interpreted, together):
    """x -= 1 is done to the caller's tensor, and seen in another argument that is the same tensor, or it is refused."""

    def scenario(svi_of):
        def program(x, y):
            x -= 0.1
            model(y)

        svi = svi_of(program, any_guide, adam(), sampled())
        x, y = X.clone(), X.clone()
        losses = [svi.step(x, y) for _ in range(3)]
        return losses, [svi.step(y, y) for _ in range(3 if together else 0)], x, y

    message = exact_or_refused(scenario)
    assert not message or "in place" in message


def test_shapes_dtypes_and_layouts(graphs):
    """Machine code: another shape, precision or layout of the data is another graph, or the same and right."""

    def scenario(svi_of):
        svi = svi_of(model, guide, adam(), sampled())
        wide = torch.arange(8.0).reshape(4, 2)
        data = [X, wide[:, 1], X[:1].expand(4), X.float(), X[1:], torch.cat([X, X])[3:7], X.flip(0)]
        return [svi.step(x) for x in data for _ in range(3)], parameters()

    assert_same(scenario, rtol=1e-7, atol=1e-8)
    assert len(graphs) <= 5


def test_the_last_batch_costs_one_graph(graphs):
    data = torch.linspace(-1.0, 2.0, 10)

    def scenario(svi_of):
        svi = svi_of(model, guide, adam(), sampled())
        return [svi.step(batch) for _ in range(5) for batch in data.split(4)], parameters()

    assert_same(scenario)
    assert len(graphs) == 2


def test_many_shapes_that_do_repeat(interpreted, graphs):
    """Lengths that differ from batch to batch are compiled one after another, as long as they come again."""

    def scenario(svi_of):
        svi = svi_of(model, guide, adam(), sampled())
        return [svi.step(X[:n]) for _ in range(4) for n in (1, 2, 3, 4)], parameters()

    assert_same(scenario)
    assert len(graphs) == 4


# --- modes and settings ------------------------------------------------------------------------------------------


def test_settings_of_pyro_and_torch(interpreted):
    """Validation off: what raised before trains on, as in eager; the default precision is part of the graph."""

    def scenario(svi_of):
        svi = svi_of(widths(lambda: torch.ones(())), any_guide, adam(), sampled())
        losses = [svi.step(X) for _ in range(3)]
        pyro.enable_validation(False)
        losses += [svi.step(X) for _ in range(3)]
        torch.set_default_dtype(torch.float32)
        losses += [svi.step(X) for _ in range(3)]
        torch.set_default_dtype(torch.float64)
        pyro.enable_validation(True)
        return [*losses, svi.step(X)], parameters()

    assert_same(scenario)


def test_handlers_around_the_step(interpreted, graphs):
    def scenario(svi_of):
        svi = svi_of(model, guide, adam(), sampled())
        losses = [svi.step(X) for _ in range(3)]
        with poutine.scale(scale=3.0):
            losses += [svi.step(X) for _ in range(3)]
        return [*losses, svi.step(X)], parameters()

    assert_same(scenario)
    assert len(graphs) == 1


def test_handlers_around_the_programs(interpreted):
    """A tensor inside of a handler acts when it changes, in place or by another one."""

    def scenario(svi_of):
        factor, given = torch.tensor(2.0), {"w": torch.tensor(0.3)}

        def program(x):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            model(x + w)

        conditioned = pyro.condition(program, data=given)
        svi = svi_of(
            poutine.scale(conditioned, scale=factor), poutine.scale(guide, scale=factor), adam(), pe.TraceBeta_ELBO()
        )
        losses = [svi.step(X) for _ in range(3)]
        factor.fill_(5.0)
        losses += [svi.step(X) for _ in range(2)]
        given["w"] = torch.tensor(3.0)
        return [*losses, *(svi.step(X) for _ in range(3))], parameters()

    assert_same(scenario)


# --- what programs hold ------------------------------------------------------------------------------------------

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
    "shadowed class attribute": (lambda t: t.shared, Box(), lambda t: setattr(t, "shared", 3.0)),
    "module attribute": (lambda t: HELPER_MODULE.width, None, lambda t: setattr(HELPER_MODULE, "width", 3.0)),
    "default argument": (lambda t: with_default(), None, lambda t: set_default(3.0)),
}


@pytest.fixture
def names(monkeypatch):
    """Sets globals of this file for the time of a test."""
    return lambda values: [monkeypatch.setitem(globals(), name, value) for name, value in values.items()]


@pytest.mark.parametrize("name", HELD)
def test_globals(interpreted, names, name):
    width, new = HELD[name]
    old = {n: globals()[n] for n in new}

    def fresh():
        names(old)
        return widths(width)

    assert not changes(fresh, lambda _: names(new))


@pytest.mark.parametrize("name", CHANGED)
def test_contents(interpreted, monkeypatch, name):
    width, held, change = CHANGED[name]
    holder = []
    monkeypatch.setattr(HELPER_MODULE, "width", 1.0)
    monkeypatch.setattr(with_default, "__defaults__", (1.0,))

    def fresh():
        HELPER_MODULE.width = 1.0
        set_default(1.0)
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
    """A class of the usual kind: counters that its programs do not read must not cost a graph."""

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
    """Not one graph for every second step."""
    count = [0]

    def width():
        count[0] += 1
        return 1.0 + count[0] % 3

    svi = pe.SVI(widths(width), guide, adam(), sampled(), compile=True)
    with pytest.raises(CompileError, match="list|width|count"):
        train(svi, 40, X)
    assert len(graphs) <= 2
