r"""The length of the code that a bound promises, in bits.

.. math:: \text{bits} = -\frac{\text{elbo}}{\ln 2} - D \log_2 \delta

for D numbers, each stated at resolution δ (discrete data: δ = 1). Bits-back coding attains it: the rate is the cost of
the latents less what their randomness carries. The probability of a bin is taken for its width times the density in it,
so bins so wide that one would hold more than half of the probability are refused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from pyro_elbo.display import html_table
from pyro_elbo.errors import ArgumentError, GuideError, SiteError, check_positive, describe
from pyro_elbo.masking import both, expand_to_event, mask_in_event, unmask
from pyro_elbo.programs import Plate, Site
from pyro_elbo.terms import Term, Terms, frames, is_one, univariate

MOST_NATS = 700.0  # of a log density, for a message: its exponential is still finite
LARGEST_BIN = 0.5  # of the probability: beyond, density times width is too far from it


@dataclass(frozen=True, repr=False)
class CodeLength:
    """The length of a code for the data in bits; ``a - b`` compares two models on the same rows.

    Attributes:
        bits: of every row of the data plate (one number without a plate); what all rows share is spread evenly.
        total: of the full data.
        num_data: rows of the full data.
        num_dims: observed numbers in the full data: rows times dimensions, without what masks leave out.
        plate: name of the data plate; None without one.
        resolution: δ, or δ by site; None for discrete data.
        row_sums: the sum of the observed numbers of every row, by which ``-`` knows the same rows.
        complete: whether ``bits`` holds all rows of the full data.
    """

    bits: Float64[Tensor, " rows"]
    total: float
    num_data: int
    num_dims: float
    plate: str | None
    resolution: float | Mapping[str, float] | None
    row_sums: Float64[Tensor, " rows"]
    complete: bool

    @property
    def per_datum(self) -> float:
        """Bits per row of the data."""
        return self.total / self.num_data

    @property
    def per_dim(self) -> float:
        """Bits per observed number."""
        return self.total / self.num_dims

    @property
    def standard_error(self) -> float:
        """Standard error of ``per_datum``, over rows taken for a sample of many; NaN for a single row."""
        return _standard_error(self.bits)

    def __float__(self) -> float:
        """Bits of the full data."""
        return self.total

    def __repr__(self) -> str:
        """Bits in total, per datum with the standard error, and per dimension."""
        lines = [f"  {name:13} {bits} {note}".rstrip() for name, bits, note in self._figures]
        return "\n".join([self._title, *lines])

    def _repr_html_(self) -> str:
        return html_table(self._title, (), self._figures)

    @property
    def _title(self) -> str:
        if isinstance(self.resolution, Mapping):
            at = f" at resolution {', '.join(f'{width:g} of {name!r}' for name, width in self.resolution.items())}"
        else:
            at = "" if self.resolution is None else f" at resolution {self.resolution:g}"
        return f"Code length of {self.num_data} data in bits{at}"

    @property
    def _figures(self) -> list[tuple[str, str, str]]:
        error = "" if len(self.bits) < 2 else f"± {self.standard_error:.4f}"
        return [
            ("total", f"{self.total:14.2f}", ""),
            ("per datum", f"{self.per_datum:14.4f}", error),
            ("per dimension", f"{self.per_dim:14.4f}", ""),
        ]

    def __sub__(self, other: "CodeLength") -> "CodeLengthDifference":
        """Compare two codes of the same rows, by the bits that each row costs more.

        Raises:
            ArgumentError: the rows, the dimensions or the resolutions differ, or rows were subsampled; ``other`` is no
                code length.
        """
        if not isinstance(other, CodeLength):
            raise ArgumentError(f"A code length less {describe(other)}: expected another one, pe.code_length(terms).")
        mine, its = ((len(x.bits), x.num_dims, x.resolution) for x in (self, other))
        if mine != its:
            raise ArgumentError(
                f"Code lengths of different data: rows, observed numbers and resolution are {mine} and {its}. Give "
                "both models the same rows, observed sites and resolution."
            )
        if not (self.complete and other.complete):
            raise ArgumentError(
                "Code lengths of subsampled rows cannot be compared row by row. Take the terms of all rows, without "
                "subsample_size."
            )
        unlike = ~torch.isclose(self.row_sums, other.row_sums, rtol=1e-5, atol=1e-8)
        if unlike.any():
            raise ArgumentError(
                f"Code lengths of different data: the numbers of row {int(unlike.nonzero()[0])} add up to "
                f"{self.row_sums[unlike][0]:g} and {other.row_sums[unlike][0]:g}. Give both models the same rows in "
                "the same order."
            )
        return CodeLengthDifference(self.bits - other.bits)


@dataclass(frozen=True, repr=False)
class CodeLengthDifference:
    """How much longer the first of two codes is, in bits; negative where it is shorter.

    Attributes:
        bits: the difference of every row.
    """

    bits: Float64[Tensor, " rows"]

    @property
    def total(self) -> float:
        """Bits of all rows."""
        return self.bits.sum().item()

    @property
    def per_datum(self) -> float:
        """Bits per row."""
        return self.bits.mean().item()

    @property
    def standard_error(self) -> float:
        """Standard error of ``per_datum``, from the paired differences of rows."""
        return _standard_error(self.bits)

    def __float__(self) -> float:
        """Bits of all rows."""
        return self.total

    def __repr__(self) -> str:
        """Which code is shorter, by how many bits, and whether more than twice the standard error."""
        count, error = len(self.bits), self.standard_error
        which = "shorter" if self.total < 0 else "longer"
        clear = abs(self.per_datum) > 2 * error
        verdict = "" if clear else "; less than two standard errors: no difference is shown"
        return (
            f"The first code is {which} by {abs(self.total):.1f} ± {error * count:.1f} bits, "
            f"{abs(self.per_datum):.4f} ± {error:.4f} per datum{verdict}"
        )

    def _repr_html_(self) -> str:
        return html_table("Difference of code lengths", (), [], [repr(self)])


def code_length(terms: Terms, resolution: float | Mapping[str, float] | None = None) -> CodeLength:
    r"""Return the length in bits of the code that a bound promises: −ELBO / ln 2.

    For discrete data that is a length as it stands. A density has no code length until its numbers are rounded: with
    bins of width δ per dimension each costs :math:`-\log_2 \delta` more, provided that δ is small beside the scale on
    which the density changes.

    Args:
        terms: the terms of a bound on the rows to be coded.
        resolution: δ, the width of a bin per dimension, for data with a density only; ``{site: δ}`` where other sites
            are discrete, or have another one.

    Returns:
        ``CodeLength``: bits, smaller is better.

    Raises:
        ArgumentError: the data have a density and no resolution is stated, the other way round, it is not positive, or
            so coarse that one bin would hold more than half of the probability.
        GuideError: the guide is a point estimate in some continuous latent, which no finite number of bits states.
        SiteError: the model has a ``pyro.factor``, which is no code, or no data.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, pyro_elbo as pe
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Bernoulli(0.25), obs=x)
        >>> code_length(pe.TraceBeta_ELBO().terms(model, lambda x: None, torch.tensor([1.0, 1.0])))
        Code length of 2 data in bits
          total                   4.00
          per datum             2.0000 ± 0.0000
          per dimension         2.0000

    References:
        Hinton, van Camp (1993), Keeping the neural networks simple by minimizing the description length of the weights,
        COLT; Townsend, Bird, Barber (2019), arXiv:1901.04866; Theis, van den Oord, Bethge (2016), arXiv:1511.01844.
    """
    if not isinstance(terms, Terms):
        raise ArgumentError(f"terms must be those of a bound, loss.terms(model, guide, x), got {describe(terms)}.")
    data = [t for t in terms.sites.values() if t.kind == "likelihood"]
    _check_sites(terms, data)
    widths = _widths(data, resolution)
    for term in data:
        if term.name in widths:
            _check_bins(term, widths[term.name])
    plate = terms.data_plate
    rows = plate.size if plate else 1
    bits, shared, dims = torch.zeros(rows, dtype=torch.float64), 0.0, 0.0
    sums = torch.zeros_like(bits)
    for term in terms.sites.values():
        if term.kind == "constant":  # the receiver has it
            continue
        sign = 1 if term.is_kl else -1
        nats, numbers = _nats(term, terms.particle_dim), _numbers(term) if term.kind == "likelihood" else None
        cost = sign * nats / math.log(2)
        cost = cost if numbers is None else cost - math.log2(widths.get(term.name, 1.0)) * numbers
        if plate is not None and any(p.name == plate.name for p in term.plates):
            bits = bits + _by_row(cost, term, plate)
            sums = sums if numbers is None else sums + _by_row(_observed(term), term, plate)
        else:
            shared += cost.sum().item()
        dims += 0.0 if numbers is None else numbers.sum().item()
    total, full = bits.sum().item() + shared, plate.full_size if plate else 1
    bits = bits * (rows / full) + shared / full
    resolution = dict(resolution) if isinstance(resolution, Mapping) else resolution
    return CodeLength(bits, total, full, dims, plate.name if plate else None, resolution, sums, rows == full)


def _check_sites(terms: Terms, data: list[Term]) -> None:
    if not data:
        raise SiteError("The model observes nothing: there are no data to code. Give it a site with obs=.")
    if factors := [n for n, t in terms.sites.items() if t.kind == "factor"]:
        raise SiteError(
            f"The factors {factors} are no distributions of data, so that they have no code. Use pyro.sample with obs= "
            "for data."
        )
    if terms.point_estimates:
        raise GuideError(
            f"The guide is a point estimate in {list(terms.point_estimates)} (Delta): no finite number of bits states "
            "a continuous value, so that -ELBO is no code length. Use a guide with a density for every latent, e.g. "
            "AutoNormal."
        )


def _widths(data: list[Term], resolution: float | Mapping[str, float] | None) -> Mapping[str, float]:
    """Return the resolution of every site that has a density."""
    discrete = {t.name: bool(t.draws[0].fn.support.is_discrete) for t in data}
    continuous = [n for n, x in discrete.items() if not x]
    if resolution is None:
        if continuous:
            raise ArgumentError(
                f"The sites {continuous} have densities, and -ELBO / ln 2 is a code length for discrete data only. "
                "Give resolution=..., the width to which each number is rounded."
            )
        return {}
    if isinstance(resolution, Mapping):
        if resolution.keys() != set(continuous):
            raise ArgumentError(
                f"resolution: expected a width for each of the sites with a density, {continuous}, got one for "
                f"{list(resolution)}. Discrete sites have none."
            )
        by_site = resolution
    elif len(continuous) < len(data):
        raise ArgumentError(
            f"The sites {[n for n, x in discrete.items() if x]} are discrete: they have no resolution. Give that of "
            f"the others by name, resolution={{{', '.join(f'{n!r}: ...' for n in continuous)}}}, or leave it out."
        )
    else:
        by_site = dict.fromkeys(continuous, resolution)
    for name, width in by_site.items():
        check_positive(f"resolution of '{name}'", width, "A number stated exactly costs infinitely many bits.")
    return by_site


def _check_bins(term: Term, width: float) -> None:
    """Raise ArgumentError where δ is so wide that density times δ, the probability of one bin, is more than a half.

    For a normal density that is δ > 1.25 standard deviations. Up to there the length is right to a hundredth of a bit
    per number on average; further on it soon becomes negative.
    """
    largest = min(max(_log_density(site).max().item() for site in term.draws), MOST_NATS)
    if largest + math.log(width) > math.log(LARGEST_BIN):
        raise ArgumentError(
            f"Site '{term.name}': at resolution {width:g} a density of {math.exp(largest):.3g} would give one bin the "
            f"probability {width * math.exp(largest):.2g}, but density times width is a probability only where the "
            f"density hardly changes within a bin. Give a resolution of {LARGEST_BIN * math.exp(-largest):.2g} or "
            "less, or a discrete distribution of the rounded numbers."
        )


def _log_density(site: Site) -> Tensor:
    """Return the log density of every number that counts, -inf of others; their mean where it does not factorize."""
    site = site.stepwise()
    base = univariate(site.fn)
    if base is not None:
        return _counted(base.log_prob(site.value), _mask(site), -torch.inf)
    fn, mask = unmask(site.fn, site.mask)
    return _counted(fn.log_prob(site.value) / site.fn.event_shape.numel(), mask, -torch.inf)


def _mask(site: Site) -> Tensor | bool | None:
    """Return the mask of the observed numbers, in batches and in the event."""
    mask = expand_to_event(site.mask, site.event_dim) if isinstance(site.mask, Tensor) else site.mask
    return both(mask, mask_in_event(site.fn))


def _counted(x: Tensor, mask: Tensor | bool | None, other: float) -> Tensor:
    return x if mask is None or mask is True else torch.where(torch.as_tensor(mask), x, other)


def _observed(term: Term) -> Float64[Tensor, "..."]:
    """Return the sum of the observed numbers of every entry of a term, without what masks leave out."""
    site = term.draws[0].stepwise()
    sums = _counted(site.value.detach().double(), _mask(site), 0.0)
    sums = sums.flatten(-site.event_dim).sum(-1) if site.event_dim else sums
    sums = torch.where(frames(term), sums, 0.0)
    return sums if term.steps is None else sums.sum(-1)


def _nats(term: Term, particle_dim: int | None) -> Tensor:
    """Return the nats of a term, scaled to the full data, averaged over particles."""
    x = term.nats.detach().double()
    x = x if is_one(term.scale) else x * term.scale
    return x.mean(particle_dim, keepdim=True) if particle_dim is not None and x.dim() >= -particle_dim else x


def _numbers(term: Term) -> Tensor:
    """Return how many observed numbers each entry of a term holds, scaled to the full data."""
    steps = term.steps or term
    counted = frames(term).double() * math.prod(steps.event_shape)
    counted = counted if term.steps is None else counted.sum(-1)
    return counted if is_one(term.scale) else counted * term.scale


def _by_row(x: Tensor, term: Term, plate: Plate) -> Tensor:
    """Sum over all batch dimensions but that of the rows."""
    dim = next(p.dim for p in term.plates if p.name == plate.name)
    return x.movedim(dim, 0).reshape(plate.size, -1).sum(1)


def _standard_error(bits: Tensor) -> float:
    return (bits.std() / len(bits) ** 0.5).item() if len(bits) > 1 else math.nan
