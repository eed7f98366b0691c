"""Simulate, fit and rank many times, in parallel, with every simulation kept on disk."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_elbo.calibration.posteriors import LOG_LIKELIHOOD, posterior_draws
from pyro_elbo.calibration.ranks import ranks_of
from pyro_elbo.calibration.result import Calibration
from pyro_elbo.calibration.simulate import Simulator, make_simulator
from pyro_elbo.errors import (
    ArgumentError,
    NonFiniteError,
    check_count,
    check_positive,
    check_seed,
    describe,
    first_line,
)
from pyro_elbo.parallel import Finished, Work, run_tasks
from pyro_elbo.posterior import label_arrays
from pyro_elbo.programs import Program, as_array, check_options, mix_seed, program_arguments, program_name, seeded

if TYPE_CHECKING:
    import xarray

LEAST_SIMULATIONS, LEAST_DRAWS = 20, 19
_SIMULATE, _FIT, _DRAW, _TIES = range(4)
_WARM_UP = 2**40  # the number of a simulation that is never counted


def simulation_based_calibration(
    model: Program,
    fit: Callable[..., Any],
    *args: Any,
    num_simulations: int = 200,
    num_draws: int = 99,
    num_workers: int = 1,
    seed: int = 0,
    dir: str | os.PathLike | None = None,
    overwrite: bool = False,
    false_alarm: float = 0.05,
    progress: bool = True,
    **kwargs: Any,
) -> Calibration:
    r"""Fit data whose parameters are known, many times, and rank the true values among the posterior draws.

    .. math:: \theta^* \sim p(\theta),\quad y \sim p(y \mid \theta^*),\quad
        r = \#\{s : \theta^{(s)} < \theta^*\},\quad \theta^{(s)} \sim q(\theta \mid y)

    If q is the posterior, ranks are uniform. Each simulation draws all latents from the prior and the data from the
    model, calls ``fit`` with the model's arguments, and draws from what it returns. ``log_likelihood`` is ranked
    beside latents and deterministics: it notices a fit that ignores the data, which is calibrated otherwise.

    Every process first fits one simulation that does not count. What ``fit`` keeps between calls, such as a compiled
    ``pe.SVI`` with :meth:`SVI.reset`, then starts alike everywhere, so that ranks do not depend on ``num_workers``.

    Args:
        model: the generative program. It generates its data: no subsamples, scales or factors, proper priors.
        fit: called as ``fit(*args, **kwargs)`` with simulated data; it returns a guide, a ``FitResult``, or draws by
            site (a dictionary or a Dataset; draws come first). It starts from an empty parameter store and a seed of
            its own. A call that raises is a failure: it is counted and named, and the others go on.
        args, kwargs: arguments of the model, as for real data. Simulated data replace the tensors that it observes.
        num_simulations: how often.
        num_draws: posterior draws per simulation, among which the true value is ranked. Ties (discrete latents) are
            broken at random.
        num_workers: processes; each simulation runs on one thread. On Linux they are copies of this one, elsewhere
            ``model`` and ``fit`` must be importable.
        seed: of all simulations; the same ranks whatever the number of processes.
        dir: a folder with a file for every simulation. A call with the same settings goes on where the last one was
            interrupted, or adds simulations. It does not see a change in the code of ``model`` or ``fit``.
        overwrite: remove the simulations in ``dir``.
        false_alarm: the probability that a calibrated fit gets any other verdict than ``calibrated``.
        progress: show a progress bar.

    Returns:
        Ranks and verdicts; see :class:`Calibration`.

    Raises:
        ArgumentError: a count is too small, a prior or a likelihood cannot be sampled, data are none of the arguments,
            ``fit`` returns something else, or every simulation failed.
        GuideError: the guide is a point estimate or lacks a latent.
        SiteError: the model does not generate its data.
        CheckpointError: ``dir`` holds simulations with other settings, or something else.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, pyro_elbo as pe
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> def fit(y):
        ...     posterior = dist.Normal(y.sum() / (1 + len(y)), (1 + len(y)) ** -0.5)
        ...     return lambda y: pyro.sample("mean", posterior)
        >>> calibration = pe.simulation_based_calibration(model, fit, torch.zeros(5), progress=False)
        >>> calibration.is_calibrated
        True

    References:
        Talts, Betancourt, Simpson, Vehtari, Gelman (2018), Validating Bayesian inference algorithms with
        simulation-based calibration, arXiv:1804.06788; Yao, Vehtari, Simpson, Gelman (2018), Yes, but did it work?
        Evaluating variational inference, arXiv:1802.02538; Modrák et al. (2023), Simulation-based calibration checking
        for Bayesian computation: the choice of test quantities shapes sensitivity, arXiv:2211.02383.
    """
    check_options(model, kwargs)
    check_count("num_simulations", num_simulations, LEAST_SIMULATIONS)
    check_count("num_draws", num_draws, LEAST_DRAWS)
    check_seed(seed, optional=False)
    if not callable(fit):
        raise ArgumentError(f"fit must be a function of the model's arguments, got {describe(fit)}.")
    check_positive("false_alarm", false_alarm)
    if false_alarm >= 1:
        raise ArgumentError(f"false_alarm must be a probability between 0 and 1, got {false_alarm}.")
    args, kwargs = program_arguments(model, args, kwargs)
    simulator = make_simulator(model, args, kwargs, mix_seed(seed, _WARM_UP, _SIMULATE))
    work = _Simulations(simulator, fit, num_draws, seed)
    finished = run_tasks(
        work,
        [_name(i) for i in range(num_simulations)],
        work.settings,
        dir=dir,
        overwrite=overwrite,
        num_workers=num_workers,
        progress=progress,
        unit="simulations",
    )
    return _collect(finished, simulator, num_draws, num_simulations, false_alarm)


def _name(number: int) -> str:
    return f"simulation-{number:06}"


@dataclass(frozen=True)
class _Simulations(Work):
    """The work of a simulation."""

    simulator: Simulator
    fit: Callable[..., Any]
    num_draws: int
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """What the ranks depend on, as far as it can be compared."""
        leaves, _ = pytree.tree_flatten((self.simulator.args, dict(self.simulator.kwargs)))
        data = [as_array(x).tobytes() if isinstance(x, Tensor) else repr(x).encode() for x in leaves]
        return {
            "kind": "simulation_based_calibration",
            "model": program_name(self.simulator.model),
            "quantities": list(self.simulator.quantities),
            "num_draws": self.num_draws,
            "seed": self.seed,
            "arguments": sha256(b"|".join(data)).hexdigest(),
        }

    def prepare(self) -> None:
        """Fit once what is not counted."""
        self._simulate(_WARM_UP)

    def __call__(self, name: str) -> dict[str, Any]:
        return self._simulate(int(name.rpartition("-")[2]))

    def check(self, result: Mapping[str, Any]) -> None:
        if "error" in result:
            return
        parts = [result[part] for part in ("ranks", "positions", "truth")]
        if not all(part.keys() == parts[0].keys() for part in parts):
            raise ValueError("the ranks, the positions and the true values are of other sites")
        if not all(isinstance(x, Tensor) for part in parts for x in part.values()):
            raise TypeError("expected tensors by site")

    def _simulate(self, number: int) -> dict[str, Any]:
        """Simulate, fit and rank; an error of the fit is a result too."""
        seeds = [mix_seed(self.seed, number, part) for part in range(4)]
        simulation = self.simulator(seeds[_SIMULATE])
        try:
            with seeded(seeds[_FIT]):
                fitted = self.fit(*simulation.args, **simulation.kwargs)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {first_line(error)}"}
        try:
            draws = posterior_draws(fitted, self.simulator, simulation, self.num_draws, seeds[_DRAW])
        except NonFiniteError as error:
            return {"error": f"{type(error).__name__}: {first_line(error)}"}
        truth = {LOG_LIKELIHOOD: simulation.log_likelihood} | simulation.truth
        ranks = ranks_of(truth, draws, seeds[_TIES])
        return {
            "ranks": {name: r.rank for name, r in ranks.items()},
            "positions": {name: r.pit for name, r in ranks.items()},
            "truth": {name: truth[name].cpu() for name in ranks},
        }


def _collect(
    finished: Finished, simulator: Simulator, num_draws: int, num_simulations: int, false_alarm: float
) -> Calibration:
    """Put the ranks of all simulations that did not fail into arrays."""
    results = [finished.results.get(_name(i), {"error": finished.lost.get(_name(i))}) for i in range(num_simulations)]
    failures = {i: str(result["error"]) for i, result in enumerate(results) if "error" in result}
    good = {i: result for i, result in enumerate(results) if "error" not in result}
    if len(good) < LEAST_SIMULATIONS:
        number, why = next(iter(failures.items()))
        raise ArgumentError(
            f"fit failed in {len(failures)} of {num_simulations} simulations, and at least {LEAST_SIMULATIONS} must be "
            f"left. Simulation {number}: {why.rstrip('.')}. Use a fit that holds for data drawn from the prior."
        )
    sets = {tuple(sorted(result["ranks"])) for result in good.values()}
    if len(sets) > 1:
        raise ArgumentError(f"fit returned draws of other sites in other simulations: {sorted(sets)}. Return the same.")
    parts = {
        part: _labeled({i: r[part] for i, r in good.items()}, simulator) for part in ("ranks", "positions", "truth")
    }
    return Calibration(**parts, num_draws=num_draws, failures=failures, false_alarm=false_alarm)


def _labeled(values: Mapping[int, Mapping[str, Tensor]], simulator: Simulator) -> "xarray.Dataset":
    """Return a Dataset over simulations, numbered so that failed ones are missing."""
    first = next(iter(values.values()))
    names = [n for n in (*simulator.quantities, LOG_LIKELIHOOD) if n in first]
    arrays = {name: torch.stack([value[name] for value in values.values()]) for name in names}
    plates = {name: simulator.plates.get(name, ()) for name in names}
    return (
        label_arrays(arrays, plates, simulator.times).rename(draw="simulation").assign_coords(simulation=list(values))
    )
