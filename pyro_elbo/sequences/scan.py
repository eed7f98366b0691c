"""Scan a Pyro program over time; each site of the step appears once in the trace, with a time dimension.

The steps run under a handler that hides their sites from the handlers around the scan. The scan asks those handlers
once per site which plates surround it and whether they fix its value. After the last step it emits each site once,
stacked over all steps.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_elbo.assumptions import active_loop, check_or_defer, is_capturing
from pyro_elbo.errors import ArgumentError, CompileError, PyroElboError, SiteError, first_sentence
from pyro_elbo.sequences.smc import Filter, ScanFunction, active_filter, run_loop, stack_rows
from pyro_elbo.sequences.stacked import ScanRun
from pyro_elbo.sequences.step import Step, StepProgram, StepResult


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

    Each site of the step appears in the trace once, with event shape (T,) + its own. Its log density is the sum over
    steps, each conditioned on the steps before it. All of Pyro's handlers apply, around the scan and within the step,
    and plates may stand on either side. A value from a handler (replay, condition) may cover only the first steps;
    the remaining ones are drawn.

    Args:
        step: a Pyro program with the same sites at every step; ``x_t`` is ``xs`` at one time.
        init: the initial carry: a tensor, or a pytree of tensors (tuples, lists, dictionaries). Every step must keep
            its shapes and dtypes; only the first step may enlarge it, by broadcasting. With ``lengths``, it begins with
            the dimensions of the sequences.
        xs: a tensor or pytree of tensors with time as dimension ``dim``; or None, together with ``length``.
        lengths: integers of the batch's shape: the number of valid steps of each sequence. Padding may hold any
            value: it enters neither terms nor gradients, and a sequence that has ended keeps its carry. At padded
            steps the step program sees the sequence's last valid frame.
        length: the number of steps if ``xs`` is None.
        horizon: the number of steps to forecast after the end of ``xs``. They get None in place of each tensor of
            x_t, and an observed site (``obs=x_t``) is drawn. With ``lengths``, the forecast of each sequence starts at
            its own end, and its steps are the last ``horizon`` ones of the outs for all sequences.
        reverse: run from the last step to the first.
        dim: the time dimension of ``xs`` and of the outputs.
        name: the name of the time dimension in ``to_dataset()`` and in ArviZ.

    Returns:
        The last carry, and the outs of all steps with time as dimension ``dim``.

    Raises:
        ArgumentError: if there are no steps, lengths are not between 1 and T, or the carry changes shape or dtype.
        SiteError: if a site appears twice in a step or is missing from some steps, or its distribution changes.

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
        raise ArgumentError("pe.scan: a forecast runs forward from the end of xs. Pass either horizon or reverse.")
    inputs = _Inputs.make(xs, lengths, length, horizon, dim)
    steps = StepProgram(step, inputs.total)
    last_carry, stacked = _run(steps, init, inputs, reverse)
    return last_carry, steps.emit(stacked, inputs.valid, dim, ScanRun(name, reverse))


def _run(steps: StepProgram, init: Any, inputs: "_Inputs", reverse: bool) -> tuple[Any, list[Tensor]]:
    """Run all steps and return the last carry and the stacked tensors of all steps, time first."""
    loop, particle_filter = active_loop() if inputs.total > 1 else None, active_filter()
    if loop is None and particle_filter is None:
        return _run_eagerly(steps, init, inputs, reverse)
    if inputs.total > inputs.given:
        raise CompileError("A forecast (pe.scan with horizon) can be neither compiled nor filtered: use compile=False.")
    with contextlib.nullcontext() if particle_filter is None else _explain_particles():
        return _run_as_function(steps, init, inputs, reverse, loop or run_loop, particle_filter)


@contextlib.contextmanager
def _explain_particles() -> Iterator[None]:
    """Name the cause where a step fails on the dimension of the particles."""
    try:
        yield
    except PyroElboError:
        raise
    except (ValueError, RuntimeError, IndexError) as error:
        if is_capturing() or "invalid values" in str(error):
            raise
        raise SiteError(
            f"A step of pe.scan failed under bound='filtering', where tensors have a dimension of particles on the "
            f"left of those that the step expects: {first_sentence(error)} Write the step so that it broadcasts: "
            "count dimensions from the right (dim=-1, x[..., 0]). Or use bound='importance', which can run one "
            "particle after the other."
        ) from error


def _run_as_function(
    steps: StepProgram,
    init: Any,
    inputs: "_Inputs",
    reverse: bool,
    loop: Callable[..., Any],
    particle_filter: Filter | None,
) -> tuple[Any, list[Tensor]]:
    carry, first = steps.peek(init, inputs.at(0), inputs.valid_at(0))
    state, spec = pytree.tree_flatten(carry)
    shapes = [x.shape for x in pytree.tree_leaves(init) if isinstance(x, Tensor)]
    function = _as_function(steps, first, shapes, state, spec, inputs, reverse)
    if particle_filter is not None and first.sites:
        last, stacked = particle_filter.scan(function)
    else:
        last, stacked = loop(function.body, function.state, function.columns, inputs.total, reverse)
    return _with_tensors(state, last, spec), stacked


def _run_eagerly(steps: StepProgram, init: Any, inputs: "_Inputs", reverse: bool) -> tuple[Any, list[Tensor]]:
    carry, rows = init, []
    for t in inputs.order(reverse):
        result = steps.run(carry, inputs.at(t), inputs.valid_at(t), t, steps.given_at(t))
        carry = result.carry
        rows.append(result.tensors)
    return carry, stack_rows(rows[::-1] if reverse else rows)


def _as_function(
    steps: StepProgram,
    first: StepResult,
    shapes: Sequence[torch.Size],
    state: Sequence[Any],
    spec: Any,
    inputs: "_Inputs",
    reverse: bool,
) -> ScanFunction:
    """Return the scan as a function of tensors, whose steps differ only in their row of inputs."""
    valid, given = inputs.valid, steps.given_over_time(first.sites)
    xs, xs_spec = pytree.tree_flatten(inputs.xs)
    columns = [x for x in (*xs, valid, *given.values()) if isinstance(x, Tensor)]

    def step(leaves: list[Tensor], row: list[Tensor], drawn: Mapping[str, Tensor]) -> StepResult:
        parts = iter(row)
        x_t = pytree.tree_unflatten([x if x is None else next(parts) for x in xs], xs_spec)
        valid_t = None if valid is None else next(parts)
        values = {**drawn, **dict(zip(given, parts, strict=True))}
        carry = _with_tensors(state, leaves, spec)
        return steps.run_any(carry, x_t, valid_t, lambda name, event_dim: values.get(name))

    tensors = [x for x in state if isinstance(x, Tensor)]
    return ScanFunction(steps.total, first, shapes, tensors, columns, step, reverse)


def _with_tensors(leaves: Sequence[Any], tensors: Sequence[Tensor], spec: Any) -> Any:
    """Return the pytree of ``leaves`` with its tensors replaced by ``tensors``."""
    new = iter(tensors)
    return pytree.tree_unflatten([next(new) if isinstance(x, Tensor) else x for x in leaves], spec)


@dataclass(frozen=True)
class _Inputs:
    """The inputs of all steps.

    Attributes:
        xs: the inputs, time first, with padding replaced by each sequence's last valid frame.
        given: the number of steps that have an input.
        total: the number of steps, the forecast included.
        valid: the valid steps of each sequence, shape (T, *batch); None if all are.
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
        lengths = _check_lengths(lengths, given, [x for x in pytree.tree_leaves(xs) if x is not None])
        times = torch.arange(given, device=lengths.device).reshape(-1, *(1,) * lengths.dim())
        last = torch.minimum(times, lengths - 1)
        valid = times < lengths
        forecast = valid.new_ones((horizon, *valid.shape[1:]))
        return _Inputs(
            pytree.tree_map(lambda x: _take(x, last), xs), given, given + horizon, torch.cat([valid, forecast])
        )

    def at(self, t: int) -> Any:
        """Return the inputs of step ``t``, with None in place of each tensor in the forecast."""
        return pytree.tree_map(lambda x: x[t] if t < self.given and x is not None else None, self.xs)

    def valid_at(self, t: int) -> Tensor | None:
        """Return which sequences have a step ``t``; None if all do."""
        return None if self.valid is None else self.valid[t]

    def order(self, reverse: bool) -> range:
        """Return the steps in the order in which they run."""
        return range(self.total - 1, -1, -1) if reverse else range(self.total)


def _size(x: Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ArgumentError(
            f"pe.scan: xs holds a tensor of shape {tuple(x.shape)}, which has no dimension {dim} for time. Pass the "
            "time dimension as dim."
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
                f"first). Expected time, then the dimensions of lengths. Pass dim=1 if time is second."
            )
    if not check_or_defer(((lengths >= 1) & (lengths <= total)).all()):
        bad = lengths[(lengths < 1) | (lengths > total)]
        cures = ["Leave empty sequences out of the batch."] if bool((bad < 1).any()) else []
        cures += (
            [f"Pass xs padded to the longest sequence (it has {total} steps)."] if bool((bad > total).any()) else []
        )
        raise ArgumentError(
            f"pe.scan: lengths must lie between 1 and T = {total}, got {bad.flatten()[:5].tolist()}. {' '.join(cures)}"
        )
    return lengths


def _take(x: Tensor | None, last: Tensor) -> Tensor | None:
    """Return each sequence at the times ``last``, shape (T, *batch)."""
    if x is None:
        return None
    index = last.reshape(last.shape + (1,) * (x.dim() - last.dim())).expand(last.shape + x.shape[last.dim() :])
    return x.gather(0, index)
