"""Files of tensors and plain values: written whole or not at all, read without running code in them."""

import io
import os
import tempfile
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from pyro_elbo.errors import CheckpointError, PyroElboError, first_sentence


def read_file(path: Path, parts: Collection[str], kind: str) -> dict[str, Any]:
    """Read a dictionary of tensors and plain values without running any code in the file.

    Args:
        path: the file.
        parts: the keys that it must have.
        kind: what the file should be, a noun for the message.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else.
    """
    try:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder, expected a {kind}: name the file in it.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of damage that the exceptions below report
            with zipfile.ZipFile(path) as archive:
                if changed := archive.testzip():  # torch does not compare the checksums that it writes
                    raise zipfile.BadZipFile(f"the checksum of {changed} is wrong")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: expected a {kind}.") from error
    except CheckpointError:
        raise
    except Exception as error:  # the unpickler raises exceptions of any type on damaged bytes
        raise CheckpointError(f"{path} is damaged or is no {kind}: {error}. Delete it, or use a copy.") from error
    if not isinstance(content, dict) or not set(parts) <= content.keys():
        missing = sorted(set(parts) - content.keys()) if isinstance(content, dict) else sorted(parts)
        raise CheckpointError(f"{path} is no {kind}: it lacks {missing}. Delete it, or name another file.")
    return content


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Raise CheckpointError where the content of a file, read inside the block, is not what a ``kind`` holds."""
    try:
        yield
    except PyroElboError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {first_sentence(error)}"
        raise CheckpointError(f"{path} is damaged or is no {kind}: {reason} Delete it, or use a copy.") from error


def write_file(content: Mapping[str, Any], path: Path) -> None:
    """Write a dictionary of tensors and plain values: a reader sees the old file or the whole new one.

    Raises:
        CheckpointError: the file cannot be written.
    """
    buffer = io.BytesIO()  # torch hides the reason why a file cannot be written
    torch.save(dict(content), buffer)
    with writing(path), whole_file(path) as file:
        file.write(buffer.getbuffer())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make the folder of a file that is written inside the block, and raise CheckpointError where it cannot be."""
    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise CheckpointError(f"{path} is {kind}, expected the name of a file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        kept = " The file of that name is unchanged." if os.path.exists(path) else ""
        raise CheckpointError(f"{path} cannot be written: {why_unwritten(error)} Choose another path.{kept}") from error


def why_unwritten(error: OSError) -> str:
    """Return why a file or folder cannot be written, without the name that the file has until it is whole."""
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{error.filename} is no folder."
    return first_sentence(OSError(os.strerror(error.errno) if error.errno else error))


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its name only when it is complete and on the disk.

    Raises:
        OSError: it cannot be written.
    """
    with whole_path(path) as temporary, temporary.open("wb") as file:
        yield file


@contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """Give the path of a file that takes its name only when it is complete and on the disk.

    Raises:
        OSError: it cannot be written.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        yield Path(temporary)
        os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        os.close(handle)
