"""What trains: Lightning's Trainer with the callbacks of the library, or epochs without its loops."""

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pyro_elbo.errors import ArgumentError
from pyro_elbo.training.callbacks import KeepCheckpoints, StopAfterWarmup, WholeFiles
from pyro_elbo.training.data import Loaders
from pyro_elbo.training.machine import as_list
from pyro_elbo.training.options import Options
from pyro_elbo.training.whole import WholeBatchTrainer, suffices


def _processes(forks: bool) -> DDPStrategy:
    """Return the strategy for several processes; modules may hold parameters that the programs do not use."""
    start = "fork" if forks else "popen"  # Lightning starts none where torchrun has
    return DDPStrategy(process_group_backend="gloo", start_method=start, find_unused_parameters=True)


def make_trainer(folder: Path | None, options: Options, loaders: Loaders) -> lightning.Trainer | WholeBatchTrainer:
    """Return what trains: Lightning's Trainer with the callbacks of this module, unless less suffices.

    Lightning writes no files of its own, no tables and no advice.

    Raises:
        ArgumentError: Lightning refuses the machine.
    """
    if suffices(options, loaders):
        return WholeBatchTrainer(options)
    steps, stop, machine = options.steps, options.stop, options.machine
    callbacks = as_list(machine.callbacks)
    if stop.patience is not None:
        callbacks.append(
            StopAfterWarmup("valid_elbo", patience=stop.patience, mode="max", check_on_train_epoch_end=True)
        )
    if folder is not None:
        callbacks.append(KeepCheckpoints(folder))
    precision: Any = machine.precision
    several = machine.processes > 1  # the gradients of several processes are averaged by gloo
    try:
        return lightning.Trainer(
            accelerator="cpu" if several else machine.accelerator,
            devices=machine.devices,
            num_nodes=machine.num_nodes,
            strategy=_processes(machine.forks) if several else "auto",
            plugins=WholeFiles(),
            precision=precision,
            max_epochs=stop.max_epochs,
            min_epochs=0,
            accumulate_grad_batches=steps.accumulate_grad_batches,
            callbacks=callbacks,
            gradient_clip_val=None if steps.are_own else steps.grad_clip,  # a step of our own clips by itself
            logger=as_list(machine.logger),
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            enable_progress_bar=options.progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            inference_mode=False,
        )
    except (MisconfigurationException, ValueError) as error:
        raise ArgumentError(f"Lightning cannot train so: {error}") from error
