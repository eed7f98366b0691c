"""Terms -> labeled arrays."""

from typing import TYPE_CHECKING

from torch import Tensor

from pyro_elbo.errors import check_flag
from pyro_elbo.programs import as_array

if TYPE_CHECKING:
    import xarray

    from pyro_elbo.terms.terms import Terms

TOTALS = ("elbo", "objective", "rate", "distortion")


def to_dataset(terms: "Terms", per_datum: bool) -> "xarray.Dataset":
    """Label all terms by site, plate and dimension: see :meth:`Terms.to_dataset`."""
    import xarray

    check_flag("per_datum", per_datum)
    view, units = (terms.per_datum, "nats per datum") if per_datum else (terms, "nats")
    totals = {name: ((), getattr(view, name), units) for name in TOTALS}
    sites = {
        f"{group}_{name}": (_dims(terms, name, values), values, "nats")
        for group in ("log_likelihood", "kl", "kl_per_dim")
        for name, values in getattr(terms, group).items()
    }
    variables = {name: (dims, as_array(x), {"units": unit}) for name, (dims, x, unit) in (totals | sites).items()}
    coords = {"penalty_name": list(terms.penalties)} if terms.penalties else {}
    if terms.penalties:
        values = [p.nats.item() for p in terms.penalties.values()]
        variables["penalty"] = (("penalty_name",), values, {"units": "nats per datum"})
    points = {"point_estimates": list(terms.point_estimates)} if terms.point_estimates else {}
    return xarray.Dataset(variables, coords, attrs={"num_data": terms.num_data, "totals": units} | points)


def _dims(terms: "Terms", name: str, values: Tensor) -> tuple[str, ...]:
    """The dimensions of a site's array: its plates, then those of the event."""
    plates = tuple(p.name for p in terms.plates[name])
    return plates + tuple(f"{name}_dim_{i}" for i in range(values.dim() - len(plates)))
