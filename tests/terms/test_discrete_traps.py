"""Programs whose summed-out latents gave a wrong number, or an error that named no site."""

import itertools
import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, ProgramError, SiteError
from tests.programs_discrete import assignments, log_density, nothing
from tests.support.refusing import refusing

refuses = refusing(re.compile(r"Give|Pass|Put|Write|Take|index tensors|expected the guide"))
MARK = {"enumerate": "parallel"}
P = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
A = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.7, 0.2], [0.25, 0.25, 0.5]], dtype=torch.float64)
STAY = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
X = torch.tensor([0.3, 1.2, -0.5, 2.0, 0.1, 1.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def elbo(model, *args, guide=nothing):
    return pe.TraceTimestep_ELBO().terms(model, guide, *args).elbo.item()


# --- scans ----------------------------------------------------------------------------------------------------


def chain(probs, init):
    def model(x):
        def step(k, x_t):
            k = pyro.sample("z", dist.Categorical(probs(k)), infer=MARK)
            pyro.sample("x", dist.Normal(1.5 * k, 1.0), obs=x_t)
            return k, None

        pe.scan(step, init, x)

    return model


def test_a_first_state_of_its_own_is_a_row_of_the_transition():
    starts = torch.cat([A, P.unsqueeze(0)])
    exact = P.log() + dist.Normal(1.5 * torch.arange(3), 1.0).log_prob(X[0])
    for x in X[1:]:
        exact = torch.logsumexp(exact[:, None] + A.log(), 0) + dist.Normal(1.5 * torch.arange(3), 1.0).log_prob(x)
    found = elbo(chain(lambda k: starts[k], torch.tensor(3)), X)
    assert found == pytest.approx(exact.logsumexp(0).item(), rel=1e-9)


def test_none_in_place_of_the_first_state_is_refused():
    with refuses(ArgumentError, "'z'", "None", "torch.tensor(K)"):
        elbo(chain(lambda k: P if k is None else A[k], None), X)


def test_a_step_that_counts_its_runs_is_refused():
    def model(x):
        count = []

        def probs(k):
            count.append(k)
            return P if len(count) == 1 else A[k]

        chain(probs, torch.tensor(0))(x)

    with refuses(SiteError, "'z'", "counter"):
        elbo(model, X)


def test_a_step_with_random_numbers_of_its_own_is_none_that_counts():
    drop = torch.nn.Dropout(0.5)
    assert math.isfinite(elbo(chain(lambda k: A[k] + drop(torch.ones(())), torch.tensor(0)), X))


# --- modes under masks ------------------------------------------------------------------------------------------


def capture_recapture(y, first=None):
    """The Cormack-Jolly-Seber model of Pyro's tutorial: nothing counts up to the first capture."""
    with pyro.plate("animals", len(y)):
        z, first = torch.ones(len(y)), torch.zeros(len(y), dtype=torch.bool)
        for t in pyro.markov(range(y.shape[1])):
            with poutine.mask(mask=first):
                f = first.double()
                z = pyro.sample(f"z_{t}", dist.Bernoulli(f * 0.9 * z + (1 - f)), infer=MARK)
                pyro.sample(f"y_{t}", dist.Bernoulli(z * 0.5), obs=y[:, t])
            first = first | (y[:, t] > 0)


def captures_in_a_scan(y):
    def step(carry, now):
        y_t, first = now
        with poutine.mask(mask=first):
            f = first.double()
            z = pyro.sample("z", dist.Bernoulli(f * 0.9 * carry + (1 - f)), infer=MARK)
            pyro.sample("y", dist.Bernoulli(z * 0.5), obs=y_t)
        return z, None

    seen = (y.cumsum(1) - y) > 0
    with pyro.plate("animals", len(y)):
        pe.scan(step, torch.ones(()), (y, seen), dim=1)


HISTORIES = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)))[1:]


def best_survival(y):
    """The most probable survival of one animal after its first capture, by all of them; alive before."""
    start, found = int(y.argmax()), {}
    for death in range(start + 1, 5):
        z = (torch.arange(4) < death).double()
        later = torch.arange(4) > start
        alive = torch.cat([torch.ones(1), z[:-1]])
        log_p = dist.Bernoulli(0.9 * alive).log_prob(z) + dist.Bernoulli(0.5 * z).log_prob(y)
        found[death] = log_p[later].sum().item()
    return torch.arange(4) < max(found, key=found.__getitem__)


@pytest.mark.parametrize("model", [capture_recapture, captures_in_a_scan])
def test_the_mode_of_an_animal_is_alive_where_it_was_first_caught(model):
    found = pe.infer_discrete(model, nothing, HISTORIES, temperature=0)
    z = found["z"] if "z" in found else torch.stack([found[f"z_{t}"] for t in range(4)], 1)
    for row, y in zip(z, HISTORIES, strict=True):
        start = int(y.argmax())
        assert row[start:].tolist() == best_survival(y)[start:].double().tolist()


# --- plates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [torch.sum, torch.mean, torch.max, torch.min])
def test_a_number_made_of_all_rows_is_refused_outside_of_their_plate(number):
    def model():
        with pyro.plate("d", 10):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer=MARK)
        pyro.sample("s", dist.Normal(number(k), 1.0), obs=torch.tensor(5.0))

    with refuses(SiteError, "'s'", "'k'", "k.sum()"):
        pe.TraceBeta_ELBO().terms(model, nothing)


