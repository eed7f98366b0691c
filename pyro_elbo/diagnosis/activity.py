r"""Active units: the elements of a latent whose posterior mean moves with the data.

.. math:: \mathrm{Var}_x\, E_q[z \mid x] > 0.01\, \mathrm{Var}_p(z),

the threshold of Burda et al. where the prior has unit variance, and the same under any other units of z. The prior's
variance is that of its distribution given what it depends on, averaged over rows; 1 stands for one that is infinite or
unknown. The variance over rows of a mean of S draws contains 1/S of the variance within a
posterior, which is subtracted. In a sequence the variance over sequences is averaged over time.

References:
    Burda, Grosse, Salakhutdinov (2016), Importance weighted autoencoders, arXiv:1509.00519.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_elbo.errors import DataError, check_count
from pyro_elbo.objectives import TraceBeta_ELBO
from pyro_elbo.posterior import label_latents, sample_guide
from pyro_elbo.programs import Program, check_options, program_arguments, seeded
from pyro_elbo.terms import Term, Terms

if TYPE_CHECKING:
    import xarray

ACTIVE = 0.01


def active_units(
    model: Program, guide: Program, *args: Any, num_samples: int = 200, seed: int = 0, **kwargs: Any
) -> dict[str, Bool[Tensor, "*unit"]]:
    r"""Say which units of each latent are active: their posterior mean moves with the data.

    .. math:: \mathrm{Var}_x\, E_q[z \mid x] > 0.01\, \mathrm{Var}_p(z)

    Under a prior of unit variance this is the rule of Burda et al. Where the prior's variance is infinite or has no
    formula, the threshold is 0.01. Modules run in evaluation mode; parameters, modes, buffers and torch's random stream
    stay as they were.

    Args:
        model: the generative program.
        guide: its variational posterior.
        args, kwargs: their arguments, two rows at least.
        num_samples: draws of each row's posterior; their noise is subtracted from the variance of their mean.
        seed: seed of the draws.

    Returns:
        A tensor of the latent's event shape (of its inner plates and event) for each latent that has a value per row
        of the data; a latent of a sequence is averaged over time. Other latents have no units.

    Raises:
        ArgumentError: ``num_samples`` is less than 2.
        DataError: there is a single row.
        GuideError, SiteError, NonFiniteError: as from the terms.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, pyro_elbo as pe
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z[..., 0], 0.5), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         loc = torch.stack([0.8 * x, torch.zeros_like(x)], -1)
        ...         pyro.sample("z", dist.Normal(loc, torch.tensor([0.45, 1.0])).to_event(1))
        >>> pe.active_units(model, guide, torch.linspace(-2.0, 2.0, 100))
        {'z': tensor([ True, False])}

    References:
        Burda, Grosse, Salakhutdinov (2016), arXiv:1509.00519.
    """
    check_options(model, kwargs)
    check_count("num_samples", num_samples, least=2)
    args, kwargs = program_arguments(model, args, kwargs)
    with torch.no_grad(), seeded(seed):
        terms = TraceBeta_ELBO().terms(model, guide, *args, **kwargs)
    if terms.data_plate is not None and terms.data_plate.size < 2:
        raise DataError(
            f"Means move from row to row: active units need 2 rows of '{terms.data_plate.name}' or more, got 1. Pass "
            "more rows."
        )
    draws = label_latents(sample_guide(model, guide, args, kwargs, num_samples, seed))
    found = {name: are_active(name, terms, draws) for name, term in terms.sites.items() if term.kind == "latent"}
    return {name: units for name, units in found.items() if units is not None}


def are_active(name: str, terms: Terms, draws: "xarray.Dataset") -> Bool[Tensor, "*unit"] | None:
    """Return which units of a latent are active, from draws; None for one without a value per row."""
    spread = _spread_of_means(name, terms, draws)
    return None if spread is None else spread > threshold(terms.sites[name]).to(spread)


def threshold(term: Term) -> Float[Tensor, "*unit"]:
    """Return the variance of means above which the units of a latent are active: a hundredth of their prior's."""
    unknown = torch.full(term.event_shape, ACTIVE)
    if term.in_model is None:
        return unknown
    prior = term.in_model.stepwise().fn
    try:
        variance = prior.variance.detach()
    except NotImplementedError:
        return unknown
    variance = variance.flatten(0, -1 - len(prior.event_shape)).mean(0) if prior.batch_shape else variance
    return (ACTIVE * variance).where(variance.isfinite() & (variance > 0), ACTIVE)


def _spread_of_means(name: str, terms: Terms, draws: "xarray.Dataset") -> Float[Tensor, "*unit"] | None:
    """Return the variance over rows of a latent's posterior mean, from draws; None for one without a value per row."""
    data, plates = terms.data_plate, [p.name for p in terms.plates[name]]
    if data is None or data.name not in plates or name not in draws:
        return None
    values = draws[name]
    if values.dtype.kind != "f":  # the number of a category has no mean
        return None
    rows = next((d for d in (data.name, f"{data.name}_dim") if d in values.dims), None)
    if rows is None or values.sizes[rows] < 2:
        return None
    if f"{name}_counted" in draws.coords:
        values = values.where(draws[f"{name}_counted"])
    has_time = terms.sites[name].steps is not None
    last = (rows, plates[-1]) if has_time else (rows,)
    values = values.transpose("draw", *last, ...)
    return variance_of_means(torch.as_tensor(values.values), has_time)


def variance_of_means(means: Float[Tensor, "draws rows *rest"], has_time: bool) -> Float[Tensor, "*unit"]:
    """Return the variance over rows of the mean over draws, less what the draws' own variance adds to it.

    NaN marks steps that do not count. With ``has_time`` the dimension after the rows is averaged.
    """
    within = means.var(0) / len(means)
    center = means.mean(0)
    count = center.isfinite().sum(0)
    between = (center - center.nanmean(0)).square().nansum(0) / (count - 1)
    spread = between.where(count > 1, torch.nan) - within.nanmean(0)
    return spread.nanmean(0) if has_time else spread
