"""Machine code on disk: what an earlier process has compiled is loaded, without Inductor.

The key of a graph is a hash of all that decides on its machine code: every operator with its arguments, the layout of
every tensor, the versions of torch and of this package, Inductor's settings, the processor and the number of threads.
A program is recorded in every process, so what it reads has done its part before the key is made. Whatever cannot be
spelled out has no key and is compiled anew.

Machine code is code: it runs with the rights of the user. It is read only from a folder of the user's that nobody else
can write to, in folders that nobody else can rename, and only if it is what was written.
"""

import ctypes
import hashlib
import json
import logging
import operator
import os
import platform
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from pyro_elbo.compile._torch import OpOverload, cache_dir, config
from pyro_elbo.compile.code import Code, entry_of, on_cpu
from pyro_elbo.compile.noise import Noise
from pyro_elbo.compile.record import Recording, check_writes
from pyro_elbo.files import whole_file

_NAMESPACES = ("aten", "prims", "pyro_elbo")  # operators of which the same name means the same
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"
_VARIABLES = ("TORCH", "ATEN", "PYTORCH", "OMP", "MKL", "CXX", "CPP", "CFLAGS", "CC")
_log = logging.getLogger(__name__)


def machine_code(recording: Recording, kept: int, lift_noise: bool) -> Code:
    """Return the machine code of a recorded call, from the disk if any process has made it.

    Args:
        recording, kept, lift_noise: as in :func:`pyro_elbo.compile.capture.functional_graph`.

    Raises:
        CompileError: the call writes to an argument or to shared memory, or cannot be compiled.
    """
    key = key_of(recording, kept, lift_noise)
    if key is not None and (stored := _load(key)) is not None:
        check_writes(recording, stored.written)
        return stored
    from pyro_elbo.compile import capture, inductor  # Inductor takes a second to import

    graph = capture.functional_graph(recording, kept, lift_noise)
    check_writes(recording, graph.written)
    code = inductor.code_of(graph, on_cpu(recording.tensors))
    if key is not None and (library := inductor.library_of(code)) is not None:
        noise = [(n.kind, str(n.dtype).removeprefix("torch."), n.size) for n in code.noise]
        _keep(key, library, {"noise": noise, "packs": code.packs, "stream": code.stream, "written": code.written})
    return code


def load_library(source: str, mode: int = ctypes.DEFAULT_MODE) -> Callable[[], ctypes.PyDLL]:
    """Begin to compile C++ code that needs nothing but torch, once for all processes; return what waits for it.

    Args:
        source: the code.
        mode: ``ctypes.RTLD_GLOBAL`` for functions that libraries loaded later call.

    Raises:
        CompileError: the C++ compiler failed. What waits raises it too.
    """
    key = None if config.force_disable_caches else _digest([source, *_surroundings()])
    if key is not None and (found := _find(key)) is not None:
        return partial(ctypes.PyDLL, found[0], mode)
    from pyro_elbo.compile import inductor

    path = inductor.build_library(source)

    def load() -> ctypes.PyDLL:
        if key is not None:
            _keep(key, path(), {})
        return ctypes.PyDLL(path(), mode)

    return load


def key_of(recording: Recording, kept: int, lift_noise: bool) -> str | None:
    """Return a name for the machine code of a recorded call; None for code that only this process may use."""
    if config.force_disable_caches or not on_cpu(recording.tensors):
        return None
    try:
        lines = [*_lines(recording.graph), *map(_layout, recording.tensors)]
    except _UnknownError as unknown:
        _log.debug("the machine code of a graph is not kept on disk: %s", unknown)
        return None
    return _digest([*lines, str((kept, lift_noise, len(recording.externals))), *_surroundings()])


class _UnknownError(Exception):
    """A graph holds something that no text identifies."""


def _lines(graph: fx.Graph) -> Iterator[str]:
    """Yield a line for each operator of a graph: what it is, its arguments and the layout of its values."""
    numbers: dict[fx.Node, int] = {}

    def spelled(x: Any) -> str:
        if isinstance(x, fx.Node):
            return f"%{numbers[x]}"
        if isinstance(x, Tensor):
            return _layout(x)
        if isinstance(x, list | tuple):
            return f"({', '.join(map(spelled, x))})"
        if isinstance(x, dict):
            return f"({', '.join(f'{key}: {spelled(part)}' for key, part in x.items())})"
        if not isinstance(x, _PLAIN):
            raise _UnknownError(f"an argument of type {type(x).__name__}")
        return f"{type(x).__name__} {x!r}"

    for node in graph.nodes:
        yield f"{node.op} {_operator(node)} {spelled(node.args)} {spelled(node.kwargs)} {spelled(node.meta.get('val'))}"
        numbers[node] = len(numbers)


def _operator(node: fx.Node) -> str:
    """Return the name of an operator that means the same in every process."""
    target = node.target
    if node.op in ("placeholder", "output"):
        return ""
    if isinstance(target, OpOverload) and target.namespace in _NAMESPACES:
        return str(target)
    if target is operator.getitem:
        return "getitem"
    raise _UnknownError(f"{node.op} {target}")


