"""Mixed precision: modules compute in half of it, draws and log densities in full."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform

_HALVES = (torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda", "mps", "xpu")


def is_mixed() -> bool:
    """Return whether torch's autocast is on."""
    return any(map(torch.is_autocast_enabled, _DEVICES))


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute without autocast."""
    with ExitStack() as stack:
        for device in filter(torch.is_autocast_enabled, _DEVICES):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def in_full(x: Any) -> Any:
    """Return a distribution whose parameters are in single precision, where a layer gave them in half.

    Half a mantissa has 8 bits: a sum of log densities over 1000 pixels would be off by several nats.

    Example:
        >>> half = torch.distributions.Normal(torch.zeros(2, dtype=torch.bfloat16), 1.0)
        >>> in_full(half).log_prob(torch.zeros(2)).dtype
        torch.float32
    """
    if isinstance(x, Tensor):
        return x.float() if x.dtype in _HALVES else x
    if isinstance(x, list | tuple) and type(x) in (list, tuple):
        return type(x)(map(in_full, x))
    if not isinstance(x, Distribution | Transform) or isinstance(x, torch.nn.Module):
        return x
    made = copy.copy(x)
    made.__dict__.update({name: in_full(part) for name, part in vars(x).items()})
    return made
