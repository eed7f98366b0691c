"""Run programs written for one particle with a dimension of particles on the left.

Most operators broadcast over it. RNN cells and convolutions take a fixed number of dimensions, and ``torch.cat`` takes
equal ones: here the cells see particles and batch as one dimension, and ``cat`` broadcasts the rest of the shapes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Size, Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

# Modules that take one batch dimension, and the number of dimensions to its right.
_EVENT_DIMS: dict[type[nn.Module], int] = {
    **dict.fromkeys((nn.RNNCell, nn.GRUCell, nn.LSTMCell), 1),
    **dict.fromkeys((nn.Conv1d, nn.ConvTranspose1d), 2),
    **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d), 3),
    **dict.fromkeys((nn.Conv3d, nn.ConvTranspose3d), 4),
}
_CAT = (torch.cat, torch.concat, torch.concatenate)


@contextmanager
def broadcasting_modules() -> Iterator[None]:
    """Let RNN cells, convolutions, ``torch.cat`` and ``torch.stack`` broadcast over dimensions on the left."""
    batches: list[Size | None] = []

    def flatten(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        event_dim = _event_dim(module)
        if event_dim is None:
            return None
        tensors = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
        shapes = [x.shape[: x.dim() - event_dim] for x in tensors]
        batch = torch.broadcast_shapes(*shapes)
        if len(batch) < 2 and all(shape == batch for shape in shapes):
            batches.append(None)
            return None
        batches.append(batch)
        return pytree.tree_map(lambda x: _flatten(x, batch, event_dim), args)

    def unflatten(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if _event_dim(module) is None or (batch := batches.pop()) is None:
            return None
        return pytree.tree_map(lambda x: x.reshape(batch + x.shape[1:]), output)

    hooks = register_module_forward_pre_hook(cast(Any, flatten)), register_module_forward_hook(unflatten)
    try:
        with _BroadcastingCat():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _event_dim(module: nn.Module) -> int | None:
    return next((n for kind, n in _EVENT_DIMS.items() if isinstance(module, kind)), None)


def _flatten(x: Any, batch: Size, event_dim: int) -> Any:
    if not isinstance(x, Tensor):
        return x
    event = x.shape[x.dim() - event_dim :]
    return x.expand(batch + event).reshape(-1, *event)


class _BroadcastingCat(TorchFunctionMode):
    """Broadcasts the tensors of ``torch.cat`` and ``torch.stack`` where their numbers of dimensions differ."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = _joined if func in _CAT or func is torch.stack else _plain
        return call(func, *args, **(kwargs or {}))


def _plain(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _joined(func: Callable[..., Any], tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Tensor:
    ranks = [x.dim() for x in tensors]
    if len(set(ranks)) == 1:
        return func(tensors, dim, **kwargs)
    stacks = func is torch.stack
    dim = dim - min(ranks) - stacks if dim >= 0 else dim  # from the right, as for one particle
    if stacks:
        return func(torch.broadcast_tensors(*tensors), dim, **kwargs)
    shapes = [list(x.shape) for x in tensors]
    sizes = [shape[dim] for shape in shapes]
    for shape in shapes:
        shape[dim] = 1
    common = list(torch.broadcast_shapes(*shapes))
    parts = []
    for x, size in zip(tensors, sizes, strict=True):
        common[dim] = size
        parts.append(x.expand(common))
    return func(parts, dim, **kwargs)
