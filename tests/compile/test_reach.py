"""Whatever programs read is found and watched, or refused by its name, however their code comes by it.

Each case trains, changes what one kind of expression reads, trains on, and must equal the uncompiled steps.
"""

import array
import collections
import contextvars
import ctypes
import dataclasses
import datetime
import functools
import importlib
import math
import multiprocessing
import operator
import os
import random
import sys
import textwrap
import time
import types
import weakref

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyro_elbo as pe
from tests.support.compiled import (  # noqa: F401  (fixtures work by name)
    X,
    _as_captured,
    _double,
    _graphs,
    adam,
    any_guide,
    changes,
    exact_or_refused,
    guide,
    model,
    parameters,
    sampled,
    train,
    widths,
)
from tests.support.rows import every_other

WIDTH, NAME = 1.0, "WIDTH"
LEVEL = contextvars.ContextVar("LEVEL", default=1.0)


@dataclasses.dataclass(slots=True)
class Base:
    width: float = 1.0


@dataclasses.dataclass(slots=True)
class Child(Base):
    more: float = 0.0


@dataclasses.dataclass
class Options:
    width: float = 1.0


class Private:
    __slots__ = ("__width",)

    def __init__(self):
        self.__width = 1.0

    def set(self, width):
        self.__width = width

    def get(self):
        return self.__width


class Meta(type):
    level = 1.0

    @property
    def width(cls):
        return cls.level


class WithMeta(metaclass=Meta):
    pass


class Descriptor:
    def __init__(self):
        self.value = 1.0

    def __get__(self, owner, kind=None):
        return self.value


def described():
    return type("Described", (), {"width": Descriptor(), "__module__": __name__})()


class Cached:
    @functools.cached_property
    def width(self):
        return WIDTH


class Box:
    """A box with a width."""

    def __init__(self):
        self.width = 1.0


class Pair(collections.namedtuple("Pair", "box other")):
    pass


class Record(dict):
    __slots__ = ("width",)


class Activation(nn.LeakyReLU):
    pass


class Norm(nn.BatchNorm1d):
    pass


class Shrunk(dist.Normal):
    pass


@functools.lru_cache
def remembered():
    return WIDTH


def namespace(**entries):
    return types.SimpleNamespace(**{"width": 1.0} | entries)


def module(**entries):
    made = types.ModuleType("made")
    vars(made).update({"width": 1.0} | entries)
    return made


def chained():
    return collections.ChainMap({}, {"width": 1.0})


def set_width(x):
    x.width = 3.0


def set_entry(x):
    x["width"] = 3.0


def set_first(x):
    x[0] = 3.0


def referred(make):
    """A box that holds another one strongly, and a reference to it."""
    inner = Box()
    return types.SimpleNamespace(inner=inner, reference=make(inner))


def set_inner(x):
    x.inner.width = 3.0


def outside(x):
    """Keep what is annotated from being taken as an argument of its own."""
    return x.width


# what is held, how the program reads it, how it changes
def inheriting():
    class Upper:
        width = 1.0

    class Lower(Upper):
        pass

    return Lower()


