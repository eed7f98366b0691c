"""Train without a trace in the caller's process: random state, warnings, log levels, signals."""

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def stopping_softly(trainer: Any) -> Iterator[None]:
    """Have a first Ctrl-C end training after the step that runs; a second one raises KeyboardInterrupt.

    Several processes cannot agree on the step, so there the first one raises.
    """
    usual = signal.getsignal(signal.SIGINT)
    soft = trainer.world_size == 1 and threading.current_thread() is threading.main_thread()

    def stop(*_: Any) -> None:
        trainer.should_stop = True
        signal.signal(signal.SIGINT, usual)

    try:
        if soft:
            signal.signal(signal.SIGINT, stop)
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns one into the other
            raise KeyboardInterrupt from error
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, usual)
