r"""Terms over time: loops that number their sites, and the divisor of a bound per frame.

.. math:: \sum_t E \log p(x_t \mid z_{\le t}, x_{<t})
    - \sum_t \beta_t\, KL(q(z_t \mid z_{<t}, x) \,\|\, p(z_t \mid z_{<t}))

Sites of :func:`pyro_elbo.scan` have a dimension of time from the start. Here the sites ``z_0, z_1, ...`` of a
written-out loop (``pyro.markov`` or not) get the same form.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from pyro_elbo.errors import SiteError
from pyro_elbo.programs import Plate
from pyro_elbo.terms.term import Term, alike, num_data, num_frames

Normalize = Literal["total", "sequence", "frame", "step"]
SequenceBound = Literal["elbo", "importance", "filtering"]


def join_numbered_sites(sites: Mapping[str, Term]) -> dict[str, Term]:
    """Join the terms of ``z_0, z_1, ...`` into one term ``z`` over time.

    Raises:
        SiteError: the sites of one loop differ in their plates, scale or event.
    """
    loops: dict[str, list[tuple[int, Term]]] = {}
    for name, term in sites.items():
        numbered = re.fullmatch(r"(.+)_(\d+)", name)
        if numbered and term.steps is None and numbered.group(1) not in sites:
            loops.setdefault(numbered.group(1), []).append((int(numbered.group(2)), term))
    joined = {name: sorted(loop, key=lambda x: x[0]) for name, loop in loops.items() if len(loop) > 1}
    where = {term.name: name for name, loop in joined.items() for _, term in loop}
    result: dict[str, Term] = {}
    for name, term in sites.items():
        new = where.get(name, name)
        if new not in result:
            result[new] = _join(new, [t for _, t in joined[new]]) if name in where else term
    return result


def _join(name: str, loop: list[Term]) -> Term:
    first, size = loop[0], len(loop)
    for t in loop:
        same = (t.plates, t.event_shape, t.kind) == (first.plates, first.event_shape, first.kind)
        if not same or not alike(t.scale, first.scale):
            raise SiteError(
                f"Site '{t.name}' differs from '{first.name}' in plates, scale or event shape: the sites of a loop "
                f"over time must be alike to be terms of one '{name}'. Mask what has ended (pyro.poutine.mask), use "
                "pe.scan, or number only sites that are steps."
            )
    if any(site.baseline is not None for t in loop for site in t.draws):
        raise SiteError(
            f"Site '{first.name}' has a baseline, but the sites of the loop become one term '{name}' with one reward. "
            "Use gradient='rloo', or TraceBeta_ELBO, which keeps the sites apart."
        )
    masks = [t.mask for t in loop]
    mask = None
    if any(isinstance(m, Tensor) or m is False for m in masks):
        device = first.nats.device
        masks = [m if isinstance(m, Tensor) else torch.tensor(m is not False, device=device) for m in masks]
        mask = torch.stack(torch.broadcast_tensors(*masks), -1)
    per_dims = [t.per_dim for t in loop if t.per_dim is not None]
    axis = -1 - len(first.event_shape)
    per_dim = None if len(per_dims) < size else lambda: torch.stack([x() for x in per_dims], axis)
    score = None
    if any(t.score is not None for t in loop):
        scores = [torch.zeros_like(t.nats) if t.score is None else t.score for t in loop]
        score = torch.stack(torch.broadcast_tensors(*scores), -1)
    steps = replace(
        first,
        name=name,
        plates=tuple(p._replace(dim=p.dim - 1) for p in first.plates) + (Plate("time", -1, size, size),),
        scale=first.scale.unsqueeze(-1) if isinstance(first.scale, Tensor) else first.scale,
        mask=mask,
        nats=torch.stack(torch.broadcast_tensors(*(t.nats for t in loop)), -1),
        is_analytic=all(t.is_analytic for t in loop),
        score=score,
        draws=tuple(site for t in loop for site in t.draws),
        joint=any(t.joint for t in loop),
        expected=any(t.expected for t in loop),
        posterior=_stack_posteriors(loop),
        independent=None,
        per_dim=per_dim,
    )
    score = None if score is None else score.sum(-1)
    coupled = first.independent
    whole = replace(
        steps, plates=first.plates, scale=first.scale, mask=None, per_dim=None, draws=(), independent=coupled
    )
    return replace(whole, nats=steps.nats.sum(-1), score=score, steps=steps)


def _stack_posteriors(loop: list[Term]) -> Tensor | None:
    """Return the posteriors of summed-out steps, time left of their values; None unless all have one support."""
    found = [t.posterior for t in loop if t.posterior is not None]
    if len(found) < len(loop) or len({x.shape[-1] for x in found}) > 1:
        return None
    return torch.stack(torch.broadcast_tensors(*found), -2)


def divisor(sites: Mapping[str, Term], particle_dim: int | None, normalize: Normalize) -> float | Tensor:
    """Return the divisor of the objective."""
    if normalize == "sequence":
        return float(num_data(sites))
    if normalize == "frame":
        return num_frames(sites, particle_dim)
    return float(max((t.steps.plates[-1].size for t in sites.values() if t.steps is not None), default=1))
