"""Capture a function of tensors as one functional graph.

The function runs once, unchanged, on fake tensors: it may call Pyro, autograd and an optimizer. Every real tensor that
it touches (parameters, buffers, the optimizer's state, tensors of closures) becomes an input of the graph, by identity.
The end of the graph writes back what the function changed in place, unless the step turns out to be unusable.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

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
)
from pyro_elbo.compile.batch_scalars import batch_scalars
from pyro_elbo.compile.fakes import Lifting
from pyro_elbo.errors import CompileError

aten = torch.ops.aten
NoiseKind = Literal["normal", "uniform", "exponential"]
Segment = tuple[int, int, int]
"""The draws of one operator in the rows of noise: the row, the first element, the element after the last."""

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
_DRAWS = {aten.normal_.default: aten.normal_functional.default, aten.uniform_.default: aten.uniform.default}
RANDOM: dict[Any, NoiseKind] = {
    aten.normal_functional.default: "normal",
    aten.randn.default: "normal",
    aten.randn_like.default: "normal",
    aten.rand.default: "uniform",
    aten.rand_like.default: "uniform",
    aten.uniform.default: "uniform",
    aten.exponential.default: "exponential",
}
SCAN_DRAWS: dict[int, tuple[NoiseKind, ...]] = {}
"""The kinds of the draws in one step of a scan, by the key of the operator that makes them."""


def fill_noise(kind: NoiseKind, x: Tensor) -> Tensor:
    """Fill a tensor with standard draws from torch's generator and return it."""
    return {"normal": x.normal_, "uniform": x.uniform_, "exponential": x.exponential_}[kind]()


@dataclass(frozen=True)
class Noise:
    """A row of independent standard draws, an input of the graph."""

    kind: NoiseKind
    dtype: torch.dtype
    size: int

    def rows(self, count: int, device: torch.device) -> Tensor:
        """Allocate ``count`` rows, each padded to whole cache lines."""
        return torch.empty(count, -(-self.size // 16) * 16, dtype=self.dtype, device=device)

    def draw(self, rows: Tensor) -> None:
        """Fill rows from torch's generator."""
        fill_noise(self.kind, rows)


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
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x.detach()) for x in inputs]
    with mode, Lifting(mode) as lifting:
        raw = make_fx(function)(*fakes)
    externals = lift(raw, lifting.lifted)
    _write_out_draws(raw.graph)
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
    noise, stream = _lift_noise(graph.graph) if lift_noise or _can_follow_stream(graph.graph) else ((), ())
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
    module.recompile()
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


def _write_out_draws(graph: fx.Graph) -> None:
    """Replace draws in place into fresh memory by functional draws."""
    for node in [n for n in graph.nodes if n.target in _DRAWS and n.args[0].target is aten.empty.memory_format]:
        if len(node.args[0].users) == 1:
            node.target = _DRAWS[node.target]


def write_out_alpha(graph: fx.Graph) -> None:
    """Turn x + alpha y into x + (alpha y): Inductor (torch 2.13) drops alpha where y or x is a matrix product."""
    for node in list(graph.nodes):
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and node.kwargs.get("alpha", 1) != 1:
            with graph.inserting_before(node):
                scaled = graph.call_function(aten.mul.Tensor, (node.args[1], node.kwargs["alpha"]))
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


def write_out_bernoulli(graph: fx.Graph) -> None:
    """Write a Bernoulli draw as a uniform one below p, as torch does in the same stream: its distribution is fixed."""
    for node in [n for n in graph.nodes if n.target is aten.bernoulli.default]:
        p, value = node.args[0], node.meta["val"]
        with graph.inserting_before(node):
            uniform = graph.call_function(aten.rand_like.default, (p,))
            below = graph.call_function(aten.lt.Tensor, (uniform, p))
            drawn = graph.call_function(aten._to_copy.default, (below,), {"dtype": value.dtype})
        uniform.meta["val"], below.meta["val"], drawn.meta["val"] = value, value < 1, value
        node.replace_all_uses_with(drawn)
        graph.erase_node(node)


def _write_out_categorical(graph: fx.Graph) -> None:
    """Write one draw from each row of probabilities as the largest p / e, with e exponential, as torch draws it."""
    for node in [n for n in graph.nodes if n.target is aten.multinomial.default and n.args[1] == 1]:
        p = node.args[0]
        with graph.inserting_before(node):
            draws = graph.call_function(aten.exponential.default, (p,))
            ratio = graph.call_function(aten.div.Tensor, (p, draws))
            largest = graph.call_function(aten.argmax.default, (ratio, -1, True))
        draws.meta["val"], ratio.meta["val"], largest.meta["val"] = p.meta["val"], p.meta["val"], node.meta["val"]
        node.replace_all_uses_with(largest)
        graph.erase_node(node)


def _can_follow_stream(graph: fx.Graph) -> bool:
    """Write out draws by their noise; return whether every draw has a fixed distribution then."""
    write_out_bernoulli(graph)
    _write_out_categorical(graph)
    operators = [n for n in graph.nodes if isinstance(n.target, OpOverload)]
    draws = [n for n in operators if torch.Tag.nondeterministic_seeded in n.target.tags]
    return all(n.target in RANDOM or _is_scan_draw(n) for n in draws)


