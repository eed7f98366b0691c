"""Checkpoints and saved states: read without running code, compared with the programs before they are loaded."""

import os
import tempfile
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_elbo.errors import ArgumentError, CheckpointError

CHECKPOINT_PARTS = frozenset(
    ("state_dict", "history", "optimizer_states", "loops", "epoch", "global_step", "pytorch-lightning_version")
)


def read_file(path: Path, parts: Collection[str], kind: str) -> dict[str, Any]:
    """Read a dictionary of tensors and plain values without running any code in the file.

    Args:
        path: the file.
        parts: the keys that it must have.
        kind: what the file should be, a noun for the message.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, expected a {kind}: name the file in it.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of damage that the exceptions below report
            with zipfile.ZipFile(path) as archive:
                if changed := archive.testzip():  # torch does not compare the checksums that it writes
                    raise zipfile.BadZipFile(f"the checksum of {changed} is wrong")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: expected a {kind}.") from error
    except Exception as error:  # the unpickler raises exceptions of any type on damaged bytes
        raise CheckpointError(f"{path} is damaged or is no {kind}: {error}. Delete it, or use a copy.") from error
    if not isinstance(content, dict) or not set(parts) <= content.keys():
        missing = sorted(set(parts) - content.keys()) if isinstance(content, dict) else sorted(parts)
        raise CheckpointError(f"{path} is no {kind}: it lacks {missing}. Delete it, or name another file.")
    return content


def write_file(content: Mapping[str, Any], path: Path) -> None:
    """Write a dictionary of tensors and plain values: a reader sees the old file or the whole new one.

    Raises:
        CheckpointError: the file cannot be written.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, expected the name of a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(dict(content), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}. Choose another path.") from error


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
    return read_file(path, CHECKPOINT_PARTS, "checkpoint of pe.fit")


def check_resumable(path: Path, programs: Any, optimizer: torch.optim.Optimizer, stop: Any) -> str:
    """Compare a checkpoint with the programs and the plan, and return its path.

    Raises:
        CheckpointError: the checkpoint cannot be read, or belongs to other programs or another optimizer.
        ArgumentError: it holds as many epochs or steps as training shall have, or ends within an epoch.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: there is no run to resume. Leave out resume for the first one.")
    checkpoint = load_checkpoint(path)
    check_state(path, checkpoint["state_dict"], programs.state_dict())
    ours, theirs = optimizer.state_dict(), checkpoint["optimizer_states"][0]
    options = [[sorted(group) for group in state["param_groups"]] for state in (ours, theirs)]
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
        if most is not None and done >= most:
            raise ArgumentError(
                f"{path} holds {done} {what} and max_{what}={most}. It counts from the start of training: raise it."
            )
    if not checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]:
        raise ArgumentError(
            f"{path} ends within an epoch, where max_steps stopped training: its data cannot be continued exactly. "
            "Train again with dir=..., overwrite=True and a larger max_steps."
        )
    return str(path)


def _check_convergence(path: Path, state: Mapping[str, Any] | None, is_auto: bool) -> None:
    """Raise unless a run of ``lr="auto"`` is continued as such, and has not ended."""
    if (state is not None) != is_auto:
        raise CheckpointError(
            f"{path} was written with{'out' if is_auto else ''} lr='auto', and is to be continued with"
            f"{'' if is_auto else 'out'} it. Pass the lr that wrote it, or another dir."
        )
    if state is not None and state["due"] == 0:
        raise ArgumentError(
            f"{path} holds a run of lr='auto' that has ended. Train on from its averages, which the programs hold or "
            "pe.load gives them: pe.fit(...) without resume, with a smaller accuracy or a larger max_epochs."
        )
