"""Draws of programs that index drawn latents by what is summed out: mapped, each draw with its own sum."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_elbo as pe
from pyro_elbo.posterior.draws import draw

MARK = {"enumerate": "parallel"}
X = torch.tensor([0.3, 1.9, -0.4, 2.2, 2.5, 0.1], dtype=torch.float64)
START = torch.tensor([0.0, 2.0], dtype=torch.float64)
ROWS = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)


def means():
    return pyro.sample("means", dist.Normal(START, 1.0).to_event(1))


def mixture(x):
    mu = means()
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(ROWS[0]), infer=MARK)
        pyro.sample("x", dist.Normal(mu[k], 1.0), obs=x)


def masked_mixture(x):
    mu = means()
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=x > 0):
        k = pyro.sample("k", dist.Categorical(ROWS[0]), infer=MARK)
        pyro.sample("x", dist.Normal(mu[k], 1.0), obs=x)


def hmm(x):
    mu = means()

    def step(k, x_t):
        k = pyro.sample("k", dist.Categorical(ROWS[k]), infer=MARK)
        pyro.sample("x", dist.Normal(mu[k], 1.0), obs=x_t)
        return k, None

    pe.scan(step, torch.tensor(0), x)


def guide(x):
    pyro.sample("means", dist.Normal(START + 0.1, 0.5).to_event(1))


def emissions(mu):
    return dist.Normal(mu.unsqueeze(1), 1.0).log_prob(X.unsqueeze(-1))


def mixture_evidence(mu):
    return (ROWS[0].log() + emissions(mu)).logsumexp(-1).sum(-1)


def masked_evidence(mu):
    return (ROWS[0].log() + emissions(mu)).logsumexp(-1)[:, X > 0].sum(-1)


def hmm_evidence(mu):
    e = emissions(mu)
    alpha = ROWS[0].log() + e[:, 0]
    for t in range(1, len(X)):
        alpha = (alpha.unsqueeze(-1) + ROWS.log()).logsumexp(-2) + e[:, t]
    return alpha.logsumexp(-1)


@pytest.mark.parametrize(
    ("model", "evidence"),
    [(mixture, mixture_evidence), (masked_mixture, masked_evidence), (hmm, hmm_evidence)],
    ids=["mixture", "masked", "hmm"],
)
def test_each_draw_of_an_indexed_latent_has_its_own_sum_and_draws_are_mapped(model, evidence):
    drawn = draw(model, guide, (X,), {}, 50, seed=0)
    mu = drawn.latents["means"]
    expected = evidence(mu) + dist.Normal(START, 1.0).log_prob(mu).sum(-1)
    expected = expected - dist.Normal(START + 0.1, 0.5).log_prob(mu).sum(-1)

    assert drawn.way == "map"
    assert len(mu.unique(dim=0)) == 50
    torch.testing.assert_close(drawn.log_weight, expected, atol=1e-6, rtol=1e-6)


def test_mapped_paths_are_draws_from_the_exact_posterior():
    drawn = draw(hmm, guide, (X,), {}, 2000, seed=0)
    assert drawn.way == "map"

    def at(mean):
        return pe.TraceTimestep_ELBO().terms(poutine.condition(hmm, data={"means": mean}), lambda x: None, X)

    exact = torch.stack([at(mean).posterior["k"][:, 1] for mean in drawn.latents["means"][:100]])
    drawn = drawn.latents["k"].double()

    error = drawn.mean(0) - exact.mean(0)
    noise = (drawn.var(0) / len(drawn) + exact.var(0) / len(exact)).sqrt()
    assert (error.abs() < 4.5 * noise).all()


def rows_model(x):
    rows = pyro.sample("rows", dist.Dirichlet(1.0 + 4.0 * ROWS).to_event(1))

    def step(k, x_t):
        k = pyro.sample("k", dist.Categorical(rows[k]), infer=MARK)
        pyro.sample("x", dist.Normal(START[k], 1.0), obs=x_t)
        return k, None

    pe.scan(step, torch.tensor(0), x)


def rows_guide(x):
    pyro.sample("rows", dist.Dirichlet(2.0 + 4.0 * ROWS).to_event(1))


def test_rows_of_a_transition_are_drawn_in_mapped_runs_too():
    drawn = draw(rows_model, rows_guide, (X,), {}, 2000, seed=0)
    rows, concentration = drawn.latents["rows"], 2.0 + 4.0 * ROWS
    mean = concentration / concentration.sum(-1, keepdim=True)
    prior, guide = (dist.Dirichlet(c).log_prob(rows).sum(-1) for c in (1.0 + 4.0 * ROWS, concentration))
    alpha = rows[:, 0].log() + dist.Normal(START, 1.0).log_prob(X[0])
    for x in X[1:]:
        alpha = (alpha.unsqueeze(-1) + rows.log()).logsumexp(-2) + dist.Normal(START, 1.0).log_prob(x)

    assert drawn.way == "map"
    torch.testing.assert_close(drawn.log_weight, alpha.logsumexp(-1) + prior - guide, atol=1e-6, rtol=1e-6)
    assert ((rows.mean(0) - mean).abs() < 4.5 * (rows.var(0) / len(rows)).sqrt()).all()
