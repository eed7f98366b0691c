"""Small tensors in the vectors that a graph takes for them: filled before the steps of a call, written back after."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

Pack = tuple[int, ...]
"""The positions of the tensors in one vector, in order."""


class Packed:
    """The vectors of a graph.

    Args:
        tensors: all external tensors.
        packs: the positions of those in each vector.
        written: the positions of tensors that the graph writes.

    Attributes:
        inputs: what the graph takes: the vectors, then the tensors that are in none.
        members: the tensors in vectors.
        places: for each of them its address in a vector, its size in bytes, and whether it is written.
    """

    def __init__(self, tensors: Sequence[Tensor], packs: Sequence[Pack], written: Sequence[int]) -> None:
        positions = [i for pack in packs for i in pack]
        self.members = [tensors[i] for i in positions]
        self._is_written = [i in written for i in positions]
        vectors = [torch.empty(sum(tensors[i].numel() for i in pack), dtype=tensors[pack[0]].dtype) for pack in packs]
        self.inputs = [*vectors, *(x for i, x in enumerate(tensors) if i not in set(positions))]
        self._parts = [
            part.view(tensors[i].shape)
            for pack, vector in zip(packs, vectors, strict=True)
            for i, part in zip(pack, vector.split([tensors[i].numel() for i in pack]), strict=True)
        ]
        rows = zip(self._parts, self._is_written, strict=True)
        numbers = [n for x, out in rows for n in (x.data_ptr(), x.numel() * x.element_size(), out)]
        self.places = (ctypes.c_int64 * len(numbers))(*numbers)

    def read(self) -> None:
        """Fill the vectors."""
        for x, part in zip(self.members, self._parts, strict=True):
            part.copy_(x.detach())

    def write(self) -> None:
        """Write the vectors back to the tensors that the graph writes."""
        for x, part, out in zip(self.members, self._parts, self._is_written, strict=True):
            if out:
                x.detach().copy_(part)
