"""Calibration of a fit on data whose true parameters are known.

Takes a model, a function that fits, and arguments of the model; gives ``Calibration``: ranks, tests, words, figures.
``simulate`` draws parameters and data, ``posteriors`` reads what a fit returned, ``ranks`` compares the two,
``verdicts`` tests the ranks, ``run`` spreads simulations over processes, ``result`` and ``plots`` show them.
Imports training and below.
"""

from pyro_elbo.calibration.result import Calibration
from pyro_elbo.calibration.run import simulation_based_calibration
from pyro_elbo.calibration.verdicts import Verdict

__all__ = ["Calibration", "Verdict", "simulation_based_calibration"]
