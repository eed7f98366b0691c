"""The folder of a run and the files in it."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pyro_elbo.errors import ArgumentError, CheckpointError, check_flag, check_path
from pyro_elbo.files import why_unwritten
from pyro_elbo.training.checks import check_counts

BEST, LAST, PREVIOUS, HISTORY = "best.ckpt", "last.ckpt", "previous.ckpt", "history.nc"


def keep_previous(folder: Path) -> None:
    """Keep the last checkpoint under another name while the next one is written."""
    last, previous = folder / LAST, folder / PREVIOUS
    if last.exists():
        previous.unlink(missing_ok=True)
        try:
            os.link(last, previous)
        except OSError:  # a file system without hard links
            shutil.copyfile(last, previous)


@dataclass(frozen=True)
class Folder:
    """The folder of a run."""

    dir: str | os.PathLike | None
    resume: bool
    overwrite: bool
    save_every: int | None = None

    def __post_init__(self) -> None:
        if self.dir is not None:
            check_path("dir", self.dir, "a path")
        check_flag("resume", self.resume)
        check_flag("overwrite", self.overwrite)
        if (self.resume or self.overwrite) and self.dir is None:
            name = "resume" if self.resume else "overwrite"
            raise ArgumentError(f"{name}=True needs dir=..., the folder of the run.")
        check_counts({}, {"save_every": self.save_every})
        if self.save_every is not None and self.dir is None:
            raise ArgumentError("save_every needs dir=..., the folder of the run.")
        if self.resume and self.overwrite:
            raise ArgumentError(
                "resume=True continues the run in dir and overwrite=True deletes it: choose one of them."
            )

    def prepared(self, scratch: str) -> Path:
        """Make the folder, protect or delete the run that it holds, and return it; ``scratch`` without ``dir``.

        Raises:
            CheckpointError: the folder holds another run, or cannot be written.
        """
        if self.dir is None:
            return Path(scratch)
        folder = Path(self.dir)
        files = [folder / name for name in (BEST, LAST, PREVIOUS, HISTORY)]
        found = [] if self.resume else [file for file in files if os.path.exists(file)]
        if found and not self.overwrite:
            raise CheckpointError(
                f"{folder} already holds a run ({', '.join(file.name for file in found)}). Pass resume=True to "
                "continue it, overwrite=True to replace it, or another dir."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                torn = (file for name in (".*.ckpt.*", f".{HISTORY}.*") for file in folder.glob(name))
                for file in (*found, *torn):  # a killed process leaves what it was writing
                    file.unlink(missing_ok=True)  # by another process
                return folder
        except OSError as error:
            raise CheckpointError(
                f"The results folder {folder} cannot be written: {why_unwritten(error)} Choose another dir."
            ) from error

    def start(self, folder: Path) -> Path | None:
        """Return the checkpoint to continue from: the last one, or the one before where the last was deleted.

        Raises:
            CheckpointError: there is none.
        """
        if not self.resume:
            return None
        found = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
        if not found:
            raise CheckpointError(
                f"{folder / LAST} does not exist: there is no run to resume. Leave out resume for the first one."
            )
        return found[0]
