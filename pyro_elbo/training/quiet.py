"""Train without a trace in the caller's process: random state, warnings, log levels."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pyro


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore the caller's random state, and silence Lightning's advertisements and advice."""
    import lightning  # noqa: F401  (sets its loggers' levels when imported)

    state = pyro.util.get_rng_state()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", module=r"lightning|torch\.distributed|torch\.nn\.parallel|torch\.utils\.data"
            )
            warnings.filterwarnings("ignore", message=r".*(fork\(\)|LeafSpec|treespec|barrier\(\)).*")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        pyro.util.set_rng_state(state)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
