"""Random programs agree with their naive evaluation: value, gradient, terms, importance bound, weights, compiled steps.

``PYRO_ELBO_FUZZ`` is the number of programs (``make fuzz``).
"""

import functools
import math
import os

import pyro
import pytest
import torch

import pyro_elbo as pe
from pyro_elbo.errors import PyroElboError, SiteError
from pyro_elbo.posterior.draws import draw
from tests import random_programs
from tests.random_programs import CONTINUOUS, Program, bound, rows_of, shared_plates, surrogate
from tests.support.compiled import _interpreted  # noqa: F401  (a fixture)

COUNT = int(os.environ.get("PYRO_ELBO_FUZZ", "200"))
COMPILED = 60 if "PYRO_ELBO_FUZZ" in os.environ else 6  # about 2 s each
PARTICLES = 3

seeds = pytest.mark.parametrize("seed", range(COUNT))
generate = functools.lru_cache(random_programs.generate)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def tolerance(program: Program) -> dict[str, float]:
    return {"rtol": 1e-9, "atol": 1e-9} if program.dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-4}


def assert_close(program, found, expected):
    found, expected = (torch.as_tensor(x).detach().double() for x in (found, expected))
    torch.testing.assert_close(found, expected, **tolerance(program), msg=lambda m: f"{m}\n{program}")


def gradient(leaves):
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in leaves.items()}


def library(program, loss, seed):
    """The loss and its gradient, on the draws of a seed."""
    pyro.clear_param_store()
    pyro.poutine.trace(program.guide).get_trace()
    pyro.poutine.trace(program.model).get_trace()
    leaves = dict(pyro.get_param_store().named_parameters())
    for p in leaves.values():
        p.grad = None
    pyro.set_rng_seed(seed)
    return loss.loss_and_grads(program.model, program.guide), gradient(leaves)


def assert_gradient(program, found, leaves):
    expected = gradient(leaves)
    assert found.keys() <= expected.keys()
    for name, slope in expected.items():
        assert_close(program, found.get(name, torch.zeros_like(slope)), -slope)


@seeds
def test_value_and_gradient(seed):
    program = generate(seed)
    loss, slopes = library(program, pe.TraceBeta_ELBO(kl="sampled"), seed)
    pyro.set_rng_seed(seed)
    leaves = program.leaves()
    run = program.naive(leaves)
    assert_close(program, -loss, bound(run))
    surrogate(program, run).backward()
    assert_gradient(program, slopes, leaves)


def by_site(run, sign):
    """The masked log density of each site on one side, unscaled."""
    found = {}
    for t in run.terms:
        if t.sign == sign:
            found[t.site] = found.get(t.site, 0.0) + t.masked
    return found


@seeds
def test_terms(seed):
    """Each site's log density and KL, by row; an analytic KL is that of torch."""
    program = generate(seed)
    pyro.set_rng_seed(seed)
    terms = pe.TraceBeta_ELBO().terms(program.model, program.guide)
    pyro.set_rng_seed(seed)
    run = program.naive(program.start)
    log_p, log_q = by_site(run, 1), by_site(run, -1)
    for site in [*program.observed, *program.factors]:
        name = site.name if site.obs_mask is None else f"{site.name}_observed"
        assert_close(program, terms.log_likelihood[name].flatten(), log_p[site.name].flatten())
    total = 0.0
    for site in program.guided():
        scale = next(t.scale for t in run.terms if t.site == site.name)
        if terms.is_analytic[site.name]:
            assert may_be_analytic(program, site), program
            kl = run.kl(site)
        else:
            kl = log_q[site.name] - log_p[site.name]
        total = total + scale * kl.sum()
        found = terms.kl[site.name] + terms.kl.get(f"{site.name}_aux", 0.0)
        assert_close(program, found.flatten(), kl.flatten())
        assert_close(program, terms.scale[site.name], scale)
    assert_close(program, terms.rate, total)
    if not any(terms.is_analytic.values()):
        assert_close(program, terms.elbo, bound(run))


def may_be_analytic(program, site):
    """Every latent before it in the model is before it in the guide, and both programs weigh it alike."""
    if site.data is not None:  # what obs_mask leaves unobserved comes last in both
        return True
    before = [s.name for s in program.latents][: [s.name for s in program.latents].index(site.name)]
    same_mask = (site.mask is None) == (site.guide_mask is None)
    return set(before) <= set(program.order[: program.order.index(site.name)]) and same_mask


