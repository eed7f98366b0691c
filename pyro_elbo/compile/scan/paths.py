"""Follow gradients through a loop over time, to know which tensors receive one at all.

An uncompiled run gives no gradient, not even zero, to a tensor that no path of the autograd graph leads to, and an
optimizer leaves such a parameter alone. The paths of one step tell those of all steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pyro_elbo.compile.scan.partition import StepGraph


def leaves_of(x: Tensor | None) -> set[int]:
    """Return the ids of the leaves of the autograd graph whose gradient depends on that of ``x``."""
    if x is None or not x.requires_grad:
        return set()
    if x.grad_fn is None:
        return {id(x)}
    found, seen, waiting = set(), {x.grad_fn}, [x.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if hasattr(node, "variable"):  # accumulates the gradient of a leaf
            found.add(id(node.variable))
        new = {before for before, _ in node.next_functions if before is not None} - seen
        seen |= new
        waiting += new
    return found


def receivers(
    graph: StepGraph, seeds: Mapping[fx.Node, Tensor | None], steps: int
) -> tuple[set[fx.Node], set[fx.Node]]:
    """Return the inputs of a step that receive a gradient: at any step, and at the one that runs first.

    Args:
        graph: one step.
        seeds: the gradients of the last carry and of the outs of all steps, None where there is none.
        steps: the number of steps.
    """
    n = len(graph.carry)
    given = {i for i, place in enumerate(graph.gradients) if place is not None and seeds[place] is not None}
    outs, carried = {i for i in given if i >= n}, {i for i in given if i < n}
    anywhere: set[fx.Node] = set()
    now: set[fx.Node] = set()
    for _ in range(steps):  # backward in time
        now = set().union(*(graph.reached[i] for i in outs | carried))
        anywhere |= now
        carried = {i for i, c in enumerate(graph.carry) if c in now}
    return anywhere, now


@contextmanager
def as_leaves(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Let a program see leaves of the autograd graph in place of tensors that others were computed from.

    The gradient of one tensor would otherwise run on into those that it was computed from, and count twice there.
    """
    leaves = [x.detach().requires_grad_() if x.requires_grad and not x.is_leaf else x for x in tensors]
    with _Replaced({id(x): leaf for x, leaf in zip(tensors, leaves, strict=True) if x is not leaf}):
        yield leaves


class _Replaced(TorchFunctionMode):
    """Replaces tensors by others, wherever an operator takes them."""

    def __init__(self, others: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._others = others

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        replace = lambda x: self._others.get(id(x), x) if isinstance(x, Tensor) else x  # noqa: E731
        args, kwargs = pytree.tree_map(replace, (args, kwargs or {}))
        return function(*args, **kwargs)
