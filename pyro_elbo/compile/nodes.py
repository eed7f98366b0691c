"""What a node of a graph writes, shares and draws."""

import torch
from torch import Tensor, fx

from pyro_elbo.compile._torch import OpOverload, pytree


def memory_of(x: fx.Node) -> int:
    """Return a number for the memory of a node's value, which its views share; -1 for what is no tensor."""
    return x.meta["val"].untyped_storage()._cdata if isinstance(x.meta.get("val"), Tensor) else -1


def written_by(node: fx.Node) -> list[fx.Node]:
    """Return the operands that an operator writes to."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return []
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
    names = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [x for name in names for x in pytree.tree_leaves(given.get(name)) if isinstance(x, fx.Node)]


def is_random(node: fx.Node) -> bool:
    """Return whether a node draws random numbers."""
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
