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

Somebody else takes the steps, :meth:`SVI.converge` or :func:`fit`: a run says how many are due and observes them.

References:
    Dhaka, Catalina, Andersen, Magnusson, Huggins, Vehtari (2020), Robust, accurate stochastic optimization for
    variational inference, arXiv:2009.00666; Welandawe, Andersen, Vehtari, Huggins (2024), A framework for improving
    the reliability of black-box variational inference, JMLR 25:219, arXiv:2203.15945.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from pyro_elbo.compile import Snapshots
from pyro_elbo.errors import ArgumentError, NonFiniteError, ProgramError
from pyro_elbo.objectives import TraceBeta_ELBO
from pyro_elbo.posterior import SymmetrizedKL
from pyro_elbo.programs import Parameters, Program, seeded
from pyro_elbo.terms import Terms
from pyro_elbo.training.comparable import RECORDS, THIN, Arguments, first_runs, trained_once
from pyro_elbo.training.convergence import ConvergenceReport, Verdict, Window
from pyro_elbo.training.iterates import Collected, Iterates, LearningRates, OptimizerState
from pyro_elbo.training.stationarity import R_HAT, RATIO, is_level, is_worse, predict_distance, split_r_hat

LONG = 16  # a window of this fraction of all steps is long: parameters need not rest if the bound does
LEAST_FACTOR = RATIO**20  # of the first step size: below it, what is not finite is an error
BLOCK = 1024  # steps between two looks at progress: taken at once, since looking at each iterate may take longer
ROOM = 2**20  # parameters in the iterates of a block
DRAWS = 10  # of the bound of the start, before a step size counts as too large


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


@dataclass(frozen=True)
class Goal:
    """When a run ends: at an ``accuracy``, or before more than ``max_steps``; ``limit`` says what those are."""

    accuracy: float
    max_steps: int
    limit: str = "max_steps"


@dataclass
class Progress:
    """What a run has come to.

    Attributes:
        origin: where the present step size began; the average of the one before, if there is one.
        latest: the newest average of half a window.
        plan: of the next window, or of the one that is being taken.
        averaged, certified: whether the origin is an average, and one of stationary iterates.
        error: the Monte Carlo error of the origin.
        moves: later step sizes, moves of the average, and their errors.
        windows: those that were judged.
    """

    origin: Tensor
    latest: Tensor
    plan: Plan
    averaged: bool = False
    certified: bool = False
    error: float = math.nan
    moves: list[tuple[float, float, float]] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)


