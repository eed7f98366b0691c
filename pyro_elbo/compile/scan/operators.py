"""Operators of a captured graph for loops over time: one runs a step's machine code, one makes the draws of a scan.

A key identifies what an operator runs. It is a hash of the content, so that graphs in Inductor's disk cache find the
same loop in another process. The executable of a graph owns the loops and streams that its operators find by key: they
live as long as it does.
"""

import ctypes
import hashlib
import logging
import weakref
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pyro_elbo.compile._torch import FakeTensorMode, ShapeEnv, config, make_fx, rand_ops
from pyro_elbo.compile.code import C_FUNCTIONS, WRITTEN_OUT, on_cpu
from pyro_elbo.compile.noise import SCAN_DRAWS, NoiseKind, fill_noise
from pyro_elbo.compile.scan.native import DECLARATIONS, NativeLoop
from pyro_elbo.compile.scan.products import write_out_products
from pyro_elbo.compile.scan.scalar_code import Layout, function_in, scalar_loop
from pyro_elbo.compile.scan.scalar_ops import UnsupportedError
from pyro_elbo.compile.store import installation

# The work of a step, in additions, up to which it is written out: a few microseconds, as long as a call would take.
SCALARS = 4096
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Loop:
    """The recurrence that the loop operator runs for a key; it writes to the tensors that it is given.

    Attributes:
        source: the C++ source of all steps, where a step is a handful of scalars.
        machine: otherwise the machine code of a step.
        native: the function that calls that for all steps, on a CPU.
    """

    key: int
    module: fx.GraphModule
    layout: Layout
    exports: tuple[tuple[torch.Size, torch.dtype], ...]
    reverse: bool
    source: str | None = None
    machine: Any = None
    native: NativeLoop | None = None

    @property
    def name(self) -> str:
        """The name of the function in ``source``."""
        return f"loop_{self.key:x}"

    def room(self, carry: Sequence[Tensor], like: Tensor, steps: int) -> list[Tensor]:
        """Make tensors for the carries around all steps and for the exports of each step."""
        states = [c.new_empty((steps + 1, *c.shape)) for c in carry]
        return states + [like.new_empty((steps, *shape), dtype=dtype) for shape, dtype in self.exports]

    def compile(self) -> None:
        """Write the recurrence as C++ source or compile a step of it, unless another graph has done so."""
        if self.source is not None or self.machine is not None:
            return
        from pyro_elbo.compile import inductor  # takes a second to import
        from pyro_elbo.compile.capture import Graph, decompositions, optimize, write_out_alpha

        mode = FakeTensorMode(shape_env=ShapeEnv())
        real = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in self.layout.like]
        fakes = tuple(mode.from_tensor(x, static_shapes=True) for x in real)
        with mode:
            graph = make_fx(self.module, decompositions(not config.fallback_random))(*fakes)
        write_out_alpha(graph.graph)
        graph = optimize(graph, mode, fakes)
        self.source = source_of(self.name, graph, self.layout, self.reverse) if on_cpu(real) else None
        if self.source is not None:
            return
        if on_cpu(real):
            places = [n for n in graph.graph.nodes if n.op == "placeholder"]
            write_out_products(graph.graph, places[: self.layout.constants])
        self.machine = inductor.code_of(Graph(graph, fakes), on_cpu(real))
        if self.machine.entry is not None:
            counts = self.layout.constants, self.layout.carry, self.layout.inputs
            self.native = NativeLoop(self.key, counts, real, self.reverse, self.machine.entry)


def source_of(name: str, graph: fx.GraphModule, layout: Layout, reverse: bool) -> str | None:
    """Return the C++ source of the whole loop where a step is a handful of scalars, otherwise None."""
    try:
        source = scalar_loop(name, graph, layout, reverse, SCALARS)
    except UnsupportedError as reason:
        _log.debug("a recurrence is called step by step: %s", reason)
        return None
    _log.debug("a recurrence is one loop over scalars:\n%s", source)
    return source


@dataclass(eq=False)
class DrawStream:
    """The draws that the draws operator makes for a key: at each step one tensor of each kind and shape."""

    key: int
    kinds: tuple[NoiseKind, ...]
    shapes: tuple[Any, ...]

    def compile(self) -> None:
        """Do nothing: it has no code of its own."""


def _padding(like: Tensor) -> Tensor:
    """Return one more output: Inductor's C++ wrapper (torch 2.13) confuses a list of one tensor with the tensor."""
    return like.new_empty(0)


_loops: MutableMapping[int, Loop] = weakref.WeakValueDictionary()
library = torch.library.Library("pyro_elbo", "DEF")
_GIVEN = "Tensor[] constants, Tensor[] carry, Tensor[] inputs, int steps, int key"
library.define(f"loop({_GIVEN}) -> Tensor[]")
library.define(f"loops({_GIVEN}, int count) -> Tensor[]")
Rows = list[Tensor]


def _room(constants: Rows, carry: Rows, inputs: Rows, steps: int, key: int) -> Rows:
    return _loops[key].room(carry, (*carry, *inputs, *constants)[0], steps)


def _room_for_loops(constants: Rows, carry: Rows, inputs: Rows, steps: int, key: int, count: int) -> Rows:
    first = [[x[0] for x in part] for part in (constants, carry, inputs)]
    room = _room(first[0], first[1], first[2], steps, key)
    return [x.new_empty((count, *x.shape)) for x in room]


