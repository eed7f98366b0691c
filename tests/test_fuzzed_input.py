"""Fuzzed input: every argument of every public callable gets what it cannot take, one at a time.

The law: an error of the library that names the argument or the site, or an answer without NaN and infinity. What
spells a valid value in another way gives the same answer. ``PYRO_ELBO_FUZZ`` sets the number of drawn values (``make
fuzz``).
"""

import functools
import os
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyro_elbo.errors import PyroElboError
from tests.support.answers import numbers
from tests.support.kinds import NOTHING
from tests.support.public import DOORS, documented
from tests.support.rows import thorough
from tests.support.untyped import _untyped  # noqa: F401  (a fixture)

pytestmark = [
    pytest.mark.usefixtures("untyped"),
    pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto"),  # of few draws
]
EXAMPLES = int(os.environ.get("PYRO_ELBO_FUZZ", "100"))
OVERRIDDEN = {"TraceBeta_ELBO.bound", "Penalty.estimate", "MutualInformation.estimate", "TotalCorrelation.estimate"}
"""Methods that a subclass writes and the library calls."""

OF_PROGRAMS = r"program|model|guide|plate|Site|Line|Argument|batch|array|rows"
ALSO_NAMED = {  # what a message names in place of an argument that the programs see
    **dict.fromkeys(
        ("args", "kwargs", "model", "guide", "train", "valid", "batches", "step", "init", "xs"), OF_PROGRAMS
    ),
    **dict.fromkeys(("attribute", "conditional_on"), "[aA]ttribute"),
    "penalties": "[pP]enalty|latent",
    "options": "option|kl|given|This call",
    "path": "folder|does not exist|file",
    "data": "pe.to_arviz",
}


VALID = [thorough(name) if door.is_slow else name for name, door in DOORS.items()]
"""Callables by name; valid calls of the dear ones are left to ``make fuzz``."""


def refused(name, argument, value):
    """Return whether a call is refused, by an error that names the argument."""
    try:
        DOORS[name](**{argument: value})
    except PyroElboError as error:
        message = str(error)
    else:
        return False
    expected = rf"\b{argument}\b|{ALSO_NAMED.get(argument, argument)}"
    assert re.search(expected, message), f"{name}({argument}={value!r}) is refused without naming it: {message}"
    return True


def is_wrong(x):
    """Return whether an array holds what no figure is: minus infinity is the logarithm of zero."""
    return bool(np.isnan(x).any() or np.isposinf(x).any()) if x.dtype.kind in "fc" else False


def test_no_public_callable_and_no_argument_is_forgotten():
    assert set(DOORS) == set(documented()) - OVERRIDDEN
    for name, door in DOORS.items():
        for argument in door.arguments:
            assert door.kind(argument).wrong, f"{name}: nothing is wrong for {argument}"


@pytest.mark.parametrize("name", DOORS)
def test_what_no_call_can_take_is_refused(name):
    door = DOORS[name]
    for argument in door.arguments:
        for value in door.kind(argument).wrong:
            assert refused(name, argument, value), f"{name}({argument}={value!r}) is taken"


@pytest.mark.parametrize("name", VALID)
def test_odd_values_are_refused_or_give_finite_answers(name):
    door = DOORS[name]
    for argument in door.arguments:
        for value in door.kind(argument).odd:
            if not refused(name, argument, value):
                answer = door(**{argument: value})
                assert not any(map(is_wrong, numbers(answer))), f"{name}({argument}={value!r}): {answer}"


@pytest.mark.parametrize("name", VALID)
def test_another_spelling_gives_the_same_answer(name):
    door = DOORS[name]
    expected = list(numbers(door()))
    for argument, spelling, value in door.spellings:
        try:
            found = list(numbers(door(**{argument: value})))
        except PyroElboError:
            continue
        assert len(found) == len(expected), f"{name}: {argument} by {spelling}"
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6, err_msg=f"{name}: {argument} by {spelling}")


@functools.cache
def drawn():
    """Return the arguments whose kind draws values."""
    return [(n, a) for n, door in DOORS.items() for a in door.arguments if door.kind(a).drawn is not NOTHING]


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_drawn_values_are_refused(data):
    name, argument = data.draw(st.sampled_from(drawn()))
    value = data.draw(DOORS[name].kind(argument).drawn)
    assert refused(name, argument, value), f"{name}({argument}={value!r}) is taken"


def test_the_table_holds_many_malformed_inputs(capsys):
    """Each of them is refused in a test above."""
    arguments = [(door, a) for door in DOORS.values() for a in door.arguments]
    wrong = sum(len(door.kind(a).wrong) for door, a in arguments)
    with capsys.disabled():
        print(f"\n{len(DOORS)} callables, {len(arguments)} arguments, {wrong} malformed inputs refused")
    assert wrong >= 300
