"""Training data: datasets of rows, and a loader for each split and process."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from pyro_elbo.errors import DataError
from pyro_elbo.programs import Program, as_tensors, check_arguments, named_columns, seeded

Batch = Tensor | tuple | list | dict


class RowDataset(Dataset):
    """A dataset of tensors of the same length, indexed by batches. Numbers are part of every batch."""

    def __init__(self, data: Tensor | tuple | Mapping[str, Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return num_rows(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Any:
        """Return the rows of a batch in the same container as the data."""
        if len(indices) == len(self) and indices == list(range(len(self))):
            return self.data
        return _map(_rows(indices), self.data)


def _map(function: Callable[[Any], Any], data: Any) -> Any:
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, Mapping):
        return {name: function(x) for name, x in data.items()}
    return tuple(function(x) for x in data)


def _has_rows(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0


def num_rows(batch: Any) -> int:
    """Return the number of rows of a batch, those of its first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else (batch,) if isinstance(batch, Tensor) else batch
    return next((len(x) for x in values if _has_rows(x)), 1)


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
        return _map(_rows(indices), self.args), _map(_rows(indices), self.kwargs)

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
    return lambda x: x[list(indices)] if _has_rows(x) else x


def _loader(dataset: Dataset, batch_size: int, shuffle: bool, seed: int, rank: int, world: int) -> DataLoader:
    """Return a loader whose order depends only on the seed and the epoch (Lightning tells the sampler the epoch)."""
    sampler = DistributedSampler(dataset, num_replicas=world, rank=rank, shuffle=shuffle, seed=seed)
    collate = _identity if isinstance(dataset, RowDataset) else None
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=collate)


def _identity(batch: Any) -> Any:
    return batch


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
        loader = self._pass(split, rank, world)
        return _Passes(loader, self.passes) if split == "train" and self.passes > 1 else loader

    def _pass(self, split: str, rank: int, world: int) -> Any:
        data = self.train if split == "train" else self.valid
        if data is None or isinstance(data, DataLoader):
            return data if data is not None else []
        size = len(data) if self.batch_size is None else self.batch_size
        return _loader(data, size, split == "train" and size < len(data), self.seed, rank, world)

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
        if isinstance(loader.dataset, torch.utils.data.IterableDataset):
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


class _Passes:
    """Several passes over the batches of a loader, each in its own order, as one epoch."""

    def __init__(self, loader: DataLoader, count: int) -> None:
        self.loader, self.count, self.epoch = loader, count, 0
        self.sampler = self  # Lightning tells the sampler the epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the orders of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count * len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for i in range(self.count):
            if isinstance(self.loader.sampler, DistributedSampler):
                self.loader.sampler.set_epoch(self.count * self.epoch + i)
            yield from self.loader


class _Whole(DataLoader):
    """A loader of one batch with all rows of a dataset."""

    def __init__(self, dataset: Any) -> None:
        collate = _identity if isinstance(dataset, RowDataset) else None
        super().__init__(dataset, batch_size=len(dataset), collate_fn=collate)


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


def _as_dataset(split: str, data: Any) -> Any:
    if data is None and split == "valid":
        return None
    data = as_tensors(data)
    if isinstance(data, bool | int | float):
        data = (data,)
    if not isinstance(data, Tensor | tuple | list | Mapping):
        try:
            rows = _length(data.dataset if isinstance(data, DataLoader) else None if isinstance(data, str) else data)
        except TypeError as error:
            raise DataError(
                f"{split}: expected tensors, arrays, a DataFrame, a Dataset or a DataLoader of known length, got "
                f"{type(data).__name__}."
            ) from error
        if rows == 0:
            raise DataError(f"{split}: the loader yields nothing; expected at least one batch.")
        return data
    named = data if isinstance(data, Mapping) else dict(enumerate((data,) if isinstance(data, Tensor) else data))
    lengths = {name: len(x) for name, x in named.items() if _has_rows(x)}
    if not named or len(set(lengths.values())) > 1 or not all(map(_is_argument, named.values())):
        found = {name: len(x) if _has_rows(x) else type(x).__name__ for name, x in named.items()}
        raise DataError(
            f"{split}: expected tensors or arrays with the same number of rows, got {found}. Convert lists by "
            "torch.tensor, and give every argument one row per datum."
        )
    if 0 in lengths.values():
        raise DataError(f"{split}: the data have no rows.")
    return RowDataset(tuple(data) if isinstance(data, list) else data)


def _is_argument(x: Any) -> bool:
    return isinstance(x, Tensor | bool | int | float | complex | str | None)


def _length(data: Any) -> int:
    return len(data)
