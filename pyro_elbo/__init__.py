"""The evidence lower bound of Pyro programs as terms that one can see and steer."""

from pyro_elbo.elbo import TraceBeta_ELBO, TraceIW_ELBO, TraceTimestep_ELBO
from pyro_elbo.errors import PyroElboError
from pyro_elbo.evidence import ParetoK, loo, pareto_k
from pyro_elbo.export import to_arviz
from pyro_elbo.fit import FitResult, fit
from pyro_elbo.plots import plot_history
from pyro_elbo.scan import scan
from pyro_elbo.schedules import Capacity, Constant, Cyclical, LinearWarmup, Schedule, SigmoidWarmup
from pyro_elbo.svi import SVI
from pyro_elbo.terms import Terms

__version__ = "0.1.0"

__all__ = [
    "SVI",
    "Capacity",
    "Constant",
    "Cyclical",
    "FitResult",
    "LinearWarmup",
    "ParetoK",
    "PyroElboError",
    "Schedule",
    "SigmoidWarmup",
    "Terms",
    "TraceBeta_ELBO",
    "TraceIW_ELBO",
    "TraceTimestep_ELBO",
    "fit",
    "loo",
    "pareto_k",
    "plot_history",
    "scan",
    "to_arviz",
]
