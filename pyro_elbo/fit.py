"""Programs and data -> fitted parameters and a history. The loop is Lightning's; this module prepares and explains."""

import logging
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyro_elbo import history as histories
from pyro_elbo.elbo import TermsModule, TraceBeta_ELBO
from pyro_elbo.errors import ArgumentError, CheckpointError, DataError, GuideError
from pyro_elbo.sites import Program, captured_parameters
from pyro_elbo.terms import Terms

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit` returns.

    Attributes:
        model, guide, loss: as given; the parameters are trained in place.
        history: Dataset over ``epoch`` x ``split`` (x ``latent``), nats per datum.
        best_epoch: the epoch with the highest validation ELBO at β = 1 (training ELBO without validation data).
        stopped_early: whether patience ran out before ``max_epochs``.
        best_path, last_path: checkpoints, None without ``dir``.
    """

    model: Program
    guide: Program
    loss: TraceBeta_ELBO
    history: "xarray.Dataset"
    best_epoch: int
    stopped_early: bool
    best_path: Path | None
    last_path: Path | None


def fit(
    model: Program,
    guide: Program,
    train: Any,
    valid: Any = None,
    *,
    loss: TraceBeta_ELBO | None = None,
    lr: float = 1e-3,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
    max_epochs: int = 50,
    batch_size: int | None = 128,
    patience: int | None = None,
    dir: str | os.PathLike | None = None,
    resume: bool = False,
    seed: int = 0,
    devices: int = 1,
    grad_clip: float | None = None,
    progress: bool = True,
) -> FitResult:
    r"""Train model and guide: epochs, validation, early stopping, checkpoints, on Lightning's Trainer.

    The gradient is that of ``loss`` divided by the rows of the full data. The progress bar and the history show the
    ELBO at β = 1 in nats per datum beside the loss.

    Args:
        train: a tensor, a tuple of tensors (the programs' arguments), a dict (keyword arguments), a Dataset or a
            DataLoader. Rows are data.
        valid: the same, for validation after every epoch with fixed noise.
        loss: the objective; ``TraceBeta_ELBO()`` if omitted.
        lr: step size of Adam. Ignored where ``optimizer`` is given.
        optimizer: from parameters to a torch optimiser.
        batch_size: rows per step; None for all.
        patience: stop after so many epochs without a better validation ELBO, counted after warm-up, and go back to
            the best epoch's parameters. Without it the last epoch's stay.
        dir: folder for ``best.ckpt``, ``last.ckpt`` and ``history.nc``.
        resume: continue from ``dir/last.ckpt``, exactly as if training had not stopped.
        seed: repeats a run bit for bit on a CPU. The caller's random state is left as it was.
        devices: processes on this machine; gradients are averaged, every process draws its own noise.
        grad_clip: largest norm of the gradient.
        progress: whether to show the progress bar.

    Raises:
        ArgumentError: a schedule outlasts the training, or arguments do not go together.
        DataError: no data, tensors of different length, or minibatches of a model that does not know of them.
        CheckpointError: the folder cannot be written, or a checkpoint is damaged or of other programs.
        GuideError: the parameter store already holds parameters of another guide of the same name.
        SiteError, NonFiniteError: from the terms.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, pyro_elbo as pe
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> result = pe.fit(model, guide, torch.randn(50), batch_size=None, max_epochs=2, progress=False)
        >>> result.history.sizes["epoch"]
        2
    """
    loss = TraceBeta_ELBO() if loss is None else loss
    _check_arguments(valid, patience, dir, resume)
    with _undisturbed(), tempfile.TemporaryDirectory() as scratch:
        from pyro_elbo import _lightning

        loaders, batches, first = _prepare_data(train, valid, batch_size, seed)
        if loss.settled > max_epochs * batches:
            raise ArgumentError(
                f"The schedule settles after {loss.settled} optimisation steps, but {max_epochs} epochs of {batches} "
                "batches take only {0}: training would end at another β than you asked for. Shorten the schedule or "
                "raise max_epochs.".format(max_epochs * batches)
            )
        args, kwargs = _lightning.arguments(first)
        pyro.set_rng_seed(seed)
        module = loss(model, guide)
        terms, store = _first_run(module, args, kwargs)
        _check_minibatches(terms, batches, loaders.rows)
        make = optimizer if optimizer is not None else (lambda params: torch.optim.Adam(params, lr=lr))
        programs = _lightning.Programs(module, store, make, loaders, seed, progress)
        folder = _writable(Path(dir)) if dir is not None else Path(scratch)
        keep = dir is not None or patience is not None or devices > 1
        trainer = _trainer(programs, folder if keep else None, valid, max_epochs, patience, devices, grad_clip)
        checkpoint = _checked_checkpoint(folder / "last.ckpt", programs) if resume else None
        trainer.fit(programs, ckpt_path=checkpoint, weights_only=True)
        return _finish(programs, trainer, folder, dir is not None, patience, devices)


def _check_arguments(valid: Any, patience: int | None, dir: Any, resume: bool) -> None:
    if patience is not None and valid is None:
        raise ArgumentError("patience needs validation data: pass valid=..., or leave patience out.")
    if resume and dir is None:
        raise ArgumentError("resume=True needs dir=..., the folder with last.ckpt.")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the caller's random state, and keep Lightning's advertisements and advice off the screen."""
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


@dataclass(frozen=True)
class _Loaders:
    """Makes the loader of a split for a process."""

    train: Any
    valid: Any
    batch_size: int | None
    seed: int

    @property
    def rows(self) -> int:
        """Rows of the training data."""
        return len(self.train.dataset if hasattr(self.train, "sampler") else self.train)

    def __call__(self, split: str, rank: int = 0, world: int = 1) -> Any:
        from torch.utils.data import DataLoader

        from pyro_elbo._lightning import loader

        data = self.train if split == "train" else self.valid
        if data is None or isinstance(data, DataLoader):
            return data if data is not None else []
        size = len(data) if self.batch_size is None else self.batch_size
        return loader(data, size, split == "train" and size < len(data), self.seed, rank, world)


def _prepare_data(train: Any, valid: Any, batch_size: int | None, seed: int) -> tuple[_Loaders, int, Any]:
    """Check the data of both splits; return the loaders, batches per epoch and the first batch."""
    if batch_size is not None and batch_size < 1:
        raise ArgumentError(f"batch_size must be at least 1, or None for all rows, got {batch_size}.")
    loaders = _Loaders(_as_dataset("train", train), _as_dataset("valid", valid), batch_size, seed)
    for split, data in (("train", train), ("valid", valid)):
        if data is not None:
            first = next(iter(loaders(split)), None)
            if first is None:
                raise DataError(f"{split}: the loader yields nothing; expected at least one batch.")
    return loaders, len(loaders("train")), next(iter(loaders("train")))


def _as_dataset(split: str, data: Any) -> Any:
    from pyro_elbo._lightning import Rows

    if not isinstance(data, Tensor | tuple | list | Mapping):
        return data
    named = data if isinstance(data, Mapping) else dict(enumerate((data,) if isinstance(data, Tensor) else data))
    lengths = {name: len(x) if isinstance(x, Tensor) and x.dim() else None for name, x in named.items()}
    if not lengths or None in lengths.values() or len(set(lengths.values())) > 1:
        raise DataError(f"{split}: expected tensors with the same number of rows, got {lengths}.")
    if 0 in lengths.values():
        raise DataError(f"{split}: the data have no rows.")
    return Rows(tuple(data) if isinstance(data, list) else data)


def _first_run(module: TermsModule, args: tuple, kwargs: dict[str, Any]) -> tuple[Terms, dict[str, nn.Parameter]]:
    """Run both programs once so that lazy parameters exist; return the terms and the parameters of no module.

    Tensors of Pyro's store become nn.Parameters in place: optimiser, checkpoint and DDP then see what Pyro sees.
    """
    modules = list(module.children())
    store = pyro.get_param_store()
    before = {id(p): name for name, p in store.named_parameters()}
    own = {id(p) for m in modules for p in m.parameters()}
    module.eval()  # buffers such as batch-norm statistics must not see the batch twice
    with torch.no_grad(), captured_parameters() as used:
        terms = module.terms(*args, **kwargs)
    module.train()
    owned = {id(p) for m in modules for p in m.parameters()}
    if adopted := [before[i] for i in owned - own if i in before]:
        raise GuideError(
            f"The parameter store already holds {adopted}, made by another program of the same name, and this one "
            "would go on training it. Call pyro.clear_param_store() first, or keep parameters apart with "
            "pyro.settings.set(module_local_params=True)."
        )
    state = store.get_state()
    loose = {}
    for name, p in used.items():
        if id(p) not in owned:
            loose[name] = p if isinstance(p, nn.Parameter) else nn.Parameter(p.detach())
            state["params"][name] = loose[name]
    store.set_state(state)
    return terms, loose


def _check_minibatches(terms: Terms, batches: int, rows: int) -> None:
    """Refuse minibatches where the KL of a global latent would be counted once per batch."""
    if batches == 1:
        return
    plate = terms.data_plate
    subsampled = plate is not None and plate.full_size != plate.size
    if subsampled and plate.full_size != rows:
        raise DataError(
            f"Plate '{plate.name}' declares {plate.full_size} rows, the training data have {rows}. Give the plate the "
            "size of the training data."
        )
    shared = [n for n, t in terms.sites.items() if t.is_kl and (plate is None or plate not in t.plates)]
    if shared and not subsampled:
        name = plate.name if plate else "data"
        raise DataError(
            f"Site '{shared[0]}' is shared by all data, but the model does not know that it sees {batches} minibatches "
            f"of {rows} rows: its KL would count {batches} times. Declare the full size, pyro.plate('{name}', {rows}, "
            "subsample_size=len(x)), in model and guide, or pass batch_size=None."
        )


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise CheckpointError(f"The results folder {folder} cannot be written: {error}. Choose another dir.") from error


def _trainer(
    programs: Any,
    folder: Path | None,
    valid: Any,
    max_epochs: int,
    patience: int | None,
    devices: int,
    grad_clip: float | None,
) -> Any:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from pyro_elbo._lightning import StopAfterWarmup, strategy

    monitor = "train_elbo" if valid is None else "valid_elbo"
    callbacks = []
    if patience is not None:
        callbacks.append(StopAfterWarmup(monitor, patience=patience, mode="max", check_on_train_epoch_end=True))
    if folder is not None:
        always: dict[str, Any] = {"save_on_train_epoch_end": True, "enable_version_counter": False}
        callbacks.append(ModelCheckpoint(folder, "best", monitor, mode="max", **always))
        callbacks.append(ModelCheckpoint(folder, "last", **always))
    return lightning.Trainer(
        accelerator="cpu" if devices > 1 else "auto",
        devices=devices,
        strategy=strategy(devices),
        max_epochs=max_epochs,
        callbacks=callbacks,
        gradient_clip_val=grad_clip,
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=programs.progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        inference_mode=False,
    )


def _checked_checkpoint(path: Path, programs: nn.Module) -> str:
    """Read a checkpoint without running code, and compare it with the programs."""
    state = load_checkpoint(path)["state_dict"]
    shapes = {name: tuple(x.shape) for name, x in state.items() if isinstance(x, Tensor)}
    expected = {name: tuple(x.shape) for name, x in programs.state_dict().items() if isinstance(x, Tensor)}
    if shapes != expected:
        differing = {n: (expected.get(n), shapes.get(n)) for n in expected | shapes if expected.get(n) != shapes.get(n)}
        raise CheckpointError(
            f"{path} belongs to other programs; shapes (expected, got): {differing}. Use the model and guide that "
            "wrote it, or another dir."
        )
    return str(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of :func:`fit`; nothing in the file can run code.

    Raises:
        CheckpointError: the file is missing or damaged, or holds more than tensors and plain values.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of damage that the exceptions below report
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: nothing to resume. Train with the same dir first.") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or is no checkpoint of pe.fit: {error} Delete it, or resume from a copy."
        ) from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "history"} <= checkpoint.keys():
        raise CheckpointError(f"{path} is no checkpoint of pe.fit: it holds no state_dict and history.")
    return checkpoint


def _finish(programs: Any, trainer: Any, folder: Path, keep: bool, patience: int | None, devices: int) -> FitResult:
    best, last = folder / "best.ckpt", folder / "last.ckpt"
    if devices > 1:
        checkpoint = load_checkpoint(last)
        programs.load_state_dict(checkpoint["state_dict"])
        programs.records = checkpoint["history"]
    epochs = len({r["epoch"] for r in programs.records})
    if patience is not None:
        steps = programs.module.elbo.step
        programs.load_state_dict(load_checkpoint(best)["state_dict"])
        programs.module.elbo.step = steps
    history = histories.to_dataset(programs.records)
    if keep:
        histories.save(history, folder / "history.nc")
    split = "valid" if bool(history.elbo.sel(split="valid").notnull().any()) else "train"
    return FitResult(
        programs.module.model,
        programs.module.guide,
        programs.module.elbo,
        history,
        best_epoch=int(history.epoch[int(np.nanargmax(history.elbo.sel(split=split)))]),
        stopped_early=epochs < trainer.max_epochs,
        best_path=best if keep else None,
        last_path=last if keep else None,
    )
