"""The step of an optimizer, taken in Python or captured as part of a graph.

``torch.optim`` is not written again: its own ``step`` runs while the graph is captured, on aliases of the parameters
and of its state. The few Python numbers that change from step to step (learning rates) are inputs of the graph.
"""

import copy
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from pyro_elbo.compile._torch import optimizers_compiling, step_without_hooks
from pyro_elbo.compile.flat_state import FlatGroup, flatten
from pyro_elbo.compile.guard import Guard
from pyro_elbo.errors import ArgumentError, CompileError
from pyro_elbo.programs import Parameters

LONG = 1024  # elements of a parameter from which a loop over them is worth a scalar in memory


class Update(ABC):
    """How parameters follow their gradients.

    Args:
        grad_clip: the largest joint norm of all gradients; larger ones are scaled down.
    """

    def __init__(self, grad_clip: float | None = None) -> None:
        self.grad_clip = grad_clip

    @abstractmethod
    def __call__(self, parameters: Mapping[str, Tensor]) -> None:
        """Step once in Python, by the gradients in ``.grad``."""

    @abstractmethod
    def optimizers(self, parameters: Mapping[str, Tensor]) -> list[Optimizer]:
        """The torch optimizers that train ``parameters``."""

    def clip(self, parameters: Sequence[Tensor], aliases: Sequence[Tensor]) -> None:
        """Clip the gradients of ``aliases`` of ``parameters`` in place."""
        if self.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(aliases, self.grad_clip, foreach=False)


class TorchUpdate(Update):
    """A ``torch.optim`` optimizer over parameters that exist already."""

    def __init__(self, optimizer: Optimizer, grad_clip: float | None = None) -> None:
        super().__init__(grad_clip)
        self.optimizer = optimizer

    def __call__(self, parameters: Mapping[str, Tensor]) -> None:
        """Step once in Python, by the gradients in ``.grad``."""
        self.optimizers(parameters)
        self._check_seen(parameters)
        self.clip((), [p for p in parameters.values() if p.grad is not None])
        self.optimizer.step()

    def _check_seen(self, parameters: Mapping[str, Tensor]) -> None:
        seen = set(map(id, parameters.values()))
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        if unseen := [tuple(p.shape) for p in held if id(p) not in seen and p.grad is not None]:
            raise ArgumentError(
                f"The optimizer holds parameters of shapes {unseen} that have a gradient but are unknown to Pyro, so "
                "that it would add up from step to step. Register the modules: pyro.module('name', module)."
            )

    def optimizers(self, parameters: Mapping[str, Tensor]) -> list[Optimizer]:
        """The optimizer.

        Raises:
            ArgumentError: it does not hold some of the parameters.
        """
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if missing := [name for name, p in parameters.items() if id(p) not in held and p.requires_grad]:
            raise ArgumentError(
                f"The optimizer does not hold the parameters {missing} and would never train them. Run guide(*args) "
                "once so that all parameters exist, then build the optimizer from them, or use a pyro.optim one."
            )
        return [self.optimizer]


class PyroUpdate(Update):
    """A ``pyro.optim`` wrapper: one torch optimizer per parameter, made when the parameter is first seen."""

    def __init__(self, wrapper: pyro.optim.PyroOptim, grad_clip: float | None = None) -> None:
        super().__init__(grad_clip)
        self.wrapper = wrapper

    def __call__(self, parameters: Mapping[str, Tensor]) -> None:
        """Step once in Python, by the gradients in ``.grad``."""
        super().clip((), list(parameters.values()))  # the wrapper clips by its own clip_args
        self.wrapper(list(parameters.values()))

    def optimizers(self, parameters: Mapping[str, Tensor]) -> list[Optimizer]:
        """One optimizer per parameter; those inside of schedulers are unwrapped."""
        made = [self.wrapper.optim_objs[p] for p in parameters.values() if p in self.wrapper.optim_objs]
        return [o if isinstance(o, Optimizer) else o.optimizer for o in made]

    def clip(self, parameters: Sequence[Tensor], aliases: Sequence[Tensor]) -> None:
        """Clip as ``grad_clip`` and the wrapper's ``clip_args`` say."""
        super().clip(parameters, aliases)
        for p, alias in zip(parameters, aliases, strict=True):
            if (function := self.wrapper.grad_clip.get(p)) is not None:
                function(alias)


