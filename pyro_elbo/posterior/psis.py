"""Pareto-smoothed importance sampling (PSIS) and the diagnostic k-hat.

The log weights log p(x, z) - log q(z) of draws z ~ q turn guide draws into posterior draws, if their right
tail is light enough. PSIS fits a generalized Pareto distribution (GPD) to the largest weights, replaces them
by the quantiles of that fit, and reports the fitted shape k. Weights of shape k have 1/k finite moments:
below 0.5 a finite variance, above 1 not even a mean. The pipeline is tail -> GPD fit -> quantiles ->
normalized weights, batched over leading dimensions and in float64: spreads of hundreds of nats are common.

References:
    Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, arXiv:1507.02646.
    Yao, Vehtari, Simpson and Gelman (2018), Yes, but did it work? Evaluating variational inference,
    arXiv:1802.02538.
    Zhang and Stephens (2009), A new and efficient estimation method for the generalized Pareto distribution,
    Technometrics 51(3).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from pyro_elbo.errors import WeightsError

# The fit needs five draws in the tail, and the tail is a fifth of a small sample.
MIN_TAIL = 5
MIN_DRAWS = 5 * MIN_TAIL

# exp() of anything smaller is subnormal: such draws have no weight beside the largest, which is exp(0).
_LOG_TINY = math.log(torch.finfo(torch.float64).tiny)

# The sampling noise of k-hat is about (1 + k) / sqrt(tail): 0.1 at k = 0.5 from this many draws on.
_STEADY_DRAWS = 4000


@dataclass(frozen=True)
class PSIS:
    """Smoothed importance weights with their diagnostics.

    Attributes:
        log_weights: smoothed log weights in nats, normalized: their logsumexp over draws is 0.
        pareto_k: k-hat, the shape of the weights' right tail; smaller is better. `-inf` where the weights are
            constant (the guide is the posterior), `inf` where no tail could be fitted. Where the largest weights
            take few distinct values (discrete latents) there is no tail: see :func:`psis`.
        ess: effective sample size 1 / sum(w^2) of the smoothed weights, between 1 and the number of draws.
            Meaningless where `pareto_k` is bad.
    """

    log_weights: Float[Tensor, "*batch draws"]
    pareto_k: Float[Tensor, "*batch"]
    ess: Float[Tensor, "*batch"]


def psis(log_weights: Float[Tensor, "*batch draws"], eps: float | None = None) -> PSIS:
    """Smooth importance weights and estimate the shape of their tail.

    The tail holds the M = min(S / 5, 3 sqrt(S)) largest of S weights. Its excesses over the largest weight
    outside are fitted by a GPD; the j-th smallest is replaced by the GPD's quantile at (j - 1/2) / M, never
    above the largest raw weight. Equal to `psislw` of ArviZ 0.23, except where the weights are constant up to
    rounding (next paragraph) and where a fit breaks down by underflow: there `pareto_k` is `inf`, not NaN.

    The weights of discrete latents may take a few values only. Where the largest ones have fewer than five distinct
    values, they are bounded and not smoothed. The largest of S weights of shape k is of the order S^k times their
    mean, so `pareto_k` is then log(max / mean) / log(S), or `inf` where that is at the limit or above: a few draws
    carry all the weight.

    Weights that spread less than sqrt(eps) relative to their size are constant up to rounding, which is what an
    exact guide gives: they are not smoothed and `pareto_k` is `-inf`. The tolerance is capped at 0.1 nats, which
    costs 1 - 1 / cosh(0.05)^2 < 0.3 % of the effective sample size at worst. A point-estimate guide gives constant
    weights too; callers refuse it before they call.

    Args:
        log_weights: log p(x, z) - log q(z), unnormalized, draws last. `-inf` is a weight of zero. Sum them in
            float64: rounding to float32 makes distinct weights equal.
        eps: relative rounding error of the log densities; that of the dtype of ``log_weights`` if omitted.

    Returns:
        Float64 record, detached from the graph.

    Raises:
        WeightsError: NaN or `+inf` weights, fewer than 25 draws, or fewer than 25 finite weights in a row.

    Example:
        >>> draws = torch.distributions.Pareto(torch.tensor(1.0), torch.tensor(4.0))  # a tail with k = 1 / 4
        >>> _ = torch.manual_seed(0)
        >>> result = psis(draws.sample((3, 4000)).log())
        >>> result.pareto_k.shape, bool((result.pareto_k < 0.7).all())
        (torch.Size([3]), True)

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), arXiv:1507.02646.
        Yao, Vehtari, Simpson and Gelman (2018), arXiv:1802.02538.
    """
    _check(log_weights)
    raw = log_weights.detach().double()
    eps = torch.finfo(log_weights.dtype).eps if eps is None else eps
    largest = raw.amax(-1, keepdim=True)
    smoothed, pareto_k = _smooth(raw - largest)
    constant, bounded = _is_constant(raw, eps), _has_few_values(raw, eps)
    smoothed = torch.where((constant | bounded)[..., None], raw - largest, smoothed)
    normalized = smoothed - smoothed.logsumexp(-1, keepdim=True)
    pareto_k = torch.where(bounded, _bounded_k(normalized), pareto_k)
    return PSIS(
        log_weights=normalized,
        pareto_k=pareto_k.masked_fill(constant, -torch.inf),
        ess=(-(2 * normalized).logsumexp(-1)).exp(),
    )


def fit_pareto(
    excesses: Float[Tensor, "*batch tail"],
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Fit the shape k and scale sigma of a generalized Pareto distribution to excesses over a threshold.

    In terms of b = -k / sigma, the likelihood is profiled over k; the mean of b under it, over a grid that
    acts as a prior, gives k (Zhang and Stephens, 2009; no iteration that could fail to converge). That k is
    shrunk towards 1/2 with the weight of ten draws: (n k + 10 * 0.5) / (n + 10). Here k > 0 is a heavy tail.
    Agrees with `pyro.ops.stats.fit_generalized_pareto`, which takes one row at a time.

    Args:
        excesses: in any order, finite. Entries that are not positive are padding, so that rows whose tails
            differ in length share one call.

    Returns:
        k and sigma in float64; k is `inf` and sigma NaN where fewer than five excesses are positive or the
        fit underflows.

    Raises:
        WeightsError: an excess is NaN or infinite.

    Example:
        >>> exponential = torch.distributions.Exponential(torch.tensor(2.0))
        >>> k, sigma = fit_pareto(exponential.icdf(torch.arange(0.5, 500) / 500))
        >>> print(f"{k:.1f} {sigma:.1f}")  # an exponential tail has k = 0 and sigma = 1 / rate
        0.0 0.5

    References:
        Zhang and Stephens (2009), Technometrics 51(3). Vehtari et al. (2024), arXiv:1507.02646.
    """
    if bad := int((~excesses.isfinite()).sum()):
        raise WeightsError(
            f"{bad} of {excesses.numel()} excesses are NaN or infinite; pass finite excesses over the cutoff."
        )
    x = pad(excesses.detach().double().clamp(min=0.0), (0, max(MIN_TAIL - excesses.shape[-1], 0)))
    x = x.sort(-1, descending=True).values
    size = (x > 0).sum(-1)  # padding is zero now and adds nothing to a sum of log1p(-b x)

    def profile_k(b: Tensor) -> Tensor:
        return torch.log1p(-b[..., None] * x).sum(-1) / size

    grid = _grid(x, size)
    k_grid = torch.stack([profile_k(b) for b in grid.unbind(-1)], -1)  # point by point: memory stays small
    log_like = size[..., None] * ((-grid / k_grid).log() - k_grid - 1)
    weights = log_like.masked_fill(grid.isnan(), -torch.inf).softmax(-1)
    weights = weights.masked_fill(weights < 10 * torch.finfo(torch.float64).eps, 0.0)
    b = (weights * grid.nan_to_num()).sum(-1) / weights.sum(-1)
    k = profile_k(b)
    sigma = -k / b
    failed = (size < MIN_TAIL) | ~(k.isfinite() & sigma.isfinite() & (sigma > 0))
    k = (size * k + 10 * 0.5) / (size + 10)
    return k.masked_fill(failed, torch.inf), sigma.masked_fill(failed, torch.nan)


