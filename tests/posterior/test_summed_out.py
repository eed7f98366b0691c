"""Draws, exports and predictions of programs whose discrete latents are summed out."""

import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_elbo as pe
from pyro_elbo.errors import SiteError
from pyro_elbo.posterior.draws import draw
from tests.programs_discrete import DISCRETE
from tests.support.refusing import refusing

refuses = refusing(re.compile(r"Give|Remove|Write"))
by_name = {p.name: p for p in DISCRETE}
ALONE = ("mixture", "masked", "global and local", "explaining away", "nested", "siblings", "one-hot", "HMM 3", "HMM 4")


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def drawn(name, num_samples=400):
    program = by_name[name]
    terms = pe.TraceBeta_ELBO().terms(program.model, program.guide, *program.args)
    return terms, draw(program.model, program.guide, program.args, {}, num_samples, seed=1)


@pytest.mark.parametrize("name", ALONE)
def test_draws_from_the_exact_posterior_have_one_weight(name):
    """p(x, k) / p(k | x) is p(x), whatever k; frequencies within 5 SE of the posterior (1 in 10^5 over 9 programs)."""
    terms, draws = drawn(name)
    assert draws.way == "plate"
    torch.testing.assert_close(draws.log_weight, terms.elbo.detach().expand(400), rtol=1e-10, atol=1e-10)
    for site, q in terms.posterior.items():
        k = draws.latents[site]
        found = k if k.dim() > q.dim() else torch.nn.functional.one_hot(k.long(), q.shape[-1])
        error = (found.double().mean(0) - q).abs()
        assert (error <= 5 * (q * (1 - q) / 400).sqrt() + 1e-9).all(), site


def test_weights_beside_other_latents_are_those_of_the_sum():
    """log p(x, z) - log q(z) with k summed out, at the draws of z."""
    _, draws = drawn("mixture VAE", 50)
    (x,) = by_name["mixture VAE"].args
    weights, means, slope = (pyro.param(n) for n in ("weights", "means", "slope"))
    z = draws.latents["z"]
    log_p = dist.Normal(means[:, None].expand(3, 2), 0.8).to_event(1).log_prob(z.unsqueeze(-2))
    joint = (weights.log() + log_p).logsumexp(-1) + dist.Normal(z.sum(-1) * slope, pyro.param("s")).log_prob(x)
    q = dist.Normal(pyro.param("w") * x[:, None], pyro.param("q_scale")).to_event(1).log_prob(z)
    torch.testing.assert_close(draws.local_log_weight, (joint - q).detach())


def test_export_holds_draws_of_what_is_summed_out():
    program = by_name["mixture VAE"]
    data = pe.to_arviz(program.model, program.guide, *program.args, num_samples=300)
    assert data.posterior["k"].dims == ("chain", "draw", "data")
    assert set(np.unique(data.posterior["k"])) <= {0, 1, 2}
    assert data.posterior_predictive["x"].shape == (1, 300, 4)
    assert torch.isfinite(pe.pareto_k(program.model, program.guide, *program.args, num_samples=400).k).all()


@pytest.mark.parametrize("name", ["guide: mixture", "in turn: mixture"])
def test_what_the_guide_enumerates_is_drawn_from_it(name):
    """Relative frequencies within 5 SE of q (1 in 100 000), with the weights of p(x, k) / q(k)."""
    program = by_name[name]
    data = pe.to_arviz(program.model, program.guide, *program.args, num_samples=2000)
    q = pe.TraceBeta_ELBO().terms(program.model, program.guide, *program.args).posterior["k"]
    counts = torch.nn.functional.one_hot(torch.tensor(data.posterior["k"].values[0]).long(), 3).double()
    error = (counts.mean(0) - q).abs()
    assert (error < 5 * (q * (1 - q) / 2000).sqrt()).all()
    found = pe.log_evidence(program.model, program.guide, *program.args, num_samples=4000)
    mixture = by_name["mixture"]
    exact = pe.TraceBeta_ELBO().terms(mixture.model, mixture.guide, *program.args).elbo
    assert abs(found.total - exact) < 5 * found.total_standard_error


@pytest.mark.parametrize("name", ["guide and model: chain", "in turn: global, local summed out"])
def test_values_given_a_draw_are_not_those_of_an_enumerated_site(name):
    program = by_name[name]
    with refuses(SiteError, "enumerates", "mark"):
        pe.infer_discrete(program.model, program.guide, *program.args)


def test_other_supports_cannot_be_drawn():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Binomial(2, 0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    with refuses(SiteError, "'k'", "Binomial", "Categorical"):
        pe.to_arviz(model, lambda x: None, torch.zeros(3), num_samples=20)


def test_a_mask_on_the_latent_alone_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            with pyro.poutine.mask(mask=torch.tensor([True, False, True])):
                k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    with refuses(SiteError, "'k'", "masked", "same mask"):
        pe.to_arviz(model, lambda x: None, torch.zeros(3), num_samples=20)


def test_leave_one_out_of_a_mixture_is_its_log_density():
    """All parameters are fixed: the other rows say nothing, so that elpd is log p(x_n) = log Σ_k p(k) p(x_n | k)."""
    program = by_name["mixture"]
    (x,) = program.args
    data = pe.to_arviz(program.model, program.guide, x, num_samples=200)
    weights, means, widths = (pyro.param(n) for n in ("weights", "means", "widths"))
    exact = (weights.log() + dist.Normal(means, widths).log_prob(x[:, None])).logsumexp(-1).detach()
    found = torch.as_tensor(data.log_likelihood["x"].values)
    torch.testing.assert_close(found, exact.expand(1, 200, 3))
    assert pe.loo(data).elpd == pytest.approx(exact.sum().item(), abs=1e-8)
