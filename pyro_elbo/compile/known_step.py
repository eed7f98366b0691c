"""What is known of a training or evaluation step that has run."""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_elbo.compile.execution import Execution
from pyro_elbo.compile.gradients import Hooks, LeftGradients
from pyro_elbo.compile.guard import Guard
from pyro_elbo.compile.optimizer import UpdatePlan
from pyro_elbo.ranks import Sizes

if TYPE_CHECKING:
    from pyro_elbo.compile.executable import Executable


@dataclass
class KnownStep:
    """A step that ran once in Python, with what its graph relies on; the second run adds the graph."""

    parameters: dict[str, Tensor]
    plan: UpdatePlan
    gradients: dict[Tensor, Tensor]
    hooks: Hooks
    sites: tuple[str, ...]
    names: tuple[str, ...]
    guard: Guard
    execution: Execution | None
    sizes: Sizes
    execute: "Executable | None" = None

    def broken(self) -> str | None:
        """Return the name of something that the step relies on and that has changed, or None."""
        if (changed := self.guard.broken() or self.plan.broken()) is not None or self.execute is None:
            return changed
        return (
            None
            if self.execute.fits()
            else "the layout of a parameter, or the values of a buffer that the programs read"
        )

    @functools.cached_property
    def left(self) -> LeftGradients:
        """Gradients on the parameters, from elsewhere."""
        return LeftGradients(self.parameters.values() if self.plan.optimizers else ())

    def row(self, scalars: int) -> tuple[Tensor, Tensor, Tensor]:
        """Make what differs from step to step: the scalars, the flag that all steps were usable, and the record."""
        device = next((p.device for p in self.parameters.values()), torch.get_default_device())
        values, record = (torch.zeros(n, dtype=torch.float64, device=device) for n in (scalars, len(self.names) + 2))
        return values, torch.ones((), dtype=torch.bool, device=device), record
