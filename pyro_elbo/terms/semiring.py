r"""The two ways in which an elimination adds up values: by their sum, and by their maximum.

.. math:: \log \sum_k \prod_f f(k_f), \qquad \max_k \sum_f \log f(k_f)

Multiplication distributes over both, so that one elimination serves them. Both are read by their derivative with
respect to the logarithms of the factors. That of the sum is the posterior of the values that a factor depends on. That
of the maximum is 1 at those of the most probable joint values and 0 elsewhere: every maximum passes its derivative to
one of its arguments, the first among equals. Along a scan this is the algorithm of Viterbi.

References:
    Viterbi (1967), Error bounds for convolutional codes and an asymptotically optimum decoding algorithm; Darwiche
    (2003), A differential approach to inference in Bayesian networks.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_elbo.programs import step_before
from pyro_elbo.terms.labeled import Label, Labeled, add, is_time


class Semiring(NamedTuple):
    """A way to add up the values of a variable, and those of a scan's state over all paths."""

    over_values: Callable[[Labeled, str], Labeled]
    over_paths: Callable[[Sequence[Labeled], Labeled, str], Labeled]


def log_sum_exp(x: Labeled, variable: str) -> Labeled:
    """Return log Σ exp over the values of a site; where every value is impossible, -inf with gradient zero."""
    dim = _dim_of(x, variable)
    top = x.x.detach().amax(dim, keepdim=True).clamp(min=torch.finfo(x.x.dtype).min)
    total = (x.x - top).exp().sum(dim)
    possible = total > 0
    log = torch.where(possible, total, torch.ones_like(total)).log() + top.squeeze(dim)
    return _without(x, dim, torch.where(possible, log, log.new_full((), -math.inf)))


def maximum(x: Labeled, variable: str) -> Labeled:
    """Return the maximum over the values of a site; its gradient is that of the first value that attains it."""
    dim = _dim_of(x, variable)
    return _without(x, dim, x.x.max(dim).values)


def maximum_over_paths(pairs: Sequence[Labeled], nodes: Labeled, state: str) -> Labeled:
    """Return the share of each step in the maximum over paths: arguments as of :func:`sum_paths`."""
    size = next(a.size for a in nodes.labels if a.name == state)
    own = [Label("value", n, 0, size) for n in (step_before(state), state)]
    log_f = add([nodes, *pairs]).expand(own)
    time = next(a for a in log_f.labels if is_time(a))
    shares = _viterbi(log_f.x.movedim([log_f.labels.index(a) for a in (time, *own)], [0, 1, 2]))
    order = tuple(a for a in log_f.labels if a not in own)
    return Labeled(shares.movedim(0, order.index(time)), order)


def _viterbi(f: Tensor) -> Tensor:
    """Return the shares of all steps in the largest sum over paths; ``f`` has shape (T, K before, K, *rest)."""
    best = torch.cat([torch.zeros_like(f[0, :1, 0]), torch.full_like(f[0, 1:, 0], -torch.inf)])
    shares = []
    for row in f:
        best = (best.unsqueeze(1) + row).max(0).values
        shares.append(best.detach().amax(0).clamp(min=torch.finfo(f.dtype).min))
        best = best - shares[-1]
    return torch.stack([*shares[:-1], shares[-1] + best.max(0).values])


def _dim_of(x: Labeled, variable: str) -> int:
    return next(i for i, a in enumerate(x.labels) if a.kind == "value" and a.name == variable)


def _without(x: Labeled, dim: int, reduced: Tensor) -> Labeled:
    return Labeled(reduced, x.labels[:dim] + x.labels[dim + 1 :])


MAXIMUM = Semiring(maximum, maximum_over_paths)
