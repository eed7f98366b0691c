"""Every public callable with a small valid call of it, and the kind of each of its arguments."""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

from tests.support.kinds import (
    BETA,
    DATA,
    FLAG,
    KEYWORDS,
    LABEL,
    NAME,
    PATH,
    PENALTIES,
    PROGRAM,
    SEED,
    WEIGHT,
    Kind,
    choice,
    count,
    number,
)


class Guide(PyroModule):
    """The guide of ``model``, with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.4))

    def forward(self, x: Any) -> None:
        """Draw z near its posterior."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, 0.7))


def model(x: Any) -> None:
    """Draw a latent and a datum for each row."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def discrete(x: Any) -> None:
    """A mixture whose components are summed out."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)


def shared(x: Any) -> None:
    """One latent of all rows."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


class Mean(PyroModule):
    """The guide of ``shared``."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.0))
        self.width = nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Any) -> None:
        """Draw the mean."""
        pyro.sample("mean", dist.Normal(self.loc, self.width))


def step(carry: Any, x_t: Any) -> tuple[Any, Any]:
    """A random walk."""
    level = pyro.sample("level", dist.Normal(carry, 0.1))
    pyro.sample("x", dist.Normal(level, 1.0), obs=x_t)
    return level, level


def walk(carry: Any, x_t: Any) -> tuple[Any, Any]:
    """The guide of ``step``."""
    level = pyro.sample("level", dist.Normal(x_t, 0.5))
    return level, None


@dataclass(frozen=True)
class Door:
    """A public callable.

    Attributes:
        make: returns it.
        given: the arguments of a valid call.
        kinds: the kinds of its arguments, where they differ from those that their names have elsewhere.
        is_slow: whether a valid call takes seconds.
    """

    make: Callable[[], Callable[..., Any]]
    given: Mapping[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    is_slow: bool = False

    def __call__(self, **changed: Any) -> Any:
        """Call with some arguments changed."""
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        given = {n: copy.deepcopy(x) if isinstance(x, nn.Module) else x for n, x in self.given.items()}
        function, values = self.make(), given | changed
        positional, keywords = [], {}
        parameters = inspect.signature(function).parameters.values()
        spread = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        for p in parameters:
            if p.kind is p.VAR_POSITIONAL:
                positional += values.get(p.name, ())
            elif p.kind is p.VAR_KEYWORD:
                keywords |= values.get(p.name, {})
            elif p.name in values or p.default is not p.empty:
                value = values.get(p.name, p.default)
                if p.kind is p.POSITIONAL_ONLY or (spread and p.kind is p.POSITIONAL_OR_KEYWORD):
                    positional.append(value)
                else:
                    keywords[p.name] = value
        return function(*positional, **keywords)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of its arguments."""
        return tuple(n for n in inspect.signature(self.make()).parameters if n not in ("given", "unknown"))

    def kind(self, argument: str) -> Kind:
        """The kind of an argument."""
        return self.kinds[argument] if argument in self.kinds else COMMON[argument]

    @property
    def spellings(self) -> Iterator[tuple[str, str, Any]]:
        """Other spellings of the valid values: the argument, the spelling and the value."""
        defaults = {n: p.default for n, p in inspect.signature(self.make()).parameters.items()}
        for argument in self.arguments:
            value = {**defaults, **self.given}[argument]
            if value is None or value is inspect.Parameter.empty:
                continue
            for spell in self.kind(argument).same:
                yield argument, getattr(spell, "__name__", str(spell)), spell(value)


COMMON = {
    "model": PROGRAM,
    "guide": PROGRAM,
    "args": DATA,
    "kwargs": KEYWORDS,
    "num_samples": count(),
    "seed": SEED,
    "progress": FLAG,
    "num_workers": count(),
    "overwrite": FLAG,
    "dir": PATH.or_none(),
    "path": PATH,
    "beta": BETA,
    "kl": choice("auto", "sampled"),
    "free_bits": number(0.0),
    "num_particles": count(),
    "vectorize_particles": FLAG,
    "max_plate_nesting": count(0).but(math.inf),
    "retain_graph": FLAG.or_none(),
    "gradient": choice("auto", "stl", "dreg", "rloo", "vargrad"),
    "penalties": PENALTIES,
    "start": number(0.0),
    "end": number(0.0),
    "steps": count(),
    "step": count(0),
    "weight": WEIGHT,
    "latent": NAME,
    "name": LABEL,
    "which": choice("best", "last").or_none(),
}
