"""Turn arrays of draws into xarray Datasets: dimensions named after plates, time and events, rows labeled."""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from pyro_elbo.errors import ArgumentError
from pyro_elbo.posterior.draws import Arrays, Draws
from pyro_elbo.posterior.storage import MEMORY, Storage
from pyro_elbo.programs import Plate, Program, as_array

if TYPE_CHECKING:
    import xarray

Groups = dict[str, "xarray.Dataset"]
Plates = Mapping[str, tuple[Plate, ...]]

SAMPLE_DIMS = ("chain", "draw")


class Names(NamedTuple):
    """Names to avoid and to use for dimensions.

    Attributes:
        taken: names of all variables, which no dimension may have.
        given: the user's names of event dimensions, by variable.
        times: the name of the dimension of time, by variable.
    """

    taken: set[str]
    given: Mapping[str, Sequence[str]]
    times: Mapping[str, str]


def names_in(group: str, names: Names, drawn: Draws) -> Names:
    """Return the names of event dimensions in a group.

    Densities have neither event nor time. An event of another shape on the real line has dimensions of its own.
    """
    if group in ("log_prior", "log_likelihood"):
        return names._replace(given={}, times={})
    if group != "unconstrained_posterior":
        return names
    reshaped = {n: x for n, x in drawn.unconstrained.items() if x.shape != drawn.latents[n].shape}
    own = {
        n: [f"{n}_unconstrained_dim_{i}" for i in range(x.dim() - 1 - len(drawn.plates[n]) - (n in names.times))]
        for n, x in reshaped.items()
    }
    return names._replace(given={**names.given, **own})


def stack_chains(parts: list[tuple[Arrays, Plates]], names: Names, storage: Storage = MEMORY) -> "xarray.Dataset":
    """Stack the arrays of all chains into one Dataset."""
    import xarray

    variables = {}
    for name in list(parts[0][0]):
        arrays = [part[name] for part, _ in parts]
        values = arrays[0][None] if len(arrays) == 1 else storage.join((x[None] for x in arrays), len(arrays))
        dims, shape = _dims(name, values.shape[2:], parts[0][1].get(name, ()), names)
        variables[name] = (SAMPLE_DIMS + dims, as_array(values.reshape((*values.shape[:2], *shape))))
    return xarray.Dataset(variables)


