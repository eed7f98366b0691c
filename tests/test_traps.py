"""Known traps of the field, with exact numbers."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_elbo as pe


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def test_analytic_kl_only_where_no_parent_is_a_descendant():
    """p(z1) p(z2|z1) against the same law as q(z2) q(z1|z2): the KL is 0, site by site analytic it would be 1."""

    def model():
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.sample("z2", dist.Normal(z1, 1.0))

    def guide():
        z2 = pyro.sample("z2", dist.Normal(0.0, math.sqrt(2.0)))
        pyro.sample("z1", dist.Normal(z2 / 2, math.sqrt(0.5)))

    assert pe.TraceBeta_ELBO(kl="sampled").terms(model, guide).elbo.item() == pytest.approx(0.0, abs=1e-12)
    terms = pe.TraceBeta_ELBO(num_particles=20_000, vectorize_particles=True).terms(model, guide)
    assert terms.is_analytic == {"z1": True, "z2": False}  # z1 has no parent, z2 follows its descendant
    assert abs(terms.elbo.item()) < 5 * 1.0 / 20_000**0.5  # the draws' standard deviation is below 1
    with pytest.warns(UserWarning, match="mean field"):
        wrong = TraceMeanField_ELBO(num_particles=20_000, vectorize_particles=True).loss(model, guide)
    assert wrong == pytest.approx(1.0, abs=0.05)


def test_fallback_is_decided_site_by_site():
    def model():
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
        pyro.sample("z3", dist.Normal(z2, 1.0))

    def guide():
        z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
        pyro.sample("z1", dist.Normal(z2, 1.0))
        pyro.sample("z3", dist.Normal(z2, 1.0))

    assert pe.TraceBeta_ELBO().terms(model, guide).is_analytic == {"z1": True, "z2": False, "z3": True}


def shifted(n=3):
    def model():
        with pyro.plate("data", n):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        with pyro.plate("data", n):
            pyro.sample("z", dist.Normal(1.0, 1.0))

    return model, guide


def test_scale_or_mask_of_the_model_alone_is_sampled():
    model, guide = shifted(4)
    for changed in (poutine.scale(model, 3.0), poutine.mask(model, torch.tensor([True, False, True, True]))):
        values = {}
        for name, loss in (("ours", pe.TraceBeta_ELBO()), ("trace", Trace_ELBO()), ("field", TraceMeanField_ELBO())):
            pyro.set_rng_seed(0)
            values[name] = loss.loss(changed, guide)
        assert values["ours"] == pytest.approx(values["trace"], rel=1e-12)
        assert abs(values["field"] - values["trace"]) > 0.5
        terms = pe.TraceBeta_ELBO().terms(changed, guide)
        assert terms.is_analytic == {"z": False}
        torch.testing.assert_close((terms.kl["z"] * terms.scale["z"]).sum(), terms.rate)


@pytest.mark.parametrize("kl", ["auto", "sampled"])
@pytest.mark.parametrize("particles", [{}, {"num_particles": 5}, {"num_particles": 5, "vectorize_particles": True}])
def test_beta_per_datum_acts_on_every_path(kl, particles):
    """KL(N(1, 1) ‖ N(0, 1)) = ½ per datum; with β = (1, 2, 3) it costs 3."""
    model, guide = shifted()
    beta = torch.tensor([1.0, 2.0, 3.0])
    terms = pe.TraceBeta_ELBO(beta, kl=kl, **particles).terms(model, guide)
    torch.testing.assert_close(terms.objective, -(beta * terms.kl["z"]).sum())
    if kl == "auto":
        assert terms.objective.item() == pytest.approx(-3.0)


def test_beta_weights_the_reward_of_a_score_function_site():
    logit = torch.tensor(0.3, requires_grad=True)

    def model():
        pyro.sample("z", dist.Bernoulli(0.5))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=logit))

    loss = pe.TraceBeta_ELBO(2.5, kl="sampled", num_particles=50_000, vectorize_particles=True)
    gradient = torch.autograd.grad(loss.terms(model, guide).objective, logit)[0]
    q = logit.sigmoid()
    kl = q * (2 * q).log() + (1 - q) * (2 * (1 - q)).log()
    exact = torch.autograd.grad(-2.5 * kl, logit)[0]
    # One draw's standard deviation is 2.5 · |log-ratio difference| · q(1-q) ≈ 0.19: 5 SE of 50 000 draws.
    assert abs(gradient - exact) < 5 * 0.2 / 50_000**0.5


def test_beta_zero_works_where_poutine_scale_refuses():
    model, guide = shifted()
    with pytest.raises(ValueError, match="scale"):
        Trace_ELBO().loss(poutine.scale(model, 0.0), guide)
    terms = pe.TraceBeta_ELBO(0.0).terms(model, guide)
    assert terms.objective.item() == 0.0
    assert terms.rate.item() == pytest.approx(1.5)


@pytest.mark.parametrize("fn", [lambda z: dist.Normal(z, 1.0), lambda z: dist.Gamma(z.exp(), 1.0)])
def test_nan_under_a_mask_leaves_loss_and_gradient_finite(fn):
    x = torch.tensor([0.5, float("nan"), 1.5])
    loc = torch.tensor(0.2, requires_grad=True)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), poutine.mask(mask=~x.isnan()):
            pyro.sample("x", fn(z), obs=x)

    def guide():
        pyro.sample("z", dist.Normal(loc, 1.0))

    pyro.set_rng_seed(0)
    terms = pe.TraceBeta_ELBO().terms(model, guide)
    gradient = torch.autograd.grad(terms.objective, loc)[0]
    assert torch.isfinite(terms.objective)
    assert torch.isfinite(gradient)
    x = x[[0, 2]]

    def without():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 2):
            pyro.sample("x", fn(z), obs=x)

    pyro.set_rng_seed(0)
    expected = pe.TraceBeta_ELBO().terms(without, guide)
    torch.testing.assert_close(terms.objective, expected.objective)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.objective, loc)[0])


def test_particles_are_averaged_and_are_not_data():
    model, guide = shifted()
    terms = pe.TraceBeta_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=1).terms(model, guide)
    assert terms.kl["z"].shape == (3,)
    assert terms.rate.item() == pytest.approx(1.5)


def subsampled(x, batch):
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=batch) as i:
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide():
        pyro.sample("w", dist.Normal(0.5, 1.0))
        with pyro.plate("data", len(x), subsample_size=batch):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    return model, guide


def test_local_kl_is_scaled_and_the_global_one_counts_once():
    """A full plate is in no trace, a subsampled one is: the terms know both from their sites."""
    x = torch.linspace(-1, 1, 100)
    for batch in (None, 10):
        terms = pe.TraceBeta_ELBO().terms(*subsampled(x, batch))
        factor = 1.0 if batch is None else 10.0
        assert terms.num_data == 100
        assert (terms.scale["w"], terms.scale["z"], terms.scale["x"]) == (1.0, factor, factor)
        assert terms.kl_total["w"].item() == pytest.approx(0.125)
        torch.testing.assert_close(terms.rate, terms.kl["w"] + factor * terms.kl["z"].sum())


def test_auxiliary_sites_and_jacobians_belong_to_the_rate():
    """q(z) is LogNormal, written as an auxiliary Normal and a Delta that carries the Jacobian."""

    def model():
        pyro.sample("z", dist.LogNormal(0.0, 1.0))

    def guide():
        u = pyro.sample("u", dist.Normal(0.5, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(u.exp(), log_density=-u))

    loss = pe.TraceBeta_ELBO(num_particles=20_000, vectorize_particles=True)
    rate = loss.terms(model, guide).rate.item()
    assert abs(rate - 0.125) < 5 * 0.5 / 20_000**0.5  # KL(N(½, 1) ‖ N(0, 1)) = 1/8; its draws have sd ½


def test_kl_is_a_sum_over_dimensions_and_never_a_mean():
    def program(loc):
        def run():
            pyro.sample("z", dist.Normal(torch.full((10,), loc), 1.0).to_event(1))

        return run

    terms = pe.TraceBeta_ELBO().terms(program(0.0), program(1.0))
    assert terms.kl["z"].item() == pytest.approx(5.0)
    torch.testing.assert_close(terms.kl_per_dim["z"], torch.full((10,), 0.5))
