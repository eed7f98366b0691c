"""Checkpoints and saved states: read without running code, compared with the programs before they are loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def check_resumable(path: Path, programs: Any, stop: Any) -> None:
    """Compare a checkpoint with the programs, the data, the objective, the optimizer and the plan.

    Raises:
        CheckpointError: the checkpoint cannot be read, or belongs to other programs or another run.
        ArgumentError: it holds more epochs or steps than training shall have, or ends within an epoch.
    """
    checkpoint = _load(path)
    with reading(path, KIND):
        _compare(path, checkpoint, programs, stop)


def _compare(path: Path, checkpoint: Mapping[str, Any], programs: Any, stop: Any) -> None:
    check_state(path, checkpoint["state_dict"], programs.state_dict())
    history = History.of(checkpoint["history"])
    if len(history.epochs) or "within" not in checkpoint:  # none yet within the first epoch
        history.best()
        history.to_dataset()
    _check_run(path, checkpoint["run"], programs.identity)
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
    """Raise CheckpointError for a run with other data, or other arguments that decide on its steps."""
    names = dict.fromkeys([*expected, *found])
    if changed := {n: (expected.get(n), found.get(n)) for n in names if expected.get(n) != found.get(n)}:
        parts = "; ".join(f"{name}: expected {theirs}, got {ours}" for name, (ours, theirs) in changed.items())
        raise CheckpointError(
            f"{path} belongs to another run. {parts}. Resume with the arguments of its first call, or start a run in "
            "another dir."
        )
