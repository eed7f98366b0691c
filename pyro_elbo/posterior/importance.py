"""Importance weights of the guide's draws: k-hat, resampling, and the leave-one-out predictive density."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_elbo.display import html_table
from pyro_elbo.errors import ArgumentError, GuideError, WeightsError
from pyro_elbo.posterior.draws import MOST_ELEMENTS, Draws, draw
from pyro_elbo.posterior.psis import PSIS, describe_k, format_k, most_even, pareto_k_threshold, psis
from pyro_elbo.posterior.storage import Storage
from pyro_elbo.programs import Plate, Program, check_options, program_arguments

SAMPLE_DIMS = ("chain", "draw")
MOST_WEIGHTS = 2**19  # at once: the fit of their tails takes thirty times their memory


@dataclass(frozen=True)
class ParetoK:
    """The shape k of the importance weights' tail, which says how far the guide can be trusted; print it for a verdict.

    Attributes:
        k: k-hat, per row of the data plate where all latents are local, a scalar otherwise.
        ess: effective sample size of the smoothed weights, in draws, shaped like ``k``.
        largest: the largest smoothed weight relative to their mean, shaped like ``k``. Up to S^(1/4) the weights have
            no heavy tail whatever k-hat is, which then describes weights that lie close together.
        num_samples: number of draws.
        plate: name of the data plate, None for joint weights.
    """

    k: Tensor
    ess: Tensor
    largest: Tensor
    num_samples: int
    plate: str | None

    def __float__(self) -> float:
        """K-hat, that of the worst row where all latents are local."""
        return self.k.max().item()

    def _repr_html_(self) -> str:
        return html_table("Pareto k-hat", (), [], [str(self)])

    def __str__(self) -> str:
        if self.plate is None:
            return (
                f"k-hat {format_k(self.k.item())}, effective draws {self.ess.item():.0f} of {self.num_samples}: "
                f"{describe_k(self.k.item(), self.num_samples, self.largest.item())}"
            )
        limit = pareto_k_threshold(self.num_samples)
        reach, even = self.k >= limit, self.largest <= most_even(self.num_samples)
        high, close = int((reach & ~even).sum()), int((reach & even).sum())
        middle, worst = self.k.median().item(), self.k.max().item()
        verdict = (
            "The guide is a usable approximation of every row's posterior."
            if high == 0
            else f"Where k-hat reaches {limit:.2f} the guide misses part of the posterior: importance weighting cannot "
            "repair those rows. A richer guide or longer training may."
        )
        more = (
            f", besides {close} whose weights are all at most {most_even(self.num_samples):.1f} times their mean and "
            "have no heavy tail"
            if close
            else ""
        )
        return (
            f"k-hat per row of '{self.plate}': median {format_k(middle)}, worst {format_k(worst)}; {high} of "
            f"{len(self.k)} rows at or above {limit:.2f}{more}. {verdict}"
        )


def pareto_k(
    model: Program, guide: Program, *args: Any, num_samples: int = 4000, seed: int | None = 0, **kwargs: Any
) -> ParetoK:
    r"""Diagnose a guide by the tail of its importance weights p(x, z) / q(z).

    Below 0.5 the weights have finite variance. Below min(1 - 1/log10(S), 0.7) the smoothed weights can be used; above
    it the guide is a bad approximation, unless no weight is more than S^(1/4) times their mean: such weights have no
    heavy tail, and k-hat describes the largest of them, which lie close together. With amortized guides (all latents
    inside the data plate) every row is judged on its own: the joint weights of many rows are always bad.

    Args:
        args, kwargs: arguments of model and guide.
        num_samples: number of draws S; k-hat is noisy below about 4000.
        seed: seed of the draws; None continues the caller's random stream.

    Raises:
        ArgumentError: an option is misspelled.
        GuideError: a guide that is a point estimate in some latent, or one that has never run.
        WeightsError: too few draws, weights that are NaN, or weights that are not those of a posterior: a subsampled
            plate beside a latent outside it, or different scales of sites (a common one is taken out).

    References:
        Yao, Vehtari, Simpson, Gelman (2018), Yes, but did it work?, arXiv:1802.02538; Vehtari, Simpson, Gelman, Yao,
        Gabry (2024), Pareto smoothed importance sampling, arXiv:1507.02646.
    """
    check_options(model, kwargs)
    return judge(draw(model, guide, *program_arguments(model, args, kwargs), num_samples, seed=seed))


def smooth(draws: Draws) -> Iterator[PSIS]:
    """Smooth importance weights: those of some rows after the other where all latents are local, joint ones otherwise.

    Raises:
        GuideError: the guide is a point estimate in some latent.
        WeightsError: the weights are not those of a posterior.
    """
    if draws.weights_error is not None:
        raise draws.weights_error
    if draws.local_log_p is None:
        yield psis(draws.log_weight, draws.eps)
        return
    size = max(1, MOST_WEIGHTS // len(draws.log_p))
    for i in range(0, draws.local_log_p.shape[1], size):
        yield psis(_local_weights(draws, slice(i, i + size)), draws.eps)


def _local_weights(draws: Draws, rows: slice) -> Tensor:
    """Return the log weights of some rows of the data, rows first."""
    both: Any = draws.local_log_p, draws.local_log_q
    p, q = (draws.storage.in_memory(lambda part: part[:, rows].clone(), x) for x in both)
    return (p - q).T


def judge(draws: Draws) -> ParetoK:
    """Return k-hat of draws: see :func:`pareto_k`.

    Raises:
        GuideError, WeightsError: as :func:`smooth`.
    """
    local = draws.local_log_p is not None and draws.data_plate is not None
    count, plate = len(draws.log_p), draws.data_plate.name if local else None
    parts = [(s.pareto_k, s.ess, s.log_weights.amax(-1).exp() * count) for s in smooth(draws)]
    k, ess, largest = (torch.cat(x) if local else x[0] for x in zip(*parts, strict=True))
    return ParetoK(k, ess, largest, count, plate)


def resample(draws: Draws, generator: torch.Generator) -> Draws:
    """Draw with replacement in proportion to the smoothed weights; the result has uniform weights.

    Where all latents are local, every row of the data plate is drawn on its own.

    Raises:
        GuideError, WeightsError: as :func:`smooth`.
    """
    count = len(draws.log_p)
    found = (torch.multinomial(s.log_weights.exp(), count, True, generator=generator) for s in smooth(draws))
    if draws.data_plate is None or draws.local_log_p is None or draws.local_log_q is None:
        (index,) = found
        return _pick(draws, lambda x, _, part: x[index[part]], draws.log_p[index], draws.log_q[index])
    name, done = draws.data_plate.name, 0
    rows = draws.storage.empty(torch.empty(0, dtype=torch.long), tuple(draws.local_log_p.shape))
    for index in found:
        rows[:, done : done + len(index)] = index.T
        done += len(index)

    def by_row(x: Tensor, plates: tuple[Plate, ...], part: slice) -> Tensor:
        names = [p.name for p in plates]
        dim = 1 + names.index(name) if name in names else x.dim()
        if x.dim() <= dim or x.shape[dim] != rows.shape[1]:
            return x[part]  # the same for every row, as a deterministic may be
        chosen = rows[part]
        shape = [1] * x.dim()
        shape[0], shape[dim] = chosen.shape
        return x.gather(0, chosen.reshape(shape).expand(len(chosen), *x.shape[1:]))

    local = [_in_parts(x, (draws.data_plate,), by_row, draws.storage) for x in (draws.local_log_p, draws.local_log_q)]
    scale = draws.data_plate.full_size / draws.data_plate.size
    log_p, log_q = (draws.storage.in_memory(lambda x: x.sum(1) * scale, x) for x in local)
    picked = _pick(draws, by_row, log_p, log_q)
    return replace(picked, local_log_p=local[0], local_log_q=local[1])


_Choice = Callable[[Tensor, tuple[Plate, ...], slice], Tensor]


def _pick(draws: Draws, choose: _Choice, log_p: Tensor, log_q: Tensor) -> Draws:
    names = ("latents", "unconstrained", "deterministics", "log_likelihood", "log_prior")
    fields: dict[str, Any] = {
        name: {
            site: _in_parts(x, draws.plates[site], choose, draws.storage) for site, x in getattr(draws, name).items()
        }
        for name in names
    }
    return replace(draws, **fields, log_p=log_p, log_q=log_q, resampled=True)


def _in_parts(x: Tensor, plates: tuple[Plate, ...], choose: _Choice, storage: Storage) -> Tensor:
    """Choose draws of an array, some at a time."""
    count, size = len(x), max(1, MOST_ELEMENTS // max(1, x[0].numel()))
    return storage.join((choose(x, plates, slice(i, min(i + size, count))) for i in range(0, count, size)), count)


def loo(data: Any, var_name: str | None = None) -> Any:
    r"""Leave-one-out predictive density of an exported fit, corrected for the variational posterior.

    The importance ratio of datum i is :math:`p(x_{-i}, z) / q(z)`, the draw's weight divided by p(x_i | z), smoothed by
    PSIS. arviz-stats sums up. Where latents are local, the row's own weight is used. Data that a mask leaves out do not
    count.

    Args:
        data: the result of :func:`pyro_elbo.to_arviz`, also after a NetCDF round trip.
        var_name: the observed site, where there are several.

    Returns:
        ELPDData of the installed ArviZ with pointwise values, log scale (nats): ``elpd``, ``se``, ``p``, ``elpd_i``,
        ``pareto_k``, ``n_data_points``.

    Raises:
        ArgumentError: several observed sites and no ``var_name``, no log likelihood, or no datum that counts.
        GuideError: the fit is a point estimate in some latent.
        WeightsError: the weights are not those of a posterior: a subsampled plate, or different scales.

    References:
        Magnusson, Andersen, Jonasson, Vehtari (2019), Bayesian leave-one-out cross-validation for large data,
        arXiv:1904.10679; Vehtari, Gelman, Gabry (2017), arXiv:1507.04544.
    """
    import arviz
    import xarray

    if not isinstance(data, xarray.DataTree) and not hasattr(data, "to_datatree"):
        raise ArgumentError(f"loo takes the result of pe.to_arviz, got {type(data).__name__}.")
    tree = data if isinstance(data, xarray.DataTree) else data.to_datatree()
    likelihood, weight = _likelihood_and_weight(tree, var_name)
    weight, likelihood = _drop_masked(weight.broadcast_like(likelihood).transpose(*likelihood.dims), likelihood)
    result = _sum_up(*_pointwise(weight, likelihood), likelihood.sizes["chain"] * likelihood.sizes["draw"])
    if int(arviz.__version__.split(".")[0]) > 0:
        return result

    from pyro_elbo.posterior.elpd import Elpd

    return Elpd.of(result)


def _pointwise(weight: Any, likelihood: Any) -> tuple[Any, Any, Any]:
    """Return log p(x_i | x_-i), log p(x_i | x) and k-hat of each datum, of so many at a time that little is in memory.

    Draws have weights here, which arviz-stats does not know when it averages p(x_i | z) over them.
    """
    import xarray

    rows = [d for d in likelihood.dims if d not in SAMPLE_DIMS]
    size = max(1, MOST_WEIGHTS * likelihood.sizes[rows[0]] // max(likelihood.size, 1)) if rows else 1
    parts = [{rows[0]: slice(i, i + size)} for i in range(0, likelihood.sizes[rows[0]], size)] if rows else [{}]
    eps, found = float(np.finfo(likelihood.dtype).eps), []
    for part in parts:
        x, w = (_flat(a.isel(part)) for a in (likelihood, weight))
        left_out = psis(w - x, eps)
        values = (left_out.log_weights + x).logsumexp(-1), (psis(w, eps).log_weights + x).logsumexp(-1)
        of_datum = likelihood.isel(part).isel(dict.fromkeys(SAMPLE_DIMS, 0), drop=True)
        found.append([of_datum.copy(data=a.numpy()) for a in (*values, left_out.pareto_k)])
    elpd, lpd, k = (xarray.concat(a, rows[0]) if rows else a[0] for a in zip(*found, strict=True))
    return elpd, lpd, k


def _flat(x: Any) -> Tensor:
    """Return an array of draws in float64, draws last."""
    x = x.transpose(..., *SAMPLE_DIMS)
    return torch.tensor(x.values, dtype=torch.float64).flatten(-2)


def _sum_up(elpd_i: Any, lpd_i: Any, k: Any, num_samples: int) -> Any:
    """Return the ELPDData of arviz-stats."""
    from arviz_stats.utils import ELPDData

    elpd, se, p, _ = elpd_i.azstats.loo_summary(lpd_i - elpd_i)
    limit = pareto_k_threshold(num_samples)
    high = int((k > limit).sum())
    if high:
        warnings.warn(
            f"Estimated shape parameter of Pareto distribution is greater than {limit:.2f} for {high} of {k.size} "
            "data, whose leave-one-out densities are not reliable.",
            stacklevel=3,
        )
    return ELPDData("loo", elpd, se, p, num_samples, k.size, "log", high > 0, limit, elpd_i, k)


def _likelihood_and_weight(tree: Any, var_name: str | None) -> tuple[Any, Any]:
    """Return the log likelihood of a site and the log weights of its draws, of its rows where latents are local."""
    names = [str(n) for n in tree["log_likelihood"].data_vars] if "log_likelihood" in tree.children else []
    if var_name is None and len(names) == 1:
        var_name = names[0]
    name = str(var_name).replace("/", ".")
    if not names:
        raise ArgumentError("The data hold no log likelihood of an observed site: pass what pe.to_arviz returned.")
    if name not in names:
        raise ArgumentError(f"var_name must be one of the observed sites {names}, got {var_name!r}.")
    likelihood, stats = tree["log_likelihood"][name], tree["sample_stats"]
    if "weights_skipped" in stats.attrs:
        kind = GuideError if "point_estimate" in stats.attrs else WeightsError
        raise kind(str(stats.attrs["weights_skipped"]))
    local = stats.data_vars.get("log_weight_local")
    return likelihood, stats["log_weight"] if local is None or not set(local.dims) <= set(likelihood.dims) else local


def _drop_masked(weight: Any, likelihood: Any) -> tuple[Any, Any]:
    """Leave out the data that a mask leaves out of the model."""
    mark = f"{likelihood.name}_counted"
    if mark not in likelihood.coords:
        return weight, likelihood
    counts = likelihood.coords[mark].astype(bool)
    weight, likelihood, counts = (x.drop_vars(mark, errors="ignore") for x in (weight, likelihood, counts))
    if not bool(counts.any()):
        raise ArgumentError(f"'{likelihood.name}' has no datum that counts: its mask leaves out all of them.")
    rows = list(counts.dims)
    if not rows:
        return weight, likelihood
    if len(rows) > 1:
        weight, likelihood, counts = (x.stack(datum=rows) for x in (weight, likelihood, counts))
        rows = ["datum"]
    kept = np.flatnonzero(counts.values)
    return weight.isel({rows[0]: kept}), likelihood.isel({rows[0]: kept})
