"""A Gaussian on the real line as a guide, with any covariance."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import biject_to

from pyro_elbo.posterior.weights import unconstrained_shape
from pyro_elbo.programs import Site

JOINT = "_linear_response"


@dataclass(frozen=True)
class GaussianGuide:
    r"""A guide without parameters: all latents on the real line are jointly Gaussian.

    .. math:: \theta \sim N(\mu, \Sigma), \qquad z = T^{-1}(\theta)

    Use it wherever a guide is used: its draws have exact densities.

    Attributes:
        mean, scale_tril: μ and the Cholesky factor of Σ, in the order of ``latents``.
        latents: the sites of a run of the model.
    """

    mean: Float[Tensor, " elements"]
    scale_tril: Float[Tensor, "elements elements"]
    latents: tuple[Site, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latents; the arguments are those of the model, and nothing depends on them."""
        fn = dist.MultivariateNormal(self.mean, scale_tril=self.scale_tril)
        joint = pyro.sample(JOINT, fn, infer={"is_auxiliary": True})
        shapes: list[Any] = [unconstrained_shape(site) for site in self.latents]
        parts = joint.split([shape.numel() for shape in shapes], -1)
        return {s.name: _pass_on(s, x, shape) for s, x, shape in zip(self.latents, parts, shapes, strict=True)}


def _pass_on(site: Site, block: Tensor, shape: torch.Size) -> Tensor:
    """State a latent in its plates, at the point that a block of the joint draw says."""
    batch = site.value.dim() - site.event_dim
    left = block.shape[:-1][: max(block.dim() - 1 - batch, 0)]  # particles lie on the left of all plates
    free = block.reshape((*left, *shape))
    transform: Any = biject_to(site.fn.support)
    value = transform(free).to(site.value.dtype)
    density: Any = transform.inv.log_abs_det_jacobian(value, free)
    density = sum_rightmost(density, density.dim() - value.dim() + site.event_dim)
    with ExitStack() as stack:
        for plate in site.plates:
            stack.enter_context(pyro.plate(plate.name, plate.size, dim=plate.dim))
        return pyro.sample(site.name, dist.Delta(value, density, event_dim=site.event_dim))
