"""A Pyro program as one step of a sequence: its sites appear once each, with a dimension of time.

The steps run inside of a handler that hides their sites from the handlers around the scan. Those are asked once per
site which plates surround it and whether they give its value; at the end each site is stated once, over all steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_elbo.assumptions import active_loop, check_or_defer
from pyro_elbo.errors import ArgumentError, CompileError
from pyro_elbo.sequences.smc import ScanSide, active_filter, one_by_one, stack_rows
from pyro_elbo.sequences.stacked import ScanRun
from pyro_elbo.sequences.step import Step, StepProgram


def scan(
    step: Step,
    init: Any,
    xs: Any,
    lengths: Any = None,
    *,
    length: int | None = None,
    horizon: int = 0,
    reverse: bool = False,
    dim: int = 0,
    name: str = "time",
) -> tuple[Any, Any]:
    r"""Run ``carry, out = step(carry, x_t)`` over time, where ``step`` is a Pyro program.

    Each site of the step appears in the trace once, with event shape (T,) + its own: log p is the sum over steps,
    each conditioned on what came before. All of Pyro's handlers work on it, around the scan and inside of the step:
    a plate may stand on either side. A value that a handler gives (replay, condition) may cover the first steps only;
    the others are drawn.

    Args:
        step: a Pyro program with the same sites at every step; ``x_t`` is ``xs`` at one time.
        init: the first carry: a tensor, or any nest of tuples, lists and dictionaries of them. Its shapes and dtypes
            must stay as they are (it may be smaller than what the first step makes of it, if it broadcasts).
        xs: tensors that have time as dimension ``dim``, nested alike; or None, with ``length``.
        lengths: integers, the batch's shape: how many steps of each sequence are real. Padding may hold anything; it
            enters no term and no gradient, and the carry of a sequence that has ended stays. What a step sees
            there is the sequence's last real frame.
        length: the number of steps if ``xs`` is None.
        horizon: how many steps to run after the end of ``xs``, with None in place of each x_t. An observed site
            (``obs=x_t``) is drawn there: a forecast.
        reverse: run from the last step to the first.
        dim: the dimension of time in ``xs`` and in the outputs.
        name: of the dimension of time, in ``to_dataset()`` and in ArviZ.

    Returns:
        The last carry, and the outs of all steps, with time as dimension ``dim``.

    Raises:
        ArgumentError: there are no steps; lengths are not between 1 and T; the carry changes shape or dtype.
        SiteError: a site appears twice in a step, or not in all steps; its distribution changes.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def step(level, x_t):
        ...     level = pyro.sample("level", dist.Normal(level, 0.1))
        ...     pyro.sample("x", dist.Normal(level, 1.0), obs=x_t)
        ...     return level, level
        >>> final, levels = scan(step, torch.tensor(0.0), torch.zeros(5))
        >>> levels.shape
        torch.Size([5])

    References:
        Bradbury et al. (2018), JAX (``jax.lax.scan``); Phan, Pradhan, Jankowiak (2019), arXiv:1912.11554.
    """
    if horizon and reverse:
        raise ArgumentError("pe.scan: a forecast runs forward from the end of xs: choose horizon or reverse.")
    inputs = _Inputs.make(xs, lengths, length, horizon, dim)
    steps = StepProgram(step, inputs.total)
    last, stacked = _run(steps, init, inputs, reverse)
    return last, steps.emit(stacked, inputs.valid, dim, ScanRun(name, reverse))


def _run(steps: StepProgram, init: Any, inputs: "_Inputs", reverse: bool) -> tuple[Any, list[Tensor]]:
    """Run all steps: the last carry, and what they drew, time first."""
    loop, by = active_loop(), active_filter()
    if loop is None and by is None:
        return _one_by_one(steps, init, inputs, reverse)
    if inputs.total > inputs.given:
        raise CompileError("A forecast (pe.scan with horizon) can be neither compiled nor filtered: use compile=False.")
    carry = steps.peek(init, inputs.at(0), None if inputs.valid is None else inputs.valid[0])
    state, spec = pytree.tree_flatten(carry)
    side = _side(steps, state, spec, inputs, reverse)
    if by is not None and steps.outside:
        last, stacked = by.scan(side)
    else:
        alone = lambda leaves, row: side.body(leaves, row, {})  # noqa: E731
        last, stacked = (loop or one_by_one)(alone, side.state, side.columns, inputs.total, reverse)
    return _with_tensors(state, last, spec), stacked


def _one_by_one(steps: StepProgram, init: Any, inputs: "_Inputs", reverse: bool) -> tuple[Any, list[Tensor]]:
    carry, rows = init, []
    for t in inputs.order(reverse):
        valid = None if inputs.valid is None else inputs.valid[t]
        carry, row = steps.run(carry, inputs.at(t), valid, t, steps.given_at(t))
        rows.append(row)
    return carry, stack_rows(rows[::-1] if reverse else rows)


def _side(steps: StepProgram, state: Sequence[Any], spec: Any, inputs: "_Inputs", reverse: bool) -> ScanSide:
    """The scan as a function of tensors: a step is the same at all times but for its row of inputs."""
    valid, given = inputs.valid, steps.given_over_time()
    xs, xs_spec = pytree.tree_flatten(inputs.xs)
    columns = [x for x in (*xs, valid, *given.values()) if isinstance(x, Tensor)]

    def body(leaves: list[Tensor], row: list[Tensor], drawn: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        parts = iter(row)
        x_t = pytree.tree_unflatten([x if x is None else next(parts) for x in xs], xs_spec)
        valid_t = None if valid is None else next(parts)
        values = drawn | dict(zip(given, parts, strict=True))
        old = _with_tensors(state, leaves, spec)
        new, out = steps.again(old, x_t, valid_t, lambda name, event_dim: values.get(name))
        return [x for x in pytree.tree_leaves(new) if isinstance(x, Tensor)], out

    return ScanSide(steps, [x for x in state if isinstance(x, Tensor)], columns, body, reverse)


def _with_tensors(leaves: Sequence[Any], tensors: Sequence[Tensor], spec: Any) -> Any:
    """The nest of ``leaves`` with other tensors in it."""
    new = iter(tensors)
    return pytree.tree_unflatten([next(new) if isinstance(x, Tensor) else x for x in leaves], spec)


@dataclass(frozen=True)
class _Inputs:
    """What the steps get.

    Attributes:
        xs: the given inputs, time first, padding replaced by each sequence's last real frame.
        given: steps that have an input.
        total: those and the steps of the forecast.
        valid: which steps of which sequence are real, shape (T, *batch); None if all are.
    """

    xs: Any
    given: int
    total: int
    valid: Tensor | None

    @staticmethod
    def make(xs: Any, lengths: Any, length: int | None, horizon: int, dim: int) -> "_Inputs":
        leaves = pytree.tree_leaves(xs)
        if bad := [type(x).__name__ for x in leaves if x is not None and not isinstance(x, Tensor)]:
            raise ArgumentError(f"pe.scan: xs must hold tensors, got {bad[0]}. Pass torch.as_tensor(x).")
        sizes = [_size(x, dim) for x in leaves if x is not None] + ([] if length is None else [length])
        if len(set(sizes)) != 1 or sizes[0] + horizon < 1 or horizon < 0:
            raise ArgumentError(
                f"pe.scan: expected inputs of one length T >= 1 in dimension {dim}, got lengths {sizes} and a "
                f"horizon of {horizon}. Skip empty sequences; pass length=T where xs is None."
            )
        given = sizes[0]
        xs = pytree.tree_map(lambda x: None if x is None else x.movedim(dim, 0), xs)
        if lengths is None:
            return _Inputs(xs, given, given + horizon, None)
        if horizon:
            raise ArgumentError("pe.scan: a forecast starts where all sequences end: choose horizon or lengths.")
        lengths = _check_lengths(lengths, given, [x for x in pytree.tree_leaves(xs) if x is not None])
        times = torch.arange(given, device=lengths.device).reshape(-1, *(1,) * lengths.dim())
        last = torch.minimum(times, lengths - 1)
        return _Inputs(pytree.tree_map(lambda x: _take(x, last), xs), given, given, times < lengths)

    def at(self, t: int) -> Any:
        """The inputs of step ``t``; None in place of each in the forecast."""
        return pytree.tree_map(lambda x: x[t] if t < self.given and x is not None else None, self.xs)

    def order(self, reverse: bool) -> range:
        """The steps, in the order in which they run."""
        return range(self.total - 1, -1, -1) if reverse else range(self.total)


def _size(x: Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ArgumentError(
            f"pe.scan: xs holds a tensor of shape {tuple(x.shape)}, which has no dimension {dim} for time. Choose "
            "another dim."
        )
    return x.shape[dim]


def _check_lengths(lengths: Any, total: int, xs: Sequence[Tensor]) -> Tensor:
    lengths = torch.as_tensor(lengths)
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ArgumentError(f"pe.scan: lengths must be integers, got {lengths.dtype}.")
    for x in xs:
        if x.shape[1 : 1 + lengths.dim()] != lengths.shape:
            raise ArgumentError(
                f"pe.scan: lengths of shape {tuple(lengths.shape)} do not fit inputs of shape {tuple(x.shape)} (time "
                f"first): expected time, then the dimensions of lengths. dim=1 is for inputs with time second."
            )
    if not check_or_defer(((lengths >= 1) & (lengths <= total)).all()):
        bad = lengths[(lengths < 1) | (lengths > total)]
        raise ArgumentError(
            f"pe.scan: lengths must lie between 1 and T = {total}, got {bad.flatten()[:5].tolist()}. Leave empty "
            "sequences out of the batch."
        )
    return lengths


def _take(x: Tensor | None, last: Tensor) -> Tensor | None:
    """Each sequence at the times ``last``, shape (T, *batch)."""
    if x is None:
        return None
    index = last.reshape(last.shape + (1,) * (x.dim() - last.dim())).expand(last.shape + x.shape[last.dim() :])
    return x.gather(0, index)