def pareto_k_threshold(num_samples: int) -> float:
    """Largest k-hat at which `num_samples` draws still give reliable estimates: min(1 - 1 / log10(S), 0.7).

    Args:
        num_samples: number of draws S, at least 25.

    Returns:
        The threshold; 0.7 from 2155 draws on.

    Raises:
        WeightsError: fewer than 25 draws.

    Example:
        >>> pareto_k_threshold(100), pareto_k_threshold(4000)
        (0.5, 0.7)

    References:
        Vehtari et al. (2024), arXiv:1507.02646.
    """
    _check_draws(num_samples)
    return min(1 - 1 / math.log10(num_samples), 0.7)


def most_even(num_samples: int) -> float:
    r"""Return the largest weight, relative to the mean, up to which S weights have no heavy tail: S^(1/4).

    A Pareto fit looks at the few percent of the largest weights alone. Where these are bounded and lie close together,
    k-hat may take any value. But the largest of S weights of shape k is of the order S^k times their mean: one of
    S^(1/4) belongs to k = 1/4, far from 1/2, where the variance ends. Of 4000 samples of 1000 Pareto weights with
    k = 1/2 none had so small a maximum; of 100 weights 4 % of the samples.

    Example:
        >>> round(most_even(4000), 1)
        8.0
    """
    return num_samples**0.25


