"""Fit programs to data on Lightning: check the arguments, prepare the run, train, and return the result."""

import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import torch

from pyro_elbo import errors
from pyro_elbo.compile import Compile
from pyro_elbo.diagnosis import Probe
from pyro_elbo.errors import check_flag, check_seed
from pyro_elbo.files import reading
from pyro_elbo.objectives import TermsModule, TraceBeta_ELBO
from pyro_elbo.programs import Program, check_programs, keeping_modes
from pyro_elbo.ranks import group_of_one
from pyro_elbo.training.checkpoint import KIND, check_resumable, load_checkpoint
from pyro_elbo.training.checks import check_counts, check_loss
from pyro_elbo.training.convergence import ConvergenceReport
from pyro_elbo.training.data import Loaders, RunArguments, arguments, prepare_data
from pyro_elbo.training.folder import BEST, HISTORY, LAST, Folder
from pyro_elbo.training.history import History, save_history
from pyro_elbo.training.machine import Machine
from pyro_elbo.training.options import LearningRate, MakeOptimizer, Options, Scheduler, Steps, Stopping
from pyro_elbo.training.quiet import stopping_softly, undisturbed
from pyro_elbo.training.result import FitResult, Which
from pyro_elbo.training.trained import (
    Trained,
    check_position,
    check_validation,
    checked_minibatches,
    first_run,
    make_probe,
    needs_all_rows,
)

if TYPE_CHECKING:
    from lightning import Callback
    from lightning.pytorch.loggers import Logger


def fit(
    model: Program,
    guide: Program,
    train: Any,
    valid: Any = None,
    *,
    loss: TraceBeta_ELBO | None = None,
    lr: LearningRate = 1e-3,
    accuracy: float | None = None,
    optimizer: MakeOptimizer | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Scheduler] | None = None,
    max_epochs: int | None = None,
    max_steps: int | None = None,
    batch_size: int | None = 128,
    accumulate_grad_batches: int = 1,
    patience: int | None = None,
    restore_best: bool | None = None,
    dir: str | os.PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    save_every: int | None = None,
    seed: int = 0,
    devices: int = 1,
    num_nodes: int = 1,
    accelerator: str = "auto",
    precision: str = "32-true",
    grad_clip: float | None = None,
    compile: Compile = False,
    logger: "Logger | Sequence[Logger] | None" = None,
    callbacks: "Callback | Sequence[Callback] | None" = None,
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
        lr: the learning rate of Adam; unused with ``optimizer``. ``"auto"`` lowers it once the iterates are stationary,
            from 0.05 or from those of ``optimizer``, averages them, and ends training at ``accuracy``, as
            :meth:`SVI.converge` does. An epoch then takes at least 100 steps.
        accuracy: with ``lr="auto"``, the distance from the optimum at which training ends, in standard deviations of
            the posterior; 0.1 if omitted.
        optimizer: a function from parameters to a torch optimizer.
        scheduler: a function from the optimizer to a scheduler of ``torch.optim.lr_scheduler``, stepped after every
            epoch; or to Lightning's dictionary, ``{"scheduler": ..., "interval": "step"}``, stepped with the optimizer.
            ReduceLROnPlateau watches the validation ELBO (mode="max").
        max_epochs, max_steps: the most epochs (50 if omitted; with ``lr="auto"`` those of 100 000 steps), and the most
            steps of the optimizer; the first that is reached counts.
        batch_size: rows per batch; None for all.
        accumulate_grad_batches: the batches whose gradients one step of the optimizer averages. Schedules of weights
            count steps.
        patience: stop after this many epochs without a better validation ELBO, counted after warm-up.
        restore_best: whether the parameters of the epoch with the best validation ELBO are restored; True with
            ``patience`` if omitted (unless ``lr="auto"`` has converged), otherwise those of the last epoch stay.
        dir: folder for ``best.ckpt``, ``last.ckpt`` and ``history.nc``; it must not hold another run.
        resume: continue from ``dir/last.ckpt`` exactly as if training had not stopped (unless a DataLoader draws
            from its own generator). ``max_epochs`` and ``max_steps`` count from the start of training.
        overwrite: replace the run that ``dir`` holds.
        save_every: write ``dir/last.ckpt`` after this many steps too, not only after every epoch, for epochs that take
            hours. A resumed run continues with the next batch. Noise is a function of this number too.
        seed: repeats a run bit for bit on a CPU. The caller's random state is restored afterwards.
        devices: processes on a machine; they share the rows, average their gradients and draw separate noise. A batch
            of each has ``batch_size`` rows, so that a step sees ``devices * num_nodes * batch_size``.
        num_nodes: machines, each of which runs the script under torchrun.
        accelerator: where one process trains, ``"cpu"``, ``"gpu"`` or another of Lightning's.
        precision: ``"32-true"`` leaves dtypes to the programs; ``"bf16-mixed"`` and ``"16-mixed"`` run layers in half
            precision under autocast. Training in float64 takes torch.set_default_dtype(torch.float64) and no option.
        grad_clip: the largest norm of the gradient; larger gradients are scaled down.
        compile: run repeated steps as one compiled graph (see :class:`SVI`), or in Python with a warning where that
            fails (``"auto"``).
        logger: Lightning's loggers; they get every number of the history, and loss and ELBO of single steps.
        callbacks: Lightning's callbacks, beside those of the library. They can monitor ``valid_elbo`` and
            ``train_elbo``.
        progress: show the progress bar, and at the end one line of the diagnosis, and of convergence.

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
        ProgramError: the programs, the backward pass, the optimizer or the scheduler fail.

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
    check_seed(seed, optional=False)
    check_flag("progress", progress)
    check_counts({}, {"batch_size": batch_size})
    steps = Steps(lr, accuracy, optimizer, scheduler, accumulate_grad_batches, grad_clip, compile)
    stop = Stopping(max_epochs, max_steps, patience, restore_best, valid is not None)
    machine = Machine(devices, num_nodes, accelerator, precision, logger, callbacks, compile, steps.is_auto)
    options = Options(steps, stop, machine, Folder(dir, resume, overwrite, save_every), int(seed), progress)
    with undisturbed(), tempfile.TemporaryDirectory() as scratch:
        loaders, first = prepare_data(train, valid, batch_size, options.seed, model, guide)
        loaders.check_processes(machine.processes)
        if save_every is not None:
            check_position(loaders, machine.processes, steps.is_auto)
        run = _prepare(loss(model, guide), loaders, first, options, scratch)
        run.train()
        result = run.result(loaders.as_arguments(first["train"][0]))
    if progress and run.trainer.global_rank == 0:
        print(f"diagnosis: {result.diagnosis.summary}")
        if result.convergence is not None:
            print(f"convergence: {result.convergence.summary}")
    return result