def _layout(x: Tensor) -> str:
    if x.layout is not torch.strided:
        raise _UnknownError(f"a tensor of layout {x.layout}")
    return str((x.dtype, x.device, tuple(x.shape), x.stride(), x.storage_offset(), x.is_conj(), x.is_neg()))


def _surroundings() -> list[str]:
    """Return what machine code depends on beside its graph."""
    variables = {k: x for k, x in sorted(os.environ.items()) if k.startswith(_VARIABLES) and k != _CACHE_DIR}
    modes = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    return [installation(), config.get_hash().hex(), str(variables), str(modes)]


@cache
def installation() -> str:
    """Return a hash of the versions of torch and of this package, and of the processor."""
    package = Path(__file__).parent
    sources = [f"{path.relative_to(package)} {path.read_text()}" for path in sorted(package.rglob("*.py"))]
    processor = [platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()]
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        lines = cpuinfo.read_text().splitlines()
        processor += sorted({x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))})
    return _digest(
        [sys.version, platform.platform(), torch.__version__, str(torch.version.git_version), *processor, *sources]
    )


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _load(key: str) -> Code | None:
    """Return the code that is kept under a key."""
    if (found := _find(key)) is None:
        return None
    library, facts = found
    try:
        noise = tuple(Noise(kind, getattr(torch, dtype), int(size)) for kind, dtype, size in facts["noise"])
        packs = tuple(tuple(pack) for pack in facts["packs"])
        order = facts["stream"]
        stream = None if order is None else tuple((row, start, stop) for row, start, stop in order)
        return Code(None, entry_of(library), noise, packs, stream, tuple(facts["written"]))
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        _log.warning("%s is damaged (%s): the step is compiled anew", library, error)
        return None


def _find(key: str) -> tuple[str, dict[str, Any]] | None:
    """Return the path of a library on disk and the facts beside it; None if it is missing or not what was written."""
    if (folder := _folder()) is None:
        return None
    library, beside = folder / f"{key}.so", folder / f"{key}.json"
    try:
        facts = json.loads(beside.read_text())
        whole = facts.pop("sha256") == _checksum(library.read_bytes(), facts)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        _log.warning("%s is damaged (%s): the step is compiled anew", beside, error)
        return None
    if not whole:
        _log.warning("%s is damaged: the step is compiled anew", library)
        return None
    return str(library), facts


def _checksum(library: bytes, facts: dict[str, Any]) -> str:
    """Return the SHA-256 of a library and of the facts beside it, of which a changed digit would pass for another."""
    return hashlib.sha256(library + json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _keep(key: str, library: str, facts: dict[str, Any]) -> None:
    """Copy a library to the disk; a full disk costs the next process its time, and nothing else."""
    if (folder := _folder()) is None:
        return
    content = Path(library).read_bytes()
    try:
        with whole_file(folder / f"{key}.so") as file:
            file.write(content)
        with whole_file(folder / f"{key}.json") as file:
            file.write(json.dumps(facts | {"sha256": _checksum(content, facts)}).encode())
    except OSError as error:
        _log.warning("machine code is not kept in %s: %s", folder, error)


def _folder() -> Path | None:
    """Return the folder of machine code beside Inductor's; None if anyone else may write to it or replace it."""
    folder, usual = Path(), os.umask(0o077)  # Inductor's folder would be open to the group of a user whose umask is 002
    try:
        folder = Path(cache_dir()).resolve() / "pyro_elbo"
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()
        open_to_others = next((path for path in (folder, *folder.parents) if not _is_ours(path, path != folder)), None)
    except OSError as error:
        _log.warning("machine code is not kept in %s: %s", folder, error)
        return None
    finally:
        os.umask(usual)
    if open_to_others is not None:
        what = f"others than you may write to {open_to_others} (chmod go-w {open_to_others})"
        _log.warning("machine code in %s is not used: %s", folder, what)
        return None
    return folder


def _is_ours(path: Path, is_parent: bool) -> bool:
    """Return whether a folder belongs to the user or to root, and nobody else can change what its names stand for.

    In a folder with the sticky bit, such as /tmp, everyone may make files, and nobody rename those of others.
    """
    if not hasattr(os, "getuid"):
        return True
    state = path.stat()
    owners = (os.getuid(), 0) if is_parent else (os.getuid(),)
    others = state.st_mode & (0o002 if is_parent and _is_private(state.st_gid) else 0o022)
    return state.st_uid in owners and (not others or is_parent and bool(state.st_mode & stat.S_ISVTX))


def _is_private(group: int) -> bool:
    """Return whether a group is the user's own, of the same name, which many systems make with a umask of 002."""
    import grp
    import pwd

    try:
        user, found = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
    except KeyError:  # a container may know neither
        return False
    return (found.gr_gid, found.gr_name) == (user.pw_gid, user.pw_name) and {*found.gr_mem} <= {user.pw_name}
