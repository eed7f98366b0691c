"""The evidence lower bound of Pyro programs as terms that one can see and steer."""

from pyro_elbo.elbo import TraceBeta_ELBO
from pyro_elbo.errors import PyroElboError
from pyro_elbo.schedules import Capacity, Constant, Cyclical, LinearWarmup, Schedule, SigmoidWarmup
from pyro_elbo.terms import Terms

__version__ = "0.1.0"

__all__ = [
    "Capacity",
    "Constant",
    "Cyclical",
    "LinearWarmup",
    "PyroElboError",
    "Schedule",
    "SigmoidWarmup",
    "Terms",
    "TraceBeta_ELBO",
]