HELD = {
    "a module": (module, lambda m: m.width, set_width),
    "a module in an attribute": (lambda: namespace(m=module()), lambda b: b.m.width, lambda b: set_width(b.m)),
    "a module in a dict": (lambda: {"m": module()}, lambda d: d["m"].width, lambda d: set_width(d["m"])),
    "a module in a module": (lambda: module(sub=module()), lambda m: m.sub.width, lambda m: set_width(m.sub)),
    "a dict in a module": (
        lambda: module(table={"width": 1.0}),
        lambda m: m.table["width"],
        lambda m: set_entry(m.table),
    ),
    "UserDict": (lambda: collections.UserDict(width=1.0), lambda d: d["width"], set_entry),
    "UserList": (lambda: collections.UserList([1.0]), lambda d: d[0], set_first),
    "ChainMap": (
        lambda: collections.ChainMap({}, {"width": 1.0}),
        lambda d: d["width"],
        lambda d: set_entry(d.maps[1]),
    ),
    "a shadowing map": (lambda: collections.ChainMap({}, {"width": 1.0}), lambda d: d["width"], set_entry),
    "Counter": (lambda: collections.Counter(a=1), lambda c: float(c["a"]), lambda c: c.update(a=2)),
    "a proxy of a dict": (
        lambda: namespace(d=(d := {"width": 1.0}), p=types.MappingProxyType(d)),
        lambda b: b.p["width"],
        lambda b: set_entry(b.d),
    ),
    "a key of a dict": (lambda: {Box(): 0.0}, lambda d: next(k.width for k in d), lambda d: [set_width(k) for k in d]),
    "a slot of a base class": (Child, lambda b: b.width, set_width),
    "a private slot": (Private, lambda b: b.get(), lambda b: b.set(3.0)),
    "a slot of a dict": (lambda: Record(width=1.0), lambda d: d["width"], set_entry),
    "a field of a named tuple": (lambda: Pair(namespace(), 0), lambda p: p.box.width, lambda p: set_width(p.box)),
    "asdict": (Options, lambda o: sum(dataclasses.asdict(o).values()), set_width),
    "an attribute getter": (
        lambda: (namespace(), operator.attrgetter("width")),
        lambda p: p[1](p[0]),
        lambda p: set_width(p[0]),
    ),
    "a computed name": (namespace, lambda b: getattr(b, "wid" + "th"), set_width),
    "vars": (namespace, lambda b: vars(b)["width"], set_width),
    "a descriptor": (described, lambda b: b.width, lambda b: setattr(vars(type(b))["width"], "value", 3.0)),
    "a weak reference": (lambda: referred(weakref.ref), lambda b: b.reference().width, set_inner),
    "a weak proxy": (lambda: referred(weakref.proxy), lambda b: b.reference.width, set_inner),
    "a weak dict": (
        lambda: referred(lambda x: weakref.WeakValueDictionary(x=x)),
        lambda b: b.reference["x"].width,
        set_inner,
    ),
    "a dead reference": (
        lambda: namespace(held=[box := Box()], reference=weakref.ref(box)),
        lambda b: 3.0 if b.reference() is None else 1.0,
        lambda b: b.held.clear(),
    ),
    "a bytearray": (lambda: bytearray(b"\1"), lambda b: float(b[0]), lambda b: b.__setitem__(0, 3)),
    "an array": (lambda: array.array("d", [1.0]), lambda a: a[0], set_first),
    "a ctypes number": (lambda: ctypes.c_double(1.0), lambda c: c.value, lambda c: setattr(c, "value", 3.0)),
    "a shared number": (lambda: multiprocessing.Value("d", 1.0), lambda c: c.value, lambda c: setattr(c, "value", 3.0)),
    "an array with NaN": (lambda: np.array([1.0, np.nan]), lambda a: float(a[0]), set_first),
    "an array of objects": (lambda: np.array([1.0, None]), lambda a: a[0], set_first),
    "a box in an array": (lambda: np.array([Box()]), lambda a: a[0].width, lambda a: set_width(a[0])),
    "a cell of a table": (
        lambda: pd.DataFrame({"w": [1.0], "s": ["x"]}),
        lambda t: float(t.loc[0, "w"]),
        lambda t: t.__setitem__("w", [3.0]),
    ),
    "a label of a table": (
        lambda: pd.Series([1.0, 3.0], index=["a", "b"]),
        lambda t: float(t["a"]),
        lambda t: setattr(t, "index", ["b", "a"]),
    ),
    "a variable of a dataset": (
        lambda: xr.Dataset({"w": ("i", [1.0])}),
        lambda d: float(d["w"].values[0]),
        lambda d: d["w"].values.__setitem__(0, 3.0),
    ),
    "another variable of a dataset": (
        lambda: xr.Dataset({"w": ("i", [1.0])}),
        lambda d: float(d["w"].values[0]),
        lambda d: d.__setitem__("w", ("i", [3.0])),
    ),
    "a slope of a subclass": (
        lambda: Activation(1.0),
        lambda f: f(torch.tensor(-1.0)).abs(),
        lambda f: setattr(f, "negative_slope", 3.0),
    ),
    "the mode of a subclass": (lambda: Norm(1), lambda f: 0.3 + f(X[:, None] * 3)[:, 0].abs(), lambda f: f.eval()),
    "the momentum of a subclass": (
        lambda: Norm(1, momentum=0.1),
        lambda f: 0.3 + f(X[:, None] * 3)[:, 0].abs() + f.running_mean.abs(),
        lambda f: setattr(f, "momentum", 0.9),
    ),
    "a scale of a subclass": (
        lambda: Shrunk(0.0, torch.tensor(1.0)),
        lambda d: d.stddev,
        lambda d: setattr(d, "scale", torch.tensor(3.0)),
    ),
    "a hook of a module": (
        lambda: nn.Identity(),
        lambda f: f(torch.ones(())),
        lambda f: f.register_forward_hook(lambda m, i, o: 3 * o),
    ),
    "a computed default": (
        lambda: namespace(f=lambda width=1.0: width),
        lambda b: b.f(),
        lambda b: setattr(b.f, "__defaults__", (3.0,)),
    ),
    "an objective of the same name": (namespace, outside, set_width),
    "what a subclass comes to hide": (inheriting, lambda b: b.width, lambda b: setattr(type(b), "width", 3.0)),
    "the sign of a zero": (
        lambda: namespace(zero=0.0),
        lambda b: 2.0 + math.copysign(1.0, b.zero),
        lambda b: setattr(b, "zero", -0.0),
    ),
}


