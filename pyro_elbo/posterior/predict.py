r"""Draws of the guide, and of the data that a model predicts from them or from its prior.

.. math:: z^{(s)} \sim q(z \mid x), \qquad \tilde x^{(s)} \sim p(x \mid z^{(s)})
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_elbo.errors import ArgumentError, SiteError, check_count, first_line
from pyro_elbo.posterior.datasets import Names, label, stack_chains, without_slashes
from pyro_elbo.posterior.draws import MOST_ELEMENTS, Arrays, Draws, draw
from pyro_elbo.posterior.layout import count_data, largest_site, lead, with_gaps
from pyro_elbo.posterior.mapped import are_valid, map_draws
from pyro_elbo.programs import (
    Plate,
    Program,
    ResampleObserved,
    Site,
    check_arguments,
    check_initialized,
    evaluating,
    seeded,
    sort_by_dim,
    trace_program,
)
from pyro_elbo.sequences import StackedDistribution

if TYPE_CHECKING:
    import xarray


class Predictions(NamedTuple):
    """Draws of the observed sites of the model or of all, the plates of each, and why observed ones were left out."""

    arrays: Arrays
    plates: dict[str, tuple[Plate, ...]]
    skipped: dict[str, str]


def sample_guide(
    model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any], num_samples: int, seed: int
) -> Draws:
    """Draw from the guide of a fitted model, which may lack observations.

    Raises:
        GuideError, SiteError, NonFiniteError: as from the terms.
    """
    with evaluating(model, guide):
        missing = _missing_data(model, guide, args, kwargs, seed)
        return draw(poutine.condition(model, data=missing), guide, args, kwargs, num_samples, seed=seed)


def label_latents(drawn: Draws) -> "xarray.Dataset":
    """Return the latents and deterministics of draws: dimensions ``draw``, plates, (time,) event."""
    return label_arrays(drawn.latents | drawn.deterministics, drawn.plates, drawn.times)


def predict_data(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_samples: int,
    seed: int,
    horizon: int = 0,
) -> "xarray.Dataset":
    """Draw the data that the model predicts, latents from the guide: dimensions ``draw``, plates, (time,) event.

    Sites that are observed are drawn anew, and so are those that have no observation for want of data. With
    ``horizon``, sequences keep their data, and the steps after their end are drawn. Where sequences are ragged or
    masked, the coordinate ``<site>_counted`` tells steps that count from padding. Attributes say what cannot be
    sampled.

    Raises:
        ArgumentError: ``horizon`` is negative, or no sequence of the model continues.
        GuideError, SiteError, NonFiniteError: as from the terms; SiteError where no observed site can be sampled.
    """
    check_count("horizon", horizon, least=0)
    with evaluating(model, guide):  # handlers around the model hide the module whose method it is
        missing = _missing_data(model, guide, args, kwargs, seed)
        observing = poutine.condition(model, data=missing)
        drawn = draw(observing, guide, args, kwargs, num_samples, seed=seed)
        if horizon:
            kwargs = {**kwargs, "horizon": horizon}
            found = _forecast(model, args, kwargs, drawn, drawn.times.keys() - missing.keys(), seed)
        else:
            found = predict(observing, args, kwargs, drawn, seed)
        counted = _counted_steps(model, args, kwargs, drawn, seed) if drawn.times else {}
    arrays = {n: x for n, x in found.arrays.items() if n in drawn.observed}
    if not arrays:
        raise SiteError(f"There is nothing to predict: {found.skipped or 'the model observes no site'}.")
    data = label_arrays(arrays, found.plates, drawn.times)
    for name, steps in counted.items():
        if name in arrays:
            dims = data[name].dims[1 : 1 + steps.dim()]
            data = data.assign_coords({f"{name}_counted": (dims, steps.numpy())})
    return data.assign_attrs({f"{n}_skipped": f"cannot be sampled ({why})" for n, why in found.skipped.items()})


def _missing_data(model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any], seed: int) -> Arrays:
    """Return a value for every site of the model that neither has an observation nor is in the guide."""
    check_initialized(guide)
    with torch.no_grad(), seeded(seed):
        guided = {name: site.value for name, site in trace_program(guide, args, kwargs).items()}
        sites = trace_program(model, args, kwargs, guided)
    absent = [s for s in sites.values() if s.role == "latent" and s.name not in guided]
    missing = {s.name: s.value for s in absent if not s.marked}
    if missing and len(missing) < len(absent):
        summed = [s.name for s in absent if s.marked]
        raise SiteError(
            f"Sites {summed} are summed out and drawn given the data, but {list(missing)} have no data. Give the model "
            "its data; or predict new rows by pyro.infer.Predictive(model, guide=guide, num_samples=...), which draws "
            f"{summed} from the model."
        )
    return missing


def _forecast(
    model: Program, args: tuple, kwargs: Mapping[str, Any], drawn: Draws, kept: Collection[str], seed: int
) -> Predictions:
    """Continue sequences after their data, given the latents of the past and the data of the sites to keep."""
    check_arguments("predict(horizon=...)", {"model": model}, args, kwargs, "Give the model an argument horizon. ")
    # A repeated copy of the data for each draw: the carry of a scan must not change its shape where they end.
    count = len(drawn.log_p)
    past = {n: x.expand(count, *x.shape) for n, x in drawn.observed.items() if n in kept}
    without_time = ResampleObserved(drawn.observed.keys() - past.keys())
    given = replace(drawn, latents=drawn.latents | past)
    arrays, plates = run_with_draws(without_time(model), args, kwargs, given, seed)
    if not any(arrays[n].shape[1:] != x.shape for n, x in drawn.observed.items()):
        raise ArgumentError("horizon: no sequence of the model continues. Pass horizon on to pe.scan in the model.")
    return Predictions(arrays, plates, {})


def _counted_steps(
    model: Program, args: tuple, kwargs: Mapping[str, Any], drawn: Draws, seed: int
) -> dict[str, Tensor]:
    """Return which steps of a sequence count, shaped like the site's plates and time."""
    first = {n: with_gaps(x[:1], drawn.plates[n], 1, drawn.nesting) for n, x in drawn.latents.items()}
    with torch.no_grad(), seeded(seed):
        sites = trace_program(model, args, kwargs, first)
    steps = {n: s.stepwise() for n, s in sites.items() if isinstance(s.fn, StackedDistribution)}
    return {n: count_data(s, drawn.nesting + 1) for n, s in steps.items() if isinstance(s.mask, Tensor)}


