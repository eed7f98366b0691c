"""Batch equal operators on scalars into one operator on a vector; the vector's elements are called lanes.

A guide over forty scalar sites does the same computation forty times. Its graph has thousands of operators on single
numbers, and Inductor takes a minute to compile it. Operators that differ only in the source of their scalars become one
operator on vectors. Each of its operands is a slice of an earlier vector, a scalar that all lanes share, or a stack.
"""

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyro_elbo.compile._torch import OpOverload, pytree, stable_topological_sort

aten = torch.ops.aten
FEW = 4  # fewest lanes of a vector

_SAME = (aten.detach.default, aten.alias.default, aten.expand.default, aten.view.default)  # of a scalar: an alias
_COPIES = (aten.sum.default, aten.mean.default, aten.clone.default)  # of a scalar
_LANEWISE = (  # elementwise, but without torch's pointwise tag
    *(torch.ops.prims.convert_element_type.default, aten._to_copy.default, aten.full.default),
    *(aten.softplus_backward.default, aten.sigmoid_backward.default, aten.tanh_backward.default),
)


def batch_scalars(graph: fx.Graph) -> None:
    """Batch the scalar operators of a graph up to its first write.

    Its nodes have ``meta["val"]``; of the new nodes, lanes have it.
    """
    before = list(itertools.takewhile(lambda node: not _is_barrier(node), graph.nodes))
    written = {_memory(x) for node in graph.nodes for x in _written(node)}
    nodes = [n for n in before if _is_scalar(n) and (n.target in _SAME or _memory(n) not in written)]
    for node in nodes:
        _simplify(graph, node, written)
    for equal in _equals(before, set(nodes)):
        _replace(graph, _without_twins(graph, equal))
    _join_runs(graph)
    stable_topological_sort(graph)
    graph.eliminate_dead_code()


def _memory(x: fx.Node) -> int:
    return x.meta["val"].untyped_storage()._cdata if isinstance(x.meta.get("val"), Tensor) else -1


def _written(node: fx.Node) -> list[fx.Node]:
    """Return the operands that an operator writes to."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return []
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
    names = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [x for name in names for x in pytree.tree_leaves(given.get(name)) if isinstance(x, fx.Node)]


def _simplify(graph: fx.Graph, node: fx.Node, written: set[int]) -> None:
    """Bypass an operator that leaves its scalar unchanged, and write a constant as ``full``."""
    value, target, (x, *_) = node.meta["val"], node.target, node.all_input_nodes or [node]
    if target is aten.zeros_like.default or target is aten.ones_like.default:
        options = {"dtype": value.dtype, "device": value.device}
        node.target, node.args = aten.full.default, ([], int(target is aten.ones_like.default))
        node.kwargs = options
    elif _is_scalar(x):
        copies = target in _COPIES and value.dtype == x.meta["val"].dtype and _memory(x) not in written
        if copies or target in _SAME:
            node.replace_all_uses_with(x)


def _is_barrier(node: fx.Node) -> bool:
    """Return whether later nodes must stay after a node: it writes, or its draws have a place in the random stream."""
    if not isinstance(node.target, OpOverload):
        return False
    draws = torch.Tag.nondeterministic_seeded in node.target.tags
    return bool(_written(node)) or (draws and any(x.all_input_nodes for x in node.all_input_nodes))


def _equals(nodes: Iterable[fx.Node], free: set[fx.Node]) -> list[list[fx.Node]]:
    """Group the operators that may be batched, those nearest to the inputs first."""
    depths: dict[fx.Node, int] = {}
    kinds: dict[fx.Node, int] = {}  # numbers, since nested tuples would be hashed repeatedly
    numbers: dict[Hashable, int] = {}
    equal: dict[int, list[fx.Node]] = defaultdict(list)
    for node in nodes:
        depths[node] = 1 + max((depths[x] for x in node.all_input_nodes), default=0)
        lanewise = node in free and _is_lanewise(node)
        kinds[node] = numbers.setdefault(_kind(node, kinds, depths[node], lanewise), len(numbers))
        if lanewise:
            equal[kinds[node]].append(node)
    return sorted((x for x in equal.values() if len(x) > 1), key=lambda x: depths[x[0]])


def _is_scalar(x: Any) -> bool:
    return isinstance(x, fx.Node) and isinstance(x.meta.get("val"), Tensor) and x.meta["val"].dim() == 0


def _is_lanewise(node: fx.Node) -> bool:
    if not _is_scalar(node) or not isinstance(node.target, OpOverload):
        return False
    if torch.Tag.pointwise not in node.target.tags and node.target not in _LANEWISE:
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    values = [x.meta["val"] for x in node.all_input_nodes]
    floats = {x.dtype for x in values if x.dtype.is_floating_point}  # a scalar would not promote a vector
    places = {x.device for x in values}
    return len(places) <= 1 and len(floats) <= 1


def _kind(node: fx.Node, kinds: dict[fx.Node, int], depth: int, lanewise: bool) -> Hashable:
    """Return a key that is equal for operators that may be batched; equal depth makes them independent."""
    value = node.meta.get("val")
    if not lanewise:
        return (value.dtype, value.device, depth) if isinstance(value, Tensor) else node.name
    args = (*node.args, *sorted(node.kwargs.items()))
    return node.target, value.dtype, *(kinds[x] if isinstance(x, fx.Node) else repr(x) for x in args)


def _without_twins(graph: fx.Graph, nodes: list[fx.Node]) -> list[fx.Node]:
    """Merge operators with the same operands."""
    found: dict[Hashable, fx.Node] = {}
    for node in nodes:
        twin = found.setdefault(tuple(x if isinstance(x, fx.Node) else repr(x) for x in node.args), node)
        if twin is not node:
            node.replace_all_uses_with(twin)
            graph.erase_node(node)
    return list(found.values())


def _replace(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Replace equal operators by one on vectors."""
    if len(nodes) < FEW:
        return
    last = nodes[-1]
    nodes = sorted(nodes, key=_place)  # a backward pass has them in reverse
    with graph.inserting_before(last):
        args = [_operand(graph, xs) for xs in zip(*(node.args for node in nodes), strict=True)]
        vector = graph.create_node("call_function", last.target, tuple(args), last.kwargs)
        for i, node in enumerate(nodes):
            lane = graph.call_function(aten.select.int, (vector, 0, i))
            lane.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(lane)
    for node in nodes:
        graph.erase_node(node)


