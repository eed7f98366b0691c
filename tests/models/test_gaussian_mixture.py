"""The mixture of Gaussians: the summed-out terms against the closed form, and EM's laws."""

import pytest
import torch

import pyro_elbo as pe
from examples import em_mixture
from models.gaussian_mixture import factorized_posterior, m_step


@pytest.fixture(name="x")
def _x():
    torch.manual_seed(0)
    return torch.cat([torch.randn(30, 2), 0.5 * torch.randn(30, 2) + 1.5]).double()


def test_terms_equal_the_closed_form(x):
    mixture = em_mixture.start(x)
    terms = pe.TraceBeta_ELBO().terms(mixture, em_mixture.no_guide, x)
    torch.testing.assert_close(terms.elbo, mixture.log_evidence(x))
    torch.testing.assert_close(terms.posterior["k"], mixture.log_joint(x).softmax(1))


def test_an_m_step_is_a_stationary_point_of_the_bound(x):
    first = em_mixture.start(x)
    q = first.log_joint(x).softmax(1)
    best = m_step(x, q)
    means = best.means.clone().requires_grad_()
    covariances = best.covariances.clone().requires_grad_()
    moved = type(best)(best.weights, means, covariances)
    (q * moved.log_joint(x)).sum().backward()
    torch.testing.assert_close(means.grad, torch.zeros_like(means), rtol=0, atol=1e-9)
    torch.testing.assert_close(covariances.grad, torch.zeros_like(covariances), rtol=0, atol=1e-9)


def test_a_mean_field_posterior_costs_its_kl(x):
    mixture = m_step(x, em_mixture.start(x).log_joint(x).softmax(1))
    q = factorized_posterior(mixture.log_joint(x), torch.full((len(x), 4), 0.25, dtype=x.dtype))
    exact = mixture.log_joint(x).softmax(1)
    bound, _ = em_mixture.mean_field_step(mixture, x, torch.full((len(x), 4), 0.25, dtype=x.dtype))
    kl = (q * (q / exact).log()).sum()
    torch.testing.assert_close(bound, mixture.log_evidence(x) - kl)