@pytest.mark.parametrize("name", every_other(HELD))
def test_what_a_program_holds(interpreted, name):
    make, read, change = HELD[name]
    holder = []

    def fresh():
        held = make()
        holder[:] = [held]
        return widths(lambda: read(held))

    assert not changes(fresh, lambda _: change(holder[0]))


# --- globals and modules, however the code comes by them --------------------------------------------------------------


def imported():
    from tests.compile import test_reach

    return test_reach.WIDTH


def imported_by_name():
    return importlib.import_module("tests.compile.test_reach").WIDTH


def in_an_inner_function():
    def inner():
        return sys.modules["tests.compile.test_reach"].WIDTH

    return inner()


def default_module(module=sys.modules[__name__]):
    return module.WIDTH


GLOBAL = {
    "globals()": lambda: globals()["WIDTH"],
    "globals() by a computed name": lambda: globals()[NAME[:2] + "DTH"],
    "eval": lambda: eval("WIDTH"),
    "eval of a computed text": lambda: eval(NAME + " * 1"),
    "exec": lambda: exec("global RESULT; RESULT = WIDTH") or RESULT,  # noqa: F821
    "an import inside": imported,
    "an import by name": imported_by_name,
    "sys.modules": in_an_inner_function,
    "a default that is a module": default_module,
    "a cached property": lambda: Cached().width,
}


@pytest.mark.parametrize("name", GLOBAL)
def test_a_global(interpreted, monkeypatch, name):
    def fresh():
        monkeypatch.setitem(globals(), "WIDTH", 1.0)
        monkeypatch.setitem(globals(), "RESULT", 1.0)
        return widths(lambda: GLOBAL[name]())

    message = changes(fresh, lambda _: monkeypatch.setitem(globals(), "WIDTH", 3.0))
    assert not message or (name == "exec" and "'RESULT'" in message)


def test_metaclasses(interpreted, monkeypatch):
    def fresh():
        monkeypatch.setattr(Meta, "level", 1.0)
        return widths(lambda: WithMeta.width)

    assert not changes(fresh, lambda _: monkeypatch.setattr(Meta, "level", 3.0))


