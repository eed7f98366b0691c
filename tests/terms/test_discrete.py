"""Discrete latents that are summed out: values, gradients, terms and refusals."""

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO

import pyro_elbo as pe
from tests.programs_discrete import DISCRETE, brute_force
from tests.test_conformance import assert_same, create_parameters, leaves, value_and_gradient

LOOPED = [p for p in DISCRETE if p.looped]
PATHWISE = [p for p in LOOPED if p.name != "coupled draws"]
by_name = {p.name: p for p in DISCRETE}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def rows(programs):
    return pytest.mark.parametrize("program", programs, ids=lambda p: p.name)


def start(program):
    """Create the parameters of both programs."""
    pyro.set_rng_seed(7)
    pe.TraceBeta_ELBO(kl="sampled").loss(program.model, program.guide, *program.args)


def draws(program, seed=7):
    """What the guide draws under a seed, without its marked sites."""
    pyro.set_rng_seed(seed)
    trace = poutine.trace(program.guide).get_trace(*program.args)
    sites = {n: m for n, m in trace.nodes.items() if m["type"] == "sample" and m["infer"].get("enumerate") is None}
    return {n: m["value"] for n, m in sites.items() if type(m["fn"]).__name__ != "_Subsample"}


def gradient_of(x):
    names = list(leaves())
    found = torch.autograd.grad(x, [leaves()[n] for n in names], allow_unused=True)
    return {n: torch.zeros_like(leaves()[n]) if g is None else g for n, g in zip(names, found, strict=True)}


def assert_gradient(ours, expected, tol=1e-9):
    assert ours.keys() == expected.keys()
    for name, g in expected.items():
        torch.testing.assert_close(ours[name], g, rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}")


def settings(program):
    yield {}
    yield {"num_particles": 2}
    if program.vectorizes:
        yield {"num_particles": 2, "vectorize_particles": True}


@rows(LOOPED)
def test_value_and_gradient_equal_the_sum_over_all_assignments(program):
    start(program)
    for beta in (1.0, 0.4):
        loss = pe.TraceBeta_ELBO(beta, kl="sampled")
        exact = (
            brute_force(program, draws(program), beta) if beta == 1 or not program.name.startswith("guide") else None
        )
        value, gradient = value_and_gradient(loss, program.model, program.guide, program.args)
        if exact is not None:
            assert -value == pytest.approx(exact.item(), rel=1e-9, abs=1e-9)
            if program in PATHWISE:
                assert_gradient({n: -g for n, g in gradient.items()}, gradient_of(exact))


@rows([p for p in DISCRETE if p.pyro_runs])
def test_equals_trace_enum_elbo(program):
    start(program)
    for particles in settings(program):
        ours = value_and_gradient(
            pe.TraceBeta_ELBO(kl="sampled", **particles), program.model, program.guide, program.args
        )
        theirs = value_and_gradient(
            TraceEnum_ELBO(max_plate_nesting=program.nesting, **particles), program.model, program.guide, program.args
        )
        assert_same(ours, theirs)
