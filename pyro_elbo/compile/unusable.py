"""Say why a compiled step could not be used: the objective, a gradient, or masks that differ."""

import math
from collections.abc import Callable, Mapping
from typing import NoReturn

import torch
from torch import Tensor

from pyro_elbo.errors import CompileError, NonFiniteError


def explain_unusable(
    totals: Mapping[str, float], finite_gradient: bool, loss: Callable[[], Tensor], parameters: Mapping[str, Tensor]
) -> NoReturn:
    """Raise the error of a step that changed nothing.

    Args:
        totals: the loss and the totals of the step, in nats.
        finite_gradient: whether all of its gradients were finite.
        loss: evaluates the loss in Python at another draw.
        parameters: what the programs use, by name.
    """
    bad = [f"{name} {x}" for name, x in totals.items() if not math.isfinite(x)]
    if bad:
        raise NonFiniteError(
            f"The objective is not finite ({', '.join(bad)}). The step changed no parameter. Look for data outside the "
            "support, NaN in the data or a diverging parameter."
        )
    if not finite_gradient:
        raise NonFiniteError(
            f"The gradient is not finite for {_not_finite(loss(), parameters)} although the objective is; the "
            "parameters are those before this step. Look for a root, norm or division at 0, and for a torch.where "
            "whose other branch is not finite."
        )
    raise CompileError(
        "The masks or scales of a site were equal in model and guide when the step was captured, and now "
        "differ. Use the same mask in both programs, or compile=False."
    )


def _not_finite(loss: Tensor, parameters: Mapping[str, Tensor]) -> str:
    """Return the names of parameters whose gradient is not finite."""
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    pairs = zip(trained, gradients, strict=True)
    return ", ".join(f"'{n}'" for n, g in pairs if g is not None and not torch.isfinite(g).all()) or "a parameter"
