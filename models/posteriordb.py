"""Eight posteriors of posteriordb as Pyro programs, to be judged by its reference draws.

Each program has the density of its Stan namesake, up to a constant that depends on the data only:

==========================================  ============================================================
name                                        program
==========================================  ============================================================
``arK-arK``                                 autoregression of order K, proper priors
``earnings-earn_height``                    one predictor, every prior flat
``eight_schools-eight_schools_noncentered`` hierarchical normal means, non-centered
``gp_pois_regr-gp_regr``                    Gaussian-process regression, hyperparameters only
``kidiq-kidscore_momiq``                    one predictor, flat coefficients, half-Cauchy noise scale
``low_dim_gauss_mix-low_dim_gauss_mix``     two normal components, assignments summed out, means in order
``mesquite-logmesquite``                    six predictors, every prior flat
``nes1972-nes``                             eight predictors, every prior flat
==========================================  ============================================================

A flat prior is `pyro.distributions.ImproperUniform`: its log density is 0 and it cannot be sampled, so a
program with one has no prior predictive, and its automatic guide needs `Posterior.init` to find a start.

In the two programs with one predictor the coefficients differ in size and are almost collinear (earnings:
-61 000 ± 9 700 and 1 260 ± 144, correlation -1.00). Their latent site is ``beta_std``, an affine map of the
coefficients under which the posterior is close to standard normal; ``beta`` is a deterministic of it. A flat
prior stays flat under an affine map, so the posterior of ``beta`` is the one of the Stan program.

References:
    Magnusson, Torgander, Bürkner, Zhang, Carpenter and Vehtari, "posteriordb: Testing, Benchmarking and
    Developing Bayesian Inference Algorithms", 2024, arXiv:2407.04967.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions import constraints
from torch import Tensor

Raw = Mapping[str, Any]
"""The data of a Stan program, as read from its JSON file."""

Values = dict[str, Tensor]
"""A value for each latent site."""


@dataclass(frozen=True)
class Posterior:
    """One posterior: its program, its data and the sites that the reference draws report.

    Attributes:
        name: posteriordb's name, ``<data>-<model>``; the files in the data folder carry it.
        model: the Pyro program, a function of the tensors that `tensors` returns.
        tensors: from the Stan data to the program's arguments, in float64.
        init: from the program's arguments to a starting point for each latent site.
        sites: latent or deterministic sites whose entries, one after the other, are the reference's columns.

    Example:
        >>> posterior = POSTERIORS["eight_schools-eight_schools_noncentered"]
        >>> draws = {"mu": torch.zeros(100), "tau": torch.ones(100), "theta": torch.zeros(100, 8)}
        >>> posterior.columns(draws).shape
        torch.Size([100, 10])
    """

    name: str
    model: Callable[..., None]
    tensors: Callable[[Raw], tuple[Tensor, ...]]
    init: Callable[..., Values]
    sites: tuple[str, ...]

    def load(self, folder: str | Path) -> tuple[Tensor, ...]:
        """Return the program's arguments, read from ``<folder>/<name>.data.json``."""
        return self.tensors(json.loads((Path(folder) / f"{self.name}.data.json").read_text()))

    def reference(self, folder: str | Path) -> tuple[list[str], Float[np.ndarray, "draws columns"]]:
        """Return the names of the columns and the reference draws, all chains one after the other."""
        with np.load(Path(folder) / f"{self.name}.draws.npz", allow_pickle=False) as file:
            draws = file["draws"].astype(np.float64)
            return [str(name) for name in file["names"]], draws.reshape(-1, draws.shape[-1])

    def columns(self, draws: Mapping[str, Tensor]) -> Float[Tensor, "draws columns"]:
        """Return posterior draws, ``{site: (draws, ...)}``, as columns in the order of the reference.

        Raises:
            KeyError: if a site that the reference reports is not among the draws.
        """
        return torch.cat([draws[site].reshape(len(draws[site]), -1) for site in self.sites], -1)


