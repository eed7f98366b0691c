"""Training loops: single steps (``SVI``) or epochs on Lightning (``fit``), and the history of a fit.

Takes programs and data; gives trained parameters and ``FitResult``, which draws, predicts, exports and saves.
``SVI.converge`` and ``fit(lr="auto")`` are ``converge``: it asks of programs what ``comparable`` checks, judges
``iterates`` by ``stationarity`` and ends in a ``convergence`` report.
``options`` checks the arguments of ``fit``, ``trained`` finds what it trains, ``lightning`` adapts it to Lightning's
Trainer (imported when ``fit`` is called), ``checkpoint`` reads and writes files.
Imports plots and below.
"""

from pyro_elbo.training.convergence import ConvergenceReport
from pyro_elbo.training.fit import fit
from pyro_elbo.training.result import FitResult, load
from pyro_elbo.training.summary import Summary
from pyro_elbo.training.svi import SVI
from pyro_elbo.training.watching import watch

__all__ = ["ConvergenceReport", "FitResult", "SVI", "Summary", "fit", "load", "watch"]
