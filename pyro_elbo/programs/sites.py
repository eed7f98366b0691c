"""The sample statements of a Pyro program as typed records.

:class:`Site` holds one statement of one run; everything above this room sees only such values.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor
from torch.distributions import Distribution

from pyro_elbo.assumptions import defer_check, is_capturing
from pyro_elbo.errors import NonFiniteError, SiteError, count_nonfinite
from pyro_elbo.masking import masked
from pyro_elbo.sequences import StackedDistribution, fill_masked

SiteRole = Literal["latent", "observed", "factor", "auxiliary", "deterministic"]


class Plate(NamedTuple):
    """A vectorized plate.

    Attributes:
        dim: its batch dimension, counted from the right.
        size: its rows in this run.
        full_size: its rows in the full data.
    """

    name: str
    dim: int
    size: int
    full_size: int


@dataclass(frozen=True)
class Site:
    """A sample statement of one run.

    Attributes:
        role: ``latent`` (of the model, or the guide's site of that name), ``observed``, ``factor``
            (``pyro.factor``), ``auxiliary`` (only in the guide) or ``deterministic``.
        fn: the distribution without its mask.
        plates: the vectorized plates around the site, outermost first, without the plate of the particles.
        scale: the factor on the log density (subsampling, ``poutine.scale``).
        mask: the entries that count; None if all do.
    """

    name: str
    role: SiteRole
    fn: Distribution
    value: Tensor
    plates: tuple[Plate, ...]
    scale: float | Tensor
    mask: Tensor | bool | None

    @property
    def event_dim(self) -> int:
        """The number of dimensions of one event, on the right of the value."""
        return len(self.fn.event_shape)

    def log_prob(self) -> Tensor:
        """Return the log density at the value in nats: masked, unscaled, batch dimensions aligned with the plates."""
        if self.role == "observed":
            defer_check(lambda: masked(~self.fn.support.check(self.value), self.mask).logical_not().all())
        return masked(self._evaluate(self.fn.log_prob), self.mask)

    def score_parts(self) -> ScoreParts:
        """Return Pyro's three parts of the gradient estimator: unscaled, log density and entropy term masked."""
        return self._evaluate(self.fn.score_parts).scale_and_mask(1.0, self.mask)

    def stepwise(self) -> "Site":
        """Return the site of a scan with time as its innermost plate.

        Time is a plate in shape only: the steps are not independent.
        """
        fn, mask, scale = self.fn, self.mask, self.scale
        assert isinstance(fn, StackedDistribution)
        mask = mask.unsqueeze(-1) if isinstance(mask, Tensor) else mask
        scale = scale.unsqueeze(-1) if isinstance(scale, Tensor) else scale
        if fn.counted is not None and fn.counted is not True:
            mask = fn.counted if mask is None or mask is True else mask & fn.counted
        size = fn.event_shape[0]
        plates = tuple(p._replace(dim=p.dim - 1) for p in self.plates) + (Plate(fn.run.time, -1, size, size),)
        value = fill_masked(fn.steps, self.value, mask) if self.role == "observed" else self.value
        return replace(self, fn=fn.steps, value=value, plates=plates, scale=scale, mask=mask)

    def _evaluate(self, function: Callable[[Tensor], Any]) -> Any:
        try:
            return function(self.value)
        except (ValueError, RuntimeError) as error:
            if is_capturing():
                raise
            if self.value.is_floating_point() and not torch.isfinite(self.value).all():
                raise NonFiniteError(
                    f"Site '{self.name}': {count_nonfinite(self.value)}. Remove them, or mark them as missing with "
                    "pyro.poutine.mask or obs_mask."
                ) from error
            raise SiteError(self._misfit(error)) from error

    def _misfit(self, error: Exception) -> str:
        """Explain a value of the wrong shape or outside the support, with the cure."""
        expected, got = tuple(self.fn.batch_shape + self.fn.event_shape), tuple(self.value.shape)
        kind, reason = type(self.fn).__name__, str(error).splitlines()[0]
        if "support" in reason:
            return (
                f"Site '{self.name}': the value lies outside the support of {kind}: {reason} Choose a distribution "
                "whose support holds the data, or transform them."
            )
        return (
            f"Site '{self.name}': expected a value of shape {expected} for {kind}, got {got}: {reason} Give the "
            f"value the event shape {tuple(self.fn.event_shape)} (.to_event(n) sets it), and a plate to every other "
            "dimension."
        )


def sort_by_dim(plates: Iterable[Plate]) -> tuple[Plate, ...]:
    """Return plates in the order of a tensor's dimensions, from left to right."""
    return tuple(sorted(plates, key=lambda p: p.dim))
