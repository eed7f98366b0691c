"""One step of a scan: runs a Pyro program out of sight of the handlers around, and states its sites over time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.do_messenger import DoMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.reparam_messenger import ReparamMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils import _pytree as pytree

from pyro_elbo.assumptions import is_capturing
from pyro_elbo.errors import ArgumentError, CompileError, SiteError
from pyro_elbo.masking import unmask
from pyro_elbo.sequences.stacked import (
    DistributionSpec,
    RecordedDensity,
    ScanRun,
    StackedDistribution,
    copy_without_cache,
    flatten_distribution,
)

Step = Callable[[Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class OuterContext:
    """What the handlers around a scan say of one of its sites.

    Attributes:
        frames: all plates around the site, inside and outside of the scan.
        value: its value over time, if a handler gives it; it may end early.
        observed: whether that value, or the step's own, is an observation.
    """

    frames: tuple[Any, ...]
    value: Tensor | None
    observed: bool


ValueLookup = Callable[[str, int], Tensor | None]
"""The value that handlers give for a site (name, event dimensions) at the present step."""


@dataclass(frozen=True)
class StepSite:
    """One site of one step, after all handlers inside of the step; ``frames`` are its plates there.

    ``everywhere`` are all plates, also those around the scan.
    """

    fn: Distribution
    value: Tensor
    mask: Tensor | bool | None
    scale: float | Tensor
    frames: tuple[Any, ...]
    everywhere: tuple[Any, ...]
    infer: Any
    observed: bool


@dataclass(frozen=True)
class _StepLayout:
    """What is the same at all steps: the sites with their structures, and the out, ``Tensor`` for its tensors."""

    sites: dict[str, StepSite]
    structures: dict[str, DistributionSpec | None]
    spec: Any
    constants: list[Any]


class _Collector(Messenger):
    """Hides the sites of a step from the handlers around the scan, and keeps them."""

    def __init__(self, t: int, outside: dict[str, OuterContext], given: ValueLookup) -> None:
        super().__init__()
        self.t, self.outside, self.given = t, outside, given
        self.sites: dict[str, StepSite] = {}
        self._inside: dict[str, tuple[Any, ...]] = {}
        self._fns: dict[str, Distribution] = {}

    def _pyro_sample(self, msg: Any) -> None:
        msg["stop"] = True
        name, fn = msg["name"], msg["fn"]
        if type(fn).__name__ == "_Subsample":
            _check_full(name, fn)
            return
        if isinstance(fn, StackedDistribution):
            raise SiteError(f"Site '{name}' is that of a scan inside of a scan's step: write the inner loop out.")
        _check_drawn(msg)
        self._inside[name] = msg["cond_indep_stack"]
        if name not in self.outside:
            self.outside[name] = _ask(msg, _PYRO_STACK[: _PYRO_STACK.index(self)])
        outside = self.outside[name]
        msg["cond_indep_stack"] = outside.frames
        BroadcastMessenger._pyro_sample(msg)
        self._fns[name] = copy_without_cache(msg["fn"])
        if msg["is_observed"] and not outside.observed:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
        value = self.given(name, len(msg["fn"].event_shape))
        if value is not None:
            msg["value"], msg["done"], msg["is_observed"] = value, True, outside.observed

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if type(msg["fn"]).__name__ == "_Subsample":
            return
        if name in self.sites:
            raise SiteError(f"Site '{name}' appears twice in step {self.t} of a scan. Give each site its own name.")
        fn, mask = unmask(self._fns[name], msg["mask"])
        infer, observed, inside = dict(msg["infer"]), msg["is_observed"], self._inside[name]
        frames = msg["cond_indep_stack"]
        self.sites[name] = StepSite(fn, msg["value"], mask, msg["scale"], inside, frames, infer, observed)


class _Inside(Messenger):
    """Adds the plates and the scale that a site has inside of the step."""

    def __init__(self, site: StepSite) -> None:
        super().__init__()
        self.site = site

    def _pyro_sample(self, msg: Any) -> None:
        msg["cond_indep_stack"] = self.site.frames + msg["cond_indep_stack"]
        msg["scale"] = self.site.scale * msg["scale"]


class _Decided(Messenger):
    """Gives a site the value that the scan ended up with, after all other handlers had their say."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def _pyro_sample(self, msg: Any) -> None:
        msg["value"], msg["is_observed"], msg["done"] = self.value, False, True


def _check_full(name: str, fn: Any) -> None:
    if fn.subsample_size is not None and fn.subsample_size < fn.size:
        raise SiteError(
            f"Plate '{name}' takes a new subsample at every step of a scan. Put the plate around pe.scan, so that all "
            "steps see the same rows."
        )


