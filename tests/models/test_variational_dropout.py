"""Variational dropout: its KL against quadrature and draws, its noise against dropout, and what pruning removes."""

import math

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import pyro_elbo as pe
from examples import variational_dropout as example
from models.variational_dropout import PRUNED, DropoutNet, LogUniform, dropout_kl, log_alpha

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


@pytest.fixture
def net():
    torch.manual_seed(0)
    return DropoutNet(5, 4, 3)


def kl_by_quadrature(log_alpha):
    """E log |1 + √α ε| - ½ log α - E log |ε|: the singularity is integrable, and no point of the grid lies on it."""
    noise = torch.linspace(-14, 14, 2_000_001, dtype=torch.float64)
    density = (-noise.square() / 2).exp() / math.sqrt(2 * math.pi)
    gain = (1 + math.exp(log_alpha / 2) * noise).abs().log() - noise.abs().clamp_min(7e-6 / math.e).log()
    return torch.trapezoid(density * gain, noise) - log_alpha / 2


@pytest.mark.parametrize("log_alpha", [-8.0, -4.0, -2.0, -0.7, 0.3, 2.0, 4.0])
def test_approximation_is_within_a_hundredth_of_quadrature(log_alpha):
    assert abs(dropout_kl(torch.tensor(log_alpha).double()) - kl_by_quadrature(log_alpha)) < 0.01


def test_approximation_vanishes_and_falls():
    kl = dropout_kl(torch.linspace(-10, 30, 100).double())
    assert (kl.diff() < 0).all()
    assert kl[-1] < 1e-12


@pytest.mark.parametrize("log_alpha", [-4.0, 0.0, 3.0])
def test_analytic_term_is_the_mean_of_sampled_terms(log_alpha):
    """Both of the library's forms of the KL, so that prior, constant and formula agree; θ does not matter."""
    theta = torch.tensor([0.3, -2.0]).double()
    weights = torch.Size([20_000, 2])

    def model():
        pyro.sample("w", LogUniform(weights).to_event(2))

    def guide():
        pyro.sample("w", dist.Normal(theta, math.exp(log_alpha / 2) * theta.abs()).expand(weights).to_event(2))

    exact, sampled = (pe.TraceBeta_ELBO(kl=form).terms(model, guide) for form in ("auto", "sampled"))
    assert exact.is_analytic["w"]
    assert not sampled.is_analytic["w"]
    draws = sampled.kl_per_dim["w"]
    # 0.01 for the approximation, and 5 standard errors: a false alarm in two of a million seeds
    error = (draws.mean(0) - exact.kl_per_dim["w"].mean(0)).abs()
    assert (error < 0.01 + 5 * draws.std(0) / len(draws) ** 0.5).all()


def test_beta_and_warm_up_act_on_the_weights_of_each_layer(net):
    loss = pe.TraceBeta_ELBO(beta=pe.LinearWarmup(0.0, 1.0, steps=4))
    loss.step = 1
    terms = loss.terms(net.model, net.guide, X, Y)
    known = {f"weight_{i}": dropout_kl(weight.log_alpha).sum() for i, weight in enumerate(net.weights)}
    torch.testing.assert_close(dict(terms.kl), known)
    torch.testing.assert_close(terms.objective, -terms.distortion - terms.rate / 4)


def test_minibatches_count_the_weights_once(net):
    whole = pe.TraceBeta_ELBO().terms(net.model, net.guide, X, Y)
    net.size = 1200
    part = pe.TraceBeta_ELBO().terms(net.model, net.guide, X, Y)
    torch.testing.assert_close(part.rate, whole.rate)
    assert part.num_data == 1200
    assert part.distortion > 50 * whole.distortion


