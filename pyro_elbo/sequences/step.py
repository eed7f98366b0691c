"""Run one step of a scan, hide its sites from the handlers around the scan, and emit them stacked over time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from pyro_elbo.errors import (
    ArgumentError,
    CompileError,
    NonFiniteError,
    PyroElboError,
    SiteError,
)
from pyro_elbo.masking import unmask
from pyro_elbo.sequences.stacked import (
    DistributionSpec,
    RecordedDensity,
    ScanRun,
    StackedDistribution,
    copy_without_cache,
    fill_masked,
    flatten_distribution,
)

Step = Callable[[Any, Any], tuple[Any, Any]]
_HUGE = 1e12  # a carry of this size comes from a recurrence that diverges


@dataclass(frozen=True)
class OuterContext:
    """The context of a site of the step, as set by the handlers around the scan.

    Attributes:
        frames: all plates around the site, within the step and around the scan.
        value: its value over time, if a handler gives it; it may cover only the first steps.
        observed: whether that value, or the step's own, is an observation.
        mask: the mask of the handlers around the scan.
    """

    frames: tuple[Any, ...]
    value: Tensor | None
    observed: bool
    mask: Tensor | bool | None


ValueLookup = Callable[[str, int], Tensor | None]
"""The value that handlers give to a site (name, event dimensions) at the current step, or None."""


@dataclass(frozen=True)
class StepSite:
    """One site of one step, after all handlers within the step.

    Attributes:
        mask: its mask within the step.
        frames: its plates within the step.
        outside: its context, as set by the handlers around the scan.
    """

    fn: Distribution
    value: Tensor
    mask: Tensor | bool | None
    scale: float | Tensor
    frames: tuple[Any, ...]
    outside: OuterContext
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
        outs: the number of tensors of its out, the last of ``tensors``.
    """

    carry: Any
    tensors: list[Tensor]
    sites: dict[str, StepSite]
    valid: Tensor | None
    outs: int

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
        _check_mask(name, fn, mask)
        infer, observed, inside = dict(msg["infer"]), msg["is_observed"], self._inside[name]
        outside = self.outside[name]
        self.sites[name] = StepSite(fn, msg["value"], mask, msg["scale"], inside, outside, infer, observed)


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


