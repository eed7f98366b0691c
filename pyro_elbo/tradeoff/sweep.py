"""Fit at many values of β, in parallel, with every point kept on disk."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_elbo.errors import ArgumentError, check_count, check_number, check_seed, describe
from pyro_elbo.parallel import Work, run_tasks
from pyro_elbo.programs import mix_seed, seeded
from pyro_elbo.tradeoff.points import Point, measure

if TYPE_CHECKING:
    import xarray


def sweep(
    fit: Callable[[float], Any],
    betas: Sequence[float],
    *,
    num_samples: int = 10,
    num_workers: int = 1,
    seed: int = 0,
    dir: str | os.PathLike | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> "xarray.Dataset":
    """Fit at several values of β and measure rate and distortion of each: the points of :func:`rate_distortion`.

    Args:
        fit: a function from β to a ``FitResult``, measured on its training data, or to ``Terms``, such as
            ``result.terms(x_test)``. It starts from an empty parameter store and its own seed, so it makes its programs
            itself.
        betas: the values of β.
        num_samples: evaluations of the terms of a ``FitResult``, whose average is the point.
        num_workers: processes; each fit runs on one thread. On Linux they are copies of this one, elsewhere ``fit``
            must be importable.
        seed: of all fits; the same points whatever the number of processes and the order of ``betas``.
        dir: a folder with a file for every β. A call with the same settings goes on where the last one was interrupted,
            or adds values of β. It does not see a change in the code of ``fit``.
        overwrite: remove the points in ``dir``.
        progress: show a progress bar.

    Returns:
        Dataset over ``beta``: ``rate``, ``distortion``, ``elbo`` and, with ``_se``, their standard errors over rows,
        nats per datum.

    Raises:
        ArgumentError: βs that are no numbers, negative or repeated, ``fit`` returns something else, or a process died.
        CheckpointError: ``dir`` holds other points, or something else.
        Exception: what ``fit`` raises, with β in its notes. Points that are done stay in ``dir``.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, pyro_elbo as pe
        >>> x = torch.linspace(-2.0, 2.0, 50)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def fit(beta):  # the best q for a weight of beta
        ...     def guide(x):
        ...         with pyro.plate("data", len(x)):
        ...             pyro.sample("z", dist.Normal(x / (1 + beta), (beta / (1 + beta)) ** 0.5))
        ...     return pe.TraceBeta_ELBO(beta=beta).terms(model, guide, x)
        >>> points = pe.sweep(fit, [0.5, 1.0, 2.0], progress=False)
        >>> bool((points.rate.diff("beta") < 0).all())
        True
    """
    if not callable(fit):
        raise ArgumentError(f"fit must be a function from beta to a FitResult or Terms, got {describe(fit)}.")
    check_count("num_samples", num_samples)
    check_seed(seed, optional=False)
    values = _as_numbers(betas)
    work = _Sweep(fit, num_samples, seed)
    names = [f"beta-{beta!r}" for beta in values]
    settings = {"kind": "sweep", "num_samples": num_samples, "seed": seed}
    finished = run_tasks(
        work,
        names,
        settings,
        dir=dir,
        overwrite=overwrite,
        num_workers=num_workers,
        progress=progress,
        unit="fits",
    )
    for name, why in finished.lost.items():
        raise ArgumentError(f"fit({name.removeprefix('beta-')}): {why}. Sweep again: with dir=... the others are kept.")
    return to_dataset(values, [Point(**finished.results[name]) for name in names])


def _as_numbers(betas: Any) -> list[float]:
    if not isinstance(betas, Real | Iterable) or isinstance(betas, type):
        raise ArgumentError(f"betas must be a list of numbers, got {describe(betas)}.")
    values = [betas] if isinstance(betas, Real) else list(betas)
    for beta in values:
        check_number("every one of betas", beta)
    values = [float(beta) for beta in values]
    if not values or len(set(values)) < len(values):
        raise ArgumentError(f"betas must be one or more different numbers, got {values}.")
    return values


@dataclass(frozen=True)
class _Sweep(Work):
    """The work of one β."""

    fit: Callable[[float], Any]
    num_samples: int
    seed: int

    def __call__(self, name: str) -> dict[str, float]:
        beta = float(name.removeprefix("beta-"))
        seed = mix_seed(self.seed, int(np.float64(beta).view(np.uint64)))
        try:
            with seeded(seed):
                fitted = self.fit(beta)
            return measure(fitted, self.num_samples, seed, f"fit({beta:g})")._asdict()
        except Exception as error:
            error.add_note(f"in fit({beta:g})")
            raise

    def check(self, result: Mapping[str, float]) -> None:
        if not all(isinstance(x, float) for x in Point(**result)):
            raise TypeError("expected numbers")


def to_dataset(betas: Sequence[float], points: Sequence[Point]) -> "xarray.Dataset":
    """Return points as a Dataset over β, in the order of β."""
    import xarray

    order = np.argsort([math.inf if math.isnan(b) else b for b in betas], kind="stable")
    columns = {name: ("beta", [getattr(points[i], name) for i in order]) for name in Point._fields}
    data = xarray.Dataset(columns, coords={"beta": [float(betas[i]) for i in order]})
    for variable in data.data_vars.values():
        variable.attrs["units"] = "nats per datum"
    return data
