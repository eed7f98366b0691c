"""Posterior draws from what a fit returned: a result, a guide, or the draws themselves."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_elbo.calibration.simulate import Simulation, Simulator
from pyro_elbo.errors import ArgumentError, GuideError, NonFiniteError, count_nonfinite, describe
from pyro_elbo.posterior import sample_guide
from pyro_elbo.training import FitResult

LOG_LIKELIHOOD = "log_likelihood"


def posterior_draws(
    fitted: Any, simulator: Simulator, simulation: Simulation, num_draws: int, seed: int
) -> dict[str, Tensor]:
    """Return draws of every latent, of the deterministics, and of the log likelihood where a guide was returned.

    Raises:
        ArgumentError: ``fit`` returned something else, or too few draws.
        GuideError: the guide is a point estimate, or lacks a latent.
        NonFiniteError: draws hold NaN or infinity.
    """
    guide = fitted.guide if isinstance(fitted, FitResult) else fitted
    if isinstance(guide, Mapping) or hasattr(guide, "data_vars"):
        draws = _given_draws(guide, num_draws)
    elif callable(guide):
        drawn = sample_guide(simulator.model, guide, simulation.args, simulation.kwargs, num_draws, seed)
        draws = drawn.latents | drawn.deterministics
        if LOG_LIKELIHOOD not in draws:
            parts = [drawn.log_likelihood[n].double().reshape(num_draws, -1).sum(-1) for n in simulator.places]
            draws[LOG_LIKELIHOOD] = torch.stack(parts).sum(0)
    else:
        raise ArgumentError(
            f"fit returned {describe(fitted)}, expected a FitResult, a guide, or draws by site. Write return guide at "
            "the end of it."
        )
    _check_draws(draws, simulator, simulation)
    return draws


def _given_draws(given: Any, num_draws: int) -> dict[str, Tensor]:
    """Return draws of a dictionary of arrays, or of a Dataset, whose chains become one."""
    if not isinstance(given, dict) and hasattr(given, "data_vars"):
        if "chain" in given.dims:
            given = given.stack(sample=("chain", "draw")).transpose("sample", ...)
        given = {str(name): x.values for name, x in given.data_vars.items()}
    draws = {name: torch.as_tensor(x) for name, x in given.items()}
    for name, x in draws.items():
        if x.dim() == 0 or len(x) < num_draws:
            raise ArgumentError(
                f"fit returned draws of '{name}' of shape {tuple(x.shape)}, expected at least {num_draws} along the "
                "first dimension. Return more draws, or lower num_draws."
            )
    # evenly spaced draws of a Markov chain are less dependent than neighbors
    return {name: x[torch.linspace(0, len(x) - 1, num_draws).round().long()] for name, x in draws.items()}


def _check_draws(draws: Mapping[str, Tensor], simulator: Simulator, simulation: Simulation) -> None:
    if missing := [name for name in simulator.latents if name not in draws]:
        raise GuideError(
            f"There are no posterior draws of {missing}, which the model draws; fit returned {list(draws)}. Give the "
            "guide a site for every latent."
        )
    for name in simulator.latents:
        x, truth = draws[name], simulation.truth[name]
        if x.shape[1:] != truth.shape:
            raise ArgumentError(
                f"Draws of '{name}' have the shape {tuple(x.shape[1:])}, expected {tuple(truth.shape)}: give the draws "
                "first, then the plates and the event of the site."
            )
        if not torch.isfinite(x).all():
            raise NonFiniteError(f"Draws of '{name}': {count_nonfinite(x)}. Look for a fit that diverged.")
        if x.is_floating_point() and x.numel() and bool((x == x[:1]).all()):
            raise GuideError(
                f"All draws of '{name}' are equal: a point estimate has no ranks. Use a guide with a density for every "
                "latent, e.g. AutoNormal."
            )
