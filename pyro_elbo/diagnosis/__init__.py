"""Diagnosis of training: what the bound and its terms say about a fit, in words, with the evidence beside it.

Takes a training history, programs and data, or terms; gives ``Diagnosis``, a tuple of ``Finding``, active units, and
the comparison of two splits (``splits``, from terms by row in ``rows``).
``probe`` measures what the bound alone does not show, ``activity`` counts units that move with the data, ``reading``
checks a history, ``evidence`` takes its curves, ``rules`` judges them, a function per finding (``trends``,
``latents``), ``findings`` holds the words.
Imports objectives and below.
"""

from pyro_elbo.diagnosis.activity import active_units, are_active
from pyro_elbo.diagnosis.evidence import named_points
from pyro_elbo.diagnosis.findings import Diagnosis, Finding
from pyro_elbo.diagnosis.probe import MAX_ROWS, Call, Probe, ProbeData, ProbeRecord, are_local, cost_in_steps
from pyro_elbo.diagnosis.reading import read_history
from pyro_elbo.diagnosis.recorded import probe_variables
from pyro_elbo.diagnosis.rows import rows_of
from pyro_elbo.diagnosis.rules import diagnose
from pyro_elbo.diagnosis.splits import Gap, SplitComparison, compare_splits

__all__ = [
    "Call",
    "Diagnosis",
    "Finding",
    "Gap",
    "MAX_ROWS",
    "Probe",
    "ProbeData",
    "ProbeRecord",
    "SplitComparison",
    "active_units",
    "are_active",
    "are_local",
    "compare_splits",
    "cost_in_steps",
    "diagnose",
    "named_points",
    "probe_variables",
    "read_history",
    "rows_of",
]
