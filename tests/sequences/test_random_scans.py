"""Random programs of pe.scan agree with the written-out loop: value, gradient and terms, compiled and uncompiled.

``PYRO_ELBO_FUZZ`` sets the number of seeds.
"""

import functools
import os

import pyro
import pytest
import torch
from pyro import poutine

import pyro_elbo as pe
from tests.support.compiled import _double, _interpreted, adam, parameters, run_both  # noqa: F401  (fixtures)
from tests.support.random_scans import DISCRETE, RandomScan, by_loop, by_scan, draw_scan, oracle
from tests.support.scanned import parameters as leaves

SEEDS = int(os.environ.get("PYRO_ELBO_FUZZ", "60"))
COMPILED = SEEDS // 20 if "PYRO_ELBO_FUZZ" in os.environ else 1
COMPARABLE = ("normal", "binary", "flow")  # a compiled scan follows the uncompiled stream of these draws
close = functools.partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)


def gradients():
    """The gradient by parameter, zero where there is none; and forget it."""
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in leaves().items()}
    for p in leaves().values():
        p.grad = None
    return found


def step_gradients(objective, program: RandomScan, way):
    """Loss and gradient of an objective on the draws of one seed."""
    pyro.set_rng_seed(7)
    return objective.loss_and_grads(program.model, program.guide, way), gradients()


def make_parameters(program):
    for run in (program.guide, program.model):
        poutine.trace(run).get_trace(by_loop)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_scans_equal_the_written_out_loop(seed):
    program = draw_scan(seed)
    make_parameters(program)
    expected = oracle(program, seed=7)
    expected.surrogate.backward()
    naive = gradients()

    pyro.set_rng_seed(7)
    terms = pe.TraceBeta_ELBO(kl="sampled").terms(program.model, program.guide, by_scan)
    close(terms.elbo, expected.elbo.detach(), msg=_about("elbo"))
    for name, nats in terms.log_likelihood.items():
        close(nats.sum(), expected.log_p[name].sum().detach(), msg=_about(name))
    for name, nats in terms.kl.items():
        wanted = expected.log_q[name].sum() - expected.log_p.get(name, torch.zeros(())).sum()
        close(nats.sum(), wanted.detach(), msg=_about(name))

    loss, found = step_gradients(pe.TraceBeta_ELBO(kl="sampled"), program, by_scan)
    close(torch.as_tensor(-loss), expected.elbo.detach(), msg=_about("loss"))
    close(found, {name: -gradient for name, gradient in naive.items()}, msg=_about("gradient"))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_analytic_terms_of_random_scans_equal_those_of_the_loop(seed):
    """The loop's score functions also count draws after the end of a sequence: only its value is comparable then."""
    program = draw_scan(seed, stacked=True)
    make_parameters(program)
    scanned, looped = (step_gradients(pe.TraceBeta_ELBO(0.7), program, way) for way in (by_scan, by_loop))
    score = any(latent.support in DISCRETE for latent in program.latents)
    close(*((x[0], {} if score and program.lengths is not None else x[1]) for x in (scanned, looped)))


def _about(name):
    return lambda message: f"{name}: {message}"


@pytest.mark.parametrize("seed", range(COMPILED))
def test_random_scans_compiled_equal_uncompiled(interpreted, seed):
    program = draw_scan(seed, supports=COMPARABLE)

    def scenario(svi_of):
        svi = svi_of(program.model, program.guide, adam(0.02), pe.TraceBeta_ELBO())
        return [svi.step(by_scan) for _ in range(3)], parameters()

    eager, compiled = run_both(scenario)
    close(compiled, eager)
