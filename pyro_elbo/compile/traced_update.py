"""The update of parameters as part of a captured graph.

``torch.optim`` is not written again: its own ``step`` runs while the graph is captured, on aliases of the parameters
and of the optimizer's state. Python numbers that change from step to step (learning rates, the step counts of
ClippedAdam) are tensors there, by name.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from pyro_elbo.compile._torch import optimizers_compiling, pytree, step_without_hooks
from pyro_elbo.compile.flat_state import FlatGroup
from pyro_elbo.compile.guard import same
from pyro_elbo.compile.optimizer import Update, UpdatePlan
from pyro_elbo.errors import CompileError

LONG = 1024  # elements of a parameter from which a loop over them is worth a scalar in memory
Numbers = Mapping[Hashable, Tensor]
"""The value of each name in :meth:`UpdatePlan.numbers`."""


def trace_update(
    update: Update,
    plan: UpdatePlan,
    gradients: Mapping[Tensor, Tensor],
    unclipped: Mapping[Tensor, Tensor],
    numbers: Numbers,
) -> Tensor:
    """Step parameters and state in place while a graph is being captured; return whether all gradients are finite.

    Args:
        update: clips the gradients.
        plan: groups the parameters that one call of an optimizer steps.
        gradients: the gradient of each parameter of the programs that has one.
        unclipped: the gradients of other parameters.
        numbers: the learning rates and step counts.
    """
    aliases = {p: p.detach() for p in (*gradients, *unclipped)}
    for p, gradient in (*gradients.items(), *unclipped.items()):
        aliases[p].grad = gradient.clone()  # autograd may give two parameters the same tensor
    finite = _all_finite(plan, aliases)
    update.clip(list(gradients), [aliases[p] for p in gradients])
    with torch.no_grad(), optimizers_compiling(), _TensorScalars(numbers):
        for flat in plan.flats:
            with _named(flat.members[0].optimizer):
                _trace_flat(flat, aliases, numbers)
        for flat in plan.flats:
            for p in flat.parameters:
                del aliases[p]
        for optimizer in plan.rest:
            with _named(optimizer):
                _trace_step(optimizer, aliases, numbers)
    return finite


def _all_finite(plan: UpdatePlan, aliases: Mapping[Tensor, Tensor]) -> Tensor:
    """Return whether all gradients are finite: whether the largest element is, since NaN exceeds all."""
    flat = {p for group in plan.flats for p in group.parameters}
    given = {p: alias.grad for p, alias in aliases.items() if alias.grad is not None}
    gradients = [group.join(given[p] for p in group.parameters) for group in plan.flats]
    gradients += [g for p, g in given.items() if p not in flat]
    return torch.isfinite(torch.stack([g.abs().amax().to(torch.float64) for g in gradients if g.numel()]).amax())


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
    "or SGD, their wrappers in pyro.optim, or compile=False."
)


def _numbered(group: Mapping[str, Any], parameters: list[Tensor], numbers: Numbers) -> dict[str, Any]:
    """Return a copy of a group with other parameters, and with tensors for the numbers that change."""
    keys = [key for key in ("lr", "momentum", "taken") if (id(group), key) in numbers]
    named: dict[str, Any] = {key: numbers[id(group), key] for key in keys}
    if (id(group), ("betas", 0)) in numbers:
        named["betas"] = tuple(numbers[id(group), ("betas", i)] for i in range(len(group["betas"])))
    return {**group, "params": parameters, **named}


def _trace_flat(flat: FlatGroup, aliases: Mapping[Tensor, Tensor], numbers: Numbers) -> None:
    first, held = flat.members[0], [aliases[p] for p in flat.parameters]
    alias = flat.join(held)
    alias.grad = flat.join(x.grad for x in held if x.grad is not None)
    given = {k: _taken(k, v) for k, v in flat.take().items()}
    flat.put(_step(first.optimizer, [_numbered(first.group, [alias], numbers)], {alias: given})[alias])
    for x, new in zip(held, flat.split(alias), strict=True):
        x.copy_(new)


def _trace_step(optimizer: Optimizer, aliases: Mapping[Tensor, Tensor], numbers: Numbers) -> None:
    held = [[p for p in group["params"] if p in aliases] for group in optimizer.param_groups]
    pairs = zip(optimizer.param_groups, held, strict=True)
    groups = [_numbered(group, [aliases[p] for p in ps], numbers) for group, ps in pairs]
    old = {p: optimizer.state.get(p, {}) for ps in held for p in ps}
    given = {p: {k: _taken(k, v) for k, v in state.items()} for p, state in old.items()}
    new = _step(optimizer, groups, {aliases[p]: dict(state) for p, state in given.items() if state})
    for p in old:
        _write_back(optimizer, old[p], given[p], new[aliases[p]])


def _step(
    optimizer: Optimizer, groups: list[dict[str, Any]], states: dict[Tensor, dict[str, Any]]
) -> Mapping[Tensor, dict[str, Any]]:
    """Run the optimizer's own step on other groups and states; return the states after it."""
    if isinstance(optimizer, ClippedAdam):
        if type(optimizer).step is not ClippedAdam.step:
            raise CompileError(f"{type(optimizer).__name__} {_UNTRACEABLE}")
        for group in groups:
            _clipped_adam(group, {p: states[p] for p in group["params"]})
        return states
    clone = object.__new__(type(optimizer))  # a copy.copy has none of the attributes that a subclass adds
    vars(clone).update(vars(optimizer), param_groups=[], state=defaultdict(dict, states))
    for group in groups:
        clone.param_groups.append(group | {k: False for k in ("foreach", "fused", "capturable") if k in group})
    settings = [dict(group) for group in clone.param_groups]
    before = dict(vars(clone))
    with _ThroughGroups(optimizer):
        step_without_hooks(clone)
    if changed := sorted(k for k in before | vars(clone) if not same(before.get(k, before), vars(clone).get(k, clone))):
        raise CompileError(
            f"{type(optimizer).__name__} sets the attribute '{changed[0]}' in its step, which a graph would freeze. "
            "Set it outside of the step, or use compile=False."
        )
    if any(new[k] is not old[k] for new, old in zip(clone.param_groups, settings, strict=True) for k in old):
        raise CompileError(f"{type(optimizer).__name__} {_UNTRACEABLE}")
    return clone.state


