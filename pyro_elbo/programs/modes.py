"""Run programs in evaluation mode."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pyro_elbo.programs.modules import collect_modules


@contextmanager
def evaluating(*programs: Any) -> Iterator[list[nn.Module]]:
    """Put the modules that programs use into evaluation mode; restore the modes and buffers of all parts afterwards.

    Modules that programs are or own change mode at once, others when the programs first use them in the block. The
    block gets the list of modules, as from ``collect_modules``.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> with evaluating():
        ...     _ = net(torch.ones(4, 2))
        ...     net.training
        False
        >>> net.training, net.num_batches_tracked.item()
        (True, 0)
    """
    with (
        ExitStack() as stack,
        collect_modules(*programs, on_found=lambda m: stack.enter_context(module_evaluating(m))) as found,
    ):
        yield found


@contextmanager
def module_evaluating(module: nn.Module) -> Iterator[None]:
    """Put one module into evaluation mode; restore the modes and buffers of its parts afterwards."""
    buffers = [
        (part, name, buffer, buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and not is_lazy(buffer)
    ]
    with keeping_modes(module):
        module.eval()
        try:
            yield
        finally:
            with torch.no_grad():
                for part, name, buffer, value in buffers:
                    part._buffers[name] = buffer
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


@contextmanager
def keeping_modes(*modules: nn.Module) -> Iterator[None]:
    """Restore the mode of each part of the modules afterwards."""
    tops = [(module, module.training) for module in modules]
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        yield
    finally:
        for module, mode in tops:
            module.train(mode)  # a module may override train(): the parts follow
        for part, mode in modes:
            part.training = mode
