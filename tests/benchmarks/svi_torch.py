"""The VAEs of ``bench_svi`` written by hand in torch: eager, and compiled in the ways that one would try.

The loss is the one that a specialist writes: analytic KL, fused cross entropy, all particles in one forward.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, linear, softplus

Params = dict[str, Tensor]
Step = Callable[[], float]


def perceptron(params: Params, name: str, x: Tensor) -> Tensor:
    hidden = softplus(linear(x, params[f"{name}.0.weight"], params[f"{name}.0.bias"]))
    return linear(hidden, params[f"{name}.2.weight"], params[f"{name}.2.bias"])


def vae_loss(beta: float, particles: int, params: Params, x: Tensor) -> Tensor:
    loc, raw = perceptron(params, "encoder", x).chunk(2, dim=-1)
    scale = softplus(raw) + 1e-4
    z = loc + scale * torch.randn(particles, *loc.shape) if particles > 1 else loc + scale * torch.randn_like(loc)
    logits = perceptron(params, "decoder", z)
    distortion = binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="sum") / particles
    rate = 0.5 * (loc.square() + scale.square() - 1).sum() - scale.log().sum()
    return distortion + beta * rate


def autograd_step(loss: Callable[[Params, Tensor], Tensor], params: Params, lr: float, x: Tensor) -> Step:
    """The usual loop; with a compiled loss torch compiles its backward too."""
    optim = torch.optim.Adam(params.values(), lr=lr, fused=True)

    def step() -> float:
        optim.zero_grad()
        value = loss(params, x)
        value.backward()
        optim.step()
        return value.item()

    return step


def gradient_step(loss: Callable[[Params, Tensor], Tensor], params: Params, lr: float, x: Tensor) -> Step:
    """Loss and gradients in one graph, without the autograd engine; torch's fused Adam."""
    optim = torch.optim.Adam(params.values(), lr=lr, fused=True)
    graph = torch.compile(torch.func.grad_and_value(loss), fullgraph=True, dynamic=False)
    plain = {name: param.detach() for name, param in params.items()}  # they share memory with the optimizer's

    def step() -> float:
        grads, value = graph(plain, x)
        for name, param in params.items():
            param.grad = grads[name]
        optim.step()
        return value.item()

    return step


def whole_step(loss: Callable[[Params, Tensor], Tensor], params: Params, lr: float, x: Tensor) -> Step:
    """Loss, gradients and a hand-written Adam in one graph."""
    weights = {name: param.detach() for name, param in params.items()}
    first, second = ({name: torch.zeros_like(value) for name, value in weights.items()} for _ in range(2))
    count = torch.zeros(())

    def update(weights: Params, first: Params, second: Params, count: Tensor, x: Tensor) -> Tensor:
        grads, value = torch.func.grad_and_value(loss)(weights, x)
        count.add_(1)
        rate, root = lr / (1 - 0.9**count), (1 - 0.999**count).sqrt()
        for name, grad in grads.items():
            first[name].mul_(0.9).add_(grad, alpha=0.1)
            second[name].mul_(0.999).addcmul_(grad, grad, value=0.001)
            weights[name].sub_(rate * first[name] / (second[name].sqrt() / root + 1e-8))
        return value

    graph = torch.compile(update, fullgraph=True, dynamic=False)
    return lambda: graph(weights, first, second, count, x).item()


def contenders(state: Params, beta: float, particles: int, lr: float, x: Tensor) -> dict[str, tuple[Step, int]]:
    """Calls that train by one step; each a pair of a call and its number of steps."""
    loss = partial(vae_loss, beta, particles)

    def params() -> Params:
        return {name: value.detach().clone().requires_grad_() for name, value in state.items()}

    def compiled_loss(params: Params, x: Tensor) -> Tensor:
        return loss(params, x)

    compiled = torch.compile(compiled_loss, fullgraph=True, dynamic=False)
    return {
        "torch by hand, eager": (autograd_step(loss, params(), lr, x), 1),
        "torch by hand, compiled: loss": (autograd_step(compiled, params(), lr, x), 1),
        "torch by hand, compiled: gradients": (gradient_step(loss, params(), lr, x), 1),
        "torch by hand, compiled: whole step": (whole_step(loss, params(), lr, x), 1),
    }
