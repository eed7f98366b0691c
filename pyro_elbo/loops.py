"""A scan inside of a captured graph: one operator that calls the machine code of one step T times.

The step is traced once, with its gradient. What needs the carry runs inside of the operator; all else becomes part of the
graph around it, for all steps at once. Neither the graph nor its compilation grows with T.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.compile_utils import rand_ops
from torch._inductor import config as inductor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from pyro_elbo import capture
from pyro_elbo.capture import Graph
from pyro_elbo.errors import CompileError
from pyro_elbo.executable import Handles, _compile, _driver, _entry
from pyro_elbo.partition import StepGraph, Values, depending_on, recurrence

aten = torch.ops.aten
Body = Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]


# --- the operator -----------------------------------------------------------------------------------------------


@dataclass
class _Loop:
    """What the operator with its key runs: the recurrence of one step, which fills the room that it is given."""

    module: fx.GraphModule
    inputs: tuple[Tensor, ...]
    exports: tuple[tuple[torch.Size, torch.dtype], ...]
    reverse: bool
    machine: Any = None

    def room(self, carry: Sequence[Tensor], like: Tensor, steps: int) -> list[Tensor]:
        """Tensors for the carry before and after all steps, and for what each step exports; and one that pads."""
        states = [c.new_empty((steps + 1, *c.shape)) for c in carry]
        return states + [like.new_empty((steps, *shape), dtype=dtype) for shape, dtype in self.exports] + [_padding(like)]


def _padding(like: Tensor) -> Tensor:
    """One output more: Inductor's C++ wrapper (torch 2.13) takes a list of one tensor for the tensor."""
    return like.new_empty(0)


_loops: dict[int, _Loop] = {}
_library = torch.library.Library("pyro_elbo", "DEF")
_library.define("loop(Tensor[] constants, Tensor[] carry, Tensor[] inputs, int steps, int key) -> Tensor[]")


def _meta(constants: list[Tensor], carry: list[Tensor], inputs: list[Tensor], steps: int, key: int) -> list[Tensor]:
    return _loops[key].room(carry, (*carry, *inputs, *constants)[0], steps)


def _run(constants: list[Tensor], carry: list[Tensor], inputs: list[Tensor], steps: int, key: int) -> list[Tensor]:
    loop = _loops[key]
    room = _meta(constants, carry, inputs, steps, key)
    states, exports = room[: len(carry)], room[len(carry) : -1]
    for state, c in zip(states, carry, strict=True):
        state[steps if loop.reverse else 0].copy_(c)
    before, after = (slice(1, None), slice(steps)) if loop.reverse else (slice(steps), slice(1, None))
    columns = [x.unbind() for x in (*(s[before] for s in states), *inputs, *(s[after] for s in states), *exports)]
    rows = list(zip(*columns, strict=True))
    rows = rows[::-1] if loop.reverse else rows
    fixed = [_laid_out(x, like) for x, like in zip(constants, loop.inputs, strict=False)]
    if loop.machine is None:
        for row in rows:
            loop.module(*fixed, *row)
        return room
    handles = Handles(fixed), Handles(x for row in rows for x in row)
    message = _driver().run(_entry(loop.machine), handles[0].capsules, [], handles[1].capsules, steps)
    if message is not None:
        raise RuntimeError(f"The compiled step failed: {message.decode()}")
    return room


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    return x if x.stride() == like.stride() else torch.empty_strided(like.shape, like.stride(), dtype=x.dtype).copy_(x)


_library.impl("loop", _run, "CompositeExplicitAutograd")
torch.library.register_fake("pyro_elbo::loop", _meta, lib=_library)


