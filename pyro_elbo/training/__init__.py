"""Training loops: single steps (``SVI``) or epochs on Lightning (``fit``), and the history of a fit.

Takes programs and data; gives trained parameters, ``FitResult`` and its history as a Dataset. ``lightning`` adapts
programs to Lightning's Trainer; ``fit`` imports it when called.
Imports compile and below.
"""

from pyro_elbo.training.fit import FitResult, fit
from pyro_elbo.training.svi import SVI

__all__ = ["FitResult", "SVI", "fit"]
