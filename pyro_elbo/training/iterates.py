"""What training moves, to be read, averaged and put back: parameters, the optimizer's state, and its learning rates."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.optim import Optimizer

from pyro_elbo.compile import Snapshots
from pyro_elbo.errors import ArgumentError

WATCHED = 256  # parameters whose iterates are kept


class Iterates:
    """The unconstrained parameters as one vector: a mean of constrained values may violate their constraint."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        self.size = size = sum(p.numel() for p in self._parameters)
        chosen = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:WATCHED].sort().values
        self._watched = slice(None) if size <= WATCHED else chosen.to(self._parameters[0].device)

    def read(self) -> Float[Tensor, " parameters"]:
        """Return a copy of all parameters."""
        return torch.cat([p.detach().reshape(-1) for p in self._parameters])

    def write(self, x: Float[Tensor, " parameters"]) -> None:
        """Set all parameters in place."""
        parts = x.split([p.numel() for p in self._parameters])
        with torch.no_grad():
            for p, part in zip(self._parameters, parts, strict=True):
                p.copy_(part.view(p.shape))

    def snapshots(self, every: int, count: int) -> Snapshots | None:
        """Return what keeps iterates of steps that run on; None if it cannot, and they have to be read one by one."""
        return Snapshots(self._parameters, every, count) if Snapshots.can_be_of(self._parameters) else None

    def watched(self, x: Float[Tensor, "iterates parameters"]) -> Float[np.ndarray, "iterates watched"]:
        """Return the elements whose iterates are kept: all, or a random choice of many."""
        return x[:, self._watched].cpu().numpy()

    def drop_gradients(self) -> None:
        """Forget gradients: those of a step that failed would be added to the next ones."""
        for p in self._parameters:
            if p.grad is not None:
                p.grad = torch.zeros_like(p.grad)


@dataclass
class Collected:
    """A window of iterates: those that are watched, the averages of its halves, and the bound of every step."""

    halves: Float64[Tensor, "2 parameters"]
    watched: list[Float[np.ndarray, " watched"]] = field(default_factory=list)
    bounds: list[Float[np.ndarray, " steps"]] = field(default_factory=list)

    @staticmethod
    def none_of(x: Float[Tensor, " parameters"]) -> "Collected":
        """Return an empty window for vectors like ``x``."""
        return Collected(torch.zeros(2, len(x), dtype=torch.float64, device=x.device))

    def add(
        self,
        x: Float[Tensor, "iterates parameters"],
        watched: Float[np.ndarray, "iterates watched"],
        bounds: Float[np.ndarray, " steps"],
        records: int,
    ) -> None:
        """Add some of ``records`` iterates, all of one half, and the bounds of the steps that led to them."""
        self.halves[2 * len(self.watched) // records].add_(x.sum(0, dtype=torch.float64), alpha=2 / records)
        self.watched.extend(watched)
        self.bounds.append(bounds)

    @property
    def average(self) -> Float64[Tensor, " parameters"]:
        """The average of all iterates."""
        return self.halves.mean(0)

    def state(self) -> dict[str, Any]:
        """Return the window as tensors."""
        kept = {"watched": self.watched, "bounds": self.bounds}
        tensors = {name: [torch.from_numpy(x) for x in arrays] for name, arrays in kept.items()}
        return {"halves": self.halves.clone()} | tensors

    @staticmethod
    def of(state: dict[str, Any]) -> "Collected":
        """Return the window of a state."""
        return Collected(state["halves"], *([x.numpy() for x in state[name]] for name in ("watched", "bounds")))


class OptimizerState:
    """A copy of the state of optimizers, to be restored in place.

    Compiled steps move state to other tensors, so the copy names each by its parameter's place in the optimizer.

    Args:
        optimizers: the optimizers.
        kept: a copy that was made before; one is made now if omitted.
    """

    def __init__(self, optimizers: Sequence[Optimizer], kept: list[dict[str, Any]] | None = None) -> None:
        self._optimizers = optimizers
        self.kept = [{key: _copy(x) for key, x in s.items()} for s in self._states()] if kept is None else kept

    def restore(self) -> None:
        """Restore the state."""
        with torch.no_grad():
            for state, kept in zip(self._states(), self.kept, strict=True):
                for key, x in kept.items():
                    if isinstance(x, Tensor):
                        state[key].copy_(x)
                    else:
                        state[key] = x

    def _states(self) -> list[dict[str, Any]]:
        """Return the dictionary of each parameter, in the order of the groups."""
        return [
            optimizer.state.get(p, {})
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        ]


def _copy(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


class LearningRates:
    """The learning rates of all groups of some optimizers, moved together.

    Args:
        optimizers: the optimizers.
        rates: the first learning rate of each group; those of now if omitted.
    """

    def __init__(self, optimizers: Sequence[Optimizer], rates: list[float] | None = None) -> None:
        self._groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.rates = [float(group["lr"]) for group in self._groups] if rates is None else rates
        self.largest = max(self.rates)
        if self.largest <= 0 or any(group.get("lrd", 1.0) != 1.0 for group in self._groups):
            raise ArgumentError(
                f"The learning rate must be positive and constant, got {self.largest:g}: it is lowered by itself. "
                "Use an optimizer without decay, such as pyro.optim.Adam({'lr': 0.05})."
            )

    def scale(self, factor: float) -> None:
        """Set every learning rate to ``factor`` times what it was at first."""
        for group, rate in zip(self._groups, self.rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(factor * rate)
            else:
                group["lr"] = factor * rate
