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
from pyro_elbo.compile.graphs import remove_identities, remove_repetition
from pyro_elbo.compile.noise import Noise, Segment, can_follow_stream, extract_noise, write_out_draws
from pyro_elbo.compile.record import Recording

aten = torch.ops.aten
# Random operators whose decompositions draw other numbers than the operators themselves.
_STREAMS = ("bernoulli", "exponential", "geometric", "cauchy", "log_normal", "normal", "uniform", "native_dropout")


@dataclass(frozen=True)
class Graph:
    """A functional graph, with a fake tensor for each of its inputs.

    Its inputs are external tensors, which are the same in every call, then those of the function, then one row per
    noise.
    """

    module: fx.GraphModule
    fakes: tuple[FakeTensor, ...]
    externals: int = 0
    written: tuple[int, ...] = ()  # positions of inputs
    noise: tuple[Noise, ...] = ()
    stream: tuple[Segment, ...] = ()  # the order in which an uncompiled step draws; empty where rows are drawn at once


def functional_graph(recording: Recording, kept: int, lift_noise: bool) -> Graph:
    """Make the functional graph of a recorded call.

    Args:
        recording: a call that returns a boolean scalar.
        kept: the number of last inputs that are written even where that is False.
        lift_noise: draw normal and uniform noise outside the graph, all at once. Otherwise draw as an uncompiled run
            does: outside the graph, in its order, where all draws have fixed distributions; else inside the graph.
    """
    raw, tensors = recording.module, recording.tensors
    write_out_draws(raw.graph)
    batch_scalars(raw.graph)
    raw.recompile()
    functional = functionalize(raw, remove="mutations")
    graph = make_fx(functional, decompositions(lift_noise), "fake")(*tensors)
    remove_identities(graph.graph)
    write_out_alpha(graph.graph)
    written = _keep_if(graph.graph, len(tensors) - kept)
    noise, stream = extract_noise(graph.graph) if lift_noise or can_follow_stream(graph.graph) else ((), ())
    graph.graph.eliminate_dead_code()
    mode = FakeTensorMode(shape_env=ShapeEnv())  # Inductor's disk cache wants one
    rows = [torch.empty(n.size, dtype=n.dtype, device=tensors[-1].device) for n in noise]
    fakes = tuple(mode.from_tensor(x, static_shapes=True) for x in (*tensors, *rows))
    module, externals = optimize(graph, mode, fakes), len(recording.externals)
    return Graph(module, fakes, externals, written, noise, () if lift_noise else stream)


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


def _keep_if(graph: fx.Graph, conditional: int) -> tuple[int, ...]:
    """Write the first ``conditional`` inputs only where the output is true; return their positions."""
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    output = next(n for n in graph.nodes if n.op == "output")
    (usable,) = output.args if isinstance(output.args[0], fx.Node) else output.args[0]
    written, writes = [], []
    for node in [n for n in graph.nodes if n.target is aten.copy_.default and n.args[0] in inputs]:
        position = inputs.index(node.args[0])
        written.append(position)
        with graph.inserting_before(output):
            new = node.args[1]
            if position < conditional:
                new = graph.call_function(aten.where.self, (usable, new, node.args[0]))
                new.meta["val"] = node.args[0].meta["val"]
            writes.append((node.args[0], new))
        node.replace_all_uses_with(node.args[1])
        graph.erase_node(node)
    with graph.inserting_before(output):  # after every read
        for write in writes:
            graph.call_function(aten.copy_.default, write)
    output.args = ((),)
    return tuple(i for i in written if i < conditional)


def optimize(module: fx.GraphModule, mode: FakeTensorMode, fakes: Sequence[FakeTensor]) -> fx.GraphModule:
    """Fold constants and remove common subexpressions, as AOTAutograd does before Inductor."""
    remove_repetition(module)
    batch_scalars(module.graph)
    FakeTensorProp(module, mode).propagate_dont_convert_inputs(*fakes)
    remove_repetition(module)
    joint_graph_passes(module, mode, on_cpu=all(x.device.type == "cpu" for x in fakes))
    module.recompile()
    return module
