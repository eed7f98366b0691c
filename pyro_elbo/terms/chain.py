r"""Sum a discrete state over all its paths through time: the forward-backward algorithm.

.. math:: \log \sum_{k_{1:T}} \prod_t A_t(k_{t-1}, k_t)\, e_t(k_t)

With forward messages :math:`\alpha_t(k)` and backward messages :math:`\beta_t(k)` the posterior of a pair of states is
proportional to :math:`\alpha_{t-1}(k')\, A_t(k', k)\, e_t(k)\, \beta_t(k)`. It is the derivative of the sum with
respect to :math:`\log A_t(k', k)`. Messages are logarithms, normalized at every step. The cost is linear in T.

A, which joins two states, seldom depends on the row; e depends on one state. They are kept apart: only the posterior of
a pair has an entry for each row, step and pair of states, and a compiled step averages over it without storing it.

References:
    Rabiner (1989), A tutorial on hidden Markov models and selected applications in speech recognition.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_elbo.assumptions import active_loop
from pyro_elbo.programs import step_before
from pyro_elbo.sequences import run_loop
from pyro_elbo.terms.labeled import Label, Labeled, add, is_time, sort_labels


class Chain(NamedTuple):
    """The log factors of a chain and its messages, as logarithms.

    Attributes:
        pair: log A over the state before and now, (T or 1, rows or 1, K, K).
        node: log e over the state now, (T, rows, K).
        before: the message of the state before each step from the data before it, normalized; then that of the last
            state, (T + 1, rows, K).
        after: the message of the state before each step from the data at and after it, (T, rows, K).
        later: that of the state now from the data after it: the next ``after`` up to a constant, (T, rows, K).
        increments: log p(x_t | x_<t) of each step, (T, rows).
    """

    pair: Tensor
    node: Tensor
    before: Tensor
    after: Tensor
    later: Tensor
    increments: Tensor

    def pairs(self) -> Tensor:
        """Return the posterior of each pair of states, (T, rows, K, K)."""
        return _normalize(self.before[:-1].unsqueeze(-1) + self.pair + (self.node + self.later).unsqueeze(-2), 2)

    def average(self, x: Tensor) -> Tensor:
        """Return the mean of x (T or 1, rows or 1, K, K) under the posterior of each pair of states, (T, rows)."""
        return (self.pairs() * x).sum((-1, -2))


@dataclass(frozen=True)
class Paths:
    """The posterior of a state's paths, given what tells the rows apart.

    Attributes:
        chain: the log factors and messages.
        log_pair: log A, with its labels.
        own: the labels of the state before and now.
        labels: time, then those of the rows.
        shares: the share of each step in the log sum.
    """

    chain: Any
    log_pair: Labeled
    own: tuple[Label, Label]
    labels: tuple[Label, ...]
    shares: Labeled

    def move(self, shares: Tensor, nodes: Labeled) -> Labeled:
        """Return ``shares``, with the derivative of the log sum with respect to the log factor of the state now."""
        node, now = _flatten(nodes.expand(self.labels), self.labels, self.own[1:]), _now(self.chain)
        possible = torch.where(now > 0, node, torch.zeros_like(node))
        return self.shares.map(shares) + self._named((now * (possible - possible.detach())).sum(-1))

    def now(self) -> Labeled:
        """Return the posterior of each state."""
        return self._named(_now(self.chain), self.own[1])

    def pairs(self) -> Labeled:
        """Return the posterior of each pair of states."""
        return self._named(self.chain.pairs(), *self.own)

    def reached(self) -> Labeled:
        """Return 1 at the steps to which some path leads, and 0 at the others."""
        return self._named((self.chain.increments > -torch.inf).to(self.chain.node.dtype))

    def expect(self, x: Labeled) -> Labeled:
        """Return the mean of a function of both states; what is impossible counts zero."""
        possible = torch.where(x.x > -torch.inf, x.x, torch.zeros_like(x.x))
        flat = _flatten(x.map(possible), self.labels, self.own).to(self.chain.node.dtype)
        return self._named(self.chain.average(flat))

    def log_conditional(self) -> Labeled:
        """Return E[log q(k_t | k_{t-1})] of each step, q the posterior."""
        _, node, before, after, later, _ = self.chain
        rest = _mean(_now(self.chain), node + later) - _mean(_normalize(before[:-1] + after, 1), after)
        return self.expect(self.log_pair) + self._named(rest)

    def _named(self, x: Tensor, *own: Label) -> Labeled:
        return _name(x, self.labels, own)


def sum_paths(pairs: Sequence[Labeled], nodes: Labeled, state: str) -> Paths:
    """Sum a state over all its paths.

    Args:
        pairs: the log factors of both states. At the first step all states before are one.
        nodes: the log factor of the state now, with time and all labels that its rows may have.
        state: the variable of the state.
    """
    size = next(a.size for a in nodes.labels if a.name == state)
    own = Label("value", step_before(state), 0, size), Label("value", state, 0, size)
    every = {a for x in (nodes, *pairs) for a in x.labels if a not in own}
    labels = (next(a for a in every if is_time(a)), *sort_labels(a for a in every if not is_time(a)))
    node, log_pair = _flatten(nodes.expand(every), labels, own[1:]), add(pairs)
    pair, loop = _flatten(log_pair, labels, own).to(node.dtype), active_loop()
    chain = messages(pair, node) if loop is None else loop.messages(pair, node)
    return Paths(chain, log_pair, own, labels, _name(chain.increments, labels, ()))


def messages(pair: Tensor, node: Tensor) -> Chain:
    """Return a chain with its messages; the factors are laid out as in :class:`Chain`."""
    total, start = len(node), torch.full_like(node[0], -torch.inf)
    start[..., 0] = 0.0

    def forward(state: list[Tensor], row: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        new = (state[0].unsqueeze(-1) + row[0]).logsumexp(-2) + row[1]
        increment = new.logsumexp(-1)
        return [new - finite(increment).unsqueeze(-1)], [state[0], increment]

    def backward(state: list[Tensor], row: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        new = (row[0] + (row[1] + state[0]).unsqueeze(-2)).logsumexp(-1)
        return [new - finite(new.amax(-1, keepdim=True))], [new, state[0]]

    columns = [pair.expand(total, *pair.shape[1:]), node]
    (last,), (before, increments) = run_loop(forward, [start], columns, total, False)
    _, (after, later) = run_loop(backward, [torch.zeros_like(start)], columns, total, True)
    return Chain(pair, node, torch.cat([before, last.unsqueeze(0)]), after, later, increments)


def finite(x: Tensor) -> Tensor:
    """Return a logarithm as a divisor: the lowest number in place of log 0."""
    return x.clamp(min=torch.finfo(x.dtype).min)


def _now(chain: Any) -> Tensor:
    """Return the posterior of each state, (T, rows, K)."""
    return _normalize(chain.before[1:] + chain.later, 1)


def _normalize(log: Tensor, dims: int) -> Tensor:
    """Return probabilities from their logarithms up to a constant, over the last dimensions; 0 where all are 0."""
    over = tuple(range(-dims, 0))
    weights = (log - finite(log.amax(over, keepdim=True))).exp()
    return weights / weights.sum(over, keepdim=True).clamp(min=torch.finfo(log.dtype).tiny)


def _mean(q: Tensor, x: Tensor) -> Tensor:
    return (q * torch.where(q > 0, x, torch.zeros_like(x))).sum(-1)


def _flatten(x: Labeled, labels: tuple[Label, ...], own: tuple[Label, ...]) -> Tensor:
    """Return a tensor of time (or 1), rows (or 1) and the states of ``own``."""
    time, *rows = labels
    full = {*own, *(rows if any(a in x.labels for a in rows) else ())}
    x = x.expand(full)
    order = [a for a in (time, *rows, *own) if a in x.labels]
    y = x.x.permute([x.labels.index(a) for a in order])
    size = math.prod(a.size for a in rows if a in x.labels)
    return y.reshape(time.size if time in x.labels else 1, size, *(a.size for a in own)).contiguous()


def _name(x: Tensor, labels: tuple[Label, ...], own: tuple[Label, ...]) -> Labeled:
    """Return a tensor of time, rows and ``own`` with its labels."""
    found = (*labels, *own)
    order = sort_labels(found)
    return Labeled(x.reshape([a.size for a in found]).permute([found.index(a) for a in order]), order)
