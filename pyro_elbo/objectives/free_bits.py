r"""Free bits: a KL whose mean over the data is below λ is charged as λ, without a gradient.

.. math:: \max(\lambda, \overline{KL})

The floor holds per latent dimension where the KL factorizes, per site otherwise. The auxiliary sites of a guide and the
latents that they determine have one KL together, and one floor: alone, :math:`\log q` and :math:`-\log p` mean nothing.
The mean is over the data and the particles of the step, of all processes that share it. Where a KL is sampled and few
data share it, take enough particles: noise that crosses λ biases the gradient.

References:
    Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling (2016), arXiv:1606.04934.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_elbo.masking import expand_to_event, masked
from pyro_elbo.ranks import total
from pyro_elbo.terms import Term, frames


def floor_site(term: Term, free: float) -> Tensor:
    """Return max(λ, mean KL) per dimension as a tensor per datum, summed over the event."""
    events = len(term.event_shape) if term.per_dim is not None else 0
    nats = term.per_dim() if term.per_dim is not None else term.nats
    mean = _mean_over_data(nats.detach(), term, events)
    floored = torch.where(mean > free, nats, nats.new_tensor(free))
    if isinstance(term.mask, Tensor):
        floored = masked(floored, expand_to_event(term.mask, events))
    return floored.flatten(floored.dim() - events).sum(-1) if events else floored


def floor_joint(
    terms: Mapping[str, Term], free: float, weight: float | Tensor, particle_dim: int | None
) -> tuple[dict[str, Tensor], Tensor]:
    r"""Return the charge for sites that have one KL together: their nats above λ, and below it zero and a constant.

    A datum is a row of the plates (and of time) that all the sites share. The scale of the first auxiliary site is that
    of the data.
    """
    over_time = all(t.steps is not None for t in terms.values())
    parts = {name: t.steps if over_time and t.steps is not None else t for name, t in terms.items()}
    if over_time and particle_dim is not None:
        particle_dim -= 1
    shared = set.intersection(*({p.dim for p in t.plates} for t in parts.values()))
    first = next(t for t in parts.values() if t.kind == "auxiliary")
    keep = shared if particle_dim is None else shared | {particle_dim}
    kl = sum(_sum_but(keep, t.nats.detach() * (t.scale / first.scale)) for t in parts.values())
    assert isinstance(kl, Tensor)
    counted = _sum_but(keep, frames(first).to(kl.dtype)).clamp(max=1)
    kl, counted = torch.broadcast_tensors(kl, counted)
    above = (total(kl.sum()) / total(counted.sum()).clamp(min=1)) > free
    charges = {}
    for name, part in parts.items():
        charge = torch.where(above, part.nats * weight, part.nats.new_zeros(()))
        charges[name] = charge.sum(-1) if over_time else charge
    rows = counted if particle_dim is None or kl.dim() < -particle_dim else counted.mean(particle_dim, keepdim=True)
    floor = (free * weight * rows * first.scale).sum()
    return charges, torch.where(above, torch.zeros_like(floor), floor)


def _sum_but(keep: set[int], x: Tensor) -> Tensor:
    """Sum over all dimensions but those to keep."""
    gone = [d for d in range(-x.dim(), 0) if d not in keep]
    return x.sum(gone, keepdim=True) if gone else x


def _mean_over_data(x: Tensor, term: Term, event_dim: int) -> Tensor:
    """Average over particles and the unmasked data: one number per element of the event."""
    batch = tuple(range(x.dim() - event_dim))
    if not batch:
        return x
    shape = x.shape[: x.dim() - event_dim]
    mask = term.mask.expand(shape) if isinstance(term.mask, Tensor) else x.new_ones(shape, dtype=torch.bool)
    return total(x.sum(batch)) / total(mask.sum()).clamp(min=1)