def _place(node: fx.Node) -> tuple[str, int]:
    """Return the first lane among a node's operands."""
    return next(((vector.name, i) for x in node.all_input_nodes for vector, i in [_lane(x)] if vector), ("", 0))


def _operand(graph: fx.Graph, xs: Sequence[Any]) -> Any:
    """Return one operand for all lanes: the scalar that they share, or a vector."""
    if not isinstance(xs[0], fx.Node) or all(x is xs[0] for x in xs):
        return xs[0]
    parts = _runs(graph, xs)
    return parts[0] if len(parts) == 1 else graph.call_function(aten.cat.default, (parts,))


def _lane(x: fx.Node) -> tuple[fx.Node | None, int]:
    """Return the vector and the index of a lane; None for a scalar that is not a lane."""
    vector, _, index = x.args if x.target is aten.select.int and _is_scalar(x) else (None, 0, 0)
    return (vector, index) if isinstance(vector, fx.Node) and isinstance(index, int) and index >= 0 else (None, 0)


def _runs(graph: fx.Graph, scalars: Sequence[fx.Node]) -> list[fx.Node]:
    """Return vectors whose concatenation holds the scalars: slices of evenly spaced lanes, else one per scalar."""
    parts, start = [], 0
    while start < len(scalars):
        stop = _end_of_run(scalars, start)
        first, last = _lane(scalars[start]), _lane(scalars[stop - 1])
        if stop - start == 1:
            parts.append(graph.call_function(aten.unsqueeze.default, (scalars[start], 0)))
        else:
            step = (last[1] - first[1]) // (stop - start - 1)
            parts.append(graph.call_function(aten.slice.Tensor, (first[0], 0, first[1], last[1] + 1, step)))
        start = stop
    return parts


def _end_of_run(scalars: Sequence[fx.Node], start: int) -> int:
    """Return the end of the run of evenly spaced lanes from ``start``."""
    lanes = [_lane(x) for x in scalars[start:]]
    stop = 1
    while stop < len(lanes) and lanes[0][0] and lanes[stop][0] is lanes[0][0]:
        step = lanes[1][1] - lanes[0][1]
        if step < 1 or lanes[stop][1] - lanes[stop - 1][1] != step:
            break
        stop += 1
    return start + stop


def _join_runs(graph: fx.Graph) -> None:
    """Use slices of vectors where lanes are concatenated."""
    for node in [n for n in graph.nodes if n.target is aten.cat.default and n.args[1:] in ((), (0,))]:
        parts: list[fx.Node] = []
        with graph.inserting_before(node):
            for alone, xs in itertools.groupby(pytree.tree_leaves(node.args[0]), key=_is_one_scalar):
                same = list(xs)
                parts += _runs(graph, [x.all_input_nodes[0] for x in same]) if alone else same
        node.args = (parts,)


def _is_one_scalar(x: fx.Node) -> bool:
    """Return whether a vector has one scalar as its only element."""
    unsqueezed = x.target is aten.unsqueeze.default or (x.target is aten.view.default and x.args[1] in ([1], [-1]))
    return unsqueezed and _is_scalar(x.all_input_nodes[0])
