"""Programs -> many draws from the guide with everything that importance weights and ArviZ need.

Draws come in chunks, vectorised where the programs allow it and one by one where they do not. The shapes of one
ordinary run decide what every array looks like: draws first, then the site's plates, then its event.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_elbo.errors import ArgumentError, GuideError, PyroElboError
from pyro_elbo.psis import PSIS, psis
from pyro_elbo.sites import (
    Plate,
    Program,
    Run,
    Site,
    Unobserve,
    check_initialised,
    guess_plate_nesting,
    run,
    trace_program,
)
from pyro_elbo.terms import is_one, is_point, shared_plate

Arrays = dict[str, Tensor]


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
        point: whether the guide is a point estimate, whose weights are constant and mean nothing.
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
    data_plate: Plate | None
    point: bool
    resampled: bool = False

    @property
    def log_weight(self) -> Tensor:
        """Log p(x, z) - log q(z): the log importance weight of each draw."""
        return self.log_p - self.log_q

    @property
    def local_log_weight(self) -> Tensor | None:
        """The log importance weight per draw and row of the data plate, where all latents are local."""
        if self.local_log_p is None or self.local_log_q is None:
            return None
        return self.local_log_p - self.local_log_q

    def smooth(self) -> PSIS:
        """Pareto-smoothed weights: per row where all latents are local (rows first), joint otherwise.

        Raises:
            GuideError: the guide is a point estimate.
        """
        if self.point:
            raise GuideError(
                "The guide is a point estimate (all its sites are Delta): its importance weights are constant, and "
                "k-hat and PSIS say nothing about it. Use a guide with a density, e.g. AutoNormal."
            )
        local = self.local_log_weight
        return psis(self.log_weight if local is None else local.T)

    def resample(self, generator: torch.Generator) -> "Draws":
        """Draw with replacement in proportion to the smoothed weights; what is returned has uniform weights."""
        weights = self.smooth().log_weights.exp()
        count = len(self.log_p)
        index = torch.multinomial(weights, count, replacement=True, generator=generator)
        if self.data_plate is None or self.local_log_p is None or self.local_log_q is None:
            return replace(self._take(lambda x, _: x[index]), resampled=True)
        name = self.data_plate.name
        rows = index.T

        def by_row(x: Tensor, plates: tuple[Plate, ...]) -> Tensor:
            dim = 1 + [p.name for p in plates].index(name) if name in (p.name for p in plates) else None
            if dim is None:
                return x
            shape = [1] * x.dim()
            shape[0], shape[dim] = rows.shape
            return x.gather(0, rows.reshape(shape).expand_as(x))

        taken = self._take(by_row)
        local_p, local_q = self.local_log_p.gather(0, rows), self.local_log_q.gather(0, rows)
        scale = self.data_plate.full_size / self.data_plate.size
        return replace(
            taken,
            log_p=local_p.sum(1) * scale,
            log_q=local_q.sum(1) * scale,
            local_log_p=local_p,
            local_log_q=local_q,
            resampled=True,
        )

    def _take(self, pick: Callable[[Tensor, tuple[Plate, ...]], Tensor]) -> "Draws":
        def every(arrays: Arrays) -> Arrays:
            return {name: pick(x, self.plates[name]) for name, x in arrays.items()}

        names = ("latents", "unconstrained", "deterministics", "log_likelihood", "log_prior")
        fields: dict[str, Any] = {name: every(getattr(self, name)) for name in names}
        return replace(self, **fields, log_p=pick(self.log_p, ()), log_q=pick(self.log_q, ()))


def draw(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_samples: int,
    chunk_size: int = 250,
    seed: int | None = None,
) -> Draws:
    """Draw from the guide and evaluate both programs at the draws, without gradients.

    Raises:
        ArgumentError: ``num_samples`` is not positive.
        GuideError: an AutoGuide that has never run.
        SiteError, NonFiniteError: as from the terms.
    """
    if num_samples < 1:
        raise ArgumentError(f"num_samples must be at least 1, got {num_samples}.")
    check_initialised(guide)
    with torch.no_grad(), seeded(seed):
        shapes = run(model, guide, args, kwargs)
        nesting = guess_plate_nesting(model, guide, args, kwargs)
        runs = _vectorised(model, guide, args, kwargs, shapes, num_samples, chunk_size, nesting)
        if runs is None:
            runs = [_collect(run(model, guide, args, kwargs), shapes, 1, nesting) for _ in range(num_samples)]
    return _concatenate(runs, shapes)


class seeded:  # noqa: N801  (used as a statement)
    """Use a seed inside the block and leave the caller's random state as it was; None keeps the caller's stream."""

    def __init__(self, seed: int | None) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.state = pyro.util.get_rng_state()
        if self.seed is not None:
            pyro.set_rng_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        if self.seed is not None:
            pyro.util.set_rng_state(self.state)


def predict(
    model: Program, args: tuple, kwargs: Mapping[str, Any], draws: Draws | None, num_samples: int, seed: int
) -> tuple[Arrays, dict[str, tuple[Plate, ...]]]:
    """Draw every site of the model anew, its latents from ``draws`` if given: predictive or prior draws.

    Raises:
        NotImplementedError: a distribution cannot be sampled (``ImproperUniform``, flat priors).
    """
    program = Unobserve()(model)
    latents = draws.latents if draws is not None else {}

    def given(i: int) -> Arrays:
        return {name: _with_gaps(x[i], draws.plates[name]) for name, x in latents.items()}

    with torch.no_grad(), seeded(seed):
        shapes = trace_program(program, args, kwargs, given(0) if draws else None)
        rows = []
        for i in range(num_samples):
            sites = trace_program(program, args, kwargs, given(i) if draws else None)
            rows.append({n: s.value for n, s in sites.items() if s.role != "factor"})
    plates = {name: _sorted(s.plates) for name, s in shapes.items() if name in rows[0]}
    arrays = {name: torch.stack([_drop_gaps(r[name], shapes[name]) for r in rows]) for name in plates}
    return arrays, plates


def _with_gaps(x: Tensor, plates: tuple[Plate, ...]) -> Tensor:
    """Put back the size-one batch dimensions between plates."""
    sizes = {p.dim: p.size for p in plates}
    batch = [sizes.get(d, 1) for d in range(min(sizes, default=0), 0)]
    return x.reshape((*batch, *x.shape[len(plates) :]))


def _sorted(plates: tuple[Plate, ...]) -> tuple[Plate, ...]:
    return tuple(sorted(plates, key=lambda p: p.dim))


def _vectorised(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    shapes: Run,
    num_samples: int,
    chunk_size: int,
    nesting: int,
) -> list[dict[str, Any]] | None:
    """Draw in chunks inside a plate; None where the programs do not take a dimension on the left."""
    sizes = [min(chunk_size, num_samples - i) for i in range(0, num_samples, chunk_size)]
    try:
        return [_collect(run(model, guide, args, kwargs, n, nesting), shapes, n, nesting) for n in sizes]
    except (PyroElboError, RuntimeError, ValueError, IndexError, NotImplementedError):
        return None


def _collect(pair: Run, shapes: Run, count: int, nesting: int) -> dict[str, Any]:
    """The numbers of one run with ``count`` draws."""

    def value(site: Site, like: Site) -> Tensor:
        return _lead(site.value, like.value.shape, count, like)

    model = {name: site for name, site in pair.model.items() if name in shapes.model}
    if model.keys() != shapes.model.keys():
        raise RuntimeError("the sites of the model change from run to run")
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


def _weights(pair: Run, count: int, nesting: int) -> dict[str, Any]:
    """Joint log p and log q per draw, and per row of the data plate where every latent has one."""
    q = [s for s in pair.guide.values() if s.role in ("latent", "auxiliary")]
    p = [s for s in pair.model.values() if s.role in ("latent", "observed", "factor")]
    plate = shared_plate(s.plates for s in p if s.role == "observed")
    local = plate is not None and all(plate in s.plates for s in p + q)

    def total(sites: list[Site], keep: Plate | None) -> Tensor:
        result = torch.zeros(count, *([keep.size] if keep else []), dtype=torch.float64)
        for s in sites:
            x = s.log_prob().double()
            scale = 1.0 if keep or is_one(s.scale) else s.scale
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


def _concatenate(runs: list[dict[str, Any]], shapes: Run) -> Draws:
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
        plates={n: _sorted(s.plates) for n, s in shapes.model.items()},
        data_plate=runs[0]["plate"],
        point=bool(latents) and not auxiliary and all(is_point(s.fn) for s in latents),
    )


def _unconstrained(site: Site) -> Tensor | None:
    if site.fn.support.is_discrete:
        return None
    try:
        return biject_to(site.fn.support).inv(site.value)
    except NotImplementedError:
        return None


def _lead(x: Tensor, shape: torch.Size, count: int, like: Site) -> Tensor:
    """Give an array of ``count`` draws the shape of one ordinary run with the draws in front.

    Plates and particles add dimensions of size one, and ``pyro.deterministic`` takes all of them for its event: only
    an ordinary run says what belongs to the site.
    """
    if x.numel() == count * shape.numel():
        return torch.stack([_drop_gaps(row, like) for row in x.reshape((count, *shape))])
    if x.numel() == shape.numel():
        return _drop_gaps(x.reshape(shape), like).expand(count, *_drop_gaps(x.reshape(shape), like).shape)
    raise RuntimeError(f"site '{like.name}' has shape {tuple(x.shape)} for {count} draws of shape {tuple(shape)}")


def _drop_gaps(x: Tensor, like: Site) -> Tensor:
    """Remove the size-one batch dimensions between plates; a deterministic counts its own dimensions as event."""
    if like.role == "deterministic":
        return x
    dims = {p.dim for p in like.plates}
    for d in range(like.event_dim - x.dim(), 0):
        if d not in dims:
            x = x.squeeze(d - like.event_dim)
    return x


def _aligned(x: Tensor, count: int, nesting: int) -> Tensor:
    """Batch dimensions as (draws, nesting dims)."""
    x = x.reshape((1,) * (nesting + 1 - x.dim()) + x.shape)
    return x.expand(count, *x.shape[1:])


def _per_plate(x: Tensor, plates: tuple[Plate, ...], count: int, nesting: int) -> Tensor:
    return _aligned(x, count, nesting).reshape((count, *(p.size for p in _sorted(plates))))
