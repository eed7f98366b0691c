r"""Train to a stated distance from the optimum: lower the step size, average the iterates, and know when to stop.

Stochastic gradients at a fixed step size never come to rest. They become stationary, and the average of stationary
iterates is far closer to the optimum than any of them; its bias falls with the step size, and the time to
stationarity grows. So:

1. Take a window of iterates, ``thin`` steps apart. While its halves differ (split R-hat ≥ 1.1), or the weights of the
   objective still move, double ``thin`` and take another. If the window is long and the bound no longer rises, the
   parameters wander in directions that hardly matter at this step size: go to 4, with nothing to predict from.
2. Average the window. Half the distance between the averages of its halves is the Monte Carlo error of the whole.
3. Predict the distance from the optimum from how far the averages moved whenever the step size fell
   (:mod:`pyro_elbo.training.stationarity`), add the error, and stop where both together are small enough.
4. Halve the step size, double ``thin`` (half the step size takes twice the time), and go on from the average.

A step size at which the objective or its gradient is not finite, or that ends below the bound of its start, is too
large: parameters and optimizer go back to where it began, and a quarter of it is tried.

Every distance is the root of a symmetrized KL between guides (:mod:`pyro_elbo.posterior.symmetrized_kl`). The published
algorithm checks a Monte Carlo error per parameter of a Gaussian; the distance between halves says the same in the units
of the result, for any guide, and also sees a slow drift that no single parameter shows.

References:
    Dhaka, Catalina, Andersen, Magnusson, Huggins, Vehtari (2020), Robust, accurate stochastic optimization for
    variational inference, arXiv:2009.00666; Welandawe, Andersen, Vehtari, Huggins (2024), A framework for improving
    the reliability of black-box variational inference, JMLR 25:219, arXiv:2203.15945.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.optim import Optimizer

from pyro_elbo.errors import (
    ArgumentError,
    DataError,
    NonFiniteError,
    check_count,
    check_number,
    describe,
    first_sentence,
)
from pyro_elbo.objectives import TraceBeta_ELBO
from pyro_elbo.posterior import SymmetrizedKL
from pyro_elbo.programs import Parameters, Program, collect_parameters, seeded
from pyro_elbo.training.convergence import ConvergenceReport, Verdict, Window
from pyro_elbo.training.data import arguments
from pyro_elbo.training.iterates import Iterates, LearningRates, OptimizerState
from pyro_elbo.training.stationarity import R_HAT, RATIO, is_level, is_worse, predict_distance, split_r_hat

RECORDS = 128  # iterates in a window: two halves of 64 nearly independent ones pass for hundreds of parameters
THIN = 8  # steps from one to the next in the first window
LEAST_STEPS = 1 + 3 * RECORDS * THIN  # the first, and a window at each of two step sizes
LONG = 16  # a window of this fraction of all steps is long: parameters need not rest if the bound does
LEAST_FACTOR = RATIO**20  # of the first step size: below it, what is not finite is an error

Arguments = tuple[tuple, dict[str, Any]]
Take = Callable[[int], Float[np.ndarray, " steps"]]
"""Takes steps and returns the bound at β = 1 of each, in nats."""


@dataclass(frozen=True)
class Plan:
    """The next window: its step size, as a factor of the first one, and the steps from one iterate to the next."""

    factor: float
    thin: int

    def after(self, verdict: Verdict) -> "Plan":
        """Return the plan after a window with this verdict."""
        if verdict == "too large":
            return Plan(self.factor * RATIO**2, self.thin)
        return Plan(self.factor * RATIO if verdict in ("stationary", "level") else self.factor, 2 * self.thin)


class Taken(NamedTuple):
    """A window of iterates: those that are watched, the averages of its halves, and the bound of every step."""

    iterates: Float[np.ndarray, "iterates watched"]
    halves: list[Float64[Tensor, " parameters"]]
    bounds: Float[np.ndarray, " steps"]

    @property
    def average(self) -> Float64[Tensor, " parameters"]:
        """The average of all iterates."""
        return (self.halves[0] + self.halves[1]) / 2


class Convergence:
    """One run to convergence.

    Args:
        model, guide, loss: what the steps train.
        data: arguments of the programs, to check them by and to compare guides at.
        take: takes steps.
        optimizers: returns the optimizers of the parameters, once a step was taken.
        max_steps: the most steps.

    Raises:
        ArgumentError: the programs do not give the same twice, or the optimizer does not suit.
        GuideError: the guide has no density.
        NonFiniteError: the first objective is not finite.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        loss: TraceBeta_ELBO,
        data: Arguments,
        take: Take,
        optimizers: Callable[[Parameters], list[Optimizer]],
        max_steps: int,
    ) -> None:
        self._loss, self._take, self._max_steps = loss, take, max_steps
        parameters, self._start = _first_runs(model, guide, loss, *data)
        self._iterates = Iterates(_trained(parameters))
        self._distance = SymmetrizedKL(model, guide, *data, self._iterates.write)
        self._origin = self._latest = self._iterates.read()  # where the present step size began; the newest average
        take(1)  # makes the optimizers of pyro.optim
        self._optimizers = optimizers(parameters)
        self._rates = self._learning_rates()
        self._state = OptimizerState(self._optimizers)
        self._averaged = self._certified = False  # whether the origin is an average, and of stationary iterates
        self._error = math.nan  # of the newest average
        self._moves: list[tuple[float, float, float]] = []  # later step sizes, moves of the average, and their errors

    def run(self, accuracy: float, show: Callable[[Window], None]) -> ConvergenceReport:
        """Train until the distance from the optimum is at most ``accuracy``; leave the averages in the parameters."""
        plan, left, windows = Plan(1.0, THIN), self._max_steps - 1, []
        try:
            while 2 * (left // RECORDS) >= plan.thin and not (windows and windows[-1].distance <= accuracy):
                windows.append(self._window(replace(plan, thin=min(plan.thin, left // RECORDS))))
                show(windows[-1])
                plan, left = plan.after(windows[-1].verdict), left - windows[-1].steps
        finally:
            self._rates.scale(1.0)
        self._iterates.write(self._origin if self._averaged else self._latest)
        return ConvergenceReport(accuracy, self._max_steps, tuple(windows))

    def _window(self, plan: Plan) -> Window:
        """Take a window of iterates and judge it; go on from its average, or back if the step size is too large."""
        self._rates.scale(plan.factor)
        size, moving = plan.factor * self._rates.largest, self._loss.step < self._loss.settled
        try:
            taken = self._iterate(plan.thin)
        except NonFiniteError:
            self._go_back()
            if plan.factor <= LEAST_FACTOR:
                raise
            return Window(size, plan.thin * RECORDS, "too large")
        self._latest = taken.halves[1]
        window = Window(size, len(taken.bounds), "drifts", split_r_hat(taken.iterates), float(taken.bounds.mean()))
        if moving:
            return replace(window, verdict="weights move")
        if not self._averaged and is_worse(taken.bounds, self._start):
            self._go_back()
            return replace(window, verdict="too large")
        if window.r_hat < R_HAT:
            return replace(window, verdict="stationary", **self._average(size, taken))
        if LONG * window.steps > self._max_steps and is_level(taken.bounds):
            self._go_on(taken.average)
            self._certified = False
            return replace(window, verdict="level")
        return window

    def _iterate(self, thin: int) -> Taken:
        """Take a window of iterates, ``thin`` steps apart."""
        halves = [torch.zeros_like(self._origin, dtype=torch.float64) for _ in range(2)]
        iterates, bounds = [], []
        for i in range(RECORDS):
            bounds.append(self._take(thin))
            x = self._iterates.read()
            iterates.append(self._iterates.watched(x))
            halves[2 * i // RECORDS].add_(x, alpha=2 / RECORDS)
        return Taken(np.stack(iterates), halves, np.concatenate(bounds))

    def _average(self, size: float, taken: Taken) -> dict[str, float]:
        """Go on from the average of stationary iterates, and return what is known of it."""
        error = self._distance(*taken.halves) / 2
        found = {"error": error}
        if self._certified:
            found["moved"] = self._distance(self._origin, taken.average)
            self._moves.append((size, found["moved"], math.hypot(error, self._error)))
            found["distance"] = math.hypot(predict_distance(*zip(*self._moves, strict=True)), error)
        self._go_on(taken.average)
        self._error, self._certified = error, True
        return found

    def _go_on(self, average: Float64[Tensor, " parameters"]) -> None:
        """Start the next step size from an average."""
        self._origin, self._averaged = average, True
        self._iterates.write(average)
        self._state = OptimizerState(self._optimizers)

    def _go_back(self) -> None:
        """Go back to where the present step size began; the next one is not ρ times a certified one."""
        self._latest, self._certified = self._origin, False
        self._iterates.write(self._origin)
        self._state.restore()

    def _learning_rates(self) -> LearningRates:
        """Return the learning rates, which a pyro.optim optimizer has from its first step on."""
        try:
            return LearningRates(self._optimizers)
        except ArgumentError:
            self._iterates.write(self._origin)
            raise


def check_limits(loss: TraceBeta_ELBO, accuracy: Any, max_steps: Any) -> None:
    """Raise ArgumentError for an accuracy or a number of steps that no run can keep to."""
    check_number("accuracy", accuracy)
    if accuracy == 0:
        raise ArgumentError(
            "accuracy must be positive, got 0: it is the distance from the optimum, in standard deviations of the "
            "posterior, at which training stops. 0.1 is a good choice."
        )
    check_count("max_steps", max_steps)
    least = LEAST_STEPS + 2 * max(0, loss.settled - loss.step)
    if max_steps < least:
        raise ArgumentError(
            f"max_steps must be at least {least}, got {max_steps}: convergence shows in windows of iterates at two "
            "step sizes or more, taken once no weight of the objective moves any more."
        )


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


def _trained(parameters: Parameters) -> list[Tensor]:
    """Return every parameter that is trained once; raise ArgumentError where there is none."""
    trained = list({id(p): p for p in parameters.values() if p.requires_grad}.values())
    if not trained:
        raise ArgumentError("There is nothing to train: neither program has a parameter that requires a gradient.")
    return trained


def _first_runs(
    model: Program, guide: Program, loss: TraceBeta_ELBO, args: tuple, kwargs: dict[str, Any]
) -> tuple[Parameters, float]:
    """Run the programs a few times; return their parameters and the lowest bound.

    Raises:
        ArgumentError: two runs from the same seed differ.
    """

    def bound(seed: int) -> float:
        with torch.no_grad(), seeded(seed):
            return loss.terms(model, guide, *args, **kwargs).elbo.item()

    with collect_parameters() as parameters, torch.no_grad():
        loss.terms(model, guide, *args, **kwargs)  # an AutoGuide makes its parameters now
    try:
        first, *bounds = [bound(seed) for seed in (0, *range(10))]
    except NonFiniteError:
        raise
    except Exception as error:
        what = f"The programs run once on the same data, and then no more: {first_sentence(error)}"
        raise ArgumentError(f"{what} {_CURE}") from error
    if not math.isclose(first, bounds[0], rel_tol=1e-4, abs_tol=1e-4):
        what = "Two runs of the programs on the same data and from the same seed have ELBOs of"
        raise ArgumentError(f"{what} {first:g} and {bounds[0]:g} nats. {_CURE}")
    return parameters, min(bounds)


_CURE = (
    "Iterates of changing programs have no mean to converge to. Pass the data as arguments, or as batches=loader, "
    "instead of taking them from a generator, a file or a counter inside the programs."
)
