"""Run one step of a scan, hide its sites from the handlers around the scan, and emit them stacked over time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """The context of a site of the step, as set by the handlers around the scan.

    Attributes:
        frames: all plates around the site, within the step and around the scan.
        value: its value over time, if a handler gives it; it may cover only the first steps.
        observed: whether that value, or the step's own, is an observation.
    """

    frames: tuple[Any, ...]
    value: Tensor | None
    observed: bool


ValueLookup = Callable[[str, int], Tensor | None]
"""The value that handlers give to a site (name, event dimensions) at the current step, or None."""


@dataclass(frozen=True)
class StepSite:
    """One site of one step, after all handlers within the step.

    Attributes:
        frames: its plates within the step.
        everywhere: all its plates, those around the scan included.
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
    """The parts that all steps share.

    Attributes:
        sites: the sites of the step that ran first.
        specs: their distributions without tensors; None where only the log density can be recorded.
        out_spec: the structure of the step's out.
        out_leaves: its leaves, ``Tensor`` in place of each tensor.
    """

    sites: dict[str, StepSite]
    specs: dict[str, DistributionSpec | None]
    out_spec: Any
    out_leaves: list[Any]


@dataclass(frozen=True)
class StepResult:
    """One step that has run.

    Attributes:
        carry: the next carry.
        tensors: the tensors of its sites and of its out, as :meth:`StepProgram.emit` takes them.
        sites: its sites by name.
        valid: the sequences that have this step; None if all do.
    """

    carry: Any
    tensors: list[Tensor]
    sites: dict[str, StepSite]
    valid: Tensor | None

    @property
    def carry_tensors(self) -> list[Tensor]:
        """The tensors of the carry."""
        return [x for x in pytree.tree_leaves(self.carry) if isinstance(x, Tensor)]


class _Collector(Messenger):
    """Hides the sites of a step from the handlers around the scan and collects them."""

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
            raise SiteError(f"Site '{name}' belongs to a pe.scan within the step of another: write the inner loop out.")
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


class _StepContext(Messenger):
    """Adds the plates and the scale that a site has within the step."""

    def __init__(self, site: StepSite) -> None:
        super().__init__()
        self.site = site

    def _pyro_sample(self, msg: Any) -> None:
        msg["cond_indep_stack"] = self.site.frames + msg["cond_indep_stack"]
        msg["scale"] = self.site.scale * msg["scale"]


class _FixedValue(Messenger):
    """Gives a site the value that the scan ended with, after all other handlers."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def _pyro_sample(self, msg: Any) -> None:
        msg["value"], msg["is_observed"], msg["done"] = self.value, False, True


def _check_full(name: str, fn: Any) -> None:
    if fn.subsample_size is not None and fn.subsample_size < fn.size:
        raise SiteError(
            f"Plate '{name}' draws a new subsample at every step of a scan. Put the plate around pe.scan, so that all "
            "steps see the same rows."
        )


def _check_drawn(msg: Any) -> None:
    if msg["infer"].get("enumerate"):
        raise SiteError(f"Site '{msg['name']}' cannot be enumerated in a pe.scan: draw it.")


def _check_handler(handler: Any, msg: Any) -> None:
    """Refuse handlers that replace a site by other sites, since they would do so once and not at each step."""
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
            "within the step."
        )


def _ask(msg: Any, handlers: Sequence[Any]) -> OuterContext:
    """Apply the handlers around a scan to a copy of a site's message, without recording a draw."""
    probe = dict(msg) | {"infer": dict(msg["infer"]), "stop": False}
    for handler in reversed(handlers):
        _check_handler(handler, probe)
        if not isinstance(handler, InitMessenger):  # here it would give the value of one step; emit asks for all
            handler._process_message(probe)
        _check_drawn(probe)
        if probe["stop"]:
            break
    value = probe["value"]
    return OuterContext(probe["cond_indep_stack"], None if value is msg["value"] else value, probe["is_observed"])