def test_a_number_made_of_all_values_is_refused_inside_of_the_plate_too():
    def model(x):
        with pyro.plate("d", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer=MARK)
            pyro.sample("x", dist.Normal(k.mean(), 1.0), obs=x)

    with refuses(SiteError, "'x'", "'k'", "side by side"):
        elbo(model, X)


def test_a_site_after_a_plate_that_depends_on_no_row_counts():
    calls = []

    def model(x):
        calls.append(x)
        with pyro.plate("d", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer=MARK)
            pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)
        pyro.sample("s", dist.Normal(0.0, 1.0), obs=torch.nn.functional.dropout(torch.ones(())))

    plain = elbo(model, X)
    runs = len(calls)
    elbo(model, X)
    assert (runs, len(calls)) == (4, 5)  # the check is made once
    each = torch.stack([dist.Normal(2.0 * k, 1.0).log_prob(X) + math.log(p) for k, p in ((0, 0.7), (1, 0.3))])
    exact = each.logsumexp(0).sum().item()
    last = {dist.Normal(0.0, 1.0).log_prob(torch.tensor(s)).item() for s in (0.0, 2.0)}
    assert min(abs(plain - exact - s) for s in last) < 1e-9


# --- pyro.markov ------------------------------------------------------------------------------------------------


def lagged(lag):
    def model(x, history):
        zs = [torch.tensor(0)] * lag
        for t in pyro.markov(range(len(x)), history=history):
            zs.append(pyro.sample(f"z_{t}", dist.Categorical(STAY[zs[-1]]), infer=MARK))
            pyro.sample(f"x_{t}", dist.Normal(2.0 * zs[-1] + zs[-1 - lag], 1.0), obs=x[t])

    return model


def second_order(x, history):
    a = b = torch.tensor(0)
    probs = torch.tensor([[[0.9, 0.1], [0.1, 0.9]], [[0.5, 0.5], [0.3, 0.7]]])
    for t in pyro.markov(range(len(x)), history=history):
        c = pyro.sample(f"z_{t}", dist.Categorical(probs[a, b]), infer=MARK)
        pyro.sample(f"x_{t}", dist.Normal(2.0 * c, 1.0), obs=x[t])
        a, b = b, c


@pytest.mark.parametrize(("model", "lag"), [(lagged(2), 2), (lagged(3), 3), (second_order, 2)])
def test_a_history_that_is_too_short_is_named(model, lag):
    with refuses(SiteError, "'z_0'", f"history={lag}"):
        elbo(model, X, 1)


@pytest.mark.parametrize("model", [lagged(2), second_order])
def test_a_history_that_is_long_enough_gives_the_sum_over_all_paths(model):
    exact = torch.stack([log_density(model, (X, 2), v) for v in assignments(model, (X, 2), {})]).logsumexp(0)
    assert elbo(model, X, 2) == pytest.approx(exact.item(), rel=1e-9)


# --- values side by side ------------------------------------------------------------------------------------------


def mixture(mean):
    def model(x):
        with pyro.plate("d", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer=MARK)
            pyro.sample("x", dist.Normal(mean(k, x), 1.0), obs=x)

    return model


MEANS = {
    "if": lambda k, x: 1.0 if k == 1 else -1.0,
    "list": lambda k, x: [-1.0, 1.0][k],
    "cat": lambda k, x: torch.cat([x[:, None], torch.nn.functional.one_hot(k, 2).double()], -1).sum(-1),
    "iteration": lambda k, x: torch.tensor([[-1.0, 1.0][int(i)] for i in k]),
}


@pytest.mark.parametrize("mean", MEANS)
def test_a_program_that_takes_all_values_for_one_is_told_their_shape(mean):
    with refuses(SiteError, "'k' (2, 1, 1, 1, 1, 1, 1)", "Vindex"):
        elbo(mixture(MEANS[mean]), X)


def test_a_program_of_other_faults_is_told_nothing_of_values():
    with pytest.raises(ProgramError, match="TypeError") as caught:
        elbo(lambda x: torch.ones(2) + "1", X)
    assert "side by side" not in str(caught.value)


def test_a_support_that_differs_from_row_to_row_is_refused_by_name():
    def totals(x):
        with pyro.plate("d", len(x)):
            n = pyro.sample("n", dist.Binomial(torch.arange(1.0, 7.0), torch.tensor(0.3)), infer=MARK)
            pyro.sample("x", dist.Normal(n, 1.0), obs=x)

    with refuses(SiteError, "'n'", "Binomial", "Categorical"):
        elbo(totals, X)


def test_the_call_of_pyros_infer_discrete_is_explained():
    with refuses(ArgumentError, "first_available_dim", "guide"):
        pe.infer_discrete(mixture(lambda k, x: 2.0 * k), first_available_dim=-2, temperature=0)


def test_a_density_that_is_too_large_stops_the_program_at_its_site():
    later = []

    def model(x):
        ks = [pyro.sample(f"k{i}", dist.Categorical(torch.ones(150)), infer=MARK) for i in range(4)]
        logits = sum(torch.zeros(150)[k] for k in ks[:2])
        pyro.sample("y", dist.Normal(logits.unsqueeze(0).expand(1000, *logits.shape), 1.0).to_event(0), obs=x[0])
        later.append(1)

    with refuses(SiteError, "'y'", "20,000,000"):
        elbo(model, X)
    assert not later
