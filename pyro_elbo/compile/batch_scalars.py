"""Batch equal operators on scalars into one operator on a vector; the vector's elements are called lanes.

A guide over forty scalar sites does the same computation forty times. Its graph has thousands of operators on single
numbers, and Inductor takes a minute to compile it. Operators that differ only in the source of their scalars become one
operator on vectors. Each of its operands is a slice of an earlier vector, a scalar that all lanes share, or a stack.
A long chain of additions becomes the sum of a vector.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyro_elbo.compile._torch import OpOverload, pytree, stable_topological_sort
from pyro_elbo.compile.nodes import is_random, memory_of, written_by

aten = torch.ops.aten
FEW = 4  # fewest lanes of a vector

_SAME = (aten.detach.default, aten.alias.default, aten.expand.default, aten.view.default)  # of a scalar: an alias
_COPIES = (aten.sum.default, aten.mean.default, aten.clone.default)  # of a scalar
_JOINS = (aten.cat.default, aten.stack.default)
_LANEWISE = (  # elementwise, but without torch's pointwise tag
    *(torch.ops.prims.convert_element_type.default, aten._to_copy.default, aten.full.default),
    *(aten.softplus_backward.default, aten.sigmoid_backward.default, aten.tanh_backward.default),
)


def batch_scalars(graph: fx.Graph) -> None:
    """Batch the scalar operators of a graph up to its first write.

    Its nodes have ``meta["val"]``; of the new nodes, lanes have it.
    """
    barrier = next((node for node in graph.nodes if _is_barrier(node)), None)
    written = {memory_of(x) for node in graph.nodes for x in written_by(node)}

    def free() -> list[fx.Node]:
        return [
            n for n in _before(graph, barrier) if _is_scalar(n) and (n.target in _SAME or memory_of(n) not in written)
        ]

    for node in free():
        _simplify(graph, node, written)
    sums = _sum_chains(graph, free())
    for equal in _equals(_before(graph, barrier), set(free())):
        _replace(graph, _without_twins(graph, equal))
    for stack in sums:
        _sort_terms(graph, stack)
    _join_runs(graph)
    for target in (aten.unsqueeze.default, aten.cat.default):  # operands of many vectors
        same = (n for n in _before(graph, barrier) if n.target is target and not n.kwargs)
        _without_twins(graph, [n for n in same if memory_of(n) not in written])
    stable_topological_sort(graph)
    graph.eliminate_dead_code()


def _before(graph: fx.Graph, barrier: fx.Node | None) -> Iterator[fx.Node]:
    return itertools.takewhile(lambda node: node is not barrier, graph.nodes)


def _simplify(graph: fx.Graph, node: fx.Node, written: set[int]) -> None:
    """Bypass an operator that leaves its scalar unchanged, and write a constant as ``full``."""
    value, target, (x, *_) = node.meta["val"], node.target, node.all_input_nodes or [node]
    if target is aten.zeros_like.default or target is aten.ones_like.default:
        options = {"dtype": value.dtype, "device": value.device}
        node.target, node.args = aten.full.default, ([], int(target is aten.ones_like.default))
        node.kwargs = options
    elif _is_scalar(x):
        copies = target in _COPIES and value.dtype == x.meta["val"].dtype and memory_of(x) not in written
        if copies or target in _SAME:
            node.replace_all_uses_with(x)


def _is_barrier(node: fx.Node) -> bool:
    """Return whether later nodes must stay after a node: it writes, or its draws have a place in the random stream."""
    return bool(written_by(node)) or (is_random(node) and any(x.all_input_nodes for x in node.all_input_nodes))


def _sum_chains(graph: fx.Graph, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Replace chains of additions by sums of stacked scalars, and return the stacks."""
    sums = {n for n in nodes if n.users and _is_sum(n)}
    inner = {n for n in sums if len(n.users) == 1 and (user := next(iter(n.users))) in sums and user.args.count(n) == 1}
    stacks = []
    for root in [n for n in nodes if n in sums and n not in inner]:
        chain, terms = _chain(root, inner)
        if len(terms) < FEW:
            continue
        with graph.inserting_before(root):
            parts = [graph.call_function(aten.unsqueeze.default, (x, 0)) for x in terms]
            stacks.append(graph.call_function(aten.cat.default, (parts,)))
            total = graph.call_function(aten.sum.default, (stacks[-1],))
        total.meta["val"] = root.meta["val"]
        root.replace_all_uses_with(total)
        for node in chain:
            graph.erase_node(node)
    return stacks


def _is_sum(node: fx.Node) -> bool:
    """Return whether a node adds two floating-point scalars of one type, on one device."""
    if node.target is not aten.add.Tensor or node.kwargs or not all(map(_is_scalar, node.args)):
        return False
    values = [node.meta["val"], *(x.meta["val"] for x in node.all_input_nodes)]
    return values[0].dtype.is_floating_point and len({(x.dtype, x.device) for x in values}) == 1


