"""The deep Markov model against written-out loops, single sequences and its guides' own causality."""

import pyro
import pytest
import torch

import pyro_elbo as pe
from models.dmm import DMM
from pyro_elbo.errors import ArgumentError
from tests.models import laws
from tests.models.laws import normal, observe, split, states
from tests.support.compiled import _interpreted, assert_same  # noqa: F401  (fixtures work by name)

POSTERIORS = ["smoothing", "filtering"]


def make(posterior="smoothing", **options):
    return laws.make(lambda x, z, hidden: DMM(x, z, hidden, hidden, hidden, posterior=posterior, **options))


def transition(m, z):
    """Krishnan et al. (2017), section 5: a gated mean."""
    p = m.transition
    gate, proposal = torch.sigmoid(p.gate(z)), p.proposal(z)
    return (1 - gate) * p.linear(z) + gate * proposal, p.scale(proposal.clamp(min=0))


def loops(m):
    def model(x, horizon=0):
        z, drawn = m.start.expand(len(x), -1), []
        with pyro.plate("sequences", len(x)):
            for t in range(x.shape[1] + horizon):
                z = pyro.sample(f"z_{t}", normal(*transition(m, z)))
                drawn.append(observe(f"x_{t}", m.emitter(z), x, t))
        return torch.stack(drawn, 1)

    def guide(x):
        z = m.start.expand(len(x), -1)
        with pyro.plate("sequences", len(x)):
            for t, seen in enumerate(states(m.cell, [*zip(x.unbind(1))], reverse=m.posterior == "smoothing")):
                combined = (torch.tanh(m.combiner.state(z)) + seen) / 2
                mean, raw = split(m.combiner.output(combined))
                mean = mean + transition(m, z)[0] if m.residual else mean
                z = pyro.sample(f"z_{t}", normal(mean, raw))

    return laws.Loops(model, guide)


@pytest.mark.parametrize("particles", laws.PARTICLES)
@pytest.mark.parametrize("objective", laws.OBJECTIVES)
@pytest.mark.parametrize(("posterior", "residual"), [("smoothing", False), ("filtering", False), ("smoothing", True)])
def test_equals_the_loops_in_value_and_gradient(posterior, residual, objective, particles):
    module = make(posterior, residual=residual)
    laws.assert_equals_loops(module, loops(module), objective, particles)


@pytest.mark.parametrize("particles", ["one", "vectorized"])
@pytest.mark.parametrize("kl", ["auto", "sampled"])
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_ragged_batch_is_the_sum_of_its_sequences(posterior, kl, particles):
    laws.assert_ragged_equals_singles(make(posterior), kl, particles)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_padding_is_ignored(dropout):
    laws.assert_padding_is_ignored(make(dropout=dropout))


def test_terms_over_time_add_up():
    laws.assert_terms_add_up(make())


def test_generation_and_forecast_are_those_of_the_loops():
    module = make()
    laws.assert_draws_what_loops_draw(module, loops(module))


def test_what_the_guides_see():
    """A changed frame at t = 2 changes q(z_t) from then on in a filter, and from the start in a smoother."""
    assert laws.posterior_changes(make("filtering")) == [2, 3, 4]
    assert laws.posterior_changes(make("smoothing")) == [0, 1, 2]


def test_dropout_acts_in_training_only():
    """Draws of the guide's inputs differ between runs while training; in evaluation the seed of z decides alone."""
    module, plain = make(dropout=0.5), make()
    x = laws.frames()
    plain.load_state_dict(module.state_dict())

    def bound(m):
        pyro.set_rng_seed(3)
        return pe.TraceBeta_ELBO().differentiable_loss(m.model, m.guide, x).item()

    assert bound(module) != bound(plain)
    assert bound(module.eval()) == bound(plain)


def test_posterior_is_one_of_two():
    with pytest.raises(ValueError, match="'smoothing', 'filtering'.*'other'"):
        DMM(posterior="other")


def test_trains():
    laws.assert_trains(make("filtering"))


def test_starts_from_frequencies():
    laws.assert_starts_from_frequencies(make())


def test_semi_amortized_guide_starts_at_the_network_and_leaves_the_model_alone():
    module, x = make().eval().requires_grad_(False), laws.ragged()
    before = {name: p.clone() for name, p in module.state_dict().items()}
    guide = module.semi_amortized(x, laws.LENGTHS)
    objective = pe.TraceTimestep_ELBO(**laws.VECTORIZED | {"num_particles": 1000})

    def bound(q):
        pyro.set_rng_seed(3)
        with torch.no_grad():
            return objective.terms(module.model, q, x, laws.LENGTHS).elbo.item()

    start = bound(module.guide)
    assert bound(guide) == start
    svi = pe.SVI(module.model, guide, pyro.optim.Adam({"lr": 0.05}), pe.TraceTimestep_ELBO())
    svi.run(50, x, laws.LENGTHS, progress=False)
    assert bound(guide) > start + 0.5  # nats of ten frames; a thousand draws tell them to 0.1
    assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())
    assert set(pyro.get_param_store().keys()) == {"summaries"}


@pytest.mark.thorough
def test_compiled_steps_of_a_semi_amortized_guide_equal_uncompiled_ones(interpreted):
    module, x = make().eval().requires_grad_(False), laws.ragged(0.0)

    def scenario(svi_of):
        guide = module.semi_amortized(x, laws.LENGTHS)
        svi = svi_of(module.model, guide, pyro.optim.Adam({"lr": 0.05}), pe.TraceTimestep_ELBO())
        return [svi.step(x, laws.LENGTHS) for _ in range(4)], pyro.param("summaries").detach()

    assert_same(scenario)


def test_two_semi_amortized_guides_cannot_share_a_store():
    module = make().eval().requires_grad_(False)
    first, second = (
        pe.SVI(module.model, module.semi_amortized(x), pyro.optim.Adam({"lr": 0.05}), pe.TraceTimestep_ELBO())
        for x in (laws.frames(), laws.frames(seed=2))
    )
    first.step(laws.frames())
    with pytest.raises(ArgumentError, match="summaries"):
        second.step(laws.frames(seed=2))
    pyro.clear_param_store()
    second.step(laws.frames(seed=2))
