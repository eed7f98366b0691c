"""The VRNN and its Markov form against written-out loops, single sequences and their own causality."""

import pyro
import pytest
import torch

from models.cells import GRU
from models.vrnn import VRNN, MarkovVRNN
from tests.models import laws
from tests.models.laws import gru, normal, observe, split, states, zeros

FORMS = {"vrnn": VRNN, "markov": MarkovVRNN}


def vrnn_loops(m):
    def advance(h, x, z):
        return gru(m.cell, h, m.features_x(x), m.features_z(z))

    def model(x, horizon=0):
        h, drawn = zeros(x, laws.HIDDEN), []
        with pyro.plate("sequences", len(x)):
            for t in range(x.shape[1] + horizon):
                z = pyro.sample(f"z_{t}", normal(*split(m.prior(h))))
                drawn.append(observe(f"x_{t}", m.decoder(m.features_z(z), h), x, t))
                h = advance(h, drawn[t], z)
        return torch.stack(drawn, 1)

    def guide(x):
        h = zeros(x, laws.HIDDEN)
        with pyro.plate("sequences", len(x)):
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t}", normal(*split(m.encoder(m.features_x(x[:, t]), h))))
                h = advance(h, x[:, t], z)

    return laws.Loops(model, guide)


def markov_loops(m):
    def model(x, horizon=0):
        z, drawn = zeros(x, laws.Z), []
        with pyro.plate("sequences", len(x)):
            for t in range(x.shape[1] + horizon):
                z = pyro.sample(f"z_{t}", normal(*split(m.prior(z))))
                drawn.append(observe(f"x_{t}", m.decoder(z), x, t))
        return torch.stack(drawn, 1)

    def guide(x):
        z = zeros(x, laws.Z)
        with pyro.plate("sequences", len(x)):
            for t, seen in enumerate(states(m.cell, [*zip(x.unbind(1))], reverse=m.smooth)):
                z = pyro.sample(f"z_{t}", normal(*split(m.encoder(z, seen))))

    return laws.Loops(model, guide)


LOOPS = {"vrnn": vrnn_loops, "markov": markov_loops}


@pytest.mark.parametrize("particles", laws.PARTICLES)
@pytest.mark.parametrize("objective", laws.OBJECTIVES)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops_in_value_and_gradient(form, objective, particles):
    module = laws.make(FORMS[form])
    laws.assert_equals_loops(module, LOOPS[form](module), objective, particles)


@pytest.mark.parametrize("particles", ["one", "vectorized"])
@pytest.mark.parametrize("kl", ["auto", "sampled"])
@pytest.mark.parametrize("form", FORMS)
def test_ragged_batch_is_the_sum_of_its_sequences(form, kl, particles):
    laws.assert_ragged_equals_singles(laws.make(FORMS[form]), kl, particles)


@pytest.mark.parametrize("form", FORMS)
def test_padding_is_ignored(form):
    laws.assert_padding_is_ignored(laws.make(FORMS[form]))


@pytest.mark.parametrize("form", FORMS)
def test_terms_over_time_add_up(form):
    laws.assert_terms_add_up(laws.make(FORMS[form]))


@pytest.mark.parametrize("form", FORMS)
def test_generation_and_forecast_are_those_of_the_loops(form):
    module = laws.make(FORMS[form])
    laws.assert_draws_what_loops_draw(module, LOOPS[form](module))


def test_cell_is_torchs_for_more_inputs_and_dimensions():
    cell, theirs = GRU((2, 3), 4), torch.nn.GRUCell(5, 4)
    theirs.load_state_dict(
        {
            "weight_ih": torch.cat([part.weight for part in cell.inputs.parts], 1),
            "bias_ih": cell.inputs.parts[0].bias,
            "weight_hh": cell.state.weight,
            "bias_hh": cell.state.bias,
        }
    )
    x, y, state = torch.randn(6, 2), torch.randn(7, 6, 3), torch.randn(6, 4)
    expected = torch.stack([theirs(torch.cat([x, row], -1), state) for row in y])
    torch.testing.assert_close(cell(state, x, y), expected)


def test_forward_markov_encoder_equals_its_loop():
    module = laws.make(MarkovVRNN, smooth=False)
    laws.assert_equals_loops(module, markov_loops(module), "timestep", "vectorized")


def test_what_the_guides_see():
    """A changed frame at t = 2 changes q(z_t) from then on in a filter, and from the start in a smoother."""
    assert laws.posterior_changes(laws.make(VRNN)) == [2, 3, 4]
    assert laws.posterior_changes(laws.make(MarkovVRNN, smooth=False)) == [2, 3, 4]
    assert laws.posterior_changes(laws.make(MarkovVRNN)) == [0, 1, 2]


@pytest.mark.parametrize("form", FORMS)
def test_trains(form):
    laws.assert_trains(laws.make(FORMS[form]))


@pytest.mark.parametrize("form", FORMS)
def test_starts_from_frequencies(form):
    laws.assert_starts_from_frequencies(laws.make(FORMS[form]))