class Convergence:
    """One run to convergence.

    Whoever takes the steps reads ``due`` and passes at most so many of them to ``observe``, or takes several times as
    many at once with :meth:`snapshots`.

    Args:
        model, guide, loss: what the steps train.
        data: arguments of the programs, to check them by and to compare guides at.
        optimizers: returns the optimizers of the parameters, once a step was taken.
        goal: when the run ends.
        bound: returns the bound that is comparable with those of the steps.
        show: sees every window that was judged.

    Attributes:
        due: the steps until the next iterate; 0 at the end.

    Raises:
        ArgumentError: the programs do not give the same twice, or there is nothing to train.
        GuideError: the guide has no density.
        NonFiniteError: the first objective is not finite.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        loss: TraceBeta_ELBO,
        data: Arguments,
        optimizers: Callable[[Parameters], Sequence[Optimizer]],
        goal: Goal,
        bound: Callable[[Terms], Tensor] = lambda terms: terms.totals()["elbo"],
        show: Callable[[Window], None] = lambda window: None,
    ) -> None:
        self._loss, self._goal, self._show = loss, goal, show
        parameters, runs = first_runs(model, guide, data)
        self._iterates = Iterates(trained_once(parameters))
        self._distance = SymmetrizedKL(guide, *data, runs, self._iterates.write)
        self._bound = lambda: bound(loss.terms(model, guide, *data[0], **data[1])).item()
        self._start = math.nan  # the bound of the first step
        start = self._iterates.read()
        self._progress, self._window = Progress(start, start, Plan(1.0, THIN)), Collected.none_of(start)
        self._made, self._moving = lambda: optimizers(parameters), False
        self._rates: LearningRates | None = None
        self._pending: list[np.ndarray] = []  # bounds of the steps since the last iterate
        self.due = 1  # makes the optimizers of pyro.optim

    @property
    def windows(self) -> tuple[Window, ...]:
        """The windows that were judged."""
        return tuple(self._progress.windows)

    def report(self, limit: str | None = None) -> ConvergenceReport:
        """Return what the run did; ``limit`` says what else has ended it."""
        limit = self._goal.limit if limit is None else limit
        return ConvergenceReport(self._goal.accuracy, self._goal.max_steps, self.windows, limit)

    def snapshots(self) -> tuple[int, Snapshots | None]:
        """Return how many steps may be taken at once, and what is to keep the iterates among them.

        Such a block has about as many steps as two looks at a progress bar are apart, and ends with half a window.
        """
        half = RECORDS // 2
        room = min(
            half - len(self._window.watched) % half, max(1, BLOCK // self.due), max(1, ROOM // self._iterates.size)
        )
        kept = self._iterates.snapshots(self.due, room) if room > 1 and self._rates and not self._pending else None
        return self.due * (1 if kept is None else room), kept

    def observe(
        self, bounds: Float[np.ndarray, " steps"], iterates: Float[Tensor, "iterates parameters"] | None = None
    ) -> None:
        """Note that steps were taken, at these bounds; judge the window once it is full.

        Args:
            bounds: the bound of each step.
            iterates: the parameters after every ``due`` of them; read now, when so many were taken, if omitted.
        """
        self._pending.append(bounds)
        self.due -= len(bounds)
        if self.due > 0:
            return
        taken, self._pending = np.concatenate(self._pending), []
        if self._rates is None:
            self._start = float(taken[0])
            self._begin()
            return
        x = self._iterates.read()[None] if iterates is None else iterates
        self._window.add(x, self._iterates.watched(x), taken, RECORDS)
        self.due = self._progress.plan.thin
        if len(self._window.watched) == RECORDS:
            self._end_window(self._judged())

    def fail(self, error: ValueError, steps: int = 1) -> None:
        """Note that one of ``steps`` failed, and go back; raise the error if no step size helps.

        Pyro raises a ValueError where parameters leave the domain of a distribution. Errors other than that and
        NonFiniteError tell of programs and data, and are raised.
        """
        self._iterates.drop_gradients()
        left_domain = isinstance(error, ProgramError) and isinstance(error.__cause__, ValueError)
        if self._rates is None or not (left_domain or isinstance(error, NonFiniteError)):
            raise error
        self._go_back()
        if self._progress.plan.factor <= LEAST_FACTOR:
            raise error
        steps += sum(map(len, (*self._window.bounds, *self._pending)))
        self._pending = []
        self._end_window(Window(self._step_size, steps, "too large"))

    def close(self) -> None:
        """Give the optimizer its learning rate back."""
        if self._rates is not None:
            self._rates.scale(1.0)

    def state(self) -> dict[str, Any]:
        """Return everything that the run has come to, as tensors and plain values."""
        rates, optimizer = (self._rates.rates, self._kept.kept) if self._rates else (None, None)
        progress = vars(self._progress) | {
            "plan": astuple(self._progress.plan),
            "windows": [astuple(window) for window in self.windows],
            "moves": list(self._progress.moves),
        }
        found = {"start": self._start, "due": self.due, "moving": self._moving, "rates": rates, "optimizer": optimizer}
        pending = [torch.from_numpy(x) for x in self._pending]
        return found | {"progress": progress, "window": self._window.state(), "pending": pending}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state; parameters and optimizers are those of then."""
        progress = state["progress"]
        values = {"plan": Plan(*progress["plan"]), "windows": [Window(*window) for window in progress["windows"]]}
        self._progress, self._window = Progress(**progress | values), Collected.of(state["window"])
        self._start, self.due, self._moving = state["start"], state["due"], state["moving"]
        self._pending = [x.numpy() for x in state["pending"]]
        if state["rates"] is not None:
            optimizers = self._made()
            self._rates = LearningRates(optimizers, state["rates"])
            self._kept = OptimizerState(optimizers, state["optimizer"])

    @property
    def _step_size(self) -> float:
        return self._progress.plan.factor * self._rates.largest if self._rates else math.nan

    def _begin(self) -> None:
        """Note the optimizers, which a pyro.optim optimizer makes in its first step."""
        optimizers = self._made()
        try:
            self._rates = LearningRates(optimizers)
        except ArgumentError:
            self._iterates.write(self._progress.origin)
            raise
        self._kept = OptimizerState(optimizers)
        self._plan_window()

    def _plan_window(self) -> None:
        """Set the step size of the next window, or end the run: leave the averages in the parameters."""
        progress = self._progress
        left = self._goal.max_steps - self.report().steps
        reached = bool(progress.windows) and progress.windows[-1].distance <= self._goal.accuracy
        if reached or 2 * (left // RECORDS) < progress.plan.thin:
            self._iterates.write(progress.origin if progress.averaged else progress.latest)
            self.due = 0
            self.close()
            return
        progress.plan = replace(progress.plan, thin=min(progress.plan.thin, left // RECORDS))
        assert self._rates is not None
        self._rates.scale(progress.plan.factor)
        self.due, self._moving = progress.plan.thin, self._loss.step < self._loss.settled
        self._window = Collected.none_of(progress.origin)

    def _end_window(self, window: Window) -> None:
        self._progress.windows.append(window)
        self._progress.plan = self._progress.plan.after(window.verdict)
        self._show(window)
        self._plan_window()

    def _judged(self) -> Window:
        """Judge a window; go on from its average, or back if the step size is too large."""
        taken, bounds = self._window, np.concatenate(self._window.bounds)
        iterates = np.stack(taken.watched)
        self._progress.latest = taken.halves[1]
        window = Window(self._step_size, len(bounds), "drifts", split_r_hat(iterates), float(bounds.mean()))
        if self._moving:
            return replace(window, verdict="weights move")
        if not self._progress.averaged and self._is_worse(bounds):
            self._go_back()
            return replace(window, verdict="too large")
        if window.r_hat < R_HAT:
            return replace(window, verdict="stationary", **self._average(taken))
        if LONG * window.steps > self._goal.max_steps and is_level(bounds):
            self._go_on(taken.average)
            self._progress.certified = False
            return replace(window, verdict="level")
        return window

    def _is_worse(self, bounds: Float[np.ndarray, " steps"]) -> bool:
        """Return whether a window has left the start for the worse: below the lowest of several draws of its bound."""
        here = self._iterates.read()
        for seed in range(DRAWS):
            if not is_worse(bounds, self._start):
                return False
            self._iterates.write(self._progress.origin)
            with torch.no_grad(), seeded(seed):
                self._start = min(self._start, self._bound())
            self._iterates.write(here)
        return is_worse(bounds, self._start)

    def _average(self, taken: Collected) -> dict[str, float]:
        """Go on from the average of stationary iterates, and return what is known of it."""
        progress, average, error = self._progress, taken.average, self._distance(*taken.halves) / 2
        found = {"error": error}
        if progress.certified:
            found["moved"] = self._distance(progress.origin, average)
            progress.moves.append((self._step_size, found["moved"], math.hypot(error, progress.error)))
            found["distance"] = math.hypot(predict_distance(*zip(*progress.moves, strict=True)), error)
        self._go_on(average)
        progress.error, progress.certified = error, True
        return found

    def _go_on(self, average: Tensor) -> None:
        """Start the next step size from an average."""
        self._progress.origin, self._progress.averaged = average, True
        self._iterates.write(average)
        self._kept = OptimizerState(self._made())

    def _go_back(self) -> None:
        """Go back to where the present step size began; the next one is not ρ times a certified one."""
        self._progress.latest, self._progress.certified = self._progress.origin, False
        self._iterates.write(self._progress.origin)
        self._kept.restore()
