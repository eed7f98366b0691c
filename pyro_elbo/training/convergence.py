"""What a run to convergence did: its windows of iterates, and whether it may be believed."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import wrap
from typing import Literal

from pyro_elbo.display import html_table

Verdict = Literal["stationary", "drifts", "level", "weights move", "too large"]


@dataclass(frozen=True)
class Window:
    """Some steps at one step size, and what their iterates say.

    Attributes:
        step_size: the learning rate.
        steps: the steps of the window.
        verdict: ``"stationary"``, and the iterates were averaged; ``"level"``, the bound, while parameters still
            wander; ``"drifts"``; ``"weights move"``, those of the objective, on their schedule; or ``"too large"``, the
            step size.
        r_hat: the largest split R-hat of the parameters.
        elbo: the mean bound at β = 1 of the steps, in nats; per datum in :func:`fit`.
        error: the Monte Carlo error of the average; this and the next two are roots of symmetrized KLs, and NaN
            without an average.
        moved: from the average at the step size before to this one.
        distance: predicted from this average to the optimum, with its error.
    """

    step_size: float
    steps: int
    verdict: Verdict
    r_hat: float = math.nan
    elbo: float = math.nan
    error: float = math.nan
    moved: float = math.nan
    distance: float = math.nan


@dataclass(frozen=True, repr=False)
class ConvergenceReport:
    """How a run to convergence came to its end. Print it to see a row per step size.

    Attributes:
        accuracy, max_steps: what was asked for.
        windows: every window of iterates, in order.
        limit: what has ended the run, unless it converged.

    Example:
        >>> windows = Window(0.1, 1024, "stationary", 1.01, -3.25, 0.05), Window(0.05, 2048, "drifts", 1.37, -3.21)
        >>> print(ConvergenceReport(0.1, 4000, windows))
        Not converged after 3,073 steps. Ended by max_steps, which the next window would pass: the iterates still
          drift at step size 0.05.
          step size       steps  R-hat        elbo   error   moved  distance
          0.1             1,024   1.01     -3.2500   0.050                    stationary
          0.05            2,048   1.37     -3.2100                            drifts
          error, moved, distance: of averages, in standard deviations of the posterior (root of the symmetrized KL)
    """

    accuracy: float
    max_steps: int
    windows: tuple[Window, ...]
    limit: str = "max_steps"

    @property
    def converged(self) -> bool:
        """Whether the predicted distance from the optimum is at most ``accuracy``."""
        return self.distance <= self.accuracy

    @property
    def reason(self) -> str:
        """Why the run ended."""
        if self.converged:
            return f"The averages are {self.distance:.2g} from the optimum; accuracy {self.accuracy:g} was asked for."
        if not self.windows:
            return f"Ended by {self.limit} before one window of iterates was complete."
        last = self.windows[-1]
        far = "how far their average is from the optimum cannot be said without two such step sizes in a row"
        if not math.isnan(self.distance):
            far = f"their average is {self.distance:.2g} from the optimum"
        found = {
            "stationary": f"the iterates are stationary at step size {last.step_size:.4g}, but {far}",
            "level": f"the bound no longer rises, but parameters still wander at step size {last.step_size:.4g}",
            "drifts": f"the iterates still drift at step size {last.step_size:.4g}",
            "weights move": "the weights of the objective still moved",
            "too large": f"step size {last.step_size:.4g} is still too large",
        }
        passed = ", which the next window would pass" if self.limit.startswith("max_") else ""
        return f"Ended by {self.limit}{passed}: {found[last.verdict]}."

    @property
    def summary(self) -> str:
        """How the run ended, its step sizes and the last R-hat, in one line."""
        if not self.windows:
            return self._title
        sizes = [self.windows[i].step_size for i in (0, -1)]
        return (
            f"{self._title} Step sizes from {sizes[0]:.4g} to {sizes[1]:.4g}; last R-hat {self.windows[-1].r_hat:.2f}."
        )

    @property
    def steps(self) -> int:
        """All steps that were taken."""
        return 1 + sum(window.steps for window in self.windows)

    @property
    def distance(self) -> float:
        """Predicted from the averages that were left to the optimum: the root of the symmetrized KL.

        NaN where it cannot be said: without stationary iterates at two step sizes in a row.
        """
        return next((w.distance for w in reversed(self.windows) if w.verdict in ("stationary", "level")), math.nan)

    def __repr__(self) -> str:
        rows = [
            f"  {size:<10}{steps:>11} {r_hat:>6} {elbo:>11} {error:>7} {moved:>7} {distance:>9}  {verdict}".rstrip()
            for size, steps, r_hat, elbo, error, moved, distance, verdict in (_HEADER, *self._rows())
        ]
        return "\n".join([*wrap(self._title, 110, subsequent_indent="  "), *rows, f"  {_UNITS}"])

    def _repr_html_(self) -> str:
        return html_table(self._title, _HEADER, self._rows(), [_UNITS])

    @property
    def _title(self) -> str:
        return f"{'Converged' if self.converged else 'Not converged'} after {self.steps:,} steps. {self.reason}"

    def _rows(self) -> Iterator[tuple[str, ...]]:
        """Yield the last window of each step size, with all steps at it."""
        for size, windows in itertools.groupby(self.windows, lambda w: w.step_size):
            *_, last = group = list(windows)
            yield (
                f"{size:.4g}",
                f"{sum(w.steps for w in group):,}",
                *(_number(x, form) for x, form in ((last.r_hat, ".2f"), (last.elbo, ".4f"))),
                *(_number(x, ".3f") for x in (last.error, last.moved, last.distance)),
                last.verdict,
            )


def _number(x: float, form: str) -> str:
    return "" if math.isnan(x) else f"{x:{form}}"


_HEADER = ("step size", "steps", "R-hat", "elbo", "error", "moved", "distance", "")
_UNITS = "error, moved, distance: of averages, in standard deviations of the posterior (root of the symmetrized KL)"
