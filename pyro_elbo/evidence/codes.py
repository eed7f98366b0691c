r"""The length of the code that a bound promises, in bits.

.. math:: \text{bits} = -\frac{\text{elbo}}{\ln 2} - D \log_2 \delta

for D numbers, each stated at resolution δ (discrete data: δ = 1). Bits-back coding attains it: the rate is the cost of
the latents less what their randomness carries.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from pyro_elbo.display import html_table
from pyro_elbo.errors import ArgumentError, GuideError, SiteError, check_number, describe
from pyro_elbo.programs import Plate, is_point
from pyro_elbo.terms import Term, Terms, frames, is_one


@dataclass(frozen=True, repr=False)
class CodeLength:
    """The length of a code for the data in bits; ``a - b`` compares two models on the same rows.

    Attributes:
        bits: of every row of the data plate (one number without a plate); what all rows share is spread evenly.
        total: of the full data.
        num_data: rows of the full data.
        num_dims: observed numbers in the full data: rows times dimensions, without what masks leave out.
        plate: name of the data plate; None without one.
        resolution: δ; None for discrete data.
        complete: whether ``bits`` holds all rows of the full data.
    """

    bits: Float64[Tensor, " rows"]
    total: float
    num_data: int
    num_dims: float
    plate: str | None
    resolution: float | None
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
            ArgumentError: the rows, the dimensions or the resolutions differ, or rows were subsampled.
        """
        if not isinstance(other, CodeLength):
            return NotImplemented
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


def code_length(terms: Terms, resolution: float | None = None) -> CodeLength:
    r"""Return the length in bits of the code that a bound promises: −ELBO / ln 2.

    For discrete data that is a length as it stands. A density has no code length until its numbers are rounded: with
    bins of width δ per dimension each costs :math:`-\log_2 \delta` more, provided that δ is small beside the scale on
    which the density changes.

    Args:
        terms: the terms of a bound on the rows to be coded.
        resolution: δ, the width of a bin per dimension; for data with a density only.

    Returns:
        ``CodeLength``: bits, smaller is better.

    Raises:
        ArgumentError: the data have a density and no resolution is stated, the other way round, or it is not positive.
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
    _check_resolution(data, resolution)
    plate = terms.data_plate
    factor = 0.0 if resolution is None else -math.log2(resolution)
    rows = plate.size if plate else 1
    bits, shared, dims = torch.zeros(rows, dtype=torch.float64), 0.0, 0.0
    for term in terms.sites.values():
        if term.kind == "constant":  # the receiver has it
            continue
        sign = 1 if term.is_kl else -1
        nats, numbers = _nats(term, terms.particle_dim), _numbers(term) if term.kind == "likelihood" else None
        cost = sign * nats / math.log(2) if numbers is None else sign * nats / math.log(2) + factor * numbers
        if plate is not None and any(p.name == plate.name for p in term.plates):
            bits = bits + _by_row(cost, term, plate)
        else:
            shared += cost.sum().item()
        dims += 0.0 if numbers is None else numbers.sum().item()
    total, full = bits.sum().item() + shared, plate.full_size if plate else 1
    bits = bits * (rows / full) + shared / full
    return CodeLength(bits, total, full, dims, plate.name if plate else None, resolution, rows == full)


def _check_sites(terms: Terms, data: list[Term]) -> None:
    if not data:
        raise SiteError("The model observes nothing: there are no data to code. Give it a site with obs=.")
    if factors := [n for n, t in terms.sites.items() if t.kind == "factor"]:
        raise SiteError(
            f"The factors {factors} are no distributions of data, so that they have no code. Use pyro.sample with obs= "
            "for data."
        )
    drawn = [t for t in terms.sites.values() if t.kind == "latent" and not t.joint and not t.transformed]
    if points := [t.name for t in drawn if is_point(t.draws[0].fn)]:
        raise GuideError(
            f"The guide is a point estimate in {points} (Delta): no finite number of bits states a continuous value, "
            "so that -ELBO is no code length. Use a guide with a density for every latent, e.g. AutoNormal."
        )


def _check_resolution(data: list[Term], resolution: float | None) -> None:
    discrete = {t.name: bool(t.draws[0].fn.support.is_discrete) for t in data}
    continuous = [n for n, x in discrete.items() if not x]
    if resolution is None:
        if continuous:
            raise ArgumentError(
                f"The sites {continuous} have densities, and -ELBO / ln 2 is a code length for discrete data only. "
                "Give resolution=..., the width to which each number is rounded."
            )
        return
    check_number("resolution", resolution)
    if resolution == 0:
        raise ArgumentError("resolution must be positive, got 0: a number stated exactly costs infinitely many bits.")
    if len(continuous) < len(data):
        raise ArgumentError(
            f"The sites {[n for n, x in discrete.items() if x]} are discrete: they have no resolution. Leave it out, "
            "or take the code lengths of discrete and continuous sites from terms of their own."
        )


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
