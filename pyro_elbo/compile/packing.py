"""Pack the small tensors that a graph takes or writes into vectors, of which it reads and writes slices.

A guide over forty scalar sites has eighty parameters of one number. As inputs of its graph they would need eighty loads
and stores, each of which Inductor compiles.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence

import torch
from torch import Tensor, fx

from pyro_elbo.compile.batch_scalars import lane_order
from pyro_elbo.compile.packed import Pack

aten = torch.ops.aten
SMALL = 1024  # elements of a tensor from which on it is an input of its own


def pack(graph: fx.Graph, externals: Sequence[Tensor], writes: MutableMapping[fx.Node, fx.Node]) -> tuple[Pack, ...]:
    """Replace the small tensors among the first inputs of a graph by vectors, which become its very first inputs.

    Args:
        graph: a functional graph; the tensors are those of its first inputs.
        externals: the tensors.
        writes: the value that an input has in the end, for each input that is written.

    Returns:
        The tensors in each vector. A vector is of one type, and written as a whole or not at all.
    """
    places = [n for n in graph.nodes if n.op == "placeholder"]
    alike: dict[object, list[int]] = defaultdict(list)
    for i, (place, x) in enumerate(zip(places, externals, strict=False)):
        if 0 < x.numel() < SMALL and x.is_contiguous():
            alike[x.dtype, place in writes].append(i)
    packs = [_in_order(members, places, writes) for members in alike.values() if len(members) > 1]
    with graph.inserting_before(places[0]):
        vectors = [graph.placeholder(f"packed_{i}") for i in range(len(packs))]
    for members, vector in zip(packs, vectors, strict=True):
        like = [externals[i] for i in members]
        _unpack(graph, vector, [places[i] for i in members], like, places[-1])
        if places[members[0]] in writes:
            with graph.inserting_before(next(n for n in graph.nodes if n.op == "output")):
                writes[vector] = _joined(graph, [writes.pop(places[i]) for i in members])
        for i in members:
            graph.erase_node(places[i])
    return tuple(packs)


def _in_order(members: Sequence[int], places: Sequence[fx.Node], writes: Mapping[fx.Node, fx.Node]) -> Pack:
    """Order tensors by the lanes that are written to them, which makes these one slice."""
    return tuple(sorted(members, key=lambda i: lane_order(writes.get(places[i], places[i]))))


def _unpack(graph: fx.Graph, vector: fx.Node, places: Sequence[fx.Node], like: Sequence[Tensor], last: fx.Node) -> None:
    ends = [*itertools.accumulate(x.numel() for x in like)]
    vector.meta["val"] = places[0].meta["val"].new_empty(ends[-1])
    for place, x, end in zip(places, like, ends, strict=True):
        with graph.inserting_after(last):
            if x.dim() == 0:
                value = graph.call_function(aten.select.int, (vector, 0, end - 1))
            else:
                value = graph.call_function(aten.slice.Tensor, (vector, 0, end - x.numel(), end))
        if x.dim() > 1:
            value.meta["val"] = vector.meta["val"].new_empty(x.numel())
            with graph.inserting_after(value):
                value = graph.call_function(aten.view.default, (value, list(x.shape)))
        value.meta["val"] = place.meta["val"].new_empty(x.shape)
        place.replace_all_uses_with(value)


def _joined(graph: fx.Graph, values: Sequence[fx.Node]) -> fx.Node:
    parts = [_as_vector(graph, x) for x in values]
    joined = graph.call_function(aten.cat.default, (parts,))
    joined.meta["val"] = values[0].meta["val"].new_empty(sum(x.meta["val"].numel() for x in values))
    return joined


def _as_vector(graph: fx.Graph, x: fx.Node) -> fx.Node:
    value = x.meta["val"]
    if value.dim() == 1:
        return x
    op, argument = (aten.unsqueeze.default, 0) if value.dim() == 0 else (aten.reshape.default, [-1])
    vector = graph.call_function(op, (x, argument))
    vector.meta["val"] = value.new_empty(value.numel())
    return vector
