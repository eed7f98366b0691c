"""A Pyro program as one step of a sequence, and the steps of two programs side by side.

Takes step programs and tensors over time; gives one site per step site, with time in its event. ``scan`` runs the
steps, ``step`` hides their sites and states them stacked, ``stacked`` is the distribution over all steps, ``smc``
runs model and guide together with resampling.
Imports masking, assumptions, errors.
"""

from pyro_elbo.sequences.scan import scan
from pyro_elbo.sequences.smc import Filter, filtering
from pyro_elbo.sequences.stacked import StackedDistribution, fill_masked

__all__ = ["Filter", "StackedDistribution", "fill_masked", "filtering", "scan"]
