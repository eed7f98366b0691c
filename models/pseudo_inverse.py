"""Encoders of a linear-Gaussian model, which learn a regularized pseudo-inverse of its decoder.

    z_n ~ Normal(0, I),   x_n | z_n ~ Normal(A z_n, λ I):     q(z_n | x_n) = Normal(B x_n + b, LLᵀ)

The bound is largest at B* = (AᵀA + λI)⁻¹Aᵀ (ridge regression), b = 0 and LLᵀ = λ (AᵀA + λI)⁻¹. If A has singular values
s_i, then B* has s_i / (s_i² + λ): B* tends to the pseudo-inverse A⁺ as λ → 0. This holds for any data that span the
space, since B* x is the best mean for each x by itself. So an encoder, trained once, and parameters for every datum,
trained anew for each, have the same optimum. The model is :class:`models.linear_gaussian.LinearGaussian`.

All log densities are quadratic in z, and the expectation of a quadratic under a Gaussian is its mean over 2 k sigma
points. The guides answer with these: neither the bound nor its gradient has any noise.
Tipping, Bishop (1999), Probabilistic principal component analysis; Julier, Uhlmann (1997), A new extension of the
Kalman filter to nonlinear systems; Gershman, Goodman (2014), Amortized inference in probabilistic reasoning.
"""

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

Moments = tuple[Float[Tensor, "n k"], Float[Tensor, "*n k k"]]


class SigmaPoints(dist.MultivariateNormal):
    """A Gaussian that answers 2 k draws with its sigma points loc ± √k L e_i.

    Their mean of any quadratic is its expectation. The draws are the outermost dimension.
    """

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008  (as torch declares it)
        shape = self._extended_shape(sample_shape)
        k = shape[-1]
        if shape[0] != 2 * k:
            raise ValueError(
                f"SigmaPoints: expected {2 * k} draws of a latent of {k} dimensions, on the left, got shape "
                f"{tuple(shape)}. Set num_particles={2 * k} and vectorize_particles=True."
            )
        axes = k**0.5 * torch.eye(k, dtype=self.loc.dtype)
        points = torch.cat([axes, -axes]).view(2 * k, *(1,) * (len(shape) - 2), k, 1)
        return self.loc + (self.scale_tril @ points).squeeze(-1)


class GaussianGuide(PyroModule):
    """q(z_n | x_n) = Normal with the moments of a subclass; needs 2 k vectorized particles."""

    def moments(self, x: Float[Tensor, "n d"]) -> Moments:
        """Return the mean of each z_n, and L, of each or for all."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "points n k"]:
        loc, scale_tril = self.moments(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", SigmaPoints(loc, scale_tril=scale_tril))

    def drawing_guide(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "*particles n k"]:
        """Draw z from the same q."""
        loc, scale_tril = self.moments(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))


class AmortizedGuide(GaussianGuide):
    """A linear encoder for all data. It reads whitened coordinates, so that all directions of x are learned as fast.

    Args:
        x: the data whose mean and covariance define the coordinates; more rows than columns.
        k: latent dimensions.
    """

    mean: Tensor
    whiten: Tensor

    def __init__(self, x: Float[Tensor, "n d"], k: int) -> None:
        super().__init__()
        self.register_buffer("mean", x.mean(0))
        self.register_buffer("whiten", torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))))
        self.linear = nn.Linear(x.shape[1], k, dtype=x.dtype)
        self.scale = PyroParam(torch.eye(k, dtype=x.dtype), constraints.lower_cholesky)

    def moments(self, x: Float[Tensor, "n d"]) -> Moments:
        return self.linear((x - self.mean) @ self.whiten.T), self.scale

    @property
    def encoder(self) -> Float[Tensor, "k d"]:
        """B, for x in its own coordinates."""
        return (self.linear.weight @ self.whiten).detach()


class PerDatumGuide(GaussianGuide):
    """Free moments for each of n data."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.loc = PyroParam(torch.zeros(n, k, dtype=torch.float64))
        self.scale = PyroParam(torch.eye(k, dtype=torch.float64).repeat(n, 1, 1), constraints.lower_cholesky)

    def moments(self, x: Float[Tensor, "n d"]) -> Moments:
        return self.loc, self.scale
