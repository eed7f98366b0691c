"""The conditional autoencoder against quadrature over a latent of one dimension, and its example."""

import arviz as az
import pyro
import pytest
import torch
from pyro import poutine

import pyro_elbo as pe
from examples import conditional_vae as example
from models.conditional_vae import ConditionalVAE

N, PIXELS, CLASSES, TOTAL = 6, 5, 3, 4


def make(z_dim=2):
    """A model with unlike priors, in double precision, and data."""
    pyro.set_rng_seed(1)
    torch.set_default_dtype(torch.float64)
    vae = ConditionalVAE(PIXELS, CLASSES, z_dim=z_dim, hidden=7, total=TOTAL)
    with torch.no_grad():
        for parameter in (vae.prior_loc, vae.raw_prior_scale, vae.class_logits):
            parameter.normal_()
    return vae, torch.randint(TOTAL + 1, (N, PIXELS)).double(), torch.arange(N) % CLASSES


def log_joint(vae, z, x, c):
    """log p(x, c, z) for every z: shape (points, n)."""
    trace = poutine.trace(poutine.condition(vae.model, {"z": z})).get_trace(x, c)
    trace.compute_log_prob()
    return sum(trace.nodes[name]["log_prob"] for name in ("c", "z", "x"))


@torch.no_grad()
def by_quadrature(vae, x, c):
    """ELBO, KL(q || p(z | x, c)), log p(x, c), and the variance of log p(x | z) under q: nats per row."""
    z = torch.linspace(-25.0, 25.0, 5001)[:, None, None].expand(-1, len(x), 1)
    joint = log_joint(vae, z, x, c)
    q = torch.distributions.Normal(*vae.encode(x, c)).log_prob(z).squeeze(-1)
    prior = torch.distributions.Normal(*vae.prior(c)).log_prob(z).squeeze(-1)
    mean = lambda values: torch.trapezoid(q.exp() * values, z[:, 0, 0], dim=0)  # noqa: E731
    evidence = torch.trapezoid(joint.exp(), z[:, 0, 0], dim=0).log()
    likelihood = joint - prior
    variance = mean(likelihood.square()) - mean(likelihood).square()
    return mean(joint - q), mean(q - joint + evidence), evidence, variance


def test_bound_under_every_label_is_that_of_quadrature():
    vae, x, _ = make(z_dim=1)
    particles = 4000
    bounds = vae.elbo_per_label(x, num_particles=particles)
    assert bounds.shape == (N, CLASSES)
    for c in range(CLASSES):
        elbo, gap, evidence, variance = by_quadrature(vae, x, torch.full((N,), c))
        torch.testing.assert_close(elbo + gap, evidence)
        assert (gap > 0).all()
        # 18 estimates, their KL analytic: 5 SE, a false alarm in 100 000
        assert ((bounds[:, c] - elbo).abs() < 5 * (variance / particles).sqrt()).all()


def test_probabilities_of_all_images_and_labels_add_up_to_one():
    vae, _, _ = make(z_dim=1)
    vae.decoder[-1] = torch.nn.Linear(7, 1)  # a single pixel has few images
    vae.encoder[0] = torch.nn.Linear(1 + CLASSES, 7)
    x = torch.arange(TOTAL + 1.0)[:, None].repeat(CLASSES, 1)
    c = torch.arange(CLASSES).repeat_interleave(TOTAL + 1)
    evidence = by_quadrature(vae, x, c)[2]
    torch.testing.assert_close(evidence.exp().sum(), torch.tensor(1.0))


def test_kl_is_that_from_the_prior_of_the_class():
    vae, x, c = make()
    terms = pe.TraceBeta_ELBO().terms(vae.model, vae.guide, x, c)
    (loc, scale), (prior_loc, prior_scale) = vae.encode(x, c), vae.prior(c)
    ratio, shift = scale / prior_scale, (loc - prior_loc) / prior_scale
    torch.testing.assert_close(terms.kl_per_dim["z"], (ratio.square() + shift.square() - 1) / 2 - ratio.log())
    assert terms.is_analytic["z"]
    torch.testing.assert_close(terms.log_likelihood["c"], vae.class_logits.log_softmax(0)[c])


def test_style_is_kept_when_the_class_changes():
    vae, x, c = make()
    with torch.no_grad():
        torch.testing.assert_close(vae.restyle(x, c, c), TOTAL * vae.decode(vae.encode(x, c)[0], c).sigmoid())
        vae.encoder[-1].weight.zero_()  # every image has the style (1, -2) of class 0
        vae.encoder[-1].bias[:2] = vae.prior_loc[0] + torch.tensor([1.0, -2.0]) * vae.prior(c)[1][0]
        expected = vae.prior_loc[2] + torch.tensor([1.0, -2.0]) * vae.prior(c)[1][2]
        second = torch.full((N,), 2)
        torch.testing.assert_close(
            vae.restyle(x, torch.zeros_like(c), second), TOTAL * vae.decode(expected.expand(N, 2), second).sigmoid()
        )


def test_gradient_reaches_every_parameter():
    vae, x, c = make()
    pe.TraceBeta_ELBO().loss_and_grads(vae.model, vae.guide, x, c)
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in vae.parameters())


def test_drops_are_averaged_by_true_label():
    bounds = torch.tensor([[-1.0, -4.0], [-2.0, -3.0], [-9.0, -5.0]])
    drops = example.average_drops(bounds, torch.tensor([0, 0, 1]))
    assert drops.tolist() == [[0.0, 2.0], [4.0, 0.0]]


@pytest.mark.slow
def test_example_on_its_embedded_digits(tmp_path, capsys):
    example.main(None, tmp_path, smoke_test=True)
    assert "the true label has the highest for " in capsys.readouterr().out
    assert (tmp_path / "conditional_vae.png").stat().st_size > 20_000
    data = az.from_netcdf(str(tmp_path / "posterior.nc"))
    assert data["posterior"]["z"].dims == ("chain", "draw", "data", "z_dim_0")


@pytest.mark.thorough
def test_example_on_a_tenth_of_fashion_mnist(data_dir, tmp_path, capsys):
    example.main(data_dir / "fashion_mnist_20k.npz", tmp_path, smoke_test=True)
    assert "the true label has the highest for " in capsys.readouterr().out


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(20))
def test_every_seed_reads_the_digits(seed, tmp_path):
    example.main(None, tmp_path, seed=seed, smoke_test=True)
