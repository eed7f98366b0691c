"""The trade-off between rate and distortion: points of fits, a sweep over β, the curve through them.

Takes fit results or terms, or a function from β to these; gives a Dataset of points and ``RateDistortion``.
``points`` measures, ``sweep`` spreads fits over processes, ``curve`` holds the hull, ``plot`` draws it.
Imports training and below.
"""

from pyro_elbo.tradeoff.curve import RateDistortion, rate_distortion
from pyro_elbo.tradeoff.sweep import sweep

__all__ = ["RateDistortion", "rate_distortion", "sweep"]