def _check_drawn(msg: Any) -> None:
    if msg["infer"].get("enumerate"):
        raise SiteError(f"Site '{msg['name']}' is enumerated in a scan, which is not possible: draw it.")


def _check_handler(handler: Any, msg: Any) -> None:
    """Refuse handlers that put other sites in the place of one, which they could do once but not over time."""
    name = msg["name"]
    if isinstance(handler, ReparamMessenger):
        config = handler.config
        replaces = config.get(name) if isinstance(config, dict) else config(msg)
    else:
        replaces = handler.data.get(name) if isinstance(handler, DoMessenger) else None
    if replaces is not None:
        kind = "reparam" if isinstance(handler, ReparamMessenger) else "do"
        raise SiteError(
            f"Site '{name}': pyro.poutine.{kind} around a scan cannot replace a site of its step. Put the handler "
            "inside of the step."
        )


def _ask(msg: Any, handlers: Sequence[Any]) -> OuterContext:
    """Let the handlers around a scan process a site without telling any of them that it was drawn."""
    probe = dict(msg) | {"infer": dict(msg["infer"]), "stop": False}
    for handler in reversed(handlers):
        _check_handler(handler, probe)
        if not isinstance(handler, InitMessenger):  # gives one step's value here, all steps' at the end
            handler._process_message(probe)
        _check_drawn(probe)
        if probe["stop"]:
            break
    value = probe["value"]
    return OuterContext(probe["cond_indep_stack"], None if value is msg["value"] else value, probe["is_observed"])


