"""How probable the data are under a model: estimates of log p(x), and the code length that a bound promises.

Takes programs and data, or ``Terms``; gives ``LogEvidence`` per datum by importance sampling or annealed importance
sampling, bounds of both sides on simulated data (``EvidenceBracket``), and ``CodeLength`` in bits.
``bridge`` holds the densities that annealing walks between, ``hmc`` a step of it, ``pilot`` its plan, ``annealing``
the walk.
Imports posterior and below.
"""

from pyro_elbo.evidence.bidirectional import EvidenceBracket, bidirectional_evidence
from pyro_elbo.evidence.codes import CodeLength, CodeLengthDifference, code_length
from pyro_elbo.evidence.estimate import log_evidence
from pyro_elbo.evidence.result import LogEvidence

__all__ = [
    "CodeLength",
    "CodeLengthDifference",
    "EvidenceBracket",
    "LogEvidence",
    "bidirectional_evidence",
    "code_length",
    "log_evidence",
]
