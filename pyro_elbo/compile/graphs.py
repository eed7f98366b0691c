"""Simplify recorded graphs: tensors become inputs, copies and repetition go."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from pyro_elbo.compile._torch import OpOverload, fx_graph_cse, rand_ops

aten = torch.ops.aten
# Operators that copy for the sake of autograd or aliasing: a functional graph needs none of them.
_IDENTITIES = (
    aten.detach.default,
    aten.detach_copy.default,
    aten.alias.default,
    aten.alias_copy.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
)
_LITERALS = (aten.lift_fresh.default, aten.lift_fresh_copy.default)


def lift(module: fx.GraphModule, real: Mapping[int, Tensor]) -> list[Tensor]:
    """Make the tensors that the trace holds the first inputs, and return them; literals become constants."""
    found: dict[int, tuple[Tensor, fx.Node]] = {}
    first = next(iter(module.graph.nodes))
    for node in [n for n in module.graph.nodes if n.op == "get_attr"]:
        held = getattr(module, node.target)
        value = real.get(id(held), held)
        if not node.users:
            module.graph.erase_node(node)
            continue
        literal = value.dim() == 0 and all(user.target in _LITERALS for user in node.users)
        with module.graph.inserting_before(node if literal else first):
            if literal:
                options = {"dtype": value.dtype, "device": value.device}
                new = module.graph.call_function(aten.full.default, ([], value.item()), options)
            elif id(value) in found:
                new = found[id(value)][1]
            else:
                new = module.graph.placeholder(f"external_{len(found)}")
                found[id(value)] = value, new
            new.meta["val"] = held
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    return [value for value, _ in found.values()]


def remove_identities(graph: fx.Graph) -> None:
    """Remove copies that a functional graph does not need."""
    for node in list(graph.nodes):
        if node.target in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.copy.default and _same_kind(node.args[0], node.args[1]):
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)


def _same_kind(a: fx.Node, b: Any) -> bool:
    if not isinstance(b, fx.Node):
        return False
    x, y = a.meta["val"], b.meta["val"]
    return x.shape == y.shape and x.dtype == y.dtype and x.device == y.device and x.stride() == y.stride()


def remove_repetition(module: fx.GraphModule) -> None:
    """Remove common subexpressions."""
    targets = {node.target for node in module.graph.nodes if isinstance(node.target, OpOverload)}
    draws = {op for op in targets if torch.Tag.nondeterministic_seeded in op.tags}
    if all(op.overloadpacket in rand_ops for op in draws):  # of others, two with equal arguments would become one
        module.graph = fx_graph_cse(module.graph)
