"""Where the arrays of many draws lie: in memory, or on the disk, from where memory maps what is read or written."""

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

SMALL = 2**20  # bytes that are kept in memory in any case
FEW = 16  # draws


class Storage:
    """Makes arrays in memory, or each in a file without a name, which vanishes with its array.

    Args:
        folder: the folder of the files; None for memory.

    Attributes:
        error: why the disk had no room for an array, for those who come after a caller that bears any error.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.error: OSError | None = None
        self._maps: WeakSet[mmap.mmap] = WeakSet()

    def empty(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Make an array with the dtype of another one.

        Raises:
            OSError: the disk has no room for it.
        """
        size = math.prod(shape) * like.element_size()
        if self.folder is None or size < SMALL:
            return like.new_empty(shape)
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a map of a file without room would kill the process
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            self.error = error
            raise
        self._maps.add(mapped)
        return torch.frombuffer(mapped, dtype=like.dtype).view(shape)

    def join(self, parts: Iterable[Any], count: int) -> Any:
        """Put parts, nested dictionaries of arrays of some draws, into arrays of all ``count`` draws, one at a time.

        Returns:
            None where there is no part.
        """
        whole: list[Tensor | None] = []
        spec, done = None, 0
        for part in parts:
            leaves, spec = pytree.tree_flatten(part)
            whole = whole or [None if x is None else self.empty(x, (count, *x.shape[1:])) for x in leaves]
            done = self._put(whole, leaves, done)
            del part, leaves  # the next one is made now
        return None if spec is None else pytree.tree_unflatten(whole, spec)

    def _put(self, whole: list[Tensor | None], leaves: list[Any], done: int) -> int:
        end = done
        for place, x in zip(whole, leaves, strict=True):
            if place is not None:
                end = done + len(x)
                place[done:end] = x
                self.forget()
        return end

    def in_memory(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return a function of an array, of a few draws at a time: reading maps much more than what is read."""
        found = []
        for part in x.split(FEW):
            found.append(function(part))
            self.forget()
        return torch.cat(found)

    def forget(self) -> None:
        """Give the pages of mapped arrays back to the disk."""
        for mapped in list(self._maps):
            mapped.madvise(mmap.MADV_DONTNEED)


MEMORY = Storage()
