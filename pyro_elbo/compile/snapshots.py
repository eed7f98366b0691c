"""Copies of parameters on the way: what they are after every so many steps of a run that does not stop for it."""

import ctypes
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


class Snapshots:
    """Tensors as one vector, after every ``every`` steps.

    Args:
        tensors: what to copy; contiguous and of one dtype (:meth:`can_be_of`).
        every: steps from one copy to the next.
        count: copies that there is room for.

    Attributes:
        rows: the copies.
    """

    rows: Float[Tensor, "count elements"]

    def __init__(self, tensors: Sequence[Tensor], every: int, count: int) -> None:
        self._tensors, self._every, self._taken = tensors, every, 0
        self.rows = tensors[0].new_empty(count, sum(x.numel() for x in tensors), requires_grad=False)

    @staticmethod
    def can_be_of(tensors: Sequence[Tensor]) -> bool:
        """Return whether the memory of each tensor is what a copy of it holds."""
        return all(x.is_contiguous() for x in tensors) and len({(x.dtype, x.device) for x in tensors}) == 1

    def note(self) -> None:
        """Copy the tensors if it is time, after a step."""
        self._taken += 1
        if self._taken % self._every == 0:
            self.rows[self._taken // self._every - 1] = torch.cat([x.detach().reshape(-1) for x in self._tensors])

    def passed(self, steps: int) -> ctypes.Array:
        """Return what the driver copies during the next ``steps``: where to, when, and each address and size."""
        width = self.rows.shape[1] * self.rows.element_size()
        begin = self.rows.data_ptr() + self._taken // self._every * width
        places = [n for x in self._tensors for n in (x.data_ptr(), x.numel() * x.element_size())]
        numbers = [begin, self._every, self._taken % self._every, len(self._tensors), *places]
        self._taken += steps
        return (ctypes.c_int64 * len(numbers))(*numbers)
