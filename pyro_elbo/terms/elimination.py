r"""Sum discrete variables out of a product of factors that lie in plates.

.. math:: \log Z = \log \sum_{k_1, \ldots, k_m} \prod_f f(k_f)

A variable is summed in its plates, then the rows of a plate are multiplied, from the innermost plate outwards. Sums are
taken as log-sum-exp of added logarithms, so that no product of probabilities underflows. Within a plate the variable
whose sum makes the smallest tensor goes first: a chain is eliminated from its end.

References:
    Obermeyer, Bingham, Jankowiak, Chiu, Pradhan, Rush, Goodman (2019), Tensor variable elimination for plated factor
    graphs, arXiv:1902.03210.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pyro_elbo.errors import SiteError
from pyro_elbo.programs import step_before
from pyro_elbo.terms.labeled import Label, Labeled, add, is_time, sort_labels
from pyro_elbo.terms.semiring import Semiring

Plates = frozenset[Label]


class Factor(NamedTuple):
    """A logarithm over enumerated values, and the plates in which it lies."""

    log: Labeled
    plates: Plates


def log_sum_product(factors: Iterable[Factor], variables: Mapping[str, Plates], semiring: Semiring) -> Labeled:
    """Return log Z per row of the plates that all factors share, over all of time.

    Args:
        factors: those that depend on the variables.
        variables: the plates of each variable.
        semiring: how values are added up; for ``MAXIMUM``, log Z is the largest product.

    Raises:
        SiteError: a factor joins variables of two plates that lie beside each other.
    """
    pending = list(factors)
    root = shared_rows(f.plates for f in pending)
    while True:
        leaf = max((f.plates for f in pending), key=len)
        here = [f.log for f in pending if f.plates == leaf]
        pending = [f for f in pending if f.plates != leaf]
        inside = [v for v, plates in variables.items() if plates == leaf]
        for v in inside:
            here = _sum_out_chain(here, v, leaf, semiring)
        here = _sum_out(here, inside, semiring)
        if leaf == root:
            return add(here)
        pending += [_multiply_rows(x, leaf, root, variables) for x in here]


def shared_rows(plates: Iterable[Plates]) -> Plates:
    """Return the plates that all share, without time."""
    return frozenset(a for a in frozenset.intersection(*plates) if not is_time(a))


def _sum_out_chain(factors: list[Labeled], state: str, plates: Plates, semiring: Semiring) -> list[Labeled]:
    """Sum a state of a scan out of factors over all paths, where one of them joins it with the step before."""
    before = step_before(state)
    if not any(before in x.variables for x in factors):
        return factors
    pairs = [x for x in factors if before in x.variables]
    nodes = [x for x in factors if before not in x.variables and state in x.variables]
    others = [x for x in factors if not x.variables & {state, before}]
    rows = sort_labels({*plates, *(a for x in factors for a in x.labels if a.name == state)})
    zero = Labeled(pairs[0].x.new_zeros([a.size for a in rows]), rows)
    return [*others, semiring.over_paths(pairs, add([zero, *nodes]), state)]


def _multiply_rows(x: Labeled, leaf: Plates, root: Plates, variables: Mapping[str, Plates]) -> Factor:
    """Return a factor, free of the variables of its plates, in the plates of those that it has left."""
    parent = root.union(*(variables[v] for v in x.variables))
    if not parent < leaf:
        raise SiteError(
            f"The sites {sorted(x.variables)} are summed out, lie in different plates of which none holds the other, "
            "and a site in both plates depends on them: the sum has exponentially many parts. Write one of the plates "
            "as a loop (for i in pyro.plate(...)), or draw one of these sites in the guide."
        )
    gone = leaf - parent
    repeats = math.prod(a.size for a in gone if a not in x.labels)
    total = x.sum(gone)
    return Factor(total if repeats == 1 else total * float(repeats), parent)


def _sum_out(factors: list[Labeled], variables: list[str], semiring: Semiring) -> list[Labeled]:
    """Sum variables out of factors, the cheapest first."""
    by_id = dict(enumerate(factors))
    variables = [v for v in variables if any(v in x.variables for x in factors)]
    where = {v: {i for i, x in by_id.items() if v in x.variables} for v in variables}

    def cost(v: str) -> int:
        return math.prod(a.size for a in {a for i in where[v] for a in by_id[i].labels})

    costs = {v: cost(v) for v in variables}
    for i in range(len(factors), len(factors) + len(variables)):
        v = min(costs, key=costs.__getitem__)
        parts = where.pop(v)
        new = by_id[i] = semiring.over_values(add([by_id.pop(j) for j in sorted(parts)]), v)
        del costs[v]
        for other in where:
            if where[other] & parts:
                where[other] = where[other] - parts | {i}
                costs[other] = cost(other)
        assert v not in new.variables
    return list(by_id.values())
