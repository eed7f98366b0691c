"""The evidence lower bound of Pyro programs as terms that one can see and steer."""

from pyro_elbo.audit import Audit, audit
from pyro_elbo.decomposition import KLDecomposition, kl_decomposition
from pyro_elbo.elbo import TraceBeta_ELBO
from pyro_elbo.errors import PyroElboError
from pyro_elbo.evidence import ParetoK, loo, pareto_k
from pyro_elbo.export import to_arviz
from pyro_elbo.fit import FitResult, fit
from pyro_elbo.objectives import TraceIW_ELBO, TraceMI_ELBO, TraceTimestep_ELBO
from pyro_elbo.penalties import MutualInformation, TotalCorrelation
from pyro_elbo.plots import plot_history, plot_tradeoff
from pyro_elbo.scan import scan
from pyro_elbo.schedules import Capacity, Constant, Cyclical, LinearWarmup, Schedule, SigmoidWarmup
from pyro_elbo.svi import SVI
from pyro_elbo.terms import Terms

__version__ = "0.1.0"

__all__ = [
    "SVI",
    "Audit",
    "Capacity",
    "Constant",
    "Cyclical",
    "FitResult",
    "KLDecomposition",
    "LinearWarmup",
    "MutualInformation",
    "ParetoK",
    "PyroElboError",
    "Schedule",
    "SigmoidWarmup",
    "Terms",
    "TotalCorrelation",
    "TraceBeta_ELBO",
    "TraceIW_ELBO",
    "TraceMI_ELBO",
    "TraceTimestep_ELBO",
    "audit",
    "fit",
    "kl_decomposition",
    "loo",
    "pareto_k",
    "plot_history",
    "plot_tradeoff",
    "scan",
    "to_arviz",
]
