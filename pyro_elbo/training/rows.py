"""Rows of data: tensors in memory, arrays on the disk that are read batch by batch, and who reads which of them."""

import hashlib
import mmap
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from pyro_elbo.errors import DataError
from pyro_elbo.programs import as_tensors, is_xarray

MOST = 4096  # rows that a checksum covers


class _Rows(Dataset):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return num_rows(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    @abstractmethod
    def __getitems__(self, indices: list[int]) -> Any:
        """Return the rows of a batch in the same container as the data."""


class RowDataset(_Rows):
    """A dataset of tensors of the same length, indexed by batches. Numbers are part of every batch."""

    def __getitems__(self, indices: list[int]) -> Any:
        """Return the rows of a batch in the same container as the data."""
        if len(indices) == len(self) and indices == list(range(len(self))):
            return self.data
        return map_parts(lambda x: x[indices] if has_rows(x) else x, self.data)


class StoredRows(_Rows):
    """A dataset whose arrays are on the disk: NumPy's memory maps, and arrays of xarray. A batch becomes tensors."""

    def __getitems__(self, indices: list[int]) -> Any:
        """Read the rows of a batch."""
        return as_tensors(map_parts(lambda x: _read(x, indices), self.data))


def map_parts(function: Callable[[Any], Any], data: Any) -> Any:
    """Apply a function to each part of a batch, in its container."""
    if isinstance(data, Mapping):
        return {name: function(x) for name, x in data.items()}
    return tuple(function(x) for x in data) if isinstance(data, tuple | list) else function(data)


def check_no_list(what: str, data: Any) -> None:
    """Raise DataError for a list of numbers or of lists, whose rows would pass for arguments."""
    if isinstance(data, list) and data and all(isinstance(x, Number | list) for x in data):
        raise DataError(
            f"{what}: expected a tensor or an array, got a list of {len(data)} rows. Pass torch.tensor(list)."
        )


def has_rows(x: Any) -> bool:
    """Return whether the first dimension of a part of a batch holds its rows; numbers have none."""
    return isinstance(x, Tensor) and x.dim() > 0 and x.layout is torch.strided or is_stored(x)


def is_stored(x: Any) -> bool:
    """Return True for an array that is read batch by batch."""
    return isinstance(x, np.memmap) and x.ndim > 0 or is_xarray(x, "DataArray") and x.ndim > 0


def num_rows(batch: Any) -> int:
    """Return the number of rows of a batch, those of its first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else (batch,)
    return next((len(x) for x in values if has_rows(x)), 1)


def _read(x: Any, indices: list[int]) -> Any:
    if is_xarray(x, "DataArray"):
        return x.isel({x.dims[0]: indices}).to_numpy()
    if not isinstance(x, np.memmap):
        return x[indices] if has_rows(x) else x
    rows = np.array(x[indices])
    _forget(x)
    return rows


def _forget(x: np.memmap) -> None:
    """Give the pages of a mapped file back, which otherwise stay in memory as far as they have been read."""
    source: Any = x
    while source is not None and not isinstance(source, mmap.mmap):
        source = getattr(source, "base", None)
    if source is not None and x.mode != "c" and hasattr(mmap, "MADV_DONTNEED"):  # "c" would lose what was written
        source.madvise(mmap.MADV_DONTNEED)


def fingerprint(data: Any) -> str:
    """Describe data by the number of rows and a checksum of at most 4096 of them; a user's dataset may vary them."""
    data = data.dataset if isinstance(data, DataLoader) else data
    if data is None:
        return "no data"
    count = len(data)
    if not isinstance(data, RowDataset | StoredRows):
        return f"{count} rows"
    found = hashlib.sha256()
    batch = data.__getitems__([i * count // min(count, MOST) for i in range(min(count, MOST))])
    named = batch if isinstance(batch, Mapping) else dict(enumerate(batch if isinstance(batch, tuple) else (batch,)))
    for name, x in named.items():
        found.update(repr((name, x.dtype, tuple(x.shape)) if isinstance(x, Tensor) else (name, x)).encode())
        if isinstance(x, Tensor):
            found.update(_bytes(x))
    return f"{count} rows with checksum {found.hexdigest()[:12]}"


def checksum(x: Tensor) -> str:
    """Describe the numbers of a tensor."""
    return f"checksum {hashlib.sha256(_bytes(x)).hexdigest()[:12]}"


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


class Shares(Sampler[list[int]]):
    """The batches of one of several processes: every row once in an epoch, and as many batches for each of them.

    One process with batches ``world`` times as large would see in batch k the rows that all see in theirs. A remainder
    of fewer rows than processes joins the last batch.

    Args:
        rows: the number of rows of all processes.
        size: rows per batch of one process.
        shuffle: draw the order anew in each epoch, from the seed and the epoch.
        seed: as above.
        rank, world: the number of this process, and of all.
    """

    def __init__(self, rows: int, size: int, shuffle: bool, seed: int, rank: int = 0, world: int = 1) -> None:
        self.rows, self.size, self.shuffle, self.seed = rows, size, shuffle, seed
        self.rank, self.world, self.epoch, self.first = rank, world, 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-(self.rows // self.world) // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.rows, generator=generator) if self.shuffle else torch.arange(self.rows)
        own, last = order[self.rank :: self.world], len(self) - 1
        for i in range(self.first, len(self)):
            yield own[i * self.size : None if i == last else (i + 1) * self.size].tolist()


class Epochs:
    """A loader whose order depends on the epoch alone; an epoch is one pass over its batches or several.

    Its state is the number of batches that it has given: a resumed run goes on with the next one.
    """

    def __init__(self, loader: DataLoader, passes: int = 1) -> None:
        self.loader, self.passes, self.epoch = loader, passes, 0
        self.given = self.skipped = 0
        self.sampler = self.batch_sampler = self  # Lightning tells the sampler the epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the orders of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.passes * len(self.loader)

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of the epoch are given."""
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration after so many batches; at the end of an epoch, with the first one of the next."""
        self.skipped = state["given"] % len(self)

    def __iter__(self) -> Iterator[Any]:
        self.given, self.skipped = self.skipped, 0
        first, start = divmod(self.given, len(self.loader))
        for i in range(first, self.passes):
            for sampler in (self.loader.batch_sampler, self.loader.sampler):
                if isinstance(sampler, Shares | DistributedSampler):
                    sampler.set_epoch(self.passes * self.epoch + i)
            for batch in self._after(start):
                self.given += 1
                yield batch
            start = 0

    def _after(self, start: int) -> Iterator[Any]:
        """Give the batches of a pass but for the first ones, without reading those of rows."""
        if not isinstance(self.loader.batch_sampler, Shares):
            return islice(self.loader, start, None)
        self.loader.batch_sampler.first = start
        return iter(self.loader)
