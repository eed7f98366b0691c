"""Small fits: a VAE with one unit of information, a regression at its exact posterior, one parameter for all rows."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_elbo as pe

QUIET = {"progress": False, "max_epochs": 1}
X = torch.linspace(-2.0, 2.0, 40)


class VAE(nn.Module):
    """z has two units: the first follows x, the second is the prior; batch norm and dropout show the mode."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(1, affine=False), nn.Dropout(0.5))
        self.loc = nn.Parameter(torch.tensor(0.8))

    def model(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0], 0.5), obs=x)

    def guide(self, x):
        pyro.module("vae", self)
        loc = torch.stack([self.loc * self.net(x[:, None])[:, 0], torch.zeros_like(x)], -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, torch.tensor([0.5, 1.0])).to_event(1))


@pytest.fixture(name="fitted")
def _fitted():
    vae = VAE()
    return vae, pe.fit(vae.model, vae.guide, X, X[:8], batch_size=20, seed=3, **QUIET)


def model(x):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    with pyro.plate("n", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


def regression(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
    pyro.deterministic("double", 2 * slope)
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)


def at_posterior(x, y=None):
    """The posterior of the slope for y = 2x on X, by conjugacy: mean and scale are parameters for the sake of fit."""
    precision = (X**2).sum() / 0.01 + 1 / 9
    loc = pyro.param("loc", 2 * (X**2).sum() / 0.01 / precision)
    pyro.sample("slope", dist.Normal(loc, precision**-0.5))


@pytest.fixture(name="exact")
def _exact():
    frozen = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.0), "batch_size": None}
    return pe.fit(regression, at_posterior, (X, 2 * X), **frozen, **QUIET)
