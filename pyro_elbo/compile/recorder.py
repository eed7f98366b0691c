"""Write down the operators of a run as a graph.

``make_fx`` does so for any transform and any kind of tensor, at half a millisecond an operator. A step of a program
with hundreds of sites has tens of thousands of them.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from pyro_elbo.compile._torch import PROXY, DisableTorchFunction, OpOverload, TorchDispatchMode, unset_fake_temporarily
from pyro_elbo.compile.layouts import Layouts
from pyro_elbo.errors import CompileError

aten = torch.ops.aten


class _Known(NamedTuple):
    node: fx.Node
    layout: int | None  # see Layouts
    tensor: Tensor  # its id is unique among living tensors only


class Recorder(TorchDispatchMode):
    """Appends the operators of one run on fake tensors to a graph.

    A detached tensor has a node of its own, by which scans tell it from the one that carries a gradient.

    Attributes:
        constants: the tensors that the run did not make, in the order of the graph's first inputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mode_key = PROXY  # ``disable_proxy_modes_tracing`` suspends this mode, as it does torch's own
        self.constants: list[Tensor] = []
        self._graph, self._layouts = fx.Graph(), Layouts()
        self._known: dict[int, _Known] = {}
        self._places: dict[fx.Node, None] = {}  # of the constants

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here runs under torch.compile, and a call through Dynamo costs 10 µs

    def __call__(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> fx.Graph:
        """Run ``function(*inputs)`` once and return its graph, which takes ``constants``, then ``inputs``.

        Its nodes have ``meta["val"]``.
        """
        for i, x in enumerate(inputs):
            self._name(x, self._graph.placeholder(f"input_{i}"))
        caching = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # else casts of an earlier run would be constants
        try:
            with self:
                results = function(*inputs)
        finally:
            torch.set_autocast_cache_enabled(caching)
        self._graph.output(self._spelled(results, []))
        first = next(node for node in self._graph.nodes if node not in self._places)
        for node in self._places:
            first.prepend(node)
        return self._graph

    def node_of(self, x: Tensor) -> fx.Node | None:
        """Return the node whose value is a tensor; None if the graph has none."""
        return self._known[id(x)].node if id(x) in self._known else None

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        with DisableTorchFunction():  # whatever computes shapes is no part of the program
            if function is torch.ops.prim.device.default:
                return args[0].fake_device
            return self._record(function, args, kwargs or {})

    def _record(self, function: OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
        if function is aten.lift_fresh.default and type(args[0]) is Tensor:
            return self._literal(args[0])
        key: list[Any] = []
        given = self._spelled(args, key), self._spelled(kwargs, key) if kwargs else kwargs
        if torch.Tag.inplace_view in function.tags:
            self._keep_layout(args[0])
        result, layout = self._layouts.call(function, args, kwargs, key)
        if function._schema.is_mutable or _has_tensor(result):
            self._name(result, self._graph.create_node("call_function", function, *given), layout)
        return result

    def _literal(self, x: Tensor) -> Tensor:
        """Record ``torch.tensor(...)``, of which dispatch sees the real tensor that it made."""
        result = aten.lift_fresh.default(x)
        if x.dim() == 0:
            with unset_fake_temporarily():
                value = x.item()
            options = {"dtype": x.dtype, "device": x.device}
            node = self._graph.call_function(aten.full.default, ([], value), options)
        else:
            node = self._graph.call_function(aten.lift_fresh_copy.default, (self._spelled(x, []),))
        self._name(result, node)
        return result

    def _spelled(self, x: Any, key: list[Any]) -> Any:
        """Return nodes in place of tensors; append to ``key`` what decides on the layout of an operator's result."""
        if isinstance(x, Tensor):
            known = self._known.get(id(x)) or self._constant(x)
            key.append(known.layout)
            return known.node
        if isinstance(x, list | tuple):
            key.append(len(x))
            return type(x)([self._spelled(part, key) for part in x])
        if isinstance(x, dict):
            key += x
            return {name: self._spelled(part, key) for name, part in x.items()}
        if isinstance(x, torch.Generator):
            raise CompileError(
                "The programs draw from a torch.Generator of their own, which machine code does not: draw from torch's "
                "(leave generator= out), pass the draws as tensors, or use compile=False."
            )
        key.append((type(x), x))  # 1 == 1.0 == True
        return x

    def _constant(self, x: Tensor) -> _Known:
        node = self._graph.placeholder(f"external_{len(self.constants)}")
        self._places[node] = None
        self.constants.append(x)
        self._name(x, node)
        return self._known[id(x)]

    def _name(self, result: Any, node: fx.Node, layout: int | None = None) -> None:
        """Note that a tensor, or each of several, is the value of a node."""
        node.meta["val"] = result
        if isinstance(result, Tensor):
            self._known[id(result)] = _Known(node, self._layouts.of(result) if layout is None else layout, result)
        elif isinstance(result, list | tuple):
            for i, x in enumerate(result):
                if isinstance(x, Tensor):
                    self._name(x, self._graph.call_function(operator.getitem, (node, i)))

    def _keep_layout(self, x: Tensor) -> None:
        """Keep the layout that a tensor has before an operator changes it, as that of its nodes so far."""
        before = x.detach()
        for node in self._graph.nodes:
            if node.meta["val"] is x:
                node.meta["val"] = before


def _has_tensor(x: Any) -> bool:
    return isinstance(x, Tensor) or (isinstance(x, list | tuple) and any(map(_has_tensor, x)))