def check_own(parameters: Parameters) -> None:
    """Refuse to leave parameters as they are on which the loss depends, since the store holds others by their names."""
    if lost := [name for name, p in parameters.displaced.items() if p.grad is not None]:
        pyro.infer.util.zero_grads([*parameters.values(), *parameters.displaced.values()])
        raise ArgumentError(
            f"Pyro's parameter store holds {lost} of another module, and would train those in place of the parameters "
            "that the programs use. Call pyro.clear_param_store() before programs are made anew, or keep parameters "
            "of PyroModules apart with pyro.settings.set(module_local_params=True). Where the store was loaded, pass "
            "update_module_params=True to pyro.module."
        )


def check_traceable(optimizers: Iterable[Optimizer], parameters: Mapping[str, Tensor]) -> None:
    """Raise CompileError for hooks, which a graph would leave out."""
    for optimizer in optimizers:
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            raise CompileError(
                f"{type(optimizer).__name__} has step hooks, which a compiled step cannot run. Remove them, or use "
                "compile=False."
            )
    for name, p in parameters.items():
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            raise CompileError(
                f"The parameter '{name}' has hooks on its gradient, which a compiled step cannot run. Remove them "
                "(grad_clip=... clips gradients), or use compile=False."
            )


@dataclass
class UpdatePlan:
    """How a graph steps optimizers: small parameters as one, the rest as they come."""

    optimizers: list[Optimizer]
    flats: list[FlatGroup] = field(init=False)
    rest: list[Optimizer] = field(init=False)  # with parameters that are in no flat tensor

    def __post_init__(self) -> None:
        self.flats = flatten(self.optimizers)
        flat = {p for f in self.flats for p in f.parameters}
        self.rest = [o for o in self.optimizers if any(p not in flat for g in o.param_groups for p in g["params"])]
        self._counting = [o for o in self.optimizers if isinstance(o, ClippedAdam)]

    @property
    def counts_in_python(self) -> bool:
        """Whether :meth:`numbers` change from step to step by themselves."""
        return bool(self._counting)

    def numbers(self, ahead: int = 0) -> list[float]:
        """The Python numbers that the step after ``ahead`` more steps uses, in the order of :func:`trace_update`."""
        turns = [(f.members[0].optimizer, f.members[0].group, f.parameters[:1]) for f in self.flats]
        turns += [(optimizer, group, group["params"]) for optimizer in self.rest for group in optimizer.param_groups]
        return [x for turn in turns for x in _numbers(*turn, ahead)]

    def advance(self, steps: int) -> None:
        """Bring the Python numbers that optimizers keep to where ``steps`` captured steps have led."""
        for optimizer in self._counting:
            for group in optimizer.param_groups:
                group["lr"] *= group["lrd"] ** steps
                for p in group["params"]:
                    if p in optimizer.state:
                        optimizer.state[p]["step"] += steps

    def broken(self) -> str | None:
        """What no longer holds for parameters that are stepped as one."""
        even = all(flat.even() for flat in self.flats)
        return None if even else "the learning rate or the count of steps of some parameters"


def _numbers(optimizer: Optimizer, group: Mapping[str, Any], parameters: list[Tensor], ahead: int) -> list[float]:
    if isinstance(optimizer, ClippedAdam):
        taken = max((s["step"] for p in parameters if (s := optimizer.state.get(p))), default=0)
        return [group["lr"] * group["lrd"] ** (ahead + 1), float(taken + ahead + 1)]
    return [float(group["lr"])] if isinstance(group.get("lr"), float | int) else []


