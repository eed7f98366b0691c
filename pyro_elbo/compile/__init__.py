"""Training steps, in Python or as one compiled graph under guard.

Takes programs, objective and optimizer; gives steps with the totals of each. ``steps`` decides when to compile,
``record`` runs a step on ``fakes``, ``store`` finds its machine ``code`` on disk. What no process has compiled,
``capture`` makes a functional graph with its ``noise`` as an input, ``graphs``, ``batch_scalars`` and ``flat_state``
shrink it, and ``inductor`` compiles it. ``executable`` runs the code, with ``snapshots`` of parameters on the way.
``execution`` records what a step ran, ``reach`` finds what that reads, ``guard`` watches it, ``refusals`` explain what
no graph can hold, ``unusable`` why a step changed nothing. ``gradients``, ``optimizer`` and ``traced_update`` step
parameters; ``start`` takes steps back. ``_torch`` holds all private names of torch, ``versions`` those tested.
Imports objectives and below.
"""

from pyro_elbo.compile.optimizer import PyroUpdate, TorchUpdate
from pyro_elbo.compile.snapshots import Snapshots
from pyro_elbo.compile.steps import Compile, CompiledSVI, StepTotals

__all__ = ["Compile", "PyroUpdate", "Snapshots", "StepTotals", "CompiledSVI", "TorchUpdate"]
