"""Training data: datasets of rows, and a loader for each split and process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from pyro_elbo.errors import DataError
from pyro_elbo.programs import Program, as_tensors, check_arguments, check_dense, named_columns, seeded
from pyro_elbo.training.rows import (
    Epochs,
    RowDataset,
    Shares,
    StoredRows,
    check_no_list,
    fingerprint,
    has_rows,
    is_stored,
    map_parts,
    num_rows,
)

Batch = Tensor | tuple | list | dict


def arguments(batch: Any) -> tuple[tuple, dict[str, Any]]:
    """Return a batch as positional and keyword arguments of the programs."""
    batch = as_tensors(batch)
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,), {}


class RunArguments(NamedTuple):
    """Training data as arguments of the programs.

    Attributes:
        rows: the rows of a training batch.
        whole: False for a single batch of a Dataset or DataLoader.
    """

    args: tuple
    kwargs: dict[str, Any]
    rows: int
    whole: bool

    def take(self, indices: Sequence[int]) -> tuple[tuple, dict[str, Any]]:
        """Return some rows."""
        return map_parts(_rows(indices), self.args), map_parts(_rows(indices), self.kwargs)

    def spread(self, count: int) -> tuple[tuple, dict[str, Any]]:
        """Return so many rows, spread evenly over the data."""
        total = num_rows((*self.args, *self.kwargs.values()))
        return self.take([i * total // count for i in range(count)])

    def batch(self) -> tuple[tuple, dict[str, Any]]:
        """Return as many rows as a training batch has."""
        return self.take(range(self.rows))

    def is_plain(self) -> bool:
        """Return whether a file can hold the data without code: tensors, numbers and strings."""
        return all(_is_argument(x) for x in (*self.args, *self.kwargs.values()))


def _rows(indices: Sequence[int]) -> Callable[[Any], Any]:
    return lambda x: x[list(indices)] if has_rows(x) else x


def _identity(batch: Any) -> Any:
    return batch


def _collate(dataset: Any) -> Callable[[Any], Any] | None:
    return _identity if isinstance(dataset, RowDataset | StoredRows) else None


@dataclass(frozen=True)
class Loaders:
    """The data of both splits, and a loader of them for each process; an epoch may be several passes over them."""

    train: Any
    valid: Any
    batch_size: int | None
    seed: int
    passes: int = 1

    def __call__(self, split: str, rank: int = 0, world: int = 1) -> Any:
        """Return the loader of a split, or an empty list if the split has no data."""
        data = self.train if split == "train" else self.valid
        passes = self.passes if split == "train" else 1
        if data is None:
            return []
        if isinstance(data, DataLoader):
            return data if split == "valid" or world > 1 else Epochs(data, passes)
        size = len(data) if self.batch_size is None else self.batch_size
        if isinstance(data, IterableDataset):
            return Epochs(DataLoader(data, batch_size=size), passes)
        shares = Shares(len(data), size, split == "train" and size < len(data), self.seed, rank, world)
        return Epochs(DataLoader(data, batch_sampler=shares, collate_fn=_collate(data)), passes)

    def steps(self, world: int) -> int:
        """Return the batches that each of so many processes sees in a pass over the training data."""
        if isinstance(self.train, DataLoader):
            return -(-len(self.train) // world)
        return len(replace(self, passes=1)("train", 0, world))

    def check_processes(self, world: int) -> None:
        """Raise DataError for data that so many processes cannot share."""
        for split, data in (("train", self.train), ("valid", self.valid)):
            rows = data.dataset if isinstance(data, DataLoader) else data
            if world > 1 and isinstance(rows, IterableDataset):
                raise DataError(
                    f"{split}: an IterableDataset gives every one of {world} processes the same rows. Use devices=1, "
                    "or data with an index, such as a np.memmap or a Dataset with __getitem__."
                )
            if data is not None and _length(rows) < world:
                raise DataError(f"{split}: {_length(rows)} rows for {world} processes: each needs one at least.")

    def check_passed(self, rows: int) -> None:
        """Raise DataError for an IterableDataset that has yielded another number of rows in an epoch than it states."""
        loader = self.train if isinstance(self.train, DataLoader) else None
        data: Any = self.train if loader is None else loader.dataset
        if not isinstance(data, IterableDataset) or (loader is not None and loader.batch_size is None):
            return
        stated = _length(data) * self.passes
        dropped = loader.batch_size - 1 if loader is not None and loader.drop_last and loader.batch_size else 0
        if not stated - dropped * self.passes <= rows <= stated:
            raise DataError(
                f"train: the {type(data).__name__} states {stated} rows an epoch and has yielded {rows}, so that every "
                "batch was scaled to the wrong number. Let __len__ return the number of rows that __iter__ yields; of "
                "several workers, let each yield its part."
            )

    def identity(self) -> dict[str, str]:
        """Return what a resumed run must share with the first, by the name of the argument."""
        size = self.train.batch_size if isinstance(self.train, DataLoader) else self.batch_size
        splits = {"train": self.train, "valid": self.valid}
        return {"seed": str(self.seed), "batch_size": str(size)} | {n: fingerprint(x) for n, x in splits.items()}

    def as_arguments(self, first: Any) -> RunArguments:
        """Return the training data as arguments of the programs; ``first`` is a batch of them."""
        whole = isinstance(self.train, RowDataset)
        return RunArguments(*arguments(self.train.data if whole else first), num_rows(as_tensors(first)), whole)

    def row_counts(self) -> Sequence[int]:
        """Return the sizes that a plate of the training data may declare, the most accurate first.

        A DataLoader that drops its last batch covers the rows of its sampler and yields fewer per epoch. One that
        draws with replacement also covers its dataset. Rows of other batch samplers are counted.
        """
        if not isinstance(self.train, DataLoader):
            return (len(self.train),)
        loader: DataLoader[Any] = self.train
        if loader.batch_size is None:
            return (sum(num_rows(as_tensors(batch)) for batch in loader),)
        if isinstance(loader.dataset, IterableDataset):
            return (_length(loader.dataset),)
        drawn = _length(loader.sampler)
        counts = [drawn]
        if loader.drop_last:
            counts.append(min(drawn, len(loader) * loader.batch_size))
        if getattr(loader.sampler, "replacement", False):
            counts.append(_length(loader.dataset))
        return counts

    def with_whole_validation(self) -> "Loaders":
        """Return loaders that yield all rows of the validation data as one batch.

        Raises:
            DataError: the batches of a DataLoader cannot be joined.
        """
        if not isinstance(self.valid, DataLoader):
            return replace(self, valid=_Whole(self.valid))
        batches = [as_tensors(batch) for batch in self.valid]
        try:
            return replace(self, valid=_Whole(RowDataset(_join(batches))))
        except (RuntimeError, TypeError) as error:
            raise DataError(
                f"valid: the model has latents that all rows share, so its bound needs all rows at once, but the "
                f"batches of the DataLoader cannot be joined: {error}. Pass tensors, or one batch with all rows."
            ) from error


class _Whole(DataLoader):
    """A loader of one batch with all rows of a dataset."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset, batch_size=len(dataset), collate_fn=_collate(dataset))


