"""Trace the model and the guide and return typed sites."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_elbo.assumptions import is_capturing
from pyro_elbo.errors import GuideError, SiteError
from pyro_elbo.programs.checks import check_pair, check_rows, mask_unobserved
from pyro_elbo.programs.data import observed_tensor
from pyro_elbo.programs.enumeration import (
    ROOM_FOR_PLATES,
    Enumerator,
    HeldDraws,
    enumerated_variables,
    separate_dimensions,
)
from pyro_elbo.programs.explain import NOTHING, PARTICLE_PLATE, explain_failure
from pyro_elbo.programs.messages import (
    GivenRows,
    Recorder,
    enumerated_sites,
    plate_nesting,
    read_guide,
    read_model,
)
from pyro_elbo.programs.outside import check_outside
from pyro_elbo.programs.sites import Site
from pyro_elbo.sequences import Filter, StackedDistribution, filtering, is_subsample

Program = Callable[..., Any]


@dataclass(frozen=True)
class TracePair:
    """The sites of one run of the guide and of the model replayed against it.

    Attributes:
        model, guide: sites by name, in program order.
        particle_dim: the batch dimension of vectorized particles, counted from the right; None without them.
        nesting: the number of batch dimensions that the plates use, without that of the particles.
    """

    model: dict[str, Site]
    guide: dict[str, Site]
    particle_dim: int | None
    nesting: int

    @property
    def enumerated(self) -> list[str]:
        """The sites that have all the values of their support, in this run or over several."""
        sites = (*self.model.values(), *self.guide.values())
        return list(dict.fromkeys(s.name for s in sites if s.is_enumerated))

    @property
    def summed_out(self) -> list[str]:
        """The latents of the model that have no site in the guide: their values are enumerated."""
        return [n for n, s in self.model.items() if s.role == "latent" and n not in self.guide]


class Traced(NamedTuple):
    """The trace of a program, and the sites that ``poutine.condition`` observes in it."""

    trace: poutine.Trace
    conditioned: Collection[str] = ()


def trace_pair(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_particles: int = 1,
    max_plate_nesting: int = 0,
) -> TracePair:
    """Trace the guide, replay the model against it, and check that they fit each other.

    With ``num_particles > 1`` both run once, in a plate on the left of ``max_plate_nesting`` others.

    Raises:
        SiteError: the sites, shapes or plates of model and guide do not fit.
        NonFiniteError: a program failed and its arguments hold NaN or infinity.
    """
    both = _trace_both(model, guide, args, kwargs, num_particles, max_plate_nesting)
    pair = pair_traces(*both, -(max_plate_nesting + 1) if num_particles > 1 else None)
    if pair.summed_out:
        drawn = HeldDraws({s.name: s.value for s in pair.guide.values() if s.is_drawn and not s.is_enumerated})

        def again(program: Program) -> dict[str, Site]:
            with drawn:
                model, guide_ = _trace_both(program, guide, args, kwargs, num_particles, max_plate_nesting)
            return read_model(model.trace, variables=enumerated_variables(guide_.trace, model.trace))

        check_outside(model, pair.model, again)
    return pair


def trace_fixed(
    pair: TracePair,
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_particles: int = 1,
    max_plate_nesting: int = 0,
) -> TracePair:
    """Run both programs again at the draws of ``pair``, as constants, in the block of :class:`SameRows` of that run.

    Sites that the guide gives as points or enumerates are computed anew. All others count as ``scored``. Batch norm in
    train mode sees the batch twice.

    Raises:
        GuideError: the programs draw random numbers outside of ``pyro.sample``, which would differ between both runs.
    """
    drawn = [s for s in pair.guide.values() if s.is_drawn and not s.is_enumerated]
    nesting = max_plate_nesting if pair.particle_dim is None else -pair.particle_dim - 1
    before = None if is_capturing() else _random_states()
    with HeldDraws({s.name: s.value.detach() for s in drawn}):
        again = trace_pair(model, guide, args, kwargs, 1 if pair.particle_dim is None else num_particles, nesting)
    if before is not None and not all(map(torch.equal, before, _random_states())):
        raise GuideError(
            "The programs draw random numbers outside of pyro.sample, such as dropout, so they cannot run twice at the "
            "same draws, as this gradient needs. Draw them by pyro.sample(..., infer={'is_auxiliary': True}) in the "
            "guide, put the modules into eval mode, or use gradient='auto'."
        )
    names = {s.name for s in drawn}
    scored = {n: replace(s, scored=True) if n in names else s for n, s in again.guide.items()}
    return replace(again, guide=scored)


def without_own_gradient(pair: TracePair, fixed: TracePair) -> TracePair:
    """Return a run whose log q loses the gradient of the guide's own parameters, which ``fixed`` has alone."""
    sites = {
        n: replace(s, fixed=fixed.guide[n]) if fixed.guide[n].scored and s.fn.has_rsample else s
        for n, s in pair.guide.items()
    }
    return replace(pair, guide=sites)


