"""A scan as a function of tensors, whose steps differ only in their row of inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_elbo.sequences.inputs import Inputs
from pyro_elbo.sequences.smc import ScanFunction
from pyro_elbo.sequences.step import StepProgram, StepResult


def as_function(
    steps: StepProgram,
    first: StepResult,
    shapes: Sequence[torch.Size],
    state: Sequence[Any],
    spec: Any,
    inputs: Inputs,
    reverse: bool,
    parts: Mapping[int, Tensor] | None = None,
) -> ScanFunction:
    """Return the scan as a function of tensors, whose steps differ only in their row of inputs.

    Args:
        steps: the program of a step.
        first: a step that ran before the scan.
        shapes: the shapes of init.
        state: the leaves of the carry.
        spec: the structure of the carry.
        inputs: the inputs of all steps.
        reverse: run from the last step to the first.
        parts: leaves of the carry, by position, that are known for all steps beforehand, time first.
    """
    known = parts or {}
    valid, given = inputs.valid, steps.given_over_time(first.sites)
    xs, xs_spec = pytree.tree_flatten(inputs.xs)
    columns = [x for x in (*xs, valid, *known.values(), *given.values()) if isinstance(x, Tensor)]

    def step(leaves: list[Tensor], row: list[Tensor], drawn: Mapping[str, Tensor]) -> StepResult:
        columns = iter(row)
        x_t = pytree.tree_unflatten([x if x is None else next(columns) for x in xs], xs_spec)
        valid_t = None if valid is None else next(columns)
        now = {i: next(columns) for i in known}
        values = {**drawn, **dict(zip(given, columns, strict=True))}
        rest = iter(leaves)
        filled = [now[i] if i in now else next(rest) if isinstance(x, Tensor) else x for i, x in enumerate(state)]
        carry = pytree.tree_unflatten(filled, spec)
        return steps.run_any(carry, x_t, valid_t, lambda name, event_dim: values.get(name))

    tensors = [x for x in state if isinstance(x, Tensor)]
    return ScanFunction(steps.total, first, shapes, tensors, columns, step, reverse)


def with_tensors(leaves: Sequence[Any], tensors: Sequence[Tensor], spec: Any) -> Any:
    """Return the pytree of ``leaves`` with its tensors replaced by ``tensors``."""
    new = iter(tensors)
    return pytree.tree_unflatten([next(new) if isinstance(x, Tensor) else x for x in leaves], spec)
