"""Optimizers of torch and Pyro behind one interface: steps in Python, and the plan of a captured step."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim import Optimizer

from pyro_elbo.compile.flat_state import FlatGroup, flatten, moving
from pyro_elbo.compile.guard import Guard
from pyro_elbo.errors import ArgumentError, CompileError
from pyro_elbo.programs import Parameters, explain_update


class Update(ABC):
    """Moves parameters by their gradients.

    Args:
        grad_clip: the largest norm of all gradients together; larger gradients are scaled down to it.
    """

    def __init__(self, grad_clip: float | None = None) -> None:
        self.grad_clip = grad_clip

    @abstractmethod
    def __call__(self, parameters: Mapping[str, Tensor]) -> None:
        """Step once in Python, by the gradients in ``.grad``."""

    @abstractmethod
    def optimizers(self, parameters: Mapping[str, Tensor]) -> list[Optimizer]:
        """Return the torch optimizers that train ``parameters``."""

    def watch(self, guard: Guard, parameters: Iterable[Tensor]) -> None:
        """Watch what the step of ``parameters`` relies on beside the optimizers."""
        guard.watch(vars(self), vars(self))

    def clip(self, parameters: Sequence[Tensor], aliases: Sequence[Tensor]) -> None:
        """Clip the gradients of ``aliases`` of ``parameters`` in place."""
        if self.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(aliases, self.grad_clip, foreach=False)


def distinct(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """Return every parameter once: tied weights have several names and are one parameter, stepped and clipped once."""
    return list(dict.fromkeys(parameters.values()))


class TorchUpdate(Update):
    """Steps a ``torch.optim`` optimizer, which holds its parameters from the start."""

    def __init__(self, optimizer: Optimizer, grad_clip: float | None = None) -> None:
        super().__init__(grad_clip)
        self.optimizer = optimizer

    def __call__(self, parameters: Mapping[str, Tensor]) -> None:
        """Step once in Python, by the gradients in ``.grad``."""
        self.optimizers(parameters)
        self._check_seen(parameters)
        self.clip((), [p for p in distinct(parameters) if p.grad is not None])
        with explain_update("The optimizer", parameters):
            self.optimizer.step()

    def _check_seen(self, parameters: Mapping[str, Tensor]) -> None:
        seen = set(map(id, parameters.values()))
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        if unseen := [tuple(p.shape) for p in held if id(p) not in seen and p.grad is not None]:
            raise ArgumentError(
                f"The optimizer holds parameters of shapes {unseen} that have a gradient but are unknown to Pyro: "
                "nothing resets that gradient between steps. Register their modules: pyro.module('name', module)."
            )

    def optimizers(self, parameters: Mapping[str, Tensor]) -> list[Optimizer]:
        """Return the optimizer.

        Raises:
            ArgumentError: the optimizer does not hold all of the parameters.
        """
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if missing := [name for name, p in parameters.items() if id(p) not in held and p.requires_grad]:
            raise ArgumentError(
                f"The optimizer does not hold the parameters {missing} and would never train them. Run guide(*args) "
                "once so that all parameters exist, then build the optimizer from them; or pass one of pyro.optim, "
                "which adds new parameters by itself."
            )
        return [self.optimizer]


class KeptGradients(Optimizer):
    """Moves nothing: the gradient of the last step stays in ``state[p]["gradient"]``, for processes to average."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: None = None) -> None:
        """Keep the gradients."""
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if "gradient" in self.state[p]:
                self.state[p]["gradient"].copy_(p.grad)
            else:
                self.state[p]["gradient"] = p.grad.clone()


class PyroUpdate(Update):
    """Steps a ``pyro.optim`` wrapper, which makes one torch optimizer per parameter at its first step."""

    def __init__(self, wrapper: pyro.optim.PyroOptim, grad_clip: float | None = None) -> None:
        super().__init__(grad_clip)
        self.wrapper = wrapper

    def __call__(self, parameters: Mapping[str, Tensor]) -> None:
        """Step once in Python, by the gradients in ``.grad``."""
        super().clip((), distinct(parameters))  # clip_args are the wrapper's own
        with explain_update("The optimizer", parameters):
            self.wrapper(distinct(parameters))

    def optimizers(self, parameters: Mapping[str, Tensor]) -> list[Optimizer]:
        """Return one optimizer per parameter, without the schedulers around them."""
        made = [self.wrapper.optim_objs[p] for p in distinct(parameters) if p in self.wrapper.optim_objs]
        return [o if isinstance(o, Optimizer) else o.optimizer for o in made]

    def watch(self, guard: Guard, parameters: Iterable[Tensor]) -> None:
        """Watch which optimizer and which clipping each parameter has."""
        super().watch(guard, parameters)
        for holder in (self.wrapper.optim_objs, self.wrapper.grad_clip):
            guard.watch(holder, [p for p in parameters if p in holder])
            guard.watch_absent(holder, [p for p in parameters if p not in holder])

    def clip(self, parameters: Sequence[Tensor], aliases: Sequence[Tensor]) -> None:
        """Clip by ``grad_clip``, then by the wrapper's ``clip_args``."""
        super().clip(parameters, aliases)
        for p, alias in zip(parameters, aliases, strict=True):
            if (function := self.wrapper.grad_clip.get(p)) is not None:
                function(alias)