def _check_mask(name: str, fn: Distribution, mask: Tensor | bool | None) -> None:
    batch = tuple(fn.batch_shape)
    if isinstance(mask, Tensor) and not _broadcasts(mask, batch):
        raise SiteError(
            f"Site '{name}': expected a mask that broadcasts to the site's batch shape {batch}, got shape "
            f"{tuple(mask.shape)}, which would count the site several times. Put the site in a pyro.plate over the "
            "dimensions of the mask, or reduce the mask."
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
    probe = dict(msg) | {"infer": dict(msg["infer"]), "stop": False, "mask": None}
    for handler in reversed(handlers):
        _check_handler(handler, probe)
        if not isinstance(handler, InitMessenger):  # here it would give the value of one step; emit asks for all
            handler._process_message(probe)
        _check_drawn(probe)
        if probe["stop"]:
            break
    value = probe["value"]
    given = None if value is msg["value"] else value
    return OuterContext(probe["cond_indep_stack"], given, probe["is_observed"], probe["mask"])


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
        self._event_dims: list[int] | None = None
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
            try:
                result = self.step(carry, x)
            except (ValueError, RuntimeError) as error:
                self._explain_overflow(error, carry, x, t, len(collector.sites))
                raise
        if not isinstance(result, tuple) or len(result) != 2:
            raise ArgumentError(f"pe.scan: expected step to return (carry, out), got {type(result).__name__}.")
        new, out = result
        tensors: list[Tensor] = []
        specs = {name: _append_tensors(site, tensors) for name, site in collector.sites.items()}
        leaves, out_spec = pytree.tree_flatten(out)
        layout = _StepLayout(collector.sites, specs, out_spec, [Tensor if isinstance(x, Tensor) else x for x in leaves])
        if self._layout is not None:
            _check_layout(self._layout, layout, t)
        carry = self._next_carry(carry, new, valid, t)
        self._layout = self._layout or layout
        outs = [x for x in leaves if isinstance(x, Tensor)]
        self._drawn |= {name for name, site in collector.sites.items() if not site.observed}
        return StepResult(carry, [*tensors, *outs], collector.sites, valid, len(outs))

    def _explain_overflow(self, error: Exception, carry: Any, x: Any, t: int, done: int) -> None:
        """Raise the library's error where a step fails since its carry has overflowed, or nearly so."""
        if is_capturing() or isinstance(error, PyroElboError):
            return
        leaves = [x for x in pytree.tree_leaves(carry) if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
        largest = max((x.abs().nan_to_num(0.0, posinf=float("inf")).max().item() for x in leaves), default=0.0)
        if largest < _HUGE:  # NaN alone may come from the data
            return
        names = [] if self._layout is None else list(self._layout.sites)
        where = f"Site '{names[done]}', step {t} of pe.scan" if done < len(names) else f"Step {t} of pe.scan"
        raise NonFiniteError(
            f"{where}: the carry has grown to {largest:.3g}, and the step failed on it: {str(error).splitlines()[0]} "
            "Bound what is fed back through the carry, such as a scale: use softplus instead of exp."
        ) from error

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

    def _next_carry(self, old: Any, new: Any, valid: Tensor | None, t: int) -> Any:
        """Return the new carry of sequences that continue and the old carry of those that have ended."""
        pairs, spec = _pair_carries(old, new, t, grows=self._layout is None)
        if valid is not None:
            sizes = plate_sizes(self.outside.values())
            if self._event_dims is None:  # the first step sees the shapes of init
                self._event_dims = [_event_dim(a, b, valid.shape, sizes, i) for i, (a, b) in enumerate(pairs)]
            pairs = [_hold_ended(valid, a, b, n) for (a, b), n in zip(pairs, self._event_dims, strict=True)]
        return pytree.tree_unflatten([b for _, b in pairs], spec)

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
        value = fill_masked(site.fn, fill_masked(site.fn, site.value, site.mask), site.outside.mask)
        own = [site.fn.log_prob(value)]
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


def _pair_carries(old: Any, new: Any, t: int, grows: bool) -> tuple[list[tuple[Any, Any]], Any]:
    """Return the leaves of the old and the new carry side by side, and their structure.

    Raises:
        ArgumentError: if structure, shapes or dtypes differ; after the first step (``grows``) it may be larger.
    """
    olds, spec = pytree.tree_flatten(old)
    news, new_spec = pytree.tree_flatten(new)
    if spec != new_spec:
        raise ArgumentError(f"pe.scan: step {t} changes the structure of the carry: expected {spec}, got {new_spec}.")
    pairs = list(zip(olds, news, strict=True))
    for i, (a, b) in enumerate(pairs):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if isinstance(a, Tensor) or isinstance(b, Tensor) or _differ(a, b):
                raise ArgumentError(
                    f"pe.scan: part {i} of the carry changes from {a!r} to {b!r} in step {t}. Make it a tensor."
                )
        elif a.dtype != b.dtype or not (a.shape == b.shape or (grows and _broadcasts(a, b.shape))):
            raise ArgumentError(
                f"pe.scan: part {i} of the carry changes in step {t}: expected {a.dtype} of shape {tuple(a.shape)}, "
                f"got {b.dtype} of shape {tuple(b.shape)}. Let init have the shape and dtype that step returns."
            )
    return pairs, spec


def _broadcasts(small: Tensor, shape: Sequence[int]) -> bool:
    try:
        return torch.broadcast_shapes(small.shape, tuple(shape)) == tuple(shape)
    except RuntimeError:
        return False


def plate_sizes(contexts: Iterable[OuterContext]) -> dict[int, int]:
    """Return the sizes of all plates by dimension."""
    return {f.dim: f.size for context in contexts for f in context.frames if f.dim is not None}


def possible_event_dims(shape: torch.Size, sequences: torch.Size, sizes: Mapping[int, int]) -> list[int]:
    """Return the possible numbers of dimensions of a tensor to the right of those of the sequences.

    Only dimensions of plates (``sizes`` by dimension) may stand to the left of the sequences.
    """
    n, rank = len(sequences), max((-dim for dim in sizes), default=0)
    found = []
    for left in range(max(rank - n, 0) + 1):
        outer = zip(shape[:left], range(-n - left, -n), strict=False)
        if shape[left : left + n] == sequences and all(size in (1, sizes.get(dim, 1)) for size, dim in outer):
            found.append(len(shape) - n - left)
    return found


def _event_dim(init: Any, x: Any, sequences: torch.Size, sizes: Mapping[int, int], i: int) -> int:
    """Return the number of dimensions of a part of the carry to the right of those of the sequences.

    Where the shape leaves a choice, init decides: it may lack the plates to the left of the sequences.

    Raises:
        ArgumentError: if the carry does not have the dimensions of the sequences, or may have them in several places.
    """
    if not isinstance(x, Tensor):
        return 0
    found = possible_event_dims(x.shape, sequences, sizes)
    if len(found) > 1:
        found = [0] if init.dim() < len(sequences) else possible_event_dims(init.shape, sequences, sizes)
    if len(found) == 1:
        return found[0]
    shape, expected = tuple(x.shape), tuple(sequences)
    if found:
        raise ArgumentError(
            f"pe.scan: part {i} of the carry has shape {shape}, where sequences of shape {expected} may stand in "
            f"{len(found)} places, next to plates of sizes {sorted(sizes.values())}. Choose another size of these "
            "plates (num_particles), or let init have the dimensions of the sequences and of its event alone."
        )
    raise ArgumentError(
        f"pe.scan: part {i} of the carry has shape {shape}, but lengths are given for sequences of shape {expected}. "
        "Let the carry begin with the dimensions of the sequences."
    )


def _hold_ended(valid: Tensor, old: Any, new: Any, event_dim: int) -> tuple[Any, Any]:
    """Return both carries, with the old one in place of the new one where sequences have ended."""
    if not isinstance(new, Tensor):
        return old, new
    return old, torch.where(valid.reshape(valid.shape + (1,) * event_dim), new, old)
