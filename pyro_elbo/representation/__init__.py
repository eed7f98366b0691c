"""Audits of a trained representation: fresh probes, fairness of predictions, and the decomposition of the KL.

Takes draws or a fitted model; gives ``Audit`` and ``KLDecomposition``.
Imports objectives and below.
"""

from pyro_elbo.representation.audit import Audit, Fairness, audit
from pyro_elbo.representation.kl_decomposition import KLDecomposition, kl_decomposition
from pyro_elbo.representation.probes import Estimate, Readout

__all__ = ["Audit", "Estimate", "Fairness", "KLDecomposition", "Readout", "audit", "kl_decomposition"]
