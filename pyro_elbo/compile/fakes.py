"""Fake tensors in place of a program's real ones while it is captured, matched by identity.

No operator receives a real tensor, so none can change it or freeze its value into the graph. Code that reads a value
fails, with the program's own line in the traceback.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from pyro_elbo.compile._torch import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    custom_functions_taking,
    disable_proxy_modes_tracing,
    is_functorch_wrapped_tensor,
    pytree,
    unset_fake_temporarily,
)
from pyro_elbo.errors import CompileError

aten = torch.ops.aten
LARGE = 2**14  # elements up to which the value of a constant is computed beside its fake

_FACTORIES = ("arange", "eye", "full", "linspace", "ones", "tensor", "tril_indices", "triu_indices", "zeros")
_OF_SHAPE = ("full_like", "new_full", "new_ones", "new_tensor", "new_zeros", "ones_like", "zeros_like")
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
_IN_PLACE = ("__setitem__", *(f"__i{op}__" for op in _OPERATORS))
_READS = ("item", "tolist", "__bool__", "__float__", "__index__", "__int__")
_INDEXED = (Tensor.__getitem__, Tensor.__setitem__)


class Lifting(TorchFunctionMode):
    """Replaces real tensors by fake ones, and rewrites operations that read values without need."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode
        # Both hold the tensors themselves too: an id is unique among living objects only.
        self._fakes: dict[int, tuple[Tensor, FakeTensor]] = {}
        self._values: dict[int, _KnownValue] = {}
        self.frozen: dict[int, tuple[Tensor, Tensor]] = {}  # buffers that the graph holds by value

    def __enter__(self) -> "Lifting":
        """Lift arguments of torch functions and of custom autograd functions; turn validation off."""
        with ExitStack() as stack:
            stack.enter_context(custom_functions_taking(self._lift_all))
            stack.enter_context(_replaced(torch.random, "fork_rng", _refuse_fork))
            stack.enter_context(_replaced(Distribution, "_validate_args", _NoValidation()))
            self._patches = stack.pop_all()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Undo the changes to torch."""
        super().__exit__(*error)
        self._patches.close()

    @property
    def lifted(self) -> dict[int, Tensor]:
        """Return the real tensor of each fake one, by the fake one's id."""
        return {id(fake): real for real, fake in self._fakes.values()}

    def lift(self, x: Tensor) -> Tensor:
        """Return the fake tensor that stands for ``x``."""
        if isinstance(x, FakeTensor) or is_functorch_wrapped_tensor(x):  # a transform of torch.func wraps fakes
            return x
        if x.is_neg() or x.is_conj():
            raise CompileError(
                f"The programs use a tensor of shape {tuple(x.shape)} with torch's lazy negative or conjugate bit, "
                "which machine code does not see. Store x.resolve_neg().resolve_conj(), or use compile=False."
            )
        if id(x) not in self._fakes:
            with disable_proxy_modes_tracing():  # the making of a fake is no part of the program
                fake = self._mode.from_tensor(x)
            self._fakes[id(x)] = x, fake
            if x.numel() <= LARGE and not x.requires_grad:
                with _outside():
                    self._know(fake, x.clone(), (x,))
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
        result = self._call(function, self._lift_all(args), self._lift_all(kwargs or {}))
        changed = (kwargs or {}).get("out", args[0] if args else None)
        held = self._fakes.get(id(changed))
        return changed if held is not None and result is held[1] else result  # self.n += 1 keeps the tensor that it had

    def _call(self, function: Any, args: tuple, kwargs: Any) -> Any:
        name = getattr(function, "__name__", "")
        if name in _READS and (known := self._known(args[0])) is not None:
            with _outside():
                return function(self._freeze(known))
        if function == Tensor.data.__set__:
            raise CompileError(
                "The programs assign to .data of a tensor, which a compiled step cannot follow. Write "
                "tensor.copy_(...) under torch.no_grad(), or use compile=False."
            )
        if function in _INDEXED:
            args = (args[0], self._without_masks(args[1]), *args[2:])
        if function is Tensor.__getitem__ and _is_mask(args[1]):
            return _Selection(args[0], args[1])
        if function is Tensor.__setitem__ and _is_mask(args[1]):
            if isinstance(args[2], _Selection) and args[2].mask is args[1]:  # x[mask] = y[mask]
                return _write_where(args[0], args[1], args[2].of)
            if isinstance(args[2], bool | int | float):
                return _write_where(*args)
        if function is Tensor.__getitem__ and (indices := _scalar_indices(*args)) is not None:
            return aten.index.Tensor(args[0], indices)
        if function is torch.nn.functional.one_hot and (classes := [*args[1:], *kwargs.values()]):
            return (args[0].unsqueeze(-1) == torch.arange(classes[0], device=args[0].device)).long()
        result = function(*args, **kwargs)
        self._fold(function, name, args, kwargs, result)
        return result

    def _know(self, fake: Tensor, value: Tensor, sources: tuple[Tensor, ...]) -> None:
        self._values[id(fake)] = _KnownValue(fake, value, fake._version, sources)

    def _known(self, x: Any) -> "_KnownValue | None":
        """Return the value of a tensor that depends on constants and buffers only, unless it was changed in place."""
        known = self._values.get(id(x))
        return known if known is not None and known.fake._version == known.version else None

    def _fold(self, function: Callable[..., Any], name: str, args: tuple, kwargs: Any, result: Any) -> None:
        """Compute the value of a result that depends on known values only."""
        made = result if isinstance(result, tuple | list) else (result,)
        if not made or not all(isinstance(x, FakeTensor) and x.numel() <= LARGE and not x.requires_grad for x in made):
            return
        if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or "empty" in name:
            return
        if name not in _OF_SHAPE and any(isinstance(x, Tensor) and id(x) not in self._values for x in args):
            return
        leaves, spec = pytree.tree_flatten((args, kwargs))
        found = {id(x): self._known(x) for x in leaves if isinstance(x, Tensor)}
        if not (all(found.values()) and (found or name in _FACTORIES)) and name not in _OF_SHAPE:
            return
        sources = () if name in _OF_SHAPE else tuple(s for known in found.values() if known for s in known.sources)
        with _outside():
            real = {key: known.value for key, known in found.items() if known}
            given = [real.get(id(x), x) for x in leaves]
            given = [torch.empty(x.shape, dtype=x.dtype) if isinstance(x, FakeTensor) else x for x in given]
            known_args, settings = pytree.tree_unflatten(given, spec)
            before = _generators()
            values = function(*known_args, **settings)
            if not all(map(torch.equal, before, _generators())):  # a draw is no constant
                _restore_generators(before)
                return
        for x, value in zip(made, values if isinstance(values, tuple | list) else (values,), strict=True):
            if value is not None:  # the copy of a parameter has no .grad
                self._know(x, value, sources)

    def _freeze(self, known: "_KnownValue") -> Tensor:
        """Return a value to be held by the graph, which then relies on the buffers that it was computed from."""
        self.frozen |= {id(x): (x, self._values[id(self.lift(x))].value) for x in known.sources}
        return known.value

    def _without_masks(self, index: Any) -> Any:
        """Replace boolean masks of known values in an index by the positions where they are true."""
        parts: list[Any] = []
        for i in index if isinstance(index, tuple) else (index,):
            known = self._known(i) if isinstance(i, Tensor) and i.dtype is torch.bool and i.dim() else None
            if known is None:
                parts.append(i)
                continue
            with _outside():
                positions = self._freeze(known).nonzero(as_tuple=True)
            parts += [self.lift(x) for x in positions]
        return tuple(parts) if isinstance(index, tuple) or len(parts) != 1 else parts[0]


