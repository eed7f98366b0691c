"""The semi-supervised autoencoder against sums over classes and quadrature, and its example."""

import arviz as az
import pyro
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from torch.distributions import Binomial, Normal

import pyro_elbo as pe
from examples import ss_vae_digits as example
from models.ss_vae import SSVAE, UNKNOWN
from tests.test_conformance import assert_same, value_and_gradient

N, PIXELS, CLASSES, TOTAL = 5, 4, 3, 6
LABEL = torch.tensor([UNKNOWN, 0, UNKNOWN, 2, UNKNOWN])


def make(alpha):
    pyro.set_rng_seed(1)
    torch.set_default_dtype(torch.float64)
    vae = SSVAE(PIXELS, CLASSES, z_dim=1, hidden=7, total=TOTAL, alpha=alpha)
    return vae, torch.randint(TOTAL + 1, (N, PIXELS)).double()


@torch.no_grad()
def by_quadrature(vae, x, c):
    """Return the mean and the variance of log p(x | z, c) under q(z | x, c), and its KL: nats per row."""
    y = torch.full((len(x),), c)
    z = torch.linspace(-15.0, 15.0, 3001)[:, None, None].expand(-1, len(x), 1)
    loc, scale = vae.encode(x, y)
    q = Normal(loc, scale)
    likelihood = Binomial(TOTAL, logits=vae.decode(z, y)).log_prob(x).sum(-1)
    mean = lambda v: torch.trapezoid(q.log_prob(z).exp().squeeze(-1) * v, z[:, 0, 0], dim=0)  # noqa: E731
    kl = torch.distributions.kl_divergence(q, Normal(0.0, 1.0)).squeeze(-1)
    return mean(likelihood), mean(likelihood.square()) - mean(likelihood).square(), kl


def test_bound_is_the_average_over_classes_and_that_of_the_label_where_it_is_known():
    """Likelihoods within 5 SE of quadrature (1 in 100 000); KLs exact."""
    vae, x = make(alpha=1.0)
    particles = 4000
    loss = pe.TraceBeta_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    terms = loss.terms(vae.model, vae.guide, x, LABEL)
    known = torch.nn.functional.one_hot(LABEL.clamp(min=0), CLASSES).double()
    q = torch.where((LABEL == UNKNOWN)[:, None], vae.classify(x).softmax(-1).detach(), known)
    moments = [by_quadrature(vae, x, c) for c in range(CLASSES)]
    likelihood, variance, kl = (torch.stack(v, -1) for v in zip(*moments, strict=True))
    torch.testing.assert_close(terms.posterior["y"].detach(), q)
    torch.testing.assert_close(terms.kl["y"].detach(), (torch.xlogy(q, q) + q * torch.tensor(CLASSES).log()).sum(-1))
    torch.testing.assert_close(terms.kl["z"].detach(), (q * kl).sum(-1))
    torch.testing.assert_close(terms.kl_per_dim["z"].detach().sum(-1), (q * kl).sum(-1))
    error = (terms.log_likelihood["x"].detach() - (q * likelihood).sum(-1)).abs()
    assert (error < 5 * ((q.square() * variance).sum(-1) / particles).sqrt()).all()
    of_label = vae.classify(x).log_softmax(-1).detach().gather(1, LABEL.clamp(min=0)[:, None]).squeeze(1)
    torch.testing.assert_close(terms.log_likelihood["label"].detach(), torch.where(LABEL == UNKNOWN, 0.0, of_label))


def test_equals_trace_enum_elbo():
    vae, x = make(alpha=3.0)
    ours = value_and_gradient(pe.TraceBeta_ELBO(kl="sampled"), vae.model, vae.guide, (x, LABEL))
    assert_same(ours, value_and_gradient(TraceEnum_ELBO(max_plate_nesting=1), vae.model, vae.guide, (x, LABEL)))


def test_labels_train_the_classifier_through_alpha_alone():
    """Rows with a label have a q(y) without parameters: at alpha = 0 they leave the classifier as it is."""
    for alpha, trains in ((0.0, False), (1.0, True)):
        vae, x = make(alpha)
        pe.TraceBeta_ELBO().loss_and_grads(vae.model, vae.guide, x[:2], torch.tensor([1, 2]))
        moved = sum(p.grad.abs().sum() for p in vae.classifier.parameters() if p.grad is not None)
        assert (moved > 1e-12) == trains
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in vae.parameters())


def test_minibatches_are_scaled_to_the_full_data():
    vae, x = make(alpha=2.0)
    whole = pe.TraceBeta_ELBO().terms(vae.model, vae.guide, x, LABEL)
    vae.size = 4 * N
    part = pe.TraceBeta_ELBO().terms(vae.model, vae.guide, x, LABEL)
    assert part.num_data == 4 * N
    torch.testing.assert_close(part.kl_total["y"], 4 * whole.kl_total["y"])
    torch.testing.assert_close(part.log_likelihood_total["label"], 4 * whole.log_likelihood_total["label"])


@pytest.mark.slow
def test_example_on_its_embedded_digits(tmp_path, capsys):
    example.main(tmp_path, smoke_test=True)
    assert "claim: accuracy " in capsys.readouterr().out
    assert (tmp_path / "ss_vae_digits.png").stat().st_size > 20_000
    posterior = az.from_netcdf(str(tmp_path / "posterior.nc"))["posterior"]
    assert posterior["y"].dims == ("chain", "draw", "data")
    assert posterior["z"].dims == ("chain", "draw", "data", "z_dim_0")
