"""Draw from the guide many times and evaluate both programs at the draws.

Draws are made in chunks where the programs allow it: inside a plate, or by a mapped run where programs do not
broadcast. All others are made one by one. Every array has the dimension of the draws first, then the site's plates,
then its event, as in one run of the programs.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_elbo.errors import PyroElboError, SiteError, check_count
from pyro_elbo.posterior.layout import (
    count_data,
    drop_gaps,
    largest_site,
    lead,
    lead_unconstrained,
    per_plate,
    with_gaps,
)
from pyro_elbo.posterior.mapped import are_valid, map_draws
from pyro_elbo.posterior.storage import MEMORY, Storage
from pyro_elbo.posterior.summed_out import RECORD, draw_summed_out, room_for_draws
from pyro_elbo.posterior.weights import Weighting, find_point_error, find_weighting, is_discrete, unconstrain
from pyro_elbo.programs import (
    HeldDraws,
    Plate,
    Program,
    RunData,
    Site,
    TracePair,
    check_data,
    check_initialized,
    check_programs,
    evaluating,
    find_plate_nesting,
    read_data,
    seeded,
    sort_by_dim,
    trace_pair,
    trace_program,
    without_marks,
)
from pyro_elbo.sequences import StackedDistribution

Arrays = dict[str, Tensor]
Way = Literal["plate", "map", "loop"]
MOST_ELEMENTS = 2**22  # of the largest site in one chunk of draws: 16 MB, times what its density takes


class ProgramCall(NamedTuple):
    """A model, its guide and the arguments of both."""

    model: Program
    guide: Program
    args: tuple
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Draws:
    """Draws from the guide; every array starts with the dimension of the draws, densities are nats.

    Attributes:
        latents, unconstrained, deterministics: values; the second on the real line, for continuous sites.
        discrete: names of discrete latents, which have no unconstrained value.
        log_likelihood, log_prior: per datum, unscaled, by site.
        log_p, log_q: joint densities of data and latents, and of the guide, scaled to the full data, in float64.
        local_log_p, local_log_q: the same per row of the data plate where every latent belongs to one row.
        observed: the observed values, NaN where they are missing.
        constants: what ``poutine.condition`` gave to sites that are no data.
        counted: which entries of a masked observed site count, shaped like its plates.
        plates: the plates of each site, in the order of its dimensions.
        times: the name of the dimension of time of each site that has one; it comes first in the event.
        obstacle, local_obstacle: why the joint weights, or those of a row, are not those of the posterior; None if they
            are.
        eps: relative rounding error of the densities.
        way: how the programs ran: on chunks of draws inside a ``plate``, or by a ``map`` of single runs where they do
            not broadcast, or in a ``loop`` once per draw.
        nesting: number of batch dimensions that the plates use.
        rows: the rows that subsampled plates took, the same for every draw.
        storage: where the arrays lie, and those that are made of them.
        resampled: whether the draws were drawn again by their weights, which are uniform since.
    """

    latents: Arrays
    unconstrained: Arrays
    deterministics: Arrays
    log_likelihood: Arrays
    log_prior: Arrays
    log_p: Tensor
    log_q: Tensor
    discrete: frozenset[str]
    local_log_p: Tensor | None
    local_log_q: Tensor | None
    observed: Arrays
    constants: Arrays
    counted: Arrays
    plates: dict[str, tuple[Plate, ...]]
    times: dict[str, str]
    data_plate: Plate | None
    obstacle: PyroElboError | None
    local_obstacle: PyroElboError | None
    eps: float
    way: Way
    nesting: int
    rows: Arrays
    storage: Storage
    resampled: bool = False

    @property
    def log_weight(self) -> Tensor:
        """Log p(x, z) - log q(z), the log importance weight of each draw."""
        return self.log_p - self.log_q

    @property
    def local_log_weight(self) -> Tensor | None:
        """The log importance weight per draw and row of the data plate, where all latents are local."""
        if self.local_log_p is None or self.local_log_q is None:
            return None
        return self.local_log_p - self.local_log_q

    @property
    def weights_error(self) -> PyroElboError | None:
        """Why the weights, of a row where all latents are local, are not those of the posterior; None if they are."""
        return self.obstacle if self.local_log_p is None else self.local_obstacle


class Frame(NamedTuple):
    """What all runs share.

    Attributes:
        shapes: the sites of a single run.
        weighting: how their densities add up.
        nesting: the number of batch dimensions of the plates.
        most: the largest number of draws whose densities over summed-out values fit in memory.
    """

    shapes: TracePair
    weighting: Weighting
    nesting: int
    most: float = math.inf


def draw(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_samples: int,
    chunk_size: int = 250,
    seed: int | None = None,
    rows: Arrays | None = None,
    storage: Storage = MEMORY,
) -> Draws:
    """Draw from the guide and evaluate both programs at the draws, without gradients, in evaluation mode.

    Plates that take a random subsample take the same one in every draw: ``rows`` if given. The arrays lie in
    ``storage``.

    Raises:
        ArgumentError: ``num_samples`` is not positive, or model or guide is no program.
        GuideError: an AutoGuide that has never run.
        SiteError, NonFiniteError: as from the terms.
    """
    check_count("num_samples", num_samples)
    check_programs(model, guide)
    check_initialized(guide)
    with torch.no_grad(), seeded(seed), evaluating(model, guide):
        programs, frame, data = _prepare(ProgramCall(model, guide, args, kwargs), rows)
        most = max(2, MOST_ELEMENTS // largest_site(frame.shapes.model.values()))
        chunk_size = int(min(chunk_size, frame.most, most))
        sizes = [min(chunk_size, num_samples - i) for i in range(0, num_samples, chunk_size)]
        way, first = _begin(programs, frame, sizes[0])
        later = chain.from_iterable(_run(programs, frame, count, way) for count in sizes[1:])
        return _as_draws(storage.join(chain(first, later), num_samples), frame, way, data, storage)


def draw_in_chunks(
    model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any], num_samples: int, max_elements: int
) -> Iterator[Draws]:
    """Yield draws as :func:`draw` makes them, few at a time: no array of a chunk has more than about ``max_elements``.

    Consume the chunks inside of ``torch.no_grad()``, ``seeded`` and ``evaluating``, under which they are made. The
    first one has at least two draws, so that it can tell a point estimate from a density.
    """
    programs, frame, data = _prepare(ProgramCall(model, guide, args, kwargs), None)
    size = int(min(num_samples, frame.most, max(2, max_elements // largest_site(frame.shapes.model.values()))))
    way, runs = _begin(programs, frame, size)
    yield _as_draws(MEMORY.join(runs, size), frame, way, data)
    for done in range(size, num_samples, size):
        count = min(size, num_samples - done)
        yield _as_draws(MEMORY.join(_run(programs, frame, count, way), count), frame, way, data)


def _prepare(programs: ProgramCall, rows: Arrays | None) -> tuple[ProgramCall, Frame, RunData]:
    """Fix the rows that random subsamples take, and return what all runs share."""
    model, guide, args, kwargs = programs
    data = read_data(*programs)
    rows = data.rows if rows is None else rows
    if rows:  # every draw sees the same rows: values per datum would otherwise belong to different data
        programs = ProgramCall(poutine.condition(model, rows), poutine.condition(guide, rows), args, kwargs)
        data = read_data(*programs)
    shapes = trace_pair(*programs)
    check_data(shapes.model.values())
    if any(s.is_enumerated for s in shapes.guide.values()):
        programs = programs._replace(guide=without_marks(programs.guide))
        shapes = trace_pair(*programs)
    most = room_for_draws(shapes)
    if shapes.enumerated:
        programs = programs._replace(guide=draw_summed_out(programs.model, programs.guide))
        shapes = trace_pair(*programs)
    frame = Frame(shapes, find_weighting(shapes), find_plate_nesting(*programs), most)
    return programs, frame, data._replace(rows=rows)


def _begin(programs: ProgramCall, frame: Frame, count: int) -> tuple[Way, Iterator[dict[str, Any]]]:
    """Make the first draws, and choose the way of all others: the fastest that works.

    Some programs fail under a further plate, others silently mix the draws (``z.mean()``). Two draws are therefore
    evaluated again alone and must have the same densities. One would not do: under ``z.max()`` the draw with the
    largest z is right. Programs that a plate does not suit are mapped.
    """
    for way in _FIRST_CHOICES:
        try:
            return way, iter([_FIRST_CHOICES[way](programs, frame, count)])
        except Exception:  # single runs raise it again if the program itself is at fault
            continue
    return "loop", _one_by_one(programs, frame, count)


def _run(programs: ProgramCall, frame: Frame, count: int, way: Way) -> Iterator[dict[str, Any]]:
    """Make more draws; one by one where the chosen way fails for them."""
    try:
        if way == "plate":
            return iter([_collect(trace_pair(*programs, count, frame.nesting), frame, count)])
        if way == "map":
            return iter([_mapped(programs, frame, count)["draws"]])
    except Exception:  # single runs raise it again if the program itself is at fault
        pass
    return _one_by_one(programs, frame, count)


def _one_by_one(programs: ProgramCall, frame: Frame, count: int) -> Iterator[dict[str, Any]]:
    return (_collect(trace_pair(*programs), frame, 1) for _ in range(count))


def _begin_in_plate(programs: ProgramCall, frame: Frame, count: int) -> dict[str, Any]:
    pair = trace_pair(*programs, count, frame.nesting)
    if count > 1 and not all(agrees_alone(programs, pair, frame.shapes, i, count, frame.nesting) for i in (0, -1)):
        raise RuntimeError("the draws of a plate depend on each other")
    return _collect(pair, frame, count)


def _begin_mapped(programs: ProgramCall, frame: Frame, count: int) -> dict[str, Any]:
    if count == 1:
        raise RuntimeError("there is nothing to map")
    found = _mapped(programs, frame, count)
    for i in (0, -1):
        guide = ((n, x[i][None], sort_by_dim(frame.shapes.guide[n].plates)) for n, x in found["guide"].items())
        with HeldDraws({n: with_gaps(x, plates, 1, frame.nesting) for n, x, plates in guide}):
            alone = _collect(trace_pair(*programs), frame, 1)
        both = (pytree.tree_leaves({n: draws[n] for n in alone}) for draws in (found["draws"], alone))
        if not all(x is None or _are_close(x[i], y[0]) for x, y in zip(*both, strict=True)):
            raise RuntimeError("a mapped run differs from a single one")
    return found["draws"]


_FIRST_CHOICES: dict[Way, Callable[[ProgramCall, Frame, int], dict[str, Any]]] = {
    "plate": _begin_in_plate,
    "map": _begin_mapped,
}


def _mapped(programs: ProgramCall, frame: Frame, count: int) -> dict[str, Any]:
    """Make draws by one mapped run; also return the values that the guide drew."""

    def run(_: Arrays) -> tuple[dict[str, Any], Tensor]:
        pair = trace_pair(*programs)
        drawn = {n: s for n, s in pair.guide.items() if s.is_drawn}
        values = {n: lead(s.value, frame.shapes.guide[n].value.shape, 1, s)[0] for n, s in drawn.items()}
        draws = {n: x for n, x in _collect(pair, frame, 1).items() if x is not None}
        found = {"draws": pytree.tree_map(lambda x: x[0], draws), "guide": values}
        return found, are_valid([*pair.model.values(), *pair.guide.values()])

    found = map_draws(run, {}, count)
    return found | {"draws": dict.fromkeys(("local_log_p", "local_log_q")) | found["draws"]}


def agrees_alone(
    programs: ProgramCall, pair: TracePair, shapes: TracePair, index: int, count: int, nesting: int
) -> bool:
    """Return whether draw ``index`` of a vectorized run has the densities and deterministics of a run of its own."""

    def one(site: Site, like: Site) -> Tensor:
        x = lead(site.value, like.value.shape, count, like)[index][None]
        return with_gaps(x, sort_by_dim(like.plates), 1, nesting)

    model, guide, args, kwargs = programs
    latents = {n: one(s, shapes.model[n]) for n, s in pair.model.items() if s.role == "latent"}
    # A point site of a guide is a function of its other sites: it is computed, not given.
    own = [n for n, s in pair.guide.items() if s.is_drawn]
    alone = (
        trace_program(model, args, kwargs, latents),
        trace_program(guide, args, kwargs, {n: one(pair.guide[n], shapes.guide[n]) for n in own}),
    )
    return all(
        _is_close(site, single[name], index, count, nesting)
        for together, single in zip((pair.model, pair.guide), alone, strict=True)
        for name, site in together.items()
    )


def _is_close(site: Site, alone: Site, index: int, count: int, nesting: int) -> bool:
    both = []
    if site.has_density:
        ours = per_plate(site.log_prob(), site.plates, count, nesting)[index]
        if alone.mask is None:  # the pair's masks may come from the other program (obs_mask)
            alone = replace(alone, mask=site.mask)
        both.append((ours, per_plate(alone.log_prob(), site.plates, 1, nesting)[0]))
    if site.role == "deterministic":
        both.append((lead(site.value, alone.value.shape, count, alone)[index], alone.value))
    return all(_are_close(ours, theirs) for ours, theirs in both)


def _are_close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours.double(), theirs.double(), rtol=1e-3, atol=1e-3, equal_nan=True)


def _collect(pair: TracePair, frame: Frame, count: int) -> dict[str, Any]:
    """Collect values and densities of one run with ``count`` draws."""

    def value(site: Site, like: Site) -> Tensor:
        return lead(site.value, like.value.shape, count, like)

    model, (shapes, weighting, nesting, _) = pair.model, frame
    if model.keys() != shapes.model.keys():
        raise SiteError(
            f"The sites of the model change from run to run: {sorted(model.keys() ^ shapes.model.keys())}. Draws can "
            "be put into one array only if every run has the same sites."
        )
    groups: dict[str, Arrays] = {"latents": {}, "unconstrained": {}, "deterministics": {}}
    densities: dict[str, Arrays] = {"log_likelihood": {}, "log_prior": {}}
    for name, site in model.items():
        like = shapes.model[name]
        if site.role == "latent":
            groups["latents"][name] = value(site, like)
            if (free := unconstrain(site)) is not None:
                groups["unconstrained"][name] = lead_unconstrained(free, count, like)
        elif site.role == "deterministic":
            groups["deterministics"][name] = value(site, like)
        if site.has_density:
            group = "log_prior" if site.role in ("latent", "deterministic") else "log_likelihood"
            summed = pair.guide.get(RECORD + name)
            log_p = site.log_prob() if summed is None else summed.value
            densities[group][name] = per_plate(log_p, site.plates, count, nesting)
    return groups | densities | weighting.sums(pair, count, nesting)


def _as_draws(fields: dict[str, Any], frame: Frame, way: Way, data: RunData, storage: Storage = MEMORY) -> Draws:
    shapes, weighting, nesting, _ = frame
    observed = {n: s for n, s in shapes.model.items() if s.role == "observed"}
    point = find_point_error(fields["latents"], shapes)
    return Draws(
        **fields,
        discrete=frozenset(n for n in fields["latents"] if is_discrete(shapes.model[n])),
        observed={n: drop_gaps(data.observed.get(n, s.value), s) for n, s in observed.items()},
        constants={n: drop_gaps(s.value, s) for n, s in shapes.model.items() if s.role == "constant"},
        counted={n: count_data(s, nesting) for n, s in observed.items() if s.mask is not None and s.mask is not True},
        plates={n: sort_by_dim(s.plates) for n, s in shapes.model.items()},
        times={n: s.fn.run.time for n, s in shapes.model.items() if isinstance(s.fn, StackedDistribution)},
        data_plate=weighting.plate,
        obstacle=point or weighting.obstacle,
        local_obstacle=point or weighting.local_obstacle,
        eps=weighting.eps,
        way=way,
        nesting=nesting,
        rows=data.rows,
        storage=storage,
    )
