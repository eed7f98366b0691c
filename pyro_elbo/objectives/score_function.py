r"""The score-function gradient of sites without a pathwise one.

A term's ``nats`` carry the pathwise gradient. For a site z drawn from q without one,

.. math:: \nabla E_q[R] = E_q[R\,\nabla \log q(z)] + E_q[\nabla R],

with R the whole objective. A row of z can affect only terms that share its plates or lie outside them, so R is summed
over all other plates and each row keeps the part that it can affect (Rao-Blackwellization).

References:
    Ranganath, Gerrish, Blei (2014), Black box variational inference, arXiv:1401.0118; Wingate, Weber (2013),
    arXiv:1301.1299.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_elbo.programs import Plate
from pyro_elbo.terms import Term, is_one, scaled_sum


def surrogate(
    sites: Mapping[str, Term], weighted: Mapping[str, Tensor], constant: float | Tensor, particle_dim: int | None
) -> Float[Tensor, ""]:
    """Return the objective with the gradient of the estimator.

    Args:
        sites: the terms of the bound.
        weighted: the charge for each KL site, shaped like the term's nats.
        constant: nats subtracted once.
        particle_dim: the batch dimension of the particles, if any.

    Returns:
        Σ log-likelihood - Σ weighted KL - constant, scaled to the full data, mean over particles (nats).
    """
    signed = {name: -weighted[name] if t.is_kl else t.nats for name, t in sites.items()}
    total = torch.as_tensor(sum(scaled_sum(sites[name], x, particle_dim) for name, x in signed.items()) - constant)
    if any(t.score is not None for t in sites.values()):
        score = _score_function(sites, signed, particle_dim)
        total = total + score - score.detach()
    return total


def _score_function(sites: Mapping[str, Term], signed: Mapping[str, Tensor], particle_dim: int | None) -> Tensor:
    """Return Σ reward · log q over the sites without pathwise gradient; the rewards are constants."""
    by_plates: dict[frozenset[Plate], Tensor] = {}
    for name, x in signed.items():
        scale, plates = sites[name].scale, frozenset(sites[name].reward_plates)
        scaled = x.detach() if is_one(scale) else (x * scale).detach()
        scaled = _sum_out(scaled, frozenset(sites[name].plates) - plates)
        by_plates[plates] = by_plates[plates] + scaled if plates in by_plates else scaled
    shares = []
    for term in sites.values():
        if term.score is not None:
            reward = sum(_sum_out(x, plates - set(term.plates)) for plates, x in by_plates.items())
            share = term.score * reward
            count = share.shape[particle_dim] if particle_dim is not None and share.dim() >= -particle_dim else 1
            shares.append(share.sum() / count)
    return torch.stack(shares).sum()


def _sum_out(x: Tensor, plates: frozenset[Plate]) -> Tensor:
    dims = [p.dim for p in plates if x.dim() >= -p.dim]
    return x.sum(dims, keepdim=True) if dims else x
