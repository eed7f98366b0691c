"""Errors about summed-out sites name the cure that works, and the programs that follow it do work."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, SiteError
from tests.support.untyped import _untyped  # noqa: F401  (a fixture)

MARK = {"enumerate": "parallel"}
X = torch.tensor([0.1, -0.3, 0.4, 2.2, 1.7, 0.8])
A = torch.tensor([[0.9, 0.1], [0.1, 0.9]])


def no_guide(*args, **options):
    """Nothing is left to guide."""


def chain(x, **options):
    def step(k, x_t):
        k = pyro.sample("z", dist.Categorical(A[k]), infer=MARK)
        pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x_t)
        return k, None

    pe.scan(step, torch.tensor(0), x, **options)


def means(index):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer=MARK)
            pyro.sample("x", dist.Normal(index(mu, k), 1.0), obs=x)

    return model


def means_guide(x):
    pyro.sample("mu", dist.Normal(torch.tensor([0.0, 2.0]), 0.1).to_event(1))


@pytest.mark.parametrize("rows", [6, 4])
def test_an_index_that_meets_the_particles_is_written_with_vindex(rows):
    vectorized = pe.TraceBeta_ELBO(num_particles=6, vectorize_particles=True)
    with pytest.raises(SiteError, match=r"Vindex\(latent\)\[\.\.\., k\]"):
        vectorized.terms(means(lambda mu, k: mu[k]), means_guide, X[:rows])
    terms = vectorized.terms(means(lambda mu, k: Vindex(mu)[..., k]), means_guide, X[:rows])
    assert terms.posterior["k"].shape == (rows, 2)


def test_a_vector_without_to_event_is_told_of_it():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer=MARK)
            pyro.sample("x", dist.Normal(torch.ones(2, 3)[k], 1.0), obs=x)

    with pytest.raises(SiteError, match=r"dimensions of one datum with \.to_event\(n\)"):
        pe.TraceBeta_ELBO().terms(model, no_guide, torch.zeros(6, 3))


def test_data_with_time_second_are_told_of_dim():
    def model(x, **options):
        with pyro.plate("s", len(x)):
            chain(x, **options)

    x = torch.stack([X[:5], X[1:], -X[:5]])
    with pytest.raises(SiteError, match="pass dim=1 to pe.scan"):
        pe.TraceTimestep_ELBO().terms(model, no_guide, x)
    rows = sum(pe.TraceTimestep_ELBO().terms(chain, no_guide, row).elbo for row in x)
    torch.testing.assert_close(pe.TraceTimestep_ELBO().terms(model, no_guide, x, dim=1).elbo, rows)


def test_lengths_of_a_plate_left_of_tones_ask_for_one_event():
    def model(x, lengths):
        def step(k, x_t):
            k = pyro.sample("z", dist.Categorical(A[k]), infer=MARK)
            with pyro.plate("tones", 5, dim=-1):
                pyro.sample("x", dist.Bernoulli(0.2 + 0.4 * k), obs=x_t)
            return k, None

        with pyro.plate("s", 3, dim=-2):
            pe.scan(step, torch.zeros(3, 1, dtype=torch.long), x, lengths, dim=1)

    with pytest.raises(SiteError, match=r"'s' has dimension -2.*tones of a chord.*\.to_event\(n\)"):
        pe.TraceTimestep_ELBO().terms(model, no_guide, torch.ones(3, 6, 5), torch.tensor([6, 4, 2]))


def test_a_state_marked_in_the_guide_is_left_out_of_it():
    def guide(x, how):
        def step(k, x_t):
            return pyro.sample("z", dist.Categorical(torch.ones(2)), infer={"enumerate": how}), None

        pe.scan(step, torch.tensor(0), x)

    for how in ("sequential", "parallel"):
        with pytest.raises(SiteError, match="'parallel' in the model alone, leave it out of the guide"):
            pe.TraceTimestep_ELBO().terms(chain, lambda x, how=how: guide(x, how), X)


@pytest.mark.parametrize("with_scan", [False, True])
def test_the_filtering_bound_names_the_marked_state(with_scan):
    def guide(x):
        if with_scan:
            pe.scan(lambda k, x_t: (pyro.sample("z", dist.Categorical(A[k])), None), torch.tensor(0), x)

    with pytest.raises(SiteError, match=r"\['z'\] are marked.*bound='importance'"):
        pe.TraceTimestep_ELBO(bound="filtering", num_particles=4).terms(chain, guide, X)


def test_values_of_a_site_that_the_guide_marks_are_its_posterior():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(torch.ones(2)), infer=MARK)

    model = poutine.condition(means(lambda mu, k: mu[k]), data={"mu": torch.tensor([0.0, 2.0])})
    with pytest.raises(SiteError, match="Use terms.posterior.*leave them out of the guide"):
        pe.infer_discrete(model, guide, X, temperature=0)


def test_labels_of_some_rows_ask_for_config_enumerate():
    def model(x):
        with pyro.plate("data", len(x)):
            labels = {"obs": torch.ones(6, dtype=torch.long), "obs_mask": torch.arange(6) < 2}
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer=MARK, **labels)
            pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    with pytest.raises(SiteError, match=r"'k_unobserved'.*pyro\.infer\.config_enumerate\(model\)"):
        pe.TraceBeta_ELBO().terms(model, no_guide, X)
    assert pe.TraceBeta_ELBO().terms(config_enumerate(model), no_guide, X).posterior["k_unobserved"].shape == (6, 2)


def test_a_misspelled_mark_is_shown():
    def model(x):
        pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "paralel"})

    with pytest.raises(SiteError, match="'k'.*got 'paralel'"):
        pe.TraceBeta_ELBO().terms(model, no_guide, X)


def test_no_guide_and_linear_response_and_annealing_name_their_ways(untyped):
    model = poutine.condition(means(lambda mu, k: mu[k]), data={"mu": torch.tensor([0.0, 2.0])})
    with pytest.raises(ArgumentError, match=r"pass lambda \*args, \*\*kwargs: None"):
        pe.TraceBeta_ELBO().terms(model, None, X)
    with pytest.raises(SiteError, match="DiscreteHMM"):
        pe.linear_response(model, no_guide, X)
    with pytest.raises(SiteError, match="method='importance', which has it"):
        pe.log_evidence(model, no_guide, X, method="ais", progress=False)
    assert "exact" in str(pe.pareto_k(model, no_guide, X))


def test_a_first_state_is_one_more_row_of_the_matrix():
    rows = torch.cat([A, torch.tensor([[0.3, 0.7]])])

    def model(x):
        def step(k, x_t):
            k = pyro.sample("z", dist.Categorical(rows[k]), infer=MARK)
            pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x_t)
            return k, None

        pe.scan(step, torch.tensor(2), x)

    e = dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(X.unsqueeze(-1))
    alpha = rows[2].log() + e[0]
    for t in range(1, len(X)):
        alpha = (alpha.unsqueeze(-1) + A.log()).logsumexp(0) + e[t]
    torch.testing.assert_close(pe.TraceTimestep_ELBO().terms(model, no_guide, X).elbo, alpha.logsumexp(0))


def test_a_state_of_second_order_is_one_site_over_pairs():
    second = torch.tensor([[[0.9, 0.1], [0.1, 0.9]], [[0.5, 0.5], [0.3, 0.7]]])

    def two_states(x):
        def step(carry, x_t):
            b, a = carry
            k = pyro.sample("z", dist.Categorical(second[a, b]), infer=MARK)
            pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x_t)
            return (k, b), None

        pe.scan(step, (torch.tensor(0), torch.tensor(0)), x)

    with pytest.raises(SiteError, match="one site over all pairs"):
        pe.TraceTimestep_ELBO().terms(two_states, no_guide, X)
    rows = torch.zeros(4, 4)
    for c in range(4):
        rows[c, 2 * (c % 2) : 2 * (c % 2) + 2] = second[c // 2, c % 2]

    def pairs(x):
        def step(c, x_t):
            c = pyro.sample("z", dist.Categorical(rows[c]), infer=MARK)
            pyro.sample("x", dist.Normal(2.0 * (c % 2), 1.0), obs=x_t)
            return c, None

        pe.scan(step, torch.tensor(0), x)

    def loop(x):
        a = b = torch.tensor(0)
        for t in pyro.markov(range(len(x)), history=2):
            k = pyro.sample(f"z_{t}", dist.Categorical(second[a, b]), infer=MARK)
            pyro.sample(f"x_{t}", dist.Normal(2.0 * k, 1.0), obs=x[t])
            a, b = b, k

    found = [pe.TraceTimestep_ELBO().terms(m, no_guide, X).elbo for m in (pairs, loop)]
    torch.testing.assert_close(*found)