def _is_scan_draw(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.name() == "pyro_elbo::draws"


class _NoiseRows:
    """Rows of noise that become inputs of a graph, one per kind and dtype."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._sizes: dict[tuple[NoiseKind, torch.dtype], int] = {}
        self._rows: dict[tuple[NoiseKind, torch.dtype], fx.Node] = {}
        self._last = [n for n in graph.nodes if n.op == "placeholder"][-1]

    def take(self, kind: NoiseKind, value: Tensor) -> tuple[fx.Node, int, int]:
        """Return a draw shaped like ``value``, its row and where it starts there."""
        key = kind, value.dtype
        if key not in self._rows:
            with self._graph.inserting_after(self._last):
                self._rows[key] = self._last = self._graph.placeholder(f"noise_{len(self._rows)}")
            self._sizes[key] = 0
        row, start, stop = self._rows[key], self._sizes[key], self._sizes[key] + value.numel()
        self._sizes[key] = stop
        if value.dim() == 0:
            draws = self._graph.call_function(aten.select.int, (row, 0, start))
        else:
            draws = self._graph.call_function(aten.slice.Tensor, (row, 0, start, stop))
            draws = self._graph.call_function(aten.view.default, (draws, list(value.shape)))
        return draws, list(self._rows).index(key), start

    def noise(self) -> tuple[Noise, ...]:
        """Return the rows."""
        return tuple(Noise(kind, dtype, size) for (kind, dtype), size in self._sizes.items())


def _lift_noise(graph: fx.Graph) -> tuple[tuple[Noise, ...], tuple[Segment, ...]]:
    """Replace draws whose distribution is fixed by slices of rows of noise; return the rows and the order of draws."""
    rows, stream = _NoiseRows(graph), []
    for node in [n for n in graph.nodes if n.target in RANDOM or _is_scan_draw(n)]:
        if _is_scan_draw(node):
            stream += _lift_scan(graph, node, rows)
            continue
        value = node.meta["val"]
        with graph.inserting_before(node):
            draws, row, start = rows.take(RANDOM[node.target], value)
            for op, number in location_scale(node):
                draws = graph.call_function(op, (draws, number))
        stream.append((row, start, start + value.numel()))
        node.replace_all_uses_with(draws)
        graph.erase_node(node)
    return rows.noise(), tuple(stream)


def _lift_scan(graph: fx.Graph, node: fx.Node, rows: _NoiseRows) -> list[Segment]:
    """Replace the draws of a scan; an uncompiled run makes all those of one step, then those of the next."""
    steps, reverse, key = (cast("int", x) for x in node.args)
    made: list[tuple[int, int, int]] = []
    for i, kind in enumerate(SCAN_DRAWS[key]):
        value = node.meta["val"][i]
        with graph.inserting_before(node):
            draws, row, start = rows.take(kind, value)
        made.append((row, start, value[0].numel()))
        for user in [n for n in node.users if n.args[1] == i]:
            user.replace_all_uses_with(draws)
            graph.erase_node(user)
    for user in list(node.users):
        graph.erase_node(user)
    graph.erase_node(node)
    order = range(steps)[::-1] if reverse else range(steps)
    return [(row, start + t * n, start + (t + 1) * n) for t in order for row, start, n in made]


def location_scale(node: fx.Node) -> Iterator[tuple[Any, float]]:
    """Yield the operators that turn standard draws into those of a node.

    The node is normal(mean, std), uniform(from, to) or exponential(rate).
    """
    if node.target is aten.exponential.default:
        rate: Any = (*node.args[1:], *node.kwargs.values(), 1.0)[0]
        if rate != 1.0:
            yield aten.mul.Tensor, 1 / rate
    if node.target is aten.normal_functional.default or node.target is aten.uniform.default:
        names = ("mean", "std") if node.target is aten.normal_functional.default else ("from", "to")
        given: Any = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
        a, b = given.get(names[0], 0.0), given.get(names[1], 1.0)
        scale = b if names[0] == "mean" else b - a
        if scale != 1.0:
            yield aten.mul.Tensor, scale
        if a != 0.0:
            yield aten.add.Tensor, a


def optimize(module: fx.GraphModule, mode: FakeTensorMode, fakes: Sequence[FakeTensor]) -> fx.GraphModule:
    """Fold constants and remove common subexpressions, as AOTAutograd does before Inductor."""
    module = _without_repetition(module, mode, fakes)
    batch_scalars(module.graph)
    module = _without_repetition(module, mode, fakes)
    joint_graph_passes(module, mode, on_cpu=all(x.device.type == "cpu" for x in fakes))
    return module


def _without_repetition(module: fx.GraphModule, mode: FakeTensorMode, fakes: Sequence[FakeTensor]) -> fx.GraphModule:
    module.recompile()
    FakeTensorProp(module, mode).propagate_dont_convert_inputs(*fakes)
    targets = {node.target for node in module.graph.nodes if isinstance(node.target, OpOverload)}
    draws = {op for op in targets if torch.Tag.nondeterministic_seeded in op.tags}
    if any(op.overloadpacket not in rand_ops for op in draws):  # two draws with equal arguments would become one
        return module
    return fx.GraphModule(module, fx_graph_cse(module.graph))
