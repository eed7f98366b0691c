"""The adapter to Lightning: programs as a LightningModule, data as loaders, and the callbacks.

Imported by :func:`pyro_elbo.fit` alone, when it is called.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning
import numpy as np
import pyro
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from pyro_elbo.elbo import TermsModule
from pyro_elbo.history import Mean, Record, per_datum
from pyro_elbo.terms import Terms

Batch = Tensor | tuple | list | dict


class Rows(Dataset):
    """Tensors of the same length, indexed a batch at a time."""

    def __init__(self, data: Tensor | tuple | Mapping[str, Tensor]) -> None:
        self.data = data

    def __len__(self) -> int:
        return num_rows(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Any:
        """Return the rows of a batch in the container that the data came in."""
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
    """Rows of the first tensor of a batch."""
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    return len(batch if isinstance(batch, Tensor) else batch[0])


def arguments(batch: Any) -> tuple[tuple, dict[str, Any]]:
    """A batch as the arguments of model and guide."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (batch,) if isinstance(batch, Tensor) else tuple(batch), {}


def loader(dataset: Dataset, batch_size: int, shuffle: bool, seed: int, rank: int, world: int) -> DataLoader:
    """A loader whose order depends on the seed and the epoch alone (Lightning tells the sampler the epoch)."""
    sampler = DistributedSampler(dataset, num_replicas=world, rank=rank, shuffle=shuffle, seed=seed)
    collate = _identity if isinstance(dataset, Rows) else None
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=collate)


def _identity(batch: Any) -> Any:
    return batch


class Programs(lightning.LightningModule):
    """Model, guide and loss as Lightning wants them.

    Every training epoch starts from a random state that is a function of (seed, epoch, rank): runs repeat bit for bit,
    continue exactly from an epoch's end, and ranks draw different noise. Validation always uses the same noise and
    leaves the training's stream alone.
    """

    def __init__(
        self,
        module: TermsModule,
        store: Mapping[str, nn.Parameter],
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        loaders: Callable[..., Any],
        seed: int,
        progress: bool,
    ) -> None:
        super().__init__()
        self.module = module
        self.store = nn.ParameterDict({name.replace(".", "|"): p for name, p in store.items()})
        self.make_optimizer, self.loaders, self.seed, self.progress = optimizer, loaders, seed, progress
        self.records: list[Record] = []
        self.mean = Mean()
        self.valid_mean = Mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser over all parameters of both programs."""
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])

    def train_dataloader(self) -> Any:
        """The training rows of this process."""
        return self.loaders("train", self.global_rank, self.trainer.world_size)

    def val_dataloader(self) -> Any:
        """The validation rows of this process."""
        return self.loaders("valid", self.global_rank, self.trainer.world_size)

    def on_train_epoch_start(self) -> None:
        """Start the epoch's mean."""
        self.mean = Mean()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Start the epoch's random stream, after loaders have taken what they need from the global one."""
        if batch_idx == 0:
            pyro.set_rng_seed(_mix(self.seed, self.current_epoch, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss per datum."""
        terms, values = self._evaluate(batch, self.mean)
        if self.progress:
            self.log("elbo", values["elbo"], prog_bar=True, batch_size=1)
            self.log("loss", values["loss"], prog_bar=True, batch_size=1)
        return self.module.elbo.count_step(-terms.objective / terms.num_data)

    def on_validation_epoch_start(self) -> None:
        """Switch to the noise of validation."""
        self.stream = torch.get_rng_state()
        torch.manual_seed(_mix(self.seed, 2**31, self.global_rank))
        self.valid_mean = Mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the terms of a validation batch."""
        self._evaluate(batch, self.valid_mean)

    def on_validation_epoch_end(self) -> None:
        """Record the epoch's validation terms and return to the training's noise."""
        torch.set_rng_state(self.stream)
        self._record("valid", self.valid_mean)

    def on_train_epoch_end(self) -> None:
        """Record the epoch's training terms."""
        self._record("train", self.mean)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the history beside the weights."""
        checkpoint["history"] = self.records

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the history."""
        self.records = list(checkpoint["history"])

    def _evaluate(self, batch: Batch, mean: Mean) -> tuple[Terms, dict[str, Tensor]]:
        args, kwargs = arguments(batch)
        terms = self.module.terms(*args, **kwargs)
        values = per_datum(terms)
        mean.add(values, num_rows(batch))
        return terms, values

    def _record(self, split: str, mean: Mean) -> None:
        values = mean.reduce()
        elbo = self.module.elbo
        beta = elbo.beta_at(elbo.step, (name[3:] for name in values if name.startswith("kl/")))
        self.records.append({"epoch": self.current_epoch, "split": split, "values": values, "beta": beta})
        self.log(f"{split}_elbo", values["elbo"], prog_bar=split == "valid", batch_size=1)


class StopAfterWarmup(EarlyStopping):
    """Early stopping on the β = 1 bound that waits until every schedule has settled.

    While β grows, the bound at β = 1 moves for reasons that have nothing to do with overfitting.
    """

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Check, unless a schedule still moves."""
        elbo: Any = pl_module.module.elbo
        if elbo.step >= elbo.settled:
            super().on_train_epoch_end(trainer, pl_module)


def strategy(devices: int) -> Any:
    """One process, or several with gradients averaged by gloo."""
    if devices == 1:
        return "auto"
    return lightning.pytorch.strategies.DDPStrategy(process_group_backend="gloo", start_method="fork")


def _mix(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