class StepProgram:
    """A step program and the layout that its steps share.

    Attributes:
        total: the number of steps.
        outside: the context of each site, as set by the handlers around the scan; known after the first step.
    """

    def __init__(self, step: Step, total: int) -> None:
        self.step, self.total = step, total
        self.outside: dict[str, OuterContext] = {}
        self._layout: _StepLayout | None = None
        self._drawn: set[str] = set()

    def given_at(self, t: int) -> ValueLookup:
        """Return the lookup of the values that handlers give to the sites of step ``t``."""
        return lambda name, event_dim: self._given(name, event_dim, t)

    def _given(self, name: str, event_dim: int, t: int) -> Tensor | None:
        value = self.outside[name].value
        if value is None:
            return None
        axis = value.dim() - event_dim - 1
        if axis < 0 or value.shape[axis] > self.total:
            raise SiteError(
                f"Site '{name}': expected a value for at most {self.total} steps of a scan, with time left of the "
                f"{event_dim} event dimensions, got shape {tuple(value.shape)}."
            )
        return value.select(axis, t) if t < value.shape[axis] else None

    def run(self, carry: Any, x: Any, valid: Tensor | None, t: int, given: ValueLookup) -> StepResult:
        """Run step ``t``; all steps must have the layout of the first."""
        with _Collector(t, self.outside, given) as collector:
            result = self.step(carry, x)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ArgumentError(f"pe.scan: expected step to return (carry, out), got {type(result).__name__}.")
        new, out = result
        tensors: list[Tensor] = []
        specs = {name: _append_tensors(site, tensors) for name, site in collector.sites.items()}
        leaves, out_spec = pytree.tree_flatten(out)
        layout = _StepLayout(collector.sites, specs, out_spec, [Tensor if isinstance(x, Tensor) else x for x in leaves])
        if self._layout is not None:
            _check_layout(self._layout, layout, t)
        carry = _next_carry(carry, new, valid, self._rank(), t, grows=self._layout is None)
        self._layout = self._layout or layout
        tensors += [x for x in leaves if isinstance(x, Tensor)]
        self._drawn |= {name for name, site in collector.sites.items() if not site.observed}
        return StepResult(carry, tensors, collector.sites, valid)

    def peek(self, carry: Any, x: Any, valid: Tensor | None) -> tuple[Any, StepResult]:
        """Run a step that leaves no trace in a graph or in random numbers.

        Returns:
            ``carry`` in the shapes of the next one, and the step's result.
        """
        unseen = disable_proxy_modes_tracing() if is_capturing() else torch.random.fork_rng()
        with unseen, torch.no_grad():
            result = self.run(carry, x, valid, 0, self.given_at(0))
        grow = lambda a, b: a.expand(b.shape) if isinstance(a, Tensor) else a  # noqa: E731
        return pytree.tree_map(grow, carry, result.carry), result

    def run_any(self, carry: Any, x: Any, valid: Tensor | None, given: ValueLookup) -> StepResult:
        """Run a step in place of any: its layout becomes that of all steps."""
        self._layout = None
        return self.run(carry, x, valid, 0, given)

    def given_over_time(self, sites: Mapping[str, StepSite]) -> dict[str, Tensor]:
        """Return the values that handlers give to the sites, time first."""
        result = {}
        for name, site in sites.items():
            value = self.outside[name].value
            if value is not None:
                result[name] = value.movedim(value.dim() - len(site.fn.event_shape) - 1, 0)
                if len(result[name]) < self.total:
                    raise CompileError(
                        f"Site '{name}' has values for its first steps only, which can be neither compiled nor "
                        "filtered: give values for all steps, or use compile=False."
                    )
        return result

    def _rank(self) -> int:
        """Return the number of batch dimensions that the plates use."""
        dims = [-f.dim for outside in self.outside.values() for f in outside.frames if f.dim is not None]
        return max(dims, default=0)

    def emit(self, stacked: Sequence[Tensor], valid: Tensor | None, dim: int, run: ScanRun) -> Any:
        """Emit every site once, stacked over all steps, and return the outs; ``stacked`` has time first."""
        assert self._layout is not None
        columns = iter(stacked)
        for name, site in self._layout.sites.items():
            fn, value = self._stack_site(name, site, columns, valid, run)
            self._emit_site(name, site, fn, value)
        outs = [next(columns).movedim(0, dim) if x is Tensor else x for x in self._layout.out_leaves]
        return pytree.tree_unflatten(outs, self._layout.out_spec)

    def _stack_site(
        self, name: str, site: StepSite, columns: Iterator[Tensor], valid: Tensor | None, run: ScanRun
    ) -> tuple[StackedDistribution, Tensor]:
        assert self._layout is not None
        spec, position = self._layout.specs[name], len(site.fn.batch_shape)
        tensors = [next(columns).movedim(0, position) for _ in range(1 if spec is None else spec.count)]
        value = next(columns).movedim(0, -1 - len(site.fn.event_shape))
        given = self.outside[name].value
        if given is not None and given.shape == value.shape:
            value = given
        mask = next(columns).movedim(0, -1) if isinstance(site.mask, Tensor) else site.mask
        if valid is not None:
            valid = valid.movedim(0, -1)
            mask = _ragged(name, site, valid, mask)
            if not site.fn.has_rsample:  # score functions are not masked, since later steps may depend on the draw
                tensors = [_without_gradient(x, valid, position) for x in tensors]
        steps = RecordedDensity(site.fn, value, tensors[0]) if spec is None else spec.unflatten(tensors, position)
        return StackedDistribution(steps, value, mask, run), value

    def _emit_site(self, name: str, site: StepSite, fn: StackedDistribution, value: Tensor) -> None:
        given = self.outside[name].value
        drawn_later = given is not None and given.shape != value.shape
        observed = name not in self._drawn and not drawn_later  # at all steps: a forecast is not an observation
        with _StepContext(site), _at_the_bottom(_FixedValue(value) if drawn_later else None):
            pyro.sample(name, fn, obs=value if observed else None, infer=site.infer)


