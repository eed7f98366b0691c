"""Particles drawn in a loop: one choice of rows, and the scale, mask and score of each particle's own run."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import Trace_ELBO

import pyro_elbo as pe
from pyro_elbo.errors import SiteError

X = torch.tensor([0.0, 8.0, -3.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def log_evidence(x):
    return dist.Normal(0.0, math.sqrt(2)).log_prob(x)


def model():
    with pyro.plate("d", 3, subsample_size=1) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[i])


def exact_guide():
    with pyro.plate("d", 3, subsample_size=1) as i:
        pyro.sample("z", dist.Normal(X[i] / 2, 0.5**0.5))


def point_guide():
    """Without latents of its own: the rows are chosen in the model alone."""


def row_model():
    with pyro.plate("d", 3, subsample_size=1) as i:
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=X[i])


@pytest.mark.parametrize(
    "objective",
    [
        pe.TraceBeta_ELBO(kl="sampled", num_particles=8),
        pe.TraceIW_ELBO(8),
        pe.TraceTimestep_ELBO(bound="importance", num_particles=8),
        pe.TraceIW_ELBO(8, vectorize_particles=True),
    ],
    ids=["elbo", "importance", "timestep", "vectorized"],
)
def test_all_particles_of_a_step_see_the_same_random_rows(objective):
    """With the exact posterior every step gives N log p(x_i) of one row i, for any number of particles."""
    possible = 3 * log_evidence(X)
    seen = set()
    for seed in range(12):
        pyro.set_rng_seed(seed)
        terms = objective.terms(model, exact_guide)
        nearest = (terms.objective - possible).abs().argmin()
        torch.testing.assert_close(terms.objective, possible[nearest])
        torch.testing.assert_close(terms.log_likelihood["x"] - terms.kl["z"], possible[nearest].expand(1) / 3)
        seen.add(int(nearest))
    assert seen == {0, 1, 2}


def test_rows_that_the_model_alone_chooses_are_shared_too():
    possible = 3 * dist.Normal(0.0, 1.0).log_prob(X)
    for seed in range(5):
        pyro.set_rng_seed(seed)
        elbo = pe.TraceBeta_ELBO(num_particles=8).terms(row_model, point_guide).elbo
        assert (elbo - possible).abs().min() < 1e-12


def switching_model():
    """Scale and mask of x depend on the draw."""
    with pyro.plate("d", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=2.0 + (z.mean() > 0).item()), poutine.mask(mask=z > 0):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(3))


def switching_guide():
    with pyro.plate("d", 3):
        pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(3)), 1.0))


def half_discrete_model():
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("z", dist.Normal(k, 1.0))


def half_discrete_guide():
    """z has a pathwise gradient in some runs and the score function's in the others."""
    k = pyro.sample("k", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.3))))
    kind = NonreparameterizedNormal if k > 0 else dist.Normal
    pyro.sample("z", kind(pyro.param("m", torch.tensor(0.4)), 1.0))


@pytest.mark.parametrize(
    ("model", "guide"),
    [(switching_model, switching_guide), (half_discrete_model, half_discrete_guide)],
    ids=["scale and mask", "score"],
)
def test_each_particle_keeps_scale_mask_and_score_of_its_run(model, guide):
    """Pyro's Trace_ELBO, run by run on the same draws, in value and gradient."""
    for seed in range(6):
        results = []
        for loss in (Trace_ELBO(num_particles=5), pe.TraceBeta_ELBO(kl="sampled", num_particles=5)):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            value = loss.loss_and_grads(model, guide)
            results.append([value, *(p.grad.tolist() for _, p in pyro.get_param_store().named_parameters())])
        assert results[1] == [pytest.approx(x) for x in results[0]]


def test_frames_are_averaged_over_particles():
    """A mask that depends on the draw: E[frames] is the mean number of positive z, for both ways of drawing."""

    def model():
        def step(z, x):
            with poutine.mask(mask=z > 0):
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
            return z, None

        with pyro.plate("n", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            zs.append(z)
            pe.scan(step, z, torch.zeros(3, 2))

    def guide():
        with pyro.plate("n", 2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    for options in ({}, {"vectorize_particles": True, "max_plate_nesting": 1}):
        zs = []
        terms = pe.TraceBeta_ELBO(num_particles=4, **options).terms(model, guide)
        positive = torch.stack([z.reshape(-1, 2) for z in zs]).reshape(4, 2) > 0
        assert terms.num_frames == 3 * positive.sum() / 4


def test_a_plate_that_changes_between_particles_is_refused():
    def model():
        n = 1 + int(pyro.sample("k", dist.Bernoulli(0.5)))
        with pyro.plate("d", n):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(n))

    def guide():
        pyro.sample("k", dist.Bernoulli(0.5))

    pyro.set_rng_seed(0)
    with pytest.raises(SiteError, match=r"Site 'x' changes from particle to particle: expected plates \[\('d', \d\)\]"):
        pe.TraceBeta_ELBO(num_particles=20).terms(model, guide)
