"""Draws of programs that do not broadcast: mapped, equal to single runs, with the loop as the way out."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoIAFNormal
from torch import nn

import pyro_elbo as pe
from pyro_elbo.errors import ProgramError
from pyro_elbo.posterior.draws import draw

X = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(4, 3)
Y = torch.tensor([0.3, -0.2, 0.9, 0.1], dtype=torch.float64)
ZERO = torch.zeros((), dtype=torch.float64)


def coefficients():
    return pyro.sample("b", dist.Normal(ZERO.expand(3), 1.0).to_event(1))


def coefficients_guide(x, y):
    pyro.sample(
        "b", dist.MultivariateNormal(ZERO.expand(3), scale_tril=torch.eye(3).double() * 0.5 + 0.1 * X[:3].tril())
    )


def matmul_model(x, y):
    b = coefficients()
    pyro.factor("symmetry", -(b @ b) / 4)
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=y < 0.5):
        pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)


def triangular_model(x, y):
    b = coefficients()
    lower = torch.eye(3, dtype=x.dtype) + 0.1 * x[:3].tril(-1)
    w = pyro.deterministic("w", torch.linalg.solve_triangular(lower, b[:, None], upper=False)[:, 0])
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.StudentT(4.0, x @ w, 1.0), obs=y)


def mean_model(x, y):
    with pyro.plate("group", 3):
        z = pyro.sample("z", dist.Gamma(ZERO + 2.0, 1.0))
    k = pyro.sample("k", dist.Poisson(ZERO + 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(z.mean() * k, 1.0), obs=y)


def mean_guide(x, y):
    with pyro.plate("group", 3):
        pyro.sample("z", dist.Exponential(ZERO + 1.0))
    pyro.sample("k", dist.Poisson(ZERO + 2.0))


CELL = nn.GRUCell(1, 2).double().requires_grad_(False)


def scan_model(x, y):
    def step(h, y_t):
        z = pyro.sample("z", dist.Normal(h.sum(), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y_t)
        return CELL(z.reshape(1, 1), h), None

    pe.scan(step, torch.zeros(1, 2, dtype=x.dtype), y)


def scan_guide(x, y):
    def step(h, y_t):
        z = pyro.sample("z", dist.Normal(0.5 * y_t + h.sum(), 0.8))
        return CELL(z.reshape(1, 1), h), None

    pe.scan(step, torch.zeros(1, 2, dtype=x.dtype), y)


PROGRAMS = [
    (matmul_model, coefficients_guide),
    (triangular_model, coefficients_guide),
    (mean_model, mean_guide),
    (scan_model, scan_guide),
]


class Counted:
    """A program that counts its runs."""

    def __init__(self, program):
        self.program, self.runs = program, 0

    def __call__(self, *args):
        self.runs += 1
        return self.program(*args)


def log_density(program, values):
    return pyro.poutine.trace(pyro.poutine.condition(program, values)).get_trace(X, Y).log_prob_sum().double()


@pytest.mark.parametrize(("model", "guide"), PROGRAMS)
def test_mapped_draws_are_those_of_single_runs(model, guide):
    draws = draw(model, guide, (X, Y), {}, 50, chunk_size=20, seed=0)
    assert draws.way == "map"
    for i in (0, 7, 33, 49):
        values = {name: x[i] for name, x in draws.latents.items()}
        for density, program in ((draws.log_p, model), (draws.log_q, guide)):
            torch.testing.assert_close(density[i], log_density(program, values), rtol=1e-6, atol=1e-9)
        alone = pyro.poutine.trace(pyro.poutine.condition(model, values)).get_trace(X, Y)
        for name, x in draws.deterministics.items():
            torch.testing.assert_close(x[i], alone.nodes[name]["value"], rtol=1e-6, atol=1e-9)
        alone.compute_log_prob()
        for name, x in draws.log_likelihood.items():
            torch.testing.assert_close(x[i], alone.nodes[name]["log_prob"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("model", "guide"), PROGRAMS)
def test_a_seed_repeats_mapped_draws_and_every_draw_has_its_own_noise(model, guide):
    first, again = (draw(model, guide, (X, Y), {}, 40, chunk_size=20, seed=3) for _ in range(2))
    for name, x in first.latents.items():
        assert torch.equal(x, again.latents[name])
        if name != "k":
            assert len(torch.unique(x.flatten())) == x.numel()


@pytest.mark.parametrize(("model", "guide"), PROGRAMS)
def test_an_export_runs_the_programs_once_a_chunk(model, guide):
    model, guide = Counted(model), Counted(guide)
    data = pe.to_arviz(model, guide, X, Y, num_samples=500)
    assert data["posterior_predictive"]["y"].std("draw").min() > 0.5
    assert data["prior_predictive"]["y"].std("draw").min() > 0.5
    assert model.runs < 60  # the loop takes 1500
    assert guide.runs < 60


def test_mapped_draws_leave_no_trace_in_a_flow():
    """A flow caches what it computed; a tensor of a mapped run could not be copied."""

    def model(x, y):
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)

    guide, data = AutoIAFNormal(model), (X.float(), Y.float())
    guide(*data)
    assert draw(model, guide, data, {}, 20, chunk_size=10, seed=0).way == "map"
    copy.deepcopy(guide)(*data)


def test_programs_that_cannot_be_mapped_run_once_a_draw():
    def model(x, y):
        b = coefficients()
        shift = 1.0 if b[0] > 0 else -1.0
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ b + shift, 1.0), obs=y)

    counted = Counted(model)
    draws = draw(counted, coefficients_guide, (X, Y), {}, 30, seed=0)
    assert draws.way == "loop"
    assert counted.runs > 30
    data = pe.to_arviz(counted, coefficients_guide, X, Y, num_samples=10)
    assert data["posterior_predictive"]["y"].shape == (1, 10, 4)


def test_a_mapped_draw_that_a_single_run_refuses_is_refused():
    def model(x, y):
        p = x[3] @ coefficients() + 0.5  # not always a probability, and its log density is finite still
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(p), obs=(y > 0).double())

    with pytest.raises(ProgramError, match="Expected parameter probs"):
        draw(model, coefficients_guide, (X, Y), {}, 300, seed=0)


def test_mapped_draws_have_the_exact_evidence():
    """Normal prior and likelihood: log p(y) is that of N(0, I + X X'), within five standard errors."""

    def model(x, y):
        b = coefficients()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)

    exact = torch.distributions.MultivariateNormal(ZERO.expand(4), torch.eye(4).double() + X @ X.T).log_prob(Y)
    found = pe.log_evidence(model, coefficients_guide, X, Y, num_samples=4000)
    assert abs(float(found) - exact.item()) < 5 * found.total_standard_error.item()
