"""Rational inattention: exact terms and gradients, and optima that are known in closed form."""

import arviz as az
import numpy as np
import pyro
import pytest
import torch

import pyro_elbo as pe
from examples import rational_inattention as example
from models.rational_inattention import Decision, RationalInattention, blahut_arimoto

COSTS = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)


def random_agents():
    """Agents with arbitrary choices among four actions in three states."""
    torch.manual_seed(0)
    decision = Decision(torch.randn(3, 4).double(), torch.tensor([0.5, 0.3, 0.2]).double())
    agents = RationalInattention(decision, len(COSTS))
    for p in agents.parameters():
        p.data.normal_()
    return decision, agents


def matching(actions=2):
    """Two states of equal probability: one dollar for the action that matches the state."""
    return Decision(torch.eye(2, actions).double(), torch.tensor([0.5, 0.5]).double())


def closed_form(decision, agents):
    """Expected utility and Σ μ KL(q ‖ p) of each agent, written out."""
    q, p = agents.response.softmax(-1), agents.habit.softmax(-1)
    kl = (q * (q / p).log()).sum(-1)
    return (q * decision.utility).sum(-1) @ decision.prior, kl @ decision.prior


def test_terms_and_gradient_are_exact():
    decision, agents = random_agents()
    loss = pe.TraceBeta_ELBO(beta=COSTS[:, None])
    terms = loss.terms(agents.model, agents.guide)
    utility, information = closed_form(decision, agents)
    assert terms.is_analytic["action"]
    assert terms.kl["action"].shape == (3, 3)
    torch.testing.assert_close(terms.rate, information.sum())
    torch.testing.assert_close(terms.elbo, (utility - information).sum())
    objective = (utility - COSTS * information).sum()
    torch.testing.assert_close(terms.objective, objective)
    ours, theirs = (torch.autograd.grad(x, list(agents.parameters())) for x in (terms.objective, objective))
    torch.testing.assert_close(ours, theirs)
    assert all(g.abs().max() > 1e-3 for g in ours)


def test_drawn_actions_have_the_same_expectation():
    decision, agents = random_agents()
    loss = pe.TraceBeta_ELBO(kl="sampled", num_particles=100, vectorize_particles=True, max_plate_nesting=2)
    with torch.no_grad():
        elbos = torch.stack([loss.terms(agents.model, agents.drawing_guide).elbo for _ in range(100)])
        utility, information = closed_form(decision, agents)
    # 5 standard errors: a false alarm in two of a million seeds
    assert abs(elbos.mean() - (utility - information).sum()) < 5 * elbos.std() / 100**0.5


def test_rate_is_the_information_at_the_best_habit_and_more_at_any_other():
    decision, agents = random_agents()
    loss, known = pe.TraceBeta_ELBO(), decision.information(agents.choice)
    excess = loss.terms(agents.model, agents.guide).kl["action"] @ decision.prior - known
    assert (excess > 0.01).all()
    agents.habit.data = torch.einsum("s,nsa->na", decision.prior, agents.choice).log()[:, None]
    torch.testing.assert_close(loss.terms(agents.model, agents.guide).kl["action"] @ decision.prior, known)


def test_optimum_of_two_matching_actions_is_a_logit():
    choice = blahut_arimoto(matching(), COSTS)
    right = (1 / COSTS).sigmoid()
    torch.testing.assert_close(choice, torch.stack([right, 1 - right, 1 - right, right], -1).view(-1, 2, 2))
    torch.testing.assert_close(
        matching().information(choice), np.log(2) - torch.special.entr(torch.stack([right, 1 - right])).sum(0)
    )


def test_a_copy_of_an_action_takes_its_probability_from_that_action_alone():
    """The red bus and the blue bus, which a multinomial logit gets wrong."""
    twins = Decision(matching().utility[:, [0, 1, 1]], matching().prior)
    choice, copied = blahut_arimoto(matching(), COSTS), blahut_arimoto(twins, COSTS)
    torch.testing.assert_close(copied[..., 0], choice[..., 0])
    torch.testing.assert_close(copied[..., 1:].sum(-1), choice[..., 1])


def test_a_safe_action_takes_over_where_it_pays_more_than_information():
    """Matching is worth λ log of the mean of exp(1 / λ) and 1: the safe action drops out below, the others above."""
    value = COSTS * ((1 + (1 / COSTS).exp()) / 2).log()
    for agent, pays in enumerate(value.tolist()):
        for safe, kept in ((pays - 0.02, [True, True, False]), (pays + 0.02, [False, False, True])):
            utility = torch.cat([torch.eye(2), torch.full((2, 1), safe)], 1).double()
            choice = blahut_arimoto(Decision(utility, matching().prior), COSTS[agent : agent + 1])
            assert (choice[0].mean(0) > 1e-6).tolist() == kept


def test_training_finds_the_optimum_with_an_action_that_drops_out():
    utility = torch.tensor([[1.0, 0.0, 0.2], [0.0, 1.0, 0.2]]).double()
    problem = example.Problem(Decision(utility, matching().prior), COSTS[:2], ["left", "right", "safe"], ["l", "r"])
    agents = example.train(problem, pe.TraceBeta_ELBO(beta=COSTS[:2, None]), steps=300)
    exact = blahut_arimoto(problem.decision, COSTS[:2])
    assert exact[..., 2].max() < 1e-6
    assert (agents.choice - exact).abs().max() < 1e-4


def test_drawing_guide_draws_actions_at_their_probabilities():
    _, agents = random_agents()
    with pyro.plate("draws", 4000, dim=-3):
        drawn = agents.drawing_guide()
    q = agents.choice
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    # 36 probabilities at 5 standard errors: a false alarm in one of 50 000 seeds
    assert ((drawn.mean(0) - q).abs() < 5 * (q * (1 - q) / 4000).sqrt()).all()


@pytest.mark.parametrize("prior", [[0.5, 0.4], [1.0, 0.0], [1.0], [float("nan"), 1.0]])
def test_a_prior_that_is_none_is_refused(prior):
    with pytest.raises(ValueError, match="expected 2 positive probabilities that add up to 1"):
        Decision(torch.eye(2).double(), torch.tensor(prior).double())


def test_an_iteration_that_is_not_done_says_so():
    with pytest.raises(ValueError, match="after 3 iterations log max c is .* Raise max_iterations"):
        blahut_arimoto(random_agents()[0], COSTS, max_iterations=3)


@pytest.mark.slow
def test_example(tmp_path, capsys):
    example.main(None, tmp_path, smoke_test=True)
    assert "claim: 3 values of λ" in capsys.readouterr().out
    assert (tmp_path / "rational_inattention.png").stat().st_size > 10_000
    action = az.from_netcdf(str(tmp_path / "posterior.nc"))["posterior"]["action"]
    assert action.dims == ("chain", "draw", "agents", "states", "options")
    assert (action.sum("options") == 1).all()


@pytest.mark.slow
@pytest.mark.thorough
def test_example_on_a_decision_from_a_file(tmp_path, capsys):
    path = tmp_path / "decision.npz"
    np.savez(path, utility=np.eye(2), prior=np.array([0.7, 0.3]), costs=np.array([0.4, 0.6]))
    example.main(path, tmp_path, smoke_test=True)
    assert "claim: 2 values of λ" in capsys.readouterr().out