def format_k(k: float) -> str:
    """Return a k-hat as it is printed: equal weights have none, and are exact.

    Example:
        >>> format_k(0.2), format_k(-math.inf)
        ('0.20', 'exact')
    """
    return "exact" if k == -math.inf else f"{k:.2f}"


def describe_k(k: float, num_samples: int, largest: float = math.inf) -> str:
    """Explain a k-hat in plain words: good, usable or bad, and the cure.

    Args:
        k: one k-hat.
        num_samples: number of draws it was estimated from.
        largest: the largest weight relative to their mean, where it is known.

    Returns:
        A sentence or two, starting with the verdict.

    Raises:
        WeightsError: k is NaN, or fewer than 25 draws.

    Example:
        >>> describe_k(0.2, 4000)
        'good: k-hat 0.20; the guide can be corrected by its importance weights.'

    References:
        Vehtari et al. (2024), arXiv:1507.02646. Yao et al. (2018), arXiv:1802.02538.
    """
    if math.isnan(k):
        raise WeightsError("k-hat is NaN, expected a number; take it from psis(), which never returns NaN.")
    threshold = pareto_k_threshold(num_samples)
    if k == -math.inf:
        return "good: all importance weights are equal; the guide is the posterior up to rounding."
    if k >= 0.5 and largest <= most_even(num_samples):
        return (
            f"good: no weight is more than {largest:.1f} times their mean, so that they have no heavy tail; k-hat "
            f"{k:.2f} describes the largest of them, which lie close together."
        )
    if k >= threshold:
        return _describe_bad(k, num_samples, threshold)
    if k < 0.5:
        verdict = f"good: k-hat {k:.2f}; the guide can be corrected by its importance weights."
    else:
        verdict = (
            f"usable: k-hat {k:.2f}, below {threshold:.2f}; the importance weights have no finite variance. "
            "Use the smoothed weights, never the guide's draws as they are."
        )
    noisy = f" k-hat is noisy at {num_samples} draws: take {_STEADY_DRAWS} or more to be sure."
    return verdict + (noisy if num_samples < _STEADY_DRAWS else "")


def _describe_bad(k: float, num_samples: int, threshold: float) -> str:
    if k == math.inf:
        return (
            "bad: no tail could be fitted; a few draws carry all the weight. Do not use the weights: train "
            "longer, or choose a richer guide."
        )
    text = f"bad: k-hat {k:.2f}, not below {threshold:.2f}; "
    if k < 0.7:
        return text + f"{num_samples} draws are too few for this tail. Take {_STEADY_DRAWS} or more."
    return text + (
        "the guide misses part of the posterior and its weights cannot correct it at any practical number of "
        "draws. Train longer, choose a richer guide (full covariance, a flow), or reparameterize the model."
    )


def _smooth(
    x: Float[Tensor, "*batch draws"],
) -> tuple[Float[Tensor, "*batch draws"], Float[Tensor, "*batch"]]:
    """Replace the tail of log weights, whose largest is 0, by quantiles of its Pareto fit."""
    top = x.topk(_tail_length(x.shape[-1]) + 1, dim=-1)
    cutoff = top.values[..., -1:].clamp(min=_LOG_TINY)
    values, where = top.values[..., :-1], top.indices[..., :-1]
    in_tail = values > cutoff
    # exp(value) - exp(cutoff) without cancellation; draws outside the tail become padding
    excesses = torch.where(in_tail, cutoff.exp() * (values - cutoff).expm1(), 0.0)
    k, sigma = fit_pareto(excesses)
    quantiles = (cutoff.exp() + _quantiles(k, sigma, in_tail)).log().clamp(max=0.0)
    keep = ~in_tail | k.isinf()[..., None]
    return x.scatter(-1, where, torch.where(keep, values, quantiles)), k


