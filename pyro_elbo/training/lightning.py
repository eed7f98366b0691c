"""Adapters to Lightning: programs as a LightningModule, data as loaders, the callbacks and the Trainer.

Only :func:`pyro_elbo.fit` imports this module, when it is called, because Lightning is slow to import.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import pyro
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from pyro_elbo.compile import CompiledSVI, TorchUpdate
from pyro_elbo.errors import ArgumentError, DataError, GuideError
from pyro_elbo.objectives import TermsModule
from pyro_elbo.programs import mix_seed
from pyro_elbo.terms import Terms
from pyro_elbo.training.history import EpochRecord, RunningMean, best

Batch = Tensor | tuple | list | dict


class RowDataset(Dataset):
    """A dataset of tensors of the same length, indexed by batches."""

    def __init__(self, data: Tensor | tuple | Mapping[str, Tensor]) -> None:
        self.data = data

    def __len__(self) -> int:
        return num_rows(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Any:
        """Return the rows of a batch in the same container as the data."""
        if len(indices) == len(self) and indices == list(range(len(self))):
            return self.data
        return _map(lambda x: x[indices], self.data)


def _map(function: Callable[[Tensor], Tensor], data: Any) -> Any:
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, Mapping):
        return {name: function(x) for name, x in data.items()}
    return tuple(function(x) for x in data)


def num_rows(batch: Any) -> int:
    """Return the number of rows of a batch, those of its first tensor."""
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    return len(batch if isinstance(batch, Tensor) else batch[0])


def arguments(batch: Any) -> tuple[tuple, dict[str, Any]]:
    """Return a batch as positional and keyword arguments of the programs."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (batch,) if isinstance(batch, Tensor) else tuple(batch), {}


def _loader(dataset: Dataset, batch_size: int, shuffle: bool, seed: int, rank: int, world: int) -> DataLoader:
    """Return a loader whose order depends only on the seed and the epoch (Lightning tells the sampler the epoch)."""
    sampler = DistributedSampler(dataset, num_replicas=world, rank=rank, shuffle=shuffle, seed=seed)
    collate = _identity if isinstance(dataset, RowDataset) else None
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=collate)


