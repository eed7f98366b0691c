"""Gradients of a step while a graph is being captured."""

from collections.abc import Callable, Iterable, Mapping
from operator import is_

import torch
from torch import Tensor

from pyro_elbo.compile.optimizer import distinct
from pyro_elbo.errors import CompileError
from pyro_elbo.information import critic_gradients
from pyro_elbo.terms import Terms

Hooks = Mapping[Tensor, list[Callable[[Tensor], Tensor | None]]]


def hooks_of(parameters: Mapping[str, Tensor]) -> Hooks:
    """Return what the user registered by ``register_hook`` on each parameter."""
    return {p: list(p._backward_hooks.values()) for p in parameters.values() if p._backward_hooks}


class LeftGradients:
    """Gradients that somebody else leaves on parameters, to which an uncompiled step would add its own."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._zeros: list[Tensor | None] = []
        self._versions: list[int | None] = []

    def found(self) -> bool:
        """Return whether there are some now; values are looked at where a gradient was replaced or changed only."""
        gradients = [p.grad for p in self._parameters]
        versions = [None if g is None else g._version for g in gradients]
        if versions == self._versions and all(map(is_, gradients, self._zeros)):
            return False
        if any(g is not None and bool(g.any()) for g in gradients):
            return True
        self._zeros, self._versions = gradients, versions
        return False


def program_gradients(
    loss: Tensor, parameters: Mapping[str, Tensor], hooks: Hooks, held: Mapping[Tensor, Tensor]
) -> dict[Tensor, Tensor]:
    """Return the gradient of every parameter that an optimizer moves: the one in ``held`` where the loss has none.

    Raises:
        CompileError: a gradient is sparse.
    """
    trained = [p for p in distinct(parameters) if p.requires_grad]
    found = zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True)
    gradients = {p: _after_hooks(hooks.get(p, ()), g) for p, g in found if g is not None}
    if sparse := [tuple(p.shape) for p, g in gradients.items() if g.layout is not torch.strided]:
        raise CompileError(
            f"Parameters of shapes {sparse} have sparse gradients, which a compiled step does not support. Make the "
            "nn.Embedding with sparse=False, or use compile=False."
        )
    return {p: g for p, g in held.items() if p not in gradients} | gradients


def network_gradients(terms: Terms) -> dict[Tensor, Tensor]:
    """Return the gradient of every parameter of the critics."""
    pairs = [zip(critic.network.parameters(), found, strict=True) for critic, found in critic_gradients(terms)]
    return {p: gradient for pair in pairs for p, gradient in pair}


def _after_hooks(hooks: Iterable[Callable[[Tensor], Tensor | None]], gradient: Tensor) -> Tensor:
    """Apply a parameter's hooks, which captured tensors do not have, to its gradient."""
    for hook in hooks:
        new = hook(gradient)
        gradient = gradient if new is None else new
    return gradient