class StepProgram:
    """A step program at successive times.

    Attributes:
        total: how many steps the scan has.
        outside: what the handlers around the scan say of each site, known after the first step.
        last: the sites of the step that ran last; ``valid`` says for which sequences it was real.
        width: how many tensors are kept of a step.
    """

    def __init__(self, step: Step, total: int) -> None:
        self.step, self.total = step, total
        self.outside: dict[str, OuterContext] = {}
        self.last: dict[str, StepSite] = {}
        self.valid: Tensor | None = None
        self.width = 0
        self._kept: _StepLayout | None = None
        self._drawn: set[str] = set()

    def given_at(self, t: int) -> ValueLookup:
        """What handlers give for the sites of step ``t``."""
        return lambda name, event_dim: self._given(name, event_dim, t)

    def _given(self, name: str, event_dim: int, t: int) -> Tensor | None:
        value = self.outside[name].value
        if value is None:
            return None
        axis = value.dim() - event_dim - 1
        if axis < 0 or value.shape[axis] > self.total:
            raise SiteError(
                f"Site '{name}': a value of shape {tuple(value.shape)} is given for a scan of {self.total} steps. "
                f"Expected time, at most that long, left of the {event_dim} dimensions of the event."
            )
        return value.select(axis, t) if t < value.shape[axis] else None

    def run(self, carry: Any, x: Any, valid: Tensor | None, t: int, given: ValueLookup) -> tuple[Any, list[Tensor]]:
        """One step: the next carry, and the tensors of its sites and of its out, as :meth:`emit` wants them."""
        with _Collector(t, self.outside, given) as collector:
            result = self.step(carry, x)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ArgumentError(f"pe.scan: expected step to return (carry, out), got {type(result).__name__}.")
        new, out = result
        tensors: list[Tensor] = []
        structures = {name: _tensors_of(site, tensors) for name, site in collector.sites.items()}
        leaves, spec = pytree.tree_flatten(out)
        constants = [Tensor if isinstance(x, Tensor) else x for x in leaves]
        now = _StepLayout(collector.sites, structures, spec, constants)
        if self._kept is not None:
            _compare(self._kept, now, t)
        carry = _next_carry(carry, new, valid, self._rank(), t, grows=self._kept is None)
        self._kept = self._kept or now
        tensors += [x for x in leaves if isinstance(x, Tensor)]
        self.last, self.valid, self.width = collector.sites, valid, len(tensors)
        self._drawn |= {name for name, site in collector.sites.items() if not site.observed}
        return carry, tensors

    def peek(self, carry: Any, x: Any, valid: Tensor | None) -> Any:
        """Run a step that leaves no trace, neither in a graph nor in random numbers; return ``carry`` in its shapes."""
        unseen = disable_proxy_modes_tracing() if is_capturing() else torch.random.fork_rng()
        with unseen, torch.no_grad():
            new, _ = self.run(carry, x, valid, 0, self.given_at(0))
        grow = lambda a, b: a.expand(b.shape) if isinstance(a, Tensor) else a  # noqa: E731
        return pytree.tree_map(grow, carry, new)

    def again(self, carry: Any, x: Any, valid: Tensor | None, given: ValueLookup) -> tuple[Any, list[Tensor]]:
        """A step that stands for all of them."""
        self._kept = None
        return self.run(carry, x, valid, 0, given)

    def given_over_time(self) -> dict[str, Tensor]:
        """What handlers give for the sites, time first; known after a first step."""
        assert self._kept is not None
        result = {}
        for name, site in self._kept.sites.items():
            value = self.outside[name].value
            if value is not None:
                result[name] = value.movedim(value.dim() - len(site.fn.event_shape) - 1, 0)
                if len(result[name]) < self.total:
                    raise CompileError(
                        f"Site '{name}' is given for its first steps only, which can be neither compiled nor filtered: "
                        "give all steps, or use compile=False."
                    )
        return result

    def _rank(self) -> int:
        """How many batch dimensions the plates use."""
        dims = [-f.dim for outside in self.outside.values() for f in outside.frames if f.dim is not None]
        return max(dims, default=0)

    def emit(self, stacked: Sequence[Tensor], valid: Tensor | None, dim: int, run: ScanRun) -> Any:
        """State every site once, over all steps, and return the outs; ``stacked`` has time on the left."""
        assert self._kept is not None
        columns = iter(stacked)
        for name, site in self._kept.sites.items():
            fn, value = self._stack_site(name, site, columns, valid, run)
            self._state(name, site, fn, value)
        outs = [next(columns).movedim(0, dim) if x is Tensor else x for x in self._kept.constants]
        return pytree.tree_unflatten(outs, self._kept.spec)

    def _stack_site(
        self, name: str, site: StepSite, columns: Iterator[Tensor], valid: Tensor | None, run: ScanRun
    ) -> tuple[StackedDistribution, Tensor]:
        assert self._kept is not None
        structure, position = self._kept.structures[name], len(site.fn.batch_shape)
        tensors = [next(columns).movedim(0, position) for _ in range(1 if structure is None else structure.count)]
        value = next(columns).movedim(0, -1 - len(site.fn.event_shape))
        given = self.outside[name].value
        if given is not None and given.shape == value.shape:
            value = given
        mask = next(columns).movedim(0, -1) if isinstance(site.mask, Tensor) else site.mask
        if valid is not None:
            valid = valid.movedim(0, -1)
            mask = _ragged(name, site, valid, mask)
            if not site.fn.has_rsample:  # a score function is not masked: later steps may depend on the draw
                tensors = [_without_gradient(x, valid, position) for x in tensors]
        steps = (
            RecordedDensity(site.fn, value, tensors[0]) if structure is None else structure.unflatten(tensors, position)
        )
        return StackedDistribution(steps, value, mask, run), value

    def _state(self, name: str, site: StepSite, fn: StackedDistribution, value: Tensor) -> None:
        given = self.outside[name].value
        drawn_later = given is not None and given.shape != value.shape
        observed = name not in self._drawn and not drawn_later  # at all steps: a forecast is no observation
        with _Inside(site), _at_the_bottom(_Decided(value) if drawn_later else None):
            pyro.sample(name, fn, obs=value if observed else None, infer=site.infer)


@contextmanager
def _at_the_bottom(handler: Messenger | None) -> Iterator[None]:
    """Put a handler around all others."""
    if handler is not None:
        _PYRO_STACK.insert(0, handler)
    try:
        yield
    finally:
        if handler is not None:
            _PYRO_STACK.remove(handler)


def _tensors_of(site: StepSite, tensors: list[Tensor]) -> DistributionSpec | None:
    """Append the tensors of a site: its distribution's (or its log density alone), the value, the mask."""
    own: list[Tensor] = []
    structure = flatten_distribution(site.fn, own)
    if structure is None:
        own = [site.fn.log_prob(site.value)]
    tensors += [*own, site.value] + ([site.mask] if isinstance(site.mask, Tensor) else [])
    return structure


def _ragged(name: str, site: StepSite, valid: Tensor, mask: Tensor | bool | None) -> Tensor | bool | None:
    shape = site.fn.batch_shape
    sequences = valid.shape[:-1]
    if shape[len(shape) - len(sequences) :] != sequences:
        raise SiteError(
            f"Site '{name}' has batch shape {tuple(shape)}, but lengths are given for sequences of shape "
            f"{tuple(sequences)}. Put pe.scan, or the site, into a pyro.plate over the sequences."
        )
    return valid if mask is None or mask is True else mask if mask is False else mask & valid


