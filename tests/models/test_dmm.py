"""The deep Markov model against written-out loops, single sequences and its guides' own causality."""

import pyro
import pytest
import torch
from pyro import poutine

import pyro_elbo as pe
from models.dmm import DMM
from tests.models import laws
from tests.models.laws import normal, observe, split, states
from tests.support.compiled import _interpreted, assert_same  # noqa: F401  (fixtures work by name)


def make(posterior="smoothing", **options):
    return laws.make(lambda x, z, hidden: DMM(x, z, hidden, hidden, hidden, posterior=posterior, **options))


def transition(m, z):
    """Krishnan et al. (2017), section 5: a gated mean."""
    p = m.transition
    gate, proposal = torch.sigmoid(p.gate(z)), p.proposal(z)
    return normal((1 - gate) * p.linear(z) + gate * proposal, p.scale(proposal.clamp(min=0)))


def loops(m):
    def model(x, horizon=0):
        z, drawn = m.start.expand(len(x), -1), []
        with pyro.plate("sequences", len(x)):
            for t in range(x.shape[1] + horizon):
                z = pyro.sample(f"z_{t}", transition(m, z))
                drawn.append(observe(f"x_{t}", m.emitter(z), x, t))
        return torch.stack(drawn, 1)

    def guide(x):
        z = m.start.expand(len(x), -1)
        with pyro.plate("sequences", len(x)):
            for t, seen in enumerate(states(m.cell, [*zip(x.unbind(1))], reverse=m.posterior == "smoothing")):
                combined = (torch.tanh(m.combiner.state(z)) + seen) / 2
                mean, raw = split(m.combiner.output(combined))
                mean = mean + transition(m, z).mean if m.residual else mean
                q = normal(mean, raw)
                z = pyro.sample(f"z_{t}", q if m.flow is None else m.flow(q, seen))

    return laws.Loops(model, guide)


@pytest.mark.parametrize("particles", laws.PARTICLES)
@pytest.mark.parametrize("objective", laws.OBJECTIVES)
@pytest.mark.parametrize("options", [{}, {"posterior": "filtering"}, {"residual": True, "flow": 1}], ids=str)
def test_equals_the_loops_in_value_and_gradient(options, objective, particles):
    module = make(**options)
    laws.assert_equals_loops(module, loops(module), objective, particles)


@pytest.mark.parametrize("particles", ["one", "vectorized"])
@pytest.mark.parametrize("kl", ["auto", "sampled"])
@pytest.mark.parametrize("options", [{}, {"posterior": "filtering", "flow": 1}], ids=str)
def test_ragged_batch_is_the_sum_of_its_sequences(options, kl, particles):
    laws.assert_ragged_equals_singles(make(**options), kl, particles)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.5, "flow": 1}], ids=str)
def test_padding_is_ignored(options):
    laws.assert_padding_is_ignored(make(**options))


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


def by_hand(m, z, x):
    """log q(z | x) of a guide with a flow: each coupling undone, last one first, on the way to the Gaussian."""
    last, total = m.start.expand(len(x), -1), torch.zeros(len(x))
    for z_t, seen in zip(z.unbind(1), m.summarize(x).unbind(1), strict=True):
        mean, raw = split(m.combiner.output((torch.tanh(m.combiner.state(last)) + seen) / 2))
        y = z_t
        for coupling in reversed(m.flow.couplings):
            y = y.flip(-1)
            kept, moved = split(y)
            shift, log_scale = coupling.nn(kept, context=seen)
            y, total = torch.cat([kept, (moved - shift) / log_scale.exp()], -1), total - log_scale.sum(-1)
        last, total = z_t, total + normal(mean, raw).log_prob(y)
    return total


@pytest.mark.parametrize("flow", [1, 2])
def test_bound_with_a_flow_is_that_of_its_change_of_variables(flow):
    module, x = make(flow=flow), laws.frames()
    with torch.no_grad():
        pyro.set_rng_seed(3)
        terms = pe.TraceTimestep_ELBO().terms(module.model, module.guide, x)
        pyro.set_rng_seed(3)
        seen = poutine.trace(module.guide).get_trace(x)
        joint = poutine.trace(poutine.replay(module.model, trace=seen)).get_trace(x).log_prob_sum()
        expected = joint - by_hand(module, seen.nodes["z"]["value"], x).sum()
    torch.testing.assert_close(terms.elbo, expected, rtol=1e-10, atol=1e-10)
    assert terms.is_analytic == {"z": False}


def test_an_untrained_flow_changes_nothing():
    x, bounds = laws.frames(), []
    torch.manual_seed(0)
    flowing = DMM(laws.X, laws.Z, flow=1).double()
    plain = DMM(laws.X, laws.Z).double()
    plain.load_state_dict(flowing.state_dict(), strict=False)
    for module in (flowing, plain):
        pyro.set_rng_seed(3)
        bounds.append(pe.TraceTimestep_ELBO(kl="sampled").terms(module.model, module.guide, x).elbo.detach())
    torch.testing.assert_close(*bounds, rtol=1e-10, atol=0)


@pytest.mark.thorough
def test_compiled_steps_with_a_flow_equal_uncompiled_ones(interpreted):
    x = laws.frames()

    def scenario(svi_of):
        module = make(flow=1, residual=True)
        svi = svi_of(module.model, module.guide, torch.optim.Adam(module.parameters(), 0.01), pe.TraceTimestep_ELBO())
        return [svi.step(x, laws.LENGTHS) for _ in range(4)], module.state_dict()

    assert_same(scenario)


def test_semi_amortized_guide_starts_at_the_network_and_leaves_the_model_alone():
    module, x, bounds = make().eval().requires_grad_(False), laws.ragged(), []
    before = {name: p.clone() for name, p in module.state_dict().items()}
    guide = module.semi_amortized(x, laws.LENGTHS)
    objective = pe.TraceTimestep_ELBO(**laws.VECTORIZED | {"num_particles": 1000})

    def bound(q):
        pyro.set_rng_seed(3)
        with torch.no_grad():
            return objective.terms(module.model, q, x, laws.LENGTHS).elbo.item()

    bounds = [bound(module.guide), bound(guide)]
    svi = pe.SVI(module.model, guide, pyro.optim.Adam({"lr": 0.05}), pe.TraceTimestep_ELBO())
    svi.run(50, x, laws.LENGTHS, progress=False)
    assert bounds[0] == bounds[1]
    assert bound(guide) > bounds[0] + 0.5  # nats of ten frames; a thousand draws tell them to 0.1
    assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())
    assert set(pyro.get_param_store().keys()) == {"summaries"}
