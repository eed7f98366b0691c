r"""Run a scan whose state is discrete with all values of the state at once.

Every step sees the state before along one dimension and gives the new one along another, so that its densities are

.. math:: \log p(k_t \mid k_{t-1}), \qquad \log p(x_t \mid k_t, k_{t-1})

for all pairs of values. Both are the same constants at every step: no step waits for the one before, and the sum over
all paths is left to whoever reads the densities. At the first step the state before is the given one, along its
dimension too: all its values there are equal.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_elbo.assumptions import is_capturing
from pyro_elbo.errors import ArgumentError, SiteError
from pyro_elbo.sequences.collect import Support
from pyro_elbo.sequences.function import as_function
from pyro_elbo.sequences.inputs import Inputs
from pyro_elbo.sequences.smc import ScanFunction
from pyro_elbo.sequences.step import StepProgram, StepResult


def run_enumerated(
    steps: StepProgram,
    init: Any,
    inputs: Inputs,
    reverse: bool,
    loop: Callable[..., Any],
    ran: StepResult | None = None,
) -> tuple[Any, list[Tensor]]:
    """Run all steps and return the last carry and the stacked tensors of all steps, time first.

    Args:
        steps, init, inputs, reverse: the scan.
        loop: runs a function step by step.
        ran: the first step, where it has run before in Python.

    Raises:
        SiteError: two sites are enumerated, something in the step depends on the state that cannot be summed out, or
            the step remembers how often it has run.
        ArgumentError: the initial state is no tensor of the state's dtype.
    """
    name, support = _only_state(steps)
    if reverse or inputs.total > inputs.given:
        cure = (
            "Flip xs and run forward."
            if reverse
            else "Draw what comes next by predict(horizon=...) of the result of pe.fit, which carries on the path of "
            "the past, and leave horizon out of terms and training."
        )
        raise SiteError(
            f"Site '{name}' is summed out in a pe.scan that {'runs backward' if reverse else 'forecasts'}: it is "
            f"summed over forward scans of given data. {cure}"
        )
    carry, first = steps.peek(init, inputs.at(0), inputs.valid_at(0))
    if ran is not None and not is_capturing():
        _check_memory(name, ran, first, lambda: steps.peek(init, inputs.at(0), inputs.valid_at(0))[1])
    support = steps.renew_support(name, first.sites[name].fn)
    leaves, (state, spec) = pytree.tree_leaves(init), pytree.tree_flatten(carry)
    places = [i for i, (a, b) in enumerate(zip(leaves, state, strict=True)) if a is not None and b is None]
    before = {i: _state_before(name, leaves[i], support, inputs.total) for i in places}
    function = as_function(steps, first, [], state, spec, inputs, reverse, before)
    start = [a for a, b in zip(leaves, state, strict=True) if isinstance(b, Tensor)]
    _check_states(steps, name, function, start, before)
    last, stacked = loop(function.body, function.state, function.columns, inputs.total, reverse)
    ends = iter(last)
    filled = [support.value if i in before else next(ends) if isinstance(x, Tensor) else x for i, x in enumerate(state)]
    return pytree.tree_unflatten(filled, spec), stacked


def _only_state(steps: StepProgram) -> tuple[str, Support]:
    if len(steps.supports) > 1:
        raise SiteError(
            f"The sites {list(steps.supports)} of one step of pe.scan are summed out. Write them as one site over all "
            "pairs of values (K1 · K2 of them, k1 = k // K2, k2 = k % K2), or as a loop with pyro.markov."
        )
    return next(iter(steps.supports.items()))


def _check_memory(name: str, ran: StepResult, again: StepResult, peek: Callable[[], StepResult]) -> None:
    """Raise SiteError where a step gives other densities when it runs again, and not because of random numbers."""
    if _same_tensors(ran, again):
        return
    with torch.random.fork_rng():
        torch.manual_seed(torch.initial_seed() + 1)
        is_random = not _same_tensors(again, peek())
    if not is_random:
        raise SiteError(
            f"The step of a pe.scan whose state '{name}' is summed out gives other densities when it runs again on the "
            "same carry and inputs: it remembers how often it has run, such as by a counter outside of the carry. Pass "
            "the number of the step in xs, torch.arange(T), or keep it in the carry."
        )


def _same_tensors(a: StepResult, b: StepResult) -> bool:
    return len(a.tensors) == len(b.tensors) and all(map(torch.equal, a.tensors, b.tensors))


def _state_before(name: str, init: Any, support: Support, total: int) -> Tensor:
    """Return the state before each step, time first: the initial one, then all values."""
    if not isinstance(init, Tensor) or init.dtype != support.before.dtype:
        got = init.dtype if isinstance(init, Tensor) else repr(init)
        raise ArgumentError(
            f"Site '{name}' is the state of a pe.scan: expected a tensor of {support.before.dtype} in init, got {got}. "
            f"Pass torch.tensor(..., dtype={support.before.dtype})."
        )
    shape = torch.broadcast_shapes(init.shape, support.before.shape)
    start, later = init.expand(shape).unsqueeze(0), support.before.expand(shape).unsqueeze(0)
    return torch.cat([start, later.expand(total - 1, *shape)])


def _check_states(
    steps: StepProgram, name: str, function: ScanFunction, start: list[Tensor], before: Mapping[int, Tensor]
) -> None:
    """Raise SiteError where carry, outs or draws depend on the state: their shapes tell one value from all."""
    row = [x[-1] for x in function.columns]
    states = {id(x) for x in before.values()}
    one = [x[:1] if id(c) in states else x for x, c in zip(row, function.columns, strict=True)]
    every = steps.unseen(lambda: function.step(start, row, {}))
    steps.one_value = True
    single = steps.unseen(lambda: function.step(start, one, {}))
    steps.one_value = False
    if (what := _that_depends(every, single)) is not None:
        raise SiteError(
            f"Site '{name}' of a pe.scan is summed out, but {what} depends on it. Only '{name}' itself may be carried "
            "on, and only densities may depend on it. Draw latents that depend on it in the guide's scan, compute what "
            f"you need from terms.posterior['{name}'], or remove the mark and draw '{name}' in the guide. If the state "
            "depends on the two before it, write one site over all pairs of values."
        )


def _that_depends(every: StepResult, single: StepResult) -> str | None:
    """Return what has another shape where the state has one value."""
    drawn = [n for n, s in every.sites.items() if not s.observed and s.outside.support is None]
    if wrong := [n for n in drawn if every.sites[n].value.shape != single.sites[n].value.shape]:
        return f"the draw of '{wrong[0]}'"
    pairs = zip(every.carry_tensors, single.carry_tensors, strict=True)
    if any(a.shape != b.shape for a, b in pairs):
        return "another part of the carry"
    count = len(every.tensors) - every.outs
    if any(a.shape != b.shape for a, b in zip(every.tensors[count:], single.tensors[count:], strict=True)):
        return "the step's out"
    return None