def check_own(parameters: Parameters) -> None:
    """Raise where the loss depends on parameters that the store has replaced by others of the same name."""
    if lost := [name for name, p in parameters.displaced.items() if p.grad is not None]:
        pyro.infer.util.zero_grads([*parameters.values(), *parameters.displaced.values()])
        raise ArgumentError(
            f"Pyro's parameter store holds {lost} of another module, and would train those instead of the parameters "
            "that the programs use. Call pyro.clear_param_store() before you make new programs, or keep the parameters "
            "of PyroModules apart with pyro.settings.set(module_local_params=True). If you loaded the store, pass "
            "update_module_params=True to pyro.module."
        )


def check_traceable(optimizers: Iterable[Optimizer], parameters: Mapping[str, Tensor]) -> None:
    """Raise CompileError for hooks that a graph would leave out."""
    for optimizer in optimizers:
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            raise CompileError(
                f"{type(optimizer).__name__} has step hooks, which a compiled step cannot run. Remove them, or use "
                "compile=False."
            )
    for name, p in parameters.items():
        if p._post_accumulate_grad_hooks:
            raise CompileError(
                f"The parameter '{name}' has hooks that run after its gradient is accumulated, which a compiled step "
                "cannot run. Use p.register_hook(...), or compile=False."
            )


@dataclass
class UpdatePlan:
    """Which parameters a captured step updates together: small ones as one flat tensor, the rest by optimizer."""

    optimizers: list[Optimizer]
    flats: list[FlatGroup] = field(init=False)
    rest: list[Optimizer] = field(init=False)  # those with parameters in no flat tensor

    def __post_init__(self) -> None:
        self.flats = flatten(self.optimizers)
        flat = {p for f in self.flats for p in f.parameters}
        self.rest = [o for o in self.optimizers if any(p not in flat for g in o.param_groups for p in g["params"])]
        self._counting = [o for o in self.optimizers if isinstance(o, ClippedAdam)]
        self._turns = [(f.members[0].optimizer, f.members[0].group, f.parameters[:1]) for f in self.flats]
        self._turns += [(o, group, group["params"]) for o in self.rest for group in o.param_groups]

    @property
    def counts_in_python(self) -> bool:
        """Whether :meth:`numbers` differ from step to step without a scheduler."""
        return bool(self._counting)

    def numbers(self, ahead: int = 0) -> dict[Hashable, float]:
        """Return the Python numbers of the step after ``ahead`` more steps.

        Their names are pairs: the id of a group, and a setting that :func:`moving` returns, an element of it such as
        ``("betas", 0)``, or ``"taken"`` (the steps taken after that step).
        """
        return {
            (id(group), key): number
            for optimizer, group, parameters in self._turns
            for key, number in _numbers(optimizer, group, parameters, ahead).items()
        }

    def advance(self, steps: int) -> None:
        """Advance the Python numbers that optimizers keep by ``steps`` captured steps."""
        for optimizer in self._counting:
            for group in optimizer.param_groups:
                group["lr"] *= group["lrd"] ** steps
                for p in group["params"]:
                    if p in optimizer.state:
                        optimizer.state[p]["step"] += steps

    def broken(self) -> str | None:
        """Return what differs between parameters that are updated together, or None."""
        even = all(flat.even() for flat in self.flats)
        return None if even else "the learning rate or the count of steps of some parameters"


def _numbers(optimizer: Optimizer, group: Mapping[str, Any], parameters: list[Tensor], ahead: int) -> dict[Any, float]:
    if isinstance(optimizer, ClippedAdam):
        taken = max((s["step"] for p in parameters if (s := optimizer.state.get(p))), default=0)
        return {"lr": group["lr"] * group["lrd"] ** (ahead + 1), "taken": float(taken + ahead + 1)}
    numbers: dict[Any, float] = {}
    for key in moving(group):
        elements = {(key, i): x for i, x in enumerate(group[key])} if key == "betas" else {key: group[key]}
        numbers |= {name: float(x) for name, x in elements.items()}
    return numbers


def watch(guard: Guard, optimizers: Iterable[Optimizer]) -> None:
    """Watch the state tensors and the settings that a captured update freezes."""
    for optimizer in optimizers:
        guard.watch(vars(optimizer), ("state", "param_groups"))  # load_state_dict makes new ones
        guard.watch_container(optimizer._optimizer_step_pre_hooks)
        guard.watch_container(optimizer._optimizer_step_post_hooks)
        guard.watch_container(optimizer.param_groups)
        for group in optimizer.param_groups:
            guard.watch_container(group["params"])
            inputs = {"params", "initial_lr", *moving(group)}
            guard.watch(group, (k for k in group if k not in inputs))
            for p in group["params"]:
                if p in optimizer.state:
                    guard.watch(optimizer.state, [p])
                    guard.watch(optimizer.state[p], (k for k, v in optimizer.state[p].items() if isinstance(v, Tensor)))
