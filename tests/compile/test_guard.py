"""Arguments and settings that change are noticed: a stale graph never runs.

Each case trains, changes one thing, trains on, and must equal the uncompiled steps.
"""

import enum
import gc
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_elbo as pe
from tests.support.compiled import (  # noqa: F401  (fixtures work by name)
    X,
    _as_captured,
    _double,
    _graphs,
    adam,
    any_guide,
    assert_same,
    changes,
    exact_or_refused,
    guide,
    model,
    parameters,
    sampled,
    train,
    widths,
)
from tests.support.rows import every_other

# --- arguments ---------------------------------------------------------------------------------------------------


def of_arguments(program, calls):
    """Assert that three calls of each kind in turn give the same with and without compilation."""

    def scenario(svi_of):
        svi = svi_of(program, any_guide, adam(), sampled())
        return [svi.step(*args, **kwargs) for args, kwargs in calls for _ in range(3)], parameters()

    assert_same(scenario)


class Level(enum.Enum):
    LOW = 1
    HIGH = 3


@pytest.mark.parametrize(
    "numbers",
    every_other(
        [
            (1.0, 3.0),
            (1, 3),
            (True, 3),
            (np.int64(1), np.int64(3)),
            (Level.LOW, Level.HIGH),
            (np.float64(1), np.float32(3)),
        ]
    ),
    ids=str,
)
def test_plain_arguments(interpreted, numbers):
    low, high = numbers

    def number(level=1.0):
        return float(level.value if isinstance(level, Level) else level)

    of_arguments(widths(number), [((X, low), {}), ((X, high), {}), ((X,), {"level": low}), ((X,), {})])


def test_temporary_arguments_are_not_confused_by_their_address(interpreted):
    def scenario(svi_of):
        svi = svi_of(widths(lambda box: box.level), any_guide, adam(), sampled())
        first = [svi.step(X, types.SimpleNamespace(level=1.0)) for _ in range(3)]
        gc.collect()
        return first, [svi.step(X, types.SimpleNamespace(level=level)) for level in (5.0, 2.0, 7.0)]

    message = exact_or_refused(scenario)
    assert not message or "compile=False" in message


def test_nested_arguments(interpreted, graphs):
    def from_nest(nest, *, options):
        (first, second), table = nest
        return (first + second * 2 + table["width"]) * options["factor"]

    one, two = torch.tensor(1.0), torch.tensor(2.0)
    calls = [
        ((X, ((one, two), {"width": one})), {"options": {"factor": 1.0}}),
        ((X, ((one, one), {"width": two})), {"options": {"factor": 1.0}}),
        ((X, ((one, two), {"width": one})), {"options": {"factor": 2.0}}),
        ((X, [(one, two), {"width": two, "more": 1}]), {"options": {"factor": 2.0}}),
    ]
    of_arguments(widths(from_nest), calls)
    assert len(graphs) == 3


def test_one_tensor_as_two_arguments(interpreted, graphs):
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    of_arguments(widths(lambda a, b: a + 2 * b), [((X, one, one), {}), ((X, one, two), {}), ((X, two, one), {})])


@pytest.mark.parametrize("together", [False, True])
def test_an_argument_that_the_program_changes(interpreted, together):
    """``x -= 1`` changes the caller's tensor, also where that is another argument too, or the step is refused."""

    def scenario(svi_of):
        def program(x, y):
            x -= 0.1
            model(y)

        svi = svi_of(program, any_guide, adam(), sampled())
        x, y = X.clone(), X.clone()
        losses = [svi.step(x, y) for _ in range(3)]
        return losses, [svi.step(y, y) for _ in range(3 if together else 0)], x, y

    message = exact_or_refused(scenario)
    assert not message or "in place" in message


@pytest.mark.slow
def test_shapes_dtypes_and_layouts(graphs):
    """On Inductor: data of another shape, precision or layout give the right loss, from a new graph if needed."""

    def scenario(svi_of):
        svi = svi_of(model, guide, adam(), sampled())
        wide = torch.arange(8.0).reshape(4, 2)
        data = [X, wide[:, 1], X[:1].expand(4), X.float(), torch.cat([X, X])[3:7]]
        return [svi.step(x) for x in data for _ in range(3)], parameters()

    assert_same(scenario, rtol=1e-7, atol=1e-8)
    assert len(graphs) <= 4


def test_the_last_batch_costs_one_graph(interpreted, graphs):
    data = torch.linspace(-1.0, 2.0, 10)

    def scenario(svi_of):
        svi = svi_of(model, guide, adam(), sampled())
        return [svi.step(batch) for _ in range(5) for batch in data.split(4)], parameters()

    assert_same(scenario)
    assert len(graphs) == 2


def test_many_shapes_that_do_repeat(interpreted, graphs):
    """Every length that repeats gets a graph of its own."""

    def scenario(svi_of):
        svi = svi_of(model, guide, adam(), sampled())
        return [svi.step(X[:n]) for _ in range(4) for n in (1, 2, 3, 4)], parameters()

    assert_same(scenario)
    assert len(graphs) == 4


# --- modes and settings ------------------------------------------------------------------------------------------


def test_settings_of_pyro_and_torch(interpreted):
    """A step follows Pyro's validation and torch's default dtype when they change."""

    def scenario(svi_of):
        svi = svi_of(widths(lambda: torch.ones(())), any_guide, adam(), sampled())
        losses = [svi.step(X) for _ in range(3)]
        pyro.enable_validation(False)
        losses += [svi.step(X) for _ in range(3)]
        torch.set_default_dtype(torch.float32)
        losses += [svi.step(X) for _ in range(3)]
        torch.set_default_dtype(torch.float64)
        pyro.enable_validation(True)
        return [*losses, svi.step(X)], parameters()

    assert_same(scenario)


def test_steps_under_no_grad_train(interpreted):
    def scenario(svi_of):
        svi = svi_of(model, guide, adam(), sampled())
        with torch.no_grad():
            losses = train(svi, 3, X)
        assert parameters()["loc"] != 0.1
        return [*losses, *train(svi, 3, X)], parameters()

    assert_same(scenario)


def test_handlers_around_the_step(interpreted, graphs):
    def scenario(svi_of):
        svi = svi_of(model, guide, adam(), sampled())
        losses = [svi.step(X) for _ in range(3)]
        with poutine.scale(scale=3.0):
            losses += [svi.step(X) for _ in range(3)]
        return [*losses, svi.step(X)], parameters()

    assert_same(scenario)
    assert len(graphs) == 1


def test_handlers_around_the_programs(interpreted):
    """A step follows a tensor that a handler holds, changed in place or replaced."""

    def scenario(svi_of):
        factor, given = torch.tensor(2.0), {"w": torch.tensor(0.3)}

        def program(x):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            model(x + w)

        conditioned = pyro.condition(program, data=given)
        svi = svi_of(
            poutine.scale(conditioned, scale=factor), poutine.scale(guide, scale=factor), adam(), pe.TraceBeta_ELBO()
        )
        losses = [svi.step(X) for _ in range(3)]
        factor.fill_(5.0)
        losses += [svi.step(X) for _ in range(2)]
        given["w"] = torch.tensor(3.0)
        return [*losses, *(svi.step(X) for _ in range(3))], parameters()

    assert_same(scenario)