@pytest.mark.parametrize("clear", [False, True])
def test_a_cache_keeps_its_value_until_it_is_cleared(interpreted, monkeypatch, clear):
    def fresh():
        monkeypatch.setitem(globals(), "WIDTH", 1.0)
        remembered.cache_clear()
        return widths(lambda: remembered())

    def change(_):
        monkeypatch.setitem(globals(), "WIDTH", 3.0)
        if clear:
            remembered.cache_clear()

    assert not changes(fresh, change)


@pytest.mark.parametrize("read", [os.getenv, os.environ.get, lambda name: dict(os.environ).get(name)])
def test_an_environment_variable(interpreted, monkeypatch, read):
    def fresh():
        monkeypatch.delenv("WIDTH", raising=False)
        return widths(lambda: float(read("WIDTH") or 1.0))

    assert not changes(fresh, lambda _: monkeypatch.setenv("WIDTH", "3"))


@pytest.mark.parametrize("read", [LEVEL.get, lambda: LEVEL.get(), lambda: contextvars.copy_context()[LEVEL]])
def test_a_context_variable(interpreted, read):
    def fresh():
        LEVEL.set(1.0)
        return widths(read)

    assert not changes(fresh, lambda _: LEVEL.set(3.0))


# --- installed packages -----------------------------------------------------------------------------------------------

PACKAGE = """
    import pyro
    import pyro.distributions as dist
    from {name} import settings

    WIDTH, TABLE = 1.0, {{"width": 1.0}}

    class Config:
        def __init__(self):
            self._content = {{"width": 1.0}}
        def __getattr__(self, name):
            return self.__dict__["_content"][name]

    CONFIG = Config()

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            width = WIDTH * TABLE["width"] * CONFIG.width * settings.WIDTH
            pyro.sample("x", dist.Normal(z, width), obs=x)
"""
IN_PACKAGE = {
    "a global": lambda p: setattr(p, "WIDTH", 3.0),
    "an entry": lambda p: set_entry(p.TABLE),
    "a content": lambda p: set_entry(p.CONFIG._content),
    "a global of another module": lambda p: setattr(p.settings, "WIDTH", 3.0),
}


@pytest.fixture(scope="module", params=["site-packages", "pyro"])
def package(request, tmp_path_factory):
    """A package where installers put packages, or in a folder that is named as a library."""
    folder = tmp_path_factory.mktemp("lib") / request.param
    name = f"project_in_{request.param.replace('-', '_')}"
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(textwrap.dedent(PACKAGE.format(name=name)))
    (folder / name / "settings.py").write_text("WIDTH = 1.0")
    sys.path.insert(0, str(folder))
    yield importlib.import_module(name)
    sys.path.remove(str(folder))


@pytest.mark.parametrize("around", every_other([True, False]))
@pytest.mark.parametrize("name", IN_PACKAGE)
def test_a_program_of_an_installed_package(interpreted, package, name, around):
    """Also where only a program around it is the user's own."""

    def fresh():
        package.WIDTH = package.settings.WIDTH = package.TABLE["width"] = package.CONFIG._content["width"] = 1.0
        return (lambda x: package.model(x)) if around else package.model

    assert not changes(fresh, lambda _: IN_PACKAGE[name](package))


# --- what cannot be watched is refused by name ------------------------------------------------------------------------


def drawn_inside():
    import random as inside

    return 1.0 + inside.gauss(0.0, 0.1)


def drawn_by_numpy_inside():
    import numpy.random as inside

    return 1.0 + inside.rand()  # noqa: NPY002


def torch_script(x: torch.Tensor) -> torch.Tensor:
    return x.exp()


GENERATOR = torch.Generator()