def _quantiles(
    k: Float[Tensor, "*batch"], sigma: Float[Tensor, "*batch"], in_tail: Tensor
) -> Float[Tensor, "*batch tail"]:
    """GPD quantiles at (j - 1/2) / n, largest first, n being the number of draws in the tail."""
    size = in_tail.sum(-1, keepdim=True)
    rank = size - torch.arange(in_tail.shape[-1], dtype=torch.float64, device=in_tail.device)
    exponential = -torch.log1p(-((rank - 0.5) / size).clamp(min=0.0))  # the quantiles of k = 0
    shape = k[..., None]
    flat = shape.abs() < torch.finfo(torch.float64).eps
    curved = torch.expm1(shape * exponential) / torch.where(flat, 1.0, shape)
    return sigma[..., None] * torch.where(flat, exponential, curved)


def _grid(x: Float[Tensor, "*batch tail"], size: Tensor) -> Float[Tensor, "*batch grid"]:
    """Zhang and Stephens' grid for b: 30 + sqrt(n) points, then NaN; x is sorted, largest first."""
    points = 30 + size.double().sqrt().floor()[..., None]
    index = torch.arange(1, 31 + math.isqrt(x.shape[-1]), dtype=torch.float64, device=x.device)
    # the floor(n / 4 + 1/2)-th smallest excess, the first quartile
    quartile = x.gather(-1, (size - (size + 2) // 4)[..., None])
    grid = (1 - (points / (index - 0.5)).sqrt()) / (3 * quartile) + 1 / x[..., :1]
    return grid.masked_fill(index > points, torch.nan)


def _tail_length(draws: int) -> int:
    return math.ceil(min(draws / 5, 3 * math.sqrt(draws)))


def _has_few_values(raw: Float[Tensor, "*batch draws"], eps: float) -> Tensor:
    """Return whether the largest weights take fewer values than a tail needs; rounding makes no new value."""
    top = raw.topk(_tail_length(raw.shape[-1]) + 1, dim=-1).values
    apart = -top.diff(dim=-1) > 8 * eps * raw.amax(-1, keepdim=True).abs().clamp(min=1.0)
    return apart.sum(-1) + 1 < MIN_TAIL


def _bounded_k(normalized: Float[Tensor, "*batch draws"]) -> Float[Tensor, "*batch"]:
    """Return log(max / mean) / log(S) of weights, or infinity at the limit and above."""
    draws = normalized.shape[-1]
    k = 1 + normalized.amax(-1) / math.log(draws)
    return k.masked_fill(k >= pareto_k_threshold(draws), torch.inf)


def _is_constant(raw: Float[Tensor, "*batch draws"], eps: float) -> Tensor:
    largest = raw.amax(-1)
    tolerance = (math.sqrt(eps) * largest.abs().clamp(min=1.0)).clamp(max=0.1)
    return largest - raw.amin(-1) <= tolerance


def _check(log_weights: Tensor) -> None:
    if not log_weights.is_floating_point():
        raise WeightsError(f"log_weights have dtype {log_weights.dtype}, expected float64; cast them.")
    _check_draws(log_weights.shape[-1] if log_weights.dim() else 1)
    bad = log_weights.isnan() | (log_weights == torch.inf)
    if bad.any():
        nans = int(log_weights.isnan().sum())
        raise WeightsError(
            f"log_weights hold {nans} NaN and {int(bad.sum()) - nans} +inf among {log_weights.numel()} "
            f"values, the first at index {tuple(bad.nonzero()[0].tolist())}; expected finite values or -inf "
            "(a weight of zero). Find the site whose log density is not finite, in the model or the guide."
        )
    finite = log_weights.isfinite().sum(-1)
    if (finite < MIN_DRAWS).any():
        row = tuple((finite < MIN_DRAWS).nonzero()[0].tolist())
        raise WeightsError(
            f"log_weights{list(row) if row else ''} hold {int(finite[row])} weights above zero among "
            f"{log_weights.shape[-1]} draws, expected at least {MIN_DRAWS}; draw more, or give the guide the "
            "support of the model."
        )


def _check_draws(draws: int) -> None:
    if draws < MIN_DRAWS:
        raise WeightsError(
            f"{draws} draws, expected at least {MIN_DRAWS} so that a Pareto tail can be fitted; "
            f"set num_samples to {_STEADY_DRAWS} or more."
        )
