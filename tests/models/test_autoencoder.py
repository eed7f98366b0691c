"""The bound around any encoder and decoder: exact on linear-Gaussian ones; the autoencoder and its example."""

import math
from dataclasses import replace

import arviz as az
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import pyro_elbo as pe
from examples import autoencoder as example
from models.autoencoder import Autoencoder, around_codes, best_width, train
from models.linear_gaussian import simulate
from pyro_elbo.errors import ArgumentError

LG, X = simulate(200, d=5, k=3)
COUNTS = torch.randint(17, (50, 64), generator=torch.Generator().manual_seed(0)).float()


def linear(width):
    """The linear-Gaussian model with the exact posterior mean as its code."""
    return around_codes(
        lambda x: (x - LG.mean) @ LG.encoder.T,
        lambda z: z @ LG.weight.T + LG.mean,
        lambda loc: dist.Normal(loc, LG.noise).to_event(1),
        X,
        width,
    )


def expected_terms(programs):
    """Distortion and rate per row in closed form: E‖x - W z - μ‖² gains the trace of the posterior's covariance."""
    codes, width, d = programs.encode(X), programs.width, X.shape[1]
    spread = ((LG.weight * width * programs.scale) ** 2).sum()
    error = (X - programs.decode(codes)).square().sum(1).mean() + spread
    distortion = error / (2 * LG.noise**2) + d * math.log(LG.noise * math.sqrt(2 * math.pi))
    return distortion.item(), 3 * (width**2 / 2 - math.log(width))


@pytest.mark.parametrize("width", [0.01, 0.3, 1.0])
def test_bound_of_a_linear_gaussian_autoencoder(width):
    programs = linear(width)
    distortion, rate = expected_terms(programs)
    loss = pe.TraceBeta_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=1)
    terms = loss.terms(programs.model, programs.guide, X)
    assert terms.is_analytic["z"]
    assert terms.per_datum.rate.item() == pytest.approx(rate, rel=1e-12)
    error = terms.sites["x"].nats.mean(1).std().item() / 400**0.5
    # 5 standard errors over draws: a false alarm in two of a million seeds
    assert abs(terms.per_datum.distortion.item() - distortion) < 5 * error


def test_best_width_of_a_linear_gaussian_autoencoder():
    programs = linear(None)
    gain = (LG.weight * programs.scale).square().sum().item() / LG.noise**2
    # found with one draw a row: 200 rows of 3 draws tell their variance to 6 %, the width to 3 %
    assert programs.width == pytest.approx((3 / (3 + gain)) ** 0.5, rel=0.12)


def test_a_narrow_posterior_has_the_distortion_of_the_reconstruction():
    programs = linear(1e-6)
    terms = pe.TraceBeta_ELBO().terms(programs.model, programs.guide, X)
    expected = dist.Normal(programs.decode(programs.encode(X)), LG.noise).log_prob(X).sum(1)
    torch.testing.assert_close(terms.log_likelihood["x"], expected, rtol=1e-4, atol=1e-4)
    assert terms.per_datum.rate.item() == pytest.approx(3 * math.log(1e6))


def test_any_modules_take_part_and_stay_as_they_were():
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    decoder = nn.Sequential(nn.Linear(2, 64), nn.Dropout(0.5), nn.Unflatten(-1, (1, 8, 8)))
    images = COUNTS.view(-1, 1, 8, 8) / 16
    for module in (encoder, decoder):
        module.eval()
    state, before = torch.get_rng_state(), [p.clone() for p in (*encoder.state_dict().values(), *decoder.parameters())]
    programs = around_codes(encoder, decoder, lambda x: dist.Normal(x, 0.5).to_event(3), images)
    assert torch.equal(torch.get_rng_state(), state)
    encoder.train(), decoder.train()
    terms = pe.TraceBeta_ELBO().terms(programs.model, programs.guide, images)
    assert terms.kl["z"].shape == terms.log_likelihood["x"].shape == (50,)
    assert encoder.training
    assert decoder[1].training
    for p, q in zip((*encoder.state_dict().values(), *decoder.parameters()), before, strict=True):
        assert torch.equal(p, q)
    assert all(p.grad is None for p in encoder.parameters())


def test_best_width_is_a_maximum():
    programs = linear(None)
    loss = pe.TraceBeta_ELBO()

    def elbo(width):
        torch.manual_seed(0)
        wide = replace(programs, width=width)
        return loss.terms(wide.model, wide.guide, X).elbo

    assert programs.width == best_width(linear(0.5), X)
    assert elbo(programs.width) > max(elbo(0.9 * programs.width), elbo(1.1 * programs.width))


def test_codes_that_are_all_alike_are_refused():
    with pytest.raises(ArgumentError, match=r"dimensions \[1\] of the codes are the same for all rows.*Leave them out"):
        around_codes(lambda x: x[:, :2] * torch.tensor([1.0, 0.0]), lambda z: z, dist.Normal, COUNTS, 0.1)


def test_training_is_repeatable_and_lowers_the_reconstruction_error():
    x, errors, nets = COUNTS / 16, [], []
    for _ in range(2):
        torch.manual_seed(1)
        net = Autoencoder(z_dim=3, hidden=16)
        before = binary_cross_entropy_with_logits(net(x), x)
        train(net, x, epochs=20, seed=2)
        errors.append(binary_cross_entropy_with_logits(net(x), x) - before)
        nets.append(net)
    assert errors[0] < -0.001
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


@pytest.mark.slow
def test_example_measures_and_draws_both_models(tmp_path):
    fits = example.fit(0, epochs=1)
    rows = example.measure(fits, 0)
    differences = example.report([rows, rows])
    assert list(rows) == ["width 0.01", "best width", "VAE"]
    for figure, (mean, half) in differences.items():
        assert mean == pytest.approx(rows["VAE"][figure] - rows["best width"][figure])
        assert half == 0.0
    example.draw(fits, tmp_path / "autoencoder.png")
    assert (tmp_path / "autoencoder.png").stat().st_size > 20_000


@pytest.mark.slow
@pytest.mark.thorough
def test_example(tmp_path, capsys):
    example.main(tmp_path, smoke_test=True)
    assert "claim: over 2 seeds the autoencoder's distortion is" in capsys.readouterr().out
    assert (tmp_path / "autoencoder.png").stat().st_size > 20_000
    for name in ("autoencoder", "vae"):
        z = az.from_netcdf(str(tmp_path / f"{name}.nc"))["posterior"]["z"]
        assert z.sizes == {"chain": 1, "draw": 100, "data": 397, "z_dim_0": 32}


@pytest.mark.slow
@pytest.mark.thorough
def test_claims_over_five_seeds(tmp_path, capsys):
    example.main(tmp_path)
    assert "claim: over 5 seeds the autoencoder's distortion is" in capsys.readouterr().out
