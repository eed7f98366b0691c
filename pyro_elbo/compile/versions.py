"""The torch versions under which compiled steps are tested, and what happens under others."""

import functools
from typing import Any

import pyro
import pyro.distributions as dist
import torch

from pyro_elbo.compile.optimizer import PyroUpdate
from pyro_elbo.errors import CompileError
from pyro_elbo.objectives import TraceBeta_ELBO

OLDEST, NEWEST = (2, 13), (2, 14)  # the tests pass under these and those between


def check_version(steps: type[Any]) -> None:
    """Raise where compiled ``steps`` do not work with this torch; a version newer than the tested ones is tried once.

    Raises:
        CompileError: torch is too old, or a small program fails.
    """
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < OLDEST:
        raise CompileError(
            f"Compiled steps need torch {_name(OLDEST)} or later, this is {torch.__version__}: compile=False."
        )
    if found > NEWEST and (reason := _failure(steps, torch.__version__)):
        raise CompileError(
            f"Compiled steps are tested up to torch {_name(NEWEST)}, this is {torch.__version__}, "
            f'where a small program fails ({reason}). Install a tested version, or use compile=False or compile="auto".'
        )


@functools.cache
def _failure(steps: type[Any], version: str) -> str:
    try:
        _train_a_small_program(steps)
    except Exception as error:
        return " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
    return ""


def _train_a_small_program(steps: type[Any]) -> None:
    """Raise unless compiled steps of a program with one latent lose what its steps in Python lose."""

    def model() -> None:
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.tensor(0.5)), 1.0))

    def losses(compile: bool) -> list[float]:
        with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            update = PyroUpdate(pyro.optim.Adam({"lr": 0.1}))
            tried = steps(model, guide, TraceBeta_ELBO(), update, compile=False, fallback_random=True)
            tried.compile = compile
            return [tried.train((), {})[1][0, 0] for _ in range(4)]

    torch.testing.assert_close(losses(True), losses(False), rtol=1e-5, atol=1e-5)


def _name(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
