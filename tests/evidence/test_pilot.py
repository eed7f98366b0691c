"""The pilot of annealing on Gaussians, where distances and scales are known."""

import math

import pytest
import torch

from pyro_elbo.evidence.hmc import Point
from pyro_elbo.evidence.pilot import LEAST_TEMPERATURES, MOST_TEMPERATURES, run_pilot

SCALES = torch.logspace(-3, 0, 6, dtype=torch.float64)  # of the likelihood; the prior is standard normal


def evaluate_at(precision):
    """From N(0, I) to N(0, 1 / (1 + precision)), in three rows."""

    def evaluate(beta, u):
        ratio = -0.5 * (precision * u**2).sum(-1)
        log_density = -0.5 * u.square().sum(-1) + beta * ratio
        return Point(u, log_density, ratio, -(1 + beta[:, None] * precision) * u)

    return evaluate


def pilot_of(precision, chains=16):
    torch.manual_seed(0)
    start = torch.randn(chains, 3, len(precision), dtype=torch.float64)
    return run_pilot(evaluate_at(precision), start, num_leapfrog=2, progress=False)


def exact_distance(precision):
    """The integral of the standard deviation of log r over β, by log β."""
    log_beta = torch.linspace(-40, 0, 20_001, dtype=torch.float64)
    beta = log_beta.exp()[:, None]
    spread = (0.5 * (precision / (1 + beta * precision)) ** 2).sum(1).sqrt()
    return torch.trapezoid(spread * beta[:, 0], log_beta)


def test_step_sizes_follow_the_scale_of_every_coordinate_at_every_temperature():
    pilot = pilot_of(1 / SCALES**2)
    plan = pilot.plan(200)
    for t in (1, 100, 200):
        scales = (1 + plan.betas[t][:, None] / SCALES**2) ** -0.5
        relative = (plan.step_sizes[t] / scales).log()
        # a step of 0.1 to 2 standard deviations in every direction, although these differ by up to 1000
        assert (relative.max(-1).values - relative.min(-1).values < math.log(3)).all()
        assert ((relative > math.log(0.1)) & (relative < math.log(2))).all()


def test_the_pilot_measures_the_thermodynamic_distance_and_takes_temperatures_for_it():
    precision = 1 / SCALES**2
    pilot, exact = pilot_of(precision), exact_distance(precision)
    distance = pilot.pieces.sum(0)
    assert ((distance / exact > 0.9) & (distance / exact < 1.5)).all()  # too large: chains lag behind the temperature
    plan = pilot.plan(None)
    assert len(plan.betas) - 1 == math.ceil(4 * distance.max().item() ** 2)
    assert (plan.betas.diff(dim=0) >= 0).all()
    assert (plan.betas[0] == 0).all()
    assert (plan.betas[-1] == 1).all()


@pytest.mark.parametrize(("precision", "count"), [(0.0, LEAST_TEMPERATURES), (1e12, MOST_TEMPERATURES)])
def test_a_likelihood_that_says_nothing_or_far_too_much_keeps_the_number_of_temperatures_in_bounds(precision, count):
    plan = pilot_of(torch.full((20,), precision, dtype=torch.float64), chains=2).plan(None)
    assert len(plan.betas) == count + 1
    assert torch.isfinite(plan.step_sizes).all()
