"""Kinds of arguments, each with values that no call may take, values that some may, and other spellings of a right one.

``wrong`` values are refused by the library's own error. ``odd`` ones are refused, or give an answer that passes the law
of every answer. ``same`` are functions that spell a valid value in another way, which gives the same answer or is
refused. ``drawn`` makes more wrong values.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from torch import nn

import pyro_elbo as pe

X = torch.linspace(-2.0, 2.0, 24)
NOTHING = st.nothing()
NAMES = st.text("abzk_0 \n\0é", max_size=6)


class Named:
    """An object of no use, with a name that stays the same."""

    def __repr__(self) -> str:
        return "<an object>"


JUNK: tuple[Any, ...] = (
    b"3",
    [],
    [3],
    (),
    {},
    {"z": 3},
    {3},
    3j,
    Named(),
    int,
    len,
    torch.tensor([3.0, 4.0]),
    torch.zeros(0),
    np.array([3, 4]),
    np.array(["z"]),
    np.datetime64("2020-01-01"),
)
TENSORS = (torch.tensor(True), torch.tensor(1j), torch.tensor(3.0, requires_grad=True), np.array(3), torch.tensor(3))


@dataclass(frozen=True)
class Kind:
    """A kind of argument."""

    wrong: tuple[Any, ...]
    odd: tuple[Any, ...] = ()
    same: tuple[Callable[[Any], Any], ...] = ()
    drawn: st.SearchStrategy[Any] = NOTHING

    def or_none(self) -> "Kind":
        """An argument that may be left out by None."""
        return replace(self, wrong=tuple(x for x in self.wrong if x is not None), drawn=self.drawn.filter(_is_given))

    def but(self, *taken: Any) -> "Kind":
        """The kind without some wrong values, which an argument takes."""
        return replace(self, wrong=tuple(x for x in self.wrong if not any(x is y for y in taken)))

    def oddly(self, *odd: Any) -> "Kind":
        """The kind with more odd values."""
        return replace(self, odd=(*self.odd, *odd))


def _is_given(x: Any) -> bool:
    return x is not None


def count(least: int = 1) -> Kind:
    """A whole number of at least ``least``."""
    small = (least - 1, least - 2, -(10**30))
    drawn = st.one_of(
        st.integers(max_value=least - 1),
        st.floats(allow_nan=True, allow_infinity=True),
        st.booleans(),
        NAMES,
        st.lists(st.integers(), max_size=2),
        st.fractions().filter(lambda x: x.denominator > 1),
    )
    wrong = (None, True, "3", "", 2.5, 3.0, math.nan, math.inf, -math.inf, Fraction(5, 2), *small, *JUNK, *TENSORS)
    return Kind(wrong, same=(np.int64, np.int32), drawn=drawn)


def number(least: float = -math.inf, above: bool = False, most: float = math.inf) -> Kind:
    """A finite number of at least (above: more than) ``least``, at most ``most``."""
    small = (least, least - 1e-9) if above else (least - 1e-9, least - 1.0)
    outside = tuple(float(x) for x in (*small, most + 1e-9, most * 2) if math.isfinite(x))
    drawn = st.one_of(
        st.sampled_from((math.nan, math.inf, -math.inf)),
        st.booleans(),
        NAMES,
        st.complex_numbers(),
        *([st.floats(max_value=least, exclude_max=not above, allow_nan=False)] if math.isfinite(least) else []),
        *([st.floats(min_value=most, exclude_min=True, allow_nan=False)] if math.isfinite(most) else []),
    )
    wrong = (None, True, "0.5", "", math.nan, math.inf, -math.inf, *outside, *JUNK)
    return Kind(wrong, odd=TENSORS, same=(np.float64, Fraction), drawn=drawn)


def choice(*known: str) -> Kind:
    """One of a few words."""
    near = [w for k in known for w in (k.upper(), k[:-1], f"{k}s", f" {k}")]
    drawn = st.one_of(NAMES, st.integers(), st.booleans(), st.lists(NAMES, max_size=2)).filter(lambda x: x not in known)
    wrong = (None, True, 3, "", "zz", list(known), np.array(known), *near, *JUNK, *TENSORS)
    return Kind(wrong, drawn=drawn, same=(np.str_,))


SEED = count(0).oddly(2**32, 2**64, 10**30)
FLAG = Kind(
    (None, "yes", "False", "", 1, 0, 2.0, math.nan, *JUNK, *TENSORS),
    same=(np.bool_,),
    drawn=st.one_of(st.integers(), st.floats(), NAMES, st.none()),
)
NAME = Kind(
    (None, True, 3, math.nan, *JUNK, *TENSORS), odd=("zz", "", "x", "Z", "z\0"), drawn=st.integers() | st.none()
)
LABEL = replace(NAME, odd=("zz", "", "z\0", "epoch", "a/b"))
_NOWHERE = Path(tempfile.gettempdir()) / "pyro_elbo_nothing"
PATH = Kind((None, True, 3, math.nan, "\0", "a\0b", *JUNK, *TENSORS), same=(Path,), drawn=st.integers() | st.none())
SAVED = replace(PATH, wrong=(*PATH.wrong, "", ".", "/", str(_NOWHERE), __file__, "/dev/null"))


def _is_tensor(args: tuple) -> bool:
    return len(args) == 1 and isinstance(args[0], torch.Tensor) and args[0].shape == X.shape


def fails(x: Any) -> None:
    """A program that torch refuses."""
    pyro.sample("z", dist.Normal(torch.zeros(2) + torch.zeros(3), 1.0))


class Forwardless(nn.Module):
    """A module that cannot be called."""


PROGRAM = Kind(
    (
        None,
        True,
        3,
        "model",
        "",
        nn.Module,
        Forwardless(),
        dist.Normal,
        dist.Normal(0.0, 1.0),
        lambda: None,
        lambda x, y, z: None,
        fails,
        torch.zeros_like,
        nn.Linear(3, 2),
        *(x for x in JUNK if not callable(x)),
        *TENSORS,
    ),
    drawn=st.one_of(st.none(), st.integers(), NAMES),
)
FUNCTION = Kind((True, 3, "f", *(x for x in JUNK if not callable(x)), *TENSORS), drawn=st.integers() | NAMES)
_BAD = [math.nan, math.inf, -math.inf]
SPOILT = tuple((torch.cat([X[:20], torch.full((4,), x)]),) for x in _BAD)
BY_NAME = ({"x": X},)
FORMS = (
    (X.tolist(),),
    (X > 0,),
    (X.long(),),
    (X.half(),),
    (X.bfloat16(),),
    (X.double(),),
    (X.int().numpy(),),
    (X.clone().requires_grad_(),),
    (X[:, None],),
    (X[None],),
    (X.expand(2, 24),),
    (X[:1],),
    (X * 1e30,),
    (X.numpy().astype(">f8"),),
)
DATA = Kind(
    (
        (),
        (X, X),
        (None,),
        ("x",),
        (3,),
        (3.0,),
        (Named(),),
        (["a", "b"],),
        BY_NAME,
        ([],),
        ([None, 3.0],),
        (X[:0],),
        (torch.zeros(24, 0),),
        (torch.complex(X, X),),
        (X.to_sparse(),),
        (X.to("meta"),),
        (np.array(["a"] * 24),),
        (np.array([None] * 24),),
        (int,),
        *SPOILT,
    ),
    odd=FORMS,
    same=(lambda args: tuple(x.numpy() for x in args),),
    drawn=st.one_of(
        st.tuples(st.none() | st.integers() | st.booleans() | NAMES | st.binary(max_size=2)),
        st.tuples(st.lists(NAMES, min_size=1, max_size=3)),
        st.tuples(st.integers(0, 23), st.sampled_from(_BAD)).map(
            lambda at: (X.clone().index_fill(0, torch.tensor(at[0]), at[1]),)
        ),
    ),
)
LIKE_DATA = Kind(
    tuple(x for x in DATA.wrong if not _is_tensor(x)), drawn=DATA.drawn.filter(lambda args: not _is_tensor(args))
)
"""Data of which a call takes the shape alone: it simulates their values."""
KEYWORDS = Kind(
    ({"num_sample": 3}, {"unknown": 1}, {"x": X}, {"": 1}, {"random_seed": 3}),
    drawn=st.dictionaries(st.text("abc", min_size=2, max_size=4), st.integers(), min_size=1, max_size=2),
)
TRAIN = replace(
    DATA,
    wrong=(
        None,
        True,
        3,
        "x",
        "",
        Named(),
        int,
        [],
        (),
        {},
        {"x": X[:0]},
        {"zz": X},
        (X, X),
        (X, X[:3]),
        torch.zeros(0, 3),
    )
    + tuple(x[0] for x in DATA.wrong if len(x) == 1 and not isinstance(x[0], dict | list)),
    odd=tuple(x[0] for x in FORMS),
    same=(lambda x: x.numpy(), lambda x: (x,), lambda x: [x], lambda x: {"x": x}),
    drawn=DATA.drawn.map(lambda x: x[0]),
)
BETA = replace(
    number(0.0),
    wrong=(
        None,
        True,
        "1",
        "linear",
        -1.0,
        math.nan,
        math.inf,
        *(x for x in JUNK if not isinstance(x, torch.Tensor) and not isinstance(x, dict)),
        torch.tensor([1.0, -1.0]),
        torch.tensor(math.nan),
        torch.tensor(1j),
        torch.zeros(0),
        {"z": "1"},
        {"z": -1.0},
        {"z": None},
        {3: 1.0},
        {"zz": 1.0},
        {"x": 2.0},
        pe.LinearWarmup,
        {"z": pe.Constant},
    ),
    odd=(*TENSORS, {}, torch.ones(3), torch.ones(24, 1), np.array([3, 4])),
    same=(np.float64, Fraction, torch.tensor, pe.Constant, lambda beta: {"z": beta}),
)
WEIGHT = replace(number(), same=(np.float64, Fraction, pe.Constant))
TERMS = Kind((None, True, 3, "terms", X, pe.Terms, *JUNK), drawn=st.integers() | NAMES)
PENALTIES = Kind(
    (
        None,
        True,
        3,
        "z",
        ["z"],
        [pe.TotalCorrelation],
        [pe.TotalCorrelation("z"), pe.TotalCorrelation("z")],
        [pe.TotalCorrelation("zz")],
        [pe.TotalCorrelation("x")],
        pe.TotalCorrelation("z"),
        *(x for x in JUNK if not isinstance(x, list | tuple)),
        [3],
    ),
    odd=([], ()),
    drawn=st.integers() | st.lists(NAMES, min_size=1, max_size=2),
)
