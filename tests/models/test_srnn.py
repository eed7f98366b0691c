"""The stochastic recurrent network against written-out loops, single sequences and its guide's own causality."""

import pyro
import pytest
import torch

from models.srnn import SRNN
from tests.models import laws
from tests.models.laws import gru, normal, observe, split, states, zeros


def loops(m):
    def model(x, horizon=0):
        z, d, drawn = zeros(x, laws.Z), zeros(x, laws.HIDDEN), []
        with pyro.plate("sequences", len(x)):
            for t in range(x.shape[1] + horizon):
                z = pyro.sample(f"z_{t}", normal(*split(m.prior(z, d))))
                drawn.append(observe(f"x_{t}", m.decoder(z, d), x, t))
                d = gru(m.cell, d, drawn[t])
        return torch.stack(drawn, 1)

    def guide(x):
        past = [zeros(x, laws.HIDDEN), *states(m.cell, [*zip(x.unbind(1))], reverse=False)[:-1]]
        both = list(zip(past, x.unbind(1), strict=True))
        z = zeros(x, laws.Z)
        with pyro.plate("sequences", len(x)):
            for t, seen in enumerate(states(m.backward_cell, both, reverse=True)):
                shift, raw = split(m.encoder(z, seen))
                z = pyro.sample(f"z_{t}", normal(split(m.prior(z, past[t]))[0] + shift, raw))

    return laws.Loops(model, guide)


@pytest.mark.parametrize("particles", laws.PARTICLES)
@pytest.mark.parametrize("objective", laws.OBJECTIVES)
def test_equals_the_loops_in_value_and_gradient(objective, particles):
    module = laws.make(SRNN)
    laws.assert_equals_loops(module, loops(module), objective, particles)


@pytest.mark.parametrize("particles", ["one", "vectorized"])
@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_ragged_batch_is_the_sum_of_its_sequences(kl, particles):
    laws.assert_ragged_equals_singles(laws.make(SRNN), kl, particles)


def test_padding_is_ignored():
    laws.assert_padding_is_ignored(laws.make(SRNN))


def test_terms_over_time_add_up():
    laws.assert_terms_add_up(laws.make(SRNN))


def test_generation_and_forecast_are_those_of_the_loops():
    module = laws.make(SRNN)
    laws.assert_draws_what_loops_draw(module, loops(module))


def test_the_guide_smooths():
    """A changed frame at t = 2 changes q before it by the backward network, and after it by the forward one."""
    assert laws.posterior_changes(laws.make(SRNN)) == [0, 1, 2, 3, 4]


def test_trains():
    laws.assert_trains(laws.make(SRNN))


def test_starts_from_frequencies():
    laws.assert_starts_from_frequencies(laws.make(SRNN))