def least_squares(
    design: Float[Tensor, "rows columns"], y: Float[Tensor, " rows"]
) -> tuple[Float[Tensor, " columns"], Float[Tensor, ""]]:
    """Return the least-squares coefficients and the standard deviation of the residuals."""
    beta = torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    return beta, (y - design @ beta).std()


def linear(design: Float[Tensor, "rows columns"], beta: Tensor) -> Tensor:
    """Return design @ beta, where beta may have dimensions for particles or draws to the left."""
    return (design * beta).sum(-1)


# --- autoregression -----------------------------------------------------------------------------------------


def ark(lags: Float[Tensor, "time K"], y: Float[Tensor, " time"]) -> None:
    """Autoregression of order K: y_t ~ N(α + Σ_k β_k y_{t-k}, σ²).

    Args:
        lags: the K previous values of each y, the latest first.
        y: the series without its first K values.
    """
    alpha = pyro.sample("alpha", dist.Normal(y.new_zeros(()), 10.0))
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(lags.shape[-1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(alpha + linear(lags, beta), sigma), obs=y)


def ark_tensors(raw: Raw) -> tuple[Tensor, Tensor]:
    """Cut the series into rows of K previous values and the value that follows."""
    y, order = torch.tensor(raw["y"], dtype=torch.float64), raw["K"]
    return y.unfold(0, order, 1)[:-1].flip(-1), y[order:]


def ark_init(lags: Tensor, y: Tensor) -> Values:
    """Start at least squares."""
    beta, sigma = least_squares(torch.cat([torch.ones_like(y)[:, None], lags], -1), y)
    return {"alpha": beta[0], "beta": beta[1:], "sigma": sigma}


# --- regressions with one predictor -------------------------------------------------------------------------


def line(beta_std: Float[Tensor, "*draws 2"], x: Float[Tensor, " rows"], y: Float[Tensor, " rows"]) -> Tensor:
    """Return intercept and slope: least squares plus `beta_std` standard errors.

    With x̄ the mean of x, e the standard deviation of the residuals over √rows and b = `beta_std`, the line is
    y(x) = ȳ + e b₁ + (slope + b₂ e / sd(x)) (x - x̄). Centring makes the errors of its two terms independent.
    """
    variance = x.var(correction=0)
    slope = ((x - x.mean()) * (y - y.mean())).mean() / variance
    error = ((y - y.mean()).var(correction=0) - slope**2 * variance).sqrt() / len(y) ** 0.5
    slope = slope + error / variance.sqrt() * beta_std[..., 1]
    level = y.mean() + error * beta_std[..., 0]
    return torch.stack([level - slope * x.mean(), slope], -1)


def line_init(x: Tensor, y: Tensor) -> Values:
    """Start at least squares, which is the origin of `beta_std`."""
    _, sigma = least_squares(torch.stack([torch.ones_like(x), x], -1), y)
    return {"beta_std": x.new_zeros(2), "sigma": sigma}


def earn_height(height: Float[Tensor, " person"], earn: Float[Tensor, " person"]) -> None:
    """Earnings on height: earn ~ N(β₁ + β₂ height, σ²), flat priors.

    Args:
        height: in inches.
        earn: in dollars.
    """
    beta_std = pyro.sample("beta_std", dist.ImproperUniform(constraints.real, (), (2,)))
    beta = pyro.deterministic("beta", line(beta_std, height, earn), event_dim=1)
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("person", len(earn)):
        pyro.sample("earn", dist.Normal(beta[..., 0] + beta[..., 1] * height, sigma), obs=earn)


def kidscore_momiq(mom_iq: Float[Tensor, " child"], kid_score: Float[Tensor, " child"]) -> None:
    """Child's score on the mother's: kid_score ~ N(β₁ + β₂ mom_iq, σ²), flat β, σ ~ half-Cauchy(2.5).

    Args:
        mom_iq: score of the mother.
        kid_score: score of the child.
    """
    beta_std = pyro.sample("beta_std", dist.ImproperUniform(constraints.real, (), (2,)))
    beta = pyro.deterministic("beta", line(beta_std, mom_iq, kid_score), event_dim=1)
    sigma = pyro.sample("sigma", dist.HalfCauchy(kid_score.new_tensor(2.5)))
    with pyro.plate("child", len(kid_score)):
        pyro.sample("kid_score", dist.Normal(beta[..., 0] + beta[..., 1] * mom_iq, sigma), obs=kid_score)


# --- regressions with several predictors --------------------------------------------------------------------


def logmesquite(design: Float[Tensor, "bush 7"], log_weight: Float[Tensor, " bush"]) -> None:
    """Leaf weight of mesquite bushes on their size, all in logarithms: log_weight ~ N(Xβ, σ²), flat priors.

    Args:
        design: ones, five logarithms of size and density, group.
        log_weight: logarithm of the weight.
    """
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real, (), design.shape[-1:]))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("bush", len(log_weight)):
        pyro.sample("log_weight", dist.Normal(linear(design, beta), sigma), obs=log_weight)


