r"""Draw the latents that a model sums out from their exact posterior.

Given the guide's draws z, each summed-out site is drawn from p(k | x, z), given those before it. The weight of such a
draw is that of the sum,

.. math:: \frac{p(x, z, k)}{q(z)\, p(k \mid x, z)} = \frac{\sum_k p(x, z, k)}{q(z)}.

The path of a scan's state is drawn by a scan. Given the data it is a Markov chain too, whose transitions are the
posterior of each pair of states over that of the first of them:

.. math:: p(k_{1:T} \mid x) = \prod_t \frac{\xi_t(k_{t-1}, k_t)}{\sum_k \xi_t(k_{t-1}, k)}.
"""

import math
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

from pyro_elbo.assumptions import check_or_defer
from pyro_elbo.errors import SiteError
from pyro_elbo.masking import masked
from pyro_elbo.programs import MOST_ENTRIES, Program, Site, TracePair, complete_guide
from pyro_elbo.sequences import StackedDistribution, scan
from pyro_elbo.terms import Term, Terms, connected, evaluate_run

RECORD = "log likelihood of "
"""The sites of a completed guide that hold the log likelihood of data without what is summed out."""


def draw_summed_out(model: Program, guide: Program) -> Program:
    """Return a guide that also draws the latents that the model sums out."""
    return complete_guide(model, guide, _draw, _log_likelihoods)


def room_for_draws(shapes: TracePair) -> float:
    """Return how many draws fit into one run of the programs, at least 2; no bound where nothing is summed out.

    Every draw of the guide has densities of its own over all values of the sites that are summed out after it.
    """
    drawn = [n for n, s in shapes.guide.items() if s.is_drawn] + shapes.summed_out
    sizes = [s.stepwise().log_prob().numel() for s in shapes.model.values() if s.depends_on]
    return max(2, MOST_ENTRIES // max(sizes)) if sizes and len(drawn) > 1 else math.inf


def _log_likelihoods(run: TracePair) -> dict[str, Tensor]:
    """Return log Σ_k p(k) p(x | k) per row of the data, for sites whose summed-out parents belong to their own rows."""
    terms, model, found = evaluate_run(run, "sampled"), run.model, {}
    depends_on = {n: s.depends_on.intersection(run.summed_out) for n, s in model.items()}
    for names in connected({n: parents for n, parents in depends_on.items() if parents}):
        summed, others = names.intersection(run.summed_out), names.difference(run.summed_out)
        rows = {frozenset(model[n].plates) for n in names}
        if len(rows) == len(others) == 1 and model[name := others.pop()].role == "observed":
            found[RECORD + name] = terms[name].nats - sum(terms[n].nats for n in summed)
    return found


def _draw(run: TracePair, name: str) -> None:
    """Draw a summed-out site from its posterior: the whole path of a scan's state.

    A draw of the guide under which the data are impossible has weight zero, whatever values are drawn after it.

    Raises:
        NonFiniteError: the data are impossible although the guide has drawn nothing.
    """
    terms, site = evaluate_run(run, "sampled"), run.model[name]
    if not any(s.is_drawn for s in run.guide.values()):
        check_possible(run, terms)
    term = terms[name]
    check_masked(site, term)
    assert term.posterior is not None
    if isinstance(site.fn, StackedDistribution):
        # Without a carry there is one state before.
        pairs = term.posterior.unsqueeze(-2) if term.pairs is None else term.pairs()
        _draw_path(site, site.fn, in_plates(run, site, pairs, 3).movedim(-3, 0))
    else:
        q = term.posterior
        q = torch.where(q.sum(-1, keepdim=True) > 0, q, torch.ones_like(q) / q.shape[-1])
        pyro.sample(name, _over_support(site, in_plates(run, site, q, 1)))


def _draw_path(site: Site, fn: StackedDistribution, pairs: Tensor) -> None:
    """Draw the path of a scan's state by a scan, given the posterior of each pair of states, time first."""
    total = pairs.sum(-1, keepdim=True)
    chain = torch.where(total > 0, pairs / total, torch.ones_like(pairs) / pairs.shape[-1])
    counted: Any = torch.as_tensor(True if fn.counted is None else fn.counted)
    counted = counted.expand(torch.broadcast_shapes(counted.shape, (len(chain),))).movedim(-1, 0)

    def step(before: Tensor, x: tuple[Tensor, Any]) -> tuple[Tensor, None]:
        transition, counts = x
        with poutine.mask(mask=counts):
            k = pyro.sample(site.name, _over_support(site, (before.unsqueeze(-1) * transition).sum(-2)))
        return _one_hot(site, k, transition.shape[-1]).to(before.dtype), None

    start = torch.zeros_like(chain[0, ..., 0])
    start[..., 0] = 1
    scan(step, start, (chain, counted), name=fn.run.time)


def check_possible(run: TracePair, terms: Mapping[str, Term]) -> None:
    """Raise NonFiniteError, which names site and row, where no values of the latents can have the data."""
    Terms(dict(terms), run.particle_dim, torch.zeros(())).check_finite()


def check_masked(site: Site, term: Term) -> None:
    """Raise SiteError where a summed-out site is masked and its posterior is not its prior."""
    site, nats = site.stepwise(), (term.steps or term).nats
    mask = None if site.mask is None else ~torch.as_tensor(site.mask)
    if mask is not None and not check_or_defer(masked(nats, mask).abs().max() <= 1e-4):
        raise SiteError(
            f"Site '{site.name}' is masked in rows whose data depend on it: it is summed out there under its prior, "
            "which the mask hides from the density of a draw. Give what depends on it the same mask."
        )


def in_plates(run: TracePair, site: Site, probs: Tensor, event_dim: int) -> Tensor:
    """Expand probabilities to the plates of a site, and to the particles on which they depend."""
    sizes = {p.dim: p.size for p in site.plates}
    if run.particle_dim is not None and probs.dim() - event_dim >= -run.particle_dim:
        sizes[run.particle_dim] = probs.shape[run.particle_dim - event_dim]
    batch = [sizes.get(d, 1) for d in range(min(sizes, default=0), 0)]
    return probs.expand(batch + list(probs.shape[probs.dim() - event_dim :]))


def _over_support(site: Site, probs: Tensor) -> TorchDistributionMixin:
    """Return the distribution with these probabilities over the support of a site."""
    fn: Any = site.stepwise().fn
    if isinstance(fn, Bernoulli):
        return dist.Bernoulli(probs[..., 1].clamp(max=1.0))
    if isinstance(fn, OneHotCategorical):
        return dist.OneHotCategorical(probs)
    if isinstance(fn, Categorical):
        return dist.Categorical(probs)
    raise SiteError(
        f"Site '{site.name}' is summed out with a {type(fn).__name__}: draws are offered for Bernoulli, Categorical "
        "and OneHotCategorical. Write the site as a Categorical over its support, or give it a place in the guide."
    )


def _one_hot(site: Site, value: Tensor, size: int) -> Tensor:
    """Return the position of a value in the support of a site."""
    if isinstance(site.stepwise().fn, OneHotCategorical):
        return value
    return torch.nn.functional.one_hot(value.long(), size)
