r"""Bring parameters to the stationary point of a fixed-draw objective, and solve systems with its Hessian there.

What is left is measured by the Newton decrement, which no choice of parameters changes:

.. math:: \lambda = \sqrt{g^\top H^{-1} g}

A Newton step would lower the objective by λ²/2 nats, and move no mean by more than about λ standard deviations.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_elbo.errors import GuideError
from pyro_elbo.posterior.fixed_draws import Evaluated, FixedDraws, Vector

Rows = Float[np.ndarray, "rows parameters"]
MAX_ITERATIONS = 500  # of the trust region
POLISHING = 10  # Newton steps; they converge quadratically, so that three do
STATIONARY = 1e-2  # the largest decrement, in standard deviations
PARALLEL = 1e-6  # the largest share of a gradient along directions in which the objective is flat


class Point:
    """The objective at one step; derivatives are evaluated when they are asked for."""

    def __init__(self, objective: FixedDraws, step: Vector) -> None:
        self.objective, self.step = objective, step
        objective.write(step)
        self.evaluated: Evaluated = objective.evaluate()
        self.loss = self.evaluated.nats.mean()
        self._graph: Tensor | None = None

    @property
    def graph(self) -> Float[Tensor, " parameters"]:
        """The gradient, which can be differentiated again."""
        if self._graph is None:
            self._graph = self.objective.gradient(self.loss, torch.ones_like(self.loss), create_graph=True)
        return self._graph

    @property
    def gradient(self) -> Vector:
        """The gradient in nats a unit."""
        return _check_derivatives(self.graph.detach().numpy())

    def products(self, rows: Rows) -> Rows:
        """Return the Hessian times each row.

        Raises:
            GuideError: a draw of the guide cannot be differentiated twice, or a derivative is not finite.
        """
        try:
            products = [self.objective.gradient(self.graph, row) for row in torch.as_tensor(rows)]
        except (NotImplementedError, RuntimeError) as error:
            if "not implemented" not in str(error):
                raise
            kinds = sorted({type(s.fn).__name__ for s in self.objective.frame.shapes.guide.values()})
            raise GuideError(
                f"Linear response needs second derivatives of the guide's draws, and torch has none for one of {kinds} "
                f"({error}). Use a guide that transforms normal draws, such as AutoNormal or dist.LogNormal."
            ) from error
        return _check_derivatives(torch.stack(products).numpy())


class Hessian(ABC):
    """The Hessian at a point, flat where parameters do not change the guide (rotations of a factor of a covariance).

    Args:
        point: the point.
        strict: refuse a Hessian that is not that of a minimum. Away from one, directions that do not change the guide
            may have negative curvature too.

    Attributes:
        iterations: the iterations of conjugate gradients; 0 where the Hessian is dense.
    """

    iterations: int = 0

    @abstractmethod
    def solve(self, rows: Rows) -> Rows:
        """Return the pseudo-inverse of the Hessian times each row.

        Raises:
            GuideError: the Hessian has a negative eigenvalue, or conjugate gradients do not converge.
        """

    def check_determined(self, rows: Rows) -> None:
        """Raise GuideError for rows along which the objective is flat; conjugate gradients do not converge there."""
        del rows


class Dense(Hessian):
    """The Hessian as a matrix."""

    def __init__(self, point: Point, strict: bool = True) -> None:
        self._objective = point.objective
        matrix = point.products(np.eye(len(point.step)))
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        tolerance = np.abs(values).max() * _rounding(point)
        if strict and values.min() < -tolerance:
            raise _saddle(values.min())
        flat = np.abs(values) <= tolerance
        self._flat, self._vectors, self._values = vectors[:, flat], vectors[:, ~flat], values[~flat]

    def solve(self, rows: Rows) -> Rows:
        """Leave out the eigenvalues that are zero but for rounding."""
        return rows @ self._vectors / self._values @ self._vectors.T

    def check_determined(self, rows: Rows) -> None:
        """Compare each row with its part along eigenvalues of zero."""
        along = np.linalg.norm(rows @ self._flat, axis=1)
        if (along > PARALLEL * np.linalg.norm(rows, axis=1)).any():
            raise GuideError(
                f"The objective is flat along parameters that move a latent. {_few_draws(self._objective)}Data and "
                "prior may leave the latent open, or the objective have no stationary point there: give every latent a "
                "proper prior, and let every parameter of the guide matter."
            )


class Iterative(Hessian):
    """The Hessian by its products with vectors, inverted by conjugate gradients."""

    def __init__(self, point: Point, strict: bool = True) -> None:
        self._point, self._strict = point, strict
        self._largest = 1.0  # curvature so far; that of a unit of a mean-field guide

    def solve(self, rows: Rows) -> Rows:
        """Solve row by row."""
        from scipy.sparse.linalg import LinearOperator, cg

        size, make = rows.shape[1], cast(Any, LinearOperator)  # its type does not know matvec
        operator = make((size, size), matvec=self._product, dtype=rows.dtype)
        precision = max(1e-10, 10 * self._point.objective.frame.weighting.eps)
        solved = []
        for row in rows:
            x, failed = cg(operator, row, rtol=precision, maxiter=20 * size, callback=self._count)
            if failed and self._strict:
                raise GuideError(
                    f"Conjugate gradients did not converge in {20 * size} iterations: the Hessian is nearly singular. "
                    'Use method="dense" to see why, or a guide with fewer parameters.'
                )
            solved.append(x)
        return np.stack(solved)

    def _product(self, vector: np.ndarray) -> Vector:
        vector = vector.reshape(-1)
        (product,) = self._point.products(vector[None])
        curvature = vector @ product / max(vector @ vector, 1e-300)
        self._largest = max(self._largest, curvature)
        if self._strict and curvature < -_rounding(self._point) * self._largest:
            raise _saddle(curvature)
        return product

    def _count(self, _: Any) -> None:
        self.iterations += 1


def find_stationary(
    objective: FixedDraws, invert: Callable[[Point, bool], Hessian], start: Point
) -> tuple[Point, Hessian, float]:
    """Minimize the objective from ``start``; return the minimum, the Hessian there and the Newton decrement.

    A trust region finds the basin, Newton steps go down to rounding.

    Raises:
        GuideError: no stationary point was found.
    """
    from scipy.optimize import minimize

    last: dict[bytes, Point] = {start.step.tobytes(): start}

    def at(step: Vector) -> Point:
        key = step.tobytes()
        if key not in last:
            last.clear()
            last[key] = Point(objective, step.copy())
        return last[key]

    def value(step: Vector) -> float:
        try:
            found = at(step).loss.item()
        except (ValueError, RuntimeError):  # a step too far: parameters overflow, a matrix is not positive definite
            return math.inf
        return math.inf if math.isnan(found) else found

    if invert is Dense:
        second: dict[str, Any] = {"method": "trust-exact", "hess": lambda x: at(x).products(np.eye(len(x)))}
    else:
        second = {"method": "trust-ncg", "hessp": lambda x, v: at(x).products(v[None])[0]}
    # A Newton step lowers the objective by λ²/2, which rounding hides below this gradient.
    precision = 3 * math.sqrt(objective.frame.weighting.eps * max(1.0, abs(start.loss.item())))
    options = {"gtol": precision, "maxiter": MAX_ITERATIONS}
    found = minimize(value, start.step, jac=lambda x: at(x).gradient, options=options, **second)
    return _polish(Point(objective, found.x), invert)


def _polish(point: Point, invert: Callable[[Point, bool], Hessian]) -> tuple[Point, Hessian, float]:
    """Take Newton steps while they lower the decrement by more than a half."""
    newton, decrement = _newton(point, invert)
    for _ in range(POLISHING):
        if decrement <= _rounding(point):
            break
        moved = Point(point.objective, point.step + newton)
        onward, left = _newton(moved, invert)
        if not left < decrement / 2:
            break
        point, newton, decrement = moved, onward, left
    if not decrement <= STATIONARY:
        raise GuideError(
            f"The guide has no stationary optimum: after {MAX_ITERATIONS} steps the gradient does not vanish, and one "
            f"more Newton step would move means by up to {decrement:.2g} standard deviations. "
            f"{_few_draws(point.objective)}Give every latent a proper prior, use a simpler guide such as AutoNormal, "
            "or more draws (num_samples) than the guide has parameters for each latent."
        )
    point = Point(point.objective, point.step)  # the last step that was tried has moved the parameters on
    return point, invert(point, True), decrement


def _newton(point: Point, invert: Callable[[Point, bool], Hessian]) -> tuple[Vector, float]:
    """Return a Newton step and the decrement."""
    step = -invert(point, False).solve(point.gradient[None])[0]
    return step, math.sqrt(max(-(step @ point.gradient), 0.0))


def _check_derivatives(derivatives: np.ndarray) -> np.ndarray:
    if np.isfinite(derivatives).all():
        return derivatives
    raise GuideError(
        "A derivative of the objective is not finite on the way to the optimum. A guide without one grows until it "
        "overflows: give every latent a proper prior. Or look for a root, norm or division at 0, and for a torch.where "
        "whose other branch is not finite."
    )


def _few_draws(objective: FixedDraws) -> str:
    """Return a sentence on fixed draws too few to determine a covariance; nothing where there are enough."""
    draws, dims = objective.num_samples, objective.num_dims
    few = f"{draws} fixed draws of {dims} dimensions may determine no covariance: take num_samples={4 * dims}. "
    return few if draws <= 2 * dims else ""


def _rounding(point: Point) -> float:
    """Return the relative size of eigenvalues that are zero but for rounding, which second derivatives amplify."""
    return point.objective.frame.weighting.eps**0.6


def _saddle(curvature: float) -> GuideError:
    return GuideError(
        f"The stationary point of the guide is no minimum: the curvature of the objective is {curvature:.2g} in some "
        "direction. Train the guide from another start, or use a simpler one such as AutoNormal."
    )
