"""A table of a fit's latent sites: how much information each carries, and how far its posterior can be trusted.

Units are active if their posterior mean moves with the data: see :mod:`pyro_elbo.diagnosis.activity`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from pyro_elbo.diagnosis import MAX_ROWS, are_active, are_local
from pyro_elbo.display import html_table
from pyro_elbo.errors import GuideError, WeightsError
from pyro_elbo.posterior import Draws, ParetoK, format_k, judge, label_latents, sample_guide
from pyro_elbo.programs import Program
from pyro_elbo.terms import Terms
from pyro_elbo.training.data import RunArguments
from pyro_elbo.training.rows import num_rows

if TYPE_CHECKING:
    import pandas
    import xarray

EVALUATIONS = 25


@dataclass(frozen=True)
class SiteSummary:
    """One latent of a fit.

    Attributes:
        site: its name.
        kl: KL(q ‖ p) of all data, nats, the mean of 25 evaluations; NaN for latents that the guide draws together with
            others (their KL stands at the guide's auxiliary site) or gives as a point.
        kl_per_datum: the same, divided by the rows of the data.
        pareto_k: k-hat of the importance weights, which all latents share (the worst row's where latents are local);
            NaN where the weights have none.
        active_units, units: elements of the latent whose posterior mean moves with the data, and all; None for
            latents that all data share.
    """

    site: str
    kl: float
    kl_per_datum: float
    pareto_k: float
    active_units: int | None
    units: int | None


@dataclass(frozen=True, repr=False)
class Summary:
    """The latent sites of a fit; print it, or take it as a DataFrame.

    Attributes:
        sites: a record per latent site.
        elbo: the bound at β = 1, nats per datum, the mean of 25 evaluations.
        standard_error: of ``elbo``.
        num_data: rows of the data.
        num_rows: the rows that k-hat and active units are from.
        pareto_k: the importance weights in full; None where they are not those of a posterior.
        caution: why ``pareto_k`` is None.
        point_estimates: latents of which the guide is a point estimate: they have no KL, and ``elbo`` is no bound.
    """

    sites: tuple[SiteSummary, ...]
    elbo: float
    standard_error: float
    num_data: int
    num_rows: int
    pareto_k: ParetoK | None
    caution: str | None
    point_estimates: tuple[str, ...] = ()

    def to_dataframe(self) -> "pandas.DataFrame":
        """Return the table as a pandas DataFrame, a row per site."""
        import pandas

        frame = pandas.DataFrame([asdict(site) for site in self.sites], columns=list(SiteSummary.__annotations__))
        return frame.astype({"active_units": "Int64", "units": "Int64"}).set_index("site")

    def __repr__(self) -> str:
        width = max((len(row[0]) for row in self._rows), default=0)
        lines = [
            f"  {name:{width}} {kl:>12} {mean:>12} {k:>6} {active:>9}"
            for name, kl, mean, k, active in (_HEADER, *self._rows)
        ]
        notes = [line for note in self._notes for line in wrap(note, 98, initial_indent="  ", subsequent_indent="  ")]
        return "\n".join([self._title, *lines, *notes])

    def _repr_html_(self) -> str:
        return html_table(self._title, _HEADER, self._rows, self._notes)

    @property
    def _title(self) -> str:
        return f"Latents of {self.num_data} data; elbo {self.elbo:.4f} ± {self.standard_error:.4f} nats per datum"

    @property
    def _rows(self) -> list[tuple[str, str, str, str, str]]:
        return [
            (
                s.site,
                _number(s.kl, ".4f"),
                _number(s.kl_per_datum, ".4f"),
                "" if math.isnan(s.pareto_k) else format_k(s.pareto_k),
                "" if s.units is None else f"{s.active_units} of {s.units}",
            )
            for s in self.sites
        ]

    @property
    def _notes(self) -> list[str]:
        part = f"k-hat and active units of {self.num_rows} rows." if self.num_rows < self.num_data else ""
        names = ", ".join(map(repr, self.point_estimates))
        points = f"The elbo is no bound, and minus the log prior stands for the KL of {names}." if names else ""
        active = "Active: units whose posterior mean moves with the data, Var_x E_q[z] > 0.01 Var_p(z)."
        active = active if any(s.units for s in self.sites) else ""
        return [note for note in (str(self.pareto_k or self.caution or ""), points, active, part) if note]


_HEADER = ("", "KL (nats)", "per datum", "k-hat", "active")


def summarize(
    model: Program,
    guide: Program,
    evaluate: Callable[[int], Terms],
    args: tuple,
    kwargs: Mapping[str, Any],
    batch: int,
    num_samples: int,
    seed: int,
) -> Summary:
    """Return the summary of the terms of data, and of draws for them: see :class:`Summary`.

    Args:
        evaluate: returns the terms of all data at the draws of a seed.
        args, kwargs: the data.
        batch: the rows that the programs were trained on at once; fewer than the data mean that they take a part.
        num_samples: draws of the guide.
    """
    data, terms = RunArguments(args, dict(kwargs), batch, True), evaluate(seed)
    total = num_rows((*args, *kwargs.values()))
    is_part = total > max(batch, MAX_ROWS) and are_local(terms)
    if is_part:
        args, kwargs = data.spread(MAX_ROWS)
    drawn = sample_guide(model, guide, args, kwargs, num_samples, seed)
    k, caution = _try_pareto_k(drawn)
    draws = label_latents(drawn)
    shared = math.nan if k is None else float(k)
    found = [_figures(terms), *(_figures(evaluate(seed + i)) for i in range(1, EVALUATIONS))]
    kl = _kl_by_site(terms, [kl for _, kl in found])
    units = {name: _count_active(name, terms, draws) for name in kl}
    sites = tuple(SiteSummary(n, x, x / terms.num_data, shared, *units[n]) for n, x in kl.items())
    elbo = [x for x, _ in found]
    error = stdev(elbo) / EVALUATIONS**0.5
    rows, points = MAX_ROWS if is_part else terms.num_data, terms.point_estimates
    return Summary(sites, fmean(elbo), error, terms.num_data, rows, k, caution, points)


def _try_pareto_k(drawn: Draws) -> tuple[ParetoK | None, str | None]:
    try:
        return judge(drawn), None
    except (GuideError, WeightsError) as error:
        return None, f"No k-hat: {error}"


def _figures(terms: Terms) -> tuple[float, dict[str, float]]:
    """Return the bound per datum and the KL of each site."""
    return terms.per_datum.elbo.item(), {name: x.item() for name, x in terms.kl_total.items()}


def _kl_by_site(terms: Terms, found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean KL of each site; of sites that the guide draws together, all at the first auxiliary one."""
    kl = {name: fmean(x[name] for x in found) for name in terms.kl}
    joint = [name for name in kl if terms.sites[name].joint]
    total = math.fsum(kl[name] for name in joint)
    first = next((name for name in joint if terms.sites[name].kind == "auxiliary"), None)
    return kl | dict.fromkeys([*joint, *terms.point_estimates], math.nan) | ({} if first is None else {first: total})


def _count_active(name: str, terms: Terms, draws: "xarray.Dataset") -> tuple[int, int] | tuple[None, None]:
    """Count the active units of a latent, and all of them."""
    active = are_active(name, terms, draws)
    return (None, None) if active is None else (int(active.sum()), active.numel())


def _number(x: float, form: str) -> str:
    return "" if math.isnan(x) else f"{x:{form}}"
