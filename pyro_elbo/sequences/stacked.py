r"""The distribution of one site over all steps of a scan.

.. math:: \log p(v_{1:T}) = \sum_t \log p_t(v_t)

where each :math:`p_t` was conditioned, as the program ran, on what came before. Time is the first dimension of the
event: steps are not independent, so they are no plate.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Distribution, constraints, kl, transform_to
from torch.distributions.transforms import Transform

from pyro_elbo.errors import SiteError
from pyro_elbo.masking import both, expand_to_event, mask_in_event, masked


def fill_masked(fn: Distribution, value: Tensor, mask: Tensor | bool | None) -> Tensor:
    """Replace masked values that are not finite by a point of the support, since 0 · NaN is NaN in the gradient."""
    steps = fn.steps if isinstance(fn, StackedDistribution) else fn
    counted = both(
        expand_to_event(mask, len(fn.event_shape)) if isinstance(mask, Tensor) else mask, mask_in_event(steps)
    )
    if not isinstance(counted, Tensor) or not value.is_floating_point() or isinstance(steps, RecordedDensity):
        return value
    missing = ~counted & ~torch.isfinite(value)
    return torch.where(missing, _point_inside(fn.support, value), value)


def _point_inside(support: Any, value: Tensor) -> Tensor:
    """Return a point of the support, shaped like ``value``."""
    if isinstance(support, constraints.independent):
        return _point_inside(support.base_constraint, value)
    if isinstance(support, constraints.MixtureSameFamilyConstraint):
        components = -1 - support.event_dim
        return _point_inside(support.base_constraint, value.unsqueeze(components)).select(components, 0)
    if constraints.is_dependent(support) or support.is_discrete:
        return torch.zeros_like(value)
    transform = transform_to(support)
    return transform(value.new_zeros(transform.inverse_shape(value.shape)))


@dataclass(frozen=True, eq=False)
class ScanRun:
    """One run of a scan, shared by its sites: the name of its time dimension and its direction."""

    time: str
    reverse: bool


class Narrow(NamedTuple):
    """A distribution of all steps before its plates broadcast it, and all values of its site."""

    steps: Distribution
    value: Tensor


class StackedDistribution(TorchDistribution):
    """The distribution of one site over all steps; sampling returns the values of the scan.

    Args:
        steps: the distribution of each step, batch shape plates + (T,).
        value: the values drawn or given in the scan, shape plates + (T,) + event.
        counted: the mask of the steps that count, broadcastable to plates + (T,); None or True for all.
        run: the scan that produced it.
        narrow: of a site whose values are enumerated: what its density needs, which many plates leave the same.
    """

    arg_constraints: Any = {}

    def __init__(
        self,
        steps: Distribution,
        value: Tensor,
        counted: Bool[Tensor, "..."] | bool | None,
        run: ScanRun,
        narrow: Narrow | None = None,
    ) -> None:
        self.steps, self.value, self.counted, self.run, self.narrow = steps, value, counted, run, narrow
        batch_shape = steps.batch_shape
        super().__init__(batch_shape[:-1], batch_shape[-1:] + steps.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws carry the pathwise gradient."""
        return self.steps.has_rsample

    @property
    def support(self) -> Any:
        """The support of the steps, with time as an event dimension."""
        return constraints.independent(self.steps.support, 1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Return the values of the scan; new draws need a new run of the program."""
        if sample_shape:
            raise SiteError(
                "Sites of a pe.scan cannot be sampled again on their own, since each step depends on the one before. "
                "Run the program again."
            )
        return self.value

    rsample: Any = sample

    def log_prob(self, value: Tensor) -> Tensor:
        """Return Σ_t log p_t(value_t) over the steps that count, shape plates (nats)."""
        return masked(self.steps.log_prob(fill_masked(self.steps, value, self.counted)), self.counted).sum(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "StackedDistribution":
        """Broadcast the steps over more rows."""
        batch_shape = Size(batch_shape)
        if batch_shape == self.batch_shape:
            return self
        steps = self.steps.expand(batch_shape + self.event_shape[:1])
        value = self.value.expand(batch_shape + self.event_shape)
        return StackedDistribution(steps, value, self.counted, self.run, self.narrow)


def _kl_stacked(q: StackedDistribution, p: StackedDistribution) -> Tensor:
    """Return Σ_t KL(q_t ‖ p_t), exact given the draws of earlier steps if both scans run in the same direction."""
    if q.run.reverse != p.run.reverse:
        raise NotImplementedError
    return masked(kl.kl_divergence(q.steps, p.steps), p.counted).sum(-1)


kl.register_kl(StackedDistribution, StackedDistribution)(_kl_stacked)


class RecordedDensity(TorchDistribution):
    """The recorded log density of one value, in place of a distribution that cannot be stacked over time.

    A flow whose transforms hold tensors is one.
    """

    arg_constraints: Any = {}

    def __init__(self, like: Distribution, value: Tensor, log_prob: Tensor) -> None:
        self.value, self.density, self.like = value, log_prob, like
        super().__init__(log_prob.shape, like.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether the draw carries the pathwise gradient."""
        return self.like.has_rsample

    @property
    def support(self) -> Any:
        """The support of the recorded distribution."""
        return self.like.support

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of the recorded value (nats)."""
        if value is not self.value:
            raise SiteError(
                f"A {type(self.like).__name__} in a pe.scan has a log density for its own draws only. Run the program "
                "on other values instead (pyro.poutine.condition)."
            )
        return self.density


@dataclass(frozen=True)
class DistributionSpec:
    """A distribution without its tensors.

    Attributes:
        fn: a distribution of the same class and settings.
        parts: attribute -> the position of its tensor, the spec of a nested distribution, or a constant.
        count: the number of tensors.
    """

    fn: Distribution
    parts: Mapping[str, Any]
    count: int

    @property
    def kind(self) -> type[Distribution]:
        """The class of the distribution."""
        return type(self.fn)

    def matches(self, other: "DistributionSpec") -> bool:
        """Return whether two distributions differ only in the values of their tensors."""
        return (
            self.kind is other.kind
            and self.fn.batch_shape == other.fn.batch_shape
            and self.fn.event_shape == other.fn.event_shape
            and self.parts.keys() == other.parts.keys()
            and all(_same(x, other.parts[key]) for key, x in self.parts.items())
        )

    def unflatten(self, tensors: Sequence[Tensor], position: int) -> Distribution:
        """Build the distribution from tensors with one more batch dimension, at ``position``."""
        made, size = copy.copy(self.fn), tensors[0].shape[position]
        shape = self.fn.batch_shape
        vars(made)["_batch_shape"] = shape[:position] + (size,) + shape[position:]
        for key, x in self.parts.items():
            if isinstance(x, _Position):
                vars(made)[key] = tensors[x]
            elif isinstance(x, DistributionSpec):
                vars(made)[key] = x.unflatten(tensors, position)
        return made


class _Position(int):
    """The index of a tensor in a list."""


def flatten_distribution(fn: Distribution, tensors: list[Tensor]) -> DistributionSpec | None:
    """Append the tensors of ``fn`` to a list, each with all batch dimensions on its left, and return the spec.

    Return None for distributions that hold tensors in other ways, such as in the transforms of a flow.
    """
    try:
        fn = fn.expand(fn.batch_shape)  # gives tensors all batch dimensions
    except NotImplementedError:
        return None
    parts: dict[str, Any] = {}
    parameters = _parameters(fn)
    for key, x in vars(fn).items():
        if isinstance(x, Tensor):
            if (event_dim := _unexpanded_event_dim(fn, key)) is not None:
                x = x.expand(fn.batch_shape + x.shape[x.dim() - event_dim :])
            elif key != "_mask" and not any(x is y for y in parameters):
                return None  # such as a temperature: its dimensions are unknown
            elif x.shape[: len(fn.batch_shape)] != fn.batch_shape:
                return None
            known = [i for i, y in enumerate(tensors) if y is x]
            parts[key] = _Position(known[0] if known else len(tensors))
            tensors += [] if known else [x]
        elif isinstance(x, Distribution):
            parts[key] = flatten_distribution(x, tensors)
            if parts[key] is None:
                return None
        elif _holds_tensors(x):
            return None
        elif key != "_batch_shape":
            parts[key] = x
    return DistributionSpec(fn, parts, len(tensors)) if tensors else None


def _parameters(fn: Distribution) -> list[Any]:
    """Return the parameters that a distribution holds, its own and those of its base classes (a Chi2 is a Gamma)."""
    declared = (vars(kind).get("arg_constraints") for kind in type(fn).__mro__)
    names = set(fn.arg_constraints).union(*(x for x in declared if isinstance(x, Mapping)))
    return [x for key, x in vars(fn).items() if key in names]


def _unexpanded_event_dim(fn: Distribution, key: str) -> int | None:
    """Return the event dimensions of an attribute that ``expand`` leaves unchanged; None for other attributes."""
    if key == "_capacitance_tril":  # of LowRankMultivariateNormal
        return 2
    name = key.removeprefix("_unbroadcasted_")
    return None if name == key else fn.arg_constraints[name].event_dim


def copy_without_cache(fn: Distribution) -> Distribution:
    """Copy ``fn`` so that values it caches later, such as ``probs`` computed from ``logits``, do not reach the copy."""
    made = copy.copy(fn)
    vars(made).update({key: copy_without_cache(x) for key, x in vars(fn).items() if isinstance(x, Distribution)})
    return made


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, DistributionSpec):
        return isinstance(b, DistributionSpec) and a.matches(b)
    return type(a) is type(b) and (a is b or bool(a == b))


def _holds_tensors(x: Any, seen: tuple[Any, ...] = ()) -> bool:
    if isinstance(x, list | tuple):
        return any(_holds_tensors(y, seen) for y in x)
    if isinstance(x, Transform) and not isinstance(x, torch.nn.Module):
        if any(x is y for y in seen):  # a transform and its inverse refer to each other
            return False
        return any(_holds_tensors(y, (*seen, x)) for y in vars(x).values())
    return isinstance(x, Tensor | torch.nn.Module)
