"""Fit programs to data on Lightning: check the arguments, prepare the run, train, and return the result."""

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn

from pyro_elbo import errors
from pyro_elbo.compile import Compile
from pyro_elbo.errors import ArgumentError, CheckpointError, DataError, GuideError, check_count, check_number
from pyro_elbo.objectives import TermsModule, TraceBeta_ELBO, TraceTimestep_ELBO
from pyro_elbo.programs import Plate, Program, check_programs, collect_modules, collect_parameters
from pyro_elbo.terms import Term, Terms
from pyro_elbo.training import history as histories
from pyro_elbo.training.checks import check_compile, check_counts, check_grad_clip, check_loss
from pyro_elbo.training.data import Loaders, arguments, prepare_data

if TYPE_CHECKING:
    import xarray

    from pyro_elbo.training.lightning import Trained

RUN_FILES = ("best.ckpt", "last.ckpt", "history.nc")


@dataclass(frozen=True)
class FitResult:
    """The result of :func:`fit`.

    Attributes:
        model, guide, loss: the arguments of :func:`fit`; the parameters are trained in place.
        history: Dataset over ``epoch`` x ``split`` (x ``latent``), nats per datum.
        best_epoch: the epoch after warm-up with the highest validation ELBO at β = 1 (training ELBO without
            validation data).
        stopped_early: True if patience ran out before ``max_epochs``.
        best_path, last_path: the checkpoints; None without ``dir``.
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
    overwrite: bool = False,
    seed: int = 0,
    devices: int = 1,
    grad_clip: float | None = None,
    compile: Compile = False,
    progress: bool = True,
) -> FitResult:
    r"""Train model and guide on Lightning's Trainer, with validation, early stopping and checkpoints.

    Training follows the gradient of ``loss`` divided by the rows of the full data. The progress bar and the history
    show the ELBO at β = 1 in nats per datum beside the loss. The loss of ``TraceTimestep_ELBO(normalize=...)`` is
    divided by sequences, frames or steps instead; the history names its units.

    Args:
        train: the data; rows are data points. A tensor or array is the argument of the programs, a tuple holds their
            arguments, a dict their keyword arguments. A DataFrame passes its columns as keyword arguments if the model
            takes arguments of their names, otherwise one matrix. A Dataset or DataLoader yields any of these. NumPy
            and pandas floats get torch's default dtype. Numbers in a tuple or dict are passed with every batch.
        valid: data of the same form, evaluated after every epoch with fixed noise.
        loss: the objective; ``TraceBeta_ELBO()`` if omitted.
        lr: the learning rate of Adam; unused with ``optimizer``.
        optimizer: a function from parameters to a torch optimizer.
        batch_size: rows per step; None for all.
        patience: stop after this many epochs without a better validation ELBO, counted after warm-up, and restore the
            parameters of the best epoch. Without it, the parameters of the last epoch stay.
        dir: folder for ``best.ckpt``, ``last.ckpt`` and ``history.nc``; it must not hold another run.
        resume: continue from ``dir/last.ckpt`` exactly as if training had not stopped (unless a DataLoader draws
            from its own generator). ``max_epochs`` counts from the start of training.
        overwrite: replace the run that ``dir`` holds.
        seed: repeats a run bit for bit on a CPU. The caller's random state is restored afterwards.
        devices: processes on this machine; they average their gradients and draw separate noise.
        grad_clip: the largest norm of the gradient; larger gradients are scaled down.
        compile: run repeated steps as one compiled graph (see :class:`SVI`), or in Python with a warning where that
            fails (``"auto"``); needs ``devices=1``.
        progress: show the progress bar.

    Raises:
        ArgumentError: a schedule outlasts the training, arguments have a wrong type or value or exclude each other,
            or the optimizer does not hold a parameter.
        DataError: no data, tensors of different length, data that do not fit the arguments of the programs, or
            minibatches of a model that does not declare them.
        CheckpointError: the folder cannot be written or holds another run, or a checkpoint is damaged or of other
            programs.
        GuideError: the parameter store already holds parameters of another guide of the same name, or there is
            nothing to train.
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
    check_programs(model, guide)
    check_loss(loss)
    check_counts({"max_epochs": max_epochs, "devices": devices}, {"batch_size": batch_size, "patience": patience})
    check_count("seed", seed, least=0)
    check_number("lr", lr)
    check_grad_clip(grad_clip)
    check_compile(compile)
    _check_arguments(valid, patience, optimizer, dir, resume, overwrite, bool(compile) and devices != 1)
    with _undisturbed(), tempfile.TemporaryDirectory() as scratch:
        from pyro_elbo.training import lightning as adapter

        loaders, first = prepare_data(train, valid, batch_size, seed, model, guide)
        batches = -(-len(loaders("train")) // devices)  # a process takes every devices-th row
        _check_schedule(loss, 0 if resume else loss.step, max_epochs, batches)
        args, kwargs = arguments(first)
        pyro.set_rng_seed(seed)
        module = loss(model, guide)
        terms, trained = _first_run(module, args, kwargs)
        loaders = _checked_minibatches(module, terms, batches * devices, loaders)
        make = optimizer if optimizer is not None else (lambda params: torch.optim.Adam(params, lr=lr))
        programs = adapter.LightningPrograms(module, trained, make, loaders, seed, progress, compile, grad_clip)
        made = programs.configure_optimizers()  # refuse a useless optimizer before anything is written
        folder = _prepared(Path(dir), resume, overwrite) if dir is not None else Path(scratch)
        keep = dir is not None or patience is not None or devices > 1
        clip = None if compile else grad_clip  # a compiled step clips by itself
        trainer = adapter.make_trainer(folder if keep else None, max_epochs, patience, devices, clip, progress)
        last = folder / "last.ckpt"
        checkpoint = _checked_checkpoint(last, programs, made, max_epochs) if resume else None
        with _training(module, *trained.modules), _errors_of_processes():
            trainer.fit(programs, ckpt_path=checkpoint, weights_only=True)
        return _finish(programs, trainer, folder, dir is not None, patience, devices)


def _check_arguments(
    valid: Any, patience: int | None, optimizer: Any, dir: Any, resume: bool, overwrite: bool, compile_several: bool
) -> None:
    if patience is not None and valid is None:
        raise ArgumentError("patience needs validation data: pass valid=..., or leave patience out.")
    if compile_several:
        raise ArgumentError("compile=True trains on one device: set devices=1, or compile=False.")
    if not isinstance(dir, str | os.PathLike | None):
        raise ArgumentError(f"dir must be a path, got {dir!r} ({type(dir).__name__}).")
    if (resume or overwrite) and dir is None:
        raise ArgumentError(f"{'resume' if resume else 'overwrite'}=True needs dir=..., the folder of the run.")
    if resume and overwrite:
        raise ArgumentError("resume=True continues the run in dir and overwrite=True deletes it: choose one of them.")
    if isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        raise ArgumentError(
            f"optimizer must be a function from parameters to a torch optimizer, got a {kind} instance, which may not "
            f"hold all parameters. Pass optimizer=lambda params: torch.optim.{kind}(params, lr=...)."
        )
    if optimizer is not None and not callable(optimizer):
        raise ArgumentError(
            "optimizer must be a function from parameters to a torch optimizer, such as torch.optim.Adam, got "
            f"{optimizer!r}."
        )


def _check_schedule(loss: TraceBeta_ELBO, taken: int, max_epochs: int, batches: int) -> None:
    end = taken + max_epochs * batches
    if loss.settled > end:
        raise ArgumentError(
            f"The schedule settles after {loss.settled} optimization steps, but {max_epochs} epochs of {batches} "
            f"batches a process end at step {end}: training would end before β is final. Shorten the schedule "
            "or raise max_epochs."
        )


@contextmanager
def _errors_of_processes() -> Iterator[None]:
    """Raise an error of this library from a process with its own type: torch passes on only its text."""
    try:
        yield
    except torch.multiprocessing.ProcessRaisedException as error:
        _, found, text = str(error).rpartition("\npyro_elbo.errors.")
        if not found:
            raise
        kind, _, message = text.partition(": ")
        raise getattr(errors, kind)(message.strip()) from error


@contextmanager
def _undisturbed() -> Iterator[None]:
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
def _training(*modules: nn.Module) -> Iterator[None]:
    """Put modules into training mode, and restore the mode of each of their parts afterwards."""
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        for module in modules:
            module.train()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _first_run(module: TermsModule, args: tuple, kwargs: dict[str, Any]) -> tuple[Terms, "Trained"]:
    """Run both programs once to create lazy parameters; return the terms, and the parameters and modules in use.

    Replace the tensors in Pyro's store by nn.Parameters, so that optimizer, checkpoint and DDP share them with Pyro.
    """
    from pyro_elbo.training.lightning import Trained

    store = pyro.get_param_store()
    with torch.no_grad():
        displaced = _displaced_parameters(module, args, kwargs)
        with collect_parameters() as used, collect_modules(module.model, module.guide) as found:
            terms = module.terms(*args, **kwargs)
    inside = {id(part) for whole in (module, *_critics(module.elbo)) for part in whole.modules()}
    modules = [part for part in found if id(part) not in inside]
    owned = {id(p) for part in module.children() for p in part.parameters()}
    if adopted := [name for name, p in displaced.items() if id(p) not in owned]:
        raise GuideError(
            f"The parameter store already holds {adopted}, made by another program of the same name, and would "
            "train those instead. Call pyro.clear_param_store() and make the programs anew, or keep parameters of "
            "PyroModules apart with pyro.settings.set(module_local_params=True)."
        )
    state = store.get_state()
    state["params"].update(displaced)  # the store follows the modules that are trained now
    owned |= {id(p) for part in modules for p in part.parameters()}
    loose = {}
    for name, p in used.items():
        if name not in displaced and id(p) not in owned:
            state["params"][name] = loose[name] = p if isinstance(p, nn.Parameter) else nn.Parameter(p.detach())
    store.set_state(state)
    trained: dict[int, tuple[str, Tensor]] = {}
    for name, p in (*(used | displaced | loose).items(), *module.named_parameters()):
        trained.setdefault(id(p), (name, p))
    return terms, Trained(dict(trained.values()), loose, modules)


def _critics(loss: TraceBeta_ELBO) -> list[nn.Module]:
    return [critic.network for critic in loss.critics.values()]


def _displaced_parameters(module: TermsModule, args: tuple, kwargs: dict[str, Any]) -> dict[str, nn.Parameter]:
    """Return the parameters of the programs' modules whose names in the store belong to other modules.

    Pyro would silently use those of the store. A run with an empty store shows the programs' own parameters.
    """
    store = pyro.get_param_store()
    known = dict(store.named_parameters())
    if not known:
        return {}
    with store.scope():
        module.terms(*args, **kwargs)
        own = {name: p for name, p in store.named_parameters() if isinstance(p, nn.Parameter)}
    return {name: p for name, p in own.items() if name in known and known[name] is not p}


def _checked_minibatches(module: TermsModule, terms: Terms, batches: int, loaders: Loaders) -> Loaders:
    """Refuse minibatches that would count the term of a global site once per batch, and wrong full sizes.

    A model that does not declare the full size gets the validation data as one batch, which counts its global terms
    once.
    """
    plate = terms.data_plate
    if plate is not None and _is_subsampled(terms):
        if plate.full_size not in (rows := loaders.row_counts()):
            raise DataError(
                f"Plate '{plate.name}' declares {plate.full_size} rows, the training data have {rows[0]}. Give the "
                "plate the size of the training data."
            )
        return loaders
    shared = [name for name, term in terms.sites.items() if _is_shared(term, plate)]
    if shared and batches > 1:
        name, rows = plate.name if plate else "data", loaders.row_counts()[0]
        raise DataError(
            f"Site '{shared[0]}' is shared by all data, but the model does not know that it sees {batches} minibatches "
            f"of {rows} rows: its term would count {batches} times. Declare the full size, pyro.plate('{name}', "
            f"{rows}, subsample_size=len(x)), in model and guide, or pass batch_size=None and devices=1."
        )
    if shared and len(loaders("valid")) > 1:
        args, kwargs = arguments(next(iter(loaders("valid"))))
        with torch.no_grad():
            declared = _is_subsampled(module.terms(*args, **kwargs))
        return loaders if declared else loaders.with_whole_validation()
    return loaders


def _is_subsampled(terms: Terms) -> bool:
    plate = terms.data_plate
    return plate is not None and plate.full_size != plate.size


def _is_shared(term: Term, data: Plate | None) -> bool:
    """Return True for the term of a site that is not repeated for every datum."""
    return term.is_kl if data is None else data not in term.plates


def _prepared(folder: Path, resume: bool, overwrite: bool) -> Path:
    """Make the folder of a run, and protect or delete the run that it holds."""
    found = [] if resume else [folder / name for name in RUN_FILES if (folder / name).exists()]
    if found and not overwrite:
        raise CheckpointError(
            f"{folder} already holds a run ({', '.join(file.name for file in found)}). Pass resume=True to continue "
            "it, overwrite=True to replace it, or another dir."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            for file in found:
                file.unlink()
            return folder
    except OSError as error:
        raise CheckpointError(f"The results folder {folder} cannot be written: {error}. Choose another dir.") from error


def _checked_checkpoint(path: Path, programs: Any, optimizer: torch.optim.Optimizer, max_epochs: int) -> str:
    """Read a checkpoint without running code, and compare it with the programs and the plan."""
    checkpoint = load_checkpoint(path)
    shapes = {name: tuple(x.shape) for name, x in checkpoint["state_dict"].items() if isinstance(x, Tensor)}
    expected = {name: tuple(x.shape) for name, x in programs.state_dict().items() if isinstance(x, Tensor)}
    if shapes != expected:
        differing = {n: (expected.get(n), shapes.get(n)) for n in expected | shapes if expected.get(n) != shapes.get(n)}
        raise CheckpointError(
            f"{path} belongs to other programs; shapes (expected, got): {differing}. Use the model and guide that "
            "wrote it, or another dir."
        )
    ours, theirs = optimizer.state_dict(), checkpoint["optimizer_states"][0]
    options = [[sorted(group) for group in state["param_groups"]] for state in (ours, theirs)]
    if options[0] != options[1]:
        raise CheckpointError(
            f"{path} was written with another optimizer; options (expected, got): {options}. Pass the optimizer that "
            "wrote it, or another dir."
        )
    if checkpoint["epoch"] >= max_epochs:
        raise ArgumentError(
            f"{path} holds {checkpoint['epoch'] + 1} epochs and max_epochs={max_epochs}. It counts from the start of "
            "training: raise it."
        )
    return str(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of :func:`fit` without running any code in it.

    Raises:
        CheckpointError: the file is missing or damaged, or holds more than tensors and plain values.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of damage that the exceptions below report
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: nothing to resume. Train with the same dir first.") from error
    except Exception as error:  # the unpickler raises exceptions of any type on damaged bytes
        raise CheckpointError(
            f"{path} is damaged or is no checkpoint of pe.fit: {error} Delete it, or resume from a copy."
        ) from error
    parts = {"state_dict", "history", "optimizer_states", "loops", "epoch", "pytorch-lightning_version"}
    if not isinstance(checkpoint, dict) or not parts <= checkpoint.keys():
        missing = sorted(parts - checkpoint.keys()) if isinstance(checkpoint, dict) else sorted(parts)
        raise CheckpointError(
            f"{path} is no checkpoint of pe.fit: it lacks {missing}. Delete it, or choose another dir."
        )
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
    normalized = isinstance(loss := programs.module.elbo, TraceTimestep_ELBO) and loss.normalize != "total"
    history = histories.to_dataset(programs.records, f"nats per {loss.normalize if normalized else 'datum'}")
    if keep:
        histories.save(history, folder / "history.nc")
    return FitResult(
        programs.module.model,
        programs.module.guide,
        programs.module.elbo,
        history,
        best_epoch=histories.best(programs.records)["epoch"],
        stopped_early=epochs < trainer.max_epochs,
        best_path=best if keep else None,
        last_path=last if keep else None,
    )
