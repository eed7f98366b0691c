"""Eight schools: the quadrature against brute force over (μ, τ), and both programs against it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from models.eight_schools import SIGMA, Exact, Y, centered, noncentered

EXACT = Exact.of(SIGMA, Y)


def over_mu_and_tau():
    """Weights, log evidence and values of a grid over both, with the effects integrated out only."""
    mu, t = (torch.linspace(*x, dtype=torch.float64) for x in ((-40, 50, 901), (-25, 4.5, 600)))
    tau = t.exp()[:, None]
    spread = (SIGMA**2 + tau[..., None] ** 2).sqrt()
    density = dist.Normal(mu[None, :, None], spread).log_prob(Y).sum(-1) + t[:, None]
    density = density + dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfNormal(5.0).log_prob(tau)
    total = density.logsumexp((0, 1))
    return (density - total).exp(), total + (mu.diff()[0] * t.diff()[0]).log(), mu, tau


def test_evidence_and_moments_are_those_of_a_grid_over_both_population_parameters():
    weights, evidence, mu, tau = over_mu_and_tau()
    torch.testing.assert_close(EXACT.log_evidence, evidence, rtol=0, atol=1e-9)
    keep = tau[..., None] ** 2 / (SIGMA**2 + tau[..., None] ** 2)
    theta = keep * Y + (1 - keep) * mu[:, None]
    means = [(weights * x).sum() for x in (mu.expand_as(weights), tau.expand_as(weights), *theta.unbind(-1))]
    squares = [mu.expand_as(weights) ** 2, tau.expand_as(weights) ** 2]
    squares += list((theta**2 + keep * SIGMA**2).unbind(-1))
    mean, sd = EXACT.moments
    torch.testing.assert_close(mean, torch.stack(means), rtol=0, atol=1e-8)
    second = torch.stack([(weights * x).sum() for x in squares])
    torch.testing.assert_close(sd, (second - mean**2).sqrt(), rtol=0, atol=1e-8)


def test_the_grid_is_wide_and_fine_enough():
    finer = Exact(SIGMA, Y, torch.linspace(-40.0, 5.0, 9001, dtype=torch.float64))
    torch.testing.assert_close(EXACT.log_evidence, finer.log_evidence, rtol=0, atol=1e-11)
    torch.testing.assert_close(EXACT.moments, finer.moments, rtol=0, atol=1e-9)


def test_draws_have_the_exact_moments():
    pyro.set_rng_seed(0)
    draws = EXACT.draw(100_000)
    found = torch.cat([draws["mu"][:, None], draws["tau"][:, None], draws["theta"]], 1)
    mean, sd = EXACT.moments
    # 5 SE of ten means: a false alarm in six of a million.
    assert ((found.mean(0) - mean).abs() < 5 * sd / len(found) ** 0.5).all()
    torch.testing.assert_close(found.std(0), sd, rtol=0.02, atol=0)


@pytest.mark.parametrize("program", [centered, noncentered])
def test_programs_have_the_density_that_the_quadrature_integrates(program):
    """Log p(y, μ, t) = log p(y, θ, μ, τ) + log τ - log p(θ | y, μ, τ), at any θ."""
    pyro.set_rng_seed(0)
    mu, tau, theta = torch.tensor(4.0).double(), torch.tensor(3.0).double(), torch.randn(8).double()
    given = {"mu": mu, "tau": tau, "theta": theta, "shift": (theta - mu) / tau}
    joint = poutine.trace(poutine.condition(program, data=given)).get_trace(SIGMA, Y).log_prob_sum()
    if program is noncentered:
        joint = joint - 8 * tau.log()
    keep = tau**2 / (SIGMA**2 + tau**2)
    conditional = dist.Normal(keep * Y + (1 - keep) * mu, keep.sqrt() * SIGMA).log_prob(theta).sum()
    at = Exact(SIGMA, Y, tau.log()[None])
    loc, variance = at.mu_given_tau
    expected = at.log_joint[0] + dist.Normal(loc[0], variance[0].sqrt()).log_prob(mu)
    torch.testing.assert_close(joint + tau.log() - conditional, expected)
