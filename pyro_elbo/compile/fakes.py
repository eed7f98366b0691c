"""Fake tensors in place of a program's real ones while it is captured, matched by identity.

No operator receives a real tensor, so none can change it or freeze its value into the graph. Code that reads a value
fails, with the program's own line in the traceback.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_elbo.compile._torch import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    custom_functions_taking,
    disable_proxy_modes_tracing,
)
from pyro_elbo.errors import CompileError

aten = torch.ops.aten


class Lifting(TorchFunctionMode):
    """Replaces real tensors by fake ones, and rewrites operations that read values without need."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode
        # Both hold the tensors themselves too: an id is unique among living objects only.
        self._fakes: dict[int, tuple[Tensor, FakeTensor]] = {}
        self._integers: dict[int, tuple[Tensor, Any]] = {}  # known values of fake tensors, those of torch.arange

    def __enter__(self) -> "Lifting":
        """Lift arguments of torch functions and of custom autograd functions."""
        self._custom = custom_functions_taking(self._lift_all)
        self._custom.__enter__()
        self._fork_rng, torch.random.fork_rng = torch.random.fork_rng, _refuse_fork
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Undo the changes to torch."""
        self._custom.__exit__(*error)
        torch.random.fork_rng = self._fork_rng
        super().__exit__(*error)

    @property
    def lifted(self) -> dict[int, Tensor]:
        """Return the real tensor of each fake one, by the fake one's id."""
        return {id(fake): real for real, fake in self._fakes.values()}

    def lift(self, x: Tensor) -> Tensor:
        """Return the fake tensor that stands for ``x``."""
        if isinstance(x, FakeTensor):
            return x
        if id(x) not in self._fakes:
            with disable_proxy_modes_tracing():  # the making of a fake is no part of the program
                self._fakes[id(x)] = x, self._mode.from_tensor(x)
        return self._fakes[id(x)][1]

    def _lift_all(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self.lift(x)
        if type(x) in (list, tuple):
            return type(x)(self._lift_all(part) for part in x)
        if type(x) is dict:
            return {key: self._lift_all(part) for key, part in x.items()}
        if isinstance(x, slice) and any(isinstance(end, Tensor) for end in (x.start, x.stop, x.step)):
            raise DataDependentOutputException(aten._local_scalar_dense.default)
        return x

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        args, kwargs = self._lift_all(args), self._lift_all(kwargs or {})
        integers = self._integers.get(id(args[0]), (None, None))[1] if args else None
        if integers is not None and function in (Tensor.item, Tensor.tolist, Tensor.__int__, Tensor.__index__):
            return integers
        if function == Tensor.data.__set__:
            raise CompileError(
                "The programs assign to .data of a tensor, which a compiled step cannot follow. Write "
                "tensor.copy_(...) under torch.no_grad(), or use compile=False."
            )
        if function is Tensor.__setitem__ and _is_masked_fill(*args):
            return args[0].copy_(torch.where(args[1], args[2], args[0]))
        if function is Tensor.__getitem__ and (indices := _scalar_indices(*args)) is not None:
            return aten.index.Tensor(args[0], indices)
        if function is torch.nn.functional.one_hot and (classes := [*args[1:], *kwargs.values()]):
            return (args[0].unsqueeze(-1) == torch.arange(classes[0], device=args[0].device)).long()
        result = function(*args, **kwargs)
        if function is torch.arange and all(isinstance(x, int) for x in args):
            self._fix(result, list(range(*args)))
        elif integers is not None and function is Tensor.unbind:
            for part, value in zip(result, integers, strict=True):
                self._fix(part, value)
        return result

    def _fix(self, x: Tensor, value: Any) -> None:
        self._integers[id(x)] = x, value


def _refuse_fork(devices: Any = None, enabled: bool = True, **options: Any) -> AbstractContextManager[None]:
    if not enabled:
        return nullcontext()
    raise CompileError(
        "The programs fork torch's random generator, as torch.utils.checkpoint does: a graph cannot. Remove the "
        "checkpoint, pass it preserve_rng_state=False if it draws nothing, or use compile=False."
    )


def _is_masked_fill(x: Tensor, index: Any, value: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype is torch.bool and isinstance(value, bool | int | float)


def _scalar_indices(x: Tensor, index: Any) -> list[Tensor | None] | None:
    """Return the indices of ``x[k]``, ``x[..., k]`` and the like for integer scalars k, whose values Python reads."""
    parts = index if isinstance(index, tuple) else (index,)
    scalars = [i for i in parts if isinstance(i, Tensor) and i.dim() == 0 and i.dtype not in (torch.bool, torch.uint8)]
    if not scalars or not all(isinstance(i, Tensor) or i is Ellipsis or i == slice(None) for i in parts):
        return None
    rest = [None] * (x.dim() - sum(i is not Ellipsis for i in parts))
    return [j for i in parts for j in (rest if i is Ellipsis else [i if isinstance(i, Tensor) else None])]
