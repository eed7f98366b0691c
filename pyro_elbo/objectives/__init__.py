"""The objectives: ``pyro.infer.ELBO`` subclasses over bound, weighting, gradient estimator and penalties.

Takes programs and data; gives ``Terms`` with the objective that training maximizes. ``elbo`` adapts to Pyro,
``variants`` names settings, ``weighting`` applies beta, ``importance`` is the importance-weighted bound,
``score_function`` the gradient of sites without a pathwise one, ``gradients`` the estimators, ``baselines`` what
Pyro's ``infer={"baseline": ...}`` subtracts from rewards, ``step_count`` counts steps for the schedules.
Imports information, terms and below.
"""

from pyro_elbo.objectives.elbo import TermsModule, TraceBeta_ELBO
from pyro_elbo.objectives.variants import TraceIW_ELBO, TraceMI_ELBO, TraceTimestep_ELBO

__all__ = ["TermsModule", "TraceBeta_ELBO", "TraceIW_ELBO", "TraceMI_ELBO", "TraceTimestep_ELBO"]