def _run(constants: Rows, carry: Rows, inputs: Rows, steps: int, key: int) -> Rows:
    loop = _loops[key]
    room = _room(constants, carry, inputs, steps, key)
    if loop.native is not None:
        loop.native([*constants, *carry, *inputs], room, steps)
        return room
    fixed = [x.contiguous() for x in constants]
    if loop.source is not None:
        columns = [*fixed, *(x.contiguous() for x in (*carry, *inputs)), *room]
        addresses = (ctypes.c_void_p * len(columns))(*(x.data_ptr() for x in columns))
        function_in(loop.source, loop.name)(addresses, ctypes.c_int64(steps))
        return room
    states, exports = room[: len(carry)], room[len(carry) :]
    for state, c in zip(states, carry, strict=True):
        state[steps if loop.reverse else 0].copy_(c)
    before, after = (slice(1, None), slice(steps)) if loop.reverse else (slice(steps), slice(1, None))
    columns = [x.unbind() for x in (*(s[before] for s in states), *inputs, *(s[after] for s in states), *exports)]
    rows = list(zip(*columns, strict=True))
    for row in rows[::-1] if loop.reverse else rows:
        loop.machine.call([*fixed, *row])
    return room


def _run_loops(constants: Rows, carry: Rows, inputs: Rows, steps: int, key: int, count: int) -> Rows:
    """Run a loop ``count`` times, on rows of tensors."""
    given = constants, carry, inputs
    room = _room_for_loops(*given, steps, key, count)
    for i in range(count):
        row = [[x[i] for x in part] for part in given]
        for x, result in zip(room, _run(row[0], row[1], row[2], steps, key), strict=True):
            x[i].copy_(result)
    return room


def _written_out(steps: int, key: int, count: int = 0) -> tuple[str, str, list[tuple[int, ...]]] | None:
    """Return how a loop over scalars is written into the code of a graph: see :func:`_torch.write_out`."""
    loop = _loops[key]
    like = loop.layout.like[: loop.layout.first_result]
    if loop.source is None:
        return None
    call = f"{loop.name}_each(columns, {steps}, {count})" if count else f"{loop.name}(columns, {steps})"
    strides = []
    for i, x in enumerate(like):
        time = [x.numel()] * (i >= loop.layout.first_input)
        row = x.numel() * (steps if time else 1)
        strides.append((*([row] if count else ()), *time, *x.stride()))
    return call, loop.source, strides


for _name, _function, _fake in (("loop", _run, _room), ("loops", _run_loops, _room_for_loops)):
    library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyro_elbo::{_name}", _fake, lib=library)
    operator = getattr(torch.ops.pyro_elbo, _name).default
    C_FUNCTIONS[operator], WRITTEN_OUT[operator] = [DECLARATIONS[_name]], _written_out


def _map_loop(
    info: Any, dims: Any, constants: Rows, carry: Rows, inputs: Rows, steps: int, key: int
) -> tuple[list[Tensor], list[int]]:
    """Run the loop of each particle, under torch.vmap."""
    count = info.batch_size

    def rows(tensors: list[Tensor], at: Sequence[int | None]) -> list[Tensor]:
        pairs = zip(tensors, at, strict=True)
        return [x.expand(count, *x.shape) if d is None else x.movedim(d, 0) for x, d in pairs]

    given = (rows(x, d) for x, d in zip((constants, carry, inputs), dims, strict=False))
    room = torch.ops.pyro_elbo.loops(*given, steps, key, count)
    return room, [0] * len(room)


torch.library.register_vmap("pyro_elbo::loop", _map_loop, lib=library)


def stable_key(x: Any) -> int:
    """Return a hash that is the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(x).encode()).digest()[:7], "little")


_streams: MutableMapping[int, DrawStream] = weakref.WeakValueDictionary()
library.define("draws(int steps, bool reverse, int key) -> Tensor[]", tags=(torch.Tag.nondeterministic_seeded,))
rand_ops.append(torch.ops.pyro_elbo.draws)  # equal calls must not be merged


def register_draws(kinds: tuple[NoiseKind, ...], shapes: tuple[Any, ...]) -> DrawStream:
    """Return the stream of a step's draws, which the operator finds by key while it lives."""
    key = stable_key((kinds, shapes))
    SCAN_DRAWS[key] = kinds
    return _streams.setdefault(key, DrawStream(key, kinds, shapes))


def _room_for_draws(steps: int, reverse: bool, key: int) -> list[Tensor]:
    rows = [torch.empty((steps, *shape), dtype=dtype, device=device) for shape, dtype, device in _streams[key].shapes]
    return [*rows, _padding(rows[0])]


def _draw(steps: int, reverse: bool, key: int) -> list[Tensor]:
    """Draw step by step, in the order of an uncompiled run."""
    rows = _room_for_draws(steps, reverse, key)
    for t in reversed(range(steps)) if reverse else range(steps):
        for kind, x in zip(_streams[key].kinds, rows, strict=False):
            fill_noise(kind, x[t])
    return rows


library.impl("draws", _draw, "CompositeExplicitAutograd")
torch.library.register_fake("pyro_elbo::draws", _room_for_draws, lib=library)


def register(module: fx.GraphModule, layout: Layout, exports: Any, reverse: bool, number: int) -> Loop:
    """Return the loop of a recurrence, which the operator finds by key while it lives.

    Loops with equal keys and arguments are computed once; ``number`` distinguishes those that draw.
    """
    rows = [(tuple(x.shape), x.dtype, x.device) for x in layout.like]
    key = stable_key((module.code, rows, exports, reverse, number, config.fallback_random, installation()))
    return _loops.setdefault(key, Loop(key, module, layout, exports, reverse))