def _prepare(
    module: TermsModule, loaders: Loaders, first: dict[str, list[Any]], options: Options, scratch: str
) -> "_Run":
    """Find what is to be trained, and check all that can be checked, before anything is written."""
    from pyro_elbo.training.lightning import LightningPrograms
    from pyro_elbo.training.trainer import make_trainer

    machine, place, seed = options.machine, options.place, options.seed
    batches = loaders.steps(machine.processes)
    passes = options.steps.passes(batches)
    options = _planned(module.elbo, passes * batches, options)
    pyro.set_rng_seed(seed)
    trained, terms = first_run(module, *arguments(first["train"][0]))
    check_validation(module, first, seed)
    checked = checked_minibatches(module, terms, batches * machine.processes, loaders)
    if checked is not loaders:
        first = first | {"valid": list(checked("valid"))}
    loaders = replace(checked, passes=passes)
    probe = make_probe(trained, terms, first, options.seed)
    folder = place.prepared(scratch)
    files = folder if place.dir is not None or options.stop.restores or machine.forks else None
    programs = LightningPrograms(trained, loaders, options, probe, files)
    programs.shares_rows = machine.processes > 1 and needs_all_rows(module.elbo, terms)
    with group_of_one() if machine.processes > 1 else nullcontext():
        programs.configure_optimizers()
    trainer = make_trainer(files, options, loaders)
    if (start := place.start(folder)) is not None:
        check_resumable(start, programs, options.stop)
    return _Run(trained, programs, trainer, options, files, start, probe, terms.point_estimates)


