"""Callbacks of Lightning: early stopping, watching, and the checkpoints of a run."""

from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping

from pyro_elbo.diagnosis import diagnose
from pyro_elbo.files import write_file
from pyro_elbo.training.folder import BEST, LAST, keep_previous

WAITS = ("healthy", "unused units", "not converged", "warm-up too long")  # findings that only the end can tell


class StopAfterWarmup(EarlyStopping):
    """Early stopping on the β = 1 bound that waits until every schedule has settled.

    While β grows, the bound at β = 1 moves for reasons that have nothing to do with overfitting.
    """

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """End a resumed run that had stopped already."""
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, with the patience of this run."""
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Check the bound, unless a schedule still moves."""
        elbo: Any = pl_module.module.elbo
        if elbo.step >= elbo.settled:
            super().on_train_epoch_end(trainer, pl_module)


class Watch(EarlyStopping):
    """The callback of :func:`pyro_elbo.watch`: says once what stands in several probes, and stops if it is asked to."""

    def __init__(self, stop: bool, patience: int) -> None:
        super().__init__("train_elbo", check_on_train_epoch_end=True)
        self.stops, self.probes = stop, patience
        self.standing: dict[str, int] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop a resumed run where a finding has stood long enough."""
        self._stop_if_due(trainer)

    def _stop_if_due(self, trainer: lightning.Trainer) -> None:
        if self.stops and any(count >= self.probes for count in self.standing.values()):
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Diagnose the epochs so far, if there was a probe after this one."""
        history: Any = pl_module.history
        if pl_module.current_epoch not in history.probes:
            return
        found = {f.title.split(",")[0]: f for f in diagnose(history.to_dataset()).findings if f.name not in WAITS}
        self.standing = {name: self.standing.get(name, 0) + 1 for name in found}
        for name, finding in found.items():
            if self.standing[name] == self.probes and trainer.is_global_zero:
                bar = trainer.progress_bar_callback
                (print if bar is None else bar.print)(finding)
        self._stop_if_due(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"standing": self.standing}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        self.standing = dict(state_dict["standing"])


class KeepCheckpoints(Checkpoint):
    """Save the last epoch, the one before, and the one that :meth:`History.best` of the training history names.

    An epoch that Ctrl-C has cut short is not saved: the run continues from the one before, or from the last checkpoint
    within an epoch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a checkpoint within the epoch, where one is due; the last batch is saved with the epoch."""
        programs: Any = pl_module
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or programs.has_ended
        if programs.is_saved_after(batch_idx) and not last:
            programs.within = True
            self._save_last(trainer)
            programs.within = False

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the checkpoints of this epoch."""
        programs: Any = pl_module
        whole = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if not whole and trainer.global_step != programs.stop.max_steps:
            return
        if programs.history.best() == programs.current_epoch:
            trainer.save_checkpoint(self.folder / BEST)
        self._save_last(trainer)

    def _save_last(self, trainer: lightning.Trainer) -> None:
        if trainer.is_global_zero:
            keep_previous(self.folder)
        trainer.save_checkpoint(self.folder / LAST)


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints so that a reader sees the old file or the whole new one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint: see :func:`pyro_elbo.files.write_file`."""
        write_file(checkpoint, Path(path))
