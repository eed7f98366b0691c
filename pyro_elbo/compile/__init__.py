"""Training steps, in Python or as one compiled graph under guard.

Takes programs, objective and optimizer; gives steps with the totals of each. ``steps`` decides when to compile, from
what each ``known_step`` relies on. ``record`` runs a step on ``fakes`` of known ``layouts`` under a ``recorder``;
``store`` finds its ``code`` on disk. Otherwise ``capture`` makes a functional graph with its ``noise`` as an input,
``nodes``, ``writes``, ``graphs``, ``batch_scalars``, ``packing`` and ``flat_state`` shrink it, and ``inductor``
compiles it. ``executable`` runs a ``course`` of steps on ``packed`` tensors, with noise from ``streams``. ``execution``
notes what a step ran, ``reach`` what that reads, ``guard`` watches it; ``refusals`` and ``unusable`` explain.
``gradients``, ``optimizer`` and ``traced_update`` step parameters, ``start`` takes steps back. ``_torch`` holds all
private names of torch, ``versions`` those tested. Imports objectives and below.
"""

from pyro_elbo.compile.course import Course
from pyro_elbo.compile.optimizer import KeptGradients, PyroUpdate, TorchUpdate
from pyro_elbo.compile.snapshots import Snapshots
from pyro_elbo.compile.steps import Compile, CompiledSVI, StepTotals

__all__ = ["Compile", "Course", "KeptGradients", "PyroUpdate", "Snapshots", "StepTotals", "CompiledSVI", "TorchUpdate"]
