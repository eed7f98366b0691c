"""A variational autoencoder whose prior is a network of covariates: what they say of z, rows need not.

    z_n | c_n ~ Normal(mean(c_n), diag(scale(c_n)²)),     x_n | z_n ~ Normal(W z_n + b, diag(σ²))
    q(z_n | x_n, c_n) = Normal(mean(x_n, c_n), diag(scale(x_n, c_n)²))

The KL says how many nats a row tells beyond its covariates. With few rows the prior's network learns the codes of the
training rows by heart: their KL shrinks, and that of new rows grows.
Kingma, Rezende, Mohamed, Welling (2014), arXiv:1406.5298; Sohn, Lee, Yan (2015), Learning structured output
representation using deep conditional generative models, NeurIPS.
"""

from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from models.fair_vae import layers

Moments = tuple[Float[Tensor, "n z_dim"], Float[Tensor, "n z_dim"]]


class CovariateVAE(nn.Module):
    """Model and guide: ``model(x, c)`` and ``guide(x, c)``, with the observed site ``x`` and the latent ``z``.

    Args:
        x_dim, c_dim: columns of x and of the covariates.
        z_dim: latent dimensions.
        hidden: width of the hidden layer of prior and encoder; the decoder is linear.
    """

    def __init__(self, x_dim: int = 12, c_dim: int = 40, z_dim: int = 4, hidden: int = 64) -> None:
        super().__init__()
        self.prior = layers(c_dim, hidden, 2 * z_dim)
        self.encoder = layers(x_dim + c_dim, hidden, 2 * z_dim)
        self.decoder = nn.Linear(z_dim, x_dim)
        self.raw_scale = nn.Parameter(torch.zeros(x_dim))

    def model(self, x: Float[Tensor, "n x_dim"], c: Float[Tensor, "n c_dim"]) -> Tensor:
        pyro.module("covariate_vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(*_moments(self.prior(c))).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), softplus(self.raw_scale) + 1e-2).to_event(1), obs=x)
        return z

    def guide(self, x: Float[Tensor, "n x_dim"], c: Float[Tensor, "n c_dim"]) -> Tensor:
        pyro.module("covariate_vae", self)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Normal(*_moments(self.encoder(torch.cat([x, c], -1)))).to_event(1))


def _moments(outputs: Float[Tensor, "n twice"]) -> Moments:
    loc, raw = outputs.chunk(2, -1)
    return loc, softplus(raw) + 1e-2


class Simulated(NamedTuple):
    """Rows of a linear-Gaussian model, their covariates, and their exact log p(x | c) in nats."""

    x: Float[Tensor, "n x_dim"]
    c: Float[Tensor, "n c_dim"]
    log_evidence: Float[Tensor, " n"]


def simulate(n: int, x_dim: int = 12, c_dim: int = 40, z_dim: int = 4, told: float = 0.3, seed: int = 0) -> Simulated:
    """Draw z = B c + noise of variance 1 - ``told``, and x = W z + noise of variance 1.

    Args:
        told: the share of the variance of z that the covariates tell.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    effects, weight, c = normal(z_dim, c_dim) * (told / c_dim) ** 0.5, normal(x_dim, z_dim), normal(n, c_dim)
    mean = c @ effects.T @ weight.T
    x = mean + (1 - told) ** 0.5 * normal(n, z_dim) @ weight.T + normal(n, x_dim)
    covariance = (1 - told) * weight @ weight.T + torch.eye(x_dim)
    return Simulated(x, c, dist.MultivariateNormal(mean, covariance).log_prob(x))
