"""Record of a run: the Python code that it executed, and its calls of functions that no guard can watch.

A value can enter a graph only through code that runs while the graph is captured. So only that code has to be searched
for what it reads. ``sys.setprofile`` reports every Python function that is entered and every C function that is called,
however the program came by it: by an import inside a function, a registry, ``globals()`` or ``eval``.
"""

import cProfile
import functools
import gc
import importlib
import os
import random
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

_STDLIB = sys.stdlib_module_names - {"__main__", "types", "argparse"}  # namespaces are the user's own
# Libraries whose code and objects hold no settings of the user's, or hold them in the ways that ``reach`` knows.
LIBRARIES = frozenset(
    (
        *("torch", "pyro", "pyro_elbo", "numpy", "pandas", "scipy", "lightning", "lightning_utilities", "torchmetrics"),
        *("functorch", "torchgen", "triton", "typing_extensions", "sympy", "mpmath", "opt_einsum", "_distutils_hack"),
        *("beartype", "jaxtyping", "typeguard", "tqdm", "rich", "loguru", "structlog", "absl", "wandb", "mlflow"),
        *("tensorboard", "matplotlib", "arviz", "pytest", "_pytest", "pluggy", "IPython", "ipykernel", "debugpy"),
        *("pydevd", "coverage"),
    )
)
# Modules of the standard library that call C functions on behalf of their caller.
_ON_BEHALF = {
    *("os", "posixpath", "ntpath", "genericpath", "pathlib", "random", "datetime", "uuid", "secrets", "io", "codecs"),
    *("json", "csv", "pickle", "gzip", "glob", "tomllib", "configparser", "timeit", "calendar", "tempfile", "shelve"),
}
_ABSTRACT = {"_collections_abc", "collections"}
_READERS = {"numpy", "torch", "pandas", "scipy"}  # libraries that open files on behalf of their caller
_CLOCK = {
    *("time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time"),
    *("process_time_ns", "thread_time", "thread_time_ns", "clock_gettime", "localtime", "gmtime", "ctime", "strftime"),
}
_VOLATILE = {
    **dict.fromkeys(_CLOCK, "time"),
    **dict.fromkeys(("now", "utcnow", "today"), "datetime"),
    **dict.fromkeys(("stat", "listdir", "scandir", "getcwd", "urandom", "getloadavg", "times", "access"), os.name),
    **dict.fromkeys(("random", "getrandbits"), "random"),
    **dict.fromkeys(("open",), "io"),
    **dict.fromkeys(("input",), "builtins"),
    **dict.fromkeys(("_getframe",), "sys"),
}
FROZEN = "whose result a graph would freeze: pass it as an argument"
_ENVIRON = type(os.environ).__getitem__.__code__
_ITERATED = type(os.environ).__iter__.__code__
_IMPORT = importlib.import_module.__code__
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class Execution:
    """What a run executed.

    Attributes:
        code: each code object that ran, by its id, with its globals and its top-level package.
        environment: environment variables that were read, as ``os.environ._data`` names them; None for all of them.
        contexts: context variables that were read.
        modules: modules that were imported by a computed name.
        volatile: calls whose result may differ from one run to the next, as a sentence names them.
    """

    def __init__(self) -> None:
        self.code: dict[int, tuple[types.CodeType, dict[str, Any], str]] = {}
        self.environment: dict[Any, None] = {}
        self.contexts: list[ContextVar] = []
        self.modules: list[types.ModuleType] = []
        self.volatile: dict[str, None] = {}

    def note(self, frame: types.FrameType, event: str, called: Any) -> None:
        """Note one event of ``sys.setprofile``."""
        if event == "call":
            code = frame.f_code
            if id(code) not in self.code:
                self.code[id(code)] = code, frame.f_globals, _package_of_frame(frame)
            if code is _ENVIRON or code is _ITERATED:
                if _responsible(frame, _ON_BEHALF | _ABSTRACT) is not None:
                    self.environment[_variable(frame)] = None
            elif code is _IMPORT and frame.f_locals["name"] in sys.modules:
                self.modules.append(sys.modules[frame.f_locals["name"]])
        elif event == "c_call":
            name = getattr(called, "__name__", None)
            if name == "get":
                if type(called.__self__) is ContextVar and not is_library(_package_of_frame(frame)):
                    self.contexts.append(called.__self__)
            elif name in _VOLATILE:
                self._note_volatile(frame, called)

    def _note_volatile(self, frame: types.FrameType, called: Any) -> None:
        if (full := volatile_name(called)) is None:
            return
        caller = _responsible(frame, _ON_BEHALF | _READERS if called.__name__ == "open" else _ON_BEHALF)
        if caller is not None:
            where = f"{os.path.basename(caller.f_code.co_filename)}, line {caller.f_lineno}"
            self.volatile[f"{full}() ({where}), {FROZEN}"] = None

    def update(self, other: "Execution") -> None:
        """Add what another run executed."""
        self.code |= other.code
        self.environment |= other.environment
        self.volatile |= other.volatile
        self.contexts += [x for x in other.contexts if x not in self.contexts]
        self.modules += [x for x in other.modules if x not in self.modules]

    def misses(self, code: Iterable[types.CodeType]) -> bool:
        """Return whether some of ``code`` is the user's and did not run here."""
        known = {entry[0] for entry in self.code.values()}
        return any(part not in known and not _lies_in_library(part.co_filename) for part in code)


