"""Compile captured graphs to machine code and run many steps without Python in between.

Inductor compiles a graph to one C++ function. On a CPU a small C++ driver calls that function directly, without
dispatcher or wrapper, for any number of steps in a row. On other devices Inductor's own wrapper calls it.
"""

import ctypes
import inspect
import logging
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
    tensor_handles,
    tracing,
)
from pyro_elbo.compile.capture import Graph
from pyro_elbo.compile.noise import Noise, Segment
from pyro_elbo.compile.snapshots import Snapshots
from pyro_elbo.errors import CompileError, first_sentence

AHEAD = 2**18  # numbers of noise drawn at once

# A compiled function takes ownership of its handles, so every step makes new ones.
_DRIVER = r"""
#include <Python.h>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

extern "C" int aoti_torch_new_tensor_handle(void* tensor, void** handle);
extern "C" int aoti_torch_delete_tensor_object(void* tensor);

static void* pointer(PyObject* list, int64_t i) { return PyCapsule_GetPointer(PyList_GET_ITEM(list, i), nullptr); }

extern "C" void release(PyObject* list) {
  for (int64_t i = 0; i < PyList_GET_SIZE(list); i++) aoti_torch_delete_tensor_object(pointer(list, i));
}

extern "C" int aoti_torch_get_dim(void* tensor, int64_t* result);
extern "C" int aoti_torch_get_dtype(void* tensor, int32_t* result);
extern "C" int aoti_torch_get_size(void* tensor, int64_t dim, int64_t* result);
extern "C" int aoti_torch_get_stride(void* tensor, int64_t dim, int64_t* result);

// Write dtype, dimension, sizes and strides of every tensor to `layout`, or compare them with `layout`.
extern "C" int64_t layout(PyObject* list, int64_t* layout, int64_t compare) {
  int64_t k = 0;
  auto note = [&](int64_t x) { if (compare && layout[k] != x) return false; layout[k++] = x; return true; };
  for (int64_t i = 0; i < PyList_GET_SIZE(list); i++) {
    void* tensor = pointer(list, i);
    int32_t dtype;
    int64_t dim, x;
    aoti_torch_get_dtype(tensor, &dtype);
    aoti_torch_get_dim(tensor, &dim);
    if (!note(dtype) || !note(dim)) return 0;
    for (int64_t d = 0; d < dim; d++) {
      aoti_torch_get_size(tensor, d, &x);
      if (!note(x)) return 0;
      aoti_torch_get_stride(tensor, d, &x);
      if (!note(x)) return 0;
    }
  }
  return 1;
}

// Copy tensors, one after the other, whenever it is time after a step; see Snapshots.passed.
static void copy(int64_t* kept, int64_t step) {
  if (!kept || (kept[2] + step + 1) % kept[1] != 0) return;
  for (int64_t i = 0; i < kept[3]; i++) {
    const int64_t source = kept[4 + 2 * i], size = kept[5 + 2 * i];
    std::memcpy(reinterpret_cast<void*>(kept[0]), reinterpret_cast<void*>(source), size);
    kept[0] += size;
  }
}

extern "C" const char* run(
    void* entry, PyObject* fixed, PyObject* data, PyObject* rows, int64_t steps, int64_t* kept) {
  static thread_local std::string message;
  auto function = reinterpret_cast<void (*)(void**, void**)>(entry);
  const int64_t n = PyList_GET_SIZE(fixed), m = PyList_GET_SIZE(data), width = PyList_GET_SIZE(rows) / steps;
  std::vector<void*> inputs(n + m + width);
  const char* result = nullptr;
  try {
    for (int64_t step = 0; step < steps; step++) {
      for (int64_t i = 0; i < n; i++) aoti_torch_new_tensor_handle(pointer(fixed, i), &inputs[i]);
      for (int64_t i = 0; i < m; i++) aoti_torch_new_tensor_handle(pointer(data, i), &inputs[n + i]);
      for (int64_t i = 0; i < width; i++)
        aoti_torch_new_tensor_handle(pointer(rows, step * width + i), &inputs[n + m + i]);
      function(inputs.data(), nullptr);
      copy(kept, step);
    }
  } catch (const std::exception& error) {
    message = error.what();
    result = message.c_str();
  }
  release(data);
  return result;
}
"""


