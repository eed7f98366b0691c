"""Keep the optimizer state of small parameters in flat tensors, so that a graph updates all of them at once.

Adam and related optimizers act elementwise: stepping eighty scalars one by one equals stepping their concatenation, but
takes a graph of eighty times the operators. So the state of small parameters with equal settings, such as
``optimizer.state[p]["exp_avg"]``, becomes views of one flat tensor. Optimizers, ``state_dict`` and uncompiled steps see
ordinary state; a captured step takes the flat tensor. The views themselves tell which flat tensor they belong to
(``_base``), so there is no second record to update: state that was loaded or replaced has no base and moves to a new
flat tensor.
"""

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor, optim
from torch.optim import Optimizer

SMALL = 1024  # parameters with fewer elements are updated together
_ELEMENTWISE = (
    *(optim.Adam, optim.AdamW, optim.SGD, optim.RMSprop, optim.Adagrad, optim.Adamax, optim.NAdam, optim.Adadelta),
    *(optim.Rprop, ClippedAdam),
)
_COUNTS = ("step", "mu_product")  # one number per parameter of any shape


@dataclass(frozen=True, eq=False)
class OptimizedParameter:
    """A parameter with its optimizer and parameter group."""

    optimizer: Optimizer
    group: dict[str, Any]
    parameter: Tensor

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state of the parameter."""
        return self.optimizer.state.get(self.parameter, {})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the state."""
        return {key: x for key, x in self.state.items() if isinstance(x, Tensor)}

    def kind(self) -> Hashable:
        """Return a key that is equal for parameters that can be stepped as one concatenation."""
        p = self.parameter
        group = [(k, id(x) if isinstance(x, Tensor) else repr(x)) for k, x in self.group.items() if k not in _OWN]
        state = [(k, x.item() if k in _COUNTS else x.dtype) for k, x in self.tensors().items()]
        numbers = [(k, repr(x)) for k, x in self.state.items() if not isinstance(x, Tensor)]
        return type(self.optimizer), p.dtype, p.device, *group, *state, *numbers

    def home(self) -> tuple[int, ...] | None:
        """Return the identities of the flat tensors that hold the state; None if part of the state is not in one."""
        bases = [x._base for x in self.tensors().values()]
        places = {x.storage_offset() for k, x in self.tensors().items() if k not in _COUNTS}
        flat = all(base is not None and base.dim() == 1 and base.is_contiguous() for base in bases)
        return tuple(map(id, bases)) if flat and len(places) <= 1 else None


_OWN = ("params", "initial_lr")  # settings that do not affect a group's update


