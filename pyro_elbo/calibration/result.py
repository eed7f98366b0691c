"""The ranks of many simulations, with what they say in words, as a figure, and for ArviZ."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_elbo.calibration.plots import plot_ecdf
from pyro_elbo.calibration.verdicts import TESTS, Verdict, judge
from pyro_elbo.display import html_table
from pyro_elbo.posterior import to_container

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

_HEADER = ("", "mean position", "p uniform", "p bias", "p spread", "verdict")


@dataclass(frozen=True, repr=False, eq=False)
class Calibration:
    """The result of :func:`simulation_based_calibration`: print it, plot it, export it.

    Attributes:
        ranks: ranks of the true values among the draws, 0 to ``num_draws``: a Dataset over ``simulation``, plates and
            events, a variable for each latent, deterministic, and for ``log_likelihood``.
        positions: the same as positions (rank + v) / (num_draws + 1), v uniform: uniform on (0, 1) if calibrated.
        truth: the true values.
        num_draws: draws per simulation.
        failures: why simulations failed, by their numbers; they have no ranks.
        false_alarm: the probability that a calibrated fit gets any other verdict than ``calibrated``.
    """

    ranks: "xarray.Dataset"
    positions: "xarray.Dataset"
    truth: "xarray.Dataset"
    num_draws: int
    failures: dict[int, str]
    false_alarm: float

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The three tests of every element of every quantity, at the level false_alarm / (3 · elements)."""
        elements = list(elements_of(self.positions))
        level = self.false_alarm / (TESTS * len(elements))
        return tuple(judge(name, u, level) for name, u in elements)

    @property
    def is_calibrated(self) -> bool:
        """Whether no test of any quantity rejects."""
        return all(verdict.is_calibrated for verdict in self.verdicts)

    def plot(self, axes: "list[Axes] | None" = None) -> "list[Axes]":
        r"""Plot the ECDF of the positions less the diagonal, a panel for each site, a line for each element.

        The band holds all lines of the whole figure, if they are calibrated, with probability 1 - ``false_alarm``: it
        is simultaneous over positions, with Bonferroni over lines. A line above the band on the left and below on the
        right (a ∪ of ranks) means a posterior that is too narrow, the reverse one that is too wide, a line on one side
        only a bias.

        Args:
            axes: matplotlib axes, one for each site; a new figure if omitted.

        Returns:
            The axes.

        Raises:
            ArgumentError: there are not as many ``axes`` as sites.

        References:
            Säilynoja, Bürkner, Vehtari (2022), Graphical test for discrete uniformity and its applications in
            goodness-of-fit evaluation and multiple sample comparison, arXiv:2103.10522.
        """
        sites = {str(n): [u for _, u in elements_of(self.positions[[n]])] for n in self.positions.data_vars}
        return plot_ecdf(sites, self.false_alarm, axes)

    def to_arviz(self) -> Any:
        """Export to ArviZ: InferenceData on ArviZ 0.x, DataTree on ArviZ 1 and later.

        Groups: ``prior`` (the true values, which are draws of the prior), ``prior_sbc`` (positions, as
        ``arviz_plots.plot_ecdf_pit`` takes them) and ``prior_sbc_ranks``. Simulations are the dimension ``draw``.
        """
        groups = {"prior": self.truth, "prior_sbc": self.positions, "prior_sbc_ranks": self.ranks}
        attributes = {"inference_library": "pyro_elbo", "num_draws": self.num_draws, "failed": len(self.failures)}
        return to_container(
            {n: ds.rename(simulation="draw").expand_dims(chain=1).assign_attrs(attributes) for n, ds in groups.items()}
        )

    @property
    def _lines(self) -> list[tuple[str, ...]]:
        return [
            (v.name, f"{v.mean:.3f}", *(f"{p:.2g}" for p in (v.uniform, v.bias, v.spread)), v.words)
            for v in self.verdicts
        ]

    @property
    def _title(self) -> str:
        done, failed = self.ranks.sizes["simulation"], len(self.failures)
        return f"Calibration over {done} simulations of {self.num_draws} draws" + (f"; {failed} failed" * (failed > 0))

    @property
    def _notes(self) -> list[str]:
        notes = [f"A calibrated fit gets another verdict with probability {self.false_alarm:g} at most."]
        if self.failures:
            number, why = next(iter(self.failures.items()))
            notes.append(f"Failed: {sorted(self.failures)}. Simulation {number}: {why}")
        return notes

    def __repr__(self) -> str:
        """A line for each element of a quantity: mean position of the true value, three p-values, verdict."""
        width = max(len(line[0]) for line in self._lines)
        rows = [f"  {a:{width}} {b:>13} {c:>10} {d:>8} {e:>9}  {f}" for a, b, c, d, e, f in (_HEADER, *self._lines)]
        return "\n".join([self._title, *rows, *(f"  {note}" for note in self._notes)])

    def _repr_html_(self) -> str:
        return html_table(self._title, _HEADER, self._lines, self._notes)


def elements_of(data: "xarray.Dataset") -> Iterator[tuple[str, np.ndarray]]:
    """Yield every element of every variable with its name, such as ``z[0,2]``, over the simulations."""
    for name, x in data.data_vars.items():
        values = x.transpose("simulation", ...).values
        for index in np.ndindex(values.shape[1:]):
            label = f"{name}[{','.join(map(str, index))}]" if index else str(name)
            yield label, values[(slice(None), *index)]
