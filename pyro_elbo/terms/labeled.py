"""Tensors whose dimensions have names: the plates, the particles, and the enumerated variables of a run.

Pyro recycles the dimensions of enumerated sites along a ``pyro.markov`` loop, so that one dimension may mean different
variables at two sites. Under names, tensors of different sites can be multiplied.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_elbo.programs import Site
from pyro_elbo.sequences import StackedDistribution


class Label(NamedTuple):
    """The name of a dimension.

    Attributes:
        kind: ``batch`` for plates and particles, ``value`` for the support of a site, ``event`` for a dimension of one
            event. Their order in a tensor is value, batch, event.
        name: of the site, for ``value``.
        dim: counted from the right, without the event for ``batch``; 0 for the time of a scan, right of all plates.
        size: of a batch dimension. Two plates of one size at one dimension need not be told apart: no density joins
            their rows except through what lies outside of both.
    """

    kind: Literal["value", "batch", "event"]
    name: str
    dim: int
    size: int


@dataclass(frozen=True)
class Labeled:
    """A tensor with a label for each dimension.

    Attributes:
        x: the tensor.
        labels: of its dimensions, from left to right, in the order of ``sort_labels``.
    """

    x: Tensor
    labels: tuple[Label, ...]

    @property
    def variables(self) -> set[str]:
        """The sites over whose support the tensor extends."""
        return {a.name for a in self.labels if a.kind == "value"}

    def expand(self, labels: Iterable[Label]) -> "Labeled":
        """Broadcast over further labels."""
        order = sort_labels({*self.labels, *labels})
        return Labeled(align(self, order).expand([a.size for a in order]), order)

    def sum(self, labels: Iterable[Label]) -> "Labeled":
        """Sum over the labels that the tensor has."""
        gone = [i for i, a in enumerate(self.labels) if a in set(labels)]
        return Labeled(self.x.sum(gone), tuple(a for a in self.labels if a not in set(labels))) if gone else self

    def map(self, x: Tensor) -> "Labeled":
        """Return another tensor with the same labels."""
        return Labeled(x, self.labels)

    def __add__(self, other: "Labeled") -> "Labeled":
        return combine(torch.add, self, other)

    def __sub__(self, other: "Labeled") -> "Labeled":
        return combine(torch.sub, self, other)

    def __mul__(self, other: "Labeled | float") -> "Labeled":
        return combine(torch.mul, self, other) if isinstance(other, Labeled) else self.map(self.x * other)


def sort_labels(labels: Iterable[Label]) -> tuple[Label, ...]:
    """Return labels in the order of dimensions: values by name, then batch and event from left to right."""
    return tuple(sorted(labels, key=lambda a: (("value", "batch", "event").index(a.kind), a.name, a.dim, a.size)))


def align(x: Labeled, order: tuple[Label, ...]) -> Tensor:
    """Return a view that broadcasts over ``order``, which holds all labels of ``x``."""
    return x.x[tuple(slice(None) if a in x.labels else None for a in order)] if order != x.labels else x.x


def combine(function: Callable[..., Tensor], *parts: Labeled) -> Labeled:
    """Apply an elementwise function to tensors aligned by their labels."""
    order = sort_labels({a for p in parts for a in p.labels})
    return Labeled(function(*(align(p, order) for p in parts)), order)


def add(parts: Sequence[Labeled]) -> Labeled:
    """Return the sum of tensors."""
    order = sort_labels({a for x in parts for a in x.labels})
    return Labeled(sum((align(x, order) for x in parts[1:]), start=align(parts[0], order)), order)


def label(x: Tensor, variables: Mapping[int, str], own: int | None = None, event_dim: int = 0) -> Labeled:
    """Name the dimensions of a density; those of size one go, but for the site's own variable.

    Args:
        x: batch dimensions as in the run, then ``event_dim`` dimensions of the event.
        variables: the site behind each batch dimension left of the plates.
        own: the batch dimension of the site's own support.
    """
    labels = []
    for i, size in enumerate(x.shape):
        d = i - x.dim() + event_dim
        if d >= 0:
            labels.append(Label("event", "", d, size))
        elif d in variables and (size > 1 or d == own):
            labels.append(Label("value", variables[d], 0, size))
        else:
            labels.append(None if size == 1 else Label("batch", "", d, size))
    x = x.squeeze([i for i, a in enumerate(labels) if a is None]) if None in labels else x
    found = [a for a in labels if a is not None]
    order = sort_labels(found)
    return Labeled(x.permute([found.index(a) for a in order]), order)


def label_site(x: Tensor, site: Site, event_dim: int = 0) -> Labeled:
    """Name the dimensions of a density of a site."""
    return label(x, site.variables, site.enum_dim, event_dim)


def label_steps(x: Tensor, site: Site) -> Labeled:
    """Name the dimensions of the density of ``site.stepwise()``: that of a scan has time on the right."""
    if not isinstance(site.fn, StackedDistribution):
        return label_site(x, site)
    named = label(x, site.variables, site.enum_dim, 1)
    return Labeled(named.x, tuple(time_label(site) if a.kind == "event" else a for a in named.labels))


def time_label(site: Site) -> Label:
    """Return the label of the time of a scan's site."""
    return Label("batch", "", 0, site.fn.event_shape[0])


def is_time(a: Label) -> bool:
    """Return whether a label is that of the time of a scan."""
    return a.kind == "batch" and a.dim == 0


def unlabel(x: Labeled) -> Tensor:
    """Return a tensor with the batch dimensions of a run, without enumerated ones, those of its event, and time."""
    assert not x.variables, x.labels
    sizes = {a.dim: a.size for a in x.labels if a.kind == "batch"}
    events = [a.size for a in x.labels if a.kind == "event"]
    last = 1 if 0 in sizes else 0
    return x.x.reshape([*(sizes.get(d, 1) for d in range(min(sizes, default=0), last)), *events])


def values_last(x: Labeled, *names: str) -> Labeled:
    """Return a tensor whose dimensions of the values of sites are the last ones, of an event."""
    own = [next(a for a in x.labels if a.kind == "value" and a.name == n) for n in names]
    events = [Label("event", "", i, a.size) for i, a in enumerate(own)]
    moved = x.x.movedim([x.labels.index(a) for a in own], list(range(-len(own), 0)))
    return Labeled(moved, (*(a for a in x.labels if a not in own), *events))


def plate_labels(site: Site) -> frozenset[Label]:
    """Return the labels of a site's plates, and of its time in a scan; a plate of one row needs none."""
    plates = frozenset(Label("batch", "", p.dim, p.size) for p in site.plates if p.size > 1)
    return plates | {time_label(site)} if isinstance(site.fn, StackedDistribution) else plates
