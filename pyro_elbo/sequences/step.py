"""Run one step of a scan after another, and emit their sites stacked over time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils import _pytree as pytree

from pyro_elbo.assumptions import is_capturing
from pyro_elbo.errors import (
    ArgumentError,
    CompileError,
    NonFiniteError,
    ProgramError,
    PyroElboError,
    SiteError,
    first_sentence,
)
from pyro_elbo.failures import FAILURES, describe_arguments, explained_elsewhere, failed_line, reason_of
from pyro_elbo.sequences.carry import differ, find_event_dim, hold_ended, pair_carries
from pyro_elbo.sequences.collect import (
    Collector,
    FixedValue,
    OuterContext,
    StepContext,
    StepSite,
    Support,
    ValueLookup,
    at_the_bottom,
    plate_sizes,
)
from pyro_elbo.sequences.stacked import (
    DistributionSpec,
    Narrow,
    RecordedDensity,
    ScanRun,
    StackedDistribution,
    fill_masked,
    flatten_distribution,
)

Step = Callable[[Any, Any], tuple[Any, Any]]
_HUGE = 1e12  # a carry of this size comes from a recurrence that diverges


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
        self.one_value = False

    @property
    def supports(self) -> dict[str, Support]:
        """The sites that have all their values at once."""
        return {n: c.support for n, c in self.outside.items() if c.support is not None}

    def renew_support(self, name: str, fn: Any) -> Support:
        """Compute the values of an enumerated site anew: a capture has not seen those of a peek."""
        context, old = self.outside[name], self.supports[name]
        values = fn.enumerate_support(expand=False)
        new = replace(old, value=values.reshape(old.value.shape), before=values.reshape(old.before.shape))
        self.outside[name] = replace(context, support=new)
        return new

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
        with Collector(t, self.outside, given, self.one_value) as collector:
            try:
                result = self.step(carry, x)
            except FAILURES as error:
                self._explain_overflow(error, carry, x, t, len(collector.sites))
                _explain_step(error, carry, x, t)
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
        carry = self._next_carry(*self._without_states(carry, new, collector.sites), valid, t)
        self._layout = self._layout or layout
        outs = [x for x in leaves if isinstance(x, Tensor)]
        self._drawn |= {name for name, site in collector.sites.items() if not site.observed}
        return StepResult(carry, [*tensors, *outs], collector.sites, valid, len(outs))

    def _explain_overflow(self, error: Exception, carry: Any, x: Any, t: int, done: int) -> None:
        """Raise the library's error where a step fails since its carry has overflowed, or nearly so."""
        if is_capturing() or not isinstance(error, ValueError | RuntimeError) or isinstance(error, PyroElboError):
            return
        leaves = [x for x in pytree.tree_leaves(carry) if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
        largest = max((x.abs().nan_to_num(0.0, posinf=float("inf")).max().item() for x in leaves), default=0.0)
        if largest < _HUGE:  # NaN alone may come from the data
            return
        names = [] if self._layout is None else list(self._layout.sites)
        where = f"Site '{names[done]}', step {t} of pe.scan" if done < len(names) else f"Step {t} of pe.scan"
        raise NonFiniteError(
            f"{where}: the carry has grown to {largest:.3g}, and the step failed on it: {first_sentence(error)} "
            "Bound what is fed back through the carry, such as a scale: use softplus instead of exp."
        ) from error

    def peek(self, carry: Any, x: Any, valid: Tensor | None) -> tuple[Any, StepResult]:
        """Run a step that leaves no trace in a graph or in random numbers.

        Returns:
            ``carry`` in the shapes of the next one, and the step's result.
        """
        result = self.unseen(lambda: self.run_any(carry, x, valid, self.given_at(0)))
        grow = lambda a, b: a.expand(b.shape) if isinstance(a, Tensor) and isinstance(b, Tensor) else b  # noqa: E731
        return pytree.tree_map(grow, carry, result.carry), result

    def unseen(self, run: Callable[[], StepResult]) -> StepResult:
        """Run a step that leaves no trace in a graph or in random numbers."""
        unseen = disable_proxy_modes_tracing() if is_capturing() else torch.random.fork_rng()
        with unseen, torch.no_grad():
            return run()

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

    def _without_states(self, old: Any, new: Any, sites: Mapping[str, StepSite]) -> tuple[Any, Any]:
        """Return both carries with None in place of enumerated states: their values are those of every step."""
        states = [sites[n].value for n in self.supports]
        olds, news = pytree.tree_flatten(old), pytree.tree_flatten(new)
        if not states or olds[1] != news[1]:
            return old, new
        where = [any(x is s for s in states) for x in news[0]]
        if any(w and a is None for w, a in zip(where, olds[0], strict=True)):
            raise _missing_state(next(iter(self.supports)))
        hidden = ([None if w else x for w, x in zip(where, leaves, strict=True)] for leaves, _ in (olds, news))
        before, after = (pytree.tree_unflatten(leaves, olds[1]) for leaves in hidden)
        return before, after

    def _next_carry(self, old: Any, new: Any, valid: Tensor | None, t: int) -> Any:
        """Return the new carry of sequences that continue and the old carry of those that have ended."""
        pairs, spec = pair_carries(old, new, t, grows=self._layout is None)
        if valid is not None:
            sizes = plate_sizes(self.outside.values())
            if self._event_dims is None:  # the first step sees the shapes of init
                self._event_dims = [find_event_dim(a, b, valid.shape, sizes, i) for i, (a, b) in enumerate(pairs)]
            pairs = [hold_ended(valid, a, b, n) for (a, b), n in zip(pairs, self._event_dims, strict=True)]
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
        width = position if spec is None or site.narrow is None else len(site.narrow.batch_shape)
        tensors = [next(columns).movedim(0, width) for _ in range(1 if spec is None else spec.count)]
        value = next(columns).movedim(0, -1 - len(site.fn.event_shape))
        given = self.outside[name].value
        if given is not None and given.shape == value.shape:
            value = given
        mask = next(columns).movedim(0, -1) if isinstance(site.mask, Tensor) else site.mask
        if valid is not None:
            valid = valid.movedim(0, -1)
            mask = _ragged(name, site, valid, mask)
            # Score functions are not masked, since later steps may depend on the draw.
            if not site.fn.has_rsample and site.narrow is None:
                tensors = [_without_gradient(x, valid, position) for x in tensors]
        steps = RecordedDensity(site.fn, value, tensors[0]) if spec is None else spec.unflatten(tensors, width)
        narrow = None if spec is None or site.narrow is None else Narrow(steps, value)
        steps = steps if narrow is None else steps.expand((*site.fn.batch_shape, self.total))
        return StackedDistribution(steps, value, mask, run, narrow), value

    def _emit_site(self, name: str, site: StepSite, fn: StackedDistribution, value: Tensor) -> None:
        given = self.outside[name].value
        drawn_later = given is not None and given.shape != value.shape
        observed = name not in self._drawn and not drawn_later  # at all steps: a forecast is not an observation
        with StepContext(site), at_the_bottom(FixedValue(value) if drawn_later else None):
            support = self.outside[name].support
            infer = site.infer if support is None else site.infer | support.infer
            pyro.sample(name, fn, obs=value if observed else None, infer=infer)


def _explain_step(error: Exception, carry: Any, x: Any, t: int) -> None:
    """Raise ProgramError for a step that fails, unless the program around the scan explains its failures."""
    if explained_elsewhere.get() or is_capturing() or isinstance(error, PyroElboError):
        return
    if type(error).__module__ == "builtins":
        raise ProgramError(
            f"Step {t} of pe.scan fails. {failed_line(error)}: {reason_of(error)} The step was called with "
            f"{describe_arguments((carry, x), {})}: let it take this carry and x_t, or look at that line."
        ) from error


def _missing_state(name: str) -> ArgumentError:
    return ArgumentError(
        f"Site '{name}' is the state of a pe.scan and is summed out, but init has None in its place: all steps run at "
        "once, so that none can tell by None that it is the first. Give the first state a value of its own: with "
        "transition probabilities A of K states and initial ones p, pass init=torch.tensor(K) and draw the state from "
        "torch.cat([A, p.unsqueeze(0)])[k]."
    )


def _append_tensors(site: StepSite, tensors: list[Tensor]) -> DistributionSpec | None:
    """Append the tensors of a site's distribution (or only its log density), its value and its mask."""
    own: list[Tensor] = []
    spec = flatten_distribution(site.fn if site.narrow is None else site.narrow, own)
    if spec is None:
        value = fill_masked(site.fn, fill_masked(site.fn, site.value, site.mask), site.outside.mask)
        own = [site.fn.log_prob(value)]
    tensors += [*own, site.value] + ([site.mask] if isinstance(site.mask, Tensor) else [])
    return spec


def _ragged(name: str, site: StepSite, valid: Tensor, mask: Tensor | bool | None) -> Tensor | bool | None:
    shape = site.fn.batch_shape
    sequences = valid.shape[:-1]
    if shape[len(shape) - len(sequences) :] != sequences:
        last = -len(sequences) if sequences[-1] > 1 else -1
        aside = [f for f in site.outside.frames if f.dim is not None and f.size in sequences and f.dim < last]
        cure = (
            f"Plate '{aside[0].name}' has dimension {aside[0].dim}, and lengths belong to the last one: give it "
            "dim=-1, and make what lies right of it, such as the tones of a chord, part of one event with .to_event(n)."
            if aside
            else "Put pe.scan, or the site, in a pyro.plate over the sequences."
        )
        raise SiteError(
            f"Site '{name}' has batch shape {tuple(shape)}, but lengths are given for sequences of shape "
            f"{tuple(sequences)}. {cure}"
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
    if first.out_spec != now.out_spec or any(map(differ, first.out_leaves, now.out_leaves)):
        raise ArgumentError(
            f"pe.scan: the out of step {t} has another structure than that of earlier steps. Return the same structure "
            "at every step, and return values that change as tensors."
        )


def _equal(a: float | Tensor, b: float | Tensor) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and bool((a == b).all()))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _describe(site: StepSite) -> str:
    batch, event = tuple(site.fn.batch_shape), tuple(site.fn.event_shape)
    return f"a {type(site.fn).__name__} of batch shape {batch} and event shape {event}"