def nes(design: Float[Tensor, "voter 9"], partyid7: Float[Tensor, " voter"]) -> None:
    """Party identification, 1 to 7, on eight predictors: partyid7 ~ N(Xβ, σ²), flat priors.

    Args:
        design: ones, ideology, race, three indicators of age, education, gender, income.
        partyid7: 1, strong Democrat, to 7, strong Republican.
    """
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real, (), design.shape[-1:]))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("voter", len(partyid7)):
        pyro.sample("partyid7", dist.Normal(linear(design, beta), sigma), obs=partyid7)


def design_init(design: Tensor, y: Tensor) -> Values:
    """Start at least squares."""
    beta, sigma = least_squares(design, y)
    return {"beta": beta, "sigma": sigma}


def vectors(raw: Raw, *keys: str) -> tuple[Tensor, ...]:
    """Return entries of the data in float64."""
    return tuple(torch.tensor(raw[key], dtype=torch.float64) for key in keys)


def mesquite_tensors(raw: Raw) -> tuple[Tensor, Tensor]:
    """Take logarithms and put the predictors side by side."""
    sizes = vectors(raw, "diam1", "diam2", "canopy_height", "total_height", "density")
    weight, group = vectors(raw, "weight", "group")
    return torch.stack([torch.ones_like(weight), *(size.log() for size in sizes), group], -1), weight.log()


def nes_tensors(raw: Raw) -> tuple[Tensor, Tensor]:
    """Code age as three indicators and put the predictors side by side."""
    party, ideology, race, age = vectors(raw, "partyid7", "real_ideo", "race_adj", "age_discrete")
    ages = [(age == code).double() for code in (2, 3, 4)]
    rest = vectors(raw, "educ1", "gender", "income")
    return torch.stack([torch.ones_like(party), ideology, race, *ages, *rest], -1), party


# --- hierarchy, Gaussian process, mixture -------------------------------------------------------------------


def eight_schools(sigma: Float[Tensor, " school"], y: Float[Tensor, " school"]) -> None:
    """Effects of coaching in eight schools, non-centered: y ~ N(θ, σ²), θ = μ + τ θ', θ' ~ N(0, 1).

    Args:
        sigma: known standard error of each estimate.
        y: estimated effect.
    """
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("school", len(y)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(y.new_zeros(()), 1.0))
        theta = pyro.deterministic("theta", mu + tau * theta_trans, event_dim=0)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_init(sigma: Tensor, y: Tensor) -> Values:
    """Start with all schools at their weighted mean, and a spread of a quarter of the standard errors."""
    mean = (y / sigma**2).sum() / (1 / sigma**2).sum()
    return {"mu": mean, "tau": sigma.mean() / 4, "theta_trans": torch.zeros_like(y)}


