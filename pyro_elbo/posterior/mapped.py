"""Run a program for many draws at once where it does not broadcast: as a function of one draw, mapped by torch."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import patch

import pyro
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import Dirichlet, Distribution, Independent, TransformedDistribution, constraints
from torch.overrides import TorchFunctionMode

from pyro_elbo.assumptions import capturing
from pyro_elbo.programs import Site
from pyro_elbo.sequences import StackedDistribution

_UNINITIALIZED = {torch.empty, torch.empty_like, Tensor.new_empty}
_VALIDATION = ("validate_distributions_pyro", "validate_distributions_torch")


class InvalidDrawError(Exception):
    """A draw for which a single run would raise its own error."""


def map_draws(run: Callable[[Any], tuple[Any, Tensor]], given: Mapping[str, Tensor], count: int) -> Any:
    """Return what ``run`` gives for each of ``count`` draws, stacked; each draw has random numbers of its own.

    Args:
        run: from the values of one draw to tensors, and whether they are valid.
        given: values, draws first.
        count: number of draws.

    Raises:
        InvalidDrawError: a draw is not valid.
        Exception: what ``run`` does cannot be mapped, such as a branch on a value.
    """

    def run_one(values: Mapping[str, Tensor], zero: Tensor) -> tuple[Any, Tensor]:
        with _Buffers(zero), capturing(validate=False) as assumed:
            found, valid = run(values)
            return found, torch.stack([valid, *assumed]).all()

    with _unchecked(), patch.object(Dirichlet, "rsample", _sample_dirichlet):
        found, valid = torch.func.vmap(run_one, randomness="different")(dict(given), torch.zeros(count))
    run({name: x[0] for name, x in given.items()})  # what modules have cached must not be tensors of the mapped run
    if not valid.all():
        raise InvalidDrawError
    return found


def _sample_dirichlet(fn: Any, sample_shape: Any = ()) -> Tensor:
    """Draw without a gradient, whose function in torch cannot be mapped."""
    return torch._sample_dirichlet(fn.concentration.expand(fn._extended_shape(sample_shape)))


class _Buffers(TorchFunctionMode):
    """Give each draw of a mapped run its own uninitialized tensors, so that it can fill them with random numbers.

    Args:
        zero: a zero for each draw.
    """

    def __init__(self, zero: Tensor) -> None:
        super().__init__()
        self.zero = zero

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch."""
        found = func(*args, **(kwargs or {}))
        sized = func is Tensor.new and all(isinstance(x, int | torch.Size) for x in args[1:])
        return found + self.zero.to(found.dtype) if sized or func in _UNINITIALIZED else found


def are_valid(sites: Iterable[Site], values: bool = True) -> Tensor:
    """Return whether sites pass the checks of their distributions, of values only where asked to.

    These checks branch on values, which a mapped run cannot do.
    """
    checks = [check.all() for site in sites for check in _checks(site, values)]
    return torch.stack(checks).all() if checks else torch.tensor(True)


def _checks(site: Site, values: bool) -> Iterator[Tensor]:
    fn = site.fn
    if values and site.role != "deterministic":
        with suppress(NotImplementedError):  # no support is known
            yield fn.support.check(site.value)
    while isinstance(fn, Independent | MaskedDistribution | StackedDistribution | TransformedDistribution):
        fn = fn.steps if isinstance(fn, StackedDistribution) else fn.base_dist
    yield from _check_arguments(fn)


def _check_arguments(fn: Distribution) -> Iterator[Tensor]:
    for name, constraint in fn.arg_constraints.items():
        value = vars(fn).get(name)  # what was not given is computed from what was
        if isinstance(value, Tensor) and not constraints.is_dependent(constraint):
            yield constraint.check(value)


@contextmanager
def _unchecked() -> Iterator[None]:
    """Let distributions make no checks, and torch say nothing of operators that it maps one by one."""
    with pyro.settings.context(**dict.fromkeys(_VALIDATION, False)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield
