"""The linear-Gaussian state-space model against the joint Gaussian of all its variables, written out."""

import dataclasses

import pyro.distributions as dist
import pytest
import torch

from models.linear_gaussian_ssm import simulate
from pyro_elbo.errors import ArgumentError, NonFiniteError

BATCH, STEPS, D, K = 4, 6, 3, 2


@pytest.fixture(scope="module")
def problem():
    """Ragged sequences, and a mask that leaves out a third of the steps."""
    model, x, lengths = simulate(BATCH, STEPS, D, K, shortest=2, seed=3)
    mask = torch.rand(BATCH, STEPS, generator=torch.Generator().manual_seed(1)) < 0.66
    mask[:, 0] = torch.tensor([True, False, True, True])
    assert len(lengths.unique()) > 1
    assert x.isnan().any()
    return model, x, lengths, mask


def joint(model):
    """Mean and covariance of (z_1, ..., z_T), and the matrix that maps it to the means of (x_1, ..., x_T)."""
    powers = [torch.linalg.matrix_power(model.transition, t) for t in range(STEPS)]
    noises = [model.initial_scale_tril] + [model.transition_scale_tril] * (STEPS - 1)
    zero = torch.zeros(K, K, dtype=torch.float64)
    rows = [[powers[t - s] @ noises[s] if s <= t else zero for s in range(STEPS)] for t in range(STEPS)]
    root = torch.cat([torch.cat(row, 1) for row in rows])
    mean = torch.cat([power @ model.initial_mean for power in powers])
    return mean, root @ root.T, torch.block_diag(*[model.emission] * STEPS)


def observed(lengths, mask):
    """For each sequence the steps that count."""
    return [[t for t in range(n) if mask[i, t]] for i, n in enumerate(lengths.tolist())]


def condition(model, x, steps):
    """The joint posterior of all states, given some steps of one sequence."""
    mean, cov, emission = joint(model)
    rows = [D * t + i for t in steps for i in range(D)]
    noise = torch.block_diag(*[model.emission_scale_tril @ model.emission_scale_tril.T] * STEPS)
    C = emission[rows]
    gain = torch.linalg.solve(C @ cov @ C.T + noise[rows][:, rows], C @ cov).T
    return mean + gain @ (x.flatten()[rows] - C @ mean), cov - gain @ C @ cov


def block(t):
    return slice(K * t, K * (t + 1))


def test_log_evidence_is_the_density_of_the_observed_steps(problem):
    model, x, lengths, mask = problem
    mean, cov, emission = joint(model)
    noise = torch.block_diag(*[model.emission_scale_tril @ model.emission_scale_tril.T] * STEPS)
    marginal = dist.MultivariateNormal(emission @ mean, emission @ cov @ emission.T + noise)
    full = simulate(BATCH, STEPS, D, K, seed=3)[1]
    torch.testing.assert_close(model.log_evidence(full), marginal.log_prob(full.flatten(1)), rtol=0, atol=1e-10)
    for i, steps in enumerate(observed(lengths, mask)):
        rows = [D * t + j for t in steps for j in range(D)]
        part = dist.MultivariateNormal(marginal.loc[rows], marginal.covariance_matrix[rows][:, rows])
        expected = part.log_prob(x[i].flatten()[rows])
        torch.testing.assert_close(model.log_evidence(x, lengths, mask)[i], expected, rtol=0, atol=1e-10)


def test_smoother_and_filter_are_the_conditionals_of_the_joint(problem):
    model, x, lengths, mask = problem
    smoothed, filtered = model.smooth(x, lengths, mask), model.filter(x, lengths, mask)
    for i, steps in enumerate(observed(lengths, mask)):
        for t in range(STEPS):
            for states, known in ((smoothed, steps), (filtered, [s for s in steps if s <= t])):
                mean, cov = condition(model, x[i], known)
                torch.testing.assert_close(states.mean[i, t], mean[block(t)], rtol=0, atol=1e-10)
                torch.testing.assert_close(states.covariance[i, t], cov[block(t), block(t)], rtol=0, atol=1e-10)


