"""Turn writes to memory that a graph has made itself into operators that return the new value.

A graph may not be reordered beyond a write, so every early one keeps later passes from batching what comes after it:
a draw fills fresh memory, and a density masks its own result.
"""

from bisect import bisect_left
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx

from pyro_elbo.compile._torch import OpOverload
from pyro_elbo.compile.nodes import memory_of, written_by

aten = torch.ops.aten
_NAMED_OTHERWISE: dict[Any, OpOverload] = {aten.normal_.default: aten.normal_functional.default}
_SAME = (aten.detach.default, aten.alias.default)


def write_out_writes(graph: fx.Graph) -> None:
    """Replace writes to memory that is no input and that later nodes reach through the written tensor only.

    Its nodes have ``meta["val"]``, also afterwards: of a replaced write it is still in the memory of before.
    """
    places = {node: i for i, node in enumerate(graph.nodes)}
    sharing: dict[int, list[fx.Node]] = defaultdict(list)
    for node in places:
        sharing[memory_of(node)].append(node)
    for node, place in places.items():
        if (function := _functional(node)) is None:
            continue
        x = node.args[0]
        same = sharing[memory_of(x)]
        before = same[: bisect_left(same, place, key=places.__getitem__)]
        late = {y: [user for user in y.users if places[user] > place] for y in before}
        if same[0].op != "placeholder" and not any(users for y, users in late.items() if y is not x):
            for user in late[x]:
                user.replace_input_with(x, node)
            node.target, node.args = function, (_source(x), *node.args[1:])


def _functional(node: fx.Node) -> OpOverload | None:
    """Return the operator that returns what a node writes to its first operand, in the same layout."""
    written, target = written_by(node), node.target
    if len(written) != 1 or node.args[0] is not written[0] or torch.Tag.inplace_view in target.tags:
        return None
    packet = getattr(aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    function = _NAMED_OTHERWISE.get(target, getattr(packet, target._overloadname, None))
    if function is None or function._schema.is_mutable:
        return None
    values = fx.node.map_arg((node.args, node.kwargs), lambda x: x.meta["val"])
    old, new = node.meta["val"], function(*values[0], **values[1])
    return function if isinstance(new, Tensor) and _layout(new) == _layout(old) else None


def _layout(x: Tensor) -> tuple[object, ...]:
    return x.dtype, x.shape, x.stride(), x.device


def _source(x: Any) -> fx.Node:
    """Return what an alias stands for."""
    return _source(x.args[0]) if x.target in _SAME else x
