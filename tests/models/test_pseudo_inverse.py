"""Encoders of the linear-Gaussian model: exact bounds on sigma points, and the ridge pseudo-inverse."""

import arviz as az
import numpy as np
import pyro
import pytest
import torch

import pyro_elbo as pe
from examples import pseudo_inverse as example
from models.linear_gaussian import LinearGaussian, simulate
from models.pseudo_inverse import AmortizedGuide, PerDatumGuide, SigmaPoints

EXACT = pe.TraceBeta_ELBO(num_particles=6, vectorize_particles=True, max_plate_nesting=1)


@pytest.fixture(scope="module")
def problem():
    return simulate(30)


def at_the_optimum(guide, model, x):
    """Give a guide the moments of the exact posterior."""
    loc, scale = (x - model.mean) @ model.encoder.T, torch.linalg.cholesky(model.covariance)
    if isinstance(guide, PerDatumGuide):
        guide.loc, guide.scale = loc, scale.expand(len(x), -1, -1)
    else:
        guide.linear.weight.data = model.encoder @ torch.linalg.inv(guide.whiten)
        guide.linear.bias.data = model.encoder @ (guide.mean - model.mean)
        guide.scale = scale
    return guide


def test_sigma_points_have_the_moments_of_the_gaussian():
    torch.manual_seed(0)
    loc, scale = torch.randn(5, 3).double(), torch.randn(5, 3, 3).double().tril() + 3 * torch.eye(3)
    points = SigmaPoints(loc, scale_tril=scale).expand([6, 5]).rsample()
    torch.testing.assert_close(points.mean(0), loc)
    spread = torch.einsum("pni,pnj->nij", points - loc, points - loc) / 6
    torch.testing.assert_close(spread, scale @ scale.mT)


@pytest.mark.parametrize("kind", [AmortizedGuide, PerDatumGuide])
def test_bound_is_exact_and_its_optimum_is_the_posterior(problem, kind):
    model, x = problem
    guide = at_the_optimum(AmortizedGuide(x, 3) if kind is AmortizedGuide else PerDatumGuide(len(x), 3), model, x)
    terms = EXACT.terms(model, guide, x)
    torch.testing.assert_close(terms.elbo, model.log_evidence(x).sum(), rtol=1e-12, atol=1e-10)
    terms.elbo.backward()
    assert all(p.grad.abs().max() < 1e-8 for p in guide.parameters())


def test_bound_off_the_optimum_falls_short_by_the_kl_to_the_posterior(problem):
    """log p(x) = ELBO + KL(q ‖ posterior), written out for Gaussians."""
    model, x = problem
    guide = AmortizedGuide(x, 3)
    loc, scale = guide.moments(x)
    exact = torch.distributions.MultivariateNormal((x - model.mean) @ model.encoder.T, model.covariance)
    gap = torch.distributions.kl_divergence(torch.distributions.MultivariateNormal(loc, scale_tril=scale), exact).sum()
    assert gap > 10
    torch.testing.assert_close(model.log_evidence(x).sum() - EXACT.terms(model, guide, x).elbo, gap)


def test_bound_on_sigma_points_is_the_mean_over_draws(problem):
    model, x = problem
    guide = AmortizedGuide(x, 3)
    loss = pe.TraceBeta_ELBO(kl="sampled", num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        elbos = torch.stack([loss.terms(model, guide.drawing_guide, x).elbo for _ in range(100)])
        exact = EXACT.terms(model, guide, x).elbo
    # 5 standard errors: a false alarm in two of a million seeds
    assert abs(elbos.mean() - exact) < 5 * elbos.std() / 100**0.5


def test_encoder_in_the_coordinates_of_x(problem):
    _, x = problem
    guide = AmortizedGuide(x, 3)
    ours = guide.moments(x)[0] - guide.moments(torch.zeros_like(x))[0]
    torch.testing.assert_close(ours, x @ guide.encoder.T)


def test_ridge_formula_tends_to_the_pseudo_inverse(problem):
    """Its singular values are s / (s² + λ): the distance to A⁺ is known."""
    model, _ = problem
    inverse, s = torch.linalg.pinv(model.weight), torch.linalg.svdvals(model.weight)
    for variance in (1e-6, 1e-2, 10.0):
        ridge = LinearGaussian(model.weight, model.mean, variance**0.5).encoder
        torch.testing.assert_close((ridge - inverse).norm(), (s / (s**2 + variance) - 1 / s).norm())


def test_training_finds_the_ridge_formula(problem):
    model, x = problem
    guide = AmortizedGuide(x, 3)
    example.train(model, guide, x, steps=150)
    assert example.distance(guide.encoder, model.encoder) < 0.01
    assert example.distance(guide.encoder, torch.linalg.pinv(model.weight)) > 0.02


@pytest.mark.parametrize("particles", [1, 4])
def test_another_number_of_particles_is_refused(problem, particles):
    model, x = problem
    loss = pe.TraceBeta_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    with pytest.raises(ValueError, match="Set num_particles=6 and vectorize_particles=True"):
        loss.terms(model, AmortizedGuide(x, 3), x)


def test_drawing_guide_takes_any_number(problem):
    _, x = problem
    with pyro.plate("particles", 7, dim=-2):
        assert AmortizedGuide(x, 3).drawing_guide(x).shape == (7, len(x), 3)


@pytest.mark.slow
def test_example(tmp_path, capsys):
    example.main(None, tmp_path, smoke_test=True)
    printed = capsys.readouterr().out
    assert "claim: 2 encoders within" in printed
    assert "times faster per pixel" in printed
    assert (tmp_path / "pseudo_inverse.png").stat().st_size > 10_000
    z = az.from_netcdf(str(tmp_path / "posterior.nc"))["posterior"]["z"]
    assert z.sizes == {"chain": 1, "draw": 200, "data": 200, "z_dim_0": 3}


@pytest.mark.slow
@pytest.mark.thorough
def test_example_on_pixels_from_a_file(tmp_path, capsys):
    model, x = simulate(60)
    path = tmp_path / "pixels.npz"
    np.savez(path, weight=model.weight, x=x - model.mean, noise=np.array(0.5))
    example.main(path, tmp_path, smoke_test=True)
    assert "claim: 2 encoders within" in capsys.readouterr().out
