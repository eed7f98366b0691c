"""Scan a Pyro program over time, and filter a model and guide by sequential Monte Carlo.

Takes a step program and tensors over time; gives one site for each site of the step, with time as a dimension of its
event. ``scan`` runs the steps (``inputs`` of all of them, the scan as a ``function`` of tensors), ``enumerated`` runs
them with all values of a discrete state at once, ``collect`` hides the sites of each, ``carry`` checks what one hands
to the next, ``step`` emits the sites over all steps, each with a distribution of ``stacked``. ``smc`` runs the scans of
model and guide together and resamples, ``particles`` lets modules broadcast over particles.
Imports masking, assumptions and errors.
"""

from pyro_elbo.sequences.collect import SUMS_PATHS, is_subsample
from pyro_elbo.sequences.scan import scan
from pyro_elbo.sequences.smc import Filter, filtering, run_loop
from pyro_elbo.sequences.stacked import StackedDistribution, fill_masked

__all__ = [
    "SUMS_PATHS",
    "Filter",
    "StackedDistribution",
    "fill_masked",
    "filtering",
    "is_subsample",
    "run_loop",
    "scan",
]