def _planned(loss: TraceBeta_ELBO, batches: int, options: Options) -> Options:
    """Return the options with a number of epochs, of so many batches each; check that they suffice."""
    steps = -(-batches // options.steps.accumulate_grad_batches)
    stop = options.stop.planned(steps, options.steps.is_auto)
    stop.check_schedule(loss, 0 if options.place.resume else loss.step, steps)
    if options.steps.is_auto:
        stop.check_convergence(loss, steps)
    return options._replace(stop=stop)


@contextmanager
def _training(trained: Trained) -> Iterator[None]:
    """Train in training mode; every module has the mode afterwards that it had before."""
    modules = (trained.module, *trained.used)
    with keeping_modes(*modules):
        for module in modules:
            module.train()
        yield


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
    except torch.multiprocessing.ProcessExitedException as error:
        raise errors.ProgramError(
            f"Training ended since {error}; a machine out of memory sends SIGKILL. Train by fewer processes or on "
            "smaller batches; with dir=..., resume=True continues from the last checkpoint."
        ) from error


class _Run(NamedTuple):
    """A run; ``files`` is the folder of its checkpoints, ``start`` the one that it continues.

    ``points`` are the latents of which the guide is a point estimate.
    """

    trained: Trained
    programs: Any
    trainer: Any
    options: Options
    files: Path | None
    start: Path | None
    probe: Probe
    points: tuple[str, ...]

    def train(self) -> None:
        """Train; the parameters end up in the programs, or in files of several processes."""
        with _training(self.trained), _errors_of_processes(), stopping_softly(self.trainer), self._restoring():
            self.trainer.fit(self.programs, ckpt_path=self.start, weights_only=True)

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        """Raise CheckpointError where Lightning cannot restore the checkpoint."""
        try:
            yield
        except Exception as error:
            if self.start is None or self.programs.has_started:
                raise
            with reading(self.start, KIND):
                raise error

    def result(self, data: RunArguments) -> FitResult:
        """Restore the best epoch where it is wanted, write the history, and return the result."""
        stop, module = self.options.stop, self.trained.module
        history, steps = self._outcome()
        best, last, epochs = history.best(), history.last, len(history.epochs)
        if not any(history.probes.get(last, {}).values()):
            history.add_probe(self.probe())
        convergence = self._convergence()
        averages = convergence is not None and convergence.converged and stop.restore_best is None
        holds, kept = self._restore(best == last, stop.restores and not averages)
        dataset = history.to_dataset(module.elbo.loss_units)
        if self.points:
            dataset.attrs["point_estimates"] = list(self.points)
        files = None if self.options.place.dir is None else self.files
        if files is not None and self.trainer.global_rank == 0:
            save_history(dataset, files / HISTORY)
        return FitResult(
            module.model,
            module.guide,
            module.elbo,
            dataset,
            best_epoch=best,
            stopped_early=epochs < stop.epochs and steps != stop.max_steps,
            best_path=files and files / BEST,
            last_path=files and files / LAST,
            seed=self.options.seed,
            data=data,
            holds=holds,
            convergence=convergence,
            _trained=self.trained,
            _kept=kept,
        )

    def _outcome(self) -> tuple[History, int]:
        """Return the history and the number of steps; several processes leave both and the parameters in a file."""
        if not self.options.machine.forks or self.files is None:
            return self.programs.history, self.trainer.global_step
        checkpoint = load_checkpoint(self.files / LAST)
        self.trained.load_state_dict(checkpoint["state_dict"])
        return History.of(checkpoint["history"]), checkpoint["global_step"]

    def _convergence(self) -> ConvergenceReport | None:
        """Return the report of ``lr="auto"``; what ended a run that still had steps to take has stopped it early."""
        run = self.programs.convergence
        return None if run is None else run.report("early stopping" if run.due else None)

    def _best(self, files: Path) -> dict[str, Any]:
        """Read the parameters of the best epoch; processes that torchrun has started get them from the first."""
        state = load_checkpoint(files / BEST)["state_dict"] if self.trainer.global_rank == 0 else {}
        machine = self.options.machine
        return state if machine.processes == 1 or machine.forks else self.trainer.strategy.broadcast(state)

    def _restore(self, best_is_last: bool, restores: bool) -> tuple[Which, dict[str, dict[str, Any]]]:
        """Restore the best epoch if it is wanted; return the epoch in use, and the parameters of the other one."""
        if self.files is None or best_is_last:
            return "last", {}
        best = self._best(self.files)
        if not restores:
            return "last", {"best": best}
        elbo, last = self.trained.module.elbo, copy.deepcopy(dict(self.trained.state_dict()))
        steps = elbo.step
        self.trained.load_state_dict(best)
        elbo.step = steps
        return "best", {"last": last}
