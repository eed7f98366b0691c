"""Model and guide as typed records. No other room reads Pyro's messages of a whole program.

Takes the programs and their arguments; gives ``TracePair``: a ``Site`` per sample statement, with its plates, scale and
mask. ``parameters`` collects what programs ask of the parameter store, ``explain`` turns failures of Pyro and torch
into the library's errors, ``rng`` derives seeds.
Imports sequences and below.
"""

from pyro_elbo.programs.explain import failed_line
from pyro_elbo.programs.parameters import Parameters, captured_parameters, check_initialised
from pyro_elbo.programs.rng import mix_seed, seeded
from pyro_elbo.programs.sites import (
    Plate,
    Program,
    Run,
    Site,
    Unobserve,
    by_dim,
    guess_plate_nesting,
    random_rows,
    run,
    run_filter,
    trace_program,
)

__all__ = [
    "Parameters",
    "Plate",
    "Program",
    "Run",
    "Site",
    "Unobserve",
    "by_dim",
    "captured_parameters",
    "check_initialised",
    "failed_line",
    "guess_plate_nesting",
    "mix_seed",
    "random_rows",
    "run",
    "run_filter",
    "seeded",
    "trace_program",
]
