"""Find states of a loop that another loop has computed already.

A guide and a model that scan the same cell over the same inputs have the same hidden states. By induction, two states
are equal at all steps if they start equal and if equality at one step implies equality at the next. Computing them once
makes the training step of a VRNN (x 88, h 64, z 16; T = 50, batch 20) 1.6 times faster.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pyro_elbo.compile._torch import get_proxy_mode
from pyro_elbo.compile.nodes import is_random
from pyro_elbo.compile.scan.partition import StepGraph

aten = torch.ops.aten


class ValueNumbering:
    """Numbers the tensors of a graph during capture; tensors that are computed alike have equal numbers."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._of: dict[fx.Node, int] = {}
        self._permuted: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._alive: list[Tensor] = []

    def __call__(self, x: Tensor) -> int:
        """Return the number of a tensor."""
        recorder: Any = get_proxy_mode()
        node = None if recorder is None else recorder.node_of(x)
        if node is None:
            self._alive.append(x)
            return self._number(("constant", id(x)))
        return self._node(node)

    def _number(self, key: Hashable) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _node(self, node: fx.Node) -> int:
        waiting = [node]
        while waiting:
            top = waiting[-1]
            unknown = [x for x in top.all_input_nodes if x not in self._of]
            if unknown:
                waiting += unknown
            else:
                waiting.pop()
                self._of[top] = self._compute(top)
        return self._of[node]

    def _compute(self, node: fx.Node) -> int:
        if node.op == "placeholder":
            return self._number(("constant", id(node.meta["val"])))
        if node.op != "call_function" or is_random(node):
            return self._number(node)
        if node.target is aten.permute.default:
            of, dims = node.args
            return self._permute(self._of[of], tuple(dims))  # type: ignore[index, arg-type]
        return self._number(key_of(node, self._of.__getitem__))

    def _permute(self, of: int, dims: tuple[int, ...]) -> int:
        """Compose a permutation with those before it."""
        of, before = self._permuted.get(of, (of, tuple(range(len(dims)))))
        dims = tuple(before[d] for d in dims)
        if dims == tuple(range(len(dims))):
            return of
        number = self._number(("permute", of, dims))
        self._permuted[number] = of, dims
        return number


def key_of(node: fx.Node, value: Callable[[fx.Node], Any]) -> Hashable:
    """Return a key of the node's computation, with ``value`` of its arguments in place of them."""

    def freeze(x: Any) -> Hashable:
        if isinstance(x, fx.Node):
            return "node", value(x)
        if isinstance(x, list | tuple):
            return tuple(map(freeze, x))
        return type(x), x

    return node.target, freeze(node.args), tuple((k, freeze(v)) for k, v in sorted(node.kwargs.items()))


Leaf = tuple[str, int]
"""``"constant"`` or ``"per step"``, and the number of the tensor."""


@dataclass(frozen=True)
class LoweredLoop:
    """A loop that is part of the captured graph.

    Attributes:
        graph: one of its steps.
        steps, reverse: the number of steps, and whether it runs from the last one.
        leaves: the tensors of its constants, inputs and outs -> their nodes in the step.
        starts: the number of each state's initial value.
        states: each state before every step, time first.
        finals: each state after the last step.
    """

    graph: StepGraph
    steps: int
    reverse: bool
    leaves: dict[Leaf, fx.Node]
    starts: tuple[int, ...]
    states: tuple[Tensor, ...]
    finals: tuple[Tensor, ...]


def shared_states(
    graph: StepGraph, leaves: dict[fx.Node, Leaf], starts: Sequence[int], other: LoweredLoop
) -> dict[int, int]:
    """Return the states of a loop that are states of another one: index here -> index there."""
    index = {key_of(n, lambda x: x): n for n in other.graph.graph.nodes if n.op == "call_function" and not is_random(n)}
    same = {place: other.leaves[number] for place, number in leaves.items() if number in other.leaves}
    pairs: dict[int, int] = {}
    for i, start in enumerate(starts):
        free = [j for j, x in enumerate(other.starts) if x == start and j not in pairs.values()]
        if free:
            pairs[i] = free[0]
    nodes = [n for n in graph.graph.nodes if n.op == "call_function" and not is_random(n)]
    while pairs:
        found = same | {graph.carry[i]: other.graph.carry[j] for i, j in pairs.items()}
        for node in nodes:
            if all(x in found for x in node.all_input_nodes):
                match = index.get(key_of(node, found.__getitem__))
                if match is not None:
                    found[node] = match
        wrong = [i for i, j in pairs.items() if found.get(graph.next_carry[i]) is not other.graph.next_carry[j]]
        if not wrong:
            return pairs
        for i in wrong:
            del pairs[i]
    return {}
