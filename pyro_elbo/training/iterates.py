"""What training moves, to be read, averaged and put back: parameters, the optimizer's state, and its learning rates."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from pyro_elbo.errors import ArgumentError

WATCHED = 256  # parameters whose iterates are kept


class Iterates:
    """The unconstrained parameters as one vector: a mean of constrained values may violate their constraint."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        size = sum(p.numel() for p in self._parameters)
        chosen = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:WATCHED]
        self._watched = chosen.sort().values.to(self._parameters[0].device)

    def read(self) -> Float[Tensor, " parameters"]:
        """Return a copy of all parameters."""
        return torch.cat([p.detach().reshape(-1) for p in self._parameters])

    def write(self, x: Float[Tensor, " parameters"]) -> None:
        """Set all parameters in place."""
        parts = x.split([p.numel() for p in self._parameters])
        with torch.no_grad():
            for p, part in zip(self._parameters, parts, strict=True):
                p.copy_(part.view(p.shape))

    def watched(self, x: Float[Tensor, " parameters"]) -> Float[np.ndarray, " watched"]:
        """Return the elements whose iterates are kept: all, or a random choice of many."""
        return x[self._watched].cpu().numpy()


class OptimizerState:
    """A copy of the state of optimizers, to be restored in place.

    Compiled steps move state to other tensors, so the copy names each by the dictionary that holds it.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._kept = [
            (state, key, x.clone() if isinstance(x, Tensor) else x)
            for optimizer in optimizers
            for state in optimizer.state.values()
            for key, x in state.items()
        ]

    def restore(self) -> None:
        """Restore the state."""
        with torch.no_grad():
            for state, key, x in self._kept:
                if isinstance(x, Tensor):
                    state[key].copy_(x)
                else:
                    state[key] = x


class LearningRates:
    """The learning rates of all groups of some optimizers, moved together."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._groups = [(group, float(group["lr"])) for optimizer in optimizers for group in optimizer.param_groups]
        self.largest = max(rate for _, rate in self._groups)
        if self.largest <= 0 or any(group.get("lrd", 1.0) != 1.0 for group, _ in self._groups):
            raise ArgumentError(
                f"The learning rate must be positive and constant, got {self.largest:g}: converge lowers it by itself. "
                "Use an optimizer without decay, such as pyro.optim.Adam({'lr': 0.05})."
            )

    def scale(self, factor: float) -> None:
        """Set every learning rate to ``factor`` times what it was at first."""
        for group, rate in self._groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(factor * rate)
            else:
                group["lr"] = factor * rate
