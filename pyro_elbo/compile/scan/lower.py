"""Lower a scan in a captured graph to one operator that calls the machine code of one step T times.

The step is traced once, with its gradient. The recurrence runs within the operator; everything else joins the graph
around it, vectorized over all steps. Neither the graph nor its compilation grows with T.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from pyro_elbo.assumptions import NotAlikeError, assume, capturing_inside
from pyro_elbo.compile._torch import (
    DisableTorchFunction,
    config,
    disable_proxy_modes_tracing,
)
from pyro_elbo.compile.nodes import is_random
from pyro_elbo.compile.noise import RANDOM, NoiseKind, fill_noise
from pyro_elbo.compile.scan.chain_ops import CapturedChain, ChainCode, captured_messages
from pyro_elbo.compile.scan.operators import DrawStream, Loop, register, register_draws
from pyro_elbo.compile.scan.partition import (
    StepValues,
    better_inside,
    depending_on,
    drop_zeros,
    recurrence,
)
from pyro_elbo.compile.scan.paths import receivers
from pyro_elbo.compile.scan.scalar_code import Layout
from pyro_elbo.compile.scan.shared import LoweredLoop, ValueNumbering, shared_states
from pyro_elbo.compile.scan.trace import Draw, LoopBody, Traced, trace_step, trace_with_gradient
from pyro_elbo.compile.store import on_cpu
from pyro_elbo.errors import CompileError

aten = torch.ops.aten


def _evaluate_all_steps(
    values: StepValues,
    nodes: Sequence[fx.Node],
    carry: Sequence[fx.Node],
    next_carry: Sequence[fx.Node],
    init: Sequence[Tensor],
    reverse: bool,
) -> list[Tensor]:
    """Evaluate nodes for all steps, in a loop where they need the carry of the step before; return the last carries."""
    finals: dict[fx.Node, Tensor] = {}
    start, after = dict(zip(carry, init, strict=True)), dict(zip(carry, next_carry, strict=True))
    while True:
        waiting = [c for c in carry if c not in finals]
        dependent = depending_on(waiting, nodes)
        free = [n for n in nodes if n not in dependent]
        ready = [c for c in waiting if after[c] not in dependent]
        if not ready:
            break
        values.evaluate(free)
        for c in ready:
            new = values.stacked(after[c])
            shifted = [new[1:], start[c].unsqueeze(0)] if reverse else [start[c].unsqueeze(0), new[:-1]]
            values.per_step[c], finals[c] = torch.cat(shifted), new[0 if reverse else -1]
    inside = better_inside(free, dependent)
    values.evaluate(n for n in free if n not in inside)
    if waiting:
        _loop(values, nodes, waiting, after, start, finals, reverse)
        values.evaluate(n for n in nodes if n not in values)
    return [finals[c] for c in carry]


def _loop(
    values: StepValues,
    nodes: Sequence[fx.Node],
    carry: Sequence[fx.Node],
    after: dict[fx.Node, fx.Node],
    start: dict[fx.Node, Tensor],
    finals: dict[fx.Node, Tensor],
    reverse: bool,
) -> None:
    part = recurrence(nodes, carry, [after[c] for c in carry], values)
    constants = [values.constant[x].contiguous() for x in part.constants]
    state = [start[c].contiguous() for c in carry]
    inputs = [values.per_step[x].contiguous() for x in part.inputs]
    exports = [x.meta["val"] for x in part.exports]
    with disable_proxy_modes_tracing():
        like = [*constants, *state, *(x[0] for x in inputs), *state, *exports]
        rows = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in like]
    number = values.number if any(map(is_random, part.nodes)) else 0  # loops that draw are never the same
    layout = Layout(len(constants), len(state), len(inputs), rows)
    loop = register(part.module(), layout, tuple((x.shape, x.dtype) for x in exports), reverse, number)
    values.owned.append(loop)
    room = torch.ops.pyro_elbo.loop(constants, state, inputs, values.steps, loop.key)
    for c, states in zip(carry, room, strict=False):
        values.per_step[c] = states[1:] if reverse else states[:-1]
        values.per_step.setdefault(after[c], states[:-1] if reverse else states[1:])
        finals[c] = states[0 if reverse else -1]
    values.per_step |= dict(zip(part.exports, room[len(carry) :], strict=False))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bound: "_BoundStep", *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.bound = bound
        ctx.set_materialize_grads(False)
        with DisableTorchFunction():  # vmap's rows are not tensors of the program
            results = bound.forward(tensors)
        ctx.mark_non_differentiable(*(x for x, g in zip(results, bound.step.graph.gradients, strict=True) if g is None))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        with DisableTorchFunction():
            return None, *ctx.bound.backward(gradients)


class _BoundStep:
    """A traced step, bound to the tensors of one scan."""

    def __init__(self, step: Traced, steps: int, reverse: bool, number: int, owned: list[Any]) -> None:
        self.step, self.reverse, self.values = step, reverse, StepValues(steps, number, owned)

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the last carry and the outs of all steps."""
        graph, values = self.step.graph, self.values
        k, n = len(graph.constants), len(graph.carry)
        values.constant |= dict(zip(graph.constants, tensors[:k], strict=True))
        values.per_step |= dict(zip(graph.inputs, tensors[k + n :], strict=True))
        values.per_step |= _make_draws(self.step.draws, values, self.reverse)
        nodes = graph.between([*graph.next_carry, *graph.outs])
        finals = _evaluate_all_steps(values, nodes, graph.carry, graph.next_carry, tensors[k : k + n], self.reverse)
        return [x.clone() for x in (*finals, *map(values.stacked, graph.outs))]

    def backward(self, given: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of constants, carry and inputs; None where an uncompiled run gives none."""
        graph, values, n = self.step.graph, self.values, len(self.step.graph.carry)
        seeds = {place: x for place, x in zip(graph.gradients, given, strict=True) if place is not None}
        anywhere, first = receivers(graph, seeds, values.steps)
        places, states = graph.gradients[:n], graph.carry
        carried = [p for p, c in zip(places, states, strict=True) if p and (c in anywhere or seeds[p] is not None)]
        zero = {place for place, x in seeds.items() if x is None and place not in carried}
        equal = drop_zeros([x for x in graph.graph.nodes if x.op == "call_function"], zero)

        def gradients(of: Sequence[fx.Node], nodes: Sequence[fx.Node | None]) -> list[fx.Node | None]:
            return [g and equal.get(g, g) if x in anywhere else None for x, g in zip(of, nodes, strict=True)]

        before = gradients(states, graph.carry_gradients)
        after = {place: g for place, g in zip(places, before, strict=True) if place is not None}
        for place, x in seeds.items():
            if x is not None and place not in after:
                values.per_step[place] = x
            elif x is not None and after[place] is None:
                rest, last = _zeros(x, values.steps - 1), x.unsqueeze(0)
                values.per_step[place] = torch.cat([last, rest] if self.reverse else [rest, last])
        inputs = gradients(graph.inputs, graph.input_gradients)
        constants = gradients(graph.constants, graph.constant_gradients)
        nodes = [x for x in graph.between([*before, *inputs, *constants]) if x not in values]
        loops = {place: g for place in carried if (g := after[place]) is not None}
        for place in seeds:  # zeros that an operator takes of which nothing is known
            if place not in values and place not in loops:
                values.constant[place] = _zeros(place.meta["val"])
        init = [_zeros(c.meta["val"]) if (x := seeds[c]) is None else x for c in loops]
        ends = _evaluate_all_steps(values, nodes, list(loops), list(loops.values()), init, not self.reverse)
        finals = dict(zip(loops, ends, strict=True))
        return [
            *(x and values.total(x) for x in constants),
            *(
                self._at_start(p, g, finals) if c in first else None
                for p, g, c in zip(places, before, states, strict=True)
            ),
            *(x and values.stacked(x) for x in inputs),
        ]

    def _at_start(
        self, place: fx.Node | None, gradient: fx.Node | None, finals: Mapping[fx.Node, Tensor]
    ) -> Tensor | None:
        """Return the gradient of a part of the carry before the first step."""
        if gradient is None or place is not None:
            return place and finals.get(place)
        return self.values.stacked(gradient)[-1 if self.reverse else 0]  # no step passes a gradient on


def _zeros(like: Tensor, *left: int) -> Tensor:
    return torch.zeros((*left, *like.shape), dtype=like.dtype, device=like.device)


def _make_draws(draws: Sequence[Draw], values: StepValues, reverse: bool) -> dict[fx.Node, Tensor]:
    """Make the draws of all steps, in the order of an uncompiled run under ``fallback_random``."""
    if not draws:
        return {}
    kinds: tuple[NoiseKind, ...] = tuple(RANDOM[d.target] for d in draws)
    if config.fallback_random:
        shapes = tuple((tuple(d.like.shape), d.like.dtype, d.like.device) for d in draws)
        stream = register_draws(kinds, shapes)
        values.owned.append(stream)
        rows = torch.ops.pyro_elbo.draws(values.steps, reverse, stream.key)
    else:
        rows = [torch.empty((values.steps, *d.like.shape), dtype=d.like.dtype, device=d.like.device) for d in draws]
        rows = [fill_noise(kind, x) for kind, x in zip(kinds, rows, strict=True)]
    result = {}
    for d, x in zip(draws, rows, strict=False):
        for op, number in d.args:
            x = op(x, number)
        result[d.node] = x
    return result


class ScanLowering:
    """Lowers the scans of one captured graph, and its loop over particles.

    Args:
        maps: capture the loop over particles as one function of all; otherwise particle by particle.
        owned: as the attribute.

    Attributes:
        owned: the loops and streams that operators of the graph find by key: they must live as long as the graph.
    """

    def __init__(self, maps: bool = True, owned: list[Loop | DrawStream | ChainCode] | None = None) -> None:
        self.maps, self.owned = maps, [] if owned is None else owned
        self._numbers, self._lowered, self._is_tracing = ValueNumbering(), [], False

    def __call__(
        self, body: LoopBody, carry: Sequence[Tensor], inputs: Sequence[Tensor], steps: int, reverse: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the last carry and the outs of all steps, time first.

        Args:
            body: (carry, inputs of one step) -> (next carry, outs).
            carry: in the shapes that the step returns.
            inputs: time first.
            steps: the number of steps.
            reverse: run from the last step to the first.
        """
        with self._tracing():
            shared, other = self._find_shared(body, carry, inputs, steps, reverse)
        rest = [i for i in range(len(carry)) if i not in shared]
        extra = [] if other is None else [other.states[j] for j in shared.values()]

        def reduced(state: list[Tensor], row: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            width = len(row) - len(extra)
            whole = dict(zip(rest, state, strict=True)) | dict(zip(shared, row[width:], strict=True))
            new, outs = body([whole[i] for i in range(len(carry))], row[:width])
            return [new[i] for i in rest], [*outs, *state]  # another loop may share these states

        state, columns = [carry[i] for i in rest], [*inputs, *extra]
        with self._tracing():
            forward, results = self._lower(reduced, state, columns, steps, reverse)
        finals, outs, states = (
            results[: len(rest)],
            results[len(rest) : -len(rest) or None],
            results[-len(rest) or len(results) :],
        )
        if rest:
            self._remember(forward, state, columns, finals, outs, states, steps, reverse)
        last = dict(zip(rest, finals, strict=True))
        last |= {i: other.finals[j] for i, j in shared.items() if other is not None}
        return [last[i] for i in range(len(carry))], outs

    def map(self, function: Callable[[], list[Tensor]], count: int) -> list[Tensor]:
        """Return the stacked results of ``count`` runs of a function, which draw in their order.

        Raises:
            NotAlikeError: the function cannot be run for all at once.
        """

        def body(carry: list[Tensor], row: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            inside = ScanLowering(maps=False, owned=self.owned)
            with capturing_inside(inside) as assumed:
                made = function()
            conditions[:] = assumed
            return [], [*made, *assumed]

        conditions: list[Tensor] = []
        index = torch.zeros(count, device=torch.get_default_device())
        try:
            forward, results = self._lower(body, [], [index], count, reverse=False)
        except NotAlikeError:
            raise
        except Exception as error:  # whatever the program does, the loop says what is wrong with it
            raise NotAlikeError(str(error)) from error
        if drawn := [n for n in forward.graph.graph.nodes if is_random(n)]:
            raise NotAlikeError(f"{drawn[0].target} is drawn run by run")
        made = len(results) - len(conditions)
        for condition in results[made:]:
            assume(condition.all())
        return results[:made]

    def _lower(
        self, body: LoopBody, state: list[Tensor], columns: list[Tensor], steps: int, reverse: bool
    ) -> tuple[Traced, list[Tensor]]:
        """Trace a step and apply it; return the step without its gradient, and the results of all steps."""
        with disable_proxy_modes_tracing():
            results: list[Tensor] = []
            forward = trace_step(body, state, columns, results)
            step = trace_with_gradient(body, state, columns, results, forward.constants)
        bound = _BoundStep(step, steps, reverse, 1 + len(self._lowered), self.owned)
        return forward, list(_Scan.apply(bound, *step.constants, *state, *columns))

    def messages(self, pair: Tensor, node: Tensor) -> CapturedChain:
        """Return a chain with its messages: see :func:`pyro_elbo.terms.messages`."""
        self.owned.append(ChainCode(node.dtype, node.shape[-1], on_cpu([node])))
        return captured_messages(pair, node)

    def compile(self) -> None:
        """Compile the recurrences of the graph."""
        for part in self.owned:
            part.compile()

    @contextmanager
    def _tracing(self) -> Iterator[None]:
        """Refuse scans within a step while it is traced."""
        if self._is_tracing:
            raise CompileError(
                "A pe.scan within the step of another cannot be compiled: write the inner loop out, or use "
                "compile=False."
            )
        self._is_tracing = True
        try:
            yield
        finally:
            self._is_tracing = False

    def _find_shared(
        self, body: LoopBody, carry: Sequence[Tensor], inputs: Sequence[Tensor], steps: int, reverse: bool
    ) -> tuple[dict[int, int], LoweredLoop | None]:
        """Find a lowered loop that has computed parts of the carry: (index here -> index there, that loop)."""
        alike = [x for x in self._lowered if (x.steps, x.reverse) == (steps, reverse)]
        if not alike:
            return {}, None
        with disable_proxy_modes_tracing():
            step = trace_step(body, carry, inputs, [])
        graph, numbers = step.graph, self._numbers
        leaves = {p: ("constant", numbers(x)) for p, x in zip(graph.constants, step.constants, strict=True)}
        leaves |= {p: ("per step", numbers(x)) for p, x in zip(graph.inputs, inputs, strict=True)}
        for other in alike:
            if shared := shared_states(graph, leaves, [numbers(c) for c in carry], other):
                return shared, other
        return {}, None

    def _remember(
        self,
        step: Traced,
        carry: Sequence[Tensor],
        inputs: Sequence[Tensor],
        finals: Sequence[Tensor],
        outs: Sequence[Tensor],
        states: Sequence[Tensor],
        steps: int,
        reverse: bool,
    ) -> None:
        graph, numbers = step.graph, self._numbers
        leaves = {("constant", numbers(x)): p for p, x in zip(graph.constants, step.constants, strict=True)}
        leaves |= {("per step", numbers(x)): p for x, p in zip(outs, graph.outs, strict=False)}
        leaves |= {("per step", numbers(x)): p for p, x in zip(graph.inputs, inputs, strict=True)}
        starts = tuple(numbers(c) for c in carry)
        self._lowered.append(LoweredLoop(graph, steps, reverse, leaves, starts, tuple(states), tuple(finals)))
