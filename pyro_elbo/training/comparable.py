"""What a run to convergence asks for: programs that repeat, parameters to train, limits that suffice."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_elbo.errors import (
    ArgumentError,
    DataError,
    NonFiniteError,
    check_count,
    check_positive,
    describe,
    first_sentence,
)
from pyro_elbo.objectives import TraceBeta_ELBO
from pyro_elbo.programs import (
    Parameters,
    Program,
    SameRows,
    TracePair,
    collect_parameters,
    evaluating,
    seeded,
    trace_pair,
)
from pyro_elbo.training.data import arguments

RECORDS = 128  # iterates in a window: two halves of 64 nearly independent ones pass for hundreds of parameters
THIN = 8  # steps from one to the next in the first window
LEAST_STEPS = 1 + 3 * RECORDS * THIN  # the first, and a window at each of two step sizes

Arguments = tuple[tuple, dict[str, Any]]


def check_accuracy(accuracy: Any) -> None:
    """Raise ArgumentError for an accuracy that no run can reach."""
    cure = (
        "It is the distance from the optimum, in standard deviations of the posterior, at which training stops: 0.1 is "
        "a good choice."
    )
    check_positive("accuracy", accuracy, cure)


def check_steps(loss: TraceBeta_ELBO, max_steps: int, what: str) -> None:
    """Raise ArgumentError for a number of steps in which convergence cannot show; ``what`` names the limit."""
    least = LEAST_STEPS + 2 * max(0, loss.settled - loss.step)
    if max_steps < least:
        raise ArgumentError(
            f"{what} must be at least {least}, got {max_steps}: convergence shows in windows of iterates at two "
            "step sizes or more, taken once no weight of the objective moves any more."
        )


def check_limits(loss: TraceBeta_ELBO, accuracy: Any, max_steps: Any) -> None:
    """Raise ArgumentError for an accuracy or a number of steps that no run can keep to."""
    check_accuracy(accuracy)
    check_count("max_steps", max_steps)
    check_steps(loss, max_steps, "max_steps")


def repeat(batches: Any) -> Iterator[Arguments]:
    """Yield the batches of an iterable as arguments of the programs, again and again.

    Raises:
        ArgumentError: it cannot be iterated, or only once.
        DataError: it yields nothing.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, Iterator | Tensor):
        raise ArgumentError(
            "batches must be an iterable that starts again, such as a DataLoader or a list of batches, got "
            f"{describe(batches)}. Pass data of a single batch as arguments: svi.converge(x)."
        )
    return _repeat(batches)


def _repeat(batches: Iterable) -> Iterator[Arguments]:
    while True:
        batch = None
        for batch in batches:
            yield arguments(batch)
        if batch is None:
            raise DataError("batches: the loader yields nothing; expected at least one batch.")


def trained_once(parameters: Parameters) -> list[Tensor]:
    """Return every parameter that is trained once; raise ArgumentError where there is none."""
    trained = list({id(p): p for p in parameters.values() if p.requires_grad}.values())
    if not trained:
        raise ArgumentError("There is nothing to train: neither program has a parameter that requires a gradient.")
    return trained


def first_runs(model: Program, guide: Program, data: Arguments) -> tuple[Parameters, tuple[TracePair, TracePair]]:
    """Run the programs three times; return their parameters, and two runs with different draws for the same rows.

    Raises:
        ArgumentError: two runs from the same seed differ.
    """

    def run(seed: int | None) -> TracePair:
        with torch.no_grad(), seeded(seed):
            return trace_pair(model, guide, *data)

    with evaluating(model, guide), SameRows():
        with collect_parameters() as parameters:
            other = run(None)  # an AutoGuide makes its parameters now
        try:
            pair, same = run(0), run(0)
            first, again = _sampled_bound(pair), _sampled_bound(same)
        except NonFiniteError:
            raise
        except Exception as error:
            what = f"The programs run once on the same data, and then no more: {first_sentence(error)}"
            raise ArgumentError(f"{what} {_CURE}") from error
    if abs(first - again) > 1e-4 * (1 + abs(first)):  # not where they are NaN: the first step says why
        what = "Two runs of the programs on the same data and from the same seed have ELBOs of"
        raise ArgumentError(f"{what} {first:g} and {again:g} nats. {_CURE}")
    return parameters, (other, pair)


@torch.no_grad()
def _sampled_bound(pair: TracePair) -> float:
    """Return Σ log p - Σ log q at the draws, scaled to the full data."""
    p, q = (
        sum((s.log_prob() * s.scale).sum().item() for s in sites.values() if s.has_density)
        for sites in (pair.model, pair.guide)
    )
    return p - q


_CURE = (
    "Iterates of changing programs have no mean to converge to. Pass the data as arguments, or as batches=loader, "
    "instead of taking them from a generator, a file or a counter inside the programs."
)
