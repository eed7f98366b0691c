r"""Draw the latents that a model sums out from their exact posterior.

Given the guide's draws z, each summed-out site is drawn from p(k | x, z), given those before it. The weight of such a
draw is that of the sum,

.. math:: \frac{p(x, z, k)}{q(z)\, p(k \mid x, z)} = \frac{\sum_k p(x, z, k)}{q(z)}.
"""

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

from pyro_elbo.errors import SiteError
from pyro_elbo.masking import masked
from pyro_elbo.programs import Program, TracePair, complete_guide
from pyro_elbo.sequences import StackedDistribution
from pyro_elbo.terms import connected, evaluate_run

RECORD = "log likelihood of "
"""The sites of a completed guide that hold the log likelihood of data without what is summed out."""


def draw_summed_out(model: Program, guide: Program, shapes: TracePair) -> Program:
    """Return a guide that also draws the latents that the model sums out.

    Args:
        shapes: a run of both programs.

    Raises:
        SiteError: a site is the state of a scan.
    """
    if states := [n for n in shapes.summed_out if isinstance(shapes.model[n].fn, StackedDistribution)]:
        raise SiteError(
            f"The states {states} of a pe.scan are summed out: whole paths of them are not drawn. Take their posterior "
            "from terms.posterior, or write the scan as a loop with pyro.markov, whose states are drawn."
        )
    return complete_guide(model, guide, _posterior, _log_likelihoods)


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


def _posterior(run: TracePair, name: str) -> TorchDistributionMixin:
    """Return the posterior of a summed-out site as a distribution over its own support."""
    term, site = evaluate_run(run, "sampled")[name], run.model[name]
    probs, fn = term.posterior, site.fn
    assert probs is not None
    if site.mask is not None and masked(term.nats, ~torch.as_tensor(site.mask)).abs().max() > 1e-4:
        raise SiteError(
            f"Site '{name}' is masked in rows whose data depend on it: it is summed out there under its prior, which "
            "the mask hides from the density of a draw. Give what depends on it the same mask."
        )
    sizes = {p.dim: p.size for p in site.plates}
    if run.particle_dim is not None and probs.dim() > -run.particle_dim:
        sizes[run.particle_dim] = probs.shape[run.particle_dim - 1]
    probs = probs.expand([sizes.get(d, 1) for d in range(min(sizes, default=0), 0)] + [probs.shape[-1]])
    if isinstance(fn, Bernoulli):
        return dist.Bernoulli(probs[..., 1].clamp(max=1.0))
    if isinstance(fn, OneHotCategorical):
        return dist.OneHotCategorical(probs)
    if isinstance(fn, Categorical):
        return dist.Categorical(probs)
    raise SiteError(
        f"Site '{name}' is summed out with a {type(fn).__name__}: draws are offered for Bernoulli, Categorical and "
        "OneHotCategorical. Write the site as a Categorical over its support, or give it a place in the guide."
    )
