r"""Estimates of log p(x) from weights whose mean is p(x).

.. math:: \log \hat p(x) = \log \frac1S \sum_s w_s, \qquad E[w_s] = p(x), \qquad E[\log \hat p(x)] \le \log p(x)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from pyro_elbo.display import html_table
from pyro_elbo.errors import WeightsError

Method = Literal["importance", "ais", "reverse ais"]

_NAMES = {
    "importance": "importance sampling, {} draws",
    "ais": "annealed importance sampling, {} chains",
    "reverse ais": "reverse annealed importance sampling, {} chains: from above",
}
_SIDES = {"importance": "higher", "ais": "higher", "reverse ais": "lower"}
# Below so many effective draws the standard error is itself a guess, and the estimate most likely too low.
_FEW = 10


@dataclass(frozen=True, repr=False)
class LogEvidence:
    """Estimates of log p(x) in nats; print it for totals, means and a verdict.

    Attributes:
        log_evidence: per row of the data plate where every latent belongs to one row, otherwise one number.
        standard_error: of each; it shrinks with the root of the draws and means little where ``ess`` is small.
        ess: effective sample size (Σw)² / Σw² of the weights, in draws.
        num_samples: draws of the guide, or chains, per row.
        method: ``importance`` and ``ais`` approach log p(x) from below, ``reverse ais`` from above.
        plate: name of the data plate; None for one number.
        shared: log density of what is given outside the rows (``poutine.condition``); part of the total only.
    """

    log_evidence: Float64[Tensor, "*rows"]
    standard_error: Float64[Tensor, "*rows"]
    ess: Float64[Tensor, "*rows"]
    num_samples: int
    method: Method
    plate: str | None
    shared: float = 0.0

    @property
    def total(self) -> Float64[Tensor, ""]:
        """Log p of all data, nats."""
        return self.log_evidence.sum() + self.shared

    @property
    def total_standard_error(self) -> Float64[Tensor, ""]:
        """Standard error of the total; the draws of different rows are independent."""
        return self.standard_error.square().sum().sqrt()

    def __float__(self) -> float:
        """Log p of all data, nats."""
        return self.total.item()

    def __repr__(self) -> str:
        """The total, its mean per datum, and how far the weights carry it."""
        width = max(len(name) for name, *_ in self._figures)
        lines = [f"  {name:{width}} {total} {error} {mean}" for name, total, error, mean in self._figures]
        header = f"  {'':{width}} {'total':>14} {'standard error':>14} {'per datum':>12}".rstrip()
        return "\n".join([self._title, header, *lines, *(f"  {note}" for note in self._notes)])

    def _repr_html_(self) -> str:
        return html_table(self._title, ("", "total", "standard error", "per datum"), self._figures, self._notes)

    @property
    def _title(self) -> str:
        return f"Log evidence in nats by {_NAMES[self.method].format(self.num_samples)}"

    @property
    def _figures(self) -> list[tuple[str, str, str, str]]:
        mean = "" if self.plate is None else f"{self.log_evidence.mean().item():12.4f}"
        total, error = float(self), self.total_standard_error.item()
        return [("log p(x)", f"{total:14.4f}", f"{error:14.4f}", mean)]

    @property
    def _notes(self) -> list[str]:
        of = f"of {self.num_samples}"
        if self.plate is None:
            notes = [
                f"effective draws: {self.ess.item():.0f} {of}",
                "One number for all data: the model has no data plate, or latents that lie outside of it.",
            ]
        else:
            middle, least = self.ess.median().item(), self.ess.min().item()
            notes = [f"effective draws per row of '{self.plate}': median {middle:.0f}, least {least:.0f} {of}"]
        return notes + ([] if self.caution is None else [self.caution])

    @property
    def caution(self) -> str | None:
        """Why standard errors are not to be believed: fewer than ten effective draws; None where there are more."""
        few = int((self.ess < _FEW).sum())
        if not few:
            return None
        means = "the standard error means little"
        if self.num_samples < _FEW:
            return f"{self.num_samples} draws show little of their own spread: {means}. Take more num_samples."
        means += f", and log p(x) is most likely {_SIDES[self.method]}."
        where = "" if self.plate is None else f" in {few} of {len(self.ess)} rows"
        cure = "A better guide, more draws or method='ais' helps."
        cure = cure if self.method == "importance" else "More num_temperatures help."
        return f"Few draws carry all the weight{where}: {means} {cure}"


class WeightSums:
    """Sums of weights and of their squares, added up chunk by chunk, in logarithms."""

    def __init__(self) -> None:
        self.count = 0
        self._first: Tensor | None = None
        self._second: Tensor | None = None

    def add(self, log_weights: Float[Tensor, "draws *rows"]) -> None:
        """Add the weights of more draws.

        Raises:
            WeightsError: a weight is NaN or infinite.
        """
        x = log_weights.detach().double()
        if bad := int((torch.isnan(x) | (x == torch.inf)).sum()):
            raise WeightsError(
                f"{bad} of {x.numel()} log weights are NaN or infinite: a density of the programs is. Look for NaN in "
                "the data or a diverged parameter (loss.terms names the site), or put missing values under "
                "pyro.poutine.mask."
            )
        first, second = x.logsumexp(0), (2 * x).logsumexp(0)
        self._first = first if self._first is None else torch.logaddexp(self._first, first)
        self._second = second if self._second is None else torch.logaddexp(self._second, second)
        self.count += len(x)

    def result(self, method: Method, plate: str | None, shared: float = 0.0) -> LogEvidence:
        r"""Return the logarithm of the mean weight, its standard error by the delta method, and the effective draws.

        .. math:: SE^2 = \frac{1}{S - 1} \Big(\frac{S \sum w^2}{(\sum w)^2} - 1\Big)

        Raises:
            WeightsError: all weights of a row are zero.
        """
        assert self._first is not None
        assert self._second is not None
        if bool((self._first == -torch.inf).any()):
            raise WeightsError(
                f"None of {self.count} draws has a density under the model: the guide draws outside its support, or "
                "the data lie outside of theirs. Give the guide's sites the support of the model's; loss.terms names "
                "the site and the row."
            )
        ess = (2 * self._first - self._second).exp()
        error = ((self.count / ess - 1).clamp(min=0) / (self.count - 1)).sqrt()
        sign = -1 if method == "reverse ais" else 1
        return LogEvidence(sign * (self._first - math.log(self.count)), error, ess, self.count, method, plate, shared)


def join_rows(parts: Sequence[LogEvidence]) -> LogEvidence:
    """Return the estimates of batches of rows as one; what is given outside of the rows counts once."""
    if len(parts) == 1:
        return parts[0]

    def join(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return replace(parts[0], log_evidence=join("log_evidence"), standard_error=join("standard_error"), ess=join("ess"))
