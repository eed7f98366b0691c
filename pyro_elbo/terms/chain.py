r"""Sum a discrete state over all its paths through time: the forward-backward algorithm.

.. math:: \log \sum_{k_{1:T}} \prod_t f_t(k_{t-1}, k_t)

With forward messages :math:`\alpha_t(k)` and backward messages :math:`\beta_t(k)` the posterior of a pair of states is
proportional to :math:`\alpha_{t-1}(k')\, f_t(k', k)\, \beta_t(k)`. It is the derivative of the sum with respect to
:math:`\log f_t(k', k)`. Messages are logarithms, normalized at every step. The cost is linear in T.

References:
    Rabiner (1989), A tutorial on hidden Markov models and selected applications in speech recognition.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_elbo.assumptions import active_loop
from pyro_elbo.sequences import run_loop
from pyro_elbo.terms.labeled import Label, Labeled, is_time, sort_labels


def log_sum_paths(log_f: Labeled, state: str, before: str) -> Labeled:
    """Return the share of each step in the log sum over paths; its gradient is the posterior of each pair of states.

    Args:
        log_f: the log factor of each step over the states now and before, with time. At the first step all states
            before are one.
        state: the variable of the state now.
        before: that of the state before.
    """
    return over_paths(log_f, state, before, _log_sum)


def over_paths(log_f: Labeled, state: str, before: str, add_up: Callable[[Tensor], Tensor]) -> Labeled:
    """Return the shares of all steps that ``add_up`` finds for log factors of shape (T, K before, K, *rest)."""
    size = next(a.size for a in log_f.labels if a.kind == "value" and a.name in (state, before))
    log_f = log_f.expand([Label("value", n, 0, size) for n in (state, before)])
    labels = log_f.labels
    time = next(a for a in labels if is_time(a))
    own = [time, Label("value", before, 0, size), Label("value", state, 0, size)]
    f = log_f.x.movedim([labels.index(a) for a in own], [0, 1, 2])
    shares = add_up(f)
    order = sort_labels([a for a in labels if a == time or a not in own])
    return Labeled(shares.movedim(0, order.index(time)), order)


def _log_sum(f: Tensor) -> Tensor:
    with torch.no_grad():
        increments, pairs = _forward_backward(f)
    possible = torch.where(pairs > 0, f, torch.zeros_like(f))
    return increments + (pairs * (possible - possible.detach())).sum((1, 2))


def _forward_backward(f: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p(x_t | x_<t) of each step and the posterior of each pair of states.

    Args:
        f: log factors, shape (T, K before, K, *rest).
    """
    total, k = f.shape[:2]
    lowest = torch.finfo(f.dtype).min
    start = f.new_zeros((k, *f.shape[3:]))
    first = (torch.arange(k, device=f.device) == 0).reshape(k, *(1,) * (start.dim() - 1))
    start = torch.where(first, start, -torch.inf)

    def forward(state: list[Tensor], row: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        new = (state[0].unsqueeze(1) + row[0]).logsumexp(0)
        increment = new.logsumexp(0)
        return [new - increment.clamp(min=lowest)], [state[0], increment]

    def backward(state: list[Tensor], row: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        new = (row[0] + state[0]).logsumexp(1)
        return [new - new.amax(0).clamp(min=lowest)], [state[0]]

    loop = (active_loop() if total > 1 else None) or run_loop
    _, (alpha, increments) = loop(forward, [start], [f], total, False)
    _, (beta,) = loop(backward, [torch.zeros_like(start)], [f], total, True)
    log_pairs = alpha.unsqueeze(2) + f + beta.unsqueeze(1)
    top = log_pairs.amax((1, 2), keepdim=True).clamp(min=lowest)
    weights = (log_pairs - top).exp()
    return increments, weights / weights.sum((1, 2), keepdim=True).clamp(min=torch.finfo(f.dtype).tiny)
