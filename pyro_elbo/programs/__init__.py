"""Model and guide as typed records. No other room reads Pyro's messages of a whole program.

Takes the programs and their arguments; gives ``TracePair``: a ``Site`` per sample statement, with its plates, scale and
mask. ``parameters`` collects what programs ask of the parameter store, ``explain`` turns failures of Pyro and torch
into the library's errors, ``rng`` derives seeds.
Imports sequences and below.
"""

from pyro_elbo.programs.explain import failed_line
from pyro_elbo.programs.parameters import Parameters, check_initialized, collect_parameters
from pyro_elbo.programs.rng import mix_seed, seeded
from pyro_elbo.programs.sites import (
    Plate,
    Program,
    Site,
    TracePair,
    Unobserve,
    find_plate_nesting,
    sort_by_dim,
    subsampled_rows,
    trace_filtered,
    trace_pair,
    trace_program,
)

__all__ = [
    "Parameters",
    "Plate",
    "Program",
    "TracePair",
    "Site",
    "Unobserve",
    "sort_by_dim",
    "collect_parameters",
    "check_initialized",
    "failed_line",
    "find_plate_nesting",
    "mix_seed",
    "subsampled_rows",
    "trace_pair",
    "trace_filtered",
    "seeded",
    "trace_program",
]
