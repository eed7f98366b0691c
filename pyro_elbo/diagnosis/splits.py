r"""The gap of the bound between the rows of training and those of validation, part by part.

.. math:: \overline{\text{elbo}}_\text{train} - \overline{\text{elbo}}_\text{valid}
    = (D_\text{valid} - D_\text{train}) + (R_\text{valid} - R_\text{train})

D and R are the mean distortion and rate of a row. A part's gap is what it adds to the gap of the bound: training less
validation for a log-likelihood, validation less training for a KL. So the gaps of the parts add up.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float64
from torch import Tensor

from pyro_elbo.diagnosis.rows import Rows, check_alike, rows_of
from pyro_elbo.display import html_table
from pyro_elbo.terms import Terms

if TYPE_CHECKING:
    import pandas

_CLEAR = 2.0  # standard errors; without a gap one comparison in 22 passes them
_MOST_UNITS = 8  # of one site in the printed table
_HEADER = ("", "train", "valid", "gap", "s.e.")


@dataclass(frozen=True)
class Gap:
    """One part of the bound in both splits, nats per row.

    Attributes:
        train, valid: its mean over the rows.
        gap: what it adds to the gap of the bound; positive where training rows are better off.
        standard_error: of ``gap``, over two independent samples of rows.
    """

    train: float
    valid: float
    gap: float
    standard_error: float

    @property
    def is_clear(self) -> bool:
        """Whether the gap exceeds two standard errors."""
        return abs(self.gap) > _CLEAR * self.standard_error

    @property
    def size(self) -> str:
        """The gap without its sign, for a sentence."""
        return f"{abs(self.gap):.2f} ± {self.standard_error:.2f} nats"


@dataclass(frozen=True, repr=False)
class SplitComparison:
    """The gap of the bound between training and validation rows, by part; print it for a table and its reading.

    Every part is a record of ``train``, ``valid``, ``gap`` and ``standard_error``, in nats per row.

    Attributes:
        elbo, distortion, rate: the bound of a row and its two parts: ``elbo.gap = distortion.gap + rate.gap``.
        rate_excess: how much more of the gap the rate explains than the distortion, ``rate.gap - distortion.gap``.
        log_likelihood: the share of every observed site.
        kl: the share of every latent site. Sites that the guide draws together are one, named after the guide's own.
        kl_per_dim: the share of every unit of a latent whose KL factorizes: ``kl_per_dim["z"]["z[0]"]``.
        shared: totals in nats, training and validation, of the sites that all rows share; part of no gap.
        rows: the number of rows of either split.
        notes: what makes the rows of the splits unlike, such as longer sequences.
    """

    elbo: Gap
    distortion: Gap
    rate: Gap
    rate_excess: Gap
    log_likelihood: dict[str, Gap]
    kl: dict[str, Gap]
    kl_per_dim: dict[str, dict[str, Gap]]
    shared: dict[str, tuple[float, float]]
    rows: tuple[int, int]
    notes: tuple[str, ...]

    @property
    def kl_shrinkage(self) -> bool:
        """Whether validation rows have the lower bound, and clearly more by a larger KL than by their distortion."""
        return self.elbo.is_clear and self.elbo.gap > 0 and self.rate_excess.is_clear and self.rate_excess.gap > 0

    @property
    def reading(self) -> str:
        """The comparison in words: whether there is a gap, which part it is, and what happens to the KL."""
        return " ".join(words for words in (_size(self), _shares(self), _change_of_kl(self)) if words)

    def to_dataframe(self) -> "pandas.DataFrame":
        """Return a row for every part: train, valid, gap, standard_error, units. What rows share has no gap."""
        import pandas

        parts = {name: asdict(gap) | {"units": "nats per row"} for _, name, gap in self._lines()}
        shared = {n: asdict(Gap(*totals, math.nan, math.nan)) | {"units": "nats"} for n, totals in self.shared.items()}
        return pandas.DataFrame.from_dict(parts | shared, orient="index").rename_axis("part")

    def __repr__(self) -> str:
        width = max(len(name) for name, *_ in self._table)
        lines = [
            f"  {name:{width}} {train:>12} {valid:>12} {gap:>12} {error:>9}".rstrip()
            for name, train, valid, gap, error in (_HEADER, *self._table)
        ]
        words = [wrap(note, 98, initial_indent="  ", subsequent_indent="  ") for note in (self.reading, *self.notes)]
        return "\n".join([self._title, *lines, *(line for note in words for line in note)])

    def _repr_html_(self) -> str:
        return html_table(self._title, _HEADER, self._table, (self.reading, *self.notes))

    @property
    def _title(self) -> str:
        return f"Bound of {self.rows[0]} training and {self.rows[1]} validation rows, nats per row"

    @property
    def _table(self) -> list[tuple[str, str, str, str, str]]:
        lines = [
            ("  " * depth + name, f"{g.train:.4f}", f"{g.valid:.4f}", f"{g.gap:.4f}", f"{g.standard_error:.4f}")
            for depth, name, g in self._lines(_MOST_UNITS)
        ]
        shared = [(f"{name}, in total", f"{a:.4f}", f"{b:.4f}", "", "") for name, (a, b) in self.shared.items()]
        return lines + shared

    def _lines(self, most: int | None = None) -> Iterator[tuple[int, str, Gap]]:
        """Yield depth, name and gap of every part; of the units of a site those with so many largest gaps."""
        yield 0, "elbo", self.elbo
        yield 1, "distortion", self.distortion
        yield from ((2, f"log_likelihood {name}", gap) for name, gap in self.log_likelihood.items())
        yield 1, "rate", self.rate
        for name, gap in self.kl.items():
            yield 2, f"kl {name}", gap
            units = self.kl_per_dim.get(name, {})
            yield from ((3, f"kl {unit}", units[unit]) for unit in _largest(units, most))


def _largest(units: dict[str, Gap], most: int | None) -> list[str]:
    """Return the names of the units with the largest gaps, in their own order."""
    kept = sorted(units, key=lambda unit: -abs(units[unit].gap))[:most]
    return [unit for unit in units if unit in kept]


def _size(found: SplitComparison) -> str:
    if not found.elbo.is_clear:
        return f"No gap beyond noise: the bounds of a row differ by {found.elbo.size}."
    where = "above" if found.elbo.gap < 0 else "below"
    return f"The bound of a validation row lies {found.elbo.size} {where} that of a training row."


def _shares(found: SplitComparison) -> str:
    """Say which part explains that validation rows have the lower bound, and at which of several observed sites."""
    parts = {"distortion": found.distortion, "rate": found.rate}
    behind = {name: part for name, part in parts.items() if part.is_clear and part.gap > 0}
    if not (found.elbo.is_clear and found.elbo.gap > 0):
        return ""
    shares = {name: f"{part.gap / found.elbo.gap:.0%}" for name, part in parts.items()}
    explained = f"the distortion explains {shares['distortion']} of it and the rate {shares['rate']}"
    if not found.rate_excess.is_clear and min(part.gap for part in parts.values()) > 0:
        return f"Both parts share it: {explained}, a difference within two standard errors."
    if len(behind) == 2:
        return f"{explained.capitalize()}."
    (part,) = behind
    worst = max(found.log_likelihood, key=lambda name: found.log_likelihood[name].gap)
    where = f", most of it at '{worst}'" if part == "distortion" and len(found.log_likelihood) > 1 else ""
    return f"The {part} explains it{where}."


def _change_of_kl(found: SplitComparison) -> str:
    """Say what the guide does with rows that it has not seen."""
    rate = found.rate
    if not rate.is_clear:
        return ""
    if found.kl_shrinkage:
        return (
            f"KL shrinkage: the KL of a training row is {rate.train:.2f} nats, and that of a validation row is "
            f"{rate.size} larger. Either training has shrunk the KL of its own rows, as an encoder or a learned prior "
            "does that suits these alone: regularize it (weight decay, dropout, noise on its input). Or the validation "
            "rows lie farther from the prior: compare the data of the splits."
        )
    if rate.gap > 0:
        return f"The KL of a validation row is {rate.size} larger."
    return (
        f"The KL of a validation row is {rate.size} smaller: the encoder draws rows that it has not seen toward the "
        "prior and says less of them."
    )


def compare_splits(train_terms: Terms, valid_terms: Terms) -> SplitComparison:
    r"""Split the gap of the bound between training and validation rows by part, site and latent dimension.

    A gap is taken between means over rows, at β = 1 and scaled as in :attr:`Terms.per_datum`. Its standard error is
    :math:`\sqrt{s_t^2 / n_t + s_v^2 / n_v}`, for two independent samples of rows; the noise of terms that are drawn is
    part of it. Latents that all rows share cost the same in both splits, so their totals stand apart. Their draws
    move all rows together, which no standard error over rows shows: evaluate them with several particles.

    *KL shrinkage* is a gap of which the rate explains more than the distortion, by two standard errors of their
    difference. Either training has shrunk the KL of its own rows, to which encoder or learned prior have been fitted
    one by one: regularize them. Or the validation rows lie farther from the prior: terms alone do not tell. A gap that
    the distortion explains may be the fault of encoder and decoder alike. Optimize the guide for the validation rows
    with the model held fixed: what is left of the gap is the model's.

    Args:
        train_terms: terms of rows that the programs were trained on, ``loss.terms(model, guide, x_train)``.
        valid_terms: terms of the same programs for held-out rows.

    Raises:
        ArgumentError: an argument is no ``Terms``.
        SiteError: there are no rows (the observed sites share no plate), the programs differ, or the guide draws
            latents of rows and shared ones together.
        DataError: a split has fewer than two rows.
        GuideError: the guide is a point estimate in a latent of a row.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, pyro_elbo as pe
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.7))
        >>> _ = pyro.set_rng_seed(0)
        >>> terms = [pe.TraceBeta_ELBO().terms(model, guide, scale * torch.randn(200)) for scale in (1.4, 2.0)]
        >>> comparison = pe.compare_splits(*terms)
        >>> print(comparison)
        Bound of 200 training and 200 validation rows, nats per row
                                      train        valid          gap      s.e.
          elbo                      -1.7892      -2.4935       0.7043    0.1691
            distortion               1.4592       1.7920       0.3327    0.1079
              log_likelihood x      -1.4592      -1.7920       0.3327    0.1079
            rate                     0.3299       0.7015       0.3716    0.0732
              kl z                   0.3299       0.7015       0.3716    0.0732
          The bound of a validation row lies 0.70 ± 0.17 nats below that of a training row. Both parts
          share it: the distortion explains 47% of it and the rate 53%, a difference within two standard
          errors. The KL of a validation row is 0.37 ± 0.07 nats larger.

    References:
        Cremer, Li, Duvenaud (2018), Inference suboptimality in variational autoencoders, arXiv:1801.03558; Shu, Bui,
        Zhao, Kochenderfer, Ermon (2018), Amortized inference regularization, arXiv:1805.08913; Zhang, Hayes, Barber
        (2022), Generalization gap in amortized inference, arXiv:2205.11640.
    """
    train, valid = rows_of(train_terms, "train_terms"), rows_of(valid_terms, "valid_terms")
    check_alike(train_terms, valid_terms)
    gains = [torch.stack(list(split.log_likelihood.values())).sum(0) for split in (train, valid)]
    costs = [
        torch.stack([torch.zeros_like(gain), *split.kl.values()]).sum(0)
        for gain, split in zip(gains, (train, valid), strict=True)
    ]
    units = {n: (x, valid.kl_per_dim[n]) for n, x in train.kl_per_dim.items() if n in valid.kl_per_dim}
    return SplitComparison(
        elbo=_gain(*(gain - cost for gain, cost in zip(gains, costs, strict=True))),
        distortion=_cost(*(-gain for gain in gains)),
        rate=_cost(*costs),
        rate_excess=_cost(*(cost + gain for gain, cost in zip(gains, costs, strict=True))),
        log_likelihood={n: _gain(x, valid.log_likelihood[n]) for n, x in train.log_likelihood.items()},
        kl={n: _cost(x, valid.kl[n]) for n, x in train.kl.items()},
        kl_per_dim={n: {unit: _cost(x, other[unit]) for unit, x in ours.items()} for n, (ours, other) in units.items()},
        shared={n: (total, valid.shared[n]) for n, total in train.shared.items()},
        rows=(len(gains[0]), len(gains[1])),
        notes=(*_unlike_entries(train, valid), *_shared_points(train_terms)),
    )


def _gain(train: Float64[Tensor, " rows"], valid: Float64[Tensor, " others"]) -> Gap:
    variance = train.var() / len(train) + valid.var() / len(valid)
    return Gap(train.mean().item(), valid.mean().item(), (train.mean() - valid.mean()).item(), variance.sqrt().item())


def _cost(train: Float64[Tensor, " rows"], valid: Float64[Tensor, " others"]) -> Gap:
    found = _gain(train, valid)
    return Gap(found.train, found.valid, found.valid - found.train, found.standard_error)


def _shared_points(terms: Terms) -> Iterator[str]:
    """Say which totals of what rows share are no KL."""
    for name in terms.point_estimates:
        yield f"The guide is a point estimate in '{name}': its total is minus a log prior density, and no KL."


def _unlike_entries(train: Rows, valid: Rows) -> Iterator[str]:
    """Say where the rows of the splits hold unlike numbers of entries, whatever the programs do with them."""
    for name, entries in train.entries.items():
        number = _gain(entries, valid.entries[name])
        if number.is_clear:
            yield (
                f"A row holds {number.train:.1f} entries of '{name}' in training and {number.valid:.1f} in "
                "validation: part of the gap is their number."
            )