def _chain(root: fx.Node, inner: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return a chain of additions, the last one first, and what it adds up, in order."""
    chain: list[fx.Node] = []
    terms: list[fx.Node] = []
    waiting: list[Any] = [root]
    while waiting:
        node = waiting.pop()
        if node is root or node in inner:
            chain.append(node)
            waiting += reversed(node.args)
        else:
            terms.append(node)
    return chain, terms


def _sort_terms(graph: fx.Graph, stack: fx.Node) -> None:
    """Order what a sum adds up by lanes, and take what it adds repeatedly once."""
    counts = Counter(x for part in pytree.tree_leaves(stack.args[0]) for x in part.all_input_nodes)
    with graph.inserting_before(stack):
        parts = _runs(graph, sorted((x for x, count in counts.items() if count == 1), key=lane_order))
        for x, count in counts.items():
            if count > 1:
                one = graph.call_function(aten.unsqueeze.default, (x, 0))
                parts.append(graph.call_function(aten.mul.Tensor, (one, count)))
    stack.args = (parts,)


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
    if not _is_scalar(node) or not isinstance(node.target, OpOverload) or is_random(node):
        return False
    if torch.Tag.pointwise not in node.target.tags and node.target not in _LANEWISE:
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
    return next((lane_order(x) for x in node.all_input_nodes if _lane(x)[0]), ("", 0))


def lane_order(x: fx.Node) -> tuple[str, int]:
    """Return a key that sorts scalars by the vector in which they are lanes, and by their lane."""
    vector, index = _lane(x)
    return ("", 0) if vector is None else (vector.name, index)


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
        period, rows = _pattern(scalars, start)
        stop = start + period * rows
        columns = [_slice(graph, scalars[start + i : stop : period]) for i in range(period)]
        parts.append(columns[0] if period == 1 else _interleaved(graph, columns))
        start = stop
    return parts


def _pattern(scalars: Sequence[fx.Node], start: int) -> tuple[int, int]:
    """Return how many runs alternate from ``start`` on, such as means and scales of a guide, and their length."""
    alone = _length_of_run(scalars[start:])
    if alone < FEW:
        for period in range(2, min(FEW, len(scalars) - start) + 1):
            rows = min(_length_of_run(scalars[start + i :: period]) for i in range(period))
            if rows >= FEW:
                return period, rows
    return 1, alone


def _length_of_run(scalars: Sequence[fx.Node]) -> int:
    """Return how many of the first scalars are evenly spaced lanes of one vector; at least 1."""
    before, step, count = _lane(scalars[0]), 0, 1
    for x in scalars[1:] if before[0] else ():
        vector, index = _lane(x)
        if vector is not before[0] or index <= before[1] or step not in (0, index - before[1]):
            break
        before, step, count = (vector, index), index - before[1], count + 1
    return count


def _slice(graph: fx.Graph, run: Sequence[fx.Node]) -> fx.Node:
    """Return a run as a vector."""
    if len(run) == 1:
        return graph.call_function(aten.unsqueeze.default, (run[0], 0))
    (vector, first), (_, last) = _lane(run[0]), _lane(run[-1])
    return graph.call_function(aten.slice.Tensor, (vector, 0, first, last + 1, (last - first) // (len(run) - 1)))


def _interleaved(graph: fx.Graph, columns: Sequence[fx.Node]) -> fx.Node:
    """Return the elements of vectors in turn: one of each, then the next of each."""
    rows = [graph.call_function(aten.unsqueeze.default, (x, 1)) for x in columns]
    return graph.call_function(aten.view.default, (graph.call_function(aten.cat.default, (rows, 1)), [-1]))


def _join_runs(graph: fx.Graph) -> None:
    """Use slices of vectors where lanes are concatenated."""
    for node in [n for n in graph.nodes if n.target in _JOINS and n.args[1:] in ((), (0,))]:
        given = pytree.tree_leaves(node.args[0])
        if node.target is aten.stack.default and not all(map(_is_scalar, given)):
            continue
        parts: list[fx.Node] = []
        with graph.inserting_before(node):
            for alone, xs in itertools.groupby(given, key=lambda x: _is_scalar(x) or _is_one_scalar(x)):
                same = list(xs)
                parts += _runs(graph, [x if _is_scalar(x) else x.all_input_nodes[0] for x in same]) if alone else same
        if len(parts) == 1:
            node.replace_all_uses_with(parts[0])
        else:
            node.target, node.args = aten.cat.default, (parts,)


def _is_one_scalar(x: fx.Node) -> bool:
    """Return whether a vector has one scalar as its only element."""
    unsqueezed = x.target is aten.unsqueeze.default or (x.target is aten.view.default and x.args[1] in ([1], [-1]))
    return unsqueezed and _is_scalar(x.all_input_nodes[0])