def _random_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states + (torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])


def pair_traces(model: Traced, guide: Traced, particle_dim: int | None) -> TracePair:
    """Read the traces of both programs and check that they fit each other."""
    variables = enumerated_variables(guide.trace, model.trace)
    model_sites = read_model(model.trace, model.conditioned, variables=variables)
    guide_sites = read_guide(guide.trace, model_sites, variables)
    check_pair(model_sites, guide_sites, enumerated_sites(model.trace))
    guide_sites = mask_unobserved(model_sites, guide_sites)
    return TracePair(model_sites, guide_sites, particle_dim, max(plate_nesting(t.trace) for t in (model, guide)))


def trace_filtered(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_particles: int,
    max_plate_nesting: int,
    threshold: float,
) -> tuple[TracePair, Tensor]:
    """Trace model and guide side by side through time, with resampling; also return log Ẑ per sequence (nats).

    Raises:
        SiteError: a latent lies outside the scan, or the programs do not fit each other.
    """
    model, guide = (_vectorize_particles(p, num_particles, max_plate_nesting) for p in (model, guide))
    drawn = poutine.Trace()

    def run_guide() -> None:
        drawn.nodes.update(_trace(guide, args, kwargs).trace.nodes)

    particles = Filter(num_particles, max_plate_nesting + 1, threshold, run_guide)
    with filtering(particles):
        traced = _trace(poutine.replay(model, trace=drawn), args, kwargs)
    if not particles.has_run:
        raise _outside_scan(read_model(traced.trace, traced.conditioned).values())
    pair = pair_traces(traced, Traced(drawn), -(max_plate_nesting + 1))
    both = (*pair.model.values(), *pair.guide.values())
    outside = [site for site in both if not isinstance(site.fn, StackedDistribution) and site.has_density]
    if any(site.role in ("latent", "auxiliary") for site in outside):
        raise _outside_scan(outside)
    for site in outside:
        particles.weigh(site.name, site.log_prob() if site.name in pair.model else -site.log_prob())
    return pair, particles.log_evidence()


def _outside_scan(sites: Iterable[Site]) -> SiteError:
    latents = list(dict.fromkeys(site.name for site in sites if site.role in ("latent", "auxiliary")))
    return SiteError(
        f"The filtering bound resamples whole particles: all latents must be drawn in one pe.scan, but {latents} lie "
        "outside it. Draw them in its first step, or use bound='importance'."
    )


def trace_program(
    program: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    replay: Mapping[str, Tensor] | None = None,
    num_particles: int = 1,
    max_plate_nesting: int = 0,
) -> dict[str, Site]:
    """Trace one program alone; sites named in ``replay`` take those values and stay latent."""
    program = _vectorize_particles(program, num_particles, max_plate_nesting)
    if replay is not None:
        program = poutine.condition(program, data=dict(replay))
    traced = _trace(program, args, kwargs)
    given = replay or {}
    return read_model(traced.trace, traced.conditioned - given.keys(), given)


