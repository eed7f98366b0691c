"""The arguments of :func:`pyro_elbo.fit`, by what they decide, each checked before anything runs."""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyro_elbo.compile import Compile
from pyro_elbo.errors import ArgumentError, GuideError, check_number, describe, first_sentence
from pyro_elbo.objectives import TraceBeta_ELBO
from pyro_elbo.training.checks import check_compile, check_counts, check_grad_clip, with_python_numbers
from pyro_elbo.training.comparable import check_accuracy, check_steps
from pyro_elbo.training.folder import Folder
from pyro_elbo.training.identity import described
from pyro_elbo.training.machine import Machine

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
Scheduler = Any  # a scheduler of torch, or Lightning's dictionary around one
AUTO_LR = 0.05  # of Adam: far too large is found out, and lowered
AUTO_EPOCH = 100  # steps of an epoch at least: fewer make histories of thousands of epochs
AUTO_STEPS = 100_000
AUTO_ACCURACY = 0.1
MAX_EPOCHS = 50
LearningRate = float | Literal["auto"]
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True)
class Steps:
    """How the parameters move in one step."""

    lr: LearningRate
    accuracy: float | None
    optimizer: MakeOptimizer | None
    scheduler: Callable[[torch.optim.Optimizer], Scheduler] | None
    accumulate_grad_batches: int
    grad_clip: float | None
    compile: Compile

    def __post_init__(self) -> None:
        with_python_numbers(self)
        _check_lr(self.lr)
        check_grad_clip(self.grad_clip)
        check_compile(self.compile)
        check_counts({"accumulate_grad_batches": self.accumulate_grad_batches}, {})
        if self.compile and self.accumulate_grad_batches > 1:
            raise ArgumentError(
                "accumulate_grad_batches: a compiled step is one batch. Raise batch_size, or use compile=False."
            )
        _check_function("optimizer", self.optimizer, torch.optim.Optimizer, "from parameters to a torch optimizer")
        _check_function("scheduler", self.scheduler, _SCHEDULERS, "from the optimizer to a scheduler of torch")
        self._check_auto()

    def _check_auto(self) -> None:
        """Raise ArgumentError for options that exclude ``lr="auto"``, or that need it."""
        if not self.is_auto:
            if self.accuracy is not None:
                raise ArgumentError(
                    "accuracy is the distance from the optimum at which lr='auto' ends training: pass lr='auto', or "
                    "leave accuracy out."
                )
            return
        if self.accuracy is not None:
            check_accuracy(self.accuracy)
        if self.scheduler is not None:
            raise ArgumentError("lr='auto' lowers the learning rate by itself: leave scheduler out, or give a number.")
        if self.accumulate_grad_batches > 1:
            raise ArgumentError("accumulate_grad_batches: a step of lr='auto' is one batch. Raise batch_size.")

    @property
    def is_auto(self) -> bool:
        """Whether the learning rate is lowered, and training ended, by convergence."""
        return self.lr == "auto"

    @property
    def are_own(self) -> bool:
        """Whether the library takes the steps, instead of Lightning."""
        return self.is_auto or bool(self.compile)

    @property
    def goal(self) -> float:
        """The distance from the optimum at which ``lr="auto"`` ends training."""
        return AUTO_ACCURACY if self.accuracy is None else self.accuracy

    def passes(self, batches: int) -> int:
        """Return the passes over so many batches that one epoch takes."""
        return -(-AUTO_EPOCH // batches) if self.is_auto else 1

    def make(self, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """Return the optimizer of the parameters that need a gradient.

        Raises:
            GuideError: there is no parameter to train.
            ArgumentError: ``optimizer`` does not return a torch optimizer, or one that leaves out parameters.
        """
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        leaves = list({id(p): p for p in trained.values()}.values())
        if not leaves:
            raise GuideError(
                "Neither model nor guide has a parameter to train. Give the guide pyro.param's or modules."
            )
        _check_whole(trained)
        made = self._made(leaves)
        if not isinstance(made, torch.optim.Optimizer):
            raise ArgumentError(
                "optimizer must be a function from parameters to a torch optimizer, such as torch.optim.Adam; "
                f"expected a torch.optim.Optimizer, got {type(made).__name__}. Pyro's optimizers are for SVI."
            )
        held = {id(p) for group in made.param_groups for p in group["params"]}
        if missing := [name for name, p in trained.items() if id(p) not in held]:
            raise ArgumentError(
                f"The optimizer does not hold the parameters {missing} and would never train them. Give it all "
                "parameters that it is called with; freeze those that must not change by requires_grad_(False)."
            )
        return made

    def _made(self, leaves: list[Tensor]) -> Any:
        if self.optimizer is None:
            return torch.optim.Adam(leaves, lr=AUTO_LR if isinstance(self.lr, str) else self.lr)
        try:
            return self.optimizer(leaves)
        except (RuntimeError, ValueError, TypeError) as error:
            if "process group" not in str(error):
                raise ArgumentError(
                    f"optimizer fails on the parameters: {first_sentence(error)} Pass a function from parameters to a "
                    "torch optimizer, such as lambda p: torch.optim.Adam(p, lr=1e-3)."
                ) from error
            raise ArgumentError(
                f"optimizer needs several processes, whose state it shares out ({first_sentence(error)}). Pass "
                "devices=2 or more, or an optimizer of one process, such as torch.optim.Adam."
            ) from error

    def schedule(self, optimizer: torch.optim.Optimizer, monitor: str) -> dict[str, Any] | None:
        """Return Lightning's configuration of the scheduler: after every epoch unless ``scheduler`` says otherwise.

        Raises:
            ArgumentError: ``scheduler`` returns no scheduler, one of another optimizer, or one that waits for a
                minimum of the bound.
        """
        if self.scheduler is None:
            return None
        made = self.scheduler(optimizer)
        given = dict(made) if isinstance(made, Mapping) else {"scheduler": made}
        found = given.get("scheduler")
        if not isinstance(found, _SCHEDULERS):
            raise ArgumentError(
                "scheduler must return a scheduler of torch.optim.lr_scheduler, or a dictionary such as "
                f"{{'scheduler': ..., 'interval': 'step'}}; got {describe(made)}."
            )
        if found.optimizer is not optimizer:
            raise ArgumentError("scheduler must schedule the optimizer that it is called with, not another one.")
        if given.get("interval", "epoch") not in ("epoch", "step"):
            raise ArgumentError(f"scheduler: interval must be 'epoch' or 'step', got {given['interval']!r}.")
        plateau = isinstance(found, torch.optim.lr_scheduler.ReduceLROnPlateau)
        if plateau and "monitor" not in given and found.mode != "max":
            raise ArgumentError(f"scheduler: ReduceLROnPlateau watches {monitor}, which is maximized: pass mode='max'.")
        return ({"monitor": monitor} if plateau else {}) | {"interval": "epoch", "frequency": 1} | given


def _check_whole(parameters: Mapping[str, Tensor]) -> None:
    """Raise ArgumentError for parameters of which this process holds a part."""
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is not None and (parts := [n for n, p in parameters.items() if isinstance(p, tensor.DTensor)]):
        raise ArgumentError(
            f"The parameters {parts} are sharded (FSDP, DTensor). FSDP gathers a module's parameters when its forward "
            "runs, and programs may read them elsewhere: every process of pe.fit holds them whole. Share out the "
            "optimizer's state instead: optimizer=lambda p: ZeroRedundancyOptimizer(p, torch.optim.Adam, lr=1e-3)."
        )


def _check_lr(lr: Any) -> None:
    if not isinstance(lr, str):
        check_number("lr", lr)
    elif lr != "auto":
        raise ArgumentError(f'lr must be a finite number >= 0, or "auto", got {describe(lr)}.')


_SCHEDULERS = (torch.optim.lr_scheduler.LRScheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)


def _check_function(name: str, given: Any, made: Any, what: str) -> None:
    if isinstance(given, made):
        kind = type(given).__name__
        module, call = ("optim", "params") if name == "optimizer" else ("optim.lr_scheduler", "optimizer")
        raise ArgumentError(
            f"{name} must be a function {what}, got a {kind} instance, which may not hold all parameters. Pass "
            f"{name}=lambda {call}: torch.{module}.{kind}({call}, ...)."
        )
    if given is not None and not callable(given):
        raise ArgumentError(f"{name} must be a function {what}, got {given!r}.")


@dataclass(frozen=True)
class Stopping:
    """When training ends, and which parameters it leaves."""

    max_epochs: int | None
    max_steps: int | None
    patience: int | None
    restore_best: bool | None
    has_validation: bool

    def __post_init__(self) -> None:
        with_python_numbers(self)
        limits = {"max_epochs": self.max_epochs, "max_steps": self.max_steps, "patience": self.patience}
        check_counts({}, limits)
        if not isinstance(self.restore_best, bool | None):
            raise ArgumentError(f"restore_best must be True, False or None, got {describe(self.restore_best)}.")
        for name in ("patience", "restore_best"):
            if getattr(self, name) and not self.has_validation:
                raise ArgumentError(f"{name} needs validation data: pass valid=..., or leave {name} out.")

    @property
    def restores(self) -> bool:
        """Whether the parameters of the best epoch are restored: with ``patience``, unless told otherwise."""
        return self.patience is not None if self.restore_best is None else self.restore_best

    def planned(self, steps: int, is_auto: bool) -> "Stopping":
        """Return this with a number of epochs, of so many steps each."""
        epochs = -(-AUTO_STEPS // steps) if is_auto else MAX_EPOCHS
        return replace(self, max_epochs=epochs if self.max_epochs is None else self.max_epochs)

    @property
    def epochs(self) -> int:
        """The most epochs, once they are planned."""
        assert self.max_epochs is not None
        return self.max_epochs

    def most(self, steps: int) -> int:
        """Return the most steps of training, of so many steps an epoch."""
        return min(self.epochs * steps, self.max_steps or self.epochs * steps)

    def check_convergence(self, loss: TraceBeta_ELBO, steps: int) -> None:
        """Raise ArgumentError if training, of so many steps an epoch, is too short to show convergence."""
        limit = f"max_epochs={self.max_epochs}" if self.max_steps is None else f"max_steps={self.max_steps}"
        check_steps(loss, self.most(steps), f"The steps of lr='auto' ({limit}, {steps} an epoch)")

    def check_schedule(self, loss: TraceBeta_ELBO, taken: int, steps: int) -> None:
        """Raise ArgumentError if training, of so many steps an epoch, ends before a schedule of the loss does."""
        end = taken + self.most(steps)
        if loss.settled > end:
            raise ArgumentError(
                f"The schedule settles after {loss.settled} optimization steps, but {self.max_epochs} epochs of "
                f"{steps} steps a process{f', at most {self.max_steps},' if self.max_steps else ''} end at step {end}: "
                "training would end before β is final. Shorten the schedule or train longer."
            )


class Options(NamedTuple):
    """All options of a fit."""

    steps: Steps
    stop: Stopping
    machine: Machine
    place: Folder
    seed: int
    progress: bool

    def identity(self) -> dict[str, str]:
        """Return what a resumed run must share with the first, by the name of the argument."""
        steps = {n: getattr(self.steps, n) for n in ("lr", "grad_clip", "accumulate_grad_batches")}
        other = {"devices": self.machine.processes, "save_every": self.place.save_every}
        return {name: described(x) for name, x in (steps | other).items()}
