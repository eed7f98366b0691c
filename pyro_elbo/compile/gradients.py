"""Gradients of a step while a graph is being captured."""

from collections.abc import Callable, Iterable, Mapping

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
