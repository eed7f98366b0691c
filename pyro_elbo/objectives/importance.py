r"""Tighter bounds than the ELBO, from several particles.

.. math:: L_K = \sum_n s_n \log \frac1K \sum_k w_{nk}, \qquad
    \log w_{nk} = \log p(x_n, z_{nk}) - \log q(z_{nk} \mid x_n)

per row n of the plates that all sites share, scaled to the full data outside of the logarithm (inside it is no bound).
The Rényi bound has :math:`\frac{1}{1 - \alpha} \log \frac1K \sum_k w_{nk}^{1 - \alpha}` in its place: :math:`L_K` at
:math:`\alpha = 0`, the ELBO at :math:`\alpha = 1`.

References:
    Li, Turner (2016), Rényi divergence variational inference, arXiv:1602.02311;
    Burda, Grosse, Salakhutdinov (2016), arXiv:1509.00519; Mnih, Rezende (2016), arXiv:1602.06725 (the gradient of sites
    without pathwise gradient).
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_elbo.errors import SiteError
from pyro_elbo.masking import log_mean_exp, masked
from pyro_elbo.objectives.baselines import refuse_baselines
from pyro_elbo.objectives.gradients import Gradient
from pyro_elbo.terms import Term, scaled_sum


def importance_weighted(
    sites: Mapping[str, Term],
    weighted: Mapping[str, Tensor],
    constant: float | Tensor,
    particle_dim: int | None,
    alpha: float = 0.0,
    gradient: Gradient = "auto",
) -> Float[Tensor, ""]:
    """The importance-weighted bound, with its gradient.

    Args:
        sites: the terms, sampled and not analytic.
        weighted: the charge for each KL site, shaped like the term's nats.
        constant: nats subtracted once.
        particle_dim: the batch dimension of the particles, if any.
        alpha: the order of the Rényi bound.
        gradient: ``"auto"``, ``"dreg"`` (the terms have a ``direct``) or ``"rloo"``.

    Raises:
        SiteError: the data are subsampled, and a latent lies outside of their plate; or a site without pathwise
            gradient has a weight other than one.
    """
    if expected := [n for n, t in sites.items() if t.expected]:
        raise SiteError(
            f"The terms of {expected} are expectations over sites that the guide enumerates: they have no importance "
            "weights. Leave these sites out of the guide and mark them in the model, which sums them out exactly."
        )
    fixed = [t for t in sites.values() if t.kind == "constant"]  # in no row, and the same for all particles
    sites = {n: t for n, t in sites.items() if t.kind != "constant"}
    keep = _shared_dims(sites, particle_dim)
    refuse_baselines(sites)
    if particle_dim is not None:
        weighted = {n: _with_score(sites[n], x) for n, x in weighted.items()}
    log_w = sum(_kept(-weighted[n] if t.is_kl else t.nats, keep) for n, t in sites.items())
    assert isinstance(log_w, Tensor)
    bound = log_w if particle_dim is None else renyi(log_w, particle_dim, alpha)
    if gradient == "dreg":
        bound = _doubly_reparameterized(sites, log_w, bound, keep, particle_dim, alpha)
    scores = [_kept(t.score, keep) for t in sites.values() if t.score is not None]
    if scores:
        gain = _gain_over_others if gradient == "rloo" else _signal
        score = sum(scores) * gain(log_w, bound, particle_dim, alpha).detach()
        score = score if particle_dim is None else score.sum(particle_dim, keepdim=True)
        bound = bound + score - score.detach()
    total = (bound * shared_scale(sites)).sum() - constant
    return sum((scaled_sum(t, t.nats, particle_dim) for t in fixed), start=total)


def renyi(log_w: Tensor, dim: int, alpha: float) -> Tensor:
    """Return the Rényi bound of log weights over a dimension, kept with size one."""
    if alpha == 1:
        return log_w.mean(dim, keepdim=True)
    return log_mean_exp((1 - alpha) * log_w, dim) / (1 - alpha)


def _doubly_reparameterized(
    sites: Mapping[str, Term], log_w: Tensor, bound: Tensor, keep: set[int], particle_dim: int | None, alpha: float
) -> Tensor:
    """Return the bound with the gradient ``dreg``: see :mod:`pyro_elbo.objectives.gradients`."""
    if scored := [name for name, t in sites.items() if t.score is not None]:
        raise SiteError(
            f"The sites {scored} have no pathwise gradient, which gradient='dreg' needs of every draw. Use "
            "gradient='rloo'."
        )
    signed = [-t.direct if t.is_kl else t.direct for t in sites.values() if t.direct is not None]
    direct = torch.as_tensor(sum(_kept(x, keep) for x in signed))
    scaled = (1 - alpha) * log_w.detach()
    weights = torch.ones_like(scaled) if particle_dim is None else scaled.softmax(particle_dim)
    parts = weights * direct + (alpha * weights + (1 - alpha) * weights.square()) * (log_w - direct)
    parts = parts if particle_dim is None else parts.sum(particle_dim, keepdim=True)
    return bound.detach() + parts - parts.detach()


def _with_score(term: Term, charge: Tensor) -> Tensor:
    """Return a site's charge with the gradient of log q, also where the draw has no pathwise one.

    Its mean is zero under q, but not under the weights w_k / Σ w that the logarithm of a mean puts on it.
    """
    if term.score is None:
        return charge
    if charge is not term.nats:
        raise SiteError(
            f"Site '{term.name}' has no pathwise gradient: inside log weights its KL must have weight one. Use "
            "beta=1 without free_bits, or the ELBO."
        )
    steps = term.steps
    if steps is None or steps.score is None:
        log_q = masked(term.score, term.mask)
    else:
        log_q = masked(steps.score, steps.mask).sum(-1)
    return charge + log_q - log_q.detach()


def _gain_over_others(log_w: Tensor, bound: Tensor, particle_dim: int | None, alpha: float) -> Tensor:
    """Return the gain in the bound over that of the other particles alone."""
    assert particle_dim is not None
    count = log_w.shape[particle_dim]
    index = [[j for j in range(count) if j != k] for k in range(count)]
    others = log_w.movedim(particle_dim, -1)[..., torch.tensor(index, device=log_w.device)]
    return bound - renyi(others, -1, alpha).squeeze(-1).movedim(-1, particle_dim)


def _signal(log_w: Tensor, bound: Tensor, particle_dim: int | None, alpha: float) -> Tensor:
    """Return the gain in the bound over a particle whose log weight is the mean of the others'."""
    if particle_dim is None or log_w.shape[particle_dim] == 1:
        return bound
    count = log_w.shape[particle_dim]
    others = (log_w.sum(particle_dim, keepdim=True) - log_w) / (count - 1)
    eye = torch.eye(count, dtype=torch.bool, device=log_w.device)
    moved = log_w.movedim(particle_dim, -1)
    without = torch.where(eye, others.movedim(particle_dim, -1).unsqueeze(-1), moved.unsqueeze(-2))
    return bound - renyi(without, -1, alpha).squeeze(-1).movedim(-1, particle_dim)


