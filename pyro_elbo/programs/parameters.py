"""Collect the parameters of programs, check their gradients, and refuse AutoGuides that have none yet."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_elbo.errors import GuideError, NonFiniteError, count_nonfinite
from pyro_elbo.programs.explain import explain_update


class Parameters(dict[str, Tensor]):
    """Unconstrained leaf tensors by name.

    Attributes:
        displaced: parameters of modules that Pyro's store replaced by those of another module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.displaced: dict[str, torch.nn.Parameter] = {}


@contextmanager
def collect_parameters() -> Iterator[Parameters]:
    """Collect the parameters that programs read inside the block; the result is filled when the block ends."""
    found = Parameters()
    with poutine.trace(param_only=True) as capture:
        yield found
    nodes: dict[str, Any] = dict(capture.trace.nodes)
    for name, message in nodes.items():
        value = message["value"]
        found[name] = value.unconstrained() if hasattr(value, "unconstrained") else value
        _, *given = message["args"]
        if given and isinstance(given[0], torch.nn.Parameter) and given[0] is not found[name]:
            found.displaced[name] = given[0]


def differentiate(loss: Tensor, parameters: Mapping[str, Tensor], retain_graph: bool | None = None) -> None:
    """Add the gradient of a loss to that of the parameters.

    Raises:
        ProgramError: the backward pass fails.
        NonFiniteError: the gradient holds NaN or infinity.
    """
    with explain_update("The backward pass", parameters):
        loss.backward(retain_graph=retain_graph)
    check_gradients(parameters)


def check_gradients(parameters: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteError where a gradient holds NaN or infinity, and remove the gradients of all parameters."""
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    # a sum is cheap and not finite wherever a term is not
    suspects = {name: g for name, g in gradients.items() if not math.isfinite(abs(g.sum().item()))}
    values = {n: g if g.layout is torch.strided else g.coalesce().values() for n, g in suspects.items()}
    bad = [f"'{name}' ({count_nonfinite(g)})" for name, g in values.items() if not torch.isfinite(g).all()]
    if bad:
        pyro.infer.util.zero_grads(parameters.values())
        raise NonFiniteError(
            f"The gradient is not finite for {', '.join(bad)} although the objective is; the parameters are those "
            "before this step. Look for a root, norm or division at 0, and for a torch.where whose other branch is "
            "not finite."
        )


def uninitialized(module: object) -> list[str]:
    """Return the names of the AutoGuides inside ``module`` that have never run and so have no parameters."""
    if not isinstance(module, torch.nn.Module):
        return []
    return [
        f"{name or 'guide'} ({type(part).__name__})"
        for name, part in module.named_modules()
        if isinstance(part, AutoGuide) and part.prototype_trace is None
    ]


def check_initialized(guide: object) -> None:
    """Raise GuideError if ``guide`` is or holds an AutoGuide that has never run."""
    if names := uninitialized(guide):
        raise GuideError(
            f"Not initialized yet: {', '.join(names)}. An AutoGuide creates its parameters on its first run: "
            "call guide(*args) once, or train it, first."
        )
