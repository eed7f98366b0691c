"""Scan a Pyro program over time; each site of the step appears once in the trace, with a time dimension.

The steps run under a handler that hides their sites from the handlers around the scan. The scan asks those handlers
once per site which plates surround it and whether they fix its value. After the last step it emits each site once,
stacked over all steps.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_elbo.assumptions import active_loop, is_capturing
from pyro_elbo.errors import (
    ArgumentError,
    CompileError,
    PyroElboError,
    SiteError,
    check_flag,
    check_name,
    describe,
    first_sentence,
)
from pyro_elbo.sequences.enumerated import run_enumerated
from pyro_elbo.sequences.function import as_function, with_tensors
from pyro_elbo.sequences.inputs import Inputs
from pyro_elbo.sequences.smc import Filter, active_filter, run_loop, stack_rows
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

    Each site of the step appears in the trace once, with event shape (T,) + its own. Its log density is the sum over
    steps, each conditioned on the steps before it. All of Pyro's handlers apply, around the scan and within the step,
    and plates may stand on either side. A value from a handler (replay, condition) may cover only the first steps;
    the remaining ones are drawn. A discrete state of the carry that is marked ``infer={"enumerate": "parallel"}`` is
    summed out over all paths by the objectives of this library; the last carry then holds all its values.

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
        ProgramError: if a step fails.

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
    _check_options(step, reverse, name)
    inputs = Inputs.make(xs, lengths, length, horizon, dim)
    if horizon and reverse:
        raise ArgumentError("pe.scan: a forecast runs forward from the end of xs. Pass either horizon or reverse.")
    steps = StepProgram(step, inputs.total)
    last_carry, stacked = _run(steps, init, inputs, reverse)
    return last_carry, steps.emit(stacked, inputs.valid, dim, ScanRun(name, reverse))


def _check_options(step: Any, reverse: Any, name: Any) -> None:
    if not callable(step) or isinstance(step, type):
        raise ArgumentError(f"pe.scan: step must be a function of the carry and x_t, got {describe(step)}.")
    check_flag("pe.scan: reverse", reverse)
    check_name("pe.scan: name", name, "the name of the time dimension")


def _run(steps: StepProgram, init: Any, inputs: Inputs, reverse: bool) -> tuple[Any, list[Tensor]]:
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
    inputs: Inputs,
    reverse: bool,
    loop: Callable[..., Any],
    particle_filter: Filter | None,
) -> tuple[Any, list[Tensor]]:
    carry, first = steps.peek(init, inputs.at(0), inputs.valid_at(0))
    if steps.supports:
        return run_enumerated(steps, init, inputs, reverse, loop)
    state, spec = pytree.tree_flatten(carry)
    shapes = [x.shape for x in pytree.tree_leaves(init) if isinstance(x, Tensor)]
    function = as_function(steps, first, shapes, state, spec, inputs, reverse)
    if particle_filter is not None and first.sites:
        last, stacked = particle_filter.scan(function)
    else:
        last, stacked = loop(function.body, function.state, function.columns, inputs.total, reverse)
    return with_tensors(state, last, spec), stacked


def _run_eagerly(steps: StepProgram, init: Any, inputs: Inputs, reverse: bool) -> tuple[Any, list[Tensor]]:
    carry, rows = init, []
    for t in inputs.order(reverse):
        result = steps.run(carry, inputs.at(t), inputs.valid_at(t), t, steps.given_at(t))
        carry = result.carry
        if steps.supports:
            return run_enumerated(steps, init, inputs, reverse, run_loop, result)
        rows.append(result.tensors)
    return carry, stack_rows(rows[::-1] if reverse else rows)