def _shared_dims(sites: Mapping[str, Term], particle_dim: int | None) -> set[int]:
    """Return the dimensions of independent rows: those of plates around every site, and the particles'."""
    shared = set.intersection(*(set(t.plates) for t in sites.values()))
    for name, term in sites.items():
        others = [p for p in term.plates if p not in shared and p.size != p.full_size]
        if others:
            raise SiteError(
                f"Site '{name}': plate '{others[0].name}' is subsampled, but not all sites lie in it, so that no row "
                "has a weight of its own and the bound would not be one. Take the full data, or put every latent "
                "into the plate."
            )
    return {p.dim for p in shared} | ({particle_dim} if particle_dim is not None else set())


def _kept(x: Tensor, keep: set[int]) -> Tensor:
    """Sum over all dimensions but those to keep."""
    gone = [d for d in range(-x.dim(), 0) if d not in keep]
    return x.sum(gone, keepdim=True) if gone else x


def shared_scale(sites: Mapping[str, Term]) -> float | Tensor:
    """Return the scale that all sites share, in the model and in the guide.

    Raises:
        SiteError: they differ.
    """
    scales = {name: t.scale for name, t in sites.items()}
    first = next(iter(scales.values()))
    for name, term in sites.items():
        draws = [site for t in (term, term.steps) if t is not None for site in t.draws]
        in_guide = {f"{name} in the guide": site.scale for site in draws} if term.is_kl else {}
        scales |= {label: scale for label, scale in in_guide.items() if scale is not term.scale}
    if any(isinstance(s, Tensor) or s != first for s in scales.values()):
        raise SiteError(
            f"The sites differ in scale, or have one per row: {scales}. Log weights of a row need one number. Scale "
            "model and guide alike, as a whole (the plate's subsampling does)."
        )
    return first
