"""Data that no values of the summed-out latents can have: log p is -inf, and the error names site and row."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_elbo as pe
from pyro_elbo.errors import NonFiniteError
from pyro_elbo.terms import Chain, messages
from tests.programs_discrete import nothing
from tests.support.compiled import _interpreted  # noqa: F401  (a fixture)
from tests.support.refusing import refusing

refuses = refusing(re.compile(r"Look for data"))
MARK = {"enumerate": "parallel"}
EVEN = torch.full((2, 2), 0.5, dtype=torch.float64)
POSSIBLE = torch.tensor([[0.5, 0.5, 1.5], [0.5, 1.2, 1.5]])
IMPOSSIBLE = torch.tensor([[0.5, 0.5, 1.5], [0.5, 7.0, 1.5]])


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def emission(k, shift=0.0):
    return dist.Uniform(k + shift, k + 1.0 + shift, validate_args=False)


def scan(x, classes=False):
    shift = pyro.param("shift", torch.tensor(0.0))

    def step(k, x_t):
        k = pyro.sample("z", dist.Categorical(EVEN[k]), infer=MARK)
        pyro.sample("x", emission(k, shift + offset), obs=x_t)
        return k, None

    with pyro.plate("s", len(x)):
        offset = 0.1 * pyro.sample("c", dist.Bernoulli(0.5), infer=MARK) if classes else 0.0
        pe.scan(step, torch.tensor(0), x, dim=1)


def with_classes(x):
    scan(x, classes=True)


def loop(x):
    with pyro.plate("s", len(x)):
        z = torch.tensor(0)
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(EVEN[z]), infer=MARK)
            pyro.sample(f"x_{t}", emission(z), obs=x[:, t])


def mixture(x):
    with pyro.plate("d", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer=MARK)
        pyro.sample("x", emission(k), obs=x)


def terms(model, x, loss=None):
    return (loss or pe.TraceTimestep_ELBO()).terms(model, nothing, x)


def test_possible_data_have_the_evidence_of_their_paths():
    assert terms(scan, POSSIBLE).elbo.item() == pytest.approx(6 * math.log(0.5))


@pytest.mark.parametrize("model", [scan, loop, with_classes])
def test_an_impossible_sequence_is_named(model):
    with refuses(NonFiniteError, "'c'" if model is with_classes else "'z'", "inf", "index (1"):
        terms(model, IMPOSSIBLE)


def test_the_error_names_the_step():
    with refuses(NonFiniteError, "'z'", "index (1, 1) of (s, time)"):
        terms(scan, IMPOSSIBLE)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_other_objectives_refuse_them_too(beta):
    with refuses(NonFiniteError, "'z'"):
        terms(scan, IMPOSSIBLE, pe.TraceBeta_ELBO(beta))
    with refuses(NonFiniteError, "'z'"):
        terms(scan, IMPOSSIBLE, pe.TraceTimestep_ELBO(bound="importance", num_particles=2))


def test_a_compiled_step_refuses_them(interpreted):
    svi = pe.SVI(scan, nothing, pyro.optim.Adam({"lr": 1e-3}), pe.TraceTimestep_ELBO(), compile=True)
    first = [svi.step(POSSIBLE) for _ in range(3)]
    assert first[0] == pytest.approx(6 * math.log(2.0))
    with pytest.raises(NonFiniteError, match="'z'"):
        svi.step(IMPOSSIBLE)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(("model", "name"), [(scan, "'z'"), (loop, "'z_0'"), (mixture, "'k'")])
def test_no_values_are_returned(model, name, temperature):
    x = IMPOSSIBLE[1] if model is mixture else IMPOSSIBLE
    with refuses(NonFiniteError, name, "index (1"):
        pe.infer_discrete(model, nothing, x, temperature=temperature)


@pytest.mark.parametrize(("model", "name"), [(scan, "'z'"), (mixture, "'k'")])
def test_exports_and_the_evidence_name_the_site(model, name):
    x = IMPOSSIBLE[1] if model is mixture else IMPOSSIBLE
    with refuses(NonFiniteError, name):
        pe.to_arviz(model, nothing, x, num_samples=5)
    with refuses(NonFiniteError, name):
        pe.log_evidence(model, nothing, x, progress=False)


def test_a_draw_that_makes_the_data_impossible_has_weight_zero():
    def model(x):
        width = pyro.sample("width", dist.Uniform(0.0, 2.0))
        with pyro.plate("d", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer=MARK)
            pyro.sample("x", dist.Uniform(1.0 * k, k + width, validate_args=False), obs=x)

    def guide(x):
        pyro.sample("width", dist.Uniform(0.0, 2.0))

    # p(x) = E[(1 / (2 width))^2; width > 0.8], for x that only k = 0 can have at a width below 1
    x, draws = torch.tensor([0.8, 0.5]), 4000
    exact = math.log(0.5 * (1 / 0.8 - 1 / 2.0) / 4)
    found = pe.log_evidence(model, guide, x, num_samples=draws, progress=False)
    assert found.ess < 0.7 * draws
    assert abs(found.total - exact) < 4 * found.standard_error


def test_messages_of_an_impossible_step_are_minus_infinity():
    node = torch.zeros(3, 1, 2)
    node[1] = -torch.inf
    chain: Chain = messages(EVEN.log().expand(1, 1, 2, 2), node)
    assert chain.increments[:, 0].tolist() == [0.0, -math.inf, -math.inf]
