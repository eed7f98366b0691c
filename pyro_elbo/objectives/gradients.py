r"""Estimators of the gradient of a bound, each one function; ``ESTIMATORS`` says which bounds it is unbiased for.

Notation: :math:`z(\varphi, \varepsilon)` is a draw of the guide, :math:`w = p(x, z) / q_\varphi(z)`. The gradient of a
term at draws has three parts: the *path* (through z), the *direct* gradient of the model's parameters, and the *score*
:math:`\nabla_\varphi \log q_\varphi(z)` at fixed z. A second run of the programs, at the same draws as constants, has
the last two alone, whatever latents the guide's distributions depend on: the difference of both runs is the path. In a
guide :math:`q(z_1)\, q(z_2 \mid z_1)`, detaching the parameters of :math:`q(z_2 \mid z_1)` would cut the path through
:math:`z_1` as well; subtracting the score of the second run does not.

``stl`` (sticking the landing). Each site's score has mean zero given what was drawn before it, so that

.. math:: \nabla_\varphi E[\log p - \beta \log q] = E[\text{path}(\log p - \beta \log q)],

for any weights. Where q is the posterior, log w is a constant and its path vanishes at every draw: no variance is left.
The parameters of points (``Delta``) have no score, and keep their whole gradient.

``dreg`` (doubly reparameterized), for the bound :math:`L = \frac{1}{1 - \alpha} \log \frac1K \sum_k w_k^{1 - \alpha}`
of a row, with :math:`\tilde w_k = w_k^{1 - \alpha} / \sum_j w_j^{1 - \alpha}`. Its pathwise gradient is
:math:`\sum_k \tilde w_k (\text{path}_k + \text{direct}_k - \text{score}_k)`. Here the weights depend on the draws, and
the score does not vanish. Reparameterizing it again,

.. math:: E[\tilde w_k\, \text{score}_k] = E[\nabla_{z_k} \tilde w_k \cdot dz_k / d\varphi]
    = (1 - \alpha)\, E[(\tilde w_k - \tilde w_k^2)\, \text{path}_k],

leaves :math:`\sum_k \tilde w_k\, \text{direct}_k + (\alpha \tilde w_k + (1 - \alpha) \tilde w_k^2)\, \text{path}_k`.
Rows are independent, so the identity holds row by row, and the scale of a subsample stays outside.

``rloo`` (leave-one-out). The reward of a draw without a pathwise gradient loses the mean reward of the other particles,
on which the draw has no influence; for an importance-weighted bound, the bound of the others.

``vargrad``. All draws of the guide are constants, reparameterized or not. Half of the variance of log w over K
particles has the gradient

.. math:: -\frac{1}{K - 1} \sum_k (\log w_k - \overline{\log w})\, \nabla_\varphi \log q(z_k),

the score function with leave-one-out baselines. It needs no gradient of the model in z, and vanishes at the posterior.

References:
    Roeder, Wu, Duvenaud (2017), arXiv:1703.09194; Tucker, Lawson, Gu, Maddison (2019), arXiv:1810.04152; Kool, van
    Hoof, Welling (2019), Buy 4 REINFORCE samples, get a baseline for free!, ICLR workshop; Richter, Boustati, Nüsken,
    Ruiz, Akyildiz (2020), arXiv:2010.10436.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyro_elbo.errors import ArgumentError, check_choice
from pyro_elbo.programs import TracePair, without_own_gradient

Gradient = Literal["auto", "stl", "dreg", "rloo", "vargrad"]
BoundKind = Literal["elbo", "importance", "filtering"]
Trace = Callable[[], TracePair]
TraceAgain = Callable[[TracePair], TracePair]
Runs = tuple[TracePair, TracePair | None]
"""A run whose terms make the bound, and one at fixed draws that gives their direct gradient."""


def once(trace: Trace, again: TraceAgain) -> Runs:
    """Run the programs once: the whole gradient."""
    return trace(), None


def stl(trace: Trace, again: TraceAgain) -> Runs:
    """Leave out the score of the guide."""
    pair = trace()
    return without_own_gradient(pair, again(pair)), None


def dreg(trace: Trace, again: TraceAgain) -> Runs:
    """Leave out the score of the guide, and keep the direct gradient apart."""
    pair = trace()
    fixed = again(pair)
    return without_own_gradient(pair, fixed), fixed


def vargrad(trace: Trace, again: TraceAgain) -> Runs:
    """Take all draws of the guide as constants."""
    with torch.no_grad():
        pair = trace()
    return again(pair), None


def leave_one_out(reward: Tensor, particle_dim: int | None) -> Tensor:
    """Return rewards less the mean of the other particles' (rloo, vargrad)."""
    if particle_dim is None:
        return reward
    count = reward.shape[particle_dim]
    return (reward - reward.mean(particle_dim, keepdim=True)) * (count / (count - 1))


@dataclass(frozen=True)
class Estimator:
    """One estimator.

    Attributes:
        run: runs the programs.
        bounds: the bounds whose gradient it estimates without bias, each with what to use for other bounds.
        compares: it compares particles, and needs two of them.
        samples: it needs KLs that are sampled.
    """

    run: Callable[[Trace, TraceAgain], Runs] = once
    bounds: tuple[BoundKind, ...] = ("elbo", "importance")
    compares: bool = False
    samples: bool = False


ESTIMATORS: dict[str, Estimator] = {
    "auto": Estimator(bounds=("elbo", "importance", "filtering")),
    "stl": Estimator(stl, ("elbo",), samples=True),
    "dreg": Estimator(dreg, ("importance",), samples=True),
    "rloo": Estimator(compares=True),
    "vargrad": Estimator(vargrad, ("elbo",), compares=True, samples=True),
}
_CURES = {
    ("stl", "importance"): "the score does not vanish under normalized weights. Use gradient='dreg'.",
    ("dreg", "elbo"): "the ELBO has no weights over particles. Use gradient='stl'.",
    ("vargrad", "importance"): "it is the gradient of the ELBO. Use gradient='rloo'.",
}


def check_gradient(gradient: Gradient, bound: BoundKind, num_particles: int, is_identity: bool) -> Estimator:
    """Return the estimator of that name.

    Args:
        gradient: its name.
        bound: the bound of the objective.
        num_particles: the particles of the objective.
        is_identity: the weight of every KL is one, without free bits.

    Raises:
        ArgumentError: no estimator has that name, or it does not suit the objective.
    """
    check_choice("gradient", gradient, ESTIMATORS)
    estimator = ESTIMATORS[gradient]
    if bound not in estimator.bounds:
        why = _CURES.get((gradient, bound), "the choice of ancestors has none either. Use gradient='auto'.")
        raise ArgumentError(f"gradient={gradient!r} is no gradient of the {bound} bound: {why}")
    if estimator.compares and num_particles < 2:
        raise ArgumentError(
            f"gradient={gradient!r} compares particles and needs num_particles >= 2, got {num_particles}."
        )
    if gradient == "dreg" and not is_identity:
        raise ArgumentError(
            "gradient='dreg' reparameterizes log q inside log weights, where its weight must be one. Use beta=1 "
            "without free_bits, or gradient='auto'."
        )
    return estimator
