"""The linear-Gaussian model: fitted guides against the exact posterior, evidence and mean-field gap."""

import pytest
import torch

import pyro_elbo as pe
from models.linear_gaussian import LinearGuide, simulate

N = 400


def fit_encoder(model, x, full):
    """Adam on whitened inputs, with a learning rate that decays to 1e-3 of its start; returns guide and encoder."""
    torch.manual_seed(0)
    guide = LinearGuide(*model.weight.shape, full=full)
    whiten = torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)))
    loss = pe.TraceBeta_ELBO(kl="sampled", num_particles=8, vectorize_particles=True, max_plate_nesting=1)

    def whitened_guide(x):
        return guide((x - x.mean(0)) @ whiten.T)

    optimizer = torch.optim.Adam(guide.parameters(), lr=0.03)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 1e-3 ** (1 / 1200))
    for _ in range(1200):
        optimizer.zero_grad()
        (loss.differentiable_loss(model, whitened_guide, x) / N).backward()
        optimizer.step()
        scheduler.step()
    return whitened_guide, (guide.linear.weight @ whiten).detach()


@pytest.fixture(scope="module")
def problem():
    return simulate(N)


def test_exact_guide_has_the_evidence_as_bound_without_variance(problem):
    model, x = problem
    for particles in (1, 3):
        terms = pe.TraceBeta_ELBO(kl="sampled", num_particles=particles).terms(model, model.exact_guide(), x)
        per_datum = sum(terms.log_likelihood.values()) - sum(terms.kl.values())
        torch.testing.assert_close(per_datum, model.log_evidence(x), rtol=0, atol=1e-10)


@pytest.mark.thorough
def test_fitted_full_covariance_encoder_is_the_ridge_pseudo_inverse(problem):
    model, x = problem
    guide, encoder = fit_encoder(model, x, full=True)
    error = (encoder - model.encoder).norm() / model.encoder.norm()
    assert error < 0.01
    with torch.no_grad():
        terms = pe.TraceBeta_ELBO(kl="sampled", num_particles=50).terms(model, guide, x)
    gap = (model.log_evidence(x).sum() - terms.elbo) / N
    # Monte Carlo error is of the order of the gap itself: both vanish at the exact posterior.
    assert abs(gap) < 1e-3


def test_fitted_mean_field_gap_is_its_formula(problem):
    model, x = problem
    guide, encoder = fit_encoder(model, x, full=False)
    assert (encoder - model.encoder).norm() / model.encoder.norm() < 0.01
    with torch.no_grad():
        loss = pe.TraceBeta_ELBO(kl="auto", num_particles=400, vectorize_particles=True, max_plate_nesting=1)
        bounds = torch.stack([loss.terms(model, guide, x).elbo for _ in range(10)]) / N
    gap = model.log_evidence(x).mean() - bounds.mean()
    # 5 SE: a false alarm in two of a million; 1e-3 for the distance of the fit from its optimum.
    assert abs(gap - model.mean_field_gap) < 5 * bounds.std() / 10**0.5 + 1e-3
    assert model.mean_field_gap > 0.05


def test_tempered_guide_at_one_is_the_exact_posterior(problem):
    model, _ = problem
    encoder, cov = model.tempered(1.0)
    assert torch.allclose(encoder, model.encoder)
    assert torch.allclose(cov, model.covariance)
