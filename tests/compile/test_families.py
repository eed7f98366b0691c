"""Distributions with several tensors or gradients of their own in compiled steps: equal to uncompiled ones."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

import pyro_elbo as pe
from tests.support.compiled import (  # noqa: F401  (fixtures work by name)
    _as_captured,
    _double,
    adam,
    assert_same,
    parameters,
    train,
)

DATA = torch.tensor([[0.3, -1.2, 0.8], [1.9, 0.1, -0.4], [0.2, 0.7, 1.1]], dtype=torch.float64)


def param(name, *shape, constraint=constraints.real):
    return pyro.param(name, lambda: torch.full(shape, 0.4), constraint=constraint)


def classes(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("x", dist.Normal(k @ (torch.eye(3) + param("means", 3, 3)), 1.0).to_event(1), obs=x)


def straight_through(x):
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.OneHotCategoricalStraightThrough(logits=x @ param("weights", 3, 3)))


def low_rank(name, loc):
    return dist.LowRankMultivariateNormal(
        loc, param(f"{name}_factor", 3, 1), param(f"{name}_diagonal", 3, constraint=constraints.positive)
    )


def correlated(x):
    z = pyro.sample("z", low_rank("prior", torch.zeros(3)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", low_rank("noise", z), obs=x)


def correlated_guide(x):
    pyro.sample("z", low_rank("guide", param("loc", 3)))


@pytest.mark.parametrize("kl", ["auto", "sampled"])
@pytest.mark.parametrize(
    ("model", "guide"), [(classes, straight_through), (correlated, correlated_guide)], ids=["straight", "low rank"]
)
def test_compiled_steps_equal_uncompiled_ones(interpreted, model, guide, kl):
    def scenario(svi_of):
        svi = svi_of(model, guide, adam(), pe.TraceBeta_ELBO(2.0, kl=kl))
        return train(svi, 5, DATA), parameters()

    assert_same(scenario)