@contextmanager
def _at_the_bottom(handler: Messenger | None) -> Iterator[None]:
    """Apply a handler after all others."""
    if handler is not None:
        _PYRO_STACK.insert(0, handler)
    try:
        yield
    finally:
        if handler is not None:
            _PYRO_STACK.remove(handler)


def _append_tensors(site: StepSite, tensors: list[Tensor]) -> DistributionSpec | None:
    """Append the tensors of a site's distribution (or only its log density), its value and its mask."""
    own: list[Tensor] = []
    spec = flatten_distribution(site.fn, own)
    if spec is None:
        own = [site.fn.log_prob(site.value)]
    tensors += [*own, site.value] + ([site.mask] if isinstance(site.mask, Tensor) else [])
    return spec


def _ragged(name: str, site: StepSite, valid: Tensor, mask: Tensor | bool | None) -> Tensor | bool | None:
    shape = site.fn.batch_shape
    sequences = valid.shape[:-1]
    if shape[len(shape) - len(sequences) :] != sequences:
        raise SiteError(
            f"Site '{name}' has batch shape {tuple(shape)}, but lengths are given for sequences of shape "
            f"{tuple(sequences)}. Put pe.scan, or the site, in a pyro.plate over the sequences."
        )
    return valid if mask is None or mask is True else mask if mask is False else mask & valid


def _without_gradient(x: Tensor, valid: Tensor, position: int) -> Tensor:
    """Stop the gradient of a tensor, with time at ``position``, where sequences have ended."""
    if not x.requires_grad:
        return x
    return torch.where(valid.reshape(valid.shape + (1,) * (x.dim() - position - 1)), x, x.detach())


def _check_layout(first: _StepLayout, now: _StepLayout, t: int) -> None:
    if changed := sorted(first.sites.keys() ^ now.sites.keys()):
        raise SiteError(
            f"The sites {changed} are not in every step of a scan (step {t} has {list(now.sites)}). Keep the sites "
            "and mask them (pyro.poutine.mask); draw what is shared by all steps before the scan."
        )
    for name, site in now.sites.items():
        a, b = first.specs[name], now.specs[name]
        if (a is None) != (b is None) or (a is not None and b is not None and not a.matches(b)):
            earlier = _describe(first.sites[name])
            raise SiteError(
                f"Site '{name}': step {t} of a scan has {_describe(site)}, earlier steps {earlier}. Keep its "
                "distribution and shapes: only the values of its parameters may change over time."
            )
        if isinstance(site.mask, Tensor) != isinstance(first.sites[name].mask, Tensor) or not _equal(
            site.scale, first.sites[name].scale
        ):
            raise SiteError(
                f"Site '{name}': its mask or scale differs in kind between step {t} and earlier steps. Use a mask "
                "tensor in all steps; pass a scale per step as beta."
            )
    if first.out_spec != now.out_spec or any(map(_differ, first.out_leaves, now.out_leaves)):
        raise ArgumentError(
            f"pe.scan: the out of step {t} has another structure than that of earlier steps. Return the same structure "
            "at every step, and return values that change as tensors."
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


def _describe(site: StepSite) -> str:
    batch, event = tuple(site.fn.batch_shape), tuple(site.fn.event_shape)
    return f"a {type(site.fn).__name__} of batch shape {batch} and event shape {event}"


def _next_carry(old: Any, new: Any, valid: Tensor | None, rank: int, t: int, grows: bool) -> Any:
    """Return the new carry of sequences that continue and the old carry of those that have ended.

    Raises:
        ArgumentError: if structure, shapes or dtypes differ; after the first step (``grows``) it may be larger.
    """
    olds, spec = pytree.tree_flatten(old)
    news, new_spec = pytree.tree_flatten(new)
    if spec != new_spec:
        raise ArgumentError(f"pe.scan: step {t} changes the structure of the carry: expected {spec}, got {new_spec}.")
    carry = []
    for i, (a, b) in enumerate(zip(olds, news, strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if isinstance(a, Tensor) or isinstance(b, Tensor) or _differ(a, b):
                raise ArgumentError(
                    f"pe.scan: part {i} of the carry changes from {a!r} to {b!r} in step {t}. Make it a tensor."
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
    """Broadcast ``valid`` against a part of the carry, which begins with the batch dimensions.

    Dimensions of outer plates (particles) may stand to their left.
    """
    n = valid.dim()
    for left in (rank - n, 0):
        if left >= 0 and x.shape[left : left + n] == valid.shape:
            return valid.reshape(valid.shape + (1,) * (x.dim() - left - n))
    raise ArgumentError(
        f"pe.scan: part {i} of the carry has shape {tuple(x.shape)}, but lengths are given for sequences of shape "
        f"{tuple(valid.shape)}. Let the carry begin with the dimensions of the sequences."
    )
