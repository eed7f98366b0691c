"""Run a model and a guide, and turn Pyro's messages into typed records.

This is the only module that reads the messages of a Pyro trace. Everything above it sees :class:`Site` values.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor
from torch.distributions import Distribution

from pyro_elbo.assumptions import defer_check, is_capturing
from pyro_elbo.errors import NonFiniteError, SiteError, count_nonfinite
from pyro_elbo.masking import masked, unmask
from pyro_elbo.programs.explain import PARTICLES, explain_failure
from pyro_elbo.sequences import Filter, StackedDistribution, fill_masked, filtering

Program = Callable[..., Any]
Role = Literal["latent", "observed", "factor", "auxiliary", "deterministic"]


class Plate(NamedTuple):
    """A vectorized plate: its name, its dimension counted from the right, and its rows here and in the data."""

    name: str
    dim: int
    size: int
    full_size: int


@dataclass(frozen=True)
class Site:
    """One sample statement of one run.

    Attributes:
        role: ``latent`` (of the model, or the guide's site of that name), ``observed``, ``factor``
            (``pyro.factor``), ``auxiliary`` (in the guide alone) or ``deterministic``.
        fn: the distribution, without its mask.
        plates: the vectorized plates around the site, outermost first, without the particles' plate.
        scale: the factor by which Pyro multiplies the log density (subsampling, ``poutine.scale``).
        mask: which entries count; None for all.
    """

    name: str
    role: Role
    fn: Distribution
    value: Tensor
    plates: tuple[Plate, ...]
    scale: float | Tensor
    mask: Tensor | bool | None

    @property
    def event_dim(self) -> int:
        """How many dimensions on the right of the value belong to one event."""
        return len(self.fn.event_shape)

    def log_prob(self) -> Tensor:
        """Log density at the value in nats: unscaled, masked, batch dimensions aligned with the plates."""
        if self.role == "observed":
            defer_check(lambda: masked(~self.fn.support.check(self.value), self.mask).logical_not().all())
        return masked(self._evaluate(self.fn.log_prob), self.mask)

    def score_parts(self) -> ScoreParts:
        """Pyro's three parts of the gradient estimator, unscaled; log density and entropy term masked."""
        return self._evaluate(self.fn.score_parts).scale_and_mask(1.0, self.mask)

    def stepwise(self) -> "Site":
        """A site of a scan with time as the innermost plate, where shapes are concerned: steps are not independent."""
        fn, mask, scale = self.fn, self.mask, self.scale
        assert isinstance(fn, StackedDistribution)
        mask = mask.unsqueeze(-1) if isinstance(mask, Tensor) else mask
        scale = scale.unsqueeze(-1) if isinstance(scale, Tensor) else scale
        if fn.counted is not None and fn.counted is not True:
            mask = fn.counted if mask is None or mask is True else mask & fn.counted
        size = fn.event_shape[0]
        plates = tuple(p._replace(dim=p.dim - 1) for p in self.plates) + (Plate(fn.run.time, -1, size, size),)
        value = fill_masked(fn.steps, self.value, mask) if self.role == "observed" else self.value
        return replace(self, fn=fn.steps, value=value, plates=plates, scale=scale, mask=mask)

    def _evaluate(self, function: Callable[[Tensor], Any]) -> Any:
        try:
            return function(self.value)
        except (ValueError, RuntimeError) as error:
            if is_capturing():
                raise
            if self.value.is_floating_point() and not torch.isfinite(self.value).all():
                raise NonFiniteError(
                    f"Site '{self.name}': {count_nonfinite(self.value)}. Remove them, or mark them as missing with "
                    "pyro.poutine.mask or obs_mask."
                ) from error
            raise SiteError(self._misfit(error)) from error

    def _misfit(self, error: Exception) -> str:
        """Say whether the value has the wrong shape or lies outside of the support, and what to do."""
        expected, got = tuple(self.fn.batch_shape + self.fn.event_shape), tuple(self.value.shape)
        kind, reason = type(self.fn).__name__, str(error).splitlines()[0]
        if "support" in reason:
            return (
                f"Site '{self.name}': the value lies outside of the support of {kind}: {reason} Choose a distribution "
                "whose support holds the data, or transform them."
            )
        return (
            f"Site '{self.name}': expected a value of shape {expected} for {kind}, got {got}: {reason} Give the "
            f"value the event shape {tuple(self.fn.event_shape)} (.to_event(n) sets it), and a plate to every other "
            "dimension."
        )


@dataclass(frozen=True)
class TracePair:
    """The sites of one guide run and of the model replayed against it, in program order."""

    model: dict[str, Site]
    guide: dict[str, Site]
    particle_dim: int | None


def sort_by_dim(plates: Iterable[Plate]) -> tuple[Plate, ...]:
    """Plates in the order of a tensor's dimensions, from left to right."""
    return tuple(sorted(plates, key=lambda p: p.dim))


def trace_pair(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_particles: int = 1,
    max_plate_nesting: int = 0,
) -> TracePair:
    """Run the guide, replay the model against it, and check one against the other.

    With ``num_particles > 1`` both run once inside a plate on the left of ``max_plate_nesting``.

    Raises:
        SiteError: the sites, shapes or plates of model and guide do not fit.
        NonFiniteError: a program failed and its arguments hold NaN or infinity.
    """
    model_trace, guide_trace = _traces(model, guide, args, kwargs, num_particles, max_plate_nesting)
    model_sites = {site.name: site for site in _read(model_trace, "latent")}
    guide_sites = {site.name: site for site in _read(guide_trace, "auxiliary", model_sites)}
    _check_pair(model_sites, guide_sites)
    return TracePair(model_sites, guide_sites, -(max_plate_nesting + 1) if num_particles > 1 else None)


def trace_filtered(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_particles: int,
    max_plate_nesting: int,
    threshold: float,
) -> tuple[TracePair, Tensor]:
    """Run model and guide side by side through time, with resampling; also return log Ẑ per sequence (nats).

    Raises:
        SiteError: a latent lies outside of the scan, or the programs do not fit each other.
    """
    model, guide = (_in_particles(p, num_particles, max_plate_nesting) for p in (model, guide))
    drawn = poutine.Trace()

    def run_guide() -> None:
        drawn.nodes.update(_trace(guide, args, kwargs).nodes)

    by = Filter(num_particles, max_plate_nesting + 1, threshold, run_guide)
    with filtering(by):
        model_trace = _trace(poutine.replay(model, trace=drawn), args, kwargs)
    model_sites = {site.name: site for site in _read(model_trace, "latent")}
    outside = [n for n, s in model_sites.items() if s.role == "latent" and not isinstance(s.fn, StackedDistribution)]
    if outside or by.log_evidence is None:
        raise SiteError(
            f"The filtering bound resamples whole particles: all latents must be drawn in one pe.scan, not {outside} "
            "outside of it. Make what is drawn before part of its first step, or use bound='importance'."
        )
    guide_sites = {site.name: site for site in _read(drawn, "auxiliary", model_sites)}
    _check_pair(model_sites, guide_sites)
    return TracePair(model_sites, guide_sites, -(max_plate_nesting + 1)), by.log_evidence


def trace_program(
    program: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    replay: Mapping[str, Tensor] | None = None,
    num_particles: int = 1,
    max_plate_nesting: int = 0,
) -> dict[str, Site]:
    """Run one program alone; sites named in ``replay`` take the values given there and stay latent."""
    program = _in_particles(program, num_particles, max_plate_nesting)
    if replay is not None:
        program = poutine.condition(program, data=dict(replay))
    sites = _read(_trace(program, args, kwargs), "latent")
    given = replay or {}
    return {s.name: replace(s, role="latent") if s.name in given else s for s in sites}


def find_plate_nesting(model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Run both programs once and return how many batch dimensions their plates use."""
    with poutine.block(), torch.no_grad():
        pair = trace_pair(model, guide, args, kwargs)
    dims = [p.dim for sites in (pair.model, pair.guide) for s in sites.values() for p in s.plates]
    return -min(dims, default=0)


def subsampled_rows(model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The rows that one run takes of each plate which takes a random subsample, by plate."""
    model_trace, guide_trace = _traces(model, guide, args, kwargs)
    nodes: dict[str, Any] = dict(guide_trace.nodes) | dict(model_trace.nodes)
    subsamples = {n: node for n, node in nodes.items() if _is_subsample(node)}
    return {n: node["value"] for n, node in subsamples.items() if len(node["value"]) < node["fn"].size}


class Unobserve(poutine.messenger.Messenger):
    """Draw observed sites anew inside the block; deterministic values and factors stay what they are."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not msg["infer"].get("_deterministic") and not isinstance(msg["fn"], Unit):
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def _in_particles(program: Program, num_particles: int, max_plate_nesting: int) -> Program:
    if num_particles == 1:
        return program
    return pyro.plate(PARTICLES, num_particles, dim=-(max_plate_nesting + 1))(program)


def _trace(program: Program, args: tuple, kwargs: Mapping[str, Any]) -> poutine.Trace:
    with explain_failure(args, kwargs):
        return poutine.trace(program).get_trace(*args, **kwargs)


def _traces(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_particles: int = 1,
    max_plate_nesting: int = 0,
) -> tuple[poutine.Trace, poutine.Trace]:
    """Trace the guide, and the model replayed against it (a guide that is a handler runs both by itself)."""
    model, program = (_in_particles(p, num_particles, max_plate_nesting) for p in (model, guide))
    unwrapped = poutine.unwrap(guide)
    if isinstance(unwrapped, poutine.messenger.Messenger):
        with explain_failure(args, kwargs):
            program(*args, **kwargs)
            return unwrapped.get_traces()
    guide_trace = _trace(program, args, kwargs)
    return _trace(poutine.replay(model, trace=guide_trace), args, kwargs), guide_trace


def _is_subsample(message: Any) -> bool:
    """Whether a message is a plate's choice of rows."""
    return type(message.get("fn")).__name__ == "_Subsample"


def _read(trace: poutine.Trace, otherwise: Role, model: Mapping[str, Site] | None = None) -> Iterator[Site]:
    nodes: dict[str, Any] = dict(trace.nodes)
    for name, message in nodes.items():
        if message["type"] == "sample" and not _is_subsample(message):
            yield _read_site(name, message, otherwise, model)


def _read_site(name: str, message: Any, otherwise: Role, model: Mapping[str, Site] | None) -> Site:
    fn, mask = unmask(message["fn"], message["mask"])
    value = message["value"]
    if message["is_observed"]:
        value = fill_masked(fn, value, mask)
    frames = [f for f in message["cond_indep_stack"] if f.dim is not None]
    plates = tuple(Plate(f.name, f.dim, int(f.size), int(f.full_size or f.size)) for f in frames if f.name != PARTICLES)
    role = otherwise
    if message["infer"].get("_deterministic"):
        role = "deterministic"
    elif model is not None:
        role = "latent" if name in model else "auxiliary"
    elif isinstance(fn, Unit):
        role = "factor"
    elif message["is_observed"]:
        role = "observed"
    site = Site(name, role, fn, value, plates, message["scale"], mask)
    if role == "auxiliary" and not (message["infer"].get("is_auxiliary") or message["is_observed"]):
        raise SiteError(
            f"Site '{name}' is in the guide but not in the model. Sample it in the model too, or, if it is an "
            "auxiliary variable of the guide, mark it with infer={'is_auxiliary': True}."
        )
    _check_batch_shape(site, {f.dim: f.size for f in frames})
    return site


def _check_batch_shape(site: Site, sizes: Mapping[int, int]) -> None:
    """Every batch dimension must belong to a plate, otherwise it is summed without anyone having said so."""
    for plate in site.plates:
        if plate.size == 0:
            raise SiteError(
                f"Site '{site.name}': plate '{plate.name}' is empty, expected at least one row. Skip empty batches."
            )
    value_batch = site.value.shape[: site.value.dim() - site.event_dim]
    for shape in (site.fn.batch_shape, value_batch):
        if any(n not in (1, sizes.get(d - len(shape), 1)) for d, n in enumerate(shape)):
            expected = tuple(sizes.get(d, 1) for d in range(min(sizes, default=0), 0))
            raise SiteError(
                f"Site '{site.name}': expected batch shape {expected} from its plates "
                f"{[p.name for p in site.plates]}, got {tuple(shape)}. Put the extra dimensions into a pyro.plate, or "
                "declare them part of one event with .to_event(n)."
            )


def _check_pair(model: Mapping[str, Site], guide: Mapping[str, Site]) -> None:
    plates = {p.name: p for site in guide.values() for p in site.plates}
    for name, site in model.items():
        for plate in site.plates:
            _check_plate(site, plate, plates.get(plate.name, plate))
        if site.role == "latent":
            if name not in guide:
                raise SiteError(
                    f"Latent site '{name}' of the model has no site in the guide, which samples {list(guide)}. Add "
                    f"pyro.sample('{name}', ...) to the guide, or observe the site."
                )
            _check_shapes(site, guide[name])
        elif site.role == "observed" and name in guide and guide[name].role != "deterministic":
            raise SiteError(
                f"Site '{name}' is observed in the model and sampled in the guide. Remove it from the guide, or do "
                "not condition the model on it."
            )


def _check_plate(site: Site, model: Plate, guide: Plate) -> None:
    """Pyro replays the rows of a guide's plate: another size would pass for a subsample, at a wrong scale."""
    if (model.size, model.full_size) != (guide.size, guide.full_size):
        raise SiteError(
            f"Site '{site.name}': plate '{model.name}' has {model.full_size} rows in the model and "
            f"{guide.full_size} in the guide (in this run {model.size} and {guide.size}). Give both programs the "
            "same data and plate sizes."
        )


def _check_shapes(model: Site, guide: Site) -> None:
    expected, got = model.fn.event_shape, guide.fn.event_shape
    if expected != got or math.prod(model.fn.batch_shape) != math.prod(guide.fn.batch_shape):
        raise SiteError(
            f"Site '{model.name}': the model expects batch shape {tuple(model.fn.batch_shape)} and event shape "
            f"{tuple(expected)}, the guide gives {tuple(guide.fn.batch_shape)} and {tuple(got)}. Use the same plates "
            "and the same .to_event(n) in both."
        )
