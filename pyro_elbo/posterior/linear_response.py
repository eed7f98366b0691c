r"""Linear response: the covariance that a guide's means imply, whatever its own covariance.

A mean-field guide puts means where they belong and makes standard deviations too small. Its means still know the
covariance. Tilt the posterior, and differentiate any mean with respect to the tilt:

.. math:: p_t(z) \propto p(z \mid x) \, e^{t^\top f(z)} \quad \implies \quad
    \left.\frac{d E_{p_t}[f]}{d t}\right|_{t=0} = Cov_{p(z \mid x)}[f]

Let the guide follow the tilt: its parameters minimize :math:`KL(\eta) - t^\top E_{q_\eta}[f]`. With H the Hessian of
the KL at its minimum and :math:`J = \partial E_{q_\eta}[f] / \partial \eta`, the implicit function theorem says

.. math:: H \frac{d \eta}{d t} = J^\top \quad \implies \quad
    Cov_{LR}[f] = \frac{d E_{q_{\eta(t)}}[f]}{d t} = J H^{-1} J^\top

It is exact where the guide's means are exact for every tilt, as those of mean-field guides are on Gaussian posteriors.

The KL, its minimum and both derivatives must belong together. They are taken over the same fixed draws (deterministic
ADVI): draws come in pairs ±ε from a scrambled Sobol sequence with identity covariance, so that the averages of linear
and quadratic functions have no error at all. With g_m the gradient of draw m's share in the KL, the mean of f over the
draws has the influence function :math:`f(z_m) - \bar f - J H^{-1} g_m`, whose spread is the error of the fixed draws.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pyro_elbo.errors import (
    ArgumentError,
    NonFiniteError,
    check_choice,
    check_count,
    count_nonfinite,
    describe,
    first_sentence,
)
from pyro_elbo.failures import failed_line
from pyro_elbo.posterior.draws import Arrays, Frame, ProgramCall
from pyro_elbo.posterior.fixed_draws import Evaluated, FixedDraws
from pyro_elbo.posterior.gaussian import GaussianGuide
from pyro_elbo.posterior.response import LinearResponse, label_covariance, label_quantities
from pyro_elbo.posterior.stationary import Dense, Hessian, Iterative, Point, find_stationary
from pyro_elbo.posterior.variational import (
    check_finite,
    check_moves,
    check_programs_respond,
    check_rows,
    find_leaves,
)
from pyro_elbo.posterior.weights import find_weighting
from pyro_elbo.programs import (
    Program,
    check_initialized,
    check_options,
    check_programs,
    evaluating,
    find_plate_nesting,
    program_arguments,
    seeded,
    sort_by_dim,
    trace_pair,
)
from pyro_elbo.sequences import StackedDistribution

Functions = Callable[[Arrays], Mapping[str, Tensor] | Tensor]
Method = Literal["auto", "dense", "cg"]
MAX_DENSE = 400  # parameters: beyond, rows of the Hessian cost more than conjugate gradients


def linear_response(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int | None = None,
    functions: Functions | None = None,
    method: Method = "auto",
    seed: int = 0,
    **kwargs: Any,
) -> LinearResponse:
    r"""Correct the covariance of a guide: :math:`Cov[f] = J H^{-1} J^\top`, H the Hessian of the KL, J that of E_q[f].

    A copy of the guide's parameters is first brought to the optimum of the KL over fixed draws, from where they are. So
    the guide need not be fully trained. Parameters of the model stay fixed, and parameters, modes and random state are
    left as they were found.

    Args:
        args, kwargs: arguments of model and guide: all data.
        num_samples: the number M of fixed draws, even, 4 at least; by default four a dimension of the guide's noise,
            from 256 to 2048. A guide with full covariance needs at least two a dimension.
        functions: from latents and deterministics ``{site: (draws, *plates, *event)}`` to the quantities of interest,
            ``{name: (draws, ...)}`` or one tensor; differentiable. By default all latents and deterministics.
        method: ``"dense"`` makes the Hessian, ``"cg"`` solves with its products, ``"auto"`` chooses by the number of
            parameters.
        seed: seed of the fixed draws.

    Returns:
        Means, standard deviations and covariance of the quantities, in their own units.

    Raises:
        ArgumentError: an option is misspelled, or ``functions`` asks for an unknown latent or returns something else.
        GuideError: the guide has never run, is a point estimate, is amortized, uses batch norm, has draws that cannot
            be differentiated twice, or no stationary optimum.
        SiteError: a latent is discrete or has no map to the real line, or the programs do not fit.
        WeightsError: subsampled plates, or sites of different scales.
        NonFiniteError: a density or a function is not finite.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, pyro_elbo as pe
        >>> def model(x, y):
        ...     a = pyro.sample("a", dist.Normal(0.0, 10.0))
        ...     b = pyro.sample("b", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> x, y = torch.tensor([1.0, 2, 3, 4]).double(), torch.tensor([1.1, 1.9, 3.2, 3.9]).double()
        >>> _ = guide(x, y)
        >>> response = pe.linear_response(model, guide, x, y)
        >>> round(float(response.sd["a"]), 2), round(float(response.guide_sd["a"]), 2)
        (1.21, 0.5)

    References:
        Giordano, Broderick, Jordan (2018), Covariances, robustness, and variational Bayes, JMLR 19:51,
        arXiv:1709.02536; Giordano, Ingram, Broderick (2024), Black box variational inference with a deterministic
        objective, JMLR 25:18, arXiv:2304.05527.
    """
    check_options(model, kwargs)
    _check_arguments(num_samples, functions, method)
    check_programs(model, guide)
    return respond(
        ProgramCall(model, guide, *program_arguments(model, args, kwargs)), num_samples, functions, method, seed
    )


def respond(
    programs: ProgramCall,
    num_samples: int | None = None,
    functions: Functions | None = None,
    method: Method = "auto",
    seed: int = 0,
) -> LinearResponse:
    """Return the linear response of programs with their arguments: see :func:`linear_response`."""
    model, guide, *_ = programs
    check_initialized(guide)
    with torch.enable_grad(), seeded(seed), evaluating(model, guide):
        shapes = trace_pair(*programs)
        frame = Frame(shapes, find_weighting(shapes), find_plate_nesting(*programs))
        check_programs_respond(programs, frame)
        objective = FixedDraws(programs, frame, find_leaves(programs, frame), num_samples, seed)
        with objective.restoring():
            return _respond_at_optimum(objective, functions, method)


def _check_arguments(num_samples: Any, functions: Any, method: Any) -> None:
    if num_samples is not None:
        check_count("num_samples", num_samples, least=4)  # one pair ±ε of unit variance says nothing about a scale
        if num_samples % 2:
            raise ArgumentError(f"num_samples must be even, since draws come in pairs, got {num_samples}.")
    if functions is not None and not callable(functions):
        raise ArgumentError(
            f"functions must be a function of the latents, such as lambda z: {{'sum': z['a'] + z['b']}}, got "
            f"{describe(functions)}."
        )
    check_choice("method", method, ("auto", "dense", "cg"))


def _respond_at_optimum(objective: FixedDraws, functions: Functions | None, method: Method) -> LinearResponse:
    """Find the optimum and take the response there; the objective's parameters are moved."""
    start = Point(objective, np.zeros_like(objective.origin))
    check_finite(objective, start)
    check_rows(objective, start)
    _, before = _means(start.evaluated.unconstrained)
    dense = method == "dense" or (method == "auto" and len(objective.origin) <= MAX_DENSE)
    point, hessian, decrement = find_stationary(objective, Dense if dense else Iterative, start)

    free, free_mean = _means(point.evaluated.unconstrained)
    free_jacobian = objective.jacobian(free_mean)
    check_moves(point.evaluated.unconstrained, free_jacobian)
    moved = (free_mean - before).abs() / free.std(0)
    values = _evaluate(functions, point.evaluated)
    flat, mean = _means(values)
    covariance, solved = _covariance(hessian, objective.jacobian(mean))
    model = objective.frame.shapes.model
    plates = {n: sort_by_dim(s.plates) for n, s in model.items()} if functions is None else {}
    times = {n: s.fn.run.time for n, s in model.items() if isinstance(s.fn, StackedDistribution) and n in plates}

    def labeled(x: np.ndarray) -> Any:
        return label_quantities(x, values, plates, times)

    return LinearResponse(
        mean=labeled(mean.detach().numpy()),
        error=labeled(_errors(objective, point, flat.detach(), solved)),
        sd=labeled(np.sqrt(np.diag(covariance))),
        guide_sd=labeled(flat.detach().std(0, correction=0).numpy()),
        covariance=label_covariance(covariance, values),
        guide=None if functions else _gaussian(objective.frame, free_mean, _covariance(hessian, free_jacobian)[0]),
        moved=moved.max().item(),
        decrement=decrement,
        num_samples=objective.num_samples,
        num_parameters=len(objective.origin),
        iterations=hessian.iterations,
        programs=objective.programs,
    )


def _means(arrays: Arrays) -> tuple[Tensor, Tensor]:
    """Return all elements of arrays of draws side by side, and their means, in float64."""
    flat = torch.cat([x.reshape(len(x), -1).double().cpu() for x in arrays.values()], 1)
    return flat, flat.mean(0)


def _covariance(hessian: Hessian, jacobian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return J H⁻¹ Jᵀ and J H⁻¹."""
    hessian.check_determined(jacobian)
    solved = hessian.solve(jacobian)
    covariance = solved @ jacobian.T
    return (covariance + covariance.T) / 2, solved


def _errors(objective: FixedDraws, point: Point, values: Tensor, solved: np.ndarray) -> np.ndarray:
    """Return the standard errors of means over the fixed draws, from the spread of influences over pairs of draws."""
    weights = torch.full_like(point.evaluated.nats, 1.0, requires_grad=True)
    gradients = objective.gradient(point.evaluated.nats, weights, create_graph=True)  # linear in the weights
    rows = [torch.autograd.grad(gradients, weights, row, retain_graph=True)[0] for row in torch.as_tensor(solved)]
    influence = values - values.mean(0) - torch.stack(rows, 1).double().cpu()
    pairs = influence.reshape(2, -1, influence.shape[1]).mean(0)
    return (pairs.std(0) / len(pairs) ** 0.5).numpy()


def _evaluate(functions: Functions | None, evaluated: Evaluated) -> Arrays:
    """Return draws of the quantities of interest.

    Raises:
        ArgumentError: they are no tensors with the draws in front.
        NonFiniteError: a value is not finite.
    """
    if functions is None:
        return evaluated.values
    try:
        result: Any = functions(dict(evaluated.values))
    except KeyError as error:
        raise ArgumentError(
            f"functions: KeyError {error}. Use the latents and deterministics {list(evaluated.values)}."
        ) from error
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise ArgumentError(
            f"functions: {failed_line(error)}: {first_sentence(error)} It is called with draws of "
            f"{list(evaluated.values)} by name, {len(evaluated.nats)} in the first dimension."
        ) from error
    values = dict(result) if isinstance(result, Mapping) else {"value": result}
    count = len(evaluated.nats)
    for name, x in values.items():
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.dim() and len(x) == count):
            got = f"shape {tuple(x.shape)} and {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentError(
                f"functions: expected '{name}' as a tensor of floating-point numbers with {count} draws in its first "
                f"dimension, got {got}. Keep the first dimension, as in z['a'].sum(-1)."
            )
        if not torch.isfinite(x).all():
            raise NonFiniteError(
                f"functions: '{name}': {count_nonfinite(x.detach())}. Look for a division by 0 or a logarithm outside "
                "its domain."
            )
    if not values:
        raise ArgumentError("functions returned no quantity. Return a tensor, or {name: tensor}.")
    return values


def _gaussian(frame: Frame, mean: Tensor, covariance: np.ndarray) -> GaussianGuide:
    """Return the Gaussian on the real line with the covariance of linear response."""
    latents = tuple(replace(s, value=s.value.detach()) for s in frame.shapes.model.values() if s.role == "latent")
    dtype = latents[0].value.dtype
    factor = np.linalg.cholesky(covariance)
    return GaussianGuide(mean.detach().to(dtype), torch.as_tensor(factor).to(dtype), latents)
