"""A prior that is a network of covariates: its KL by formula, and the exact evidence of the simulated rows."""

import torch
from torch.nn.functional import softplus

import pyro_elbo as pe
from models.covariate_vae import CovariateVAE, simulate


def test_log_evidence_is_that_of_the_simulated_rows():
    """The most likely regression gains half a nat for each of its 40 · 12 + 78 parameters."""
    n, parameters = 4000, 40 * 12 + 78
    data = simulate(n, seed=1)
    residual = data.x - data.c @ torch.linalg.lstsq(data.c, data.x).solution
    fitted = torch.distributions.MultivariateNormal(torch.zeros(12), residual.T @ residual / n)
    gain = fitted.log_prob(residual).mean() - data.log_evidence.mean()
    # 5 standard deviations of half a chi-squared: a false alarm in two of a million seeds
    assert abs(gain - parameters / (2 * n)) < 5 * (parameters / 2) ** 0.5 / n


def test_kl_is_that_to_the_prior_of_the_covariates():
    torch.manual_seed(0)
    vae, data = CovariateVAE(hidden=8), simulate(20)
    terms = pe.TraceBeta_ELBO().terms(vae.model, vae.guide, data.x, data.c)
    (prior_loc, prior_scale), (loc, scale) = (
        (y[:, :4], softplus(y[:, 4:]) + 1e-2) for y in (vae.prior(data.c), vae.encoder(torch.cat([data.x, data.c], -1)))
    )
    ratio, shift = scale / prior_scale, (loc - prior_loc) / prior_scale
    torch.testing.assert_close(terms.kl_per_dim["z"], (ratio.square() + shift.square() - 1) / 2 - ratio.log())
    assert terms.is_analytic["z"]
    terms.objective.backward()
    assert all(p.grad.abs().sum() > 0 for p in vae.parameters())
