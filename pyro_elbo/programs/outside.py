"""Find sites that depend on an enumerated site through a number, such as ``k.sum()`` for a k in a plate.

The values of k stand along a dimension of their own, and its rows along none: ``k.sum()`` adds up values where the
program means rows. Its result has no dimension of k, so that only the number shows the dependence: it changes when k
has one of its values alone.
"""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch

from pyro_elbo.assumptions import is_capturing
from pyro_elbo.errors import SiteError
from pyro_elbo.programs.enumeration import HeldDraws
from pyro_elbo.programs.sites import Site
from pyro_elbo.sequences import StackedDistribution

Sites = Mapping[str, Site]
_passed: Any = WeakValueDictionary()
"""The models that have been checked, by their identity and the names of the sites in question."""


def check_outside(model: Callable[..., Any], sites: Sites, run: Callable[[Callable[..., Any]], Sites]) -> None:
    """Raise SiteError where a site without a dimension of an enumerated site depends on it all the same.

    Only sites that come after the enumerated one can. Programs with such sites run again, once for each model.

    Args:
        model: the program.
        sites: those of one run, by name.
        run: runs the model, or the model under a handler, at the same draws of the guide.
    """
    order = list(sites)
    enumerated = [s for s in sites.values() if s.enum_dim is not None and not isinstance(s.fn, StackedDistribution)]
    above = {
        n: [k for k in enumerated if order.index(k.name) < i and _hides(s, k)]
        for i, (n, s) in enumerate(sites.items())
        if s.has_density
    }
    names = {n for n, found in above.items() if found}
    key = id(model), tuple(sorted(names))
    if not names or is_capturing() or _passed.get(key) is model:
        return
    ends = {i: {k.name: _one_value(k, i) for found in above.values() for k in found} for i in (0, -1)}
    whole, *single = (_run_alike(run, p) for p in (model, *(HeldDraws(values)(model) for values in ends.values())))
    for n in (n for n in order if n in names and any(_differ(whole[n], other[n]) for other in single)):
        k = above[n][0].name
        raise SiteError(
            f"Site '{n}' depends on '{k}' through a number such as {k}.sum(), which adds up the values that '{k}' has "
            f"side by side, and not its rows: all rows together have exponentially many values. Put '{n}' into the "
            f"plates of '{k}' and let it depend on '{k}' row by row, or draw '{k}' in the guide without a mark."
        )
    _passed[key] = model


def _hides(site: Site, k: Site) -> bool:
    """Return whether a site may depend on an enumerated one although it has no dimension of its values."""
    return not site.depends_on or (k.name not in site.depends_on and not set(k.plates) <= set(site.plates))


def _one_value(site: Site, index: int) -> torch.Tensor:
    assert site.enum_dim is not None
    dim = site.enum_dim - site.event_dim
    return site.value.narrow(dim, index % site.value.shape[dim], 1)


def _run_alike(run: Callable[[Callable[..., Any]], Sites], program: Callable[..., Any]) -> Sites:
    """Run a program with the random numbers that come next, and leave them as they are."""
    with torch.random.fork_rng(), torch.no_grad():
        return run(program)


def _differ(a: Site, b: Site) -> bool:
    x, y = a.log_prob(), b.log_prob()
    return x.numel() == y.numel() and not torch.allclose(x.sum(), y.sum(), rtol=1e-4, atol=1e-6, equal_nan=True)
