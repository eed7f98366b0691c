"""Where training runs and who watches it: what Lightning's Trainer gets as it is."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyro_elbo.compile import Compile
from pyro_elbo.errors import ArgumentError, describe
from pyro_elbo.training.checks import check_counts, with_python_numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning import Callback
    from lightning.pytorch.loggers import Logger

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True)
class Machine:
    """What Lightning's Trainer gets as it is: where training runs, and who watches."""

    devices: int
    num_nodes: int
    accelerator: str
    precision: str
    logger: "Logger | Sequence[Logger] | None"
    callbacks: "Callback | Sequence[Callback] | None"
    compile: Compile
    is_auto: bool

    def __post_init__(self) -> None:
        with_python_numbers(self)
        check_counts({"devices": self.devices, "num_nodes": self.num_nodes}, {})
        self._check_names()
        self._check_processes()
        if self.precision != "32-true" and self.compile:
            raise ArgumentError("precision: a compiled step has the dtypes of the programs. Use compile=False.")
        if self.is_auto and (self.processes != 1 or self.precision != "32-true"):
            raise ArgumentError(
                "lr='auto' trains on one device, in the dtypes of the programs: leave out devices and "
                "precision, or give lr a number."
            )
        if self.processes > 1 and self.accelerator not in ("auto", "cpu"):
            raise ArgumentError(
                f"{self.processes} processes train on the CPU: use accelerator='cpu', or devices=1 and num_nodes=1."
            )

    @property
    def processes(self) -> int:
        """The number of processes that average their gradients."""
        return self.devices * self.num_nodes

    @property
    def is_launched(self) -> bool:
        """Whether torchrun has started the processes, each of which runs the whole script."""
        from lightning.fabric.plugins.environments import TorchElasticEnvironment

        return TorchElasticEnvironment.detect()

    @property
    def forks(self) -> bool:
        """Whether training runs in processes of its own, which leave their parameters in a file."""
        return self.processes > 1 and not self.is_launched

    def _check_names(self) -> None:
        from lightning import Callback
        from lightning.pytorch.accelerators import AcceleratorRegistry
        from lightning.pytorch.loggers import Logger

        known = ("auto", "gpu", *sorted(AcceleratorRegistry.available_accelerators()))
        for name, given, allowed in (
            ("accelerator", self.accelerator, known),
            ("precision", self.precision, PRECISIONS),
        ):
            if not isinstance(given, str) or given not in allowed:
                raise ArgumentError(f"{name} must be one of {', '.join(allowed)}, got {describe(given)}.")
        _check_each("logger", self.logger, Logger, "lightning.pytorch.loggers.CSVLogger('logs')")
        _check_each("callbacks", self.callbacks, Callback, "lightning.pytorch.callbacks.LearningRateMonitor()")

    def _check_processes(self) -> None:
        """Compare devices and nodes with what torchrun has started."""
        if not self.is_launched:
            if self.num_nodes > 1:
                raise ArgumentError(
                    f"num_nodes={self.num_nodes}: start the script on every node by torchrun --nnodes={self.num_nodes} "
                    f"--nproc-per-node={self.devices} --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT script.py."
                )
            return
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        if (self.devices, self.num_nodes) != (local, world // local):
            raise ArgumentError(
                f"torchrun has started {local} processes on each of {world // local} nodes, and devices={self.devices},"
                f" num_nodes={self.num_nodes}: pass devices={local}, num_nodes={world // local}."
            )


def _check_each(name: str, given: Any, kind: type, example: str) -> None:
    for x in as_list(given):
        if not isinstance(x, kind):
            raise ArgumentError(
                f"{name} must be a {kind.__name__} of Lightning or a list of them, such as {example}; got "
                f"{describe(x)}."
            )


def as_list(given: Any) -> list[Any]:
    """Return one value or several as a list; None as an empty one."""
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