class Handles:
    """C++ handles of tensors, valid as long as this object lives."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.capsules = tensor_handles(list(tensors))
        weakref.finalize(self, driver().release, self.capsules)


class StepInputs:
    """The scalars, records and noise of ``count`` steps: the inputs that differ between steps."""

    def __init__(self, count: int, scalars: Tensor, flag: Tensor, record: Tensor, noise: Sequence[Noise]) -> None:
        self.values: Sequence[Sequence[float]] = ()
        self.scalars, self.record = scalars.new_empty(count, len(scalars)), record.new_empty(count, len(record))
        self.noise = [n.rows(count, flag.device) for n in noise]
        columns = [self.scalars.unbind(), [flag] * count, self.record.unbind(), *(x.unbind() for x in self.noise)]
        self.inputs = [x for row in zip(*columns, strict=True) for x in row]
        self.width = len(columns)

    def fill(self, values: Sequence[Sequence[float]], noise: Sequence[Noise], stream: Sequence[Segment]) -> None:
        """Set the scalars of each step and draw new noise: in the order of ``stream``, or all at once without one."""
        if values != self.values:
            self.scalars.copy_(torch.tensor(values, dtype=self.scalars.dtype))
            self.values = values
        for step in range(len(self.record)) if stream else ():
            for row, start, stop in stream:
                noise[row].draw(self.noise[row][step, start:stop])
        for n, x in zip(noise, self.noise, strict=True) if not stream else ():
            n.draw(x)


class Executable:
    """A compiled graph with the tensors that it holds.

    Args:
        graph: a graph whose inputs are externals, data, then the row of a step.
        row: the scalars, the flag that all steps so far were usable, and the record of a step.
        owned: what operators of the graph find by a key, to live as long as the graph.
    """

    def __init__(self, graph: Graph, row: tuple[Tensor, Tensor, Tensor], owned: Sequence[Any] = ()) -> None:
        self.flag, self._owned = row[1], owned
        self._row, self._noise, self._externals = row, graph.noise, list(graph.externals)
        self._frozen, self._stream = graph.frozen, graph.stream
        self._ahead = max(1, AHEAD // max([1, *(n.size for n in graph.noise)]))
        self._rows: dict[int, tuple[StepInputs, Handles | None]] = {}
        on_cpu = all(x.device.type == "cpu" for x in graph.fakes)
        self._compiled = compile_graph(graph, on_cpu)
        self._entry = entry_point(self._compiled) if on_cpu else None
        self._handles = Handles(self._externals) if on_cpu else None
        self._layout = self._layouts()

    def __call__(
        self, data: Sequence[Tensor], values: Sequence[Sequence[float]], snapshots: Snapshots | None = None
    ) -> np.ndarray:
        """Run one step per entry of ``values`` (its scalars) on the same data; return the record of each."""
        parts = [values[i : i + self._ahead] for i in range(0, len(values), self._ahead)]
        return np.concatenate([self._run(data, part, snapshots) for part in parts])

    def fits(self) -> bool:
        """Return whether external tensors still have the layout and frozen ones the values that the code assumes."""
        if not all(torch.equal(x, value) for x, value in self._frozen):
            return False
        if self._handles is not None:
            return bool(driver().layout(self._handles.capsules, self._layout, 1))
        return self._layout == self._layouts()

    def _layouts(self) -> Any:
        if self._handles is None:
            return [(x.shape, x.stride(), x.dtype) for x in self._externals]
        layout = (ctypes.c_int64 * sum(2 + 2 * x.dim() for x in self._externals))()
        driver().layout(self._handles.capsules, layout, 0)
        return layout

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Restore the contents of the graph's external tensors at the end."""
        before = [x.detach().clone() for x in self._externals]
        try:
            yield
        finally:
            with torch.no_grad():
                for x, old in zip(self._externals, before, strict=True):
                    x.detach().copy_(old)

    def _run(
        self, data: Sequence[Tensor], values: Sequence[Sequence[float]], snapshots: Snapshots | None
    ) -> np.ndarray:
        rows, handles = self._rows_for(len(values))
        rows.fill(values, self._noise, self._stream)
        if self._entry is not None:
            kept = None if snapshots is None else snapshots.passed(len(values))
            arguments = (self._handles.capsules, tensor_handles(list(data)), handles.capsules, len(values), kept)
            if (message := driver().run(self._entry, *arguments)) is not None:
                raise RuntimeError(f"The compiled step failed: {message.decode()}")
        else:
            for i in range(0, len(rows.inputs), rows.width):
                self._compiled([*self._externals, *data, *rows.inputs[i : i + rows.width]])
                if snapshots is not None:
                    snapshots.note()
        return rows.record.cpu().numpy().copy()  # later steps write to the same rows

    def _rows_for(self, count: int) -> tuple[StepInputs, Handles | None]:
        if count not in self._rows:
            for other in [n for n in self._rows if n != 1]:
                del self._rows[other]
            rows = StepInputs(count, *self._row, self._noise)
            self._rows[count] = rows, None if self._entry is None else Handles(rows.inputs)
        return self._rows[count]


