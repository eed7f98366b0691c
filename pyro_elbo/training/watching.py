"""Watch a fit while it trains."""

from typing import TYPE_CHECKING

from pyro_elbo.errors import ArgumentError, check_count, describe

if TYPE_CHECKING:
    from lightning import Callback


def watch(stop: bool = False, patience: int = 2) -> "Callback":
    """Return a callback for ``pe.fit(callbacks=...)`` that diagnoses training while it runs.

    It looks at the history after every probe, says a finding once when it has stood in ``patience`` probes in a row,
    with its cure, and trains on unless it is asked to stop. What only the end of training shows (``not converged``,
    ``warm-up too long``) is left to ``result.diagnosis``.

    Args:
        stop: whether to end training there.
        patience: the probes in a row. Probes come after the first epoch of a fit of at least 400 steps, and then
            every 200; compiled, these are 4000 and 2000, and probes are at least a quarter of the steps before apart.

    Raises:
        ArgumentError: ``stop`` is no bool, or ``patience`` is less than 1.

    Example:
        >>> import pyro_elbo as pe
        >>> callback = pe.watch(stop=True)  # pe.fit(model, guide, train, valid, callbacks=callback)
    """
    if not isinstance(stop, bool):
        raise ArgumentError(f"stop must be True or False, got {describe(stop)}.")
    check_count("patience", patience)
    from pyro_elbo.training.callbacks import Watch

    return Watch(stop, patience)