def gp_regr(x: Float[Tensor, " point"], y: Float[Tensor, " point"]) -> None:
    """Gaussian-process regression: y ~ N(0, K + σ I), K_ij = α² exp(-(x_i - x_j)² / 2ρ²).

    σ is added to the diagonal as it is, not squared: it is the variance of the noise, as in the Stan program.

    Args:
        x: inputs.
        y: observed values.
    """
    rho = pyro.sample("rho", dist.Gamma(y.new_tensor(25.0), 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(y.new_tensor(2.0)))
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_tensor(1.0)))
    rho, alpha, sigma = (value[..., None, None] for value in (rho, alpha, sigma))
    kernel = alpha**2 * torch.exp(-((x[:, None] - x) ** 2) / (2 * rho**2))
    noise = sigma * torch.eye(len(x), dtype=x.dtype, device=x.device)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), kernel + noise), obs=y)


def gp_regr_init(x: Tensor, y: Tensor) -> Values:
    """Start at the prior mean of the length scale and split the variance of y evenly."""
    return {"rho": y.new_tensor(25 / 4), "alpha": y.std() / 2**0.5, "sigma": y.new_tensor(1.0)}


def low_dim_gauss_mix(y: Float[Tensor, " point"]) -> None:
    """Two normal components, assignments summed out: y ~ θ N(μ₁, σ₁²) + (1 - θ) N(μ₂, σ₂²), μ₁ < μ₂.

    The prior of μ is that of two independent N(0, 2²) variables in increasing order. Their center and their
    gap are independent, N(0, 2²/2) and half-normal with scale 2√2; the map from these to μ has unit Jacobian.

    Args:
        y: observed values.
    """
    center = pyro.sample("center", dist.Normal(y.new_zeros(()), 2.0 / math.sqrt(2)))
    gap = pyro.sample("gap", dist.HalfNormal(y.new_tensor(2.0 * math.sqrt(2))))
    mu = pyro.deterministic("mu", torch.stack([center - gap / 2, center + gap / 2], -1), event_dim=1)
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_full((2,), 2.0)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(y.new_tensor(5.0), 5.0))
    weights = dist.Categorical(torch.stack([theta, 1 - theta], -1))
    with pyro.plate("point", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=y)


def mixture_init(y: Tensor) -> Values:
    """Start with one component on each half of the data."""
    lower, upper = y[y <= y.median()], y[y > y.median()]
    return {
        "center": (lower.mean() + upper.mean()) / 2,
        "gap": upper.mean() - lower.mean(),
        "sigma": torch.stack([lower.std(), upper.std()]),
        "theta": y.new_tensor(0.5),
    }


POSTERIORS: dict[str, Posterior] = {
    posterior.name: posterior
    for posterior in (
        Posterior("arK-arK", ark, ark_tensors, ark_init, ("alpha", "beta", "sigma")),
        Posterior(
            "earnings-earn_height",
            earn_height,
            lambda raw: vectors(raw, "height", "earn"),
            line_init,
            ("beta", "sigma"),
        ),
        Posterior(
            "eight_schools-eight_schools_noncentered",
            eight_schools,
            lambda raw: vectors(raw, "sigma", "y"),
            eight_schools_init,
            ("theta", "mu", "tau"),
        ),
        Posterior(
            "gp_pois_regr-gp_regr",
            gp_regr,
            lambda raw: vectors(raw, "x", "y"),
            gp_regr_init,
            ("rho", "alpha", "sigma"),
        ),
        Posterior(
            "kidiq-kidscore_momiq",
            kidscore_momiq,
            lambda raw: vectors(raw, "mom_iq", "kid_score"),
            line_init,
            ("beta", "sigma"),
        ),
        Posterior(
            "low_dim_gauss_mix-low_dim_gauss_mix",
            low_dim_gauss_mix,
            lambda raw: vectors(raw, "y"),
            mixture_init,
            ("mu", "sigma", "theta"),
        ),
        Posterior("mesquite-logmesquite", logmesquite, mesquite_tensors, design_init, ("beta", "sigma")),
        Posterior("nes1972-nes", nes, nes_tensors, design_init, ("beta", "sigma")),
    )
}
"""The eight posteriors by name."""
