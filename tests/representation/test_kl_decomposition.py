"""The parts of the KL: against exact answers, and the figures of known mistakes."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, SiteError
from tests.support.refusing import refusing

refuses = refusing(re.compile("Pass |Use |must be"))
N, DIMS, SIGMA = 2000, 4, 0.48


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)


def programs(rows=None):
    """z ~ N(x, σ²) under a standard normal prior; a minibatch of ``rows`` if there are so many."""

    def model(x):
        with pyro.plate("data", len(x), subsample=rows):
            pyro.sample("z", dist.Normal(torch.zeros(DIMS), 1.0).to_event(1))

    def guide(x):
        with pyro.plate("data", len(x), subsample=rows) as index:
            pyro.sample("z", dist.Normal(x[index], SIGMA).to_event(1))

    return model, guide


X = torch.randn(N, DIMS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def exact(draws=20):
    """The parts by brute force: the mixture of all 2000 normals at many draws, its margins by the same sums."""
    generator = torch.Generator().manual_seed(2)
    totals, entropy = torch.zeros(3), DIMS * 0.5 * math.log(2 * math.pi * math.e * SIGMA**2)
    for _ in range(draws):
        z = X + SIGMA * torch.randn(N, DIMS, generator=generator)
        joint, margins = [], []
        for some in z.split(200):
            elements = dist.Normal(X, SIGMA).log_prob(some.unsqueeze(1))  # (draw, encoder, dimension)
            joint.append(elements.sum(-1).logsumexp(1) - math.log(N))
            margins.append(elements.logsumexp(1) - math.log(N))
        joint, margins = torch.cat(joint), torch.cat(margins)
        prior = dist.Normal(0.0, 1.0).log_prob(z)
        parts = -entropy - joint, joint - margins.sum(-1), (margins - prior).sum(-1)
        totals += torch.stack([part.mean() for part in parts])
    return (totals / draws).tolist()


@pytest.mark.slow
def test_full_data_give_the_exact_parts():
    """Within 0.02 nats of brute force on other draws."""
    information, correlation, dimensions = exact()
    parts = pe.kl_decomposition(*programs(), X, num_samples=10)
    assert abs(parts.mutual_information - information) < 0.02
    assert abs(parts.total_correlation - correlation) < 0.02
    assert abs(parts.dimension_wise_kl - dimensions) < 0.02
    analytic = torch.distributions.kl_divergence(dist.Normal(X, SIGMA), dist.Normal(0.0, 1.0)).sum(-1).mean()
    assert abs(parts.kl - analytic) < 0.02
    total = parts.mutual_information + parts.total_correlation + parts.dimension_wise_kl
    assert abs(parts.kl - total) < 1e-9
    assert abs(parts.per_dimension.sum() - parts.dimension_wise_kl) < 1e-9


def test_minibatch_weights():
    """Trap 17: the figures of batches of 64 and of 256 out of 2000, where I(z; x) is 3.27 and TC 0.04.

    Means over 60 batches have a standard error below 0.03; the encoder of the figures is not this very one.
    """
    found = {}
    for rows in (64, 256):
        kinds = [pe.MutualInformation("z"), pe.TotalCorrelation("z")]
        runs = []
        for _ in range(60):
            model, guide = programs(rows=torch.randperm(N)[:rows])
            with torch.no_grad():
                penalties = pe.TraceBeta_ELBO(penalties=kinds).terms(model, guide, X).penalties
            information = penalties["I(z; x)"]
            runs.append(torch.stack([information.nats, information.low, penalties["TC(z)"].nats]))
        found[rows] = torch.stack(runs).mean(0).tolist()
    assert abs(found[64][0] - 3.73) < 0.1
    assert abs(found[64][1] - 2.88) < 0.1
    assert abs(found[64][2] - -0.26) < 0.1
    assert abs(found[256][0] - 3.39) < 0.1
    assert abs(found[256][2] - -0.04) < 0.1


def test_a_batch_says_at_most_its_log():
    narrow = dist.Normal(X[:64], 1e-3).to_event(1)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", narrow)

    with torch.no_grad():
        terms = pe.TraceBeta_ELBO(penalties=[pe.MutualInformation("z")]).terms(programs()[0], guide, X[:64])
    assert terms.penalties["I(z; x)"].low <= math.log(64) + 1e-9


def test_independent_dimensions_have_no_total_correlation_and_copies_do():
    """Two noisy copies of one normal: TC = -½ log(1 - ρ²)."""
    x = torch.randn(3000, 1)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def copies(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.expand(-1, 2), SIGMA).to_event(1))

    correlation = 1 / (1 + SIGMA**2)
    truth = -0.5 * math.log(1 - correlation**2)
    parts = pe.kl_decomposition(model, copies, x, num_samples=2)
    assert abs(parts.total_correlation - truth) < 0.05
    assert str(parts).splitlines()[0] == "KL of 'z' in nats per datum, from all 3000 rows"
    assert "total correlation" in str(parts)


def test_draws_leave_the_stream_alone_and_repeat():
    def information(seed):
        return pe.kl_decomposition(*programs(), X[:50], seed=seed).mutual_information

    torch.manual_seed(3)
    first, after = information(0), torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(torch.rand(()), after)
    assert information(0) == first != information(1)


def test_data_simulated_under_the_same_seed_are_not_drawn_again():
    """Otherwise z = x + σ ε with ε = x."""
    torch.manual_seed(0)
    x = torch.randn(500, DIMS)
    parts = pe.kl_decomposition(*programs(), x, seed=0)
    assert parts.mutual_information < 2 * math.log(1 + 1 / SIGMA**2)


def test_bad_input():
    model, guide = programs()
    with refuses(ArgumentError, "num_samples"):
        pe.kl_decomposition(model, guide, X[:9], num_samples=0)
    with refuses(SiteError, "'y'", "['z']"):
        pe.kl_decomposition(model, guide, X[:9], latent="y")

    def two(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", dist.Normal(0.0, 1.0))

    with refuses(SiteError, "Several latents", "['a', 'b']"):
        pe.kl_decomposition(two, two, X[:9])

    def correlated(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(torch.zeros(DIMS), torch.eye(DIMS)))

    with refuses(SiteError, "factorize"):
        pe.kl_decomposition(model, correlated, X[:9])


def test_a_latent_that_all_data_share_has_no_aggregate_posterior():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))

    for latent in (None, "w"):
        with pytest.raises(SiteError, match=r"'w' lies in no plate.*terms.kl\['w'\]"):
            pe.kl_decomposition(model, guide, torch.zeros(4), latent=latent)
    with pytest.raises(ArgumentError, match="n_samples=.*num_samples="):
        pe.kl_decomposition(lambda x, **_: model(x), guide, torch.zeros(4), n_samples=3)
