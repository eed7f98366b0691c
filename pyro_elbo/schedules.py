r"""Schedules: functions from the number of optimization steps to the weight :math:`\beta` of the KL.

A schedule is a pure function of the step and has no state: the objective counts the optimization steps (see
:mod:`pyro_elbo.objectives.step_count`) and asks.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from pyro_elbo.errors import ArgumentError, check_count, check_number, check_positive


class Schedule(ABC):
    """A function from the number of optimization steps taken so far to a weight.

    A subclass gives the weight and the step from which it is constant (early stopping waits for it).

    Example:
        >>> @dataclass
        ... class Jump(Schedule):
        ...     at: int
        ...     def __call__(self, step: int) -> float:
        ...         return float(step >= self.at)
        ...     @property
        ...     def settled(self) -> int:
        ...         return self.at
        >>> [Jump(at=2)(step) for step in range(4)]
        [0.0, 0.0, 1.0, 1.0]
    """

    def __init_subclass__(cls) -> None:
        """Keep dataclasses that are not frozen hashable: objectives look weights up by their schedule."""
        super().__init_subclass__()
        if cls.__dict__.get("__hash__") is None:
            cls.__hash__ = _hash_by_type

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return the weight after ``step`` optimization steps."""

    @property
    @abstractmethod
    def settled(self) -> int:
        """The step from which the weight no longer changes."""


def _hash_by_type(schedule: Schedule) -> int:
    """Hash a schedule by its type: equal schedules are equal in their fields, which may change."""
    return hash(type(schedule))


def _check_weight(schedule: Schedule, **weights: float) -> None:
    for name, value in weights.items():
        check_number(f"{type(schedule).__name__}: {name}", value)


def _check_steps(schedule: Schedule, steps: int) -> None:
    check_count(f"{type(schedule).__name__}: steps", steps, cure="A constant weight is pe.Constant.")


@dataclass(frozen=True)
class Constant(Schedule):
    """The same weight at every step.

    Example:
        >>> Constant(4.0)(100)
        4.0
    """

    value: float

    def __post_init__(self) -> None:
        _check_weight(self, value=self.value)

    def __call__(self, step: int) -> float:
        """Return the weight after ``step`` optimization steps."""
        check_count("step", step, least=0)
        return self.value

    @property
    def settled(self) -> int:
        """The step from which the weight no longer changes."""
        return 0


@dataclass(frozen=True)
class LinearWarmup(Schedule):
    """Rise (or fall) from ``start`` to ``end`` in a straight line over ``steps`` steps; ``end`` afterwards.

    Example:
        >>> [LinearWarmup(0.0, 1.0, steps=4)(s) for s in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]

    References:
        Sønderby, Raiko, Maaløe, Sønderby, Winther (2016), Ladder variational autoencoders, arXiv:1602.02282.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check_weight(self, start=self.start, end=self.end)
        _check_steps(self, self.steps)

    def __call__(self, step: int) -> float:
        """Return the weight after ``step`` optimization steps."""
        check_count("step", step, least=0)
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)

    @property
    def settled(self) -> int:
        """The step from which the weight no longer changes."""
        return self.steps


@dataclass(frozen=True)
class SigmoidWarmup(Schedule):
    """Rise from ``start`` to ``end`` along a logistic curve over ``steps`` steps; exactly ``end`` afterwards.

    The curve passes the midpoint at ``steps / 2`` and is stretched to meet both ends exactly.

    Example:
        >>> [round(SigmoidWarmup(0.0, 1.0, steps=100)(s), 3) for s in (0, 25, 50, 100)]
        [0.0, 0.07, 0.5, 1.0]

    References:
        Bowman, Vilnis, Vinyals, Dai, Jozefowicz, Bengio (2016), Generating sentences from a continuous
        space, arXiv:1511.06349.
    """

    start: float
    end: float
    steps: int
    steepness: float = 10.0

    def __post_init__(self) -> None:
        _check_weight(self, start=self.start, end=self.end)
        _check_steps(self, self.steps)
        check_positive("SigmoidWarmup: steepness", self.steepness, "A straight line is pe.LinearWarmup.")

    def __call__(self, step: int) -> float:
        """Return the weight after ``step`` optimization steps."""
        check_count("step", step, least=0)
        # tanh(k (t - 1/2) / 2) is the logistic curve rescaled to (-1, 1); dividing by its value at t = 1
        # makes the ends exact.
        t = min(step / self.steps, 1.0)
        half = math.tanh(self.steepness / 4)
        fraction = 0.5 + 0.5 * math.tanh(self.steepness * (t - 0.5) / 2) / half
        return self.start + (self.end - self.start) * fraction

    @property
    def settled(self) -> int:
        """The step from which the weight no longer changes."""
        return self.steps


@dataclass(frozen=True)
class Cyclical(Schedule):
    """``cycles`` warm-ups in a row, each rising over its first ``ratio`` and flat at ``end`` for the rest.

    After ``steps`` steps the weight stays at ``end``.

    Example:
        >>> [Cyclical(0.0, 1.0, steps=8, cycles=2)(s) for s in range(9)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0]

    References:
        Fu, Li, Liu, Gao, Celikyilmaz, Carin (2019), Cyclical annealing schedule, arXiv:1903.10145.
    """

    start: float
    end: float
    steps: int
    cycles: int = 4
    ratio: float = 0.5

    def __post_init__(self) -> None:
        _check_weight(self, start=self.start, end=self.end)
        _check_steps(self, self.steps)
        check_count("Cyclical: cycles", self.cycles)
        _check_weight(self, ratio=self.ratio)
        if not 0 < self.ratio <= 1:
            raise ArgumentError(f"Cyclical: ratio must be above 0 and at most 1, got {self.ratio}.")

    def __call__(self, step: int) -> float:
        """Return the weight after ``step`` optimization steps."""
        check_count("step", step, least=0)
        if step >= self.steps:
            return self.end
        phase = (step * self.cycles / self.steps) % 1.0
        return self.start + (self.end - self.start) * min(phase / self.ratio, 1.0)

    @property
    def settled(self) -> int:
        """The step from which the weight no longer changes."""
        return self.steps


@dataclass(frozen=True)
class Capacity(Schedule):
    r"""A target for the KL instead of a weight: the KL is charged as :math:`\gamma\,|KL - C|`.

    The target :math:`C`, in nats per datum, grows from ``start`` to ``end`` over ``steps`` steps. It is compared with
    the KL per datum, summed over all sites that the schedule weighs.

    Example:
        >>> Capacity(0.0, 25.0, steps=100, gamma=1000.0)(50)
        12.5

    References:
        Burgess, Higgins, Pal, Matthey, Watters, Desjardins, Lerchner (2018), Understanding disentangling in
        β-VAE, arXiv:1804.03599.
    """

    start: float
    end: float
    steps: int
    gamma: float = 100.0

    def __post_init__(self) -> None:
        _check_weight(self, start=self.start, end=self.end, gamma=self.gamma)
        _check_steps(self, self.steps)

    def __call__(self, step: int) -> float:
        """Return the weight after ``step`` optimization steps."""
        check_count("step", step, least=0)
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)

    @property
    def settled(self) -> int:
        """The step from which the weight no longer changes."""
        return self.steps
