"""Epochs of one step on all rows, where nobody watches: Lightning's hooks in their order, without its loops.

Lightning spends more time on an epoch than a small model on its step. Compiled steps of many epochs are one course.
"""

import time
from typing import Any

import torch
from tqdm import tqdm

from pyro_elbo.compile import Course
from pyro_elbo.programs import mix_seed, mix_seeds, seed_cpu
from pyro_elbo.training.data import Loaders, arguments
from pyro_elbo.training.history import RunningMean, recorded
from pyro_elbo.training.machine import as_list
from pyro_elbo.training.options import Options
from pyro_elbo.training.rows import RowDataset

LOOK = 0.1  # seconds between two looks at the progress of compiled epochs


def suffices(options: Options, loaders: Loaders) -> bool:
    """Return whether an epoch is one step in this process, and nothing but the history looks at it."""
    steps, stop, machine, place = options.steps, options.stop, options.machine, options.place
    watched = as_list(machine.callbacks) or as_list(machine.logger) or place.dir is not None or stop.has_validation
    plain = machine.processes == 1 and machine.precision == "32-true" and not steps.is_auto and steps.scheduler is None
    on_cpu = machine.accelerator == "cpu" or (machine.accelerator == "auto" and not torch.accelerator.is_available())
    whole = isinstance(loaders.train, RowDataset) and len(loaders("train")) == 1
    return whole and plain and on_cpu and not watched and steps.accumulate_grad_batches == 1


class WholeBatchTrainer:
    """The part of Lightning's Trainer that such a fit needs."""

    def __init__(self, options: Options) -> None:
        self.stop, self.grad_clip, self.progress = options.stop, options.steps.grad_clip, options.progress
        self.global_step, self.current_epoch, self.global_rank, self.world_size = 0, 0, 0, 1
        self.ahead = 1
        self.should_stop = False
        self.lr_scheduler_configs: list[Any] = []

    def fit(self, programs: Any, **_: Any) -> None:
        """Train ``programs``, a ``LightningPrograms``."""
        programs.trainer = self
        optimizer = programs.configure_optimizers()["optimizer"]
        programs.prepare_own_steps(optimizer)
        (batch,) = programs.loaders("train")
        with tqdm(total=self.stop.epochs, disable=not self.progress, unit=" epochs") as bar:
            while self.current_epoch < self.stop.epochs and not self.should_stop:
                first = self.current_epoch
                if programs.svi is None:
                    self._train_epoch(programs, optimizer, batch)
                else:
                    self._train_epochs(programs, batch)
                self.current_epoch += 1
                bar.set_postfix({"elbo": f"{programs.history.newest.column('elbo')[-1]:.4g}"}, refresh=False)
                bar.update(self.current_epoch - first)

    def _train_epoch(self, programs: Any, optimizer: torch.optim.Optimizer, batch: Any) -> None:
        programs.mean = RunningMean()
        seed_cpu(mix_seed(programs.seed, self.current_epoch, self.global_rank))
        programs.place = f"epoch {self.current_epoch}"
        self._step(programs, optimizer, batch)
        self.global_step += 1
        programs.on_train_batch_end(None, batch, 0)
        programs.on_train_epoch_end()

    def _train_epochs(self, programs: Any, batch: Any) -> None:
        """Train for some epochs, no further than to the next probe."""
        first, taken, start = self.current_epoch, programs.module.elbo.step, time.monotonic()
        left = programs.probed_at + programs.probe_every - self.global_step
        count = min(self.ahead, max(left, 1), self.stop.most(1) - self.global_step)
        seeds = mix_seeds(programs.seed, range(first, first + count), self.global_rank)
        with programs.placed():
            try:
                names, rows = programs.svi.train(*arguments(batch), Course(count, seeds=seeds))
            finally:
                usable = programs.module.elbo.step - taken
                self.global_step, programs.place = self.global_step + usable, f"epoch {first + usable}"
        columns = recorded(dict(zip(names, rows.T, strict=True)))
        columns.pop("divisor", None)
        programs.record("train", columns, range(taken + 1, taken + 1 + count))
        self.current_epoch = first + count - 1
        programs.on_train_batch_end(None, batch, 0)
        programs.probe_if_due()
        self.ahead = max(1, int(count * LOOK / (time.monotonic() - start)))

    def _step(self, programs: Any, optimizer: torch.optim.Optimizer, batch: Any) -> None:
        def closure() -> Any:
            loss = programs.training_step(batch, 0)
            optimizer.zero_grad()
            programs.backward(loss)
            programs.on_before_optimizer_step(optimizer)
            if self.grad_clip is not None:
                held = [p for group in optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(held, self.grad_clip)
            return loss

        programs.optimizer_step(0, 0, optimizer, closure)