@dataclass(frozen=True)
class _KnownValue:
    """The value that a fake tensor had at a version, and the buffers that it was computed from."""

    fake: Tensor
    value: Tensor
    version: int
    sources: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class _Selection:
    """The elements of a tensor where a mask is true: their number is unknown, so they can only be written back."""

    of: Tensor
    mask: Tensor

    def __getattr__(self, name: str) -> Any:
        raise DynamicOutputShapeException(aten.nonzero.default)

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        raise DynamicOutputShapeException(aten.nonzero.default)


def _refuse(*_: Any) -> Any:
    raise DynamicOutputShapeException(aten.nonzero.default)


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "neg", "len", "iter", "bool"):
    setattr(_Selection, f"__{_name}__", _refuse)


def _generators() -> list[Tensor]:
    """Return the states of torch's default generators."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def _restore_generators(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])


@contextmanager
def _outside() -> Iterator[None]:
    """Compute with real tensors, outside the graph."""
    with unset_fake_temporarily(), disable_proxy_modes_tracing(), torch.no_grad():
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a module or class."""
    original = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


class _NoValidation:
    """``Distribution._validate_args`` while a step is captured: never true, and False only where the user said so.

    ``expand`` copies the flag to the instance: a distribution made outside the program would go on to read values.
    """

    def __get__(self, instance: Any, owner: Any) -> Literal[False] | None:
        return False if instance is not None and vars(instance).get("_validate_args") is False else None

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)["_validate_args"] = value


def _refuse_fork(devices: Any = None, enabled: bool = True, **options: Any) -> AbstractContextManager[None]:
    if not enabled:
        return nullcontext()
    raise CompileError(
        "The programs fork torch's random generator, as torch.utils.checkpoint does: a graph cannot. Remove the "
        "checkpoint, pass it preserve_rng_state=False if it draws nothing, or use compile=False."
    )


def _write_where(x: Tensor, mask: Tensor, value: Any) -> Tensor:
    return x.copy_(torch.where(mask.reshape(mask.shape + (1,) * (x.dim() - mask.dim())), value, x))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype is torch.bool


def _scalar_indices(x: Tensor, index: Any) -> list[Tensor | None] | None:
    """Return the indices of ``x[k]``, ``x[..., k]`` and the like for integer scalars k, whose values Python reads."""
    parts = index if isinstance(index, tuple) else (index,)
    scalars = [i for i in parts if isinstance(i, Tensor) and i.dim() == 0 and i.dtype not in (torch.bool, torch.uint8)]
    if not scalars or not all(isinstance(i, Tensor) or i is Ellipsis or i == slice(None) for i in parts):
        return None
    rest = [None] * (x.dim() - sum(i is not Ellipsis for i in parts))
    return [j for i in parts for j in (rest if i is Ellipsis else [i if isinstance(i, Tensor) else None])]