@pytest.mark.parametrize("vectorized", [False, True], ids=["loop", "vectorized"])
@seeds
def test_importance_bound(seed, vectorized):
    program = generate(seed)
    loss = pe.TraceIW_ELBO(PARTICLES, vectorize_particles=vectorized, max_plate_nesting=program.nesting)
    leaves = program.leaves()
    pyro.set_rng_seed(seed)
    runs = [program.naive(leaves, particles=PARTICLES if vectorized else None)]
    if vectorized:
        log_w = rows_of(program, runs[0], -1 - program.nesting).movedim(-1 - program.nesting, 0)
    else:
        runs += [program.naive(leaves, rows=runs[0].indices) for _ in range(PARTICLES - 1)]  # rows are drawn once
        log_w = torch.stack([rows_of(program, run) for run in runs])
    expected = (log_w.logsumexp(0) - math.log(PARTICLES)).sum() * runs[0].terms[0].scale
    try:
        value, slopes = library(program, loss, seed)
    except SiteError:
        assert is_without_bound(program, runs[0]), program
        return
    assert not is_without_bound(program, runs[0]), program
    assert_close(program, -value, expected)
    if program.is_pathwise:
        expected.backward()
        assert_gradient(program, slopes, leaves)


def is_without_bound(program, run):
    """Whether no row has a weight of its own: scales differ, or something lies outside of a subsampled plate."""
    scales = [t.scale for t in run.terms]
    subsampled = {p.name for p in program.plates.values() if p.count < p.size}
    used = {name for t in run.terms for name in t.plates}
    outside = not shared_plates(run) >= used & subsampled
    return max(scales) > min(scales) * (1 + 1e-9) or outside


@seeds
def test_log_weights_of_draws(seed):
    """Log p and log q of exported draws are those of their values.

    A scale around everything is taken off. Other scales than N/B and subsampled rows have no importance weights: they
    may be refused.
    """
    program = generate(seed)
    library(program, pe.TraceBeta_ELBO(), seed)
    try:
        draws = draw(program.model, program.guide, (), {}, num_samples=4, seed=seed)
    except PyroElboError:
        assert not program.is_plain, program
        return
    for i in range(4):
        values = {s.name: program.with_gaps(s, draws.latents[s.name][i]) for s in program.guided()}
        run = program.naive(program.start, values, rows=draws.rows)
        log_p, log_q = (
            sum((t.scale * t.masked).sum() for t in run.terms if t.sign == s) / program.common_scale for s in (1, -1)
        )
        assert_close(program, draws.log_p[i], log_p)
        assert_close(program, draws.log_q[i], log_q)
        if draws.local_log_weight is not None and program.is_plain:
            weights, datum = rows_of(program, run), min(program.plates[n].dim for n in shared_plates(run))
            inner = [d for d in range(-weights.dim(), 0) if d != datum]
            assert_close(program, draws.local_log_weight[i], weights.sum(inner) if inner else weights)


@pytest.mark.parametrize("seed", range(COMPILED))
def test_compiled_steps(seed, interpreted):
    """Losses and parameters of a few steps, compiled and not, on the draws of one seed."""
    program = generate(seed)
    found = []
    for compiled in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        optim = pyro.optim.SGD({"lr": 1e-3, "momentum": 0.5})
        loss = pe.TraceBeta_ELBO(0.7)
        svi = pe.SVI(program.model, program.guide, optim, loss, compile=compiled, fallback_random=True)
        losses = [svi.step() for _ in range(3)]
        parameters = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}
        found.append((losses, parameters))
    torch.testing.assert_close(found[1], found[0], **tolerance(program), msg=lambda m: f"{m}\n{program}")


def test_the_generator_makes_what_it_promises():
    """Every family, every kind of plate, masks, scales, auxiliary sites, obs_mask, other orders, both precisions."""
    programs = [generate(seed) for seed in range(200)]
    sites = [s for p in programs for s in [*p.latents, *p.observed]]
    assert {s.family for s in sites} == set(random_programs.FAMILIES)
    plates = [p for program in programs for p in program.plates.values()]
    assert {(p.rows is not None, p.is_random, p.sized) for p in plates} >= {
        (True, False, True),
        (False, True, True),
        (False, False, False),
    }
    assert {p.dtype for p in programs} == {torch.float32, torch.float64}
    for has in (
        lambda p: "groups" in p.plates and "rows" in p.plates,
        lambda p: "others" in p.plates,
        lambda p: p.order != [s.name for s in p.latents],
        lambda p: p.factors,
        lambda p: p.scale != 1,
        lambda p: any(s.auxiliary for s in p.latents),
        lambda p: any(s.obs_mask is not None for s in p.observed),
        lambda p: any(s.mask is not None and s.by == "dist" for s in p.latents),
        lambda p: any((s.mask is None) != (s.guide_mask is None) for s in p.latents),
        lambda p: any(s.support not in CONTINUOUS for s in p.latents),
    ):
        assert sum(map(bool, map(has, programs))) >= 5
