"""Write groups of an export to a NetCDF file, a few draws at a time, and open it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_elbo.files import whole_path
from pyro_elbo.posterior.datasets import SAMPLE_DIMS, Groups
from pyro_elbo.posterior.storage import SMALL, Storage

if TYPE_CHECKING:
    import xarray

ENGINE: Any = "h5netcdf"


def write_groups(groups: Groups, path: Path, storage: Storage) -> None:
    """Write groups whose large arrays lie in ``storage``: a reader sees the old file or the whole new one.

    Raises:
        OSError: the file cannot be written.
    """
    import h5netcdf

    if storage.error is not None:
        raise storage.error
    with whole_path(path) as temporary:
        for i, (name, dataset) in enumerate(groups.items()):
            large = [n for n, x in dataset.data_vars.items() if _is_large(x)]
            dataset.drop_vars(large).to_netcdf(temporary, "a" if i else "w", group=name, engine=ENGINE)
            with h5netcdf.File(temporary, "a") as file:
                for variable in large:
                    _write(file[name], str(variable), dataset[variable], storage)


def open_groups(path: Path, major: int) -> Any:
    """Open a file for ArviZ's major version; what is used of it is read then."""
    import arviz
    import xarray

    return arviz.from_netcdf(str(path)) if major == 0 else xarray.open_datatree(path, engine=ENGINE)


def _is_large(x: "xarray.DataArray") -> bool:
    return x.nbytes >= SMALL and x.dtype.kind in "fiu" and x.dims[:2] == SAMPLE_DIMS


def _write(group: Any, name: str, x: "xarray.DataArray", storage: Storage) -> None:
    fill = {"fillvalue": x.dtype.type(np.nan)} if x.dtype.kind == "f" else {}  # as xarray writes it
    place = group.create_variable(name, x.dims, x.dtype, **fill)
    place.attrs.update(x.attrs)
    draws = x.shape[1]
    size = max(1, SMALL * draws // x.nbytes)
    for i in range(0, draws, size):
        place[:, i : i + size] = x.values[:, i : i + size]
        storage.forget()
