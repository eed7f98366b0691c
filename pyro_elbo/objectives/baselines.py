r"""Baselines of score-function sites, as in Pyro's TraceGraph_ELBO: ``infer={"baseline": {...}}`` of a guide's site.

.. math:: \nabla E_q[R] = E_q[(R - b)\,\nabla \log q(z)] + E_q[\nabla R]

for any b that z has no influence on: the decaying average of earlier rewards, and what a network predicts from the
site's context. The network's parameters follow the gradient of :math:`(R - b)^2`, by the optimizer of the programs.

References:
    Mnih, Gregor (2014), arXiv:1402.0030.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_elbo.assumptions import is_capturing
from pyro_elbo.errors import NonFiniteError, SiteError, count_nonfinite, describe, first_sentence
from pyro_elbo.masking import broadcasts
from pyro_elbo.programs import Baseline
from pyro_elbo.ranks import is_in_parts, total
from pyro_elbo.terms import Term


def subtract_baseline(
    term: Term, reward: Tensor, average: Tensor | None, particle_dim: int | None
) -> tuple[Tensor, Tensor | None]:
    """Return the reward of a site less its baseline, and the loss of what predicts it, mean over particles.

    Args:
        term: the site's term.
        reward: its reward, a constant.
        average: the decaying average of earlier rewards; None before the first step.
        particle_dim: the batch dimension of the particles, if any.
    """
    baseline = of(term)
    if baseline is None:
        return reward, None
    value = reward.new_zeros(())
    if baseline.decaying and average is not None:
        changed = _changed(average, reward if particle_dim is None else reward.mean(particle_dim))
        value = average.mean(changed, keepdim=True) if changed else average
    if not baseline.predicts:
        return reward - value, None
    value = value + _predicted(term, reward, particle_dim)
    count = 1 if particle_dim is None else reward.shape[particle_dim]
    return reward - value.detach(), (reward - value).square().sum() / count


def of(term: Term) -> Baseline | None:
    """Return the baseline of a site, which only the score function has a use for.

    Raises:
        SiteError: the site has a pathwise gradient.
    """
    baseline = term.draws[0].baseline if term.draws else None
    if baseline is not None and term.score is None:
        raise SiteError(
            f"Site '{term.name}' has a baseline but a pathwise gradient, which needs none. Remove it from infer."
        )
    return baseline


def refuse_baselines(sites: Mapping[str, Term]) -> None:
    """Raise SiteError where a site has a baseline, under a bound that compares particles by itself."""
    for name, term in sites.items():
        if any(site.baseline is not None for site in term.draws):
            raise SiteError(
                f"Site '{name}' has a baseline, but the reward in an importance-weighted bound is compared with that "
                "of the other particles. Remove it from infer, or use the ELBO."
            )


def moved_average(term: Term, reward: Tensor, old: Tensor | None, particle_dim: int | None) -> Tensor | None:
    """Return the decaying average after this reward; None for a site without one.

    Rows that differ from step to step, those of a subsample, of batches that change their size and of processes that
    hold parts of a batch, share one average.
    """
    baseline = of(term)
    if baseline is None or not baseline.decaying:
        return None
    new = reward if particle_dim is None else reward.mean(particle_dim)
    shared = [p.dim for p in term.plates if (p.size != p.full_size or is_in_parts()) and new.dim() >= -p.dim]
    if old is not None:
        changed = _changed(old, new)
        old = old.mean(changed, keepdim=True) if changed else old
        shared += changed
    new = _mean_of_parts(new.sum(shared, keepdim=True), new) if shared else new
    return (1 - baseline.decay) * new + (0.0 if old is None else baseline.decay * old)


def _mean_of_parts(summed: Tensor, x: Tensor) -> Tensor:
    """Divide a sum over rows, of all processes that hold parts of the batch, by their number."""
    return total(summed) / total(x.new_full((), x.numel() // summed.numel()))


def _changed(old: Tensor, new: Tensor) -> list[int]:
    """Return the dimensions in which the average has another size than the rewards."""
    return [d for d in range(-new.dim(), 0) if new.shape[d] != old.shape[d]]


def _predicted(term: Term, reward: Tensor, particle_dim: int | None) -> Tensor:
    """Return what the networks of all runs predict, shaped like the reward."""
    looped = particle_dim is not None and len(term.draws) > 1
    shape = reward.shape[1:] if looped else reward.shape
    if looped and len(term.draws) != reward.shape[0]:
        raise SiteError(
            f"Site '{term.name}' has a baseline, but is not in every particle. Use gradient='rloo' instead."
        )
    predicted = [_predict(term.name, site.baseline) for site in term.draws if site.baseline is not None]
    for x in predicted:
        if not broadcasts(x, shape):
            raise SiteError(
                f"Site '{term.name}': expected a baseline of shape {tuple(shape)}, got "
                f"{tuple(x.shape)}. Give the network's output one number per row, as by .squeeze(-1)."
            )
    return torch.stack([x.expand(shape) for x in predicted]) if looped else predicted[0].expand(shape)


def _predict(name: str, baseline: Baseline) -> Tensor:
    if baseline.network is None:
        assert baseline.value is not None
        return baseline.value
    detached = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, baseline.input)
    try:
        predicted = baseline.network(detached)
    except (TypeError, ValueError, RuntimeError) as error:
        if is_capturing():
            raise
        shapes = pytree.tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__, detached)
        raise SiteError(
            f"Site '{name}': its nn_baseline does not take its nn_baseline_input of shape {shapes}: "
            f"{first_sentence(error)} Give it rows and columns as the network expects them, such as x[:, None]."
        ) from error
    if not isinstance(predicted, Tensor):
        raise SiteError(f"Site '{name}': expected a tensor from nn_baseline, got {describe(predicted)}.")
    return predicted


def check_finite(sites: Mapping[str, Term]) -> None:
    """Raise NonFiniteError for the first site whose baseline predicts NaN or infinity."""
    for name, term in sites.items():
        for site in term.draws:
            if site.baseline is None or not site.baseline.predicts:
                continue
            predicted = _predict(name, site.baseline)
            if not torch.isfinite(predicted).all():
                raise NonFiniteError(
                    f"Site '{name}': its baseline: {count_nonfinite(predicted)}. Look for NaN in nn_baseline_input or "
                    "baseline_value, or a network that has diverged."
                )
