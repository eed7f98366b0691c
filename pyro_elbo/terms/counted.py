"""The most probable values where masks leave some sites out.

A mask takes the density of a site out of the bound. A summed-out site keeps its prior there all the same: what counts
may depend on it, as an animal's survival depends on the state in which it was first caught. The sum over an idle site,
below which nothing counts, is one. The maximum over it is not, so its prior must not choose the values that count: they
are chosen first, and idle ones given them.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pyro_elbo.programs import Site, step_before
from pyro_elbo.sequences import StackedDistribution
from pyro_elbo.terms.labeled import Labeled, add, combine, is_time, label, label_steps, plate_labels
from pyro_elbo.terms.summed_out import Joined

Choose = Callable[[dict[str, Joined]], dict[str, Labeled]]


def choose_in_turn(sites: dict[str, Joined], summed: list[str], choose: Choose) -> dict[str, Labeled]:
    """Return the most probable joint values of what counts, and of idle sites given them.

    Args:
        sites: the sites of one connected group, in program order.
        summed: the names of the summed-out sites among them.
        choose: returns the most probable joint values of such sites, as :func:`choose_best` does.
    """
    bears = _bearing(sites)
    if all((bears[n].x > 0).all() for n in summed):
        return choose(sites)
    best = choose(sites | {n: _mapped(_unless_idle, sites[n], bears[n]) for n in summed})
    chosen = {n: best[n].sum([a for a in best[n].labels if a.kind == "value" and a.name != n]) for n in summed}
    return choose(sites | {n: _mapped(_as_chosen, sites[n], bears[n], chosen[n]) for n in summed})


def _mapped(function: Callable[..., Tensor], joined: Joined, *others: Labeled) -> Joined:
    return replace(joined, log_p=combine(function, joined.log_p, *others))


def _unless_idle(log_p: Tensor, bears: Tensor) -> Tensor:
    return torch.where(bears > 0, log_p, torch.zeros_like(log_p))


def _as_chosen(log_p: Tensor, bears: Tensor, chosen: Tensor) -> Tensor:
    return torch.where((bears > 0) & (chosen <= 0), -torch.inf, log_p)


def _bearing(sites: Mapping[str, Joined]) -> dict[str, Labeled]:
    """Return more than 0 where a site counts or one that counts depends on it, and 0 elsewhere."""
    found: dict[str, Labeled] = {}
    for name in reversed(list(sites)):
        site, before = sites[name].site, step_before(name)
        parts = [_counted(site), *(found[n] for n in found if name in sites[n].log_p.variables)]
        parts += [_a_step_earlier(found[n]) for n in found if before in sites[n].log_p.variables]
        rows = plate_labels(site)
        whole = add(parts).expand(rows)
        bears = whole.sum([a for a in whole.labels if a not in rows])
        found[name] = bears.map(_any_later(bears.x)) if before in sites[name].log_p.variables else bears
    return found


def _counted(site: Site) -> Labeled:
    """Return 1 where the mask of a site lets it count, for some value of what the mask depends on, and 0 elsewhere."""
    mask, in_scan = site.stepwise().mask, isinstance(site.fn, StackedDistribution)
    counted = torch.as_tensor(1.0 if mask is None else mask, dtype=torch.get_default_dtype())
    if in_scan:
        time = site.fn.event_shape[0]
        counted = counted.expand(torch.broadcast_shapes(counted.shape, (time,)))
        return label_steps(counted, replace(site, enum_dim=None))
    return label(counted, site.variables)


def _a_step_earlier(x: Labeled) -> Labeled:
    assert is_time(x.labels[-1])
    return x.map(torch.cat([x.x[..., 1:], torch.zeros_like(x.x[..., :1])], -1))


def _any_later(x: Tensor) -> Tensor:
    """Return the largest entry at each step or after it; time is the last dimension."""
    return x.flip(-1).cummax(-1).values.flip(-1)
