"""What training changes, as it was before the first step, so that the same steps can begin again on other data."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor, optim
from torch.optim import Optimizer

from pyro_elbo.errors import ArgumentError

# Optimizers whose state is all zeros before their first step.
_FROM_ZERO = (optim.Adam, optim.AdamW, optim.Adamax, optim.RAdam, optim.RMSprop, optim.Adadelta, optim.SGD, ClippedAdam)


class _Known(NamedTuple):
    """A parameter, its first value, and its constraint in Pyro's store; None for one that is not in there."""

    parameter: Tensor
    value: Tensor
    constraint: Any


class Start:
    """The parameters of a training run as they were before their first step."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def note(self, parameters: Mapping[str, Tensor]) -> None:
        """Take note of parameters that are new; called before every update in Python."""
        for name, p in parameters.items():
            if name not in self._known or self._known[name].parameter is not p:
                constraint = pyro.get_param_store()._constraints.get(name)
                self._known[name] = _Known(p, p.detach().clone(), constraint)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name."""
        return {name: known.parameter for name, known in self._known.items()}

    def restore(self, optimizers: Iterable[Optimizer]) -> None:
        """Give parameters and optimizers, in place, the values from before the first step.

        Raises:
            ArgumentError: an optimizer does not start from zeros.
        """
        optimizers = list(optimizers)
        for optimizer in optimizers:
            _check_from_zero(optimizer)
        store = pyro.get_param_store()
        state: Any = store.get_state()
        for name, known in self._known.items():
            if known.constraint is not None:
                state["params"][name], state["constraints"][name] = known.parameter, known.constraint
        store.set_state(state)
        with torch.no_grad():
            for known in self._known.values():
                known.parameter.copy_(known.value)
            for optimizer in optimizers:
                for numbers in optimizer.state.values():
                    for key, x in numbers.items():
                        if isinstance(x, Tensor):
                            x.zero_()
                        elif key == "step":
                            numbers[key] = 0


def _check_from_zero(optimizer: Optimizer) -> None:
    moved = isinstance(optimizer, ClippedAdam) and any(g["lrd"] != 1.0 for g in optimizer.param_groups)
    damped = isinstance(optimizer, optim.SGD) and any(g["momentum"] and g["dampening"] for g in optimizer.param_groups)
    if type(optimizer) not in _FROM_ZERO or moved or damped:
        raise ArgumentError(
            f"reset: it is not known how {type(optimizer).__name__} with these settings starts. Use one of "
            f"{[kind.__name__ for kind in _FROM_ZERO]}, without a decay of the learning rate or dampening."
        )
