"""Programs of one latent each, whose every answer takes milliseconds."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn


class Guide(PyroModule):
    """The guide of ``model``, with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.4))

    def forward(self, x: Any) -> None:
        """Draw z near its posterior."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, 0.7))


def model(x: Any) -> None:
    """Draw a latent and a datum for each row."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def discrete(x: Any) -> None:
    """A mixture whose components are summed out."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)


def shared(x: Any) -> None:
    """One latent of all rows."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


class Mean(PyroModule):
    """The guide of ``shared``."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.0))
        self.width = nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Any) -> None:
        """Draw the mean."""
        pyro.sample("mean", dist.Normal(self.loc, self.width))


def step(carry: Any, x_t: Any) -> tuple[Any, Any]:
    """A random walk."""
    level = pyro.sample("level", dist.Normal(carry, 0.1))
    pyro.sample("x", dist.Normal(level, 1.0), obs=x_t)
    return level, level


def walk(carry: Any, x_t: Any) -> tuple[Any, Any]:
    """The guide of ``step``."""
    level = pyro.sample("level", dist.Normal(x_t, 0.5))
    return level, None
