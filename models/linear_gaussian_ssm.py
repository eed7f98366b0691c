"""The linear-Gaussian state-space model, whose posterior and evidence are known exactly.

    z_1 ~ Normal(m₀, P₀),     z_t | z_{t-1} ~ Normal(A z_{t-1}, Q),     x_t | z_t ~ Normal(C z_t, R)

Forward, the Kalman filter gives log p(x) and p(z_t | x_{1:t}). Backward, the likelihood of the future is a Gaussian
in the state, p(x_{t:T} | z_t) ∝ exp(-½ zᵀJ_t z + h_tᵀz), with

    J_t = CᵀR⁻¹C + Aᵀ(J - JΣJ)A,     h_t = CᵀR⁻¹x_t + Aᵀ(I - JΣ)h,     Σ = (Q⁻¹ + J)⁻¹,     J = J_{t+1}, h = h_{t+1},

so that the posterior, sampled forward in time, is a chain of linear-Gaussian steps as well:

    z_t | z_{t-1}, x_{t:T} ~ Normal(ΣQ⁻¹A z_{t-1} + Σh_t, Σ),     Σ = (Q⁻¹ + J_t)⁻¹.

With J_t = CᵀR⁻¹C and h_t = CᵀR⁻¹x_t alone it is the proposal p(z_t | z_{t-1}, x_t) of a particle filter.
Kalman (1960), A new approach to linear filtering and prediction problems; Fraser, Potter (1969), The optimum linear
smoother as a combination of two optimum linear filters; Doucet, Godsill, Andrieu (2000), On sequential Monte Carlo
sampling methods for Bayesian filtering.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import cholesky, solve_triangular

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, NonFiniteError, count_nonfinite

Data = Float[Tensor, "batch time d"]
Lengths = Int[Tensor, " batch"] | None
Mask = Bool[Tensor, "batch time"] | None


class Chain(NamedTuple):
    """The steps z_t ~ Normal(gain_t z_{t-1} + offset_t, LLᵀ), L = scale_tril_t; the first gain is 0.

    The first step therefore needs no special case: any z_0 will do.
    """

    gain: Float[Tensor, "batch time k k"]
    offset: Float[Tensor, "batch time k"]
    scale_tril: Float[Tensor, "batch time k k"]

    def sample(self, before: Float[Tensor, "*particles batch k"]) -> Float[Tensor, "*particles batch k"]:
        """Draw the Pyro site ``z`` of one step, for a chain that holds that step alone, without time."""
        loc = _times(self.gain, before) + self.offset
        return pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=self.scale_tril))

    def log_prob(self, z: Float[Tensor, "batch time k"]) -> Float[Tensor, "batch time"]:
        """Log density of each step, given the one before, in nats."""
        before = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], 1)
        return dist.MultivariateNormal(_times(self.gain, before) + self.offset, scale_tril=self.scale_tril).log_prob(z)

    def marginals(self) -> "States":
        """Mean and covariance of every z_t."""
        noise = self.scale_tril @ self.scale_tril.mT
        means, covariances = [torch.zeros_like(self.offset[:, 0])], [torch.zeros_like(noise[:, 0])]
        for gain, offset, cov in zip(self.gain.unbind(1), self.offset.unbind(1), noise.unbind(1), strict=True):
            means.append(_times(gain, means[-1]) + offset)
            covariances.append(gain @ covariances[-1] @ gain.mT + cov)
        return States(torch.stack(means[1:], 1), torch.stack(covariances[1:], 1))


class States(NamedTuple):
    """Means and covariances of the states."""

    mean: Float[Tensor, "batch time k"]
    covariance: Float[Tensor, "batch time k k"]


@dataclass(frozen=True)
class LinearGaussianSSM:
    """The model with known parameters, all of one dtype; for exact answers, of double precision.

    Every method takes a batch of sequences ``x``, their ``lengths`` and a ``mask``, True where a step was observed.
    Padding and unobserved steps may hold anything: they enter no number. States there are forecast from the rest.

    Attributes:
        initial_mean: m₀, shape (k,).
        initial_scale_tril: the lower Cholesky factor of P₀, shape (k, k).
        transition: A, shape (k, k).
        transition_scale_tril: the lower Cholesky factor of Q, shape (k, k).
        emission: C, shape (d, k).
        emission_scale_tril: the lower Cholesky factor of R, shape (d, d).
    """

    initial_mean: Float[Tensor, " k"]
    initial_scale_tril: Float[Tensor, "k k"]
    transition: Float[Tensor, "k k"]
    transition_scale_tril: Float[Tensor, "k k"]
    emission: Float[Tensor, "d k"]
    emission_scale_tril: Float[Tensor, "d d"]

    def __call__(self, x: Data, lengths: Lengths = None, mask: Mask = None) -> Float[Tensor, "*particles batch time k"]:
        """The Pyro program: sites ``z`` and ``x`` over time, in a plate ``sequences``."""
        observed = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask

        def step(z: Tensor, row: tuple[Chain, Tensor, Any]) -> tuple[Tensor, Tensor]:
            chain, x_t, observed_t = row
            z = chain.sample(z)
            with pyro.poutine.mask(mask=observed_t):
                pyro.sample(
                    "x", dist.MultivariateNormal(_times(self.emission, z), scale_tril=self.emission_scale_tril), obs=x_t
                )
            return z, z

        return self._scan(step, (self.prior(*x.shape[:2]), x, observed), lengths)

    def guide(self, chain: Chain) -> Callable[..., Tensor]:
        """A guide that draws the states from a chain: the posterior's is exact, the proposal's filters."""
        step: Any = lambda z, chain: (chain.sample(z),) * 2  # noqa: E731
        return lambda x, lengths=None, mask=None: self._scan(step, chain, lengths)

    def _scan(self, step: Any, xs: Any, lengths: Lengths) -> Float[Tensor, "*particles batch time k"]:
        batch = (xs if isinstance(xs, Chain) else xs[0]).offset.shape[0]
        with pyro.plate("sequences", batch):
            return pe.scan(step, self.initial_mean.new_zeros(batch, len(self.initial_mean)), xs, lengths, dim=1)[1]

    def log_evidence(self, x: Data, lengths: Lengths = None, mask: Mask = None) -> Float[Tensor, " batch"]:
        """Log p(x_{1:T}) of each sequence in nats, by the Kalman filter."""
        return self._kalman(x, lengths, mask)[0].sum(1)

    def filter(self, x: Data, lengths: Lengths = None, mask: Mask = None) -> States:
        """p(z_t | x_{1:t})."""
        return self._kalman(x, lengths, mask)[1]

    def smooth(self, x: Data, lengths: Lengths = None, mask: Mask = None) -> States:
        """p(z_t | x_{1:T})."""
        return self.posterior(x, lengths, mask).marginals()

    def prior(self, batch: int, steps: int) -> Chain:
        """The model's own chain p(z_t | z_{t-1})."""
        pairs = (
            (torch.zeros_like(self.transition), self.transition),
            (self.initial_mean, torch.zeros_like(self.initial_mean)),
            (self.initial_scale_tril, self.transition_scale_tril),
        )
        stacked = [torch.stack([first] + [later] * (steps - 1)) for first, later in pairs]
        return Chain(*(part.expand(batch, *part.shape) for part in stacked))

    def posterior(self, x: Data, lengths: Lengths = None, mask: Mask = None) -> Chain:
        """The exact posterior, forward in time: p(z_t | z_{t-1}, x_{t:T})."""
        J_here, h_here = self._likelihood(*_observed(x, lengths, mask))
        A, L, eye = self.transition, self.transition_scale_tril, torch.eye(len(self.transition)).to(self.transition)
        J, h = [J_here[:, -1]], [h_here[:, -1]]
        for t in range(x.shape[1] - 2, -1, -1):
            cov = L @ torch.linalg.solve(eye + L.T @ J[-1] @ L, L.T)  # Σ of the module's docstring
            reduce = A.T @ (eye - J[-1] @ cov)
            J.append(J_here[:, t] + _symmetric(reduce @ J[-1] @ A))
            h.append(h_here[:, t] + _times(reduce, h[-1]))
        return self._conditionals(torch.stack(J[::-1], 1), torch.stack(h[::-1], 1))

    def proposal(self, x: Data, lengths: Lengths = None, mask: Mask = None) -> Chain:
        """The locally optimal proposal of a particle filter: p(z_t | z_{t-1}, x_t)."""
        return self._conditionals(*self._likelihood(*_observed(x, lengths, mask)))

    def _likelihood(self, x: Data, observed: Bool[Tensor, "batch time"]) -> tuple[Tensor, Tensor]:
        """Return J and h of p(x_t | z_t) alone, 0 where x_t is not observed."""
        whitened = solve_triangular(self.emission_scale_tril, self.emission, upper=False)
        residual = solve_triangular(self.emission_scale_tril, x.mT, upper=False)
        h = (whitened.T @ residual).mT
        return observed[..., None, None] * (whitened.T @ whitened), observed[..., None] * h

    def _conditionals(self, J: Float[Tensor, "batch time k k"], h: Float[Tensor, "batch time k"]) -> Chain:
        """Return the chain's steps, each multiplied by exp(-½ zᵀJ_t z + h_tᵀz) and normalized again.

        Σ = L M⁻¹ Lᵀ with M = I + LᵀJL and LLᵀ = Q (P₀ at the first step) inverts neither Q nor J.
        """
        prior = self.prior(*J.shape[:2])
        L = prior.scale_tril
        inverse = torch.cholesky_inverse(cholesky(torch.eye(L.shape[-1]).to(L) + L.mT @ J @ L))
        pull = L @ inverse @ solve_triangular(L, torch.eye(L.shape[-1]).to(L).expand_as(L), upper=False)  # ΣQ⁻¹
        offset = _times(pull, prior.offset) + _times(L @ inverse @ L.mT, h)
        return Chain(pull @ prior.gain, offset, L @ cholesky(inverse))

    def _kalman(self, x: Data, lengths: Lengths, mask: Mask) -> tuple[Float[Tensor, "batch time"], States]:
        x, observed = _observed(x, lengths, mask)
        A, C, eye = self.transition, self.emission, torch.eye(len(self.transition)).to(self.transition)
        Q, R, P0 = (L @ L.T for L in (self.transition_scale_tril, self.emission_scale_tril, self.initial_scale_tril))
        mean, cov = self.initial_mean.expand(len(x), -1), P0.expand(len(x), -1, -1)
        log_probs, means, covs = [], [], []
        for t in range(x.shape[1]):
            if t:
                mean, cov = _times(A, mean), A @ cov @ A.T + Q
            predicted = dist.MultivariateNormal(_times(C, mean), _symmetric(C @ cov @ C.T + R))
            log_probs.append(observed[:, t] * predicted.log_prob(x[:, t]))
            gain = observed[:, t, None, None] * torch.cholesky_solve(C @ cov, predicted.scale_tril).mT
            mean = mean + _times(gain, x[:, t] - predicted.loc)
            cov = (eye - gain @ C) @ cov @ (eye - gain @ C).mT + gain @ R @ gain.mT  # Joseph's form: right for gain 0
            means.append(mean)
            covs.append(cov)
        return torch.stack(log_probs, 1), States(torch.stack(means, 1), torch.stack(covs, 1))


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)