def test_chains_are_the_conditionals_of_the_joint(problem):
    model, x, lengths, mask = problem
    before = torch.tensor([0.3, -1.2], dtype=torch.float64)
    posterior, proposal = model.posterior(x, lengths, mask), model.proposal(x, lengths, mask)
    for i, steps in enumerate(observed(lengths, mask)):
        for t in range(STEPS):
            for chain, known in ((posterior, [s for s in steps if s >= t]), (proposal, [s for s in steps if s == t])):
                mean, cov = condition(model, x[i], known)
                here = block(t)
                if t:  # p(z_t | z_{t-1}, x of the given steps)
                    gain = torch.linalg.solve(cov[block(t - 1), block(t - 1)], cov[block(t - 1), here]).T
                    mean = mean.clone()
                    mean[here] += gain @ (before - mean[block(t - 1)])
                    cov = cov.clone()
                    cov[here, here] -= gain @ cov[block(t - 1), here]
                loc = chain.gain[i, t] @ before + chain.offset[i, t]
                scale = chain.scale_tril[i, t]
                torch.testing.assert_close(loc, mean[here], rtol=0, atol=1e-9)
                torch.testing.assert_close(scale @ scale.T, cov[here, here], rtol=0, atol=1e-9)
                assert not scale.triu(1).any()
        assert not posterior.gain[i, 0].any()


def test_posterior_chain_bounds_the_evidence_without_gap_for_any_states(problem):
    model, x, lengths, mask = problem
    z = torch.randn(BATCH, STEPS, K, dtype=torch.float64)
    inside = mask & (torch.arange(STEPS) < lengths[:, None])
    log_x = dist.MultivariateNormal(z @ model.emission.T, scale_tril=model.emission_scale_tril).log_prob(x.nan_to_num())
    weight = log_x.where(inside, 0) + model.prior(BATCH, STEPS).log_prob(z)
    weight = weight - model.posterior(x, lengths, mask).log_prob(z)
    torch.testing.assert_close(weight.sum(1), model.log_evidence(x, lengths, mask), rtol=0, atol=1e-9)
    # After the end of a sequence the posterior is the prior: those steps add 0, so a ragged scan may leave them out.
    ended = torch.arange(STEPS) >= lengths[:, None]
    torch.testing.assert_close(weight[ended], torch.zeros_like(weight[ended]), rtol=0, atol=1e-12)


def test_padding_and_missing_steps_enter_no_number(problem):
    model, x, lengths, mask = problem
    inside = mask & (torch.arange(STEPS) < lengths[:, None])
    other = x.where(inside[..., None], 1e6)
    for name in ("log_evidence", "filter", "smooth", "posterior", "proposal"):
        method = getattr(model, name)
        for got, expected in zip(method(x, lengths, mask), method(other, lengths, mask), strict=True):
            assert torch.equal(got, expected)
    alone = [model.log_evidence(x[i : i + 1, :n], mask=mask[i : i + 1, :n])[0] for i, n in enumerate(lengths)]
    torch.testing.assert_close(model.log_evidence(x, lengths, mask), torch.stack(alone), rtol=0, atol=1e-12)


def test_gradients_ignore_padding(problem):
    model, x, lengths, mask = problem
    transition = model.transition.clone().requires_grad_()
    model = dataclasses.replace(model, transition=transition)
    total = model.log_evidence(x, lengths, mask).sum() + model.smooth(x, lengths, mask).mean.sum()
    total.backward()
    assert transition.grad.isfinite().all()


def test_long_sequences_stay_accurate():
    model, x, lengths = simulate(3, 1000, d=4, k=4, shortest=900)
    z = model.smooth(x, lengths).mean
    log_x = dist.MultivariateNormal(z @ model.emission.T, scale_tril=model.emission_scale_tril).log_prob(x.nan_to_num())
    log_x = log_x.where(torch.arange(1000) < lengths[:, None], 0)
    bound = log_x + model.prior(3, 1000).log_prob(z) - model.posterior(x, lengths).log_prob(z)
    torch.testing.assert_close(bound.sum(1), model.log_evidence(x, lengths), rtol=0, atol=1e-7)


def test_simulated_states_have_the_models_moments():
    n = 20_000
    model, x, _ = simulate(n, 3, seed=5)
    mean = model.prior(1, 3).marginals().mean[0] @ model.emission.T
    cov = model.emission @ model.prior(1, 3).marginals().covariance[0] @ model.emission.T
    variance = cov.diagonal(dim1=-2, dim2=-1) + (model.emission_scale_tril**2).sum(1)
    # 18 numbers within 5 SE: a false alarm once in 100 000 seeds. The variance of a Gaussian has SE √(2/n) of itself.
    assert ((x.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    assert ((x.var(0) - variance).abs() < 5 * variance * (2 / n) ** 0.5).all()


def test_bad_input_is_an_error(problem):
    model, x, lengths, _ = problem
    with pytest.raises(NonFiniteError, match="count as observed"):
        model.log_evidence(x)
    for bad in (torch.zeros_like(lengths), lengths + STEPS):
        with pytest.raises(ArgumentError, match="between 1 and 6"):
            model.smooth(x, bad)
