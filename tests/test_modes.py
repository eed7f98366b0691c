"""Diagnostics run programs in evaluation mode, and leave modes and buffers as they were."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_elbo as pe
from pyro_elbo.programs import evaluating

X = torch.arange(24.0).reshape(8, 3) / 10


def network() -> nn.Sequential:
    """Dropout and batch norm: one is random, the other counts rows, in training mode only."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])


def _sample(net: nn.Module, x: Tensor) -> None:
    loc = net(x)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))


def registered(net: nn.Module) -> Callable:
    def guide(x: Tensor) -> None:
        pyro.module("net", net)
        _sample(net, x)

    return guide


def called(net: nn.Module) -> Callable:
    return lambda x: _sample(net, x)


def method(net: nn.Module) -> Callable:
    class Owner(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def guide(self, x: Tensor) -> None:
            _sample(self.net, x)

    return Owner().guide


def handled(net: nn.Module) -> Callable:
    return pyro.poutine.block(partial(_sample, net), hide=[])


KINDS = [registered, called, method, handled]
LOSS = pe.TraceBeta_ELBO()
DIAGNOSTICS: dict[str, Callable[..., Any]] = {
    "terms": LOSS.terms,
    "loss": LOSS.loss,
    "pareto_k": partial(pe.pareto_k, num_samples=50),
    "to_arviz": partial(pe.to_arviz, num_samples=50),
    "kl_decomposition": pe.kl_decomposition,
    "log_evidence": partial(pe.log_evidence, num_samples=50, progress=False),
}


def state(net: nn.Module) -> tuple[list[bool], list[Tensor]]:
    return [part.training for part in net.modules()], [x.clone() for x in net.buffers()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_a_diagnostic_leaves_modes_and_buffers_as_they_were(kind: Callable, name: str) -> None:
    net = network()
    net[1].eval()  # a user's frozen layer stays frozen
    guide = kind(net)
    modes, buffers = state(net)
    DIAGNOSTICS[name](model, guide, X)
    assert state(net)[0] == modes == [True, True, False, True, True]
    assert all(map(torch.equal, state(net)[1], buffers))


@pytest.mark.parametrize("kind", KINDS)
def test_terms_are_those_of_evaluation_mode(kind: Callable) -> None:
    net = network()
    net[1].running_mean.fill_(0.3)
    with torch.no_grad():
        loc = net.eval()(X)
    net.train()
    exact = 0.5 * (loc**2 + 0.25 - 1) - torch.tensor(0.5).log()  # KL(N(loc, 0.5) || N(0, 1))
    assert torch.allclose(LOSS.terms(model, kind(net), X).kl["z"], exact.sum(-1), atol=1e-6)


def test_a_training_step_is_in_training_mode() -> None:
    net = network()
    pyro.infer.SVI(model, registered(net), pyro.optim.SGD({"lr": 0.01}), pe.TraceBeta_ELBO()).step(X)
    assert net[1].num_batches_tracked.item() == 1
    pe.SVI(model, registered(net), pyro.optim.SGD({"lr": 0.01}), pe.TraceBeta_ELBO()).step(X)
    assert net[1].num_batches_tracked.item() == 2


def test_modes_return_after_an_error_and_replaced_buffers_return_too() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self) -> None:
            self.calls = self.calls + 1

    counts = Counts()

    def fail() -> None:
        with evaluating(counts):
            counts()
            assert counts.calls.item() == 1
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert counts.training
    assert counts.calls.item() == 0
