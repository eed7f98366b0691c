"""Adapters to Lightning: programs as a LightningModule, the callbacks and the Trainer.

Only :func:`pyro_elbo.fit` imports this module, when it is called, because Lightning is slow to import.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pyro
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pyro_elbo.compile import CompiledSVI, TorchUpdate
from pyro_elbo.diagnosis import Probe, diagnose
from pyro_elbo.errors import ArgumentError, GuideError
from pyro_elbo.programs import check_gradients, collect_parameters, mix_seed, seeded
from pyro_elbo.terms import Terms
from pyro_elbo.training.converge import Convergence, Goal
from pyro_elbo.training.data import Batch, Loaders, arguments, num_rows
from pyro_elbo.training.history import EpochRecord, RunningMean, add_probe, best, to_dataset
from pyro_elbo.training.options import Options, as_list
from pyro_elbo.training.trained import Trained
from pyro_elbo.training.whole import WholeBatchTrainer, suffices

# Steps between two probes, in Python and compiled, for each step that a probe takes (four where all batches are equal).
# Rows count alike in both, but compiled steps are up to ten times as fast.
PROBE_EVERY = {False: 50, True: 500}
WAITS = ("healthy", "unused units", "not converged", "warm-up too long")  # findings that only the end can tell


class LightningPrograms(lightning.LightningModule):
    """Model, guide and loss as a LightningModule.

    The modules that the programs use are its submodules. Lightning therefore switches their modes for validation, and
    checkpoints hold their buffers.

    Every training epoch starts from a random state that is a function of (seed, epoch, rank). Runs therefore repeat
    bit for bit, resume exactly at the end of an epoch, and draw different noise on each rank. Validation always uses
    the same noise and does not advance the random stream of training.
    """

    def __init__(self, trained: Trained, loaders: Loaders, options: Options, probe: Probe) -> None:
        super().__init__()
        self.options, self.stop = options.steps, options.stop
        self.automatic_optimization = not self.options.are_own
        self.svi: CompiledSVI | None = None
        self.convergence: Convergence | None = None
        self.resumed: dict[str, Any] | None = None
        self.module, self.store, self.used = trained.module, trained.store, trained.used
        self.trained = trained.by_name
        self.held: set[int] = set()
        self.loaders, self.seed = loaders, options.seed
        self.progress, self.logs = options.progress, options.machine.logger is not None
        self.records: list[EpochRecord] = []
        self.probe, self.probed_at = probe, 0
        self._weights: tuple[Any, EpochRecord] = None, {}
        self.mean = RunningMean()
        self.valid_mean = RunningMean()

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer of all parameters of both programs, and its scheduler: see :class:`Steps`."""
        made = self.options.make(self.trained)
        self.held = {id(p) for group in made.param_groups for p in group["params"]}
        monitor = "train_elbo" if self.loaders.valid is None else "valid_elbo"
        schedule = self.options.schedule(made, monitor)
        return {"optimizer": made} | ({} if schedule is None else {"lr_scheduler": schedule})

    def train_dataloader(self) -> Any:
        """The training rows of this process."""
        self._seed_loader()  # Lightning makes the first iterator next, and later ones after on_train_epoch_start
        self.has_iterator = True
        return self.loaders("train", self.global_rank, self.trainer.world_size)

    def val_dataloader(self) -> Any:
        """The validation rows of this process."""
        return self.loaders("valid", self.global_rank, self.trainer.world_size)

    def on_train_epoch_start(self) -> None:
        """Reset the mean of the epoch and seed the random state from which shuffling loaders draw."""
        self.mean = RunningMean()
        if not self.has_iterator:
            self._seed_loader()
        self.has_iterator = False

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the random stream of the epoch after the loaders have drawn from the global one."""
        if batch_idx == 0:
            pyro.set_rng_seed(mix_seed(self.seed, self.current_epoch, self.global_rank))

    def on_fit_start(self) -> None:
        """Prepare steps of our own once parameters and optimizer are on their device."""
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            self.prepare_own_steps(optimizer)

    def prepare_own_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """Let steps of our own, if there are any, move the parameters by an optimizer."""
        if not self.automatic_optimization:
            update = TorchUpdate(optimizer, self.options.grad_clip)
            programs = self.module.model, self.module.guide, self.module.elbo
            # draw the same noise as uncompiled steps, so that runs repeat and resume alike
            options: Any = {"compile": self.options.compile, "per_datum": True, "fallback_random": True}
            self.svi = CompiledSVI(*programs, update, **options)

    def on_train_start(self) -> None:
        """Prepare the run to convergence once the optimizer is that of the checkpoint."""
        if not self.options.is_auto:
            return
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        steps = len(self.loaders("train"))
        most = self.stop.most(steps)
        goal = Goal(self.options.goal, most, "max_epochs" if most == self.stop.epochs * steps else "max_steps")
        programs = self.module.model, self.module.guide, self.module.elbo
        data = move_data_to_device(self.probe.data, self.device).train[0]
        with seeded(self.seed):
            self.convergence = Convergence(*programs, data, lambda _: [optimizer], goal, _elbo_per_datum)
        if self.resumed is not None:
            self.convergence.load(self.resumed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Return the loss per datum, or None after a step of our own, which has updated the parameters already."""
        if self.svi is not None:
            self._own_step(self.svi, batch)
            self._move_schedulers("step")
            return None
        with collect_parameters() as parameters:
            terms, values = self._evaluate(batch, self.mean)
        if late := [name for name, p in parameters.items() if p.requires_grad and id(p) not in self.held]:
            raise ArgumentError(
                f"The parameters {late} appear after the first batch, so the optimizer does not hold them and would "
                "never train them. Create all parameters in every run of the programs, make them part of a module, or "
                "train with pe.SVI and a pyro.optim optimizer."
            )
        self._show(values)
        loss = self.module.elbo.count_step(-terms.per_datum.objective, terms)
        _check_depends(loss.requires_grad)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a step along a gradient that is not finite."""
        check_gradients(self.trained)

    def _own_step(self, svi: CompiledSVI, batch: Batch) -> None:
        """Run the step inside the optimizer's closure; without gradients, the optimizer's own step changes nothing."""
        optimizer: Any = self.optimizers()
        found: list[Any] = []

        def closure() -> None:
            try:
                found.append(svi.train(*arguments(batch)))
            except ValueError as error:
                if self.convergence is None:
                    raise
                self.convergence.fail(error)
            optimizer.zero_grad()

        optimizer.step(closure=closure)
        for record in found:
            values = self.count(record, batch, self.mean)
            self._show(values)
            if self.convergence is not None:
                self.convergence.observe(np.array([values["elbo"].item()]))

    def _move_schedulers(self, interval: str) -> None:
        """Step the schedulers of the learning rate, as Lightning does unless the steps are ours."""
        count = self.trainer.global_step if interval == "step" else self.current_epoch + 1
        config: Any
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == interval and count % config.frequency == 0:
                watched = [self.trainer.callback_metrics[config.monitor]] if config.reduce_on_plateau else []
                config.scheduler.step(*watched)

    def count(self, record: Any, batch: Batch, mean: RunningMean) -> dict[str, Tensor]:
        """Add what a step of our own has recorded to the mean of the epoch."""
        names, ((*numbers,),) = record[0], record[1].tolist()
        values = {n: torch.tensor(x) for n, x in zip(names, numbers, strict=True) if not n.startswith("log_likelihood")}
        mean.add(values, num_rows(batch))
        return values

    def _show(self, values: dict[str, Tensor]) -> None:
        if self._has_lightning and (self.progress or self.logs):
            self.log("elbo", values["elbo"], prog_bar=True, batch_size=1)
            self.log("loss", values["loss"], prog_bar=True, batch_size=1)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Refuse modules whose parameters have a gradient but are unknown to Pyro, after the first batch."""
        ended = self.convergence is not None and self.convergence.due == 0
        if self.trainer.global_step == self.stop.max_steps or ended:
            self.trainer.should_stop = True  # with its own max_steps, Lightning neither validates here nor resumes
        if batch_idx > 0:
            return
        if self.svi is not None:
            _check_depends(self.svi.trains)
        parts = [(type(part).__name__, *item) for part in self.used for item in part.named_parameters()]
        if unknown := [f"{kind}.{name}" for kind, name, p in parts if p.grad is not None and id(p) not in self.held]:
            raise ArgumentError(
                f"The loss depends on the parameters {unknown}, which Pyro does not know and would never train. "
                "Register their modules by pyro.module('name', module), or freeze them by requires_grad_(False)."
            )

    def on_validation_epoch_start(self) -> None:
        """Seed the noise of validation and keep the random stream of training."""
        self.stream = torch.get_rng_state()
        torch.manual_seed(mix_seed(self.seed, 2**31, self.global_rank))
        self.valid_mean = RunningMean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the terms of a validation batch to the mean of the epoch."""
        if self.svi is not None:
            self.count(self.svi.evaluate(*arguments(batch)), batch, self.valid_mean)
        else:
            self._evaluate(batch, self.valid_mean)

    def on_validation_epoch_end(self) -> None:
        """Record the validation terms of the epoch and restore the random stream of training."""
        torch.set_rng_state(self.stream)
        self.record("valid", self.valid_mean.reduce(), self.module.elbo.step)

    def on_train_epoch_end(self) -> None:
        """Record the training terms of the epoch, and probe the programs where enough steps have passed."""
        self.record("train", self.mean.reduce(), self.module.elbo.step)
        self.probe_if_due()
        if self.svi is not None:
            self._move_schedulers("epoch")

    @property
    def probe_every(self) -> int:
        """The steps between two probes."""
        return math.ceil(PROBE_EVERY[bool(self.options.compile)] * max(4.0, self.probe.cost))

    def probe_if_due(self) -> None:
        """Probe the programs at the end of an epoch, where enough steps have passed."""
        steps, every = self.trainer.global_step, self.probe_every
        begins = self.current_epoch == 0 and self.stop.most(steps) >= 2 * every  # an epoch has these steps
        if begins or steps - self.probed_at >= every:
            add_probe(self.records, self.probe(lambda data: move_data_to_device(data, self.device)))
            self.probed_at = steps

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the history to the checkpoint, the step of its last probe, and how far the run to convergence is."""
        checkpoint["history"], checkpoint["probed_at"] = self.records, self.probed_at
        if self.convergence is not None:
            checkpoint["convergence"] = self.convergence.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the history from the checkpoint."""
        self.records, self.probed_at = list(checkpoint["history"]), checkpoint.get("probed_at", 0)
        self.resumed = checkpoint.get("convergence")

    @property
    def _has_lightning(self) -> bool:
        return isinstance(self.trainer, lightning.Trainer)

    def _seed_loader(self) -> None:
        epoch = self.trainer.fit_loop.epoch_progress.current.processed  # current_epoch lags when a run resumes
        pyro.set_rng_seed(mix_seed(self.seed, epoch, self.global_rank, 1))

    def _evaluate(self, batch: Batch, mean: RunningMean) -> tuple[Terms, dict[str, Tensor]]:
        args, kwargs = arguments(batch)
        terms = self.module.elbo.checked_terms(self.module.model, self.module.guide, args, kwargs)
        with torch.no_grad():
            values = {"loss": -terms.per_datum.objective} | terms.per_datum.totals()
        values = {name: x.detach() for name, x in values.items() if not name.startswith("log_likelihood")}
        mean.add(values, num_rows(batch))
        return terms, values

    def record(self, split: str, values: Mapping[str, float], step: int) -> None:
        """Record the means of an epoch and a split, and the weights of the objective after so many steps."""
        weights = self._weights_at(step, values)
        self.records.append({"epoch": self.current_epoch, "split": split, "values": dict(values)} | weights)
        if self._has_lightning:
            self.log(f"{split}_elbo", values["elbo"], prog_bar=split == "valid", batch_size=1)
        if self.logs:
            others = {name: x for name, x in values.items() if name != "elbo"}
            others |= {f"beta/{site}": x for site, x in weights["beta"].items()} if split == "train" else {}
            self.log_dict({f"{split}_{name}": x for name, x in others.items()}, batch_size=1)

    def _weights_at(self, step: int, names: Iterable[str]) -> EpochRecord:
        elbo = self.module.elbo
        sites = tuple(name[3:] for name in names if name.startswith("kl/"))
        key = min(step, elbo.settled), sites  # constant from there on
        if key != self._weights[0]:
            beta = elbo.beta_at(step, sites)
            weights = {p.name: float(p.weight(step) if callable(p.weight) else p.weight) for p in elbo.penalties}
            targets = [name for name in beta if elbo.weighting.is_target(name)]
            found = {"beta": beta, "settled": step >= elbo.settled, "penalty_weight": weights, "targets": targets}
            self._weights = key, found
        return self._weights[1]


def _check_depends(depends: bool) -> None:
    """Raise GuideError if the objective depends on no parameter."""
    if not depends:
        raise GuideError(
            "The objective depends on none of the parameters, so there is nothing to train. Use the parameters in the "
            "distributions of model or guide, or evaluate the terms: loss.terms(model, guide, ...)."
        )


def _elbo_per_datum(terms: Terms) -> Tensor:
    return terms.per_datum.totals()["elbo"]


class StopAfterWarmup(EarlyStopping):
    """Early stopping on the β = 1 bound that waits until every schedule has settled.

    While β grows, the bound at β = 1 moves for reasons that have nothing to do with overfitting.
    """

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

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Diagnose the epochs so far, if there was a probe after this one."""
        records: Any = pl_module.records
        if "probe" not in records[-1]:
            return
        found = {f.title.split(",")[0]: f for f in diagnose(to_dataset(records)).findings if f.name not in WAITS}
        self.standing = {name: self.standing.get(name, 0) + 1 for name in found}
        for name, finding in found.items():
            if self.standing[name] == self.probes and trainer.is_global_zero:
                bar = trainer.progress_bar_callback
                (print if bar is None else bar.print)(finding)
        if self.stops and any(count >= self.probes for count in self.standing.values()):
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"standing": self.standing}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        self.standing = dict(state_dict["standing"])


class KeepBest(Checkpoint):
    """Save every epoch that :func:`pyro_elbo.training.history.best` ranks first so far."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save a checkpoint if this epoch is the best so far."""
        records: Any = pl_module.records
        if best(records)["epoch"] == pl_module.current_epoch:
            trainer.save_checkpoint(self.path)


def _processes() -> DDPStrategy:
    """Return the strategy for several processes; modules may hold parameters that the programs do not use."""
    return DDPStrategy(process_group_backend="gloo", start_method="fork", find_unused_parameters=True)


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
        callbacks.append(KeepBest(folder / "best.ckpt"))
        callbacks.append(ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False))
    precision: Any = machine.precision
    several = machine.devices > 1  # the gradients of several processes are averaged by gloo
    try:
        return lightning.Trainer(
            accelerator="cpu" if several else machine.accelerator,
            devices=machine.devices,
            strategy=_processes() if several else "auto",
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
