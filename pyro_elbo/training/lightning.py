"""Programs as a LightningModule.

Only :func:`pyro_elbo.fit` imports this module, when it is called, because Lightning is slow to import.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pyro
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from pyro_elbo.compile import CompiledSVI, KeptGradients, TorchUpdate
from pyro_elbo.diagnosis import Probe
from pyro_elbo.errors import ArgumentError, NonFiniteError, ProgramError
from pyro_elbo.programs import check_gradients, collect_parameters, explain_update, mix_seed, seeded
from pyro_elbo.ranks import all_states, in_parts, mean_of_parts, weighed
from pyro_elbo.terms import Terms
from pyro_elbo.training.checks import check_depends
from pyro_elbo.training.converge import Convergence, Goal
from pyro_elbo.training.data import Batch, Loaders, arguments
from pyro_elbo.training.folder import LAST
from pyro_elbo.training.history import History, RunningMean, Weights, betas_of, recorded
from pyro_elbo.training.identity import described, objective_identity, optimizer_identity
from pyro_elbo.training.options import Options
from pyro_elbo.training.own import step_by, stepped
from pyro_elbo.training.rows import num_rows
from pyro_elbo.training.trained import Trained

# Steps between two probes, in Python and compiled, for each step that a probe takes (four where all batches are equal).
# Rows count alike in both, but compiled steps are ten times as fast, and of a small model a thousand times. They may be
# very many, so their interval grows to a quarter of the steps before.
PROBE_EVERY = {False: 50, True: 500}


class LightningPrograms(lightning.LightningModule):
    """Model, guide and loss as a LightningModule.

    The modules that the programs use are its submodules. Lightning therefore switches their modes for validation, and
    checkpoints hold their buffers.

    Every training epoch starts from a random state that is a function of (seed, epoch, rank). Runs therefore repeat
    bit for bit, resume exactly at the end of an epoch, and draw different noise on each rank. Validation always uses
    the same noise and does not advance the random stream of training.
    """

    def __init__(
        self, trained: Trained, loaders: Loaders, options: Options, probe: Probe, files: Path | None = None
    ) -> None:
        super().__init__()
        self.options, self.stop = options.steps, options.stop
        self.automatic_optimization = not self.options.are_own
        self.svi: CompiledSVI | None = None
        self.kept: KeptGradients | None = None
        self.convergence: Convergence | None = None
        self.resumed: dict[str, Any] | None = None
        self.module, self.store, self.used = trained.module, trained.store, trained.used
        self.trained = trained.by_name
        self.held: set[int] = set()
        self.loaders, self.seed = loaders, options.seed
        self.progress, self.logs = options.progress, options.machine.logger is not None
        self.history, self.weights = History(), Weights(trained.module.elbo)
        self.has_started = False
        self.probe, self.probed_at = probe, 0
        self.shares_rows = False
        self.files, self.place = files, ""
        self.save_every, self.within = options.place.save_every, False
        own = {} if files is None else loaders.identity() | objective_identity(trained.module.elbo)
        self.identity = options.identity() | own
        self.mean = RunningMean()
        self.valid_mean = RunningMean()

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer of all parameters of both programs, and its scheduler: see :class:`Steps`."""
        made = self.options.make(self.trained)
        self.identity["optimizer"] = "Adam" if self.options.optimizer is None else optimizer_identity(made)
        self.held = {id(p) for group in made.param_groups for p in group["params"]}
        monitor = "train_elbo" if self.loaders.valid is None else "valid_elbo"
        schedule = self.options.schedule(made, monitor)
        self.identity["scheduler"] = described(schedule and schedule["scheduler"])
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
        self.place = f"batch {batch_idx} of epoch {self.current_epoch}"
        self.has_iterator = False
        if batch_idx == 0:
            pyro.set_rng_seed(mix_seed(self.seed, self.current_epoch, self.global_rank))
        elif self.is_saved_after(batch_idx - 1):
            pyro.set_rng_seed(mix_seed(self.seed, self.current_epoch, self.global_rank, 2, batch_idx))

    def is_saved_after(self, batch_idx: int) -> bool:
        """Return whether the step that ends with this batch is one after which the run is saved within its epoch."""
        whole = (batch_idx + 1) % self.options.accumulate_grad_batches == 0
        return self.save_every is not None and whole and self.trainer.global_step % self.save_every == 0

    def on_fit_start(self) -> None:
        """Prepare steps of our own once parameters and optimizer are on their device."""
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            self.prepare_own_steps(optimizer)

    def prepare_own_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """Let steps of our own, if there are any, move the parameters by an optimizer."""
        if not self.automatic_optimization:
            update = TorchUpdate(optimizer, self.options.grad_clip)
            if self.trainer.world_size > 1:
                self.kept = KeptGradients([p for group in optimizer.param_groups for p in group["params"]])
                update = TorchUpdate(self.kept)
            programs = self.module.model, self.module.guide, self.module.elbo
            # draw the same noise as uncompiled steps, so that runs repeat and resume alike
            options: Any = {"compile": self.options.compile, "per_datum": True, "fallback_random": True}
            if self.shares_rows:
                options["rows"] = lambda args, kwargs: num_rows((*args, *kwargs.values()))
            self.svi = CompiledSVI(*programs, update, **options)

    def on_train_start(self) -> None:
        """Prepare the run to convergence once the optimizer is that of the checkpoint; end a run that had ended."""
        if self.options.is_auto:
            self._prepare_convergence()
        self.trainer.should_stop = self.trainer.should_stop or self.has_ended
        self.has_started = True

    @property
    def has_ended(self) -> bool:
        """Whether the steps are taken, before the epochs are."""
        converged = self.convergence is not None and self.convergence.due == 0
        return self.trainer.global_step == self.stop.max_steps or converged

    def _prepare_convergence(self) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        steps = len(self.loaders("train"))
        most = self.stop.most(steps)
        goal = Goal(self.options.goal, most, "max_epochs" if most == self.stop.epochs * steps else "max_steps")
        programs = self.module.model, self.module.guide, self.module.elbo
        data = move_data_to_device(self.probe.data, self.device).train[0]
        with seeded(mix_seed(self.seed, 1)):  # other draws than those of two equal runs, which have the seed 0
            self.convergence = Convergence(*programs, data, lambda _: [optimizer], goal, _elbo_per_datum)
        if self.resumed is not None:
            self.convergence.load(self.resumed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Return the loss per datum, or None after a step of our own, which has updated the parameters already."""
        if self.svi is not None:
            self._own_step(self.svi, batch)
            self._move_schedulers("step")
            return None
        with collect_parameters() as parameters, in_parts():
            terms, values = self._evaluate(batch, self.mean)
            rows = num_rows(batch) * values.get("divisor", 1)  # or frames, ...
            loss = self.module.elbo.count_step(weighed(-terms.per_datum.objective, rows), terms)
        if late := [name for name, p in parameters.items() if p.requires_grad and id(p) not in self.held]:
            raise ArgumentError(
                f"The parameters {late} appear after the first batch, so the optimizer does not hold them and would "
                "never train them. Create all parameters in every run of the programs, make them part of a module, or "
                "train with pe.SVI and a pyro.optim optimizer."
            )
        self._show(values)
        check_depends(loss.requires_grad)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the gradient of a loss to that of the parameters."""
        with self.placed(), explain_update("The backward pass", self.trained):
            loss.backward(*args, **kwargs)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Move the parameters along the gradient that the closure makes."""
        with self.placed(), explain_update("The optimizer", self.trained):
            step_by(optimizer, optimizer_closure)

    def lr_scheduler_step(self, scheduler: Any, metric: Any = None) -> None:
        """Step a scheduler of the learning rate; one that watches gets the number that it watches."""
        with self.placed(), explain_update("The scheduler", self.trained):
            scheduler.step(*([] if metric is None else [metric]))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a step along a gradient that is not finite."""
        with self.placed():
            check_gradients(self.trained)

    def _own_step(self, svi: CompiledSVI, batch: Batch) -> None:
        """Take the step, then have Lightning count it; the optimizer steps again only by the mean of processes."""
        optimizer: Any = self.optimizers()
        record = None
        with self.placed(), explain_update("The optimizer", self.trained):
            try:
                record = svi.train(*arguments(batch))
            except ValueError as error:
                if self.convergence is None:
                    raise
                self.convergence.fail(error)
            optimizer.zero_grad()
            if self.kept is not None:
                self._average(self.kept, batch, record)
        with stepped(optimizer.optimizer) if self.kept is None else nullcontext():
            self.optimizer_step(0, 0, optimizer, lambda: None)
        optimizer.zero_grad()  # a step in Python adds to the gradients, a compiled one expects none
        if record is not None:
            values = self.count(record, batch, self.mean)
            self._show(values)
            if self.convergence is not None:
                self.convergence.observe(np.array([values["elbo"].item()]))

    def _average(self, kept: KeptGradients, batch: Batch, record: Any) -> None:
        """Give the parameters the mean of the gradients that the processes have kept."""
        rows = num_rows(batch) * dict(zip(record[0], record[1][0], strict=True)).get("divisor", 1.0)
        with in_parts():
            part = torch.ones((), device=self.device)
            part = part if self.shares_rows else weighed(part, rows)  # shared rows are weighed within the step
            means = mean_of_parts([state["gradient"] * part for state in kept.state.values()])
        for p, mean in zip(kept.state, means, strict=True):
            p.grad = mean
        if self.options.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(list(kept.state), self.options.grad_clip)

    def _move_schedulers(self, interval: str) -> None:
        """Step the schedulers of the learning rate, as Lightning does unless the steps are ours."""
        count = self.trainer.global_step if interval == "step" else self.current_epoch + 1
        config: Any
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == interval and count % config.frequency == 0:
                watched = [self.trainer.callback_metrics[config.monitor]] if config.reduce_on_plateau else []
                self.lr_scheduler_step(config.scheduler, *watched)

    def count(self, record: Any, batch: Batch, mean: RunningMean) -> dict[str, Tensor]:
        """Add what a step of our own has recorded to the mean of the epoch."""
        names, ((*numbers,),) = record[0], record[1].tolist()
        kept = recorded(dict(zip(names, numbers, strict=True)))
        values = {n: torch.tensor(x, dtype=torch.float64) for n, x in kept.items()}
        mean.add(values, num_rows(batch))
        return values

    def _show(self, values: dict[str, Tensor]) -> None:
        if self._has_lightning and (self.progress or self.logs):
            self.log("elbo", values["elbo"], prog_bar=True, batch_size=1)
            self.log("loss", values["loss"], prog_bar=True, batch_size=1)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Refuse modules whose parameters have a gradient but are unknown to Pyro, after the first batch."""
        if self.has_ended:
            self.trainer.should_stop = True  # with its own max_steps, Lightning neither validates here nor resumes
        if batch_idx > 0:
            return
        if self.svi is not None:
            check_depends(self.svi.trains)
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
        self.place = f"batch {batch_idx} of the validation data after epoch {self.current_epoch}"
        if self.svi is not None:
            with self.placed():
                self.count(self.svi.evaluate(*arguments(batch)), batch, self.valid_mean)
        else:
            with in_parts():
                self._evaluate(batch, self.valid_mean)

    def on_validation_epoch_end(self) -> None:
        """Record the validation terms of the epoch and restore the random stream of training."""
        torch.set_rng_state(self.stream)
        self._record_epoch("valid", self.valid_mean)

    def on_train_epoch_end(self) -> None:
        """Record the training terms of the epoch, and probe the programs where enough steps have passed."""
        if not self.trainer.should_stop:
            self.loaders.check_passed(self.mean.rows)
        self._record_epoch("train", self.mean)
        self.probe_if_due()
        if self.svi is not None:
            self._move_schedulers("epoch")

    @property
    def probe_every(self) -> int:
        """The steps from the last probe to the next."""
        every = math.ceil(PROBE_EVERY[bool(self.options.compile)] * max(4.0, self.probe.cost))
        return max(every, self.probed_at // 4) if self.options.compile else every

    def probe_if_due(self) -> None:
        """Probe the programs at the end of an epoch, where enough steps have passed."""
        steps, every = self.trainer.global_step, self.probe_every
        begins = self.current_epoch == 0 and self.stop.most(steps) >= 2 * every  # an epoch has these steps
        if begins or steps - self.probed_at >= every:
            self.history.add_probe(self.probe(lambda data: move_data_to_device(data, self.device)))
            self.probed_at = steps

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the history to the checkpoint, the step of its last probe, and how far the run to convergence is."""
        checkpoint["history"], checkpoint["probed_at"] = self.history.state(), self.probed_at
        checkpoint["run"] = self.identity
        if self.within:
            checkpoint["within"] = all_states({"sums": self.mean.sums, "rows": self.mean.rows})
        if self.convergence is not None:
            checkpoint["convergence"] = self.convergence.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the history from the checkpoint."""
        self.history, self.probed_at = History.of(checkpoint["history"]), int(checkpoint.get("probed_at", 0))
        self.resumed = checkpoint.get("convergence")
        if (means := checkpoint.get("within")) is not None:
            self.mean = RunningMean(**means[self.global_rank])

    @property
    def _has_lightning(self) -> bool:
        return isinstance(self.trainer, lightning.Trainer)

    def _seed_loader(self) -> None:
        epoch = self.trainer.fit_loop.epoch_progress.current.processed  # current_epoch lags when a run resumes
        pyro.set_rng_seed(mix_seed(self.seed, epoch, self.global_rank, 1))

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Name the batch, and the parameters to go back to, where a step fails or a number is not finite."""
        try:
            yield
        except (NonFiniteError, ProgramError) as error:
            if f"This was {self.place}" in str(error):
                raise
            last = None if self.files is None else self.files / LAST
            found = last is not None and last.exists()
            earlier = f"epoch {self.current_epoch - 1}" if self.save_every is None else "an earlier step"
            kept = f"; {last} holds those of {earlier}" if found else ""
            rank = f", process {self.global_rank}" if self.trainer.world_size > 1 else ""
            steps = f"The parameters are those after {self.trainer.global_step} steps{kept}."
            raise type(error)(f"{error} This was {self.place}{rank}. {steps}") from error.__cause__ or error

    def _evaluate(self, batch: Batch, mean: RunningMean) -> tuple[Terms, dict[str, Tensor]]:
        args, kwargs = arguments(batch)
        with self.placed():
            terms = self.module.elbo.checked_terms(self.module.model, self.module.guide, args, kwargs)
        with torch.no_grad():
            values = {"loss": -terms.per_datum.objective} | terms.per_datum.totals()
        values = {name: x.detach() for name, x in recorded(values).items()}
        mean.add(values, num_rows(batch))
        return terms, values

    def record(self, split: str, values: Mapping[str, Any], steps: range) -> Mapping[str, np.ndarray]:
        """Record the means of as many epochs as ``steps``, from the current one on; return the objective's weights.

        Args:
            split: the split.
            values: a number per epoch.
            steps: the steps taken by the end of each epoch.
        """
        weights = self.weights.after(steps, values)
        means = {name: np.atleast_1d(x) for name, x in values.items()}
        self.history.add(split, self.current_epoch, means | weights)
        return weights

    def _record_epoch(self, split: str, mean: RunningMean) -> None:
        """Record the means of the current epoch, and log them."""
        values, taken = mean.reduce(), self.module.elbo.step
        weights = self.record(split, values, range(taken, taken + 1))
        if self._has_lightning:
            self.log(f"{split}_elbo", values["elbo"], prog_bar=split == "valid", batch_size=1)
        if self.logs:
            others = {name: x for name, x in values.items() if name != "elbo"}
            betas = {f"beta/{site}": x.item() for site, x in betas_of(weights).items()} if split == "train" else {}
            self.log_dict({f"{split}_{name}": x for name, x in (others | betas).items()}, batch_size=1)


def _elbo_per_datum(terms: Terms) -> Tensor:
    return terms.per_datum.totals()["elbo"]