def _identity(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class Loaders:
    """The data of both splits, and a loader of them for each process."""

    train: Any
    valid: Any
    batch_size: int | None
    seed: int

    @property
    def rows(self) -> int:
        """The number of rows of the training data."""
        return _num_rows(self.train)

    def __call__(self, split: str, rank: int = 0, world: int = 1) -> Any:
        """Return the loader of a split, or an empty list if the split has no data."""
        data = self.train if split == "train" else self.valid
        if data is None or isinstance(data, DataLoader):
            return data if data is not None else []
        size = len(data) if self.batch_size is None else self.batch_size
        return _loader(data, size, split == "train" and size < len(data), self.seed, rank, world)


def prepare_data(train: Any, valid: Any, batch_size: int | None, seed: int) -> tuple[Loaders, Any]:
    """Check the data of both splits; return their loaders and the first training batch."""
    loaders = Loaders(_as_dataset("train", train), _as_dataset("valid", valid), batch_size, seed)
    batches = {split: next(iter(loaders(split)), None) for split in ("train", "valid")}
    for split, data in (("train", train), ("valid", valid)):
        if data is not None and batches[split] is None:
            raise DataError(f"{split}: the loader yields nothing; expected at least one batch.")
    return loaders, batches["train"]


def _as_dataset(split: str, data: Any) -> Any:
    if data is None and split == "valid":
        return None
    if not isinstance(data, Tensor | tuple | list | Mapping):
        try:
            rows = _num_rows(data)
        except TypeError as error:
            raise DataError(
                f"{split}: expected tensors, a Dataset or a DataLoader of known length, got {type(data).__name__}."
            ) from error
        if rows == 0:
            raise DataError(f"{split}: the loader yields nothing; expected at least one batch.")
        return data
    named = data if isinstance(data, Mapping) else dict(enumerate((data,) if isinstance(data, Tensor) else data))
    lengths = {name: len(x) if isinstance(x, Tensor) and x.dim() else None for name, x in named.items()}
    if not lengths or None in lengths.values() or len(set(lengths.values())) > 1:
        raise DataError(f"{split}: expected tensors with the same number of rows, got {lengths}.")
    if 0 in lengths.values():
        raise DataError(f"{split}: the data have no rows.")
    return RowDataset(tuple(data) if isinstance(data, list) else data)


def _num_rows(data: Any) -> int:
    rows: Any = data.dataset if isinstance(data, DataLoader) else data
    return len(rows)


class LightningPrograms(lightning.LightningModule):
    """Model, guide and loss as a LightningModule.

    Every training epoch starts from a random state that is a function of (seed, epoch, rank). Runs therefore repeat
    bit for bit, resume exactly at the end of an epoch, and draw different noise on each rank. Validation always uses
    the same noise and does not advance the random stream of training.
    """

    def __init__(
        self,
        module: TermsModule,
        store: Mapping[str, nn.Parameter],
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        loaders: Callable[..., Any],
        seed: int,
        progress: bool,
        compile: bool,
        grad_clip: float | None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = not compile
        self.grad_clip, self.steps = grad_clip, None
        self.module = module
        # the prefix "@" separates names such as "values" from the methods of the dictionary
        self.store = nn.ParameterDict({f"@{name.replace('.', '|')}": p for name, p in store.items()})
        self.make_optimizer, self.loaders, self.seed, self.progress = optimizer, loaders, seed, progress
        self.records: list[EpochRecord] = []
        self.mean = RunningMean()
        self.valid_mean = RunningMean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of all parameters of both programs.

        Raises:
            GuideError: there is no parameter to train.
            ArgumentError: the ``optimizer`` argument of ``fit`` does not return a torch optimizer.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        if not parameters:
            raise GuideError(
                "Neither model nor guide has a parameter to train. Give the guide pyro.param's or modules."
            )
        made = self.make_optimizer(parameters)
        if not isinstance(made, torch.optim.Optimizer):
            raise ArgumentError(
                "optimizer must be a function from parameters to a torch optimizer, such as torch.optim.Adam; "
                f"expected a torch.optim.Optimizer, got {type(made).__name__}. Pyro's optimizers are for SVI."
            )
        return made

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
        """Prepare compiled steps once parameters and optimizer are on their device."""
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            update = TorchUpdate(optimizer, self.grad_clip)
            programs = self.module.model, self.module.guide, self.module.elbo
            # draw the same noise as uncompiled steps, so that runs repeat and resume alike
            self.steps = CompiledSVI(*programs, update, per_datum=True, fallback_random=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Return the loss per datum, or None after a compiled step, which has updated the parameters already."""
        if self.steps is not None:
            self._show(self._compiled_step(batch))
            return None
        terms, values = self._evaluate(batch, self.mean)
        self._show(values)
        return self.module.elbo.count_step(-terms.per_datum.objective, terms)

    def _compiled_step(self, batch: Batch) -> dict[str, Tensor]:
        """Run the step inside the optimizer's closure; without gradients, the optimizer's own step changes nothing."""
        optimizer: Any = self.optimizers()
        record: list[Any] = []

        def closure() -> None:
            record.append(self.steps.train(*arguments(batch)))
            optimizer.zero_grad()

        optimizer.step(closure=closure)
        return self._count(record[0], batch, self.mean)

    def _count(self, record: Any, batch: Batch, mean: RunningMean) -> dict[str, Tensor]:
        names, ((*numbers,),) = record[0], record[1].tolist()
        values = {n: torch.tensor(x) for n, x in zip(names, numbers, strict=True) if not n.startswith("log_likelihood")}
        mean.add(values, num_rows(batch))
        return values

    def _show(self, values: dict[str, Tensor]) -> None:
        if self.progress:
            self.log("elbo", values["elbo"], prog_bar=True, batch_size=1)
            self.log("loss", values["loss"], prog_bar=True, batch_size=1)

    def on_validation_epoch_start(self) -> None:
        """Seed the noise of validation and keep the random stream of training."""
        self.stream = torch.get_rng_state()
        torch.manual_seed(mix_seed(self.seed, 2**31, self.global_rank))
        self.valid_mean = RunningMean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the terms of a validation batch to the mean of the epoch."""
        if self.steps is not None:
            self._count(self.steps.evaluate(*arguments(batch)), batch, self.valid_mean)
        else:
            self._evaluate(batch, self.valid_mean)

    def on_validation_epoch_end(self) -> None:
        """Record the validation terms of the epoch and restore the random stream of training."""
        torch.set_rng_state(self.stream)
        self._record("valid", self.valid_mean)

    def on_train_epoch_end(self) -> None:
        """Record the training terms of the epoch."""
        self._record("train", self.mean)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the history to the checkpoint."""
        checkpoint["history"] = self.records

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the history from the checkpoint."""
        self.records = list(checkpoint["history"])

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

    def _record(self, split: str, mean: RunningMean) -> None:
        values = mean.reduce()
        elbo = self.module.elbo
        beta = elbo.beta_at(elbo.step, (name[3:] for name in values if name.startswith("kl/")))
        settled = elbo.step >= elbo.settled
        self.records.append(
            {"epoch": self.current_epoch, "split": split, "values": values, "beta": beta, "settled": settled}
        )
        self.log(f"{split}_elbo", values["elbo"], prog_bar=split == "valid", batch_size=1)


class StopAfterWarmup(EarlyStopping):
    """Early stopping on the β = 1 bound that waits until every schedule has settled.

    While β grows, the bound at β = 1 moves for reasons that have nothing to do with overfitting.
    """

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Check the bound, unless a schedule still moves."""
        elbo: Any = pl_module.module.elbo
        if elbo.step >= elbo.settled:
            super().on_train_epoch_end(trainer, pl_module)


class KeepBest(Checkpoint):
    """Save every epoch that :func:`pyro_elbo.training.history.best` ranks first so far."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save a checkpoint if this epoch is the best so far."""
        records: Any = pl_module.records
        if best(records)["epoch"] == pl_module.current_epoch:
            trainer.save_checkpoint(self.path)


def make_trainer(
    folder: Path | None, max_epochs: int, patience: int | None, devices: int, grad_clip: float | None, progress: bool
) -> lightning.Trainer:
    """Return Lightning's Trainer with the callbacks of this module and without its files, tables and advice."""
    callbacks: list[lightning.Callback] = []
    if patience is not None:
        callbacks.append(StopAfterWarmup("valid_elbo", patience=patience, mode="max", check_on_train_epoch_end=True))
    if folder is not None:
        callbacks.append(KeepBest(folder / "best.ckpt"))
        callbacks.append(ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False))
    several = devices > 1  # the gradients of several processes are averaged by gloo
    return lightning.Trainer(
        accelerator="cpu" if several else "auto",
        devices=devices,
        strategy=DDPStrategy(process_group_backend="gloo", start_method="fork") if several else "auto",
        max_epochs=max_epochs,
        callbacks=callbacks,
        gradient_clip_val=grad_clip,
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        inference_mode=False,
    )
