"""Partition the graph of one step into the recurrence and the parts that run for all steps at once.

A step maps (constants, carry, inputs) to (next carry, outs). Its backward maps the gradients of next carry and outs to
those of carry, inputs and constants. In either direction only the recurrence has to run step by step: nodes that depend
on the carry and that the next carry needs. Nodes that do not depend on the carry are evaluated before the loop, for all
steps at once; nodes that the next carry does not need are evaluated so after it.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from pyro_elbo.compile.nodes import is_random

aten = torch.ops.aten

# Operators that are linear in their first argument: a sum over time passes through.
_LINEAR = (
    aten.t.default,
    aten.permute.default,
    aten.transpose.int,
    aten.neg.default,
    aten.sum.dim_IntList,
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice_backward.default,
)
_FUNCTIONS = (aten.exp.default, aten.log.default, aten.log1p.default, aten.tanh.default, aten.sigmoid.default)
_ARITHMETIC = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
FEW = 64  # numbers of a step
# A view of one row need not be a view of all rows.
_SAME: Any = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
_BATCHED: Any = {**_SAME, aten.fill.Scalar: aten.full_like.default}  # torch.vmap has no rule for it


@dataclass(frozen=True)
class StepGraph:
    """A functional graph of one step, forward and backward; its fields are nodes.

    Attributes:
        gradients: placeholders for the gradients of next carry and outs; None where there is no gradient.
        carry_gradients, input_gradients, constant_gradients: the results of the backward; None where not needed.
        reached: for each of next carry and outs, the constants, carries and inputs whose gradient depends on its own.
    """

    graph: fx.Graph
    constants: tuple[fx.Node, ...]
    carry: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    next_carry: tuple[fx.Node, ...]
    outs: tuple[fx.Node, ...]
    gradients: tuple[fx.Node | None, ...] = ()
    carry_gradients: tuple[fx.Node | None, ...] = ()
    input_gradients: tuple[fx.Node | None, ...] = ()
    constant_gradients: tuple[fx.Node | None, ...] = ()
    reached: tuple[set[fx.Node], ...] = ()

    def between(self, targets: Iterable[fx.Node | None]) -> list[fx.Node]:
        """Return the operations that the targets need, in order."""
        needed = needed_for(targets)
        return [n for n in self.graph.nodes if n.op == "call_function" and n in needed]


def needed_for(targets: Iterable[fx.Node | None]) -> set[fx.Node]:
    """Return the nodes from which the targets are computed, and the targets."""
    found: set[fx.Node] = set()
    waiting = [node for node in targets if node is not None]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def depending_on(sources: Iterable[fx.Node], among: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes that depend on a source, and the sources; ``among`` is in the order of the graph."""
    found = set(sources)
    for node in among:
        if any(argument in found for argument in node.all_input_nodes):
            found.add(node)
    return found


def better_inside(nodes: Sequence[fx.Node], dependent: set[fx.Node]) -> set[fx.Node]:
    """Return the functions of a few numbers that only the loop asks for, though they do not depend on the carry.

    Over all steps, a kernel has as many lanes as the last dimension. In the loop they take all numbers of a step, while
    it waits for its carry.
    """
    inside: set[fx.Node] = set()
    for n in reversed(nodes):
        wanted = n.target in _FUNCTIONS or (n.target in _ARITHMETIC and any(user in inside for user in n.users))
        if wanted and all(user in dependent or user in inside for user in n.users):
            value = n.meta["val"]
            if 1 < value.shape[-1:].numel() < value.numel() <= FEW:
                inside.add(n)
    return inside


