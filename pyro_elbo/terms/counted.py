"""Which entries of masked sites bear on those that count.

A mask takes the density of a site out of the bound. A summed-out site keeps its prior there all the same: what counts
may depend on it, as an animal's survival depends on the state in which it was first caught. The sum over a masked site
below which nothing counts is one; the maximum over it is not, and must leave its prior out.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pyro_elbo.programs import Site, step_before
from pyro_elbo.sequences import StackedDistribution
from pyro_elbo.terms.labeled import Labeled, add, combine, is_time, label, label_steps, plate_labels
from pyro_elbo.terms.summed_out import Joined


def without_idle_priors(sites: Mapping[str, Joined], summed: list[str]) -> dict[str, Joined]:
    """Return sites with zero in place of the log prior of summed-out sites where nothing that counts depends on them.

    Args:
        sites: the sites of one connected group, in program order.
        summed: the names of the summed-out sites among them.
    """
    bears = _bearing(sites)
    select = lambda x, b: torch.where(b > 0, x, torch.zeros_like(x))  # noqa: E731
    return {n: replace(j, log_p=combine(select, j.log_p, bears[n])) if n in summed else j for n, j in sites.items()}


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