def watch(guard: Guard, optimizers: Iterable[Optimizer]) -> None:
    """Watch the state tensors and the settings that a captured update holds."""
    for optimizer in optimizers:
        guard.watch(vars(optimizer), ("state", "param_groups"))  # load_state_dict makes new ones
        guard.watch_container(optimizer._optimizer_step_pre_hooks)
        guard.watch_container(optimizer._optimizer_step_post_hooks)
        guard.watch_container(optimizer.param_groups)
        for group in optimizer.param_groups:
            guard.watch_container(group["params"])
            settings = {"params", "initial_lr"} | ({"lr"} if not isinstance(group.get("lr"), Tensor) else set())
            guard.watch(group, (k for k in group if k not in settings))
            for p in group["params"]:
                if p in optimizer.state:
                    guard.watch(optimizer.state, [p])
                    guard.watch(optimizer.state[p], (k for k, v in optimizer.state[p].items() if isinstance(v, Tensor)))


def trace_update(
    update: Update,
    plan: UpdatePlan,
    gradients: Mapping[Tensor, Tensor],
    unclipped: Mapping[Tensor, Tensor],
    values: Iterator[Tensor],
) -> None:
    """Step parameters and state in place while a graph is being captured.

    Args:
        update: clips the gradients.
        plan: of the optimizers' step.
        gradients: of each parameter of the programs that has one.
        unclipped: of other parameters.
        values: what :meth:`UpdatePlan.numbers` gives, as tensors.
    """
    aliases = {p: p.detach() for p in (*gradients, *unclipped)}
    for p, gradient in (*gradients.items(), *unclipped.items()):
        aliases[p].grad = gradient.clone()  # autograd may give two parameters the same tensor
    update.clip(list(gradients), [aliases[p] for p in gradients])
    with torch.no_grad(), optimizers_compiling(), _TensorScalars():
        for flat in plan.flats:
            with _named(flat.members[0].optimizer):
                _trace_flat(flat, aliases, values)
        for flat in plan.flats:
            for p in flat.parameters:
                del aliases[p]
        for optimizer in plan.rest:
            with _named(optimizer):
                _trace_step(optimizer, aliases, values)


@contextmanager
def _named(optimizer: Optimizer) -> Iterator[None]:
    try:
        yield
    except CompileError:
        raise
    except Exception as error:
        raise CompileError(f"{type(optimizer).__name__} {_UNTRACEABLE}") from error


_UNTRACEABLE = (
    "keeps its counts as Python numbers or branches on values, which a graph would freeze. Use torch.optim.Adam, AdamW "
    "or SGD, the pyro.optim wrappers of them, or compile=False."
)


def _trace_flat(flat: FlatGroup, aliases: Mapping[Tensor, Tensor], values: Iterator[Tensor]) -> None:
    first, held = flat.members[0], [aliases[p] for p in flat.parameters]
    alias = flat.join(held)
    alias.grad = flat.join(x.grad for x in held if x.grad is not None)
    given = {k: _taken(k, v) for k, v in flat.take().items()}
    flat.put(_step(first.optimizer, [first.group | {"params": [alias]}], {alias: given}, values)[alias])
    for x, new in zip(held, flat.split(alias), strict=True):
        x.copy_(new)


def _trace_step(optimizer: Optimizer, aliases: Mapping[Tensor, Tensor], values: Iterator[Tensor]) -> None:
    held = [[p for p in group["params"] if p in aliases] for group in optimizer.param_groups]
    groups = [g | {"params": [aliases[p] for p in ps]} for g, ps in zip(optimizer.param_groups, held, strict=True)]
    old = {p: optimizer.state.get(p, {}) for ps in held for p in ps}
    given = {p: {k: _taken(k, v) for k, v in state.items()} for p, state in old.items()}
    new = _step(optimizer, groups, {aliases[p]: dict(state) for p, state in given.items() if state}, values)
    for p in old:
        _write_back(optimizer, old[p], given[p], new[aliases[p]])