def _dims(
    name: str, shape: Sequence[int], plates: tuple[Plate, ...], names: Names
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Name dimensions after the plates, then ``<site>_dim_i``; return names and shape.

    A deterministic counts its plates, and the gaps between them, as event: dimensions on the left with the sizes of
    the plates are taken for the plates. xarray drops a variable that shares the name of its dimension: a plate named
    like a variable gets the suffix ``_dim``.
    """
    sizes = {p.dim: p.size for p in plates}
    batch = [sizes.get(d, 1) for d in range(min(sizes, default=0), 0)]
    if len(shape) > len(plates) and list(shape[: len(batch)]) == batch:
        shape = [p.size for p in plates] + list(shape[len(batch) :])
    if list(shape[: len(plates)]) != [p.size for p in plates]:
        plates = ()
    named = [f"{p.name}_dim" if p.name in names.taken or p.name in SAMPLE_DIMS else p.name for p in plates]
    if name in names.times and len(shape) > len(named):
        named.append(names.times[name])
    event = list(names.given.get(name, [f"{name}_dim_{i}" for i in range(len(shape) - len(named))]))
    if len(named) + len(event) != len(shape):
        raise ArgumentError(
            f"dims['{name}']: expected {len(shape) - len(named)} names of event dimensions, got {event}."
        )
    return (*named, *event), tuple(shape)


def data_groups(drawn: Draws, model: Program, args: tuple, kwargs: Mapping[str, Any], names: Names) -> Groups:
    """Return the groups of observed data and of the model's other tensors."""
    import xarray

    def variable(name: str, x: Tensor, plates: tuple[Plate, ...]) -> tuple[tuple[str, ...], Any]:
        dims, shape = _dims(name, x.shape, plates, names._replace(taken=names.taken | {name}))
        return dims, as_array(x.reshape(shape))

    constants = {}
    every = {p for stack in drawn.plates.values() for p in stack}
    for name, x in _tensors(model, args, kwargs).items():
        if not any(_same_values(x, o) for o in drawn.observed.values()):
            rows = [p for p in every if x.dim() and p.size == x.shape[0]]
            dims, values = variable(name, x, tuple(rows) if len({p.name for p in rows}) == 1 else ())
            # an argument named like a site need not have its shape
            constants[name] = tuple(d.replace(f"{name}_dim_", f"{name}_data_dim_") for d in dims), values
    constants |= {n: variable(n, x, drawn.plates[n]) for n, x in drawn.constants.items()}
    observed = {n: variable(n, x, drawn.plates[n]) for n, x in drawn.observed.items()}
    return {"observed_data": xarray.Dataset(observed), "constant_data": xarray.Dataset(constants)}


def mark_masked(groups: Groups, drawn: Draws) -> Groups:
    """Say in a coordinate of the log likelihood which data a mask leaves out."""
    if not drawn.counted:
        return groups
    likelihood = groups["log_likelihood"]
    marks = {f"{n}_counted": (likelihood[n].dims[2:], as_array(x)) for n, x in drawn.counted.items()}
    return groups | {"log_likelihood": likelihood.assign_coords(marks)}


def _same_values(x: Tensor, observed: Tensor) -> bool:
    """Return whether an argument holds the values that a site observes, NaN aside."""
    return x.shape == observed.shape and bool(((x == observed) | x.isnan()).all())


def _tensors(model: Program, args: tuple, kwargs: Mapping[str, Any]) -> Arrays:
    """Return the model's tensor arguments by the names of its signature."""
    signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    bound = signature.bind(*args, **kwargs).arguments
    return {name: x for name, x in bound.items() if isinstance(x, Tensor)}


def row_labels(drawn: Draws, model: Program, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the rows of the full data in each plate that takes a part of them, by its name.

    A program that gets a minibatch as its argument does not tell which rows these are.
    """
    arguments = list(_tensors(model, args, kwargs).values())
    given = {
        p.name
        for name, x in drawn.observed.items()
        if any(_same_values(argument, x) for argument in arguments)
        for p in drawn.plates[name]
    }
    return {name: rows.tolist() for name, rows in drawn.rows.items() if name not in given}


def label(groups: Groups, coords: Mapping[str, Sequence[Any]], rows: Mapping[str, list[int]]) -> Groups:
    """Give each dimension its labels: the user's, the rows of the full data, or numbers from 0."""
    sizes = {name: size for ds in groups.values() for name, size in ds.sizes.items()}
    for name, values in coords.items():
        if len(values) != sizes.get(name):
            raise ArgumentError(
                f"coords['{name}']: got {len(values)} labels, expected "
                f"{sizes[name] if name in sizes else f'one of the dimensions {sorted(map(str, sizes))}'}."
            )
    labels: dict[Any, list[Any]] = {}
    for name, size in sizes.items():
        seen = rows.get(str(name).removesuffix("_dim"), ())
        labels[name] = list(coords.get(str(name), seen if len(seen) == size else range(size)))
    return {group: ds.assign_coords({n: labels[n] for n in ds.sizes}) for group, ds in groups.items()}


def without_slashes(groups: Groups) -> Groups:
    """Write "." for "/" in names, which files and DataTrees keep for their groups."""
    names = {str(n) for ds in groups.values() for n in (*ds.variables, *ds.dims)}
    renamed: dict[str, str] = {}
    for name in sorted(n for n in names if "/" in n):
        new = name.replace("/", ".")
        while new in names:
            new += "_"
        names.add(new)
        renamed[name] = new
    return {
        group: ds.rename({n: renamed[str(n)] for n in dict.fromkeys((*ds.variables, *ds.dims)) if n in renamed})
        for group, ds in groups.items()
    }