def _key(x: Any) -> int:
    """A number that is the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(x).encode()).digest()[:7], "little")


_streams: dict[int, tuple[tuple[str, ...], tuple[Any, ...]]] = {}
_library.define("draws(int steps, bool reverse, int key) -> Tensor[]", tags=(torch.Tag.nondeterministic_seeded,))
rand_ops.append(torch.ops.pyro_elbo.draws)  # two calls with the same arguments are not the same


def _room_for_draws(steps: int, reverse: bool, key: int) -> list[Tensor]:
    rows = [torch.empty((steps, *shape), dtype=dtype, device=device) for shape, dtype, device in _streams[key][1]]
    return [*rows, _padding(rows[0])]


def _draw(steps: int, reverse: bool, key: int) -> list[Tensor]:
    """Draw for one step after the other, as a program does."""
    rows = _room_for_draws(steps, reverse, key)
    for t in reversed(range(steps)) if reverse else range(steps):
        for kind, x in zip(_streams[key][0], rows, strict=False):
            x[t].normal_() if kind == "normal" else x[t].uniform_()
    return rows


_library.impl("draws", _draw, "CompositeExplicitAutograd")
torch.library.register_fake("pyro_elbo::draws", _room_for_draws, lib=_library)


def _register(module: fx.GraphModule, inputs: Sequence[Tensor], exports: Any, reverse: bool) -> int:
    """Keep a recurrence for compilation and return the key by which the operator finds it, in any process."""
    layout = [(tuple(x.shape), x.stride(), x.dtype, x.device) for x in inputs]
    key = _key((module.code, layout, exports, reverse))
    _loops.setdefault(key, _Loop(module, tuple(inputs), exports, reverse))
    return key


def compile_pending() -> None:
    """Compile the recurrences of the loops that were captured last."""
    for loop in _loops.values():
        if loop.machine is None:
            mode = FakeTensorMode(shape_env=ShapeEnv())
            real = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in loop.inputs]
            fakes = tuple(mode.from_tensor(x, static_shapes=True) for x in real)
            with mode:
                graph = make_fx(loop.module, capture._decompositions(True))(*fakes)
            capture._write_out_alpha(graph.graph)
            loop.machine = _compile(Graph(capture._optimise(graph, mode, fakes), (), (), fakes), True)


# --- tracing one step -------------------------------------------------------------------------------------------


def _trace(function: Callable[..., Any], arguments: Sequence[Tensor]) -> tuple[fx.GraphModule, list[Tensor]]:
    """A functional graph of constants and arguments, and the constants."""
    raw = make_fx(function)(*arguments)
    with unset_fake_temporarily(), torch._C.DisableTorchFunction():  # literals of the program are real
        constants = capture._lift(raw, {})
    everything = [x.detach() for x in (*constants, *arguments)]
    with torch.no_grad(), torch._C.DisableTorchFunction():  # nothing is left to lift
        module = make_fx(functionalize(raw, remove="mutations"))(*everything)
    capture._remove_identities(module.graph)
    if any(n.target is aten.copy_.default for n in module.graph.nodes):
        raise CompileError(
            "A step of pe.scan changes a tensor in place that it did not make (a buffer, such as batch-norm statistics): "
            "a compiled scan cannot follow. Carry it from step to step, update it after the scan, or use compile=False."
        )
    return module, constants


def _fresh(x: Tensor, requires_grad: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).requires_grad_(requires_grad and x.is_floating_point())


class _Traced:
    """A step with its gradient, ready to run over time."""

    def __init__(self, body: Body, carry: Sequence[Tensor], inputs: Sequence[Tensor], steps: int) -> None:
        self.steps, train, n = steps, torch.is_grad_enabled(), len(carry)
        with disable_proxy_modes_tracing():
            state = [_fresh(c, train) for c in carry]
            rows = [_fresh(x[0], train and x.requires_grad) for x in inputs]

            def forward(*leaves: Tensor) -> list[Tensor]:
                new, outs = body(list(leaves[:n]), list(leaves[n:]))
                return [*new, *outs]

            shapes: list[Tensor] = []
            module, constants = _trace(lambda *leaves: shapes.extend(forward(*leaves)) or shapes, [*state, *rows])
            wanted = [x for x in (*state, *rows, *constants) if x.requires_grad]
            seeded = [i for i, x in enumerate(shapes) if x.requires_grad]
            seeds = [torch.empty(shapes[i].shape, dtype=shapes[i].dtype, device=shapes[i].device) for i in seeded]

            def joint(*leaves: Tensor) -> list[Tensor | None]:
                results = forward(*leaves[: len(leaves) - len(seeds)])
                ends, gradients = [results[i] for i in seeded], leaves[len(leaves) - len(seeds) :]
                return [*results, *torch.autograd.grad(ends, wanted, gradients, allow_unused=True)]

            if seeded:
                module, constants = _trace(joint, [*state, *rows, *seeds])
        self.constants, self.noise = constants, _lift_draws(module.graph)
        self.graph = self._read(module, [*state, *rows], constants, wanted, seeded, n)

    def _read(
        self, module: fx.GraphModule, leaves: list[Tensor], constants: list[Tensor], wanted: list[Tensor], seeded: list[int], n: int
    ) -> StepGraph:
        places = [node for node in module.graph.nodes if node.op == "placeholder"]
        (results,) = next(node for node in module.graph.nodes if node.op == "output").args
        k, m = len(constants), len(leaves)
        count = len(results) - (len(wanted) if seeded else 0)
        gradients = dict(zip(map(id, wanted), results[count:], strict=False))
        seeds = dict(zip(seeded, places[k + m :], strict=False))
        return StepGraph(
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
        )


@dataclass(frozen=True)
class _Draws:
    """A draw inside of a step, made for all steps before the loop."""

    place: fx.Node
    target: Any
    args: tuple[Any, ...]
    like: Tensor


def _lift_draws(graph: fx.Graph) -> list[_Draws]:
    """Make draws whose distribution depends on nothing inputs of the step."""
    draws = []
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    for node in [n for n in graph.nodes if n.target in capture._RANDOM]:
        with graph.inserting_after(last):
            last = graph.placeholder(f"draws_{len(draws)}")
        last.meta = dict(node.meta)
        draws.append(_Draws(last, node.target, tuple(capture._location_scale(node)), node.meta["val"]))
        node.replace_all_uses_with(last)
        graph.erase_node(node)
    return draws


# --- running it over time ---------------------------------------------------------------------------------------


def _over_time(
    values: Values,
    nodes: Sequence[fx.Node],
    carry: Sequence[fx.Node],
    next_carry: Sequence[fx.Node],
    init: Sequence[Tensor],
    reverse: bool,
) -> list[Tensor]:
    """Evaluate nodes for all steps, of which some need the carry of the step before; return the last carries."""
    finals: dict[fx.Node, Tensor] = {}
    start, after = dict(zip(carry, init, strict=True)), dict(zip(carry, next_carry, strict=True))
    while True:
        waiting = [c for c in carry if c not in finals]
        dependent = depending_on(waiting, nodes)
        values.evaluate(n for n in nodes if n not in dependent)
        ready = [c for c in waiting if after[c] not in dependent]
        if not ready:
            break
        for c in ready:
            new = values.stacked(after[c])
            shifted = [new[1:], start[c].unsqueeze(0)] if reverse else [start[c].unsqueeze(0), new[:-1]]
            values.over_time[c], finals[c] = torch.cat(shifted), new[0 if reverse else -1]
    if waiting:
        _loop(values, nodes, waiting, after, start, finals, reverse)
        values.evaluate(n for n in nodes if n not in values)
    return [finals[c] for c in carry]


def _loop(
    values: Values,
    nodes: Sequence[fx.Node],
    carry: Sequence[fx.Node],
    after: dict[fx.Node, fx.Node],
    start: dict[fx.Node, Tensor],
    finals: dict[fx.Node, Tensor],
    reverse: bool,
) -> None:
    part = recurrence(nodes, carry, [after[c] for c in carry], values)
    constants = [values.constant[x] for x in part.constants]
    state = [start[c].contiguous() for c in carry]
    inputs = [values.over_time[x].contiguous() for x in part.inputs]
    exports = [x.meta["val"] for x in part.exports]
    with disable_proxy_modes_tracing():
        like = [*constants, *state, *(x[0] for x in inputs), *state]
        rows = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in like]
        rows += [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in exports]
    key = _register(part.module(), rows, tuple((x.shape, x.dtype) for x in exports), reverse)
    room = torch.ops.pyro_elbo.loop(constants, state, inputs, values.steps, key)
    for c, states in zip(carry, room, strict=False):
        values.over_time[c] = states[1:] if reverse else states[:-1]
        values.over_time.setdefault(after[c], states[:-1] if reverse else states[1:])
        finals[c] = states[0 if reverse else -1]
    values.over_time |= dict(zip(part.exports, room[len(carry) :], strict=False))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, traced: "_Bound", *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.traced = traced
        ctx.set_materialize_grads(False)
        with torch._C.DisableTorchFunction():  # rows of a batch are no tensors of the program
            results = traced.forward(tensors)
        ctx.mark_non_differentiable(*(x for x, g in zip(results, traced.step.graph.gradients, strict=True) if g is None))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch._C.DisableTorchFunction():
            return None, *ctx.traced.backward(gradients)


class _Bound:
    """A traced step with the tensors of one run."""

    def __init__(self, step: _Traced, reverse: bool) -> None:
        self.step, self.reverse, self.values = step, reverse, Values(step.steps)

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The last carry and the outs of all steps."""
        graph, values = self.step.graph, self.values
        k, n = len(graph.constants), len(graph.carry)
        values.constant |= dict(zip(graph.constants, tensors[:k], strict=True))
        values.over_time |= dict(zip(graph.inputs, tensors[k + n :], strict=True))
        values.over_time |= _drawn(self.step.noise, values.steps, self.reverse)
        nodes = graph.between([*graph.next_carry, *graph.outs])
        finals = _over_time(values, nodes, graph.carry, graph.next_carry, tensors[k : k + n], self.reverse)
        return [x.clone() for x in (*finals, *map(values.stacked, graph.outs))]

    def backward(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of constants, carry and inputs."""
        graph, values, n = self.step.graph, self.values, len(self.step.graph.carry)
        carry, after, init = [], [], []
        for i, (place, given) in enumerate(zip(graph.gradients, gradients, strict=True)):
            if place is None:
                continue
            like = place.meta["val"]
            if i >= n:
                values.over_time[place] = _zeros(like, values.steps) if given is None else given
            else:
                carry.append(place)
                after.append(graph.carry_gradients[i])
                init.append(_zeros(like) if given is None else given)
        targets = [*graph.carry_gradients, *graph.input_gradients, *graph.constant_gradients]
        nodes = [x for x in graph.between(targets) if x not in values]
        finals = dict(zip(carry, _over_time(values, nodes, carry, after, init, not self.reverse), strict=True))
        return [
            *(x and values.total(x) for x in graph.constant_gradients),
            *(place and finals.get(place) for place in graph.gradients[:n]),
            *(x and values.stacked(x) for x in graph.input_gradients),
        ]


def _zeros(like: Tensor, *left: int) -> Tensor:
    return torch.zeros((*left, *like.shape), dtype=like.dtype, device=like.device)


def _drawn(draws: Sequence[_Draws], steps: int, reverse: bool) -> dict[fx.Node, Tensor]:
    """The draws of all steps; in the order of the steps where the uncompiled stream is to be followed."""
    if not draws:
        return {}
    kinds = tuple(capture._RANDOM[d.target] for d in draws)
    if inductor.fallback_random:
        shapes = tuple((tuple(d.like.shape), d.like.dtype, d.like.device) for d in draws)
        key = _key((kinds, shapes))
        _streams[key] = kinds, shapes
        rows = torch.ops.pyro_elbo.draws(steps, reverse, key)
    else:
        rows = [torch.empty((steps, *d.like.shape), dtype=d.like.dtype, device=d.like.device) for d in draws]
        rows = [x.normal_() if kind == "normal" else x.uniform_() for kind, x in zip(kinds, rows, strict=True)]
    result = {}
    for d, x in zip(draws, rows, strict=False):
        for op, number in d.args:
            x = op(x, number)
        result[d.place] = x
    return result


def captured(body: Body, carry: Sequence[Tensor], inputs: Sequence[Tensor], steps: int, reverse: bool) -> Any:
    """Run a step over time as part of the graph that is being captured.

    Args:
        body: (carry, inputs of one step) -> (next carry, outs).
        carry: of the shapes that the step makes.
        inputs: time first.
    """
    step = _Traced(body, carry, inputs, steps)
    results = _Scan.apply(_Bound(step, reverse), *step.constants, *carry, *inputs)
    return list(results[: len(carry)]), list(results[len(carry) :])
