"""Trace one step of a scan, with its gradient, as a graph whose inputs and outputs are labeled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize

from pyro_elbo.compile._torch import DisableTorchFunction, make_fx, mutates
from pyro_elbo.compile.graphs import remove_identities, remove_repetition
from pyro_elbo.compile.noise import (
    RANDOM,
    location_scale,
    write_out_bernoulli,
    write_out_categorical,
)
from pyro_elbo.compile.recorder import Recorder
from pyro_elbo.compile.scan.partition import StepGraph, split_products
from pyro_elbo.compile.scan.paths import as_leaves, leaves_of
from pyro_elbo.compile.writes import write_out_writes
from pyro_elbo.errors import CompileError

aten = torch.ops.aten
LoopBody = Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]


def _trace(function: Callable[..., Any], arguments: Sequence[Tensor]) -> tuple[fx.GraphModule, list[Tensor]]:
    """Trace a function into a functional graph of constants and arguments; return it and the constants."""
    recorder = Recorder()
    raw, constants = fx.GraphModule({}, recorder(function, arguments)), recorder.constants
    module = raw
    write_out_writes(raw.graph)
    if any(mutates(n.target) for n in raw.graph.nodes):
        everything = [x.detach() for x in (*constants, *arguments)]
        with torch.no_grad(), DisableTorchFunction():  # nothing is left to lift
            module = make_fx(functionalize(raw, remove="mutations"))(*everything)
    remove_identities(module.graph)
    _clamp_slices(module.graph)
    remove_repetition(module)
    if any(n.target is aten.copy_.default for n in module.graph.nodes):
        raise CompileError(
            "A step of pe.scan changes a tensor in place that it did not create (a buffer, such as batch-norm "
            "statistics), which a compiled scan cannot do. Put it into the carry, update it after the scan, or use "
            "compile=False."
        )
    return module, constants


def _clamp_slices(graph: fx.Graph) -> None:
    """Write the end of a slice as a size: ``vmap`` computes with it, and the largest integer would overflow."""
    for node in graph.nodes:
        position = {aten.slice.Tensor: 3, aten.slice_scatter.default: 4}.get(node.target)
        if position is not None and len(node.args) > position:
            size = node.args[0].meta["val"].shape[node.args[position - 2]]
            node.args = (*node.args[:position], min(node.args[position], size), *node.args[position + 1 :])


def _fresh(x: Tensor, requires_grad: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).requires_grad_(requires_grad and x.is_floating_point())


@dataclass(frozen=True)
class Traced:
    """One step as a graph, with its constants and its draws."""

    graph: StepGraph
    constants: list[Tensor]
    draws: list["Draw"]


def trace_step(body: LoopBody, carry: Sequence[Tensor], inputs: Sequence[Tensor], results: list[Tensor]) -> Traced:
    """Trace one step; ``results`` receives what it returned: the shapes, and which results need a gradient."""
    n, train = len(carry), torch.is_grad_enabled()
    leaves = [*(_fresh(c, train) for c in carry), *(_fresh(x[0], train and x.requires_grad) for x in inputs)]

    def function(*leaves: Tensor) -> list[Tensor]:
        new, outs = body(list(leaves[:n]), list(leaves[n:]))
        results[:] = [*new, *outs]
        return results

    module, constants = _trace(function, leaves)
    return _label(module, constants, n, len(leaves))


def trace_with_gradient(
    body: LoopBody, carry: Sequence[Tensor], inputs: Sequence[Tensor], results: Sequence[Tensor], uses: Sequence[Tensor]
) -> Traced:
    """Trace one step, with its gradient if a result needs one.

    Args:
        body: the step, called with one row of ``inputs``.
        carry: the carry before the step.
        inputs: time first.
        results: what the step returned to :func:`trace_step`.
        uses: the constants that it used.
    """
    seeded, n = [i for i, x in enumerate(results) if x.requires_grad and torch.is_grad_enabled()], len(carry)
    leaves = [
        *(_fresh(c, bool(seeded)) for c in carry),
        *(_fresh(x[0], bool(seeded) and x.requires_grad) for x in inputs),
    ]
    seeds, reached = [_fresh(results[i], False) for i in seeded], []
    with as_leaves(uses) as used:
        wanted = [x for x in (*leaves, *used) if x.requires_grad] if seeded else []

        def joint(*arguments: Tensor) -> list[Tensor | None]:
            given = arguments[: len(leaves)]
            new, outs = body(list(given[:n]), list(given[n:]))
            found: list[Tensor | None] = [*new, *outs]
            reached[:] = map(leaves_of, found)
            if not seeded:
                return found
            ends: Any = [found[i] for i in seeded]
            return [*found, *torch.autograd.grad(ends, wanted, arguments[len(leaves) :], allow_unused=True)]

        module, constants = _trace(joint, [*leaves, *seeds])
    split_products(module.graph, [p for p in module.graph.nodes if p.op == "placeholder"][len(constants) :][:n])
    step = _label(module, constants, n, len(leaves), seeded, wanted, leaves, reached)
    original = {id(leaf): x for leaf, x in zip(used, uses, strict=True)}
    return replace(step, constants=[original.get(id(x), x) for x in constants])


def _label(
    module: fx.GraphModule,
    constants: list[Tensor],
    n: int,
    m: int,
    seeded: Sequence[int] = (),
    wanted: Sequence[Tensor] = (),
    leaves: Sequence[Tensor] = (),
    reached: Sequence[set[int]] = (),
) -> Traced:
    """Label the inputs and outputs of a traced step: n carries among m arguments, then seeds of the gradient."""
    draws = _lift_draws(module.graph)
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    (results,) = next(node for node in module.graph.nodes if node.op == "output").args
    k, count = len(constants), len(results) - len(wanted)
    gradients = {id(x): g for x, g in zip(wanted, results[count:], strict=True)}
    seeds = dict(zip(seeded, places[k + m :], strict=False))
    place_of = {id(x): place for x, place in zip((*constants, *leaves), places, strict=False)}
    graph = StepGraph(
        module.graph,
        constants=tuple(places[:k]),
        carry=tuple(places[k : k + n]),
        inputs=tuple(places[k + n : k + m]),
        next_carry=tuple(results[:n]),
        outs=tuple(results[n:count]),
        gradients=tuple(seeds.get(i) for i in range(count)),
        carry_gradients=tuple(gradients.get(id(x)) for x in leaves[:n]),
        input_gradients=tuple(gradients.get(id(x)) for x in leaves[n:]),
        constant_gradients=tuple(gradients.get(id(x)) for x in constants),
        reached=tuple({place_of[x] for x in found if x in place_of} for found in reached),
    )
    return Traced(graph, constants, draws)


@dataclass(frozen=True)
class Draw:
    """A draw within a step, made for all steps before the loop; ``node`` stands for it in the step."""

    node: fx.Node
    target: Any
    args: tuple[Any, ...]
    like: Tensor


def _lift_draws(graph: fx.Graph) -> list[Draw]:
    """Turn draws with fixed distributions into inputs of the step."""
    draws = []
    write_out_bernoulli(graph)
    write_out_categorical(graph)
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    for node in [n for n in graph.nodes if n.target in RANDOM]:
        with graph.inserting_after(last):
            last = graph.placeholder(f"draws_{len(draws)}")
        last.meta = dict(node.meta)
        draws.append(Draw(last, node.target, tuple(location_scale(node)), node.meta["val"]))
        node.replace_all_uses_with(last)
        graph.erase_node(node)
    return draws