def _observed(x: Data, lengths: Lengths, mask: Mask) -> tuple[Data, Bool[Tensor, "batch time"]]:
    """Return the data with 0 in place of unobserved steps, and the mask of observed ones."""
    observed = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    if lengths is not None:
        if not bool(((lengths >= 1) & (lengths <= x.shape[1])).all()):
            raise ArgumentError(f"lengths must lie between 1 and {x.shape[1]} steps, got {lengths.tolist()}.")
        observed = observed & (torch.arange(x.shape[1]) < lengths[:, None])
    x = torch.where(observed[..., None], x, 0.0)
    if not bool(x.isfinite().all()):
        raise NonFiniteError(f"x: {count_nonfinite(x)}, at steps that count as observed. Pass mask=, or the lengths.")
    return x, observed


def simulate(
    batch: int, steps: int, d: int = 3, k: int = 2, shortest: int | None = None, seed: int = 0
) -> tuple[LinearGaussianSSM, Data, Int[Tensor, " batch"]]:
    """Draw parameters, a batch of sequences padded with NaN, and their lengths, in double precision.

    Args:
        batch, steps, d, k: how many sequences and steps, dimensions of x_t and of z_t.
        shortest: draw lengths from ``shortest`` to ``steps``; without it every sequence has all steps.
        seed: of everything drawn here.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    scale = lambda n: 0.5 * torch.eye(n, dtype=torch.float64) + 0.2 * normal(n, n).tril(-1)  # noqa: E731
    rotation, _ = torch.linalg.qr(normal(k, k))
    model = LinearGaussianSSM(normal(k), 2 * scale(k), 0.9 * rotation, scale(k), normal(d, k), scale(d))
    z, xs = torch.zeros(batch, k, dtype=torch.float64), []
    for gain, offset, scale_tril in zip(*(part.unbind(1) for part in model.prior(batch, steps)), strict=True):
        z = _times(gain, z) + offset + _times(scale_tril, normal(batch, k))
        xs.append(_times(model.emission, z) + normal(batch, d) @ model.emission_scale_tril.T)
    lengths = torch.full((batch,), steps)
    if shortest is not None:
        lengths = torch.randint(shortest, steps + 1, (batch,), generator=generator)
    inside = torch.arange(steps) < lengths[:, None]
    return model, torch.stack(xs, 1).where(inside[..., None], torch.nan), lengths