class StepValues:
    """The values of nodes: one for all steps, or one per step with time first.

    Args:
        steps: the number of steps.
        number: the position of the scan among those of the graph.
        owned: receives the loops and streams that operators of the graph find by key.
    """

    def __init__(self, steps: int, number: int, owned: list[Any]) -> None:
        self.steps, self.number, self.owned = steps, number, owned
        self.constant: dict[fx.Node, Any] = {}
        self.per_step: dict[fx.Node, Any] = {}

    def __contains__(self, node: fx.Node) -> bool:
        return node in self.constant or node in self.per_step

    def stacked(self, node: fx.Node) -> Tensor:
        """Return the values of all steps, time first."""
        if node in self.per_step:
            return self.per_step[node]
        value = self.constant[node]
        return value.expand(self.steps, *value.shape)

    def evaluate(self, nodes: Iterable[fx.Node]) -> None:
        """Compute nodes, given in the order of the graph, for all steps at once."""
        batched = []
        for node in nodes:
            if node in self:
                continue
            if is_random(node) or any(x in self.per_step or x in batched for x in node.all_input_nodes):
                batched.append(node)
            else:
                self.constant[node] = _call(node, self.constant.__getitem__)
        if not batched:
            return
        inside = set(batched)
        inputs = list(
            dict.fromkeys(x for n in batched for x in n.all_input_nodes if x in self.per_step and x not in inside)
        )

        def function(index: Tensor, *values: Tensor) -> list[Any]:
            local: dict[fx.Node, Any] = dict(zip(inputs, values, strict=True))
            for node in batched:
                local[node] = _call(node, lambda x: local[x] if x in local else self.constant[x])
            return [local[node] for node in batched]

        known = (x for x in (*self.per_step.values(), *self.constant.values()) if isinstance(x, Tensor))
        index = torch.arange(self.steps, device=next((x.device for x in known), None))
        results = torch.vmap(function, randomness="different")(index, *(self.per_step[x] for x in inputs))
        self.per_step |= dict(zip(batched, results, strict=True))

    def total(self, node: fx.Node) -> Tensor:
        """Return the sum of a node over all steps; avoid one matrix per step where a single product gives the sum."""
        if node in self.constant:
            return self.constant[node] * self.steps
        arguments: Any = node.args
        target: Any = _SAME.get(node.target, node.target)  # type: ignore[arg-type]
        alike = all(isinstance(x, fx.Node) and _shape(x) == _shape(node) for x in arguments)
        if target is aten.add.Tensor and alike and not node.kwargs:
            return self.total(arguments[0]) + self.total(arguments[1])
        if target is aten.mm.default and all(x in self.per_step for x in arguments):
            left, right = (self.per_step[x] for x in arguments)
            return left.transpose(0, 1).flatten(1) @ right.flatten(0, 1)
        if target in _LINEAR or target in _SAME.values():
            return target(self.total(arguments[0]), *arguments[1:], **node.kwargs)
        return self.per_step[node].sum(0)


def _shape(node: fx.Node) -> Any:
    return getattr(node.meta.get("val"), "shape", None)


def _call(node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    args: Any = fx.map_arg(node.args, value)
    kwargs: Any = fx.map_arg(node.kwargs, value)
    target: Any = _BATCHED.get(node.target, node.target)  # type: ignore[arg-type]
    return target(*args, **kwargs)


def split_products(graph: fx.Graph, carry: Sequence[fx.Node]) -> None:
    """Split products with concatenated inputs, [a b] W = a W_a + b W_b, where only one input depends on the carry.

    The product of the other input can then be computed for all steps at once. Products of the backward are split by
    columns likewise.
    """
    dependent = depending_on(carry, graph.nodes)
    for node in list(graph.nodes):
        if node.target in (aten.mm.default, aten.addmm.default):
            *bias, joined, weight = node.args
            if joined.target is aten.cat.default and _columns(joined) and _differ(joined.args[0], dependent):
                _split_rows(graph, node, bias, joined.args[0], weight)
        elif node.target is aten.slice.Tensor and node.args[0].target is aten.mm.default and node.args[1] in (1, -1):
            product = node.args[0]
            if all(user.target is aten.slice.Tensor for user in product.users):
                with graph.inserting_before(node):
                    columns = _add(graph, aten.slice.Tensor, (product.args[1], 1, *node.args[2:]))
                    node.replace_all_uses_with(_add(graph, aten.mm.default, (product.args[0], columns)))
    graph.eliminate_dead_code()


def _columns(cat: fx.Node) -> bool:
    return len(cat.args) == 2 and cat.args[1] in (1, -1) and cat.meta["val"].dim() == 2


def _differ(parts: Sequence[fx.Node], dependent: set[fx.Node]) -> bool:
    return len({part in dependent for part in parts}) == 2


def _split_rows(graph: fx.Graph, node: fx.Node, bias: list[Any], parts: Sequence[fx.Node], weight: fx.Node) -> None:
    with graph.inserting_before(node):
        products, start = [], 0
        for part in parts:
            size = _shape(part)[1]
            rows = _add(graph, aten.slice.Tensor, (weight, 0, start, start + size))
            first = bias and not products
            products.append(
                _add(graph, aten.addmm.default if first else aten.mm.default, (*(bias if first else ()), part, rows))
            )
            start += size
        node.replace_all_uses_with(reduce(lambda a, b: _add(graph, aten.add.Tensor, (a, b)), products))


def _add(graph: fx.Graph, target: Any, args: tuple[Any, ...]) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, lambda x: x.meta["val"]))
    return node


