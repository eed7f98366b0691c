"""The parameters of a guide, and the guides that linear response does not hold for."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_elbo.errors import GuideError, NonFiniteError, SiteError, WeightsError, count_nonfinite
from pyro_elbo.posterior.draws import Arrays, Frame, ProgramCall
from pyro_elbo.posterior.fixed_draws import FixedDraws
from pyro_elbo.posterior.stationary import Point
from pyro_elbo.posterior.weights import find_point_error, is_discrete, unconstrain
from pyro_elbo.programs import collect_modules, sort_by_dim, trace_pair, trace_program
from pyro_elbo.terms import Terms, evaluate_run

MOST_ROWS = 16  # of a plate that are checked for parameters of their own
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def find_leaves(programs: ProgramCall, frame: Frame) -> list[Tensor]:
    """Return the tensors that move the guide's draws and densities, but for those that the model reads too.

    Raises:
        GuideError: there are none.
    """
    model, _, args, kwargs = programs
    pair = trace_pair(*programs)
    latents = {n: s.value.detach() for n, s in pair.model.items() if s.role == "latent"}
    fixed = _reached(s.log_prob() for s in trace_program(model, args, kwargs, latents).values() if s.has_density)
    moved = _reached(x for s in pair.guide.values() for x in (s.value, s.log_prob()))
    leaves = [leaf for key, leaf in moved.items() if key not in fixed]
    if not leaves:
        raise GuideError(
            f"The guide has no parameter of its own that moves {sorted(frame.shapes.guide)}, so that it cannot respond "
            "to anything. Give it parameters (pyro.param, or an AutoGuide), and let them require gradients."
        )
    return leaves


def _reached(outputs: Iterable[Tensor]) -> dict[int, Tensor]:
    """Return the leaves of autograd's graph that tensors depend on."""
    outputs = list(outputs)
    found = {id(x): x for x in outputs if x.requires_grad and x.is_leaf}
    stack: list[Any] = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node.name() == "torch::autograd::AccumulateGrad":
            found[id(node.variable)] = node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return found


def check_programs_respond(programs: ProgramCall, frame: Frame) -> None:
    """Raise the error about latents, draws, rows or modules that rule linear response out.

    Raises:
        GuideError: the guide is a point estimate, draws without gradients, or uses batch norm.
        SiteError: a latent is discrete, or has no map to the real line; or there is no latent.
        WeightsError: a part of the rows, or different scales.
    """
    model, guide = frame.shapes.model, frame.shapes.guide
    latents = [s for s in model.values() if s.role == "latent"]
    if not latents:
        raise SiteError("The model has no latent: there is no posterior. Sample a latent in model and guide.")
    if discrete := [s.name for s in latents if is_discrete(s)]:
        raise SiteError(
            f"Latents {discrete} are discrete: means of the guide do not respond smoothly in them, and a site that is "
            "marked to be summed out is drawn here. Write the sum as the distribution of the data in their place, such "
            "as MixtureSameFamily or DiscreteHMM."
        )
    if unmapped := [s.name for s in latents if unconstrain(s) is None]:
        raise SiteError(
            f"No transform to the real line is known for latents {unmapped}. Choose a support that biject_to knows, "
            "or transform a latent on the real line."
        )
    again = trace_pair(*programs).model
    values = {s.name: torch.stack([s.value, again[s.name].value]) for s in latents}
    if (error := find_point_error(values, frame.shapes)) is not None:
        raise GuideError(f"Linear response needs a guide with a density for every latent. {error}") from error
    if rough := [s.name for s in guide.values() if s.is_drawn and not s.fn.has_rsample]:
        raise GuideError(
            f"The guide's draws at {rough} have no pathwise gradient. Use reparameterized distributions there, such "
            "as Normal, or AutoNormal."
        )
    if frame.weighting.obstacle is not None:
        raise WeightsError(
            f"Linear response is that of the posterior given all data. {frame.weighting.obstacle}"
        ) from frame.weighting.obstacle
    with collect_modules(programs.guide) as used:
        trace_pair(*programs)
    if any(isinstance(part, NORMS) for module in used for part in module.modules()):
        raise GuideError(
            "The guide uses batch norm: it is trained with the statistics of batches and evaluated with others, so "
            "that its parameters are at the optimum of neither. Use a guide without batch norm, such as AutoNormal."
        )


def check_finite(objective: FixedDraws, point: Point) -> None:
    """Raise NonFiniteError where the objective is not finite, naming the site."""
    if torch.isfinite(point.evaluated.nats).all():
        return
    pair = objective.trace()
    Terms(evaluate_run(pair, "sampled"), pair.particle_dim, point.loss).check_finite()
    raise NonFiniteError(
        f"log q - log p of the fixed draws: {count_nonfinite(point.evaluated.nats.detach())}. Look for data outside "
        "the support and for a diverged parameter; train the guide first."
    )


def check_moves(latents: Arrays, jacobian: np.ndarray) -> None:
    """Raise GuideError unless parameters move the mean of every element of every latent.

    Args:
        latents: draws on the real line.
        jacobian: the gradient of the mean of each of their elements.
    """
    moved = np.split((jacobian != 0).any(1), np.cumsum([x[0].numel() for x in latents.values()])[:-1])
    if still := [name for name, rows in zip(latents, moved, strict=True) if not rows.all()]:
        raise GuideError(
            f"No parameter of the guide moves the means of all elements of latents {still}. Give each a location "
            "parameter that requires gradients, or fix the latent by pyro.poutine.condition."
        )


def check_rows(objective: FixedDraws, point: Point) -> None:
    """Raise GuideError unless in each plate every row of a latent has a parameter that moves no other row.

    Linear response takes the guide's family for rich enough to follow a change of any posterior mean. Where all
    parameters of a row are those of the others, as in an amortized guide, no mean of one row can move alone.
    """
    for name, x in point.evaluated.unconstrained.items():
        for dim, plate in enumerate(sort_by_dim(objective.frame.shapes.model[name].plates), start=1):
            if x.shape[dim] == 1:
                continue
            # averages of symmetric draws would cancel
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x)
            # a unit of a network may be active for one of two rows, hardly for one of many
            rows = sorted({round(i) for i in np.linspace(0, x.shape[dim] - 1, MOST_ROWS)})
            if not all(_has_own(objective, x.movedim(dim, 0), noise.movedim(dim, 0), i) for i in rows):
                raise GuideError(
                    f"The rows of plate '{plate.name}' share the parameters of latent '{name}', as in an amortized "
                    "guide: no parameter moves the mean of one row alone, so that the response would be that of a "
                    "network's weights and not of the posterior. Use a guide with parameters for each row, such as "
                    "AutoNormal."
                )


def _has_own(objective: FixedDraws, x: Tensor, noise: Tensor, row: int) -> bool:
    """Return whether a parameter moves this row and no other."""
    others = torch.arange(len(x)) != row
    own, shared = (objective.gradient(x[at], noise[at]) != 0 for at in (row, others))
    return bool((own & ~shared).any())
