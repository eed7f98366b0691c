"""Draws -> what they say about the evidence and about the guide's fit: k-hat, leave-one-out."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_elbo.draws import draw
from pyro_elbo.errors import ArgumentError
from pyro_elbo.psis import describe_k, pareto_k_threshold, psis
from pyro_elbo.sites import Program


@dataclass(frozen=True)
class ParetoK:
    """How far the guide can be trusted, read off the tail of its importance weights; print it for plain words.

    Attributes:
        k: k-hat, per row of the data plate where all latents are local, a scalar otherwise.
        ess: effective sample size of the smoothed weights, same shape.
        num_samples: draws used.
        plate: the data plate's name, None for joint weights.
    """

    k: Tensor
    ess: Tensor
    num_samples: int
    plate: str | None

    def __str__(self) -> str:
        if self.plate is None:
            return (
                f"k-hat {self.k.item():.2f}, effective draws {self.ess.item():.0f} of {self.num_samples}: "
                f"{describe_k(self.k.item(), self.num_samples)}"
            )
        limit = pareto_k_threshold(self.num_samples)
        high = int((self.k >= limit).sum())
        middle, worst = self.k.median().item(), self.k.max().item()
        verdict = (
            "The guide is a usable approximation of every row's posterior."
            if high == 0
            else f"Where k-hat reaches {limit:.2f} the guide misses part of the posterior: importance weighting cannot "
            "repair those rows. A richer guide or longer training may."
        )
        return (
            f"k-hat per row of '{self.plate}': median {middle:.2f}, worst {worst:.2f}; {high} of {len(self.k)} rows at "
            f"or above {limit:.2f}. {verdict}"
        )


def pareto_k(
    model: Program, guide: Program, *args: Any, num_samples: int = 4000, seed: int | None = 0, **kwargs: Any
) -> ParetoK:
    r"""Diagnose a guide by the tail of its importance weights p(x, z) / q(z).

    Below 0.5 the weights have finite variance, below min(1 - 1/log10(S), 0.7) they can be used, above the guide is a
    bad approximation. With amortised guides (all latents inside the data plate) every row is judged on its own: the
    joint weights of many rows are always bad.

    Args:
        args, kwargs: arguments of model and guide.
        num_samples: draws; k-hat is noisy below about 4000.
        seed: of the draws; None continues the caller's random stream.

    Raises:
        GuideError: a point-estimate guide, or one that has never run.
        WeightsError: too few draws, or weights that are NaN.

    References:
        Yao, Vehtari, Simpson, Gelman (2018), Yes, but did it work?, arXiv:1802.02538; Vehtari, Simpson, Gelman, Yao,
        Gabry (2024), Pareto smoothed importance sampling, arXiv:1507.02646.
    """
    draws = draw(model, guide, args, kwargs, num_samples, seed=seed)
    smoothed = draws.smooth()
    local = draws.local_log_p is not None and draws.data_plate is not None
    return ParetoK(smoothed.pareto_k, smoothed.ess, num_samples, draws.data_plate.name if local else None)


def loo(data: Any, var_name: str | None = None) -> Any:
    r"""Leave-one-out predictive density of an exported fit, corrected for the variational posterior.

    The ratio of datum i is :math:`p(x_{-i}, z) / q(z)`, that is the draw's weight divided by p(x_i | z), smoothed by
    this library's PSIS; the accounting is arviz-stats'. Where latents are local, the row's own weight is used.

    Args:
        data: what :func:`pyro_elbo.to_arviz` returned, also after a NetCDF round trip.
        var_name: the observed site, where there are several.

    Returns:
        arviz-stats' ELPDData with pointwise values, log scale (nats).

    Raises:
        ArgumentError: several observed sites and no ``var_name``, or no log likelihood.

    References:
        Magnusson, Andersen, Jonasson, Vehtari (2019), Bayesian leave-one-out cross-validation for large data,
        arXiv:1904.10679; Vehtari, Gelman, Gabry (2017), arXiv:1507.04544.
    """
    import arviz_stats
    import xarray

    tree = data if isinstance(data, xarray.DataTree) else data.to_datatree()
    names = [str(n) for n in tree["log_likelihood"].data_vars] if "log_likelihood" in tree.children else []
    if var_name is None and len(names) == 1:
        var_name = names[0]
    if var_name not in names:
        raise ArgumentError(f"var_name must be one of the observed sites {names}, got {var_name!r}.")
    likelihood = tree["log_likelihood"][var_name]
    stats = tree["sample_stats"]
    local = stats.data_vars.get("log_weight_local")
    weight = stats["log_weight"] if local is None or not set(local.dims) <= set(likelihood.dims) else local
    ratio = (weight - likelihood).stack(sample=("chain", "draw")).transpose(..., "sample")
    smoothed = psis(torch.tensor(ratio.values))
    log_weights = ratio.copy(data=smoothed.log_weights.numpy()).unstack("sample").transpose(*likelihood.dims)
    k = ratio.isel(sample=0, drop=True).copy(data=smoothed.pareto_k.numpy())
    return arviz_stats.loo(tree, pointwise=True, var_name=var_name, log_weights=log_weights, pareto_k=k)
