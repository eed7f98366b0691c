"""The state of small parameters in a few flat tensors, so that a graph updates all of them at once.

Adam and its kin act on each element by itself: to step eighty scalars one by one or their concatenation is the same,
but one graph has eighty times the operators of the other. So ``optimizer.state[p]["exp_avg"]`` of small parameters that
share settings become views of one flat tensor. Optimizers, ``state_dict`` and steps in Python see what they always see;
a captured step takes the flat tensor. Where it lies is read from the views themselves (``_base``), so that nothing
needs to be kept in step: state that was loaded or replaced has no base, and is moved to a new flat tensor.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor, optim
from torch.optim import Optimizer

SMALL = 1024  # elements of a parameter from which its own loop is worth it
_ELEMENTWISE = (
    *(optim.Adam, optim.AdamW, optim.SGD, optim.RMSprop, optim.Adagrad, optim.Adamax, optim.NAdam, optim.Adadelta),
    *(optim.Rprop, ClippedAdam),
)
_COUNTS = ("step", "mu_product")  # one number per parameter, whatever its shape


@dataclass(frozen=True, eq=False)
class OptimizedParameter:
    """A parameter with the optimizer and the group that it is in."""

    optimizer: Optimizer
    group: dict[str, Any]
    parameter: Tensor

    @property
    def state(self) -> dict[str, Any]:
        """What the optimizer keeps for the parameter."""
        return self.optimizer.state.get(self.parameter, {})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the state."""
        return {key: x for key, x in self.state.items() if isinstance(x, Tensor)}

    def kind(self) -> Hashable:
        """Equal for members that one step on a concatenation can serve."""
        p = self.parameter
        group = [(k, id(x) if isinstance(x, Tensor) else repr(x)) for k, x in self.group.items() if k not in _OWN]
        state = [(k, x.item() if k in _COUNTS else x.dtype) for k, x in self.tensors().items()]
        numbers = [(k, repr(x)) for k, x in self.state.items() if not isinstance(x, Tensor)]
        return type(self.optimizer), p.dtype, p.device, *group, *state, *numbers

    def home(self) -> tuple[int, ...] | None:
        """The flat tensors that hold the state, by identity; None where one of them is on its own."""
        bases = [x._base for x in self.tensors().values()]
        places = {x.storage_offset() for k, x in self.tensors().items() if k not in _COUNTS}
        flat = all(base is not None and base.dim() == 1 and base.is_contiguous() for base in bases)
        return tuple(map(id, bases)) if flat and len(places) <= 1 else None


_OWN = ("params", "initial_lr")  # settings that say nothing of how a group is updated


class FlatGroup:
    """Small parameters that are updated as one.

    Args:
        members: of one kind, with their state in the same flat tensors.
    """

    def __init__(self, members: list[OptimizedParameter]) -> None:
        self.members = members
        self.parameters = [m.parameter for m in members]
        self._sizes = [p.numel() for p in self.parameters]
        self._bases: dict[str, Any] = {k: x._base for k, x in members[0].tensors().items()}
        self._views = {k: [m.state[k] for m in members] for k in self._bases}
        self._starts = {k: [x.storage_offset() for x in views] for k, views in self._views.items()}
        self._versions = self._count_versions()

    def _count_versions(self) -> list[int]:
        return [base._version for key, base in self._bases.items() if key in _COUNTS]

    def even(self) -> bool:
        """Whether the members still share their rate and their counts, which Python may change one by one."""
        first = self.members[0]
        if not all(m.group["lr"] is first.group["lr"] or m.group["lr"] == first.group["lr"] for m in self.members):
            return False
        if isinstance(first.optimizer, ClippedAdam):
            return all(m.state["step"] == first.state["step"] for m in self.members)
        if (versions := self._count_versions()) == self._versions:
            return True
        self._versions = versions
        counts = [views for key, views in self._views.items() if key in _COUNTS]
        return all(bool((torch.stack(views) == views[0]).all()) for views in counts)

    def join(self, tensors: Iterable[Tensor]) -> Tensor:
        """One tensor per member -> one flat tensor."""
        return torch.cat([x.reshape(-1) for x in tensors])

    def split(self, x: Tensor) -> Iterator[Tensor]:
        """A flat tensor -> one tensor per member, in the shape of its parameter."""
        starts = itertools.accumulate(self._sizes, initial=0)  # functionalize makes n² operators of one split
        for start, p in zip(starts, self.parameters, strict=False):
            yield x[start] if p.dim() == 0 else x[start : start + p.numel()].view(p.shape)

    def take(self) -> dict[str, Any]:
        """The state of the members as that of one flat parameter: copies."""
        return self.members[0].state | {key: self._taken(key) for key in self._bases}

    def _taken(self, key: str) -> Tensor:
        base, starts = self._bases[key], self._starts[key]
        if key in _COUNTS:
            return base[starts[0]].clone()
        if self._is_all(key):
            return base.clone()
        return torch.cat([base[a : a + n] for a, n in zip(starts, self._sizes, strict=True)])

    def put(self, state: Mapping[str, Any]) -> None:
        """Write what :meth:`take` gave and a step has changed."""
        for key, base in self._bases.items():
            sizes = [1] * len(self.members) if key in _COUNTS else self._sizes
            x = state[key].to(base.dtype).expand(sum(sizes))
            if self._is_all(key):
                base.copy_(x)
                continue
            for start, part in zip(self._starts[key], x.split(sizes), strict=True):
                base[start : start + len(part)].copy_(part)

    def _is_all(self, key: str) -> bool:
        """Whether the members fill their flat tensor in its order."""
        sizes = [1] * len(self.members) if key in _COUNTS else self._sizes
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return self._starts[key] == starts and len(self._bases[key]) == sum(sizes)


def flatten(optimizers: Iterable[Optimizer]) -> list[FlatGroup]:
    """Move the state of small parameters that have a gradient to flat tensors, unless it is there already."""
    held = [OptimizedParameter(o, g, p) for o in optimizers for g in o.param_groups for p in g["params"]]
    times = Counter(m.parameter for m in held)  # pyro.optim steps a parameter of two names twice
    alike: dict[Hashable, list[OptimizedParameter]] = defaultdict(list)
    for member in held:
        if times[member.parameter] == 1 and _can_be_flat(member):
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