def test_particles_run_the_network_with_weights_of_their_own(net):
    loss = pe.TraceBeta_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    nats = loss.terms(net.model, net.guide, X, Y).log_likelihood["y"]
    assert nats.shape == (12,)
    drawn = [weight.posterior.sample((3, 1)) for weight in net.weights]
    each = [net.logits(X, [w[i, 0] for w in drawn]) for i in range(3)]
    torch.testing.assert_close(net.logits(X, drawn), torch.stack(each))


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_starting_rate_is_multiplicative_gaussian_noise(rate):
    """w / θ ~ Normal(1, r / (1 - r)), the mean and the variance of dropout's Bernoulli(1 - r) / (1 - r)."""
    torch.manual_seed(0)
    net = DropoutNet(50, 40, rate=rate)
    theta = net.weights[0].theta.detach()
    torch.testing.assert_close(net.weights[0].log_alpha, torch.full_like(theta, math.log(rate / (1 - rate))))
    noise = (net.weights[0].posterior.sample((20,)) / theta).flatten().numpy()
    kept = 1 - rate
    dropout = np.random.default_rng(0).binomial(1, kept, noise.size) / kept
    for ours, theirs in ((noise, dropout), ((noise - 1) ** 2, (dropout - 1) ** 2)):
        # 5 standard errors: a false alarm in two of a million seeds
        error = np.sqrt((ours.var() + theirs.var()) / noise.size)
        assert abs(ours.mean() - theirs.mean()) < 5 * error
    # Kolmogorov-Smirnov: a false alarm in one of a million seeds
    assert stats.kstest(noise, "norm", args=(1.0, math.sqrt(rate / kept))).pvalue > 1e-6


def test_pruning_removes_the_weights_that_are_noise_and_no_others(net):
    first = net.weights[0]
    first.raw_scale.data = torch.full_like(first.theta, 1.0).expm1().log()
    first.theta.data = torch.full_like(first.theta, 1.0)
    first.theta.data[0] = math.exp(-(PRUNED + 0.1) / 2)
    first.theta.data[1] = math.exp(-(PRUNED - 0.1) / 2)
    assert net.pruned == 5 / (20 + 12)
    assert (first.mean(pruned=True)[0] == 0).all()
    assert torch.equal(first.mean(pruned=True)[1:], first.theta[1:])
    assert torch.equal(first.mean(pruned=False), first.theta)


def test_a_weight_of_zero_has_finite_terms_and_gradients():
    theta, scale = torch.zeros(2, requires_grad=True), torch.tensor([0.5, 1e-3], requires_grad=True)
    kl = dropout_kl(log_alpha(theta, scale))
    kl.sum().backward()
    assert torch.isfinite(torch.cat([kl, theta.grad, scale.grad])).all()


def test_prediction_averages_probabilities(net):
    p = net.predict(X, draws=50)
    torch.testing.assert_close(p.sum(-1), torch.ones(12))
    assert (p - net.predict_at_mean(X, pruned=False)).abs().max() > 1e-3
    for weight in net.weights:
        weight.raw_scale.data.fill_(-30.0)
    torch.testing.assert_close(net.predict(X, draws=2), net.predict_at_mean(X, pruned=False), atol=1e-5, rtol=0)


def test_rotation_by_quarter_turns_is_that_of_the_grid():
    images = torch.rand(2, 64)
    torch.testing.assert_close(example.rotate(images, 0), images)
    turned = example.rotate(images, 90).reshape(2, 8, 8)
    expected = images.reshape(2, 8, 8)
    assert any((turned - expected.rot90(k, (1, 2))).abs().max() < 1e-5 for k in (1, 3))


def test_calibration_bins():
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55]])
    found = example.Calibration.of(p, torch.tensor([0, 1, 1, 1]), bins=2)
    # confidences 0.7 and 0.55 and 0.8 and 0.9 lie in the bin above a half; three of four are right
    assert found.counts.tolist() == [0, 4]
    assert math.isclose(found.confidence[1], 0.7375, rel_tol=1e-5)
    assert math.isclose(found.accuracy[1], 0.75)
    assert math.isclose(found.error, abs(0.75 - 0.7375), rel_tol=1e-4)


@pytest.mark.slow
def test_example(tmp_path, capsys):
    example.main(None, tmp_path, smoke_test=True)
    assert "claim: breast cancer" in capsys.readouterr().out
    assert (tmp_path / "variational_dropout.png").stat().st_size > 10_000
    posterior = az.from_netcdf(str(tmp_path / "posterior.nc"))["posterior"]
    assert posterior["weight_0"].sizes == {"chain": 1, "draw": 100, "unit": 50, "column": 30}