REFUSED = {
    "torch.Generator": lambda: 1.0 + torch.rand((), generator=GENERATOR),
    "torch.jit.script": functools.partial(torch.jit.script(torch_script), torch.zeros(())),
    "torch.jit.trace": functools.partial(torch.jit.trace(nn.Softplus(), torch.zeros(1)), torch.zeros(())),
    "time.time": lambda: 1.0 + time.time() % 1,
    "time.perf_counter": lambda: 1.0 + time.perf_counter() % 1,
    "time.monotonic": functools.partial(time.monotonic),
    "datetime.now": lambda: 1.0 + datetime.datetime.now().second,
    "random.random": drawn_inside,
    "random numbers": drawn_by_numpy_inside,
    "urandom": lambda: 1.0 + random.SystemRandom().random(),
    "stat": lambda: 1.0 + os.path.getmtime(__file__) % 1,
    "io.open": lambda: float(len(open(__file__).read())),  # noqa: PTH123, SIM115
    "sys._getframe": lambda: float(sys._getframe().f_lineno),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_what_no_graph_can_follow_is_refused_by_name(interpreted, name):
    svi = pe.SVI(widths(REFUSED[name]), any_guide, adam(), sampled(), compile=True)
    svi.step(X)
    with pytest.raises(pe.errors.CompileError, match=name.replace(".", r"\.")):
        svi.step(X)


# --- objectives and optimizers ----------------------------------------------------------------------------------------


class Tilted(pe.TraceBeta_ELBO):
    """A bound times a factor that an attribute, a class attribute, a table and a global give."""

    shared = 1.0

    def __init__(self, **options):
        super().__init__(**options)
        self.factor, self.table = 1.0, {"factor": 1.0}

    def bound(self, *args):
        return self.factor * self.shared * self.table["factor"] * WIDTH * super().bound(*args)


@pytest.mark.parametrize(
    "change",
    [
        lambda svi, patch: setattr(svi.loss, "factor", 3.0),
        lambda svi, patch: svi.loss.table.update(factor=3.0),
        lambda svi, patch: patch.setattr(Tilted, "shared", 3.0),
        lambda svi, patch: patch.setitem(globals(), "WIDTH", 3.0),
    ],
    ids=["attribute", "table", "class", "global"],
)
def test_attributes_of_an_objective(interpreted, change):
    def scenario(svi_of):
        with pytest.MonkeyPatch.context() as patch:
            svi = svi_of(model, guide, adam(), Tilted(kl="sampled"))
            losses = train(svi, 3, X)
            change(svi, patch)
            return [*losses, *train(svi, 3, X)], parameters()

    assert not exact_or_refused(scenario)


def test_functions_of_a_penalty(interpreted):
    def scenario(svi_of):
        table = {"factor": 1.0}
        loss = pe.TraceMI_ELBO(
            latent="z", attribute=lambda x: table["factor"] * x, weight=2.0, estimator="hsic", kl="sampled"
        )
        svi = svi_of(rows, row_guide, adam(), loss)
        losses = train(svi, 3, X)
        table["factor"] = -3.0
        losses += train(svi, 3, X)
        loss.penalties = type(loss.penalties)([dataclasses.replace(loss.penalties[0], weight=9.0)])
        return [*losses, *train(svi, 3, X)], parameters()

    message = exact_or_refused(scenario)
    assert not message, message


def leaf():
    return pyro.param("loc").unconstrained()


def rows(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def row_guide(x):
    loc = pyro.param("loc", lambda: torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc * x, 0.5))


def after_a_change(change, make_optimizer=adam, make_loss=sampled):
    def scenario(svi_of):
        svi = svi_of(model, guide, make_optimizer(), make_loss())
        losses = train(svi, 4, X)
        change(svi)
        return [*losses, *train(svi, 4, X)], parameters()

    return exact_or_refused(scenario)


@pytest.mark.parametrize(
    "change",
    [
        lambda svi: leaf().requires_grad_(False),
        lambda svi: leaf().register_hook(lambda g: 0 * g),
        lambda svi: svi.optim.optim_objs.clear(),
        lambda svi: svi.optim.optim_objs.update({leaf(): torch.optim.SGD([leaf()], lr=0.0)}),
        lambda svi: svi.optim.grad_clip.update({leaf(): lambda p: p.grad.mul_(0.1)}),
        lambda svi: pyro.get_param_store()._constraints.update(scale=dist.constraints.greater_than(0.1)),
    ],
    ids=["requires_grad", "hook", "cleared", "another optimizer", "clipping", "constraint"],
)
def test_parameters_and_their_optimizers(interpreted, change):
    assert not after_a_change(change)


def test_a_hook_that_goes_or_comes(interpreted):
    handles = []

    def change(_):
        for handle in handles:
            handle.remove()
        handles[:] = [leaf().register_hook(lambda g: g * 0.5)]

    def scenario(svi_of):
        svi = svi_of(model, guide, adam(), sampled())
        losses = train(svi, 4, X)
        for _ in range(3):
            change(svi)
            losses += train(svi, 3, X)
        handles.pop().remove()
        return [*losses, *train(svi, 3, X)], parameters()

    assert not exact_or_refused(scenario)


def test_a_hook_of_a_parameter_reads_what_is_watched(interpreted):
    def scenario(svi_of):
        svi, box = svi_of(model, guide, adam(), sampled()), {"factor": 0.5}
        losses = train(svi, 2, X)
        leaf().register_hook(lambda g: g * box["factor"])
        losses += train(svi, 3, X)
        box["factor"] = -1.0
        return [*losses, *train(svi, 3, X)], parameters()

    assert not exact_or_refused(scenario)


def test_priors_of_a_pyro_module(interpreted):
    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.z = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, x):
            z = self.z
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def change(program):
        program.z = PyroSample(dist.Normal(2.0, 0.3))

    assert not changes(Regression, change)