def label_arrays(arrays: Arrays, plates: Mapping[str, tuple[Plate, ...]], times: Mapping[str, str]) -> "xarray.Dataset":
    """Return arrays, whose first dimension is that of the draws, with names for all dimensions."""
    names = Names(set(arrays), {}, times)
    groups = label({"draws": stack_chains([(arrays, plates)], names)}, {}, {})
    return without_slashes(groups)["draws"].isel(chain=0, drop=True, missing_dims="ignore")


def predict(
    model: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    draws: Draws,
    seed: int,
    prior: bool = False,
) -> Predictions:
    """Draw the observed sites of the model anew, one draw for each of ``draws``; every site with ``prior``.

    An observed site whose distribution cannot be sampled keeps its data and is left out.

    Raises:
        NotImplementedError: a latent's distribution cannot be sampled (``ImproperUniform``, flat priors).
    """
    skipped: dict[str, str] = {}
    while True:
        resampled = ResampleObserved(draws.observed.keys() - skipped.keys())
        try:
            arrays, plates = run_with_draws(resampled(model), args, kwargs, draws, seed, prior)
        except Exception as error:
            if resampled.current is None:
                raise
            skipped[resampled.current] = first_line(error)
        else:
            return Predictions({n: x for n, x in arrays.items() if n not in skipped}, plates, skipped)


class _Call(NamedTuple):
    """A program, its arguments, and the draws that say how it runs."""

    program: Program
    args: tuple
    kwargs: Mapping[str, Any]
    draws: Draws

    def sites(self, latents: Arrays, count: int) -> dict[str, Site]:
        """Run the program at ``count`` values of its latents, in a plate if there are several."""
        plates, nesting = self.draws.plates, self.draws.nesting
        given = {n: with_gaps(x, plates[n], count, nesting) for n, x in latents.items()}
        return trace_program(self.program, self.args, self.kwargs, given or None, count, nesting)

    def run(self, latents: Arrays, count: int, shapes: Mapping[str, Site]) -> list[Arrays]:
        """Return the sites' values at ``count`` values of the latents, in one part or several."""
        if self.draws.way == "plate":
            return [self._values(latents, count, shapes)]
        if self.draws.way == "map" and count > 1:
            try:
                return [self._mapped(latents, count, shapes)]
            except Exception:  # single runs raise it again if the program itself is at fault
                pass
        return [self._values({n: x[i : i + 1] for n, x in latents.items()}, 1, shapes) for i in range(count)]

    def _values(self, latents: Arrays, count: int, shapes: Mapping[str, Site]) -> Arrays:
        sites = self.sites(latents, count)
        return {n: lead(sites[n].value, s.value.shape, count, s) for n, s in shapes.items()}

    def _mapped(self, latents: Arrays, count: int, shapes: Mapping[str, Site]) -> Arrays:
        def run(row: Arrays) -> tuple[Arrays, Tensor]:
            sites = self.sites({n: row[n][None] for n in latents}, 1)
            values = {n: lead(sites[n].value, s.value.shape, 1, s)[0] for n, s in shapes.items()}
            return values, are_valid(sites.values(), values=False)

        return map_draws(run, latents, count)


def run_with_draws(
    program: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    draws: Draws,
    seed: int,
    prior: bool = False,
) -> tuple[Arrays, dict[str, tuple[Plate, ...]]]:
    """Run a program once for each of the draws, its latents from them unless ``prior``: see :func:`predict`."""
    if draws.rows:
        program = poutine.condition(program, data=draws.rows)
    latents = {} if prior else draws.latents
    count = len(draws.log_p)
    with torch.no_grad(), seeded(seed), evaluating(program):
        call = _Call(program, args, kwargs, draws)
        shapes = call.sites({n: x[:1] for n, x in latents.items()}, 1)
        known = draws.observed.keys() | (draws.latents.keys() | draws.deterministics.keys() if prior else set())
        shapes = {name: site for name, site in shapes.items() if name in known}
        chunk_size = min(250, max(2, MOST_ELEMENTS // largest_site(shapes.values())))
        sizes = ((start, min(chunk_size, count - start)) for start in range(0, count, chunk_size))
        runs = (call.run({n: x[i : i + size] for n, x in latents.items()}, size, shapes) for i, size in sizes)
        arrays = draws.storage.join(chain.from_iterable(runs), count)
    return arrays, {name: sort_by_dim(s.plates) for name, s in shapes.items()}
