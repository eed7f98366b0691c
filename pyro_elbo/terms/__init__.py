"""The terms of the bound: the log-likelihood or KL of each site before any reduction, and their totals.

Takes a ``TracePair``; gives a ``Term`` per site (``evaluate``; ``enumerated`` where discrete sites
are summed out, ``branches`` where the programs run once per value) and ``Terms``, the value that users see.
``numbered_sites`` joins the sites ``z_0, z_1, ...`` of a written-out loop into one term over time.
Imports programs and below.
"""

from pyro_elbo.terms.branches import evaluate_branches
from pyro_elbo.terms.chain import Chain, messages
from pyro_elbo.terms.enumerated import evaluate_run, most_probable
from pyro_elbo.terms.evaluate import KLForm, univariate
from pyro_elbo.terms.numbered_sites import Normalize, SequenceBound, divisor, join_numbered_sites
from pyro_elbo.terms.particles import map_particles, stack_particles
from pyro_elbo.terms.summed_out import WeightOf, connected
from pyro_elbo.terms.term import Term, data_plate, frames, is_one, num_data, scaled_sum
from pyro_elbo.terms.terms import Terms

__all__ = [
    "Chain",
    "messages",
    "KLForm",
    "Normalize",
    "SequenceBound",
    "Term",
    "Terms",
    "WeightOf",
    "connected",
    "data_plate",
    "divisor",
    "evaluate_branches",
    "evaluate_run",
    "frames",
    "is_one",
    "num_data",
    "join_numbered_sites",
    "map_particles",
    "most_probable",
    "scaled_sum",
    "stack_particles",
    "univariate",
]