# --- no false alarms --------------------------------------------------------------------------------------------------


class Trainer:
    """A class whose other methods look attributes up by computed names, and whose counters change."""

    def __init__(self, svi_of):
        self.epoch, self.state, self.started = 0, {"n": 0}, time.time()
        self.svi = svi_of(self.model, guide, adam(), sampled())

    def model(self, x):
        model(x)

    def fit(self, steps):
        for _ in range(steps):
            self.epoch += 1
            self.state["n"] += 1
            self.last = [getattr(self, name) for name in ("epoch", "state")], time.time(), globals(), random.random()
            self.svi.step(X)
        return parameters()


def test_what_runs_beside_the_programs_costs_no_graph(interpreted, graphs):
    assert not exact_or_refused(lambda svi_of: Trainer(svi_of).fit(20))
    assert len(graphs) == 1


def test_a_schedule_that_counts_its_calls_costs_no_graph(interpreted, graphs):
    class Halving(pe.schedules.Schedule):
        def __init__(self):
            self.calls = 0

        def __call__(self, step):
            self.calls += 1
            return 0.5**step

        @property
        def settled(self):
            return 10_000

    def scenario(svi_of):
        return train(svi_of(model, guide, adam(), sampled(Halving())), 20, X)

    assert not exact_or_refused(scenario)
    assert len(graphs) == 1


def test_a_profiler_around_the_steps(interpreted):
    def scenario(svi_of):
        sys.setprofile(lambda *event: None)
        try:
            return train(svi_of(model, guide, adam(), sampled()), 4, X)
        finally:
            sys.setprofile(None)

    assert not exact_or_refused(scenario)


def test_code_that_the_first_run_did_not_reach(interpreted):
    """The capture notices code that is new to it, and the guard then watches what that code reads."""
    settings = types.SimpleNamespace(width=1.0)

    def later():
        return settings.width

    def run(compile):
        settings.width, seen = 1.0, []

        def program(x):
            width = later() if seen else 1.0
            if not seen:
                seen.append(True)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(z, width), obs=x)

        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = pe.SVI(program, guide, adam(), sampled(), compile=compile, fallback_random=True)
        before = [svi.step(X) for _ in range(4)]
        settings.width = 2.0
        return before + [svi.step(X) for _ in range(4)]

    assert run(True) == pytest.approx(run(False), rel=1e-9)
