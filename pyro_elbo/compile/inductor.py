"""Compile graphs to machine code with Inductor, which makes one C++ function of each."""

import ctypes
import errno
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from pyro_elbo.compile._torch import (
    BoxedBool,
    CppCodeCache,
    CppCompileError,
    InductorError,
    InvalidCxxCompiler,
    TracingContext,
    compile_fx_inner,
    config,
    detect_fake_mode,
    faster_builds,
    tracing,
    write_out,
)
from pyro_elbo.compile.capture import Graph
from pyro_elbo.compile.code import C_FUNCTIONS, WRITTEN_OUT, Code, entry_of
from pyro_elbo.compile.nodes import is_random
from pyro_elbo.errors import CompileError, first_sentence

# torch's headers need C++20, and such compilers know every vector instruction; the test takes 7 seconds.
_KNOWN = {"cpp.vec_isa_ok": True}


def compile_graph(graph: Graph, on_cpu: bool) -> Any:
    """Compile a graph with Inductor.

    Raises:
        CompileError: Inductor or the C++ compiler failed.
    """
    for operator, function_of in WRITTEN_OUT.items() if on_cpu else ():
        write_out(operator, function_of)
    context = TracingContext(detect_fake_mode(graph.fakes))
    options = {
        "size_asserts": not on_cpu,  # externals are checked by fits(), data by their key
        "aot_inductor.allow_stack_allocation": not _draws_within(graph.module.graph),
        "aot_inductor.custom_ops_to_c_shims": C_FUNCTIONS,
        "cpp.min_chunk_size": 2**14,  # a second thread costs more than it saves on smaller loops
    }
    with config.patch(options | _KNOWN), faster_builds(), torch.no_grad(), tracing(context), _quiet():
        try:
            return compile_fx_inner(
                graph.module,
                list(graph.fakes),
                cpp_wrapper=on_cpu,
                is_inference=True,
                cudagraphs=BoxedBool(not on_cpu),
                static_input_idxs=range(graph.externals),
            )
        except InductorError as error:
            raise _not_compiled(error) from error


def _draws_within(graph: fx.Graph) -> bool:
    """Return whether torch's operators draw within a graph: those in place take no tensor on the stack (torch 2.13)."""
    return any(is_random(n) and n.target.namespace == "aten" for n in graph.nodes)


def _not_compiled(error: Exception) -> CompileError:
    cure = "Install a C++ compiler (the variable CXX names it). If there is one, use compile=False."
    if getattr(getattr(error, "inner_exception", error), "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        cure = "Name a folder with room that you may write to by TORCHINDUCTOR_CACHE_DIR."
    return CompileError(f"Inductor cannot compile the step: {first_sentence(error)} {cure}")


def build_library(source: str) -> Callable[[], str]:
    """Begin to compile C++ code, unless Inductor's disk cache holds it; return what waits for the library's path.

    Raises:
        CompileError: the C++ compiler failed. What waits raises it too.
    """

    def path() -> str:
        try:
            return load()._name
        except (CppCompileError, InvalidCxxCompiler) as error:
            raise _not_compiled(error) from error

    background = ThreadPoolExecutor(1)
    try:
        with config.patch(_KNOWN), faster_builds():
            load = CppCodeCache.load_async(source, submit_fn=background.submit)
    except (CppCompileError, InvalidCxxCompiler) as error:
        raise _not_compiled(error) from error
    finally:
        background.shutdown(wait=False)
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Inductor's warnings about its own operators."""
    logger = logging.getLogger("torch._inductor.ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def code_of(graph: Graph, on_cpu: bool) -> Code:
    """Compile a graph: see :func:`compile_graph`."""
    compiled = compile_graph(graph, on_cpu)
    entry = entry_point(compiled) if on_cpu else None
    return Code(compiled, entry, graph.noise, graph.packs, graph.stream, graph.written)


def library_of(code: Code) -> str | None:
    """Return the path of the library with the machine code; None for code that needs more than its inputs."""
    compiled: Any = code.call
    return None if code.entry is None or compiled.constants else _library(compiled)


def entry_point(compiled: Any) -> ctypes.c_void_p:
    """Return the address of the C++ function behind Inductor's Python wrapper."""
    return entry_of(_library(compiled))


def _library(compiled: Any) -> str:
    binding = inspect.getclosurevars(compiled.current_callable).nonlocals["f"]
    return str(binding.__self__.__file__)
