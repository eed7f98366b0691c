"""Trace model and guide and return typed sites. No other room reads the messages of a whole program.

Takes the programs and their arguments; gives ``TracePair``: a ``Site`` per sample statement, with its plates, scale and
mask. ``tracing`` runs the programs, ``messages`` reads their traces, ``checks`` compares the two. ``parameters``
and ``modules`` collect parameters and torch modules, ``modes`` sets evaluation mode, ``explain`` translates failures of
Pyro and torch, ``rng`` derives seeds.
Imports sequences and below.
"""

from pyro_elbo.programs.checks import MOST_ENTRIES, check_options, check_programs
from pyro_elbo.programs.completion import complete_guide
from pyro_elbo.programs.data import (
    as_array,
    as_tensors,
    check_arguments,
    check_dense,
    is_xarray,
    named_columns,
    program_arguments,
)
from pyro_elbo.programs.enumeration import HeldDraws, each_branch, step_before, without_marks
from pyro_elbo.programs.explain import explain_update
from pyro_elbo.programs.modes import evaluating, keeping_modes, module_evaluating
from pyro_elbo.programs.modules import collect_modules, program_name
from pyro_elbo.programs.parameters import (
    Parameters,
    check_gradients,
    check_initialized,
    collect_parameters,
    differentiate,
)
from pyro_elbo.programs.precision import full_precision
from pyro_elbo.programs.rng import mix_seed, mix_seeds, seed_cpu, seeded
from pyro_elbo.programs.sites import Baseline, Plate, Site, check_data, fixed_sites, is_point, shared_plate, sort_by_dim
from pyro_elbo.programs.tracing import (
    Program,
    ResampleObserved,
    RunData,
    SameRows,
    TracePair,
    find_plate_nesting,
    read_data,
    trace_filtered,
    trace_fixed,
    trace_pair,
    trace_program,
    without_own_gradient,
)

__all__ = [
    "MOST_ENTRIES",
    "as_array",
    "as_tensors",
    "check_arguments",
    "check_data",
    "check_dense",
    "named_columns",
    "program_arguments",
    "Baseline",
    "HeldDraws",
    "Parameters",
    "Plate",
    "Program",
    "TracePair",
    "Site",
    "ResampleObserved",
    "SameRows",
    "RunData",
    "read_data",
    "fixed_sites",
    "is_xarray",
    "is_point",
    "shared_plate",
    "sort_by_dim",
    "collect_modules",
    "collect_parameters",
    "complete_guide",
    "check_gradients",
    "check_initialized",
    "check_options",
    "check_programs",
    "differentiate",
    "each_branch",
    "evaluating",
    "explain_update",
    "find_plate_nesting",
    "full_precision",
    "keeping_modes",
    "mix_seed",
    "mix_seeds",
    "module_evaluating",
    "program_name",
    "trace_pair",
    "trace_filtered",
    "trace_fixed",
    "seed_cpu",
    "seeded",
    "step_before",
    "trace_program",
    "without_marks",
    "without_own_gradient",
]