def _without_gradient(x: Tensor, valid: Tensor, position: int) -> Tensor:
    """A tensor with time at ``position``, and no gradient where sequences have ended."""
    if not x.requires_grad:
        return x
    return torch.where(valid.reshape(valid.shape + (1,) * (x.dim() - position - 1)), x, x.detach())


def _compare(first: _StepLayout, now: _StepLayout, t: int) -> None:
    if changed := sorted(first.sites.keys() ^ now.sites.keys()):
        raise SiteError(
            f"The sites {changed} are not in every step of a scan (step {t} has {list(now.sites)}). Keep the sites "
            "and mask them (pyro.poutine.mask); draw what is shared by all steps before the scan."
        )
    for name, site in now.sites.items():
        a, b = first.structures[name], now.structures[name]
        if (a is None) != (b is None) or (a is not None and b is not None and not a.matches(b)):
            earlier = _words(first.sites[name])
            raise SiteError(
                f"Site '{name}': step {t} of a scan has {_words(site)}, earlier steps {earlier}. Keep its "
                "distribution and shapes: only the values of its parameters may change over time."
            )
        if isinstance(site.mask, Tensor) != isinstance(first.sites[name].mask, Tensor) or not _equal(
            site.scale, first.sites[name].scale
        ):
            raise SiteError(
                f"Site '{name}': mask or scale are of another kind in step {t} than in earlier ones. Use a mask "
                "tensor in all steps; a scale per step belongs into beta."
            )
    if first.spec != now.spec or any(map(_differ, first.constants, now.constants)):
        raise ArgumentError(
            f"pe.scan: the out of step {t} is made differently from that of earlier steps. Return the same structure "
            "at every step, and make what changes a tensor."
        )


def _equal(a: float | Tensor, b: float | Tensor) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and bool((a == b).all()))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _differ(a: Any, b: Any) -> bool:
    try:
        return bool(a != b)
    except ValueError:  # arrays
        return a is not b


def _words(site: StepSite) -> str:
    batch, event = tuple(site.fn.batch_shape), tuple(site.fn.event_shape)
    return f"a {type(site.fn).__name__} of batch shape {batch} and event shape {event}"


def _next_carry(old: Any, new: Any, valid: Tensor | None, rank: int, t: int, grows: bool) -> Any:
    """The carry of sequences that go on, the old one of those that have ended.

    Raises:
        ArgumentError: it does not look like the old one. After the first step it may be larger.
    """
    olds, spec = pytree.tree_flatten(old)
    news, new_spec = pytree.tree_flatten(new)
    if spec != new_spec:
        raise ArgumentError(f"pe.scan: step {t} makes a carry of another structure: expected {spec}, got {new_spec}.")
    carry = []
    for i, (a, b) in enumerate(zip(olds, news, strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if isinstance(a, Tensor) or isinstance(b, Tensor) or _differ(a, b):
                raise ArgumentError(
                    f"pe.scan: part {i} of the carry changes from {a!r} to {b!r} in step {t}: make it a tensor."
                )
        elif a.dtype != b.dtype or not (a.shape == b.shape or (grows and _broadcasts(a, b))):
            raise ArgumentError(
                f"pe.scan: part {i} of the carry changes in step {t}: expected {a.dtype} of shape {tuple(a.shape)}, "
                f"got {b.dtype} of shape {tuple(b.shape)}. Let init have the shape and dtype that step returns."
            )
        elif valid is not None:
            b = torch.where(_over_carry(valid, b, rank, i), b, a)
        carry.append(b)
    return pytree.tree_unflatten(carry, spec)


def _broadcasts(small: Tensor, large: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(small.shape, large.shape) == large.shape
    except RuntimeError:
        return False


def _over_carry(valid: Tensor, x: Tensor, rank: int, i: int) -> Tensor:
    """``valid`` as it broadcasts against a part of the carry, whose first dimensions are the batch's.

    On their left may stand those of plates further out (particles).
    """
    n = valid.dim()
    for left in (rank - n, 0):
        if left >= 0 and x.shape[left : left + n] == valid.shape:
            return valid.reshape(valid.shape + (1,) * (x.dim() - left - n))
    raise ArgumentError(
        f"pe.scan: part {i} of the carry has shape {tuple(x.shape)}, but lengths are given for sequences of shape "
        f"{tuple(valid.shape)}. Let the carry begin with the dimensions of the sequences."
    )
