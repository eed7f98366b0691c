"""Simplify graphs: copies and repetition go."""

from typing import Any

import torch
from torch import fx

from pyro_elbo.compile._torch import fx_graph_cse, rand_ops
from pyro_elbo.compile.nodes import is_random

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
    draws = filter(is_random, module.graph.nodes)
    if all(n.target.overloadpacket in rand_ops for n in draws):  # of others, two with equal arguments would become one
        module.graph = fx_graph_cse(module.graph)
