"""Particles in a loop: captured once, with the draws of an uncompiled run; one by one where they are not alike."""

import logging

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyro_elbo as pe
from tests.benchmarks.recurrences_ours import WORKS, data
from tests.support.compiled import (  # noqa: F401
    X,
    _as_captured,
    _double,
    _graphs,
    adam,
    assert_same,
    decoder_model,
    guide,
    model,
    parameters,
    sampled,
    train,
)
from tests.support.rows import every_other

LOCALS = 2


def local_model(x):
    """Latents in a plate and outside, the first without a pathwise gradient, and noise outside of any site."""
    kind = pyro.sample("kind", dist.Bernoulli(0.3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(kind, 1.0).expand([len(x), LOCALS]).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1) + torch.randn(()), 1.0), obs=x)


def local_guide(x):
    p = pyro.param("p", torch.tensor(0.4), constraint=dist.constraints.unit_interval)
    kind = pyro.sample("kind", dist.Bernoulli(p))
    loc = pyro.param("loc", torch.zeros(len(x), LOCALS))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc + kind, 0.5).to_event(1))


def scanned(y):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))

    def step(level, y_t):
        level = pyro.sample("level", dist.Normal(level, scale))
        pyro.sample("y", dist.Normal(level, 0.5), obs=y_t)
        return level, None

    pe.scan(step, torch.tensor(0.0), y)


def scanned_guide(y):
    pyro.sample("scale", dist.LogNormal(pyro.param("s", torch.tensor(0.1)), 0.5))
    mix = pyro.param("mix", torch.tensor(0.3))

    def step(level, y_t):
        level = pyro.sample("level", dist.Normal(level + mix * (y_t - level), 0.5))
        return level, None

    pe.scan(step, torch.tensor(0.0), y)


def rows_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)) * x, 0.5))


def many(x):
    weights = [pyro.sample(f"w_{i}", dist.Normal(0.1 * i, 1.0)) for i in range(5)]
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(sum(weights), 1.0), obs=x)


def gamma_guide(x):
    pyro.sample("z", dist.Gamma(pyro.param("shape", torch.tensor(2.0)), 1.0))


def subsampled(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=2) as rows:
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


def masked(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=x > 0):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def auto(kind, program):
    return lambda: (program, kind(program))


arma = WORKS["ARMA(1,1)"]
ALIKE = {
    "ELBO": (lambda: (model, guide), lambda k: sampled(num_particles=k), X),
    "β and free bits": (auto(AutoNormal, many), lambda k: pe.TraceBeta_ELBO(2.0, free_bits=0.3, num_particles=k), X),
    "score function": (lambda: (local_model, local_guide), lambda k: pe.TraceIW_ELBO(num_particles=k), X),
    "two runs of each": (lambda: (model, guide), lambda k: pe.TraceIW_ELBO(num_particles=k, gradient="dreg"), X),
    "recurrence": (auto(AutoMultivariateNormal, arma), lambda k: sampled(num_particles=k), data(6).double()),
}
NOT_ALIKE = {
    "dropout": lambda: (decoder_model(torch.nn.Dropout(0.5)), rows_guide),
    "drawn run by run": lambda: (model, gamma_guide),
    "rows at random": lambda: (subsampled, guide),
    "a mask per row": lambda: (masked, guide),
    "draws in a scan": lambda: (scanned, scanned_guide),
    "batch norm": lambda: (decoder_model(torch.nn.BatchNorm1d(1)), rows_guide),
}


@pytest.fixture(name="reasons")
def _reasons(caplog):
    caplog.set_level(logging.DEBUG, "pyro_elbo.compile.steps")
    return lambda: [r.getMessage() for r in caplog.records if "one by one" in r.getMessage()]


@pytest.mark.parametrize("name", every_other(ALIKE))
def test_all_particles_are_one_run(interpreted, graphs, reasons, name):
    programs, objective, y = ALIKE[name]

    def scenario(svi_of):
        svi = svi_of(*programs(), adam(), objective(3))
        return train(svi, 3, y), svi.run(2, y, progress=False), parameters()

    assert_same(scenario)
    assert not reasons()


def test_the_graph_does_not_grow_with_particles(interpreted, graphs):
    for particles in (2, 9):
        pyro.clear_param_store()
        train(pe.SVI(many, AutoNormal(many), adam(), sampled(num_particles=particles), compile=True), 2, X)
    assert len({len(graph.module.graph.nodes) for graph in graphs}) == 1


@pytest.mark.parametrize("name", every_other(NOT_ALIKE))
def test_other_particles_are_captured_one_by_one(interpreted, reasons, name):
    programs = NOT_ALIKE[name]

    def scenario(svi_of):
        return train(svi_of(*programs(), adam(), sampled(num_particles=2)), 3, X), parameters()

    assert_same(scenario)
    assert len(reasons()) == 1


@pytest.mark.slow
def test_particles_of_a_recurrence_compiled():
    programs, objective, y = ALIKE["recurrence"]

    def scenario(svi_of):
        return train(svi_of(*programs(), adam(), objective(3)), 4, y), parameters()

    assert_same(scenario)
