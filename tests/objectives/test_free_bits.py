"""Free bits: the floor of a KL, per dimension, per site and for sites that a guide draws together."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError

PARTICLES = {
    "one": {},
    "looped": {"num_particles": 4},
    "vectorized": {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1},
}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def model():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
    pyro.sample("x", dist.Normal(a + b, 1.0), obs=torch.tensor(1.0))


def lists(model):
    guide = AutoGuideList(model)
    guide.append(AutoMultivariateNormal(pyro.poutine.block(model, expose=["a"])))
    guide.append(AutoMultivariateNormal(pyro.poutine.block(model, expose=["b"])))
    return guide


@pytest.mark.parametrize("particles", PARTICLES.values(), ids=PARTICLES)
@pytest.mark.parametrize("make", [AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoIAFNormal, lists])
def test_a_joint_guide_has_one_floor(make, particles):
    """The charge is β max(λ, KL): below λ the KL has no gradient, above it is the KL itself."""
    pyro.set_rng_seed(0)
    guide = make(model)
    guide()
    for free in (1e-6, 1e3):
        pyro.set_rng_seed(1)
        terms = pe.TraceBeta_ELBO(2.0, free_bits=free, **particles).terms(model, guide)
        charge = 2 * terms.rate.clamp(min=free)
        torch.testing.assert_close(terms.objective, -terms.distortion - charge)
        parameters = [p for p in guide.parameters() if p.requires_grad]
        found = torch.autograd.grad(terms.objective, parameters, retain_graph=True, allow_unused=True)
        expected = torch.autograd.grad(-terms.distortion - charge, parameters, allow_unused=True)
        for g, e in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.zeros(()) if g is None else g, torch.zeros(()) if e is None else e)


def test_a_free_budget_of_a_millionth_leaves_the_posterior_alone():
    """z ~ N(0, 1), x | z ~ N(z, 1), x = 0: the posterior's standard deviation is √½."""

    def one():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    pyro.set_rng_seed(0)
    guide = AutoMultivariateNormal(one)
    loss = pe.TraceBeta_ELBO(free_bits=1e-6, num_particles=200, vectorize_particles=True, max_plate_nesting=0)
    pe.SVI(one, guide, pyro.optim.Adam({"lr": 0.05}), loss).run(150, progress=False)
    assert (guide.scale * guide.scale_tril.abs()).item() == pytest.approx(0.5**0.5, rel=0.03)


def auxiliary_rows(free, weight=1.0, mask=None, over_time=False):
    """Rows of z = 2u, u ~ N(m, 1) auxiliary: KL(N(2m, 4) || N(0, 1)) a row, or a row and step."""
    m = torch.tensor([0.5, 1.0, 3.0])

    def step(carry, x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        return carry, None

    def guide_step(carry, x):
        u = pyro.sample("u", dist.Normal(m, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(2 * u, log_density=torch.full_like(u, -torch.tensor(2.0).log())))
        return carry, None

    def run(a_step):
        def program():
            mask_ = torch.ones(3, dtype=torch.bool) if mask is None else mask
            with pyro.plate("rows", 3), pyro.poutine.mask(mask=mask_):
                if over_time:
                    pe.scan(a_step, torch.zeros(3), torch.zeros(2, 3))
                else:
                    a_step(None, torch.zeros(3))

        return program

    loss = pe.TraceBeta_ELBO(weight, free_bits=free)
    pyro.set_rng_seed(0)
    return loss.terms(run(step), run(guide_step))


@pytest.mark.parametrize("over_time", [False, True], ids=["rows", "rows and steps"])
@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True])], ids=["all", "masked"])
@pytest.mark.parametrize("weight", [3.0, torch.tensor([1.0, 2.0, 4.0])], ids=["one beta", "per row"])
def test_the_floor_of_a_joint_site_holds_per_row_of_its_plate(mask, over_time, weight):
    if over_time and isinstance(weight, torch.Tensor):
        weight = weight[:, None].expand(3, 2)
    counted = torch.ones(3) if mask is None else mask.double()
    if over_time:
        counted = counted[:, None].expand(3, 2)
    terms = auxiliary_rows(1e3, weight, mask, over_time)
    torch.testing.assert_close(terms.objective, -terms.distortion - (1e3 * weight * counted).sum())
    terms = auxiliary_rows(1e-9, weight, mask, over_time)
    joint = terms.kl["u"] + terms.kl["z"]
    torch.testing.assert_close(terms.objective, -terms.distortion - (weight * joint).sum())


def test_autonormal_keeps_a_floor_per_site():
    """a: KL(N(0, s²) || N(0, 1)); both sites are below λ: the charge is 2 λ."""
    guide = AutoNormal(model)
    guide()
    terms = pe.TraceBeta_ELBO(free_bits=50.0).terms(model, guide)
    torch.testing.assert_close(terms.objective, -terms.distortion - 100.0)


def test_free_bits_and_different_betas_of_one_kl_are_refused():
    guide = AutoMultivariateNormal(model)
    guide()
    beta = {"a": 1.0, "b": 2.0, "_AutoMultivariateNormal_latent": 1.0}
    with pytest.raises(ArgumentError, match="drawn together by the guide .* one beta"):
        pe.TraceBeta_ELBO(beta, free_bits=0.1).terms(model, guide)
    terms = pe.TraceBeta_ELBO(dict.fromkeys(beta, 3.0), free_bits=1e-6).terms(model, guide)
    torch.testing.assert_close(terms.objective, -terms.distortion - 3 * terms.rate)
