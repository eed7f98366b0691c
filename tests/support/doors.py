"""Every public callable with a small valid call of it, and the kind of each of its arguments."""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
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


class Later(NamedTuple):
    """A value that is made when a call needs it."""

    make: Callable[[], Any]


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
        function, values = self.make(), self.valid | changed
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
    def valid(self) -> dict[str, Any]:
        """The arguments of a valid call; modules are copies, which a fit may change."""
        made = {n: x.make() if isinstance(x, Later) else x for n, x in self.given.items()}
        return {n: copy.deepcopy(x) if isinstance(x, nn.Module) else x for n, x in made.items()}

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
            value = {**defaults, **self.valid}[argument]
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
