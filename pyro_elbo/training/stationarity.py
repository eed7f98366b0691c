r"""When iterates at a fixed step size are stationary, and how far their average is from the optimum.

Iterates :math:`\lambda_1, \lambda_2, \dots` of a stochastic gradient method with a fixed step size :math:`\gamma`
forget their start and then fluctuate about a mean :math:`\bar\lambda_\gamma`. Two questions decide what to do next,
and both are answered here from arrays alone.

**Have they forgotten it?** The split R-hat of Gelman and Rubin, here of the two halves of one window: the halves of a
drifting parameter have means that differ by more than the spread within a half explains.

**How far is the average from the optimum?** The bias of :math:`\bar\lambda_\gamma` vanishes as a power of the step
size. With the root of the symmetrized KL between guides as a distance d,

.. math::
    d(\bar\lambda_\gamma, \lambda_*) = C \gamma^\kappa, \qquad
    d(\bar\lambda_{\gamma}, \bar\lambda_{\gamma/\rho}) = C \gamma^\kappa (\rho^{-\kappa} - 1).

The right-hand side is observed, with noise, each time the step size falls from γ/ρ to γ. A regression over all step
sizes so far gives C and κ, and with them the left-hand side, which nobody can observe.

References:
    Dhaka, Catalina, Andersen, Magnusson, Huggins, Vehtari (2020), Robust, accurate stochastic optimization for
    variational inference, arXiv:2009.00666; Welandawe, Andersen, Vehtari, Huggins (2024), A framework for improving
    the reliability of black-box variational inference, JMLR 25:219, arXiv:2203.15945; Vehtari, Gelman, Simpson,
    Carpenter, Bürkner (2021), Rank-normalization, folding, and localization: an improved R-hat, arXiv:1903.08008.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

R_HAT = 1.1  # largest split R-hat of stationary iterates
RATIO = 0.5  # ρ, of one step size to the one before
_ORDERS = np.linspace(0.05, 1.0, 96)  # κ; averages are at best of first order in the step size
_SPREAD = 0.3  # relative error of a squared move, beside the power law


def split_r_hat(iterates: Float[np.ndarray, "iterates parameters"]) -> float:
    r"""Return the largest split R-hat of the parameters in a window of iterates; constant parameters do not count.

    .. math:: \hat R^2 = \frac{n - 1}{n} + \frac{\mathrm{Var}(\text{means of the halves})}{\text{mean variance within}}

    with n iterates in a half. It is close to 1 for stationary iterates, infinite if only one half moves a parameter
    that is otherwise constant.

    Example:
        >>> noise = np.random.default_rng(0).normal(size=(128, 3))
        >>> round(split_r_hat(noise), 2), round(split_r_hat(noise + np.arange(128)[:, None] / 20), 2)
        (1.04, 1.95)
    """
    n = len(iterates) // 2
    centered = iterates.astype(np.float64) - iterates[0]  # exactly zero where nothing moves
    halves = np.stack([centered[:n], centered[-n:]])
    within, between = halves.var(1, ddof=1).mean(0), halves.mean(1).var(0, ddof=1)
    moves = (within > 0) | (between > 0)
    with np.errstate(divide="ignore"):
        squares = (n - 1) / n + between[moves] / within[moves]
    return math.sqrt(squares.max(initial=1.0))


def is_worse(bounds: Float[np.ndarray, " steps"], start: float) -> bool:
    """Return whether a step size has left the start for the worse: then it is too large.

    Most steps in the second half of the window have a bound below ``start``, the lowest of several draws at the start.
    """
    return bool(np.median(bounds[len(bounds) // 2 :]) < start)


def is_level(bounds: Float[np.ndarray, " steps"]) -> bool:
    """Return whether the bound no longer rises: the halves of a window differ by less than two standard errors.

    Steps that follow each other are not independent, so the errors are those of the means of 16 batches a half.
    """
    batches = bounds[: len(bounds) // 32 * 32].reshape(2, 16, -1).mean(-1)
    rise = batches[1].mean() - batches[0].mean()
    return bool(rise < 2 * math.sqrt(batches.var(1, ddof=1).sum() / 16))


def predict_distance(step_sizes: Sequence[float], moves: Sequence[float], errors: Sequence[float]) -> float:
    """Predict the distance of the newest average from the optimum.

    Averages also move by their Monte Carlo errors, so the expected square of a move is that of the power law plus that
    of the error. For each κ this is linear in C², which a weighted regression gives; moves between larger step sizes,
    where the power law may not hold yet, weigh less. The prediction takes C² one standard error above its estimate, and
    the mean of log d over κ, under the prior p(κ) = 2κ on (0, 1]: averages of smooth objectives are of first order.

    Args:
        step_sizes: those after each fall, in falling order.
        moves: the distance between the averages before and after each fall.
        errors: the Monte Carlo error of that move, > 0.

    Example:
        >>> sizes = [0.08, 0.04, 0.02, 0.01]
        >>> law = [3 * size for size in sizes]  # the distances from the optimum, C = 3 and κ = 1; ρ⁻¹ - 1 = 1
        >>> round(predict_distance(sizes, law, [1e-3] * 4) / law[-1], 1)
        1.3
    """
    sizes, squares, noise = np.asarray(step_sizes), np.square(moves), np.square(errors)
    orders = _ORDERS[:, None]
    slopes = sizes ** (2 * orders) * (RATIO**-orders - 1) ** 2  # squares = C² slopes + noise
    precision = (1 + np.arange(len(sizes))[::-1] ** 2 / 9) ** -0.25 / (_SPREAD * (squares + noise)) ** 2
    information = slopes**2 @ precision
    constants = np.maximum(slopes * (squares - noise) @ precision / information, 0)
    misfits = (squares - noise - constants[:, None] * slopes) ** 2 @ precision
    weights = _ORDERS * np.exp(-(misfits - misfits.min()) / 2)
    logs = np.log(constants + information**-0.5) / 2 + _ORDERS * math.log(sizes[-1])
    return math.exp(weights @ logs / weights.sum())
