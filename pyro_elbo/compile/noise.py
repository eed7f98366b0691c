"""Draws as noise: standard draws that a graph takes as inputs and turns into those of its operators."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx

from pyro_elbo.compile._torch import OpOverload
from pyro_elbo.compile.nodes import is_random

aten = torch.ops.aten
NoiseKind = Literal["normal", "uniform", "exponential"]
Segment = tuple[int, int, int]
"""The draws of one operator in the rows of noise: the row, the first element, the element after the last."""

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


def fill_noise(kind: NoiseKind, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill a tensor with standard draws from a generator, torch's own if omitted, and return it."""
    draw = {"normal": x.normal_, "uniform": x.uniform_, "exponential": x.exponential_}[kind]
    return draw(generator=generator)


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


def write_out_bernoulli(graph: fx.Graph) -> None:
    """Write a Bernoulli draw as a uniform one below p, as torch does in the same stream: its distribution is fixed."""
    for node in [n for n in graph.nodes if n.target is aten.bernoulli.default]:
        p, value = node.args[0], node.meta["val"]
        options = {"dtype": value.dtype, "device": value.device}
        with graph.inserting_before(node):
            uniform = graph.call_function(aten.rand_like.default, (p,), {"memory_format": torch.contiguous_format})
            below = graph.call_function(aten.lt.Tensor, (uniform, p))
            one, zero = (graph.call_function(aten.scalar_tensor.default, (x,), options) for x in (1, 0))
            drawn = graph.call_function(aten.where.self, (below, one, zero))
        uniform.meta["val"], below.meta["val"], drawn.meta["val"] = value, value < 1, value
        one.meta["val"] = zero.meta["val"] = value.new_empty(())
        node.replace_all_uses_with(drawn)
        graph.erase_node(node)


def write_out_categorical(graph: fx.Graph) -> None:
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


def draw_in_memory_order(graph: fx.Graph) -> None:
    """Draw the elements of permuted memory in the order of the memory, as torch does unless the draws are normal."""
    kinds = (aten.rand_like.default, aten.uniform.default, aten.exponential.default)
    for node in [n for n in graph.nodes if n.target in kinds]:
        source, value = cast("fx.Node", node.args[0]), node.meta["val"]
        order = sorted(range(value.dim()), key=value.stride, reverse=True)
        if value.is_contiguous() or not value.permute(order).is_contiguous():
            continue
        with graph.inserting_before(node):
            permuted = graph.call_function(aten.permute.default, (source, order))
        with graph.inserting_after(node):
            back = graph.call_function(aten.permute.default, (node, [order.index(i) for i in range(len(order))]))
        node.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)
        node.args = (permuted, *node.args[1:])
        permuted.meta["val"] = source.meta["val"].permute(order)
        node.meta["val"], back.meta["val"] = value.permute(order), value


def can_follow_stream(graph: fx.Graph) -> bool:
    """Write out draws by their noise; return whether every draw has a fixed distribution and is contiguous then."""
    write_out_bernoulli(graph)
    write_out_categorical(graph)
    draw_in_memory_order(graph)
    draws = filter(is_random, graph.nodes)
    return all(_is_scan_draw(n) or (n.target in RANDOM and n.meta["val"].is_contiguous()) for n in draws)


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
        self._sizes[key], row.meta["val"] = stop, value.new_empty(stop)
        if value.dim() == 0:
            draws = self._graph.call_function(aten.select.int, (row, 0, start))
        else:
            part = self._graph.call_function(aten.slice.Tensor, (row, 0, start, stop))
            part.meta["val"] = value.new_empty(stop - start)
            draws = self._graph.call_function(aten.view.default, (part, list(value.shape)))
        draws.meta["val"] = value
        return draws, list(self._rows).index(key), start

    def noise(self) -> tuple[Noise, ...]:
        """Return the rows."""
        return tuple(Noise(kind, dtype, size) for (kind, dtype), size in self._sizes.items())


def extract_noise(graph: fx.Graph) -> tuple[tuple[Noise, ...], tuple[Segment, ...]]:
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
                draws.meta["val"] = value
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
