r"""The score-function gradient of sites without a pathwise one.

A term's ``nats`` carry the pathwise gradient. For a site z drawn from q without one,

.. math:: \nabla E_q[R] = E_q[R\,\nabla \log q(z)] + E_q[\nabla R],

with R the whole objective. A row of z can affect only terms that share its plates or lie outside them, so R is summed
over all other plates and each row keeps the part that it can affect (Rao-Blackwellization).

A baseline may be subtracted from R (:mod:`pyro_elbo.objectives.baselines`), and the mean of other particles
(:mod:`pyro_elbo.objectives.gradients`).

References:
    Ranganath, Gerrish, Blei (2014), Black box variational inference, arXiv:1401.0118; Wingate, Weber (2013),
    arXiv:1301.1299.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_elbo.objectives import baselines
from pyro_elbo.objectives.gradients import leave_one_out
from pyro_elbo.programs import Plate
from pyro_elbo.terms import Term, is_one, scaled_sum

_NONE: Mapping[str, Tensor] = MappingProxyType({})


def surrogate(
    sites: Mapping[str, Term],
    weighted: Mapping[str, Tensor],
    constant: float | Tensor,
    particle_dim: int | None,
    compares: bool = False,
    averages: Mapping[str, Tensor] = _NONE,
) -> Float[Tensor, ""]:
    """Return the objective with the gradient of the estimator.

    Args:
        sites: the terms of the bound.
        weighted: the charge for each KL site, shaped like the term's nats.
        constant: nats subtracted once.
        particle_dim: the batch dimension of the particles, if any.
        compares: rewards lose the mean of those of the other particles.
        averages: the decaying average of earlier rewards, by site.

    Returns:
        Σ log-likelihood - Σ weighted KL - constant, scaled to the full data, mean over particles (nats).
    """
    signed = _signed(sites, weighted)
    total = torch.as_tensor(sum(scaled_sum(sites[name], x, particle_dim) for name, x in signed.items()) - constant)
    for term in sites.values():
        baselines.of(term)
    for name, reward in _rewards(sites, signed).items():
        score = sites[name].score
        assert score is not None
        reward, loss = baselines.subtract_baseline(sites[name], reward, averages.get(name), particle_dim)
        reward = leave_one_out(reward, particle_dim) if compares else reward
        share = _mean_over(particle_dim, score * reward)
        part = share if loss is None else share - loss
        total = total + part - part.detach()
    return total


def moved_averages(
    sites: Mapping[str, Term], weighted: Mapping[str, Tensor], particle_dim: int | None, averages: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the decaying averages of rewards after this step, of the sites that ask for one."""
    if not any(site.baseline is not None for t in sites.values() for site in t.draws):
        return {}
    rewards = _rewards(sites, _signed(sites, weighted))
    moved = {n: baselines.moved_average(sites[n], r, averages.get(n), particle_dim) for n, r in rewards.items()}
    return {name: x for name, x in moved.items() if x is not None}


def _signed(sites: Mapping[str, Term], weighted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: -weighted[name] if t.is_kl else t.nats for name, t in sites.items()}


def _rewards(sites: Mapping[str, Term], signed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the reward of each site without pathwise gradient, a constant."""
    scored = {name: set(t.plates) for name, t in sites.items() if t.score is not None}
    if not scored:
        return {}
    by_plates: dict[frozenset[Plate], Tensor] = {}
    for name, x in signed.items():
        scale, plates = sites[name].scale, frozenset(sites[name].reward_plates)
        scaled = x.detach() if is_one(scale) else (x * scale).detach()
        scaled = _sum_out(scaled, frozenset(sites[name].plates) - plates)
        by_plates[plates] = by_plates[plates] + scaled if plates in by_plates else scaled
    return {
        name: torch.as_tensor(sum(_sum_out(x, plates - own) for plates, x in by_plates.items()))
        for name, own in scored.items()
    }


def _mean_over(particle_dim: int | None, x: Tensor) -> Tensor:
    """Sum over data, averaged over particles."""
    return x.sum() / (x.shape[particle_dim] if particle_dim is not None and x.dim() >= -particle_dim else 1)


def _sum_out(x: Tensor, plates: frozenset[Plate]) -> Tensor:
    dims = [p.dim for p in plates if x.dim() >= -p.dim]
    return x.sum(dims, keepdim=True) if dims else x