class FlatGroup:
    """Small parameters that are updated as one.

    Args:
        members: parameters of one kind, with their state in the same flat tensors.
    """

    def __init__(self, members: list[OptimizedParameter]) -> None:
        self.members = members
        self.parameters = [m.parameter for m in members]
        self._sizes = [p.numel() for p in self.parameters]
        self._bases: dict[str, Any] = {k: x._base for k, x in members[0].tensors().items()}
        self._views = {k: [m.state[k] for m in members] for k in self._bases}
        self._starts = {k: [x.storage_offset() for x in views] for k, views in self._views.items()}
        self._versions = self._count_versions()
        self._moving = moving(members[0].group)

    def _count_versions(self) -> list[int]:
        return [base._version for key, base in self._bases.items() if key in _COUNTS]

    def even(self) -> bool:
        """Return whether the members still share what schedulers move, and the step counts, which users may change."""
        first = self.members[0]
        for key in self._moving:
            shared = first.group[key]
            if not all(m.group[key] == shared for m in self.members):
                return False
        if isinstance(first.optimizer, ClippedAdam):
            return all(m.state["step"] == first.state["step"] for m in self.members)
        if (versions := self._count_versions()) == self._versions:
            return True
        self._versions = versions
        counts = [views for key, views in self._views.items() if key in _COUNTS]
        return all(bool((torch.stack(views) == views[0]).all()) for views in counts)

    def join(self, tensors: Iterable[Tensor]) -> Tensor:
        """Concatenate one tensor per member to a flat tensor."""
        parts = list(tensors)
        if all(x.dim() == 0 for x in parts):
            return torch.stack(parts)
        return torch.cat([x.reshape(-1) for x in parts])

    def split(self, x: Tensor) -> Iterator[Tensor]:
        """Split a flat tensor into one tensor per member, in the shape of its parameter."""
        starts = itertools.accumulate(self._sizes, initial=0)  # functionalize turns one split into n² operators
        for start, p in zip(starts, self.parameters, strict=False):
            yield x[start] if p.dim() == 0 else x[start : start + p.numel()].view(p.shape)

    def take(self) -> dict[str, Any]:
        """Return a copy of the members' state as that of one flat parameter."""
        return self.members[0].state | {key: self._taken(key) for key in self._bases}

    def _taken(self, key: str) -> Tensor:
        base, starts = self._bases[key], self._starts[key]
        if key in _COUNTS:
            return base[starts[0]].clone()
        if self._is_all(key):
            return base.clone()
        return torch.cat([base[a : a + n] for a, n in zip(starts, self._sizes, strict=True)])

    def put(self, state: Mapping[str, Any]) -> None:
        """Write back the state from :meth:`take`, after a step has changed it."""
        for key, base in self._bases.items():
            sizes = [1] * len(self.members) if key in _COUNTS else self._sizes
            x = state[key].to(base.dtype).expand(sum(sizes))
            if self._is_all(key):
                base.copy_(x)
                continue
            for start, part in zip(self._starts[key], x.split(sizes), strict=True):
                base[start : start + len(part)].copy_(part)

    def _is_all(self, key: str) -> bool:
        """Return whether the members fill their flat tensor, in order."""
        sizes = [1] * len(self.members) if key in _COUNTS else self._sizes
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return self._starts[key] == starts and len(self._bases[key]) == sum(sizes)


def moving(group: Mapping[str, Any]) -> list[str]:
    """Return the settings of an optimizer's group that are inputs of a captured step: schedulers move them."""
    cycled = "max_momentum" in group  # by OneCycleLR or CyclicLR
    rate = isinstance(group.get("lr"), float | int)
    return [k for k, moves in (("lr", rate), ("betas", cycled), ("momentum", cycled)) if moves and k in group]


def flatten(optimizers: Iterable[Optimizer]) -> list[FlatGroup]:
    """Group small parameters that have a gradient, and move their state to flat tensors where it is not yet."""
    held = [OptimizedParameter(o, g, p) for o in optimizers for g in o.param_groups for p in g["params"]]
    alike: dict[Hashable, list[OptimizedParameter]] = defaultdict(list)
    for member in held:
        if _can_be_flat(member):
            alike[member.kind()].append(member)
    flats: list[FlatGroup] = []
    for members in alike.values():
        homes: dict[Any, list[OptimizedParameter]] = defaultdict(list)
        for member in members:
            homes[member.home()].append(member)
        if None in homes:
            _move(homes[None])
        flats += [FlatGroup(there) for there in homes.values()]
    return flats


def _can_be_flat(member: OptimizedParameter) -> bool:
    p = member.parameter
    with_gradient = p.grad is not None and p.grad.layout is torch.strided
    return type(member.optimizer) in _ELEMENTWISE and p.numel() < SMALL and with_gradient


def _move(members: list[OptimizedParameter]) -> None:
    """Replace the state of the members by views of new flat tensors."""
    with torch.no_grad():
        for key in members[0].tensors():
            old = [m.state[key] for m in members]
            base = torch.cat([x.reshape(-1) for x in old])
            for member, x, part in zip(members, old, base.split([x.numel() for x in old]), strict=True):
                member.state[key] = part.view(x.shape)