def _step(
    optimizer: Optimizer, groups: list[dict[str, Any]], states: dict[Tensor, dict[str, Any]], values: Iterator[Tensor]
) -> Mapping[Tensor, dict[str, Any]]:
    """Run the optimizer's own step on other groups and states; return the states after it."""
    if isinstance(optimizer, ClippedAdam):
        for group in groups:
            _clipped_adam(group, {p: states[p] for p in group["params"]}, next(values), next(values))
        return states
    clone = copy.copy(optimizer)
    clone.param_groups, clone.state = [], defaultdict(dict, states)
    for group in groups:
        changes: dict[str, Any] = {k: False for k in ("foreach", "fused", "capturable") if k in group}
        if isinstance(group.get("lr"), float | int):
            changes["lr"] = next(values)
        clone.param_groups.append(group | changes)
    settings = [dict(group) for group in clone.param_groups]
    step_without_hooks(clone)
    if any(new[k] is not old[k] for new, old in zip(clone.param_groups, settings, strict=True) for k in old):
        raise CompileError(f"{type(optimizer).__name__} {_UNTRACEABLE}")
    return clone.state


def _taken(key: str, value: Any) -> Any:
    """What a captured step gets of the state: counts in double precision (1 - 0.999 ** step loses digits in single)."""
    if not isinstance(value, Tensor):
        return value
    return value.to(torch.float64, copy=True) if key == "step" else value.detach()


def _write_back(optimizer: Optimizer, old: dict[str, Any], given: dict[str, Any], new: dict[str, Any]) -> None:
    """Let the real state follow what the step did other than in place."""
    for key, value in new.items():
        if not isinstance(value, Tensor):
            if key not in given or value is not given[key]:
                raise CompileError(f"{type(optimizer).__name__} {_UNTRACEABLE}")
        elif key not in old:
            raise CompileError(f"{type(optimizer).__name__} makes new state ('{key}') in a step that is captured.")
        elif key == "step" or value is not given[key]:
            old[key].copy_(value)


def _clipped_adam(group: Mapping[str, Any], held: Mapping[Tensor, Mapping[str, Any]], lr: Tensor, step: Tensor) -> None:
    """The step of pyro.optim.ClippedAdam, which counts in Python, with its count and rate as tensors."""
    beta1, beta2 = group["betas"]
    size = lr * (1 - beta2**step).sqrt() / (1 - beta1**step)
    for alias, state in held.items():
        grad = alias.grad.clamp(-group["clip_norm"], group["clip_norm"])
        if group["weight_decay"] != 0:
            grad = grad.add(alias, alpha=group["weight_decay"])
        mean = state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        deviation = grad - mean if group["centered_variance"] else grad
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(deviation, deviation, value=1 - beta2)
        alias.sub_(size * mean / (square.sqrt() + group["eps"]))


class _TensorScalars(TorchFunctionMode):
    """Lets torch's optimizers compute with tensors where an operator takes a Python number only."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = {k: _computed_once(v, args[0]) for k, v in (kwargs or {}).items()}
        args = (*args[:1], *(_computed_once(x, args[0]) for x in args[1:]))
        name = getattr(function, "__name__", "")
        if isinstance(options.get("alpha"), Tensor) and name in ("add", "add_", "sub", "sub_"):
            return function(args[0], args[1] * options["alpha"])
        if isinstance(options.get("value"), Tensor) and name in ("addcdiv_", "addcmul_"):
            pair = args[1] / args[2] if name == "addcdiv_" else args[1] * args[2]
            return args[0].add_(pair * options["value"])
        return function(*args, **options)


def _computed_once(x: Any, beside: Any) -> Any:
    """A scalar that Inductor computes before a long loop and not in it: beta ** step costs more than all the rest.

    Only reductions are sure to get memory of their own. A maximum over equal numbers is exact.
    """
    scalar = isinstance(x, Tensor) and x.dim() == 0 and x.dtype == torch.float64
    return x.expand(16).amax() if scalar and isinstance(beside, Tensor) and beside.numel() >= LONG else x
