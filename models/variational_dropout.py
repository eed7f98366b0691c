"""Variational dropout: a Bayesian neural network whose prior prunes its weights.

    w_ij ~ LogUniform,   p(w) ∝ 1 / |w|;     y_n | x_n, w ~ Categorical(logits = net(x_n; w))
    q(w_ij) = Normal(θ_ij, α_ij θ_ij²),      that is w = θ ξ with ξ ~ Normal(1, α)

Dropout at rate r with Gaussian noise is this guide at α = r / (1 - r). KL(q ‖ p) depends on α alone and falls as α
grows. As α → ∞ it tends to its least value: such a weight is noise and can go. The prior is improper, so that its KL is
known up to a constant, chosen here so that the least value is 0. The rate and the ELBO contain this constant once per
weight: compare them between networks of one shape only, and do not read the rate as information.

    KL(α) ≈ k₁ - k₁ sigmoid(k₂ + k₃ log α) + ½ log(1 + 1/α),   k = (0.63576, 1.87320, 1.48695),   error below 0.01 nats

Kingma, Salimans, Welling (2015), arXiv:1506.02557; Molchanov, Ashukha, Vetrov (2017), arXiv:1701.05369, from where the
approximation is.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import register_kl
from torch.nn.functional import softplus

PRUNED = 3.0  # log α from which a weight is dropped: dropout at a rate of 95 %
EULER = 0.5772156649015329


class LogUniform(dist.TorchDistribution):
    """The improper prior p(w) ∝ 1 / |w|, flat in log |w|; it cannot be sampled.

    Args:
        shape: one independent w an element.
    """

    arg_constraints: dict = {}
    support = constraints.real
    # KL → 0 as α → ∞, where log q - log p is -½ log 2πeα + E log |√α ε|, and E log |ε| = -½ (log 2 + γ).
    log_constant = -0.5 * (math.log(2) + EULER + math.log(2 * math.pi * math.e))

    def __init__(self, shape: Sequence[int] = ()) -> None:
        super().__init__(torch.Size(shape), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> "LogUniform":
        return LogUniform(batch_shape)

    def log_prob(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self.log_constant - value.abs().log()


@register_kl(torch.distributions.Normal, LogUniform)
def _kl_normal_log_uniform(q: torch.distributions.Normal, p: LogUniform) -> Tensor:
    return dropout_kl(log_alpha(q.loc, q.scale))


def log_alpha(theta: Float[Tensor, "*shape"], scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return log α = log(scale² / θ²), bounded where θ is zero."""
    return 2 * scale.log() - (theta.square() + 1e-20).log()


def dropout_kl(log_alpha: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return Molchanov's approximation of KL(Normal(θ, αθ²) ‖ LogUniform) in nats; 0 at α = ∞.

    Example:
        >>> [round(kl, 3) for kl in dropout_kl(torch.tensor([-4.0, 0.0, 4.0])).tolist()]
        [2.634, 0.431, 0.009]
    """
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    return k1 * torch.sigmoid(-k2 - k3 * log_alpha) + 0.5 * softplus(-log_alpha)


class DropoutWeight(nn.Module):
    """The parameters of q for one matrix of weights.

    Args:
        inputs, outputs: columns and rows of the matrix.
        rate: dropout rate to start from.
    """

    def __init__(self, inputs: int, outputs: int, rate: float = 0.1) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(outputs, inputs) * (2 / inputs) ** 0.5)
        alpha = rate / (1 - rate)
        scale = (alpha**0.5 * self.theta.detach().abs()).clamp_min(1e-6)
        self.raw_scale = nn.Parameter(scale.expm1().log())  # softplus gives the scale back

    @property
    def posterior(self) -> dist.TorchDistribution:
        """q(w)."""
        return dist.Normal(self.theta, softplus(self.raw_scale))

    @property
    def log_alpha(self) -> Float[Tensor, "outputs inputs"]:
        """Logarithm of α, for each weight."""
        return log_alpha(self.theta, softplus(self.raw_scale))

    def mean(self, *, pruned: bool) -> Float[Tensor, "outputs inputs"]:
        """θ, with zeros for the weights that are noise if ``pruned``."""
        return self.theta * (self.log_alpha < PRUNED) if pruned else self.theta


class DropoutNet(nn.Module):
    """A classifier: ``model(x, y)`` and ``guide(x, y)`` with one latent per layer, ``weight_0``, ``weight_1``, ...

    All rows of a step see the same draw of the weights.

    Args:
        widths: columns of x, hidden units, classes.
        size: rows of the full data, of which x and y are minibatches; those given if omitted.
        rate: dropout rate to start from.
    """

    def __init__(self, *widths: int, size: int | None = None, rate: float = 0.1) -> None:
        super().__init__()
        self.size = size
        self.weights = nn.ModuleList(DropoutWeight(i, o, rate) for i, o in pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(o) for o in widths[1:])

    def model(self, x: Float[Tensor, "n columns"], y: Int[Tensor, " n"] | None = None) -> None:
        pyro.module("dropout_net", self)
        drawn = []
        for i, weight in enumerate(self.weights):
            drawn.append(pyro.sample(f"weight_{i}", LogUniform(weight.theta.shape).to_event(2)))
        size = len(x) if self.size is None else self.size
        with pyro.plate("data", size, subsample=None if size == len(x) else torch.arange(len(x))):
            pyro.sample("y", dist.Categorical(logits=self.logits(x, drawn)), obs=y)

    def guide(self, x: Float[Tensor, "n columns"], y: Int[Tensor, " n"] | None = None) -> None:
        pyro.module("dropout_net", self)
        for i, weight in enumerate(self.weights):
            pyro.sample(f"weight_{i}", weight.posterior.to_event(2))

    def logits(
        self, x: Float[Tensor, "n columns"], weights: Sequence[Float[Tensor, "*draws outputs inputs"]]
    ) -> Float[Tensor, "*draws n classes"]:
        """Run the network with given weights; draws of them, if any, have a dimension of size 1 for the rows."""
        for i, (weight, bias) in enumerate(zip(weights, self.biases, strict=True)):
            matrix = weight.squeeze(-3) if weight.dim() > 2 else weight
            x = (x if i == 0 else x.relu()) @ matrix.mT + bias
        return x

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "n columns"], draws: int = 100) -> Float[Tensor, "n classes"]:
        """Return p(y | x), averaged over draws of the weights."""
        weights = [weight.posterior.sample((draws, 1)) for weight in self.weights]
        return self.logits(x, weights).softmax(-1).mean(0)

    @torch.no_grad()
    def predict_at_mean(self, x: Float[Tensor, "n columns"], *, pruned: bool) -> Float[Tensor, "n classes"]:
        """Return p(y | x) of the mean weights, with or without those that are noise."""
        return self.logits(x, [weight.mean(pruned=pruned) for weight in self.weights]).softmax(-1)

    @property
    def pruned(self) -> float:
        """The share of weights that are noise."""
        noise = torch.cat([(weight.log_alpha >= PRUNED).flatten() for weight in self.weights])
        return noise.float().mean().item()