_ANY_ZERO = (aten.mul.Tensor, aten.mm.default, aten.bmm.default)
_FIRST_ZERO = (
    *(*_LINEAR, *_SAME, aten.div.Tensor, aten.expand.default, aten.clone.default, aten.mul.Scalar),
    *(aten.tanh_backward.default, aten.sigmoid_backward.default, aten.threshold_backward.default),
)


def _is_zero(target: Any, zero: list[bool]) -> bool:
    """Return whether an operator gives zero, where ``zero`` says which of its arguments are zero."""
    if target is aten.where.self:
        return zero[1:] == [True, True]
    if target in (aten.add.Tensor, aten.sub.Tensor):
        return all(zero)
    return target in _ANY_ZERO or (target in _FIRST_ZERO and zero[0])


def drop_zeros(nodes: Iterable[fx.Node], zeros: set[fx.Node]) -> dict[fx.Node, fx.Node | None]:
    """Propagate zeros through linear operators, and replace nodes in the graph by the node that they equal.

    Args:
        nodes: in the order of the graph.
        zeros: the nodes known to be zero.

    Returns:
        Node -> the node that it equals, None for zero; nodes without an entry do not change.
    """
    equal: dict[fx.Node, fx.Node | None] = dict.fromkeys(zeros)
    for node in nodes:
        arguments = [x for x in node.args if isinstance(x, fx.Node)]
        zero = [equal.get(x, x) is None for x in arguments]
        if not any(zero):
            continue
        if _is_zero(node.target, zero):
            equal[node] = None
        elif node.target is aten.add.Tensor and len(zero) == 2 and not node.kwargs:
            (other,) = (equal.get(x, x) for x, z in zip(arguments, zero, strict=True) if not z)
            if other is not None and _shape(other) == _shape(node):
                equal[node] = other
                node.replace_all_uses_with(other)
    return equal


@dataclass(frozen=True)
class Recurrence:
    """The part of a step that has to run step by step.

    Attributes:
        nodes: in the order of the graph.
        carry, next_carry: the state before and after the step.
        constants, inputs: values from outside the recurrence that its nodes use.
        exports: nodes of the recurrence that other parts use.
    """

    nodes: tuple[fx.Node, ...]
    carry: tuple[fx.Node, ...]
    next_carry: tuple[fx.Node, ...]
    constants: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    exports: tuple[fx.Node, ...]

    def module(self) -> fx.GraphModule:
        """Build a module of constants, carry and inputs that writes next carry and exports to its last arguments."""
        graph = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        for i, node in enumerate((*self.constants, *self.carry, *self.inputs)):
            new[node] = graph.placeholder(f"x_{i}")
        targets = (*self.next_carry, *self.exports)
        room = [graph.placeholder(f"room_{i}") for i in range(len(targets))]
        for node in self.nodes:
            new[node] = graph.node_copy(node, lambda x: new[x])
        for place, node in zip(room, targets, strict=True):
            graph.call_function(aten.copy_.default, (place, new[node]))
        graph.output(())
        return fx.GraphModule({}, graph)


def recurrence(
    nodes: Sequence[fx.Node], carry: Sequence[fx.Node], next_carry: Sequence[fx.Node], values: StepValues
) -> Recurrence:
    """Return the recurrence: the nodes that the next carry needs and that depend on the carry.

    Args:
        nodes: in the order of the graph, not yet evaluated.
        carry, next_carry: the state before and after the step.
        values: the values evaluated so far.
    """
    inside = needed_for(next_carry)
    inside |= {n for n in nodes if n.target is operator.getitem and n.args[0] in inside}  # no tuple leaves the loop
    chosen = tuple(n for n in nodes if n in inside and n not in values and n not in carry)
    arguments = dict.fromkeys(x for n in chosen for x in n.all_input_nodes) | dict.fromkeys(next_carry)
    members, known = set(chosen), {*carry, *next_carry}
    exports = (n for n in chosen if n not in known and any(user not in members for user in n.users))
    outer = [x for x in arguments if x not in members and x not in carry]
    return Recurrence(
        chosen,
        tuple(carry),
        tuple(next_carry),
        tuple(x for x in outer if x in values.constant),
        tuple(x for x in outer if x in values.per_step),
        tuple(n for n in exports if isinstance(n.meta.get("val"), Tensor)),
    )
