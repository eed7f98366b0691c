r"""Log p(x) of a model, by importance sampling from the guide or by annealed importance sampling.

.. math:: p(x) = E_{q(z)} \Big[\frac{p(x, z)}{q(z)}\Big]

Annealing replaces the one step from q to the posterior by many small ones: see :mod:`pyro_elbo.evidence.annealing`.
"""

from collections.abc import Mapping
from typing import Any

import torch

from pyro_elbo.display import progress_bar
from pyro_elbo.errors import ArgumentError, check_choice, check_count
from pyro_elbo.evidence.annealing import Annealing, anneal
from pyro_elbo.evidence.batches import check_rows, row_batches
from pyro_elbo.evidence.result import LogEvidence, WeightSums, join_rows
from pyro_elbo.posterior import draw_in_chunks
from pyro_elbo.programs import (
    Program,
    check_initialized,
    check_options,
    check_programs,
    evaluating,
    program_arguments,
    seeded,
)

MAX_ELEMENTS = 2**24  # of the largest array of a chunk: 64 MB in single precision


def log_evidence(
    model: Program,
    guide: Program | None,
    *args: Any,
    num_samples: int | None = None,
    method: str = "importance",
    start: str | None = None,
    num_temperatures: int | None = None,
    num_leapfrog: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    seed: int | None = 0,
    **kwargs: Any,
) -> LogEvidence:
    r"""Estimate log p(x) of a model: per datum where plates allow, otherwise one number for all data.

    .. math:: \log \hat p(x) = \log \frac1S \sum_s w_s, \qquad
        w_s = \frac{p(x, z_s)}{q(z_s)} \quad \text{or} \quad
        w_s = \prod_t \Big(\frac{p(x, z_{s,t})}{f_0(z_{s,t})}\Big)^{\beta_{t+1} - \beta_t}

    Both estimates are lower bounds in expectation, and tighten as S grows. Importance sampling is cheap, and exact
    where the guide is; it fails, from below, where the guide misses part of the posterior. Annealed importance
    sampling (``method="ais"``) walks from a start f_0 to the posterior through the densities
    :math:`f_0^{1 - \beta} p(x, z)^\beta` with Hamiltonian Monte Carlo on the real line, and depends on the guide
    little, or with ``start="prior"`` not at all. A pilot run of other chains tunes temperatures per row, and step sizes
    per row and coordinate; then both are fixed.

    Programs run in evaluation mode, without gradients of their parameters. Draws come in chunks, so memory is bounded
    by that of one run of the programs on all rows, or on ``batch_size`` of them.

    Args:
        model: the generative program.
        guide: its variational posterior; may be None for ``method="ais"`` from the prior.
        args, kwargs: arguments of both; NumPy arrays and data frames become tensors.
        num_samples: draws per row (1000), or chains per row for AIS (16).
        method: ``importance`` or ``ais``.
        start: where annealing starts, ``prior`` (by default) or ``guide``.
        num_temperatures: steps of the annealing. By default as many as the pilot asks for, 100 to 4000: the square of
            the thermodynamic distance of the farthest row, times 4.
        num_leapfrog: leapfrog steps of a transition, 2 by default. Few of them with many temperatures are best, except
            where latents are strongly correlated under the posterior, or the guide to start from is much narrower.
        batch_size: rows at a time; all by default. Tensors as long as the first one are split.
        progress: show a progress bar.
        seed: seed of the draws; None continues the caller's random stream.

    Returns:
        ``LogEvidence`` in nats: estimates, standard errors, effective sample sizes.

    Raises:
        ArgumentError: an option is misspelled, out of range or without use for the method; fewer than 2 draws.
        GuideError: a guide that is a point estimate in some latent, or one that has never run.
        SiteError: a subsampled plate; for AIS a discrete latent, or one whose support depends on others.
        NonFiniteError: data that are NaN.
        WeightsError: weights that are NaN, all zero, or not those of a posterior (different scales of sites).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.8))
        >>> x = torch.tensor([1.0, -2.0])
        >>> log_evidence(model, guide, x, progress=False)
        Log evidence in nats by importance sampling, 1000 draws
                            total standard error    per datum
          log p(x)        -3.7746         0.0070      -1.8873
          effective draws per row of 'data': median 974, least 974 of 1000
        >>> dist.Normal(0.0, 2**0.5).log_prob(x).sum()  # exact
        tensor(-3.7810)

    References:
        Burda, Grosse, Salakhutdinov (2016), arXiv:1509.00519 (importance sampling); Neal (2001), arXiv:physics/9803008
        (AIS); Wu, Burda, Salakhutdinov, Grosse (2017), arXiv:1611.04273 (of decoders).
    """
    check_options(model, kwargs)
    check_choice("method", method, ("importance", "ais"))
    args, kwargs = program_arguments(model, args, kwargs)
    annealing = _annealing(method, start=start, num_temperatures=num_temperatures, num_leapfrog=num_leapfrog)
    count = num_samples if num_samples is not None else 1000 if annealing is None else 16
    check_count("num_samples", count, least=2)
    needs_guide = annealing is None or annealing.start == "guide"
    if guide is None and needs_guide:
        raise ArgumentError("guide must be a program, got None. Only method='ais' with start='prior' does without.")
    programs = [model] if guide is None else [model, guide]
    check_programs(model, model if guide is None else guide)
    if needs_guide:
        check_initialized(guide)
    parts = []
    with seeded(seed), evaluating(*programs):
        for part_args, part_kwargs, rows in row_batches(args, kwargs, batch_size):
            if annealing is not None:
                weighed = anneal(model, guide, part_args, part_kwargs, count, annealing, rows, progress)
            else:
                assert guide is not None
                weighed = _importance(model, guide, part_args, part_kwargs, count, rows, progress)
            parts.append(weighed)
    return join_rows(parts)


def _annealing(method: str, **settings: Any) -> Annealing | None:
    """Return the settings of annealing; None for importance sampling, which has none."""
    given = {name: x for name, x in settings.items() if x is not None}
    if method == "ais":
        annealing = Annealing(**given)
        annealing.check()
        return annealing
    for name, x in given.items():
        raise ArgumentError(f"{name}={x!r} is a setting of annealing: pass method='ais' with it, or leave it out.")
    return None


def _importance(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    count: int,
    rows: int | None,
    progress: bool,
) -> LogEvidence:
    """Estimate by draws of the guide, in chunks."""
    sums, plate, shared = WeightSums(), None, 0.0
    with torch.no_grad(), progress_bar(progress, total=count, unit=" draws") as bar:
        for draws in draw_in_chunks(model, guide, args, kwargs, count, MAX_ELEMENTS):
            local = draws.local_log_weight
            check_rows(draws.data_plate, local is not None, rows)
            if draws.weights_error is not None:
                raise draws.weights_error
            sums.add(draws.log_weight if local is None else local)
            if local is not None and draws.data_plate is not None:
                plate = draws.data_plate.name
                shared = (draws.log_weight[0] - local[0].sum()).item() if draws.constants else 0.0
            bar.update(len(draws.log_p))
    return sums.result("importance", plate, shared)