def compile_graph(graph: Graph, on_cpu: bool) -> Any:
    """Compile a graph with Inductor.

    Raises:
        CompileError: Inductor or the C++ compiler failed.
    """
    context = TracingContext(detect_fake_mode(graph.fakes))
    options = {
        "size_asserts": not on_cpu,  # externals are checked by fits(), data by their key
        "aot_inductor.allow_stack_allocation": True,
        "cpp.min_chunk_size": 2**14,  # a second thread costs more than it saves on smaller loops
        # torch's headers need C++20, and such compilers know every vector instruction; the test takes 7 seconds.
        "cpp.vec_isa_ok": True,
    }
    with config.patch(options), torch.no_grad(), tracing(context), _quiet():
        try:
            return compile_fx_inner(
                graph.module,
                list(graph.fakes),
                cpp_wrapper=on_cpu,
                is_inference=True,
                cudagraphs=BoxedBool(not on_cpu),
                static_input_idxs=range(len(graph.externals)),
            )
        except InductorError as error:
            raise _not_compiled(error) from error


def _not_compiled(error: Exception) -> CompileError:
    return CompileError(
        f"Inductor cannot compile the step: {first_sentence(error)} Install a C++ compiler (the variable "
        "CXX names it). If there is one, use compile=False."
    )


def load_library(source: str) -> ctypes.CDLL:
    """Compile C++ code, unless the disk cache holds it, and load it.

    Raises:
        CompileError: the C++ compiler failed.
    """
    try:
        return CppCodeCache.load(source)
    except (CppCompileError, InvalidCxxCompiler) as error:
        raise _not_compiled(error) from error


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


def entry_point(compiled: Any) -> ctypes.c_void_p:
    """Return the address of the C++ function behind Inductor's Python wrapper."""
    binding = inspect.getclosurevars(compiled.current_callable).nonlocals["f"]
    library = ctypes.PyDLL(sys.modules[binding.__module__].__file__)
    return ctypes.cast(library._Z19inductor_entry_implPP16AtenTensorOpaqueS1_, ctypes.c_void_p)


@cache
def driver() -> ctypes.PyDLL:
    """Build and load the C++ library that calls compiled functions."""
    library = ctypes.PyDLL(load_library(_DRIVER)._name)
    library.run.restype = ctypes.c_char_p
    library.run.argtypes = [ctypes.c_void_p, *(ctypes.py_object,) * 3, ctypes.c_int64, ctypes.c_void_p]
    library.release.restype, library.release.argtypes = None, [ctypes.py_object]
    library.layout.restype = ctypes.c_int64
    library.layout.argtypes = [ctypes.py_object, ctypes.c_void_p, ctypes.c_int64]
    return library


@contextmanager
def compiling() -> Iterator[None]:
    """Show on a terminal for how many seconds the compilation has run."""
    start, done = time.monotonic(), threading.Event()

    def show(end: str) -> None:
        if sys.stderr.isatty():
            print(f"\rcompiling … {time.monotonic() - start:.0f} s", end=end, file=sys.stderr, flush=True)

    def tick() -> None:
        while not done.wait(1.0):
            show("")

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()
        show("\n")
