"""Checkpoints and saved states: read without running code, compared with the programs before they are loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_elbo.errors import ArgumentError, CheckpointError
from pyro_elbo.files import read_file, reading
from pyro_elbo.training.folder import PREVIOUS
from pyro_elbo.training.history import History

KIND = "checkpoint of pe.fit"
CHECKPOINT_PARTS = frozenset(
    ("state_dict", "history", "optimizer_states", "loops", "epoch", "global_step", "run", "pytorch-lightning_version")
)


def check_state(path: Path, state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless a state has the names, shapes and dtypes of that of the programs."""
    ours, theirs = _shapes(expected), _shapes(state)
    missing, unexpected = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    differing = {n: (ours[n], theirs[n]) for n in ours.keys() & theirs.keys() if ours[n] != theirs[n]}
    found = {"missing": missing, "unexpected": unexpected, "shape and dtype (expected, got)": differing}
    if wrong := "; ".join(f"{what}: {names}" for what, names in found.items() if names):
        raise CheckpointError(
            f"{path} belongs to other programs. {wrong}. Use the model and guide that wrote it, with the same sizes "
            "and torch.set_default_dtype, or another file."
        )


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    return {name: (tuple(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in tensors.items()}


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of :func:`fit`: see :func:`read_file`."""
    return read_file(path, CHECKPOINT_PARTS, KIND)


def check_resumable(path: Path, programs: Any, optimizer: torch.optim.Optimizer, stop: Any) -> None:
    """Compare a checkpoint with the programs, the data and the plan.

    Raises:
        CheckpointError: the checkpoint cannot be read, or belongs to other programs, data or another optimizer.
        ArgumentError: it holds more epochs or steps than training shall have, or ends within an epoch.
    """
    checkpoint = _load(path)
    with reading(path, KIND):
        _compare(path, checkpoint, programs, optimizer, stop)


def _compare(path: Path, checkpoint: Mapping[str, Any], programs: Any, optimizer: Any, stop: Any) -> None:
    check_state(path, checkpoint["state_dict"], programs.state_dict())
    history = History.of(checkpoint["history"])
    if len(history.epochs) or "within" not in checkpoint:  # none yet within the first epoch
        history.best()
        history.to_dataset()
    _check_run(path, checkpoint["run"], programs.identity)
    ours, theirs = optimizer.param_groups, checkpoint["optimizer_states"][0]["param_groups"]
    options = [[sorted(group) for group in groups] for groups in (ours, theirs)]
    if options[0] != options[1]:
        raise CheckpointError(
            f"{path} was written with another optimizer; options (expected, got): {options}. Pass the optimizer that "
            "wrote it, or another dir."
        )
    _check_convergence(path, checkpoint.get("convergence"), programs.options.is_auto)
    for what, done, most in (
        ("epochs", checkpoint["epoch"] + 1, stop.max_epochs),
        ("steps", checkpoint["global_step"], stop.max_steps),
    ):
        if most is not None and done > most:
            raise ArgumentError(
                f"{path} holds {done} {what} and max_{what}={most}. It counts from the start of training: raise it."
            )
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    continues = progress["is_last_batch"] or "within" in checkpoint
    if not continues and checkpoint["global_step"] != stop.max_steps:
        raise ArgumentError(
            f"{path} ends within an epoch, where max_steps stopped training: its data cannot be continued exactly. "
            "Train again with dir=..., overwrite=True and a larger max_steps."
        )


def _load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or name the one before it."""
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        before = path.with_name(PREVIOUS)
        if path == before or not before.exists():
            raise
        raise CheckpointError(
            f"{error} Without it, resume=True continues from {before}, the checkpoint before."
        ) from error


def _check_run(path: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raise CheckpointError for a run with another seed, batch size, data or number of processes."""
    if changed := {n: (expected[n], found.get(n)) for n in expected if expected[n] != found.get(n)}:
        parts = "; ".join(f"{name}: expected {theirs}, got {ours}" for name, (ours, theirs) in changed.items())
        raise CheckpointError(
            f"{path} belongs to another run. {parts}. Resume with the arguments of its first call, or start a run in "
            "another dir."
        )


def _check_convergence(path: Path, state: Mapping[str, Any] | None, is_auto: bool) -> None:
    """Raise unless a run of ``lr="auto"`` is continued as such."""
    if (state is not None) != is_auto:
        raise CheckpointError(
            f"{path} was written with{'out' if is_auto else ''} lr='auto', and is to be continued with"
            f"{'' if is_auto else 'out'} it. Pass the lr that wrote it, or another dir."
        )
