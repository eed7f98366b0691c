"""Training steps, in Python or as one compiled graph under guard.

Takes programs, objective and optimizer; gives steps with the totals of each. ``steps`` decides which steps to compile,
``capture`` traces them on ``fakes``, ``batch_scalars`` and ``flat_state`` shrink the graph, ``inductor`` makes machine
code, ``guard`` watches what the graph froze, ``optimizer`` steps parameters. The first capture imports what is heavy.
Imports objectives and below.
"""

from pyro_elbo.compile.optimizer import PyroUpdate, TorchUpdate
from pyro_elbo.compile.steps import CompiledSVI, StepTotals

__all__ = ["PyroUpdate", "StepTotals", "CompiledSVI", "TorchUpdate"]
