"""Capture a function of tensors as one functional graph.

The function runs once, unchanged, on fake tensors: it may call Pyro, autograd and an optimizer. Every real tensor that
it touches (parameters, buffers, the optimizer's state, tensors of closures) becomes an input of the graph, by identity.
The end of the graph writes back what the function changed in place, unless the step turns out to be unusable.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize

from pyro_elbo.compile._torch import (
    FakeTensor,
    FakeTensorMode,
    FakeTensorProp,
    OpOverload,
    ShapeEnv,
    fx_graph_cse,
    joint_graph_passes,
    lowerings,
    make_fallback,
    make_fx,
    rand_ops,
    select_decomp_table,
    valueless_fakes,
)
from pyro_elbo.compile.batch_scalars import batch_scalars
from pyro_elbo.compile.fakes import Lifting
from pyro_elbo.compile.noise import Noise, Segment, can_follow_stream, extract_noise, write_out_draws
from pyro_elbo.errors import CompileError

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
# Random operators whose decompositions draw other numbers than the operators themselves.
_STREAMS = ("bernoulli", "exponential", "geometric", "cauchy", "log_normal", "normal", "uniform", "native_dropout")


@dataclass(frozen=True)
class Graph:
    """A functional graph. Its inputs are ``externals``, then the function's inputs, then one row per noise."""

    module: fx.GraphModule
    externals: tuple[Tensor, ...]
    noise: tuple[Noise, ...]
    fakes: tuple[FakeTensor, ...]
    frozen: tuple[tuple[Tensor, Tensor], ...] = ()  # tensors that the graph holds by value
    stream: tuple[Segment, ...] = ()  # the order in which an uncompiled step draws; empty where rows are drawn at once


def capture(function: Callable[..., Tensor], inputs: Sequence[Tensor], *, kept: int, lift_noise: bool) -> Graph:
    """Capture one call of ``function(*inputs)``.

    Args:
        function: returns a boolean scalar: keep what the call wrote.
        inputs: the tensors of the call; two of them may be the same object.
        kept: the number of last inputs that are written even where the function returns False.
        lift_noise: draw normal and uniform noise outside the graph, all at once. Otherwise draw as an uncompiled run
            does: outside the graph, in its order, where all draws have fixed distributions; else inside the graph.

    Raises:
        CompileError: tensors of the program share memory and the program writes to one of them.
    """
    mode = valueless_fakes()
    fakes = [mode.from_tensor(x.detach()) for x in inputs]
    with mode, Lifting(mode) as lifting:
        raw = make_fx(function)(*fakes)
    externals = lift(raw, lifting.lifted)
    write_out_draws(raw.graph)
    batch_scalars(raw.graph)
    raw.recompile()
    everything = [x.detach() for x in (*externals, *inputs)]
    functional = functionalize(raw, remove="mutations")
    graph = make_fx(functional, decompositions(lift_noise), "fake")(*everything)
    remove_identities(graph.graph)
    write_out_alpha(graph.graph)
    written = _keep_if(graph.graph, len(everything) - kept)
    _check_writes(everything[: len(everything) - kept], written, len(externals))
    frozen = tuple(lifting.frozen.values())
    _check_frozen([x for x, _ in frozen], [externals[i] for i in written if i < len(externals)])
    noise, stream = extract_noise(graph.graph) if lift_noise or can_follow_stream(graph.graph) else ((), ())
    graph.graph.eliminate_dead_code()
    mode = FakeTensorMode(shape_env=ShapeEnv())  # Inductor's disk cache wants one
    rows = [torch.empty(n.size, dtype=n.dtype, device=inputs[-1].device) for n in noise]
    fakes = tuple(mode.from_tensor(x, static_shapes=True) for x in (*everything, *rows))
    return Graph(optimize(graph, mode, fakes), tuple(externals), noise, fakes, frozen, () if lift_noise else stream)


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


def write_out_alpha(graph: fx.Graph) -> None:
    """Turn x + alpha y into x + (alpha y): Inductor (torch 2.13) drops alpha where y or x is a matrix product."""
    for node in list(graph.nodes):
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and node.kwargs.get("alpha", 1) != 1:
            with graph.inserting_before(node):
                scaled = graph.call_function(aten.mul.Tensor, (node.args[1], node.kwargs["alpha"]))
                scaled.meta["val"] = node.args[1].meta["val"]
            node.args, node.kwargs = (node.args[0], scaled), {}


def _same_kind(a: fx.Node, b: Any) -> bool:
    if not isinstance(b, fx.Node):
        return False
    x, y = a.meta["val"], b.meta["val"]
    return x.shape == y.shape and x.dtype == y.dtype and x.device == y.device and x.stride() == y.stride()


def _keep_if(graph: fx.Graph, conditional: int) -> list[int]:
    """Write the first ``conditional`` inputs only where the output is true; return the positions of written inputs."""
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
    return written


def _check_writes(tensors: Sequence[Tensor], written: Sequence[int], externals: int) -> None:
    """Raise CompileError for writes to arguments, and to memory in which two inputs overlap."""
    for i in written:
        if externals <= i < len(tensors):
            raise CompileError(
                f"The program changes its tensor argument number {i - externals} in place, which a compiled step would "
                "not do. Write x = x - y instead of x -= y, or use compile=False."
            )
    end, other = 0, -1
    for first, last, i in sorted((*_memory(x), i) for i, x in enumerate(tensors) if x.numel()):
        if first < end and (i in written or other in written):
            raise CompileError(
                f"Two tensors of the program, of shapes {tuple(tensors[other].shape)} and {tuple(tensors[i].shape)}, "
                "share memory and one of them is trained or updated: a compiled step would miss the change in the "
                "other. Compute one of them from the other in the program, or use compile=False."
            )
        if last > end:
            end, other = last, i


def _memory(x: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte of a tensor and of the byte after its last one."""
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.data_ptr(), x.data_ptr() + extent * x.element_size()


def _check_frozen(frozen: Sequence[Tensor], written: Sequence[Tensor]) -> None:
    """Raise CompileError for tensors that the graph holds by value and changes itself."""
    if changed := [tuple(x.shape) for x in frozen if any(x is y for y in written)]:
        raise CompileError(
            f"The programs read values of a tensor of shape {changed[0]} and change it in place: a graph would keep "
            "the first values. Compute with the tensor instead (torch.where), or use compile=False."
        )


def optimize(module: fx.GraphModule, mode: FakeTensorMode, fakes: Sequence[FakeTensor]) -> fx.GraphModule:
    """Fold constants and remove common subexpressions, as AOTAutograd does before Inductor."""
    remove_repetition(module)
    batch_scalars(module.graph)
    FakeTensorProp(module, mode).propagate_dont_convert_inputs(*fakes)
    remove_repetition(module)
    joint_graph_passes(module, mode, on_cpu=all(x.device.type == "cpu" for x in fakes))
    module.recompile()
    return module


def remove_repetition(module: fx.GraphModule) -> None:
    """Remove common subexpressions."""
    targets = {node.target for node in module.graph.nodes if isinstance(node.target, OpOverload)}
    draws = {op for op in targets if torch.Tag.nondeterministic_seeded in op.tags}
    if all(op.overloadpacket in rand_ops for op in draws):  # of others, two with equal arguments would become one
        module.graph = fx_graph_cse(module.graph)
