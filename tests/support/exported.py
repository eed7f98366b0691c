"""Read exports and leave-one-out results in the same way on ArviZ 0.x and 1.x."""

from typing import Any

import xarray


def group_names(data: Any) -> set[str]:
    """Return the names of the groups of an InferenceData or a DataTree."""
    return set(data.children) if isinstance(data, xarray.DataTree) else set(data.groups())


def elpd(result: Any) -> float:
    """Return the expected log predictive density of ``az.loo``."""
    return float(result["elpd_loo"] if "elpd_loo" in getattr(result, "index", ()) else result.elpd)


def group_dataset(data: Any, group: str) -> xarray.Dataset:
    """Return a group as a Dataset."""
    return data[group].to_dataset() if isinstance(data, xarray.DataTree) else data[group]
