"""The linear-Gaussian latent-variable model, whose posterior and evidence are known exactly.

    z_n ~ Normal(0, I_k),     x_n | z_n ~ Normal(W z_n + μ, σ² I_d)

With M = WᵀW + σ²I: the posterior is Normal(M⁻¹Wᵀ(x - μ), σ²M⁻¹), so the best linear encoder is the ridge
pseudo-inverse M⁻¹Wᵀ; log p(x) = log Normal(x; μ, WWᵀ + σ²I); a mean-field guide loses exactly
½(Σ log M_ii - log|M|) nats per datum. Tipping, Bishop (1999), Probabilistic principal component analysis.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn


@dataclass(frozen=True)
class LinearGaussian:
    """The model with known parameters; calling it is the Pyro program.

    Attributes:
        weight: W, shape (d, k).
        mean: μ, shape (d,).
        noise: σ, a positive number.
    """

    weight: Float[Tensor, "d k"]
    mean: Float[Tensor, " d"]
    noise: float

    def __call__(self, x: Float[Tensor, "n d"]) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mean.new_zeros(self.weight.shape[1]), 1.0).to_event(1))
            loc = z @ self.weight.T + self.mean
            pyro.sample("x", dist.Normal(loc, self.noise).to_event(1), obs=x)

    @property
    def precision(self) -> Float[Tensor, "k k"]:
        """M = WᵀW + σ²I: σ² times the posterior precision."""
        k = self.weight.shape[1]
        return self.weight.T @ self.weight + self.noise**2 * torch.eye(k, dtype=self.weight.dtype)

    @property
    def encoder(self) -> Float[Tensor, "k d"]:
        """M⁻¹Wᵀ: the map from x - μ to the posterior mean."""
        return torch.linalg.solve(self.precision, self.weight.T)

    @property
    def covariance(self) -> Float[Tensor, "k k"]:
        """σ²M⁻¹: the posterior covariance, the same for every datum."""
        return self.noise**2 * torch.linalg.inv(self.precision)

    @property
    def mean_field_gap(self) -> Tensor:
        """½(Σ log M_ii - log|M|): nats per datum between log p(x) and the best diagonal guide."""
        return 0.5 * (self.precision.diagonal().log().sum() - torch.logdet(self.precision))

    def tempered(self, beta: float) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k k"]]:
        """Return the encoder and the covariance of the best q for a weight β of the KL.

        q_β(z | x) ∝ p(z) p(x | z)^(1/β) is the posterior at the noise βσ²: ridge regression with penalty βσ².
        """
        noise, k = beta * self.noise**2, self.weight.shape[1]
        precision = self.weight.T @ self.weight + noise * torch.eye(k, dtype=self.weight.dtype)
        return torch.linalg.solve(precision, self.weight.T), noise * torch.linalg.inv(precision)

    def rate_distortion(self, beta: float, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        """Return rate and distortion of q_β on these data, in closed form: nats per datum.

        With q_β = Normal(A (x - μ), Σ): R = ½ (tr Σ + |A(x - μ)|² - k - log|Σ|) and
        D = ½ d log 2πσ² + (|(I - WA)(x - μ)|² + tr WΣWᵀ) / 2σ², averaged over the data.
        """
        encoder, cov = self.tempered(beta)
        centered = x - self.mean
        loc = centered @ encoder.T
        rate = (cov.trace() + loc.square().sum(1).mean() - len(cov) - torch.logdet(cov)) / 2
        error = (centered - loc @ self.weight.T).square().sum(1).mean() + (self.weight @ cov @ self.weight.T).trace()
        constant = x.shape[1] / 2 * math.log(2 * math.pi * self.noise**2)
        return rate, constant + error / (2 * self.noise**2)

    def tempered_guide(self, beta: float) -> Callable[[Tensor], Tensor]:
        """Return q_β as a guide."""
        encoder, cov = self.tempered(beta)

        def guide(x: Float[Tensor, "n d"]) -> Tensor:
            with pyro.plate("data", len(x)):
                return pyro.sample("z", dist.MultivariateNormal((x - self.mean) @ encoder.T, cov))

        return guide

    def log_evidence(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Return log p(x_n) in nats."""
        eye = torch.eye(len(self.mean), dtype=self.mean.dtype)
        cov = self.weight @ self.weight.T + self.noise**2 * eye
        return dist.MultivariateNormal(self.mean, cov).log_prob(x)

    def exact_guide(self) -> Callable[[Tensor], Tensor]:
        """Return the exact posterior as a guide."""

        def guide(x: Float[Tensor, "n d"]) -> Tensor:
            with pyro.plate("data", len(x)):
                loc = (x - self.mean) @ self.encoder.T
                return pyro.sample("z", dist.MultivariateNormal(loc, self.covariance))

        return guide


def simulate(
    n: int, d: int = 6, k: int = 3, noise: float = 0.7, seed: int = 0, orthogonal: bool = False
) -> tuple[LinearGaussian, Tensor]:
    """Draw parameters and n data in double precision; ``orthogonal`` columns of W make the posterior diagonal."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight, mean = normal(d, k), normal(d)
    if orthogonal:
        weight = torch.linalg.qr(weight).Q * torch.linspace(2.0, 1.0, k, dtype=weight.dtype)
    model = LinearGaussian(weight, mean, noise)
    return model, normal(n, k) @ model.weight.T + model.mean + noise * normal(n, d)


class LinearGuide(PyroModule):
    """q(z | x) = Normal(A x + b, LLᵀ): a linear encoder with full or diagonal covariance."""

    def __init__(self, d: int, k: int, full: bool = True) -> None:
        super().__init__()
        self.full = full
        self.linear = nn.Linear(d, k, dtype=torch.float64)
        if full:
            self.scale = PyroParam(torch.eye(k, dtype=torch.float64), constraints.lower_cholesky)
        else:
            self.scale = PyroParam(torch.ones(k, dtype=torch.float64), constraints.positive)

    def forward(self, x: Float[Tensor, "n d"]) -> Tensor:
        with pyro.plate("data", len(x)):
            loc = self.linear(x)
            if self.full:
                return pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=self.scale))
            return pyro.sample("z", dist.Normal(loc, self.scale).to_event(1))