def _join(batches: list[Any]) -> Any:
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(batches)
    if isinstance(first, Mapping):
        return {name: _join([batch[name] for batch in batches]) for name in first}
    if isinstance(first, tuple | list):
        return tuple(_join(list(parts)) for parts in zip(*batches, strict=True))
    return first


def prepare_data(
    train: Any, valid: Any, batch_size: int | None, seed: int, model: Program, guide: Program
) -> tuple[Loaders, dict[str, list[Any]]]:
    """Check the data of both splits; return their loaders and the first two batches of each."""
    data = {split: _as_dataset(split, named_columns(x, model)) for split, x in (("train", train), ("valid", valid))}
    loaders = Loaders(data["train"], data["valid"], batch_size, seed)
    first: dict[str, list[Any]] = {}
    for split in (split for split, x in data.items() if x is not None):
        with seeded(seed):
            first[split] = list(islice(loaders(split), 2))
        if not first[split]:
            raise DataError(f"{split}: the loader yields nothing; expected at least one batch.")
        cure = "Pass a tensor for one argument, a tuple for several, or a dict for keyword arguments. "
        check_arguments(f"{split}: a batch", {"model": model, "guide": guide}, *arguments(first[split][0]), cure)
    return loaders, first


def _as_dataset(split: str, given: Any) -> Any:
    if given is None and split == "valid":
        return None
    check_no_list(split, given)
    data: Any = map_parts(lambda x: x if is_stored(x) else as_tensors(x), given)
    data = (data,) if isinstance(data, bool | int | float) or is_stored(data) else data
    if not isinstance(data, Tensor | tuple | list | Mapping):
        try:
            held = data.dataset if isinstance(data, DataLoader) else data
            rows = _length(held if hasattr(held, "__getitem__") and not isinstance(held, str) else None)
        except TypeError as error:
            raise DataError(
                f"{split}: expected tensors, arrays, a DataFrame, a Dataset or a DataLoader of known length, got "
                f"{type(data).__name__}."
            ) from error
        if rows == 0:
            raise DataError(f"{split}: the loader yields nothing; expected at least one batch.")
        return data
    for x in pytree.tree_leaves(data):
        if isinstance(x, Tensor):
            check_dense(split, x)
    named = data if isinstance(data, Mapping) else dict(enumerate((data,) if isinstance(data, Tensor) else data))
    lengths = {name: len(x) for name, x in named.items() if has_rows(x)}
    if not named or len(set(lengths.values())) > 1 or not all(map(_is_argument, named.values())):
        found = {name: len(x) if has_rows(x) else type(x).__name__ for name, x in named.items()}
        raise DataError(
            f"{split}: expected tensors or arrays with the same number of rows, got {found}. Convert lists by "
            "torch.tensor, and give every argument one row per datum."
        )
    if 0 in lengths.values():
        raise DataError(f"{split}: the data have no rows.")
    kind = StoredRows if any(map(is_stored, named.values())) else RowDataset
    return kind(tuple(data) if isinstance(data, list) else data)


def _is_argument(x: Any) -> bool:
    return isinstance(x, Tensor | bool | int | float | complex | str | None) or is_stored(x)


def _length(data: Any) -> int:
    return len(data)