def find_plate_nesting(model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Run both programs once and return the number of batch dimensions that their plates use."""
    with poutine.block(), torch.no_grad():
        return trace_pair(model, guide, args, kwargs).nesting


class RunData(NamedTuple):
    """The data that one run of the programs takes.

    Attributes:
        rows: the rows of each plate that takes a part of its rows, by its name.
        observed: the values of observed sites as the program gives them, NaN where they are missing.
    """

    rows: dict[str, Tensor]
    observed: dict[str, Tensor]


def read_data(model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any]) -> RunData:
    """Run both programs once and return the data that they take."""
    model_run, guide_run = _trace_both(model, guide, args, kwargs)
    nodes: dict[str, Any] = dict(guide_run.trace.nodes) | dict(model_run.trace.nodes)
    subsamples = {n: x for n, x in nodes.items() if is_subsample(x)}
    rows = {n: torch.as_tensor(x["value"]) for n, x in subsamples.items() if len(x["value"]) < x["fn"].size}
    data = {n: x["value"] for n, x in nodes.items() if x["type"] == "sample" and x["is_observed"]}
    return RunData(rows, {n: observed_tensor(x, n) for n, x in data.items()})


class SameRows(poutine.messenger.Messenger):
    """Give every run in the block the rows that its first run chose at random, plate by plate."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[tuple[str, Any, Any], Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if is_subsample(msg) and not msg["done"] and (rows := self._rows.get(self._key(msg))) is not None:
            msg["value"], msg["done"] = rows, True

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_subsample(msg):
            self._rows.setdefault(self._key(msg), msg["value"])

    @staticmethod
    def _key(msg: Any) -> tuple[str, Any, Any]:
        return msg["name"], msg["fn"].size, msg["fn"].subsample_size


class ResampleObserved(poutine.messenger.Messenger):
    """Draw the named observed sites from their distributions inside the block.

    Attributes:
        current: the observed site that is being drawn; None otherwise.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names
        self.current: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and msg["name"] in self.names:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
            self.current = msg["name"]

    def _pyro_post_sample(self, msg: Any) -> None:
        self.current = None


def _vectorize_particles(program: Program, num_particles: int, max_plate_nesting: int) -> Program:
    if num_particles == 1:
        return program
    return pyro.plate(PARTICLE_PLATE, num_particles, dim=-(max_plate_nesting + 1))(program)


def _trace(
    program: Program, args: tuple, kwargs: Mapping[str, Any], enumerated: Mapping[str, torch.Size] = NOTHING
) -> Traced:
    recorder = Recorder()
    with explain_failure(args, kwargs, enumerated):
        recorder(program)(*args, **kwargs)
    return Traced(recorder.trace, recorder.conditioned)


def _trace_both(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_particles: int = 1,
    max_plate_nesting: int = 0,
) -> tuple[Traced, Traced]:
    """Trace the model, replayed against the guide, and the guide.

    A guide that is itself a Pyro handler runs both.

    Raises:
        SiteError: they take different rows of a plate.
    """
    model, program = (_vectorize_particles(p, num_particles, max_plate_nesting) for p in (model, guide))
    unwrapped = poutine.unwrap(guide)
    if isinstance(unwrapped, poutine.messenger.Messenger):
        with explain_failure(args, kwargs):
            program(*args, **kwargs)
            model_trace, guide_trace = unwrapped.get_traces()
            return Traced(model_trace), Traced(guide_trace)
    leftmost = -2 - max_plate_nesting if num_particles > 1 else -1 - max(max_plate_nesting, ROOM_FOR_PLATES)
    in_guide = Enumerator(leftmost, is_guide=True)
    drawn = _trace(in_guide(program), args, kwargs, in_guide.shapes)
    given, in_model = GivenRows(), Enumerator(leftmost, in_guide, drawn.trace.nodes)
    values = separate_dimensions(drawn.trace) if in_guide.active else drawn.trace
    replayed = _trace(poutine.replay(in_model(given(model)), trace=values), args, kwargs, in_model.shapes)
    nodes: dict[str, Any] = dict(drawn.trace.nodes)
    for plate, rows in given.rows.items():
        if plate in nodes:
            check_rows(plate, rows, nodes[plate]["value"])
    return replayed, drawn
