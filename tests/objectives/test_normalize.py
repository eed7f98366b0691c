"""Objectives per sequence, frame or step: the divisor divides once, wherever the objective goes."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_elbo as pe
from tests.support.compiled import _interpreted  # noqa: F401  (a fixture)

N, T = 12, 4
X = torch.randn(N, T, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2
DIVISORS = {"sequence": N, "frame": N * T, "step": T}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def model(x):
    mean = pyro.param("mean", torch.tensor(0.5))

    def step(carry, x_t):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x_t)
        return carry, None

    with pyro.plate("data", N, subsample_size=len(x)):
        pe.scan(step, x.new_zeros(()), x.T)


def guide(x):
    pass


def nats(mean):
    """-log p of all frames."""
    return (0.5 * math.log(2 * math.pi) + 0.5 * (X - mean) ** 2).sum().item()


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("batch", [12, 3])
@pytest.mark.parametrize(("normalize", "count"), DIVISORS.items())
def test_the_loss_of_fit_is_the_normalized_objective_for_any_batch(normalize, count, batch, compile, request):
    if compile:
        if normalize != "frame":
            pytest.skip("one compiled row")
        request.getfixturevalue("interpreted")
    pyro.clear_param_store()
    loss = pe.TraceTimestep_ELBO(normalize=normalize)
    options = {"batch_size": batch, "max_epochs": 1, "progress": False, "compile": compile}
    rate = 1e-12
    result = pe.fit(model, guide, X, loss=loss, optimizer=lambda p: torch.optim.SGD(p, lr=rate), **options)
    assert result.history.loss.sel(split="train").item() == pytest.approx(nats(0.5) / count)
    assert result.history.loss.attrs["units"] == f"nats per {normalize}"
    assert result.history.elbo.attrs["units"] == "nats per datum"
    assert result.history.elbo.sel(split="train").item() == pytest.approx(-nats(0.5) / N)


@pytest.mark.parametrize(("normalize", "count"), [*DIVISORS.items(), ("total", N)])
def test_the_gradient_of_fit_is_divided_once(normalize, count):
    """A step of rate 0.1 on all data moves the mean by 0.1 Σ (x - mean) / divisor; a total is divided by the rows."""
    loss = pe.TraceTimestep_ELBO(normalize=normalize)
    pe.fit(
        model,
        guide,
        X,
        loss=loss,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        batch_size=N,
        max_epochs=1,
        progress=False,
    )
    assert pyro.param("mean").item() == pytest.approx(0.5 + 0.1 * (X - 0.5).sum().item() / count)


@pytest.mark.parametrize(("normalize", "count"), DIVISORS.items())
def test_penalties_are_divided_with_the_bound(normalize, count):
    def step(carry, x_t):
        pyro.sample("x", dist.Normal(0.5, 1.0), obs=x_t)
        return carry, None

    def local(x):
        with pyro.plate("data", N):
            pyro.sample("w", dist.Normal(0.0, 1.0))
            pe.scan(step, x.new_zeros(()), x.T)

    def local_guide(x):
        with pyro.plate("data", N):
            pyro.sample("w", dist.Normal(x[:, 0], 1.0))

    objectives = []
    for name in ("total", normalize):
        penalties = [pe.MutualInformation("w", weight=5.0)]
        pyro.set_rng_seed(0)
        terms = pe.TraceTimestep_ELBO(normalize=name, penalties=penalties).terms(local, local_guide, X)
        objectives.append(terms.objective)
    torch.testing.assert_close(objectives[1], objectives[0] / count)
    torch.testing.assert_close(terms.per_datum.objective, terms.objective)


def test_frames_count_the_scale_of_each_sequence():
    lengths, scales = torch.tensor([4, 2, 1]), torch.tensor([1.0, 2.0, 5.0])

    def ragged(x):
        def step(carry, x_t):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x_t)
            return carry, None

        with pyro.plate("data", 3), poutine.scale(scale=scales):
            pe.scan(step, torch.zeros(3), x.T, lengths)

    terms = pe.TraceTimestep_ELBO(normalize="frame").terms(ragged, guide, torch.zeros(3, 4))
    assert terms.num_frames == 4 * 1 + 2 * 2 + 1 * 5
    torch.testing.assert_close(terms.objective, torch.tensor(-0.5 * math.log(2 * math.pi)))
