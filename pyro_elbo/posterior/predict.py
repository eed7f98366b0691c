"""Draw every site of a model anew, from its prior or given draws of its latents."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine

from pyro_elbo.posterior.draws import Arrays, Draws
from pyro_elbo.posterior.layout import lead, with_gaps
from pyro_elbo.programs import Plate, Program, ResampleObserved, evaluating, seeded, sort_by_dim, trace_program


class Predictions(NamedTuple):
    """Draws of every site of the model, the plates of each, and why observed sites were left out."""

    arrays: Arrays
    plates: dict[str, tuple[Plate, ...]]
    skipped: dict[str, str]


def predict(
    model: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    draws: Draws,
    seed: int,
    prior: bool = False,
    chunk_size: int = 250,
) -> Predictions:
    """Draw every site of the model anew, its latents from ``draws`` unless ``prior``: one draw for each of ``draws``.

    An observed site whose distribution cannot be sampled keeps its data and is left out.

    Raises:
        NotImplementedError: a latent's distribution cannot be sampled (``ImproperUniform``, flat priors).
    """
    skipped: dict[str, str] = {}
    while True:
        resampled = ResampleObserved(draws.observed.keys() - skipped.keys())
        try:
            arrays, plates = _predict(resampled(model), args, kwargs, draws, seed, prior, chunk_size)
        except Exception as error:
            if resampled.current is None:
                raise
            skipped[resampled.current] = first_line(error)
        else:
            return Predictions({n: x for n, x in arrays.items() if n not in skipped}, plates, skipped)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _predict(
    program: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    draws: Draws,
    seed: int,
    prior: bool,
    chunk_size: int,
) -> tuple[Arrays, dict[str, tuple[Plate, ...]]]:
    if draws.rows:
        program = poutine.condition(program, data=draws.rows)
    latents = {} if prior else draws.latents
    step = chunk_size if draws.vectorized else 1

    def given(start: int, count: int) -> Arrays | None:
        chunk = {
            n: with_gaps(x[start : start + count], draws.plates[n], count, draws.nesting) for n, x in latents.items()
        }
        return chunk or None

    parts = []
    with torch.no_grad(), seeded(seed), evaluating(program):
        shapes = trace_program(program, args, kwargs, given(0, 1))
        known = draws.latents.keys() | draws.deterministics.keys() | draws.observed.keys()
        shapes = {name: site for name, site in shapes.items() if name in known}
        for start in range(0, len(draws.log_p), step):
            count = min(step, len(draws.log_p) - start)
            sites = trace_program(program, args, kwargs, given(start, count), count, draws.nesting)
            parts.append({n: lead(sites[n].value, s.value.shape, count, s) for n, s in shapes.items()})
    arrays = {name: torch.cat([part[name] for part in parts]) for name in shapes}
    return arrays, {name: sort_by_dim(s.plates) for name, s in shapes.items()}