def _taken(key: str, value: Any) -> Any:
    """Return an entry of the state for a captured step: step counts in double precision, without gradient.

    In single precision 1 - 0.999 ** step loses digits.
    """
    if not isinstance(value, Tensor):
        return value
    return value.to(torch.float64, copy=True) if key == "step" else value.detach()


def _write_back(optimizer: Optimizer, old: dict[str, Any], given: dict[str, Any], new: dict[str, Any]) -> None:
    """Write to the real state what the step replaced instead of changing it in place."""
    for key, value in new.items():
        if not isinstance(value, Tensor):
            if key not in given or value is not given[key]:
                raise CompileError(f"{type(optimizer).__name__} {_UNTRACEABLE}")
        elif key not in old:
            raise CompileError(
                f"{type(optimizer).__name__} makes new state ('{key}') in its second step. Use compile=False."
            )
        elif key == "step" or value is not given[key]:
            old[key].copy_(value)


def _clipped_adam(group: Mapping[str, Any], held: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Step as pyro.optim.ClippedAdam, which counts in Python, with its count and its rate as tensors."""
    (beta1, beta2), taken = group["betas"], group["taken"]
    size = group["lr"] * (1 - beta2**taken).sqrt() / (1 - beta1**taken)
    for alias, state in held.items():
        grad = alias.grad.clamp(-group["clip_norm"], group["clip_norm"])
        if group["weight_decay"] != 0:
            grad = grad.add(alias, alpha=group["weight_decay"])
        mean = state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        deviation = grad - mean if group["centered_variance"] else grad
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(deviation, deviation, value=1 - beta2)
        alias.sub_(size * mean / (square.sqrt() + group["eps"]))


class _ThroughGroups(TorchFunctionMode):
    """Refuses a step that finds parameters elsewhere than in its groups, where the captured ones are not."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__()
        self._optimizer = optimizer
        self._parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(id(x) in self._parameters for x in pytree.tree_leaves((args, kwargs))):
            raise CompileError(
                f"{type(self._optimizer).__name__} finds parameters elsewhere than in its param_groups, such as in "
                "another optimizer, where a compiled step does not move them. Use compile=False."
            )
        return function(*args, **(kwargs or {}))


class _TensorScalars(TorchFunctionMode):
    """Gives torch's optimizers tensors where an operator takes Python numbers only."""

    def __init__(self, numbers: Numbers) -> None:
        super().__init__()
        self._momenta = [x for name, x in numbers.items() if isinstance(name, tuple) and name[1] == "momentum"]

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = {k: _computed_once(v, args[0]) for k, v in (kwargs or {}).items()}
        args = (*args[:1], *(_computed_once(x, args[0]) for x in args[1:]))
        name = getattr(function, "__name__", "")
        if name in ("__ne__", "ne") and any(args[0] is x for x in self._momenta):
            return True  # SGD asks whether it has momentum: a scheduler that moves it says so
        if isinstance(options.get("alpha"), Tensor) and name in ("add", "add_", "sub", "sub_"):
            return function(args[0], args[1] * options["alpha"])
        if isinstance(options.get("value"), Tensor) and name in ("addcdiv_", "addcmul_"):
            pair = args[1] / args[2] if name == "addcdiv_" else args[1] * args[2]
            return args[0].add_(pair * options["value"])
        return function(*args, **options)


def _computed_once(x: Any, beside: Any) -> Any:
    """Have Inductor compute a scalar once before a long loop: beta ** step in every iteration costs more than the rest.

    Inductor always stores the result of a reduction, and a maximum over equal numbers is exact.
    """
    scalar = isinstance(x, Tensor) and x.dim() == 0 and x.dtype == torch.float64
    return x.expand(16).amax() if scalar and isinstance(beside, Tensor) and beside.numel() >= LONG else x
