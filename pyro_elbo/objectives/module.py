"""An objective bound to its programs, as a torch module."""

from typing import TYPE_CHECKING, Any

import torch
from pyro.infer.elbo import ELBOModule
from torch import Tensor

from pyro_elbo.programs import check_initialized
from pyro_elbo.ranks import in_parts
from pyro_elbo.terms import Terms

if TYPE_CHECKING:
    from pyro_elbo.objectives.elbo import TraceBeta_ELBO


class TermsModule(ELBOModule):
    """Pyro's ELBOModule with the terms of the bound; its state_dict carries the step count of the schedules."""

    elbo: "TraceBeta_ELBO"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss, -objective in nats: see :meth:`TraceBeta_ELBO.differentiable_loss`.

        In a group of processes, as under torch's DistributedDataParallel, each holds an equal part of one batch.
        """
        with in_parts():
            return super().forward(*args, **kwargs)

    def terms(self, *args: Any, **kwargs: Any) -> Terms:
        """Evaluate every term of the bound: see :meth:`TraceBeta_ELBO.terms`."""
        return self.elbo.terms(self.model, self.guide, *args, **kwargs)

    def train(self, mode: bool = True) -> "TermsModule":
        """Set the mode as in torch, also of modules whose methods are the programs (dropout, batch norm)."""
        for program in (self.model, self.guide):
            owner = getattr(program, "__self__", None)
            if isinstance(owner, torch.nn.Module):
                owner.train(mode)
        return super().train(mode)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """List parameters as in torch, but refuse guides that have none yet: an optimizer would miss them.

        Raises:
            GuideError: an AutoGuide inside has never run.
        """
        check_initialized(self)
        return super().named_parameters(*args, **kwargs)

    def get_extra_state(self) -> dict[str, Any]:
        """Return step count and critics, saved with the parameters."""
        return self.elbo.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore step count and critics."""
        self.elbo.load_state_dict(state)
