"""Turn the messages of a Pyro trace into sites.

No other module looks inside the messages of a whole program's trace.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pyro import poutine
from pyro.distributions import Unit

from pyro_elbo.errors import SiteError
from pyro_elbo.masking import unmask
from pyro_elbo.programs.checks import check_batch_shape
from pyro_elbo.programs.data import observed_tensor
from pyro_elbo.programs.explain import PARTICLE_PLATE
from pyro_elbo.programs.sites import Plate, Site, SiteRole
from pyro_elbo.sequences import fill_masked


def is_subsample(message: Any) -> bool:
    """Return whether a message is a plate's choice of rows."""
    return type(message.get("fn")).__name__ == "_Subsample"


def read_sites(trace: poutine.Trace, default: SiteRole, model: Mapping[str, Site] | None = None) -> Iterator[Site]:
    """Yield a site per sample statement, in program order.

    Args:
        trace: one run of a program.
        default: the role of sites that nothing else decides.
        model: the sites of the model if ``trace`` is a guide's: what they share is ``latent``.

    Raises:
        SiteError: a batch dimension lies in no plate, or the guide samples what is neither in the model nor auxiliary.
    """
    nodes: dict[str, Any] = dict(trace.nodes)
    for name, message in nodes.items():
        if message["type"] == "sample" and not is_subsample(message):
            yield _read_site(name, message, default, model)


def _read_site(name: str, message: Any, default: SiteRole, model: Mapping[str, Site] | None) -> Site:
    fn, mask = unmask(message["fn"], message["mask"])
    value = message["value"]
    if message["is_observed"]:
        value = fill_masked(fn, observed_tensor(value), mask)
    frames = [f for f in message["cond_indep_stack"] if f.dim is not None]
    plates = tuple(
        Plate(f.name, f.dim, int(f.size), int(f.full_size or f.size)) for f in frames if f.name != PARTICLE_PLATE
    )
    role = default
    if message["infer"].get("_deterministic"):
        role = "deterministic"
    elif model is not None:
        role = "latent" if name in model else "auxiliary"
    elif isinstance(fn, Unit):
        role = "factor"
    elif message["is_observed"]:
        role = "observed"
    site = Site(name, role, fn, value, plates, message["scale"], mask)
    if role == "auxiliary" and not (message["infer"].get("is_auxiliary") or message["is_observed"]):
        raise SiteError(
            f"Site '{name}' is in the guide but not in the model. Sample it in the model too, or, if it is an "
            "auxiliary variable of the guide, mark it with infer={'is_auxiliary': True}."
        )
    check_batch_shape(site, {f.dim: f.size for f in frames})
    return site
