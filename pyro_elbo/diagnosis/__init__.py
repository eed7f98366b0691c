"""Diagnosis of training: what the bound and its terms say about a fit, in words, with the evidence beside it.

Takes a training history, or programs and data; gives ``Diagnosis``, a tuple of ``Finding``, and active units.
``probe`` measures what the bound alone does not show, ``activity`` counts units that move with the data, ``evidence``
reads a history, ``rules`` judges it, a function per finding (``trends``, ``latents``), ``findings`` holds the words.
Imports objectives and below.
"""

from pyro_elbo.diagnosis.activity import ACTIVE, active_units, spread_of_means
from pyro_elbo.diagnosis.findings import Diagnosis, Finding
from pyro_elbo.diagnosis.probe import MAX_ROWS, Call, Probe, ProbeData, ProbeRecord, are_local
from pyro_elbo.diagnosis.recorded import probe_variables
from pyro_elbo.diagnosis.rules import diagnose

__all__ = [
    "ACTIVE",
    "Call",
    "Diagnosis",
    "Finding",
    "MAX_ROWS",
    "Probe",
    "ProbeData",
    "ProbeRecord",
    "active_units",
    "are_local",
    "diagnose",
    "probe_variables",
    "spread_of_means",
]
