"""Hide the sites of a step from the handlers around a scan, and note what those handlers do to each."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.do_messenger import DoMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.reparam_messenger import ReparamMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import Distribution

from pyro_elbo.errors import SiteError
from pyro_elbo.masking import broadcasts, unmask
from pyro_elbo.sequences.stacked import StackedDistribution, copy_without_cache

SUMS_PATHS = "_sums_paths"
"""The entry of ``infer`` by which a handler that enumerates says that it sums over the paths of a scan's states."""


SUM_OUT = (
    "To sum a state over its paths, mark it 'parallel' in the model alone, leave it out of the guide, and use an "
    "objective of pyro_elbo; a guide draws it without a mark."
)


def is_subsample(message: Any) -> bool:
    """Return whether a message is a plate's choice of rows."""
    return type(message.get("fn")).__name__ == "_Subsample"


@dataclass(frozen=True)
class Support:
    """All values of a discrete site at once, as the handlers around the scan enumerate them.

    Attributes:
        value: the support, along a batch dimension of its own.
        before: the same values, of the step before, along another one.
        infer: what the message says of both dimensions.
    """

    value: Tensor
    before: Tensor
    infer: dict[str, Any]


@dataclass(frozen=True)
class OuterContext:
    """The context of a site of the step, as set by the handlers around the scan.

    Attributes:
        frames: all plates around the site, within the step and around the scan.
        value: its value over time, if a handler gives it; it may cover only the first steps.
        observed: whether that value, or the step's own, is an observation.
        mask: the mask of the handlers around the scan.
        support: all its values, if a handler enumerates them.
    """

    frames: tuple[Any, ...]
    value: Tensor | None
    observed: bool
    mask: Tensor | bool | None
    support: Support | None = None


ValueLookup = Callable[[str, int], Tensor | None]
"""The value that handlers give to a site (name, event dimensions) at the current step, or None."""


@dataclass(frozen=True)
class StepSite:
    """One site of one step, after all handlers within the step.

    Attributes:
        narrow: the distribution as the step wrote it, before its plates broadcast it, if all its values are enumerated.
        mask: its mask within the step.
        frames: its plates within the step.
        outside: its context, as set by the handlers around the scan.
    """

    fn: Distribution
    narrow: Distribution | None
    value: Tensor
    mask: Tensor | bool | None
    scale: float | Tensor
    frames: tuple[Any, ...]
    outside: OuterContext
    infer: Any
    observed: bool


class Collector(Messenger):
    """Hides the sites of a step from the handlers around the scan and collects them.

    Args:
        t: the step.
        outside: the context of each site around the scan, filled by the first step.
        given: the values that handlers give to the sites.
        one: give an enumerated site one value of its support in place of all.
    """

    def __init__(self, t: int, outside: dict[str, OuterContext], given: ValueLookup, one: bool = False) -> None:
        super().__init__()
        self.t, self.outside, self.given, self.one = t, outside, given, one
        self.sites: dict[str, StepSite] = {}
        self._inside: dict[str, tuple[Any, ...]] = {}
        self._fns: dict[str, Distribution] = {}
        self._narrow: dict[str, Distribution] = {}

    def _pyro_sample(self, msg: Any) -> None:
        msg["stop"] = True
        name, fn = msg["name"], msg["fn"]
        if is_subsample(msg):
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
        if outside.support is not None:
            self._narrow[name] = unmask(copy_without_cache(fn), None)[0]
        BroadcastMessenger._pyro_sample(msg)
        self._fns[name] = copy_without_cache(msg["fn"])
        if msg["is_observed"] and not outside.observed:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
        value = self.given(name, len(msg["fn"].event_shape))
        if outside.support is not None:
            value = outside.support.value[:1] if self.one else outside.support.value
        if value is not None:
            msg["value"], msg["done"], msg["is_observed"] = value, True, outside.observed

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if is_subsample(msg):
            return
        if name in self.sites:
            raise SiteError(f"Site '{name}' appears twice in step {self.t} of a scan. Give each site its own name.")
        fn, mask = unmask(self._fns[name], msg["mask"])
        _check_mask(name, fn, mask)
        infer, observed, inside = dict(msg["infer"]), msg["is_observed"], self._inside[name]
        outside = self.outside[name]
        self.sites[name] = StepSite(
            fn, self._narrow.get(name), msg["value"], mask, msg["scale"], inside, outside, infer, observed
        )


class StepContext(Messenger):
    """Adds the plates and the scale that a site has within the step."""

    def __init__(self, site: StepSite) -> None:
        super().__init__()
        self.site = site

    def _pyro_sample(self, msg: Any) -> None:
        msg["cond_indep_stack"] = self.site.frames + msg["cond_indep_stack"]
        msg["scale"] = self.site.scale * msg["scale"]


class FixedValue(Messenger):
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
    if isinstance(mask, Tensor) and not broadcasts(mask, batch):
        raise SiteError(
            f"Site '{name}': expected a mask that broadcasts to the site's batch shape {batch}, got shape "
            f"{tuple(mask.shape)}, which would count the site several times. Put the site in a pyro.plate over the "
            "dimensions of the mask, or reduce the mask."
        )


def _check_drawn(msg: Any) -> None:
    if msg["infer"].get("enumerate", "parallel") not in (None, "parallel"):
        raise SiteError(
            f"Site '{msg['name']}' cannot be enumerated in a pe.scan as {msg['infer']['enumerate']!r}. {SUM_OUT}"
        )


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
    """Apply the handlers around a scan to copies of a site's message, without recording a draw."""
    probe = _probe(msg, handlers)
    value, support = probe["value"], None
    if probe["infer"].get("_enumerate_dim") is not None:
        if not probe["infer"].get(SUMS_PATHS):
            raise SiteError(
                f"Site '{msg['name']}' of a pe.scan is enumerated where nothing sums over its paths: by a mark in the "
                f"guide, or by TraceEnum_ELBO. {SUM_OUT}"
            )
        support = _support(probe, _probe(msg | {"name": f"{msg['name']} before"}, handlers))
    given = None if value is msg["value"] or support is not None else value
    return OuterContext(probe["cond_indep_stack"], given, probe["is_observed"], probe["mask"], support)


def _support(now: Any, before: Any) -> Support:
    dims = [m["infer"]["_enumerate_dim"] for m in (now, before)]
    ids = {d: m["infer"]["_dim_to_id"][d] for d, m in zip(dims, (now, before), strict=True)}
    infer = {"_enumerate_dim": dims[0], "_enumerate_before": dims[1], "_dim_to_id": ids}
    return Support(now["value"], before["value"], infer)


def _probe(msg: Any, handlers: Sequence[Any]) -> Any:
    probe = dict(msg) | {"infer": dict(msg["infer"]), "stop": False, "mask": None}
    for handler in reversed(handlers):
        _check_handler(handler, probe)
        if not isinstance(handler, InitMessenger):  # here it would give the value of one step; emit asks for all
            handler._process_message(probe)
        _check_drawn(probe)
        if probe["stop"]:
            break
    return probe


@contextmanager
def at_the_bottom(handler: Messenger | None) -> Iterator[None]:
    """Apply a handler after all others."""
    if handler is not None:
        _PYRO_STACK.insert(0, handler)
    try:
        yield
    finally:
        if handler is not None:
            _PYRO_STACK.remove(handler)


def plate_sizes(contexts: Iterable[OuterContext]) -> dict[int, int]:
    """Return the sizes of all plates by dimension."""
    return {f.dim: f.size for context in contexts for f in context.frames if f.dim is not None}
