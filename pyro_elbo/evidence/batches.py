"""Split the rows of the programs' arguments."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_elbo.errors import ArgumentError, SiteError, check_count
from pyro_elbo.programs import Plate

Arguments = tuple[tuple[Any, ...], dict[str, Any], int | None]


def row_batches(args: tuple, kwargs: Mapping[str, Any], batch_size: int | None) -> Iterator[Arguments]:
    """Yield the arguments with ``batch_size`` rows at a time, and the number of rows; all at once, and None, for None.

    Every tensor whose first dimension is as long as that of the first tensor is taken for rows.

    Raises:
        ArgumentError: the batch size is no positive number, or no argument has rows.
    """
    if batch_size is None:
        yield args, dict(kwargs), None
        return
    check_count("batch_size", batch_size)
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    sizes = [len(x) for x in leaves if isinstance(x, Tensor) and x.dim()]
    if not sizes:
        raise ArgumentError("batch_size splits the rows of tensors, but no argument is one. Leave batch_size out.")
    for start in range(0, sizes[0], batch_size):
        rows = slice(start, start + batch_size)
        part = [x[rows] if isinstance(x, Tensor) and x.dim() and len(x) == sizes[0] else x for x in leaves]
        some_args, some_kwargs = pytree.tree_unflatten(part, spec)
        yield some_args, some_kwargs, min(batch_size, sizes[0] - start)


def check_rows(plate: Plate | None, local: bool, expected: int | None) -> None:
    """Raise SiteError unless the plate takes all of its rows, and those of the batch.

    Raises:
        SiteError: rows are subsampled; or latents or the plate do not follow the rows of a batch.
    """
    if plate is not None and plate.size < plate.full_size:
        raise SiteError(
            f"Plate '{plate.name}' took {plate.size} of its {plate.full_size} rows: log p(x) needs all of them. Give "
            "the plate the size of the data, without subsample_size; batch_size=... bounds the memory instead."
        )
    if expected is None:
        return
    if plate is None or not local:
        raise SiteError(
            "batch_size splits the rows of the data, but the model has no data plate around all of its latents, so "
            "that rows have no evidence of their own. Leave batch_size out."
        )
    if plate.size != expected:
        raise SiteError(
            f"Plate '{plate.name}' has {plate.size} rows for a batch of {expected}. Give the plate the length of the "
            "data, len(x), or leave batch_size out."
        )
