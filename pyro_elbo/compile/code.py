"""The machine code of a graph."""

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_elbo.compile.noise import Noise, Segment
from pyro_elbo.compile.packed import Pack

C_FUNCTIONS: dict[Any, list[str]] = {}
"""The C++ declarations of operators that machine code on a CPU calls without Python; their libraries are loaded."""

WRITTEN_OUT: dict[Any, Callable[..., Any]] = {}
"""What gives the C++ code of operators that are written into that of a graph: see :func:`_torch.write_out`."""

_ENTRY = "_Z19inductor_entry_implPP16AtenTensorOpaqueS1_"


@dataclass(frozen=True)
class Code:
    """The machine code of a functional graph, with what the graph takes and changes.

    Attributes:
        call: Inductor's wrapper; None where the code comes from the disk.
        entry: the address of the C++ function; None on devices that need the wrapper.
        noise, packs, stream, written: as in :class:`pyro_elbo.compile.capture.Graph`.
    """

    call: Callable[[list[Tensor]], Any] | None
    entry: ctypes.c_void_p | None
    noise: tuple[Noise, ...] = ()
    packs: tuple[Pack, ...] = ()
    stream: tuple[Segment, ...] | None = None
    written: tuple[int, ...] = ()


def on_cpu(tensors: Iterable[Tensor]) -> bool:
    """Return whether the C++ driver can call code compiled for these tensors."""
    return all(x.device.type == "cpu" for x in tensors)


def entry_of(library: str) -> ctypes.c_void_p:
    """Return the address of the C++ function of a graph."""
    return ctypes.cast(getattr(ctypes.PyDLL(library), _ENTRY), ctypes.c_void_p)
