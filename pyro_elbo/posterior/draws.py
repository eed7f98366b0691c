"""Draw from the guide many times and evaluate both programs at the draws.

Draws are made in vectorized chunks where the programs allow it, one by one where they do not. Every array has the
dimension of the draws first, then the site's plates, then its event, as in one run of the programs.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pyro_elbo.errors import ArgumentError, GuideError, SiteError
from pyro_elbo.posterior.psis import PSIS, psis
from pyro_elbo.programs import (
    Plate,
    Program,
    ResampleObserved,
    Site,
    TracePair,
    check_initialized,
    evaluating,
    find_plate_nesting,
    seeded,
    sort_by_dim,
    subsampled_rows,
    trace_pair,
    trace_program,
)
from pyro_elbo.sequences import StackedDistribution
from pyro_elbo.terms import is_point, shared_plate

Arrays = dict[str, Tensor]


class ProgramCall(NamedTuple):
    """A model, its guide and the arguments of both."""

    model: Program
    guide: Program
    args: tuple
    kwargs: Mapping[str, Any]


POINT_ESTIMATE = (
    "The guide is a point estimate (all its sites are Delta): its importance weights are constant, and k-hat, PSIS and "
    "leave-one-out say nothing about it. Use a guide with a density, e.g. AutoNormal."
)


@dataclass(frozen=True)
class Draws:
    """Draws from the guide; every array starts with the dimension of the draws, densities are nats.

    Attributes:
        latents, unconstrained, deterministics: values; the second on the real line, for continuous sites.
        log_likelihood, log_prior: per datum, unscaled, by site.
        log_p, log_q: joint densities of data and latents, and of the guide, scaled to the full data.
        local_log_p, local_log_q: the same per row of the data plate where every latent belongs to one row.
        observed: the observed values.
        plates: the plates of each site, in the order of its dimensions.
        times: the name of the dimension of time of each site that has one; it comes first in the event.
        point: whether the guide is a point estimate, whose weights are constant and mean nothing.
        vectorized: whether the programs ran on chunks of draws; if not, they ran once per draw.
        nesting: number of batch dimensions that the plates use.
        rows: the rows that subsampled plates took, the same for every draw.
        resampled: whether the draws were drawn again by their weights, which are uniform since.
    """

    latents: Arrays
    unconstrained: Arrays
    deterministics: Arrays
    log_likelihood: Arrays
    log_prior: Arrays
    log_p: Tensor
    log_q: Tensor
    local_log_p: Tensor | None
    local_log_q: Tensor | None
    observed: Arrays
    plates: dict[str, tuple[Plate, ...]]
    times: dict[str, str]
    data_plate: Plate | None
    point: bool
    vectorized: bool
    nesting: int
    rows: Arrays
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

    def smooth(self) -> PSIS:
        """Smooth the importance weights: per row where all latents are local (rows first), joint otherwise.

        Raises:
            GuideError: the guide is a point estimate.
        """
        if self.point:
            raise GuideError(POINT_ESTIMATE)
        local = self.local_log_weight
        return psis(self.log_weight if local is None else local.T)


def draw(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_samples: int,
    chunk_size: int = 250,
    seed: int | None = None,
    rows: Arrays | None = None,
) -> Draws:
    """Draw from the guide and evaluate both programs at the draws, without gradients, in evaluation mode.

    Plates that take a random subsample take the same one in every draw: ``rows`` if given.

    Raises:
        ArgumentError: ``num_samples`` is not positive.
        GuideError: an AutoGuide that has never run.
        SiteError, NonFiniteError: as from the terms.
    """
    if num_samples < 1:
        raise ArgumentError(f"num_samples must be at least 1, got {num_samples}.")
    check_initialized(guide)
    programs = ProgramCall(model, guide, args, kwargs)
    with torch.no_grad(), seeded(seed), evaluating(model, guide):
        rows = subsampled_rows(*programs) if rows is None else rows
        if rows:  # every draw sees the same rows: values per datum would otherwise belong to different data
            programs = ProgramCall(poutine.condition(model, rows), poutine.condition(guide, rows), args, kwargs)
        shapes = trace_pair(*programs)
        nesting = find_plate_nesting(*programs)
        runs = _vectorized(programs, shapes, num_samples, chunk_size, nesting)
        vectorized = runs is not None
        if runs is None:
            runs = [_collect(trace_pair(*programs), shapes, 1, nesting) for _ in range(num_samples)]
    return _concatenate(runs, shapes, vectorized, nesting, rows)


def predict(
    model: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    draws: Draws,
    seed: int,
    prior: bool = False,
    chunk_size: int = 250,
) -> tuple[Arrays, dict[str, tuple[Plate, ...]]]:
    """Draw every site of the model anew, its latents from ``draws`` unless ``prior``: one draw for each of ``draws``.

    Raises:
        NotImplementedError: a distribution cannot be sampled (``ImproperUniform``, flat priors).
    """
    program = ResampleObserved()(model)
    if draws.rows:
        program = poutine.condition(program, data=draws.rows)
    latents = {} if prior else draws.latents
    step = chunk_size if draws.vectorized else 1

    def given(start: int, count: int) -> Arrays | None:
        chunk = {
            n: _with_gaps(x[start : start + count], draws.plates[n], count, draws.nesting) for n, x in latents.items()
        }
        return chunk or None

    parts = []
    with torch.no_grad(), seeded(seed), evaluating(model):
        shapes = trace_program(program, args, kwargs, given(0, 1))
        shapes = {name: site for name, site in shapes.items() if site.role != "factor"}
        for start in range(0, len(draws.log_p), step):
            count = min(step, len(draws.log_p) - start)
            sites = trace_program(program, args, kwargs, given(start, count), count, draws.nesting)
            parts.append({n: _lead(sites[n].value, s.value.shape, count, s) for n, s in shapes.items()})
    arrays = {name: torch.cat([part[name] for part in parts]) for name in shapes}
    return arrays, {name: sort_by_dim(s.plates) for name, s in shapes.items()}


def _with_gaps(x: Tensor, plates: tuple[Plate, ...], count: int, nesting: int) -> Tensor:
    """Restore the size-one batch dimensions of a run with ``count`` draws (no dimension of draws for one)."""
    sizes = {p.dim: p.size for p in plates}
    depth = nesting if count > 1 else -min(sizes, default=0)
    batch = [sizes.get(d, 1) for d in range(-depth, 0)]
    return x.reshape((*([count] if count > 1 else []), *batch, *x.shape[1 + len(plates) :]))


def _vectorized(
    programs: ProgramCall, shapes: TracePair, num_samples: int, chunk_size: int, nesting: int
) -> list[dict[str, Any]] | None:
    """Draw in chunks inside a plate; return None where the programs do not vectorize.

    Some programs fail under a further plate, others silently mix the draws (``z.mean()``). Two draws of the first chunk
    are therefore evaluated again alone and must have the same densities. One would not do: under ``z.max()`` the draw
    with the largest z is right.
    """
    sizes = [min(chunk_size, num_samples - i) for i in range(0, num_samples, chunk_size)]
    try:
        pairs = [trace_pair(*programs, sizes[0], nesting)]
        if sizes[0] > 1 and not all(_same_alone(programs, pairs[0], shapes, i, sizes[0], nesting) for i in (0, -1)):
            return None
        rest = (trace_pair(*programs, n, nesting) for n in sizes[1:])
        return [_collect(r, shapes, n, nesting) for r, n in zip(itertools.chain(pairs, rest), sizes, strict=True)]
    except Exception:  # single runs raise it again if the program itself is at fault
        return None


def _same_alone(
    programs: ProgramCall, pair: TracePair, shapes: TracePair, index: int, count: int, nesting: int
) -> bool:
    """Return whether draw ``index`` of a vectorized run has the densities and deterministics of a run of its own."""

    def one(site: Site, like: Site) -> Tensor:
        x = _lead(site.value, like.value.shape, count, like)[index][None]
        return _with_gaps(x, sort_by_dim(like.plates), 1, nesting)

    model, guide, args, kwargs = programs
    latents = {n: one(s, shapes.model[n]) for n, s in pair.model.items() if s.role == "latent"}
    # A point site of a guide is a function of its other sites: it is computed, not given.
    own = [n for n, s in pair.guide.items() if s.role in ("latent", "auxiliary") and not is_point(s.fn)]
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
    ours = _per_plate(site.log_prob(), site.plates, count, nesting)[index]
    both = [(ours, _per_plate(alone.log_prob(), site.plates, 1, nesting)[0])]
    if site.role == "deterministic":
        both.append((_lead(site.value, alone.value.shape, count, alone)[index], alone.value))
    return all(torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-3, equal_nan=True) for a, b in both)


def _collect(pair: TracePair, shapes: TracePair, count: int, nesting: int) -> dict[str, Any]:
    """Collect values and densities of one run with ``count`` draws."""

    def value(site: Site, like: Site) -> Tensor:
        return _lead(site.value, like.value.shape, count, like)

    model = pair.model
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
            if (free := _unconstrained(site)) is not None:
                groups["unconstrained"][name] = _lead(free, _unconstrained(like).shape, count, like)
        elif site.role == "deterministic":
            groups["deterministics"][name] = value(site, like)
        if site.role != "deterministic":
            group = "log_prior" if site.role == "latent" else "log_likelihood"
            densities[group][name] = _per_plate(site.log_prob(), site.plates, count, nesting)
    return groups | densities | _weights(pair, count, nesting)


def _weights(pair: TracePair, count: int, nesting: int) -> dict[str, Any]:
    """Sum log p and log q per draw, and per row of the data plate where every site lies in it."""
    q = [s for s in pair.guide.values() if s.role in ("latent", "auxiliary")]
    p = [s for s in pair.model.values() if s.role in ("latent", "observed", "factor")]
    plate = shared_plate(s.plates for s in p if s.role == "observed")
    local = plate is not None and all(plate in s.plates for s in p + q)

    def total(sites: list[Site], keep: Plate | None) -> Tensor:
        result = torch.zeros(count, *([keep.size] if keep else []), dtype=torch.float64)
        for s in sites:
            x = s.log_prob().double()
            scale = s.scale if keep is None else s.scale * (keep.size / keep.full_size)
            x = _aligned(x * scale, count, nesting)
            dims = [d for d in range(-nesting, 0) if keep is None or d != keep.dim]
            result = result + (x.sum(dims) if dims else x)
        return result

    dtype = (p + q)[0].value.dtype if (p + q)[0].value.is_floating_point() else torch.get_default_dtype()
    out = {"log_p": total(p, None), "log_q": total(q, None), "dtype": dtype}
    return out | {
        "local_log_p": total(p, plate) if local else None,
        "local_log_q": total(q, plate) if local else None,
        "plate": plate,
    }


def _concatenate(runs: list[dict[str, Any]], shapes: TracePair, vectorized: bool, nesting: int, rows: Arrays) -> Draws:
    def join(name: str) -> Arrays:
        return {site: torch.cat([r[name][site] for r in runs]) for site in runs[0][name]}

    def join_weights(name: str) -> Any:
        return None if runs[0][name] is None else torch.cat([r[name] for r in runs]).to(runs[0]["dtype"])

    latents = [shapes.guide[n] for n, s in shapes.model.items() if s.role == "latent"]
    auxiliary = [s for s in shapes.guide.values() if s.role == "auxiliary"]
    groups = {n: join(n) for n in ("latents", "unconstrained", "deterministics", "log_likelihood", "log_prior")}
    weights = {n: join_weights(n) for n in ("log_p", "log_q", "local_log_p", "local_log_q")}
    fields: dict[str, Any] = groups | weights
    return Draws(
        **fields,
        observed={n: _drop_gaps(s.value, s) for n, s in shapes.model.items() if s.role == "observed"},
        plates={n: sort_by_dim(s.plates) for n, s in shapes.model.items()},
        times={n: s.fn.run.time for n, s in shapes.model.items() if isinstance(s.fn, StackedDistribution)},
        data_plate=runs[0]["plate"],
        point=bool(latents) and all(is_point(s.fn) for s in latents + auxiliary),
        vectorized=vectorized,
        nesting=nesting,
        rows=rows,
    )


def _unconstrained(site: Site) -> Tensor | None:
    if site.fn.support.is_discrete:
        return None
    try:
        return biject_to(site.fn.support).inv(site.value)
    except NotImplementedError:
        return None


def _lead(x: Tensor, shape: torch.Size, count: int, like: Site) -> Tensor:
    """Reshape an array of ``count`` draws to the shape of a single run, draws in front.

    Plates and particles add dimensions of size one, and ``pyro.deterministic`` counts all of them as event: only a
    single run shows the dimensions that belong to the site.
    """
    if x.numel() == count * shape.numel():
        return x.reshape((count, *_drop_gaps(x.new_empty(shape), like).shape))
    if x.numel() == shape.numel():
        alone = _drop_gaps(x.reshape(shape), like)
        return alone.expand(count, *alone.shape)
    raise RuntimeError(f"site '{like.name}' has shape {tuple(x.shape)} for {count} draws of shape {tuple(shape)}")


def _drop_gaps(x: Tensor, like: Site) -> Tensor:
    """Remove the size-one batch dimensions between plates; a deterministic keeps all dimensions as event."""
    if like.role == "deterministic":
        return x
    dims = {p.dim for p in like.plates}
    for d in range(like.event_dim - x.dim(), 0):
        if d not in dims:
            x = x.squeeze(d - like.event_dim)
    return x


def _aligned(x: Tensor, count: int, nesting: int) -> Tensor:
    """Reshape batch dimensions to (draws, nesting dims)."""
    x = x.reshape((1,) * (nesting + 1 - x.dim()) + x.shape)
    return x.expand(count, *x.shape[1:])


def _per_plate(x: Tensor, plates: tuple[Plate, ...], count: int, nesting: int) -> Tensor:
    return _aligned(x, count, nesting).reshape((count, *(p.size for p in sort_by_dim(plates))))
