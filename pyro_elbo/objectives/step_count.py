"""Count optimization steps where they happen.

Schedules ask how many steps were taken. Only an optimizer knows: a backward may belong to gradient accumulation or to a
line search, and an evaluation of the loss to nothing at all. The objective never sees the optimizer, which SVI, a torch
loop or Lightning owns. So a backward through a loss marks its objective, and the next step of any ``torch.optim``
optimizer (Pyro's wrappers use them too) advances the marked objectives, once. Torch offers this hook for all optimizers
together only, hence the one set and the one hook of this module.
"""

import weakref
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


@runtime_checkable
class Advancing(Protocol):
    """Anything that counts optimization steps."""

    def advance(self) -> None:
        """Count one step."""


def advance_after_backward(loss: Tensor, objective: Advancing) -> None:
    """Have the optimizer's step that follows a backward through ``loss`` advance ``objective``."""
    loss.register_hook(lambda _: _pending.add(objective))


_pending: "weakref.WeakSet[Advancing]" = weakref.WeakSet()


def _advance(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    while _pending:
        _pending.pop().advance()


register_optimizer_step_post_hook(_advance)
