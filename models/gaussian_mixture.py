"""A mixture of Gaussians, whose evidence, posterior and best update (EM) are known exactly.

    k_n ~ Categorical(w),     x_n | k_n ~ Normal(μ_k, Σ_k)

The component k is summed out, so the E-step is exact: q(k | x) = w_k N(x; μ_k, Σ_k) / Σ_j w_j N(x; μ_j, Σ_j), and the
ELBO equals log p(x). Given any q, the M-step that maximizes the ELBO has closed form. Alternated, they never lower the
bound. With a q that is restricted, such as one that factorizes over the bits of k, they maximize a bound that lies
KL(q ‖ p(k | x)) lower. Dempster, Laird, Rubin (1977); Neal, Hinton (1998).
"""

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class GaussianMixture:
    """The model with known parameters; calling it is the Pyro program, in which k is summed out.

    Attributes:
        weights: w, shape (K,), sums to 1.
        means: μ, shape (K, d).
        covariances: Σ, shape (K, d, d).
    """

    weights: Float[Tensor, " K"]
    means: Float[Tensor, "K d"]
    covariances: Float[Tensor, "K d d"]

    def __call__(self, x: Float[Tensor, "n d"]) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(self.weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.MultivariateNormal(self.means[k], self.covariances[k]), obs=x)

    def log_joint(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n K"]:
        """Return log p(x_n, k)."""
        density = dist.MultivariateNormal(self.means, self.covariances).log_prob(x[:, None])
        return self.weights.log() + density

    def log_evidence(self, x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        """Return log p(x) of all rows in nats."""
        return self.log_joint(x).logsumexp(1).sum()


def m_step(x: Float[Tensor, "n d"], q: Float[Tensor, "n K"]) -> GaussianMixture:
    """Return the mixture with the highest ELBO for the probabilities q of the components of each row."""
    count = q.sum(0)
    means = (q.T @ x) / count[:, None]
    apart = x[:, None] - means
    covariances = torch.einsum("nk,nki,nkj->kij", q, apart, apart) / count[:, None, None]
    return GaussianMixture(count / count.sum(), means, covariances)


def factorized_posterior(
    log_joint: Float[Tensor, "n K"], start: Float[Tensor, "n K"], steps: int = 20
) -> Float[Tensor, "n K"]:
    """Raise the ELBO of q(a) q(b), for a component k = (a, b) with K = 2 · 2, by coordinate ascent from the marginals.

    From a ``start`` that factorizes no step lowers the ELBO.
    """
    table, first = log_joint.unflatten(1, (2, 2)), start.unflatten(1, (2, 2))
    a, b = first.sum(2), first.sum(1)
    for _ in range(steps):
        a = torch.einsum("nab,nb->na", table, b).softmax(1)
        b = torch.einsum("nab,na->nb", table, a).softmax(1)
    return (a[:, :, None] * b[:, None, :]).flatten(1)
