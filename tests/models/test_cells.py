"""The Gaussians of the sequence models: ordinary near zero, and bounded whatever the networks say."""

import math

import pyro
import pytest
import torch

import pyro_elbo as pe
from models.cells import gaussian
from models.dmm import DMM
from models.srnn import SRNN
from models.vrnn import VRNN, MarkovVRNN

C, S = 10.0, 0.03
MOST = (4 * C**2 + (C + S) ** 2) / (2 * S**2)  # nats a dimension


def test_small_means_and_scales_are_those_of_the_networks():
    loc, raw = torch.linspace(-1, 1, 9).double(), torch.linspace(-3, 1, 9).double()
    q = gaussian(loc, raw).base_dist
    torch.testing.assert_close(q.loc, loc, rtol=4e-3, atol=0)  # tanh(x) > x (1 - x² / 3)
    torch.testing.assert_close(q.scale, torch.nn.functional.softplus(raw) + S, rtol=6e-3, atol=0)


def test_the_kl_of_any_two_is_bounded_and_the_bound_is_sharp():
    """All pairs of extreme Gaussians; the largest KL differs from the bound by a logarithm and a half."""
    extremes = torch.tensor([-1e9, -30.0, -1.0, 0.0, 1.0, 30.0, 1e9]).double()
    loc, raw = (x.reshape(-1, 1) for x in torch.meshgrid(extremes, extremes, indexing="ij"))
    q, p = gaussian(loc[:, None], raw[:, None]), gaussian(loc, raw)
    kl = torch.distributions.kl_divergence(q, p)
    assert kl.max() < MOST
    assert kl.max().item() == pytest.approx(MOST - math.log(C / S + 1) - 0.5)


@pytest.mark.parametrize("kind", [DMM, SRNN, VRNN, MarkovVRNN])
def test_no_weights_make_the_kl_grow_over_time(kind):
    """Weights of which each step multiplies z by thousands: without bounds, z would overflow after a few frames."""
    pyro.set_rng_seed(0)
    module = kind(4, 2)
    for p in module.parameters():
        p.data *= 30
    x = torch.rand(3, 100, 4).gt(0.6).float()
    terms = pe.TraceTimestep_ELBO().terms(module.model, module.guide, x)
    assert terms.elbo.isfinite()
    assert terms.kl["z"].max() < 2 * MOST
