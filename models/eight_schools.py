"""Eight schools: two programs of one hierarchical model, and its exact posterior and evidence by quadrature.

    μ ~ N(0, 5²),   τ ~ half-normal(5),   θ_j ~ N(μ, τ²),   y_j ~ N(θ_j, σ_j²),   σ_j known

The centered program draws θ, the non-centered one (θ - μ)/τ. Given τ everything else is Gaussian. With t = log τ,

    p(y) = ∫ p(y | τ) p(τ) τ dt,    E[f | y] = ∫ E[f | y, τ] p(t | y) dt,

and the trapezoidal rule, whose error falls exponentially for a smooth density that vanishes at both ends, leaves no
more than rounding. The prior of τ is half-normal, not half-Cauchy as in posteriordb: all data that it simulates are of
the size of the real ones.

References:
    Rubin (1981), Estimation in parallel randomized experiments; Gelman (2006), Prior distributions for variance
    parameters in hierarchical models.
"""

from dataclasses import dataclass
from functools import cached_property

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Float64
from torch import Tensor

Schools = Float[Tensor, " school"]
OnGrid = Float64[Tensor, " grid"]

SIGMA = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)
Y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
SCALE = 5.0
"""Standard deviation of μ, and scale of τ, under the prior."""


def centered(sigma: Schools, y: Schools) -> None:
    """Draw the effects themselves.

    Args:
        sigma: known standard error of each estimate.
        y: estimated effect.
    """
    mu, tau = _population(y)
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def noncentered(sigma: Schools, y: Schools) -> None:
    """Draw the effects in units of their spread; ``theta`` is a deterministic. Arguments as of `centered`."""
    mu, tau = _population(y)
    with pyro.plate("school", len(y)):
        shift = pyro.sample("shift", dist.Normal(y.new_zeros(()), 1.0))
        theta = pyro.deterministic("theta", mu + tau * shift, event_dim=0)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def _population(y: Schools) -> tuple[Tensor, Tensor]:
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), SCALE))
    return mu, pyro.sample("tau", dist.HalfNormal(y.new_tensor(SCALE)))


@dataclass(frozen=True)
class Exact:
    """The exact posterior of eight schools.

    Attributes:
        sigma: known standard error of each estimate.
        y: estimated effect.
        log_tau: the grid of the quadrature.
    """

    sigma: Float64[Tensor, " school"]
    y: Float64[Tensor, " school"]
    log_tau: OnGrid

    @classmethod
    def of(cls, sigma: Schools, y: Schools, points: int = 2001) -> "Exact":
        """Return the posterior given data, on a grid that leaves out less than 1e-12 of it."""
        return cls(sigma.double(), y.double(), torch.linspace(-30.0, 4.5, points, dtype=torch.float64))

    @cached_property
    def log_joint(self) -> OnGrid:
        """Log p(y, t) at every t = log τ, nats. It is p(y, μ, t) / p(μ | y, t) at the mean of μ."""
        loc, variance = self.mu_given_tau
        density = dist.Normal(loc[:, None], self._spread.sqrt()).log_prob(self.y).sum(-1)
        density = density + dist.Normal(0.0, SCALE).log_prob(loc) + 0.5 * (2 * torch.pi * variance).log()
        return density + dist.HalfNormal(SCALE).log_prob(self.log_tau.exp()) + self.log_tau

    @cached_property
    def weights(self) -> OnGrid:
        """The posterior probability of each point of the grid."""
        return self.log_joint.softmax(0)

    @property
    def log_evidence(self) -> Float64[Tensor, ""]:
        """Log p(y), nats."""
        return self.log_joint.logsumexp(0) + self.log_tau.diff()[0].log()

    @property
    def mu_given_tau(self) -> tuple[OnGrid, OnGrid]:
        """Mean and variance of μ at every point of the grid."""
        precision = 1 / SCALE**2 + (1 / self._spread).sum(-1)
        return (self.y / self._spread).sum(-1) / precision, 1 / precision

    @property
    def moments(self) -> tuple[Float64[Tensor, " columns"], Float64[Tensor, " columns"]]:
        """Means and standard deviations of μ, τ, θ_1, θ_2, ...: total expectation and total variance over τ."""
        loc, variance = self.mu_given_tau
        tau, keep = self.log_tau.exp(), self._keep
        means = torch.cat([loc[:, None], tau[:, None], keep * self.y + (1 - keep) * loc[:, None]], 1)
        theta = keep * self.sigma**2 + (1 - keep) ** 2 * variance[:, None]
        variances = torch.cat([variance[:, None], torch.zeros_like(tau)[:, None], theta], 1)
        mean = self.weights @ means
        return mean, (self.weights @ (variances + (means - mean) ** 2)).sqrt()

    def draw(self, count: int) -> dict[str, Tensor]:
        """Draw from the posterior: τ off the grid, then μ given τ, then θ given both."""
        rows = torch.multinomial(self.weights, count, replacement=True)
        within = (torch.rand(count, dtype=torch.float64) - 0.5) * self.log_tau.diff()[0]
        at = Exact(self.sigma, self.y, self.log_tau[rows] + within)
        loc, variance = at.mu_given_tau
        mu = dist.Normal(loc, variance.sqrt()).sample()
        keep = at._keep
        theta = dist.Normal(keep * self.y + (1 - keep) * mu[:, None], keep.sqrt() * self.sigma).sample()
        return {"mu": mu, "tau": at.log_tau.exp(), "theta": theta}

    @property
    def _spread(self) -> Float64[Tensor, "grid school"]:
        """The variance of y given μ."""
        return self.sigma**2 + self.log_tau.exp()[:, None] ** 2

    @property
    def _keep(self) -> Float64[Tensor, "grid school"]:
        """The share of y, against μ, in the mean of θ: τ² / (σ² + τ²)."""
        return self.log_tau.exp()[:, None] ** 2 / self._spread
