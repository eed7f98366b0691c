"""Scenarios run without and with compilation: the small programs and comparisons of the tests of compiled steps.

``fallback_random=True`` draws the stream of an uncompiled run, so both must agree to rounding. Where only what is
captured matters, the fixture ``interpreted`` runs the captured graph operator by operator, without Inductor.
"""

import functools
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import nn

import pyro_elbo as pe
from pyro_elbo.compile import capture, inductor, store
from pyro_elbo.compile.scan import operators
from pyro_elbo.errors import PyroElboError

X = torch.tensor([0.3, -1.2, 0.8, 1.9], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def interpret(monkeypatch):
    """Run captured graphs without Inductor."""

    def compiled(graph, on_cpu):
        def call(inputs):
            sized = [x[: len(f)] if x.dim() == f.dim() == 1 else x for x, f in zip(inputs, graph.fakes, strict=True)]
            graph.module(*sized)  # rows of noise are longer than what is used of them

        return torch.no_grad()(call)

    monkeypatch.setattr(inductor, "compile_graph", compiled)
    monkeypatch.setattr(inductor, "entry_point", lambda compiled: None)
    monkeypatch.setattr(store, "key_of", lambda *arguments: None)
    monkeypatch.setattr(operators, "source_of", lambda *arguments: None)
    monkeypatch.setattr(operators, "_loops", weakref.WeakValueDictionary())


@pytest.fixture(name="interpreted")
def _interpreted(monkeypatch):
    """Run captured graphs without Inductor, simplified as they are for it."""
    interpret(monkeypatch)


@pytest.fixture(name="interpreted")
def _as_captured(monkeypatch):
    """Run captured graphs as they are, which takes a third less: for what depends on the capture alone."""

    def optimize(module, mode, fakes):
        module.recompile()
        return module

    interpret(monkeypatch)
    monkeypatch.setattr(capture, "optimize", optimize)


@pytest.fixture(name="scalar_loops")
def _scalar_loops(monkeypatch):
    """Run captured graphs without Inductor, but loops over scalars in C++: these loops, None for any other."""
    source_of, made = operators.source_of, []

    def noted(*arguments):
        made.append(source_of(*arguments))
        return made[-1]

    interpret(monkeypatch)
    monkeypatch.setattr(operators, "source_of", noted)
    return made


@pytest.fixture(name="graphs")
def _graphs(monkeypatch):
    """The graphs that are made during a test."""
    made = []
    make = capture.functional_graph

    def noted(*arguments):
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(capture, "functional_graph", noted)
    monkeypatch.setattr(store, "key_of", lambda *arguments: None)
    return made


def model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    loc = pyro.param("loc", lambda: torch.tensor(0.1))
    scale = pyro.param("scale", lambda: torch.tensor(0.5), constraint=constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale))


def adam(lr=0.1):
    return pyro.optim.Adam({"lr": lr})


def sampled(beta=1.0, **options):
    return pe.TraceBeta_ELBO(beta, kl="sampled", **options)


def parameters():
    return {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}


def run_both(scenario, **options):
    """What a scenario gives without and with compilation, from the same seed and an empty store."""
    results = []
    for compiled in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        results.append(scenario(functools.partial(pe.SVI, compile=compiled, fallback_random=True, **options)))
    return results


def assert_same(scenario, rtol=1e-9, atol=1e-12, **options):
    """A scenario gives the same without and with compilation."""
    eager, compiled = run_both(scenario, **options)
    torch.testing.assert_close(compiled, eager, rtol=rtol, atol=atol)


def network(size=3):
    return nn.Sequential(nn.Linear(1, size), nn.Tanh(), nn.Linear(size, 1))


def network_guide(net):
    def program(x):
        pyro.module("net", net)
        pyro.sample("z", dist.Normal(net(x[:1, None]).squeeze(), 0.5))

    return program


def state_of(optimizer):
    """Every number that an optimizer keeps."""
    return [torch.as_tensor(v) for s in optimizer.state.values() for v in s.values() if v is not None]


def train(svi, steps, *args):
    """Take steps one by one."""
    return [svi.step(*args) for _ in range(steps)]


def exact_or_refused(scenario, rtol=1e-9, atol=1e-12):
    """The error of what cannot be captured; what is captured must be right."""
    try:
        assert_same(scenario, rtol, atol)
    except PyroElboError as error:
        return str(error)
    return ""


def decoder_model(net):
    """A decoder in a closure: batch norm and dropout act as its mode says."""

    def program(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(net(z[:, None])[:, 0], 1.0), obs=x)

    return program


def widths(width):
    """The model with a width that a function gives."""

    def program(x, *args, **kwargs):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, width(*args, **kwargs)), obs=x)

    return program


def any_guide(x, *args, **kwargs):
    guide(x)


def changes(make_program, change):
    """Train, change something, and take the step that a stale graph would get wrong: the same without compilation."""

    def scenario(svi_of):
        program = make_program()
        svi = svi_of(program, any_guide, adam(), sampled())
        before = [svi.step(X) for _ in range(3)]
        change(program)
        return before, svi.step(X), parameters()

    return exact_or_refused(scenario)
