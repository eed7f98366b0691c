"""Collect the parameters that programs use, and refuse AutoGuides that have none yet."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_elbo.errors import GuideError


class Parameters(dict[str, Tensor]):
    """Name -> unconstrained leaf tensor.

    Attributes:
        displaced: the modules' own parameters in whose place Pyro's store gave those of other modules.
    """

    def __init__(self) -> None:
        super().__init__()
        self.displaced: dict[str, torch.nn.Parameter] = {}


@contextmanager
def collect_parameters() -> Iterator[Parameters]:
    """Collect every parameter that programs ask for inside the block; the result is filled when the block ends."""
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


def uninitialized(module: object) -> list[str]:
    """Names of the AutoGuides inside ``module`` that have never run and so have no parameters yet."""
    if not isinstance(module, torch.nn.Module):
        return []
    return [
        f"{name or 'guide'} ({type(part).__name__})"
        for name, part in module.named_modules()
        if isinstance(part, AutoGuide) and part.prototype_trace is None
    ]


def check_initialized(guide: object) -> None:
    """Raise GuideError where an AutoGuide is asked for its parameters or its posterior before its first run."""
    if names := uninitialized(guide):
        raise GuideError(
            f"Not initialized yet: {', '.join(names)}. An AutoGuide makes its parameters when it first sees data: "
            "call guide(*args) once, or train it, before this."
        )