def volatile_name(called: Any) -> str | None:
    """Return the full name of a C function that may return something else in the next run, otherwise None."""
    name = str(getattr(called, "__name__", None))
    if (module := _VOLATILE.get(name)) is None:
        return None
    holder = getattr(called, "__self__", None)
    found = holder is random._inst if module == "random" else _module(called, holder) == module
    return f"{module}.{name}" if found else None


def _module(called: Any, holder: Any) -> str:
    return str(getattr(called, "__module__", None) or getattr(holder, "__module__", None)).lstrip("_")


@contextmanager
def garbage_later() -> Iterator[None]:
    """Collect no cycles meanwhile: that takes time, and runs finalizers and callbacks that are not the program's."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def as_written() -> AbstractContextManager[Any]:
    """Run what ``torch.compile`` has compiled as it was written: a step is a graph of its own."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def record_execution() -> Iterator[Execution | None]:
    """Record what runs in the context; None where another profiler is at work already."""
    if sys.getprofile() is not None:
        yield None
        return
    execution = Execution()
    with garbage_later():
        sys.setprofile(execution.note)
        try:
            yield execution
        finally:
            sys.setprofile(None)


@contextmanager
def collect_code() -> Iterator[set[types.CodeType]]:
    """Collect the code that runs in the context, at a fraction of the cost of :func:`record_execution`.

    Nothing is collected where another profiler is at work already.
    """
    found: set[types.CodeType] = set()
    if sys.getprofile() is not None:
        yield found
        return
    profiler: Any = cProfile.Profile(subcalls=False, builtins=False)
    profiler.enable(subcalls=False, builtins=False)
    try:
        yield found
    finally:
        profiler.disable()
        found.update(entry.code for entry in profiler.getstats() if isinstance(entry.code, types.CodeType))


@functools.cache
def _lies_in_library(filename: str) -> bool:
    """Return whether a file belongs to a library; generated code counts as its caller's, which ran too."""
    for root in map(sysconfig.get_path, ("purelib", "platlib")):
        if filename.startswith(root + os.sep):
            return is_library(filename[len(root) + 1 :].partition(os.sep)[0].removesuffix(".py"))
    return filename.startswith(("<", sysconfig.get_path("stdlib") + os.sep, _OWN))


def _variable(frame: types.FrameType) -> Any:
    """Return the environment variable that a frame of ``os.environ`` reads, None for all of them."""
    return None if frame.f_code is _ITERATED else frame.f_locals["self"].encodekey(frame.f_locals["key"])


def _responsible(frame: types.FrameType | None, passed: set[str]) -> types.FrameType | None:
    """Return the user's frame on whose behalf modules of ``passed`` run; None where it is a library's."""
    while frame is not None and _package_of_frame(frame) in passed:
        frame = frame.f_back
    return None if frame is None or is_library(_package_of_frame(frame)) else frame


def _package_of_frame(frame: types.FrameType) -> str:
    """Return the top-level package whose code runs in a frame; generated code without one belongs to its caller."""
    within: types.FrameType | None = frame
    while within is not None:
        if within.f_code.co_filename.startswith("<@beartype"):
            return "beartype"
        if name := within.f_globals.get("__name__"):
            return str(name).partition(".")[0]
        within = within.f_back
    return ""


def package_of(x: Any) -> str:
    """Return the top-level package of a class or function."""
    return str(getattr(x, "__module__", None) or "").partition(".")[0]


@functools.cache
def is_library(package: str) -> bool:
    """Return whether a package is the standard library's or in :data:`LIBRARIES`; a user's ``code.py`` is not."""
    if package in _STDLIB:
        path = getattr(sys.modules.get(package), "__file__", None)
        return path is None or path.startswith(sysconfig.get_path("stdlib"))
    return package in LIBRARIES or package.startswith("namedtuple_")


@functools.cache
def is_installed(package: str) -> bool:
    """Return whether a package lies where installers put third parties' packages, and own ones too."""
    path = getattr(sys.modules.get(package), "__file__", None) or ""
    return "site-packages" in path or "dist-packages" in path
