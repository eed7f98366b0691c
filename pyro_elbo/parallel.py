"""Independent tasks, in this process or spread over several; every result is a file as soon as it is there.

A task is a name. ``work(name)`` returns tensors and plain values, which depend on the name and the settings alone. A
task starts from an empty parameter store and runs on one thread, so its numbers do not depend on the number of
processes. A process that is killed loses the task that it was at.
"""

import json
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import traceback
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from tqdm import tqdm

from pyro_elbo.display import progress_bar
from pyro_elbo.errors import ArgumentError, CheckpointError, check_count, check_flag, check_path
from pyro_elbo.files import read_file, reading, whole_file, why_unwritten, write_file

SETTINGS = "settings.json"
_ALIVE = 1.0  # seconds between two looks at whether the parent process lives


class Work(ABC):
    """What tasks do; with several processes each has its own copy."""

    def prepare(self) -> None:  # noqa: B027  (most work needs nothing)
        """Run once in every process, before its first task."""

    @abstractmethod
    def __call__(self, name: str) -> Mapping[str, Any]:
        """Carry out a task and return tensors and plain values."""

    @abstractmethod
    def check(self, result: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError unless a file holds a result of this work."""


class Folder:
    """A folder of results of one kind, made under one set of settings.

    Args:
        path: the folder; it is made.
        settings: what the results depend on, as plain values; an error names the first one that differs.
        overwrite: remove the results of other settings instead.

    Raises:
        CheckpointError: the folder holds results of other settings, or files of someone else.
    """

    def __init__(self, path: str | os.PathLike, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = check_path("dir", path, "the name of a folder")
        ours = json.loads(json.dumps(settings, default=int))  # numbers of NumPy
        theirs = self._settings()
        if theirs is not None and overwrite:
            for old in self.path.glob("*.pt"):
                old.unlink()
        elif theirs is not None:
            self._check_same(ours, theirs)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path / SETTINGS) as file:
                file.write(json.dumps(ours, indent=1).encode())
        except OSError as error:
            why = why_unwritten(error)
            raise CheckpointError(f"dir: {self.path} cannot be written: {why} Choose another folder.") from error

    def done(self, names: Collection[str]) -> list[str]:
        """Return the names whose results are there."""
        return [name for name in names if self._file(name).exists()]

    def write(self, name: str, result: Mapping[str, Any]) -> None:
        """Keep a result, whole or not at all."""
        write_file({"result": dict(result)}, self._file(name))

    def read(self, name: str, work: Work) -> dict[str, Any]:
        """Return a result of the work."""
        path, kind = self._file(name), "result of a task"
        result = read_file(path, ("result",), kind)["result"]
        with reading(path, kind):
            work.check(result)
        return result

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.pt"

    def _settings(self) -> dict[str, Any] | None:
        """Return the settings of the results that are there; None for a folder that is new or empty."""
        if os.path.exists(self.path) and not self.path.is_dir():
            raise CheckpointError(f"dir: {self.path} is a file, expected a folder.")
        names = sorted(os.listdir(self.path)) if os.path.exists(self.path) else []
        names = [name for name in names if not name.startswith(".")]  # a killed process leaves what it was writing
        if not names:
            return None
        try:
            found = json.loads((self.path / SETTINGS).read_text())
        except FileNotFoundError as error:
            raise CheckpointError(
                f"dir: {self.path} holds {names[:3]} and no {SETTINGS}: it is no folder of results. "
                "Choose a new or an empty one."
            ) from error
        except ValueError as error:
            raise CheckpointError(f"{self.path / SETTINGS} is damaged: {error}. Delete the folder.") from error
        return found if isinstance(found, dict) else {}

    def _check_same(self, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
        for name in {**ours, **theirs}:
            if ours.get(name) != theirs.get(name):
                raise CheckpointError(
                    f"dir: {self.path} holds results with {name} = {theirs.get(name)!r}, and this call has "
                    f"{ours.get(name)!r}. Choose another folder, the same {name}, or overwrite=True."
                )


class Finished(NamedTuple):
    """Results by the names of their tasks, and why other tasks were lost."""

    results: dict[str, dict[str, Any]]
    lost: dict[str, str]


def run_tasks(
    work: Work,
    names: Sequence[str],
    settings: Mapping[str, Any],
    *,
    dir: str | os.PathLike | None,
    overwrite: bool,
    num_workers: int,
    progress: bool,
    unit: str,
) -> Finished:
    """Carry out the tasks whose results are not in the folder yet, and return the results of all.

    Raises:
        ArgumentError: ``num_workers`` is not positive, or ``work`` cannot be sent to other processes.
        CheckpointError: the folder holds something else.
        Exception: what ``work`` raises; results that are there stay.
    """
    check_count("num_workers", num_workers)
    check_flag("overwrite", overwrite)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Folder(scratch if dir is None else dir, settings, overwrite)
        done = folder.done(names)
        waiting = [name for name in names if name not in set(done)]
        with progress_bar(progress, total=len(names), initial=len(done), unit=f" {unit}") as bar:
            if num_workers == 1:
                lost = _run_here(work, waiting, folder, bar)
            else:
                lost = _run_in_processes(work, waiting, folder, min(num_workers, len(waiting)), bar)
        return Finished({name: folder.read(name, work) for name in names if name not in lost}, lost)


@contextmanager
def _isolated() -> Iterator[None]:
    """Start from an empty parameter store, on one thread; the caller's store and threads come back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pyro.get_param_store().scope():
            yield
    finally:
        torch.set_num_threads(threads)


def _run_here(work: Work, names: Sequence[str], folder: Folder, bar: tqdm) -> dict[str, str]:
    if names:
        with _isolated():
            work.prepare()
    for name in names:
        with _isolated():
            folder.write(name, work(name))
        bar.update()
    return {}


class _Worker:
    """A process that carries out the tasks that it is told to.

    Attributes:
        task: the name of the task that it is at.
    """

    def __init__(self, context: BaseContext, work: Work, folder: Folder) -> None:
        self.connection, theirs = context.Pipe()
        self.process: Any = context.Process(target=_serve, args=(theirs, work, folder, os.getpid()))  # type: ignore
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads, of progress bars
            self.process.start()
        theirs.close()
        self.task = ""

    def begin(self, task: str) -> None:
        self.task = task
        self.connection.send(task)

    def stop(self) -> None:
        self.process.terminate()
        self.process.join(5.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def _run_in_processes(work: Work, names: Sequence[str], folder: Folder, count: int, bar: tqdm) -> dict[str, str]:
    """Hand out tasks as processes become free; a process that dies is replaced, and its task is lost."""
    context, waiting, lost = _context(work), deque(names), {}
    workers: dict[Any, _Worker] = {}
    try:
        while waiting or workers:
            while waiting and len(workers) < count:
                worker = _Worker(context, work, folder)
                workers[worker.connection] = worker
                worker.begin(waiting.popleft())
            for connection in wait(list(workers)):
                worker = workers[connection]
                if (died := _finish(worker)) is not None:
                    lost[worker.task] = died
                bar.update()
                if died is None and waiting:
                    worker.begin(waiting.popleft())
                else:
                    workers.pop(connection).stop()
    finally:
        for worker in workers.values():
            worker.stop()
    return lost


def _finish(worker: _Worker) -> str | None:
    """Take note of a finished task; return why its process died, or None."""
    try:
        error = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        return f"its process ended with exit code {worker.process.exitcode}"
    if error is not None:
        raise error
    return None


def _context(work: Work) -> BaseContext:
    """Choose how processes start: as copies on Linux, which need nothing to be picklable, otherwise anew."""
    if sys.platform == "linux" and not torch.cuda.is_initialized():
        return multiprocessing.get_context("fork")
    try:
        ForkingPickler.dumps(work)
    except Exception as error:
        raise ArgumentError(
            f"num_workers: the programs cannot be sent to other processes ({error}). Define them at the top level of a "
            "module that can be imported, or use num_workers=1."
        ) from error
    return multiprocessing.get_context("spawn")


def _serve(connection: Connection, work: Work, folder: Folder, parent: int) -> None:
    """Carry out tasks in a process of its own until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    prepared = False
    while True:
        while not connection.poll(_ALIVE):
            if os.getppid() != parent:
                return
        name = connection.recv()
        try:
            if not prepared:
                with _isolated():
                    work.prepare()
                prepared = True
            with _isolated():
                folder.write(name, work(name))
        except Exception as error:
            connection.send(_portable(error))
        else:
            connection.send(None)


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent to the parent, with its traceback as a note."""
    note = "".join(traceback.format_exception(error))
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In another process:\n{note}")
    return error
