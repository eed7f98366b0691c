"""Optimizer classes of the user's own: attributes that their steps set, read, or find parameters by."""

import pytest
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import optim

from tests.support.compiled import (  # noqa: F401  (fixtures work by name)
    X,
    _as_captured,
    _double,
    assert_same,
    exact_or_refused,
    model,
    network,
    network_guide,
    parameters,
    sampled,
)


class CountsBesideItsClass(optim.Adam):
    """Stops in its fifth step, as an attribute counts that the class defines and the step assigns."""

    taken = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.taken += 1
        if self.taken < 5:
            super().step(closure)


class CountsInAList(CountsBesideItsClass):
    def __init__(self, p, lr):
        super().__init__(p, lr=lr)
        self.counts = [0]

    @torch.no_grad()
    def step(self, closure=None):
        self.counts[0] += 1
        if self.counts[0] < 5:
            optim.Adam.step(self, closure)


class KeepsItsParameters(optim.SGD):
    def __init__(self, p, lr):
        self.kept = list(p)
        super().__init__(self.kept, lr=lr)

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for p in self.kept:
            if p.grad is not None:
                p.mul_(0.9)


class ClippedTwice(ClippedAdam):
    def step(self, closure=None):
        super().step(closure)
        super().step()


class WithALimit(optim.Adam):
    limit: float

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.clamp_(max=self.limit)


def stepped(make, after=lambda optimizer: None):
    """Nine steps, with a change of the optimizer after the fifth."""

    def scenario(svi_of):
        net = network()
        opt = make(net.parameters())
        svi = svi_of(model, network_guide(net), opt, sampled())
        losses = [svi.step(X) for _ in range(5)]
        after(opt)
        return losses, [svi.step(X) for _ in range(4)], parameters()

    return scenario


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (CountsBesideItsClass, "sets the attribute 'taken' in its step"),
        (CountsInAList, "sets 'a list of length 1'"),
        (KeepsItsParameters, "elsewhere than in its param_groups"),
        (ClippedTwice, "keeps its counts as Python numbers"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_optimizers_with_attributes_that_a_graph_would_freeze_are_refused(interpreted, optimizer, words):
    assert words in exact_or_refused(stepped(lambda p: optimizer(p, lr=0.05)))


def test_an_attribute_of_an_optimizer_is_read_and_watched(interpreted):
    def make(p):
        optimizer = WithALimit(p, lr=0.05)
        optimizer.limit = 0.1
        return optimizer

    assert_same(stepped(make, after=lambda optimizer: setattr(optimizer, "limit", -0.2)))
