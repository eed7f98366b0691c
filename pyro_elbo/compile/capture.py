"""Make a functional graph of a recorded call, in the operators that Inductor knows.

The end of the graph writes back what the call changed in place, unless the step turns out to be unusable.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.func import functionalize

from pyro_elbo.compile._torch import (
    FakeTensor,
    FakeTensorMode,
    FakeTensorProp,
    ShapeEnv,
    joint_graph_passes,
    lowerings,
    make_fallback,
    make_fx,
    select_decomp_table,
)
from pyro_elbo.compile.batch_scalars import batch_scalars
from pyro_elbo.compile.code import on_cpu
from pyro_elbo.compile.graphs import remove_identities, remove_repetition
from pyro_elbo.compile.noise import Noise, Segment, can_follow_stream, extract_noise
from pyro_elbo.compile.packed import Pack, Packed
from pyro_elbo.compile.packing import pack
from pyro_elbo.compile.record import Recording
from pyro_elbo.compile.writes import write_out_writes

aten = torch.ops.aten
# Random operators whose decompositions draw other numbers than the operators themselves.
_STREAMS = ("bernoulli", "exponential", "geometric", "cauchy", "log_normal", "normal", "uniform", "native_dropout")


@dataclass(frozen=True)
class Graph:
    """A functional graph, with a fake tensor for each of its inputs.

    Its inputs are vectors of small external tensors, then the other external tensors, which are the same in every call,
    then those of the function, then one row per noise.
    """

    module: fx.GraphModule
    fakes: tuple[FakeTensor, ...]
    externals: int = 0  # inputs that are the same in every call
    written: tuple[int, ...] = ()  # positions of inputs
    noise: tuple[Noise, ...] = ()
    packs: tuple[Pack, ...] = ()
    stream: tuple[Segment, ...] | None = None  # an uncompiled step's draws in order; None where rows have no order,
    # being drawn at once, or the graph itself draws


def functional_graph(recording: Recording, kept: int, lift_noise: bool) -> Graph:
    """Make the functional graph of a recorded call.

    Args:
        recording: a call that returns a boolean scalar.
        kept: the number of last inputs that are written even where that is False.
        lift_noise: draw normal and uniform noise outside the graph, all at once. Otherwise draw as an uncompiled run
            does: outside the graph, in its order, where all draws have fixed distributions; else inside the graph.
    """
    tensors = recording.tensors
    write_out_writes(recording.graph)
    batch_scalars(recording.graph)
    functional = functionalize(fx.GraphModule({}, recording.graph), remove="mutations")
    graph = make_fx(functional, decompositions(lift_noise), "fake")(*tensors)
    remove_identities(graph.graph)
    write_out_alpha(graph.graph)
    usable, writes, written = _take_writes(graph.graph, len(tensors) - kept)
    packs = pack(graph.graph, recording.externals, writes) if on_cpu(tensors) else ()
    _write(graph.graph, usable, writes, kept)
    noise, stream = extract_noise(graph.graph) if lift_noise or can_follow_stream(graph.graph) else ((), None)
    graph.graph.eliminate_dead_code()
    mode = FakeTensorMode(shape_env=ShapeEnv())  # Inductor's disk cache wants one
    rows = [torch.empty(n.size, dtype=n.dtype, device=tensors[-1].device) for n in noise]
    fixed = Packed(tensors[: len(recording.externals)], packs, written).inputs
    given = (*fixed, *recording.inputs, *rows)
    fakes = tuple(mode.from_tensor(x.detach(), static_shapes=True) for x in given)
    module = optimize(graph, mode, fakes)
    return Graph(module, fakes, len(fixed), written, noise, packs, None if lift_noise else stream)


def decompositions(lift_noise: bool) -> dict[Any, Any]:
    """Return Inductor's decompositions; unless noise is lifted, without those that change the random stream."""
    table = dict(select_decomp_table())
    if lift_noise:
        return table
    for op in [op for op in table if str(op).removeprefix("aten.").startswith(_STREAMS)]:
        del table[op]
        if op not in lowerings:
            make_fallback(op, warn=False, override_decomp=True)
    return table


def write_out_alpha(graph: fx.Graph) -> None:
    """Turn x + alpha y into x + (alpha y): Inductor (torch 2.13) drops alpha where y or x is a matrix product."""
    for node in list(graph.nodes):
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and node.kwargs.get("alpha", 1) != 1:
            with graph.inserting_before(node):
                scaled = graph.call_function(aten.mul.Tensor, (node.args[1], node.kwargs["alpha"]))
                scaled.meta["val"] = node.args[1].meta["val"]
            node.args, node.kwargs = (node.args[0], scaled), {}


def _take_writes(graph: fx.Graph, conditional: int) -> tuple[fx.Node, dict[fx.Node, fx.Node], tuple[int, ...]]:
    """Remove the writes to inputs from a graph.

    Returns:
        Its output, the value that each input has in the end, and which of the first ``conditional`` inputs are written.
    """
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    output = next(n for n in graph.nodes if n.op == "output")
    (usable,) = output.args if isinstance(output.args[0], fx.Node) else output.args[0]
    writes: dict[fx.Node, fx.Node] = {}
    for node in [n for n in graph.nodes if n.target is aten.copy_.default and n.args[0] in inputs]:
        place, writes[place] = node.args
        node.replace_all_uses_with(node.args[1])
        graph.erase_node(node)
    output.args = ((),)
    return usable, writes, tuple(i for i, place in enumerate(inputs[:conditional]) if place in writes)


def _write(graph: fx.Graph, usable: fx.Node, writes: dict[fx.Node, fx.Node], kept: int) -> None:
    """Write inputs at the end of a graph, but for the last ``kept`` ones only where its output is true."""
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    conditional = set(inputs[: len(inputs) - kept])
    with graph.inserting_before(next(n for n in graph.nodes if n.op == "output")):
        chosen = {place: _chosen(graph, usable, new, place) for place, new in writes.items() if place in conditional}
        for place, new in (writes | chosen).items():
            graph.call_function(aten.copy_.default, (place, new))


def _chosen(graph: fx.Graph, usable: fx.Node, new: fx.Node, old: fx.Node) -> fx.Node:
    node = graph.call_function(aten.where.self, (usable, new, old))
    node.meta["val"] = old.meta["val"].new_empty(old.meta["val"].shape)
    return node


def optimize(module: fx.GraphModule, mode: FakeTensorMode, fakes: Sequence[FakeTensor]) -> fx.GraphModule:
    """Fold constants and remove common subexpressions, as AOTAutograd does before Inductor."""
    remove_repetition(module)
    batch_scalars(module.graph)
    FakeTensorProp(module, mode).propagate_dont_convert_inputs(*fakes)
    remove_repetition(module)
    joint_graph_passes(module, mode, on_cpu=all(x.device.type == "cpu" for x in fakes))
    module.recompile()
    return module
