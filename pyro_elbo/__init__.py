"""The evidence lower bound of Pyro programs as terms to see and to steer."""

from pyro_elbo.calibration import Calibration, Verdict, simulation_based_calibration
from pyro_elbo.diagnosis import Diagnosis, Finding, SplitComparison, active_units, compare_splits, diagnose
from pyro_elbo.errors import PyroElboError
from pyro_elbo.evidence import (
    CodeLength,
    CodeLengthDifference,
    EvidenceBracket,
    LogEvidence,
    bidirectional_evidence,
    code_length,
    log_evidence,
)
from pyro_elbo.information import MutualInformation, Penalty, PenaltyContext, PenaltyTerm, TotalCorrelation
from pyro_elbo.objectives import TraceBeta_ELBO, TraceIW_ELBO, TraceMI_ELBO, TraceTimestep_ELBO
from pyro_elbo.plots import plot_history, plot_tradeoff
from pyro_elbo.posterior import LinearResponse, ParetoK, infer_discrete, linear_response, loo, pareto_k, to_arviz
from pyro_elbo.representation import Audit, KLDecomposition, audit, kl_decomposition
from pyro_elbo.schedules import Capacity, Constant, Cyclical, LinearWarmup, Schedule, SigmoidWarmup
from pyro_elbo.sequences import scan
from pyro_elbo.terms import Terms
from pyro_elbo.tradeoff import RateDistortion, rate_distortion, sweep
from pyro_elbo.training import SVI, ConvergenceReport, FitResult, Summary, fit, load, watch

__version__ = "0.1.0"

__all__ = [
    "SVI",
    "Audit",
    "Calibration",
    "Capacity",
    "CodeLength",
    "CodeLengthDifference",
    "Constant",
    "ConvergenceReport",
    "Cyclical",
    "Diagnosis",
    "EvidenceBracket",
    "Finding",
    "FitResult",
    "KLDecomposition",
    "LinearResponse",
    "LinearWarmup",
    "LogEvidence",
    "MutualInformation",
    "ParetoK",
    "Penalty",
    "PenaltyContext",
    "PenaltyTerm",
    "PyroElboError",
    "RateDistortion",
    "Schedule",
    "SigmoidWarmup",
    "SplitComparison",
    "Summary",
    "Terms",
    "TotalCorrelation",
    "TraceBeta_ELBO",
    "TraceIW_ELBO",
    "TraceMI_ELBO",
    "TraceTimestep_ELBO",
    "Verdict",
    "active_units",
    "audit",
    "bidirectional_evidence",
    "code_length",
    "compare_splits",
    "diagnose",
    "fit",
    "infer_discrete",
    "kl_decomposition",
    "linear_response",
    "load",
    "log_evidence",
    "loo",
    "pareto_k",
    "plot_history",
    "plot_tradeoff",
    "rate_distortion",
    "scan",
    "simulation_based_calibration",
    "sweep",
    "to_arviz",
    "watch",
]
