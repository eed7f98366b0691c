"""The sample statements of a Pyro program as typed records.

:class:`Site` holds one statement of one run; everything above this room sees only such values.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import torch
from pyro.distributions import Delta
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyro_elbo.assumptions import defer_check, is_capturing
from pyro_elbo.errors import GuideError, NonFiniteError, SiteError, count_nonfinite, first_sentence
from pyro_elbo.masking import masked
from pyro_elbo.sequences import StackedDistribution, fill_masked

SiteRole = Literal["latent", "observed", "factor", "auxiliary", "deterministic", "constant"]


@dataclass(frozen=True)
class Baseline:
    """What ``infer={"baseline": {...}}`` asks to be subtracted from the reward of a site, as in Pyro's TraceGraph_ELBO.

    Attributes:
        network, input: a network and what it predicts the reward from; no gradient reaches the input.
        value: a prediction that the guide has made itself.
        decaying: subtract the decaying average of earlier rewards too.
        decay: the share of the old average in the new one.
    """

    network: Callable[..., Tensor] | None
    input: Any
    value: Tensor | None
    decaying: bool
    decay: float

    @property
    def predicts(self) -> bool:
        """Whether something is trained to predict the reward."""
        return self.network is not None or self.value is not None


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


class Turn(NamedTuple):
    """Which of the values of its support a site has in one of the runs that take them in turn."""

    index: int
    count: int


@dataclass(frozen=True)
class Site:
    """A sample statement of one run.

    Attributes:
        role: ``latent`` (of the model, or the guide's site of that name), ``observed``, ``factor``
            (``pyro.factor``), ``auxiliary`` (only in the guide), ``deterministic`` (``pyro.deterministic``, or what
            ``poutine.reparam`` computes from the latents in its place) or ``constant`` (conditioned on, but no datum).
        fn: the distribution without its mask.
        plates: the vectorized plates around the site, outermost first, without the plate of the particles; then one
            per batch dimension that no plate declares.
        scale: the factor on the log density (subsampling, ``poutine.scale``).
        mask: the entries that count; None if all do.
        baseline: of a site of the guide, what is subtracted from the reward of its score function.
        fixed: the same site of a run at the same draws, as constants: its log density has the gradient of the
            distribution's own parameters alone, which log q then leaves out. None: the whole gradient.
        scored: the draw is a constant: its gradient is that of the score function, whatever its distribution.
        variables: the enumerated site behind each batch dimension left of the plates that the density may have.
        marked: whether the program asks for enumeration of the site.
        enum_dim: the batch dimension along which the value holds the whole support; None for one value.
        turn: of a site of the guide that has one value of its support in this run, and the others in further runs.
    """

    name: str
    role: SiteRole
    fn: Distribution
    value: Tensor
    plates: tuple[Plate, ...]
    scale: float | Tensor
    mask: Tensor | bool | None
    baseline: Baseline | None = None
    fixed: "Site | None" = None
    scored: bool = False
    variables: Mapping[int, str] = field(default_factory=dict)
    enum_dim: int | None = None
    marked: bool = False
    turn: Turn | None = None

    @property
    def has_density(self) -> bool:
        """Whether the site has a share in the joint density."""
        steps_count = self.fn.counted is not False if isinstance(self.fn, StackedDistribution) else True
        return self.role != "deterministic" or (self.mask is not False and steps_count)

    @property
    def is_drawn(self) -> bool:
        """Whether the guide draws the site, and does not compute it from others."""
        return self.role in ("latent", "auxiliary") and not is_point(self.fn)

    @property
    def is_enumerated(self) -> bool:
        """Whether the site has all values of its support, side by side or in turn."""
        return self.enum_dim is not None or self.turn is not None

    @property
    def event_dim(self) -> int:
        """The number of dimensions of one event, on the right of the value."""
        return len(self.fn.event_shape)

    @property
    def depends_on(self) -> set[str]:
        """The enumerated sites over whose values the density extends, this one included."""
        if not self.variables:
            return set()
        shapes = [self.fn.batch_shape, self.value.shape[: self.value.dim() - self.event_dim]]
        shapes += [self.mask.shape] if isinstance(self.mask, Tensor) else []
        own = () if self.enum_dim is None else (self.variables[self.enum_dim],)
        return {v for d, v in self.variables.items() if any(len(s) >= -d and s[d] > 1 for s in shapes)}.union(own)

    def log_prob(self) -> Tensor:
        """Return the log density at the value in nats: masked, unscaled, batch dimensions aligned with the plates."""
        if self.role == "observed" and self.fn._validate_args is not False:
            defer_check(lambda: masked(~self.fn.support.check(self.value), self.mask).logical_not().all())
        found = self._evaluate(self.fn.log_prob)
        if found.is_complex():
            raise SiteError(
                f"Site '{self.name}': the log density of {type(self.fn).__name__} is complex, expected a real one. "
                "Give real and imaginary parts as two numbers."
            )
        return masked(found, self.mask)

    def check_values(self) -> None:
        """Raise NonFiniteError for values that are NaN or infinite."""
        if self.value.is_floating_point() and not torch.isfinite(self.value).all():
            raise NonFiniteError(
                f"Site '{self.name}': {count_nonfinite(self.value)}. Remove them, or mark them as missing with "
                "pyro.poutine.mask or obs_mask."
            )

    def score_parts(self) -> ScoreParts:
        """Return Pyro's three parts of the gradient estimator: unscaled, log density and entropy term masked."""
        if self.scored:
            log_prob = self._evaluate(self.fn.log_prob)
            no_path: Any = 0.0
            return ScoreParts(masked(log_prob, self.mask), log_prob, no_path)
        return self._evaluate(self.fn.score_parts).scale_and_mask(1.0, self.mask)

    def stepwise(self) -> "Site":
        """Return the site of a scan with time as its innermost plate, and any other site as it is.

        Time is a plate in shape only: the steps are not independent.
        """
        fn, mask, scale = self.fn, self.mask, self.scale
        if not isinstance(fn, StackedDistribution):
            return self
        mask = mask.unsqueeze(-1) if isinstance(mask, Tensor) else mask
        scale = scale.unsqueeze(-1) if isinstance(scale, Tensor) else scale
        if fn.counted is not None and fn.counted is not True:
            mask = fn.counted if mask is None or mask is True else mask & fn.counted
        size = fn.event_shape[0]
        plates = tuple(p._replace(dim=p.dim - 1) for p in self.plates) + (Plate(fn.run.time, -1, size, size),)
        value = fill_masked(fn.steps, self.value, mask) if self.role == "observed" else self.value
        fixed = None if self.fixed is None else self.fixed.stepwise()
        return replace(self, fn=fn.steps, value=value, plates=plates, scale=scale, mask=mask, fixed=fixed)

    def _evaluate(self, function: Callable[[Tensor], Any]) -> Any:
        try:
            return function(self.value)
        except KeyError as error:
            raise GuideError(
                f"Site '{self.name}': {type(self.fn).__name__} has a density for its own draws only, since a transform "
                "has no inverse. Use a transform with an inverse, or gradient='auto'."
            ) from error
        except (ValueError, RuntimeError) as error:
            if is_capturing():
                raise
            self.check_values()
            raise SiteError(self._misfit(error)) from error

    def _misfit(self, error: Exception) -> str:
        """Explain a value of the wrong shape or outside the support, with the cure."""
        expected, got = tuple(self.fn.batch_shape + self.fn.event_shape), tuple(self.value.shape)
        kind, reason = type(self.fn).__name__, first_sentence(error)
        if "support" in reason:
            return (
                f"Site '{self.name}': the value lies outside the support of {kind}: {reason} Choose a distribution "
                "whose support holds the data, or transform them."
            )
        if not self.value.is_floating_point() and expected == got:
            return (
                f"Site '{self.name}': expected values of a floating-point dtype for {kind}, got {self.value.dtype}: "
                f"{reason} Convert the data with .float(), or use a distribution over integers."
            )
        return (
            f"Site '{self.name}': expected a value of shape {expected} for {kind}, got {got}: {reason} Give the "
            f"value the event shape {tuple(self.fn.event_shape)} (.to_event(n) sets it), and a plate to every other "
            "dimension."
        )


def check_data(sites: Iterable[Site]) -> None:
    """Raise NonFiniteError for observed values that are NaN or infinite."""
    for site in sites:
        if site.role == "observed":
            site.check_values()


def sort_by_dim(plates: Iterable[Plate]) -> tuple[Plate, ...]:
    """Return plates in the order of a tensor's dimensions, from left to right."""
    return tuple(sorted(plates, key=lambda p: p.dim))


def shared_plate(stacks: Iterable[tuple[Plate, ...]]) -> Plate | None:
    """Return the outermost plate that all stacks of plates hold, leaving out empty ones."""
    first, *others = [stack for stack in stacks if stack] or [()]
    return next((p for p in first if all(p in stack for stack in others)), None)


def fixed_sites(model: Iterable[Site]) -> set[str]:
    """Return the constants of a model, in program order, whose density no latent can change: they precede them all."""
    return {s.name for s in takewhile(lambda s: s.role != "latent", model) if s.role == "constant"}


def is_point(fn: Distribution) -> bool:
    """Return whether a distribution puts all its mass on one value."""
    while isinstance(fn, Independent | MaskedDistribution | StackedDistribution):
        fn = fn.steps if isinstance(fn, StackedDistribution) else fn.base_dist
    return isinstance(fn, Delta)


def source_of(latent: Site, guide: Mapping[str, Site]) -> Site | None:
    """Return the auxiliary site that a guide only transforms into ``latent``, as AutoNormal does.

    Such a pair is one draw: the latent is a point given the auxiliary site, of the same plates and scale.
    """
    source = guide.get(f"{latent.name}_unconstrained")
    if source is None or source.role != "auxiliary" or not is_point(latent.fn) or source.plates != latent.plates:
        return None
    return source if source.fn.batch_shape == latent.fn.batch_shape else None
