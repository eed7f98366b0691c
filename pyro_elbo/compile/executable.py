"""Run many steps of machine code without Python in between.

On a CPU a small C++ driver calls the function of a graph directly, without dispatcher or wrapper, for any number of
steps in a row. On other devices Inductor's own wrapper calls it.
"""

import ctypes
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_elbo.compile._torch import tensor_handles
from pyro_elbo.compile.code import Code, on_cpu
from pyro_elbo.compile.noise import Noise, Segment
from pyro_elbo.compile.packed import Packed
from pyro_elbo.compile.record import Recording
from pyro_elbo.compile.snapshots import Snapshots
from pyro_elbo.compile.store import load_library
from pyro_elbo.compile.streams import Seeds, draw, reproduces
from pyro_elbo.errors import CompileError

_log = logging.getLogger(__name__)

AHEAD = 2**18  # numbers of noise drawn at once,
BLOCK = 1024  # and the most steps: making the inputs of one takes as long as two small steps

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
extern "C" int aoti_torch_get_data_ptr(void* tensor, void** result);

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

// Fill the vectors of small tensors, or write the tensors that the graph writes back; see Packed.places.
static void pack(PyObject* members, const int64_t* places, bool back) {
  for (int64_t i = 0; i < PyList_GET_SIZE(members); i++) {
    void *tensor, *part = reinterpret_cast<void*>(places[3 * i]);
    aoti_torch_get_data_ptr(pointer(members, i), &tensor);
    if (!back) std::memcpy(part, tensor, places[3 * i + 1]);
    else if (places[3 * i + 2]) std::memcpy(tensor, part, places[3 * i + 1]);
  }
}

// Copy tensors, one after the other; see Snapshots.passed.
static void copy(int64_t* kept) {
  for (int64_t i = 0; i < kept[3]; i++) {
    const int64_t source = kept[4 + 2 * i], size = kept[5 + 2 * i];
    std::memcpy(reinterpret_cast<void*>(kept[0]), reinterpret_cast<void*>(source), size);
    kept[0] += size;
  }
}

extern "C" const char* run(
    void* entry, PyObject* fixed, PyObject* data, PyObject* rows, int64_t width, int64_t steps, int64_t* kept,
    PyObject* members, const int64_t* places) {
  static thread_local std::string message;
  auto function = reinterpret_cast<void (*)(void**, void**)>(entry);
  const int64_t n = PyList_GET_SIZE(fixed), m = PyList_GET_SIZE(data);
  std::vector<void*> inputs(n + m + width);
  const char* result = nullptr;
  pack(members, places, false);
  try {
    for (int64_t step = 0; step < steps; step++) {
      for (int64_t i = 0; i < n; i++) aoti_torch_new_tensor_handle(pointer(fixed, i), &inputs[i]);
      for (int64_t i = 0; i < m; i++) aoti_torch_new_tensor_handle(pointer(data, i), &inputs[n + i]);
      for (int64_t i = 0; i < width; i++)
        aoti_torch_new_tensor_handle(pointer(rows, step * width + i), &inputs[n + m + i]);
      function(inputs.data(), nullptr);
      if (kept && (kept[2] + step + 1) % kept[1] == 0) {
        pack(members, places, true);
        copy(kept);
      }
    }
  } catch (const std::exception& error) {
    message = error.what();
    result = message.c_str();
  }
  pack(members, places, true);
  release(data);
  return result;
}
"""


class Handles:
    """C++ handles of tensors, valid as long as this object lives."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.capsules = tensor_handles(list(tensors))
        weakref.finalize(self, driver().release, self.capsules)


def dtype_numbers(tensors: Sequence[Tensor]) -> list[int]:
    """Return the number by which torch's C interface calls the dtype of each tensor."""
    handles = Handles(x.new_empty(()) for x in tensors)
    layout = (ctypes.c_int64 * (2 * len(tensors)))()
    driver().layout(handles.capsules, layout, 0)
    return layout[::2]


class StepInputs:
    """The scalars, records and noise of up to ``count`` steps: the inputs that differ between steps."""

    def __init__(self, count: int, scalars: Tensor, flag: Tensor, record: Tensor, noise: Sequence[Noise]) -> None:
        self.values: Sequence[Sequence[float]] = ()
        self.scalars, self.record = scalars.new_empty(count, len(scalars)), record.new_empty(count, len(record))
        self.noise = [n.rows(count, flag.device) for n in noise]
        columns = [self.scalars.unbind(), [flag] * count, self.record.unbind(), *(x.unbind() for x in self.noise)]
        self.inputs = [x for row in zip(*columns, strict=True) for x in row]
        self.width = len(columns)

    def fill(
        self,
        values: Sequence[Sequence[float]],
        noise: Sequence[Noise],
        stream: Sequence[Segment] | None,
        seeds: Seeds | None = None,
    ) -> None:
        """Set the scalars of each step and draw new noise: in the order of ``stream``, or all at once without one.

        The noise of a step has a seed of its own where there are ``seeds``; without a ``stream`` there is one step.
        """
        steps = len(values)
        if values != self.values[:steps]:
            self.scalars[:steps] = torch.tensor(values, dtype=self.scalars.dtype)
            self.values = values
        if seeds is not None and stream is not None and reproduces(noise, stream):
            draw(seeds, noise, stream, self.noise)
            return
        for step in range(steps) if stream or seeds is not None else ():
            if seeds is not None:
                torch.default_generator.manual_seed(int(seeds[step]))
            for row, start, stop in stream or ():
                noise[row].draw(self.noise[row][step, start:stop])
        for n, x in zip(noise, self.noise, strict=True) if stream is None else ():
            n.draw(x[:steps])


class Executable:
    """Machine code with the tensors that it works on.

    Args:
        recording: the call that was compiled; its inputs are data, then the row of a step.
        code: its machine code.
        row: the scalars, the flag that all steps so far were usable, and the record of a step.
        owned: what operators of the graph find by a key, to live as long as the graph.
    """

    def __init__(
        self, recording: Recording, code: Code, row: tuple[Tensor, Tensor, Tensor], owned: Sequence[Any] = ()
    ) -> None:
        self.flag, self._owned = row[1], owned
        self._row, self._noise, self._stream = row, code.noise, code.stream
        self._externals, self._frozen = list(recording.externals), recording.frozen
        self._ahead = max(1, min(BLOCK, AHEAD // max([1, *(n.size for n in code.noise)])))
        self._rows: dict[int, tuple[StepInputs, Handles | None]] = {}
        self._entry = code.entry
        self._call: Any = code.call
        self._handles = Handles(self._externals) if on_cpu(recording.tensors) else None
        self._layout = self._layouts()
        self._packed = Packed(self._externals, code.packs, code.written)
        given = self._packed.inputs, self._packed.members
        self._given: Any = None if self._entry is None else tuple(map(Handles, given))

    def __call__(
        self,
        data: Sequence[Tensor],
        values: Sequence[Sequence[float]],
        snapshots: Snapshots | None = None,
        seeds: Seeds | None = None,
    ) -> np.ndarray:
        """Run one step per entry of ``values`` (its scalars) on the same data; return the record of each."""
        ahead = 1 if seeds is not None and self._stream is None else self._ahead  # the graph itself may draw
        parts = [slice(i, i + ahead) for i in range(0, len(values), ahead)]
        return np.concatenate(
            [self._run(data, values[part], snapshots, None if seeds is None else seeds[part]) for part in parts]
        )

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

    def check(self, recording: Recording, lift_noise: bool, values: Sequence[float]) -> None:
        """Compare one step of the machine code with its graph, run operator by operator on the same noise.

        Raises:
            CompileError: they differ by more than rounding.
        """
        from pyro_elbo.compile.capture import functional_graph

        graph = functional_graph(recording, len(self._row) - 1, lift_noise)
        data = recording.inputs[: -len(self._row)]

        def in_python() -> None:
            rows, _ = self._rows_for(1)
            rows.fill([values], self._noise, self._stream)
            inputs = zip([*self._packed.inputs, *data, *rows.inputs], graph.fakes, strict=True)
            self._packed.read()
            with torch.no_grad():
                graph.module(*(x[: len(fake)] if fake.dim() == 1 else x for x, fake in inputs))
            self._packed.write()

        found, noise = [], torch.get_rng_state()
        for run in (lambda: self._run(data, [values]), in_python):
            torch.set_rng_state(noise)
            with self.unchanged():
                run()
                found.append([x.detach().clone() for x in (*self._externals, self._rows_for(1)[0].record)])
        torch.set_rng_state(noise)
        self.flag.fill_(True)
        for stored, expected in zip(*found, strict=True):
            try:
                torch.testing.assert_close(stored, expected, rtol=1e-3, atol=1e-5, equal_nan=True)
            except AssertionError as error:
                raise CompileError(
                    f"The machine code of a step does something else than its graph: {error} Empty the folder "
                    "TORCHINDUCTOR_CACHE_DIR, and please report the program."
                ) from error

    def _run(
        self,
        data: Sequence[Tensor],
        values: Sequence[Sequence[float]],
        snapshots: Snapshots | None = None,
        seeds: Seeds | None = None,
    ) -> np.ndarray:
        rows, handles = self._rows_for(len(values))
        rows.fill(values, self._noise, self._stream, seeds)
        if self._entry is not None:
            kept = None if snapshots is None else snapshots.passed(len(values))
            fixed, members = (x.capsules for x in self._given)
            given = fixed, tensor_handles(list(data)), handles.capsules
            arguments = (*given, rows.width, len(values), kept, members, self._packed.places)
            if (message := driver().run(self._entry, *arguments)) is not None:
                raise RuntimeError(f"The compiled step failed: {message.decode()}")
        else:
            self._packed.read()
            for i in range(0, len(values) * rows.width, rows.width):
                self._call([*self._packed.inputs, *data, *rows.inputs[i : i + rows.width]])
                self._packed.write()
                if snapshots is not None:
                    snapshots.note()
        return rows.record[: len(values)].cpu().numpy().copy()  # later steps write to the same rows

    def _rows_for(self, count: int) -> tuple[StepInputs, Handles | None]:
        """Return the inputs of so many steps or more; making them takes as long as two steps of a small model each."""
        known = next((n for n in self._rows if n == count or 1 < count < n), None)
        if known is not None:
            return self._rows[known]
        for other in [n for n in self._rows if n != 1]:
            del self._rows[other]
        rows = StepInputs(count, *self._row, self._noise)
        self._rows[count] = rows, None if self._entry is None else Handles(rows.inputs)
        return self._rows[count]


def build_driver(tensors: Iterable[Tensor]) -> None:
    """Begin to build what :func:`driver` returns, if code on these tensors needs it."""
    if on_cpu(tensors):
        _library()


@cache
def _library() -> Callable[[], ctypes.PyDLL]:
    return load_library(_DRIVER)


@cache
def driver() -> ctypes.PyDLL:
    """Build and load the C++ library that calls compiled functions."""
    library = _library()()
    library.run.restype = ctypes.c_char_p
    lists, steps = (ctypes.py_object,) * 3, (ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    library.run.argtypes = [ctypes.c_void_p, *lists, *steps, ctypes.py_object, ctypes.c_void_p]
    library.release.restype, library.release.argtypes = None, [ctypes.py_object]
    library.layout.restype = ctypes.c_int64
    library.layout.argtypes = [ctypes.py_object, ctypes.c_void_p, ctypes.c_int64]
    return library


@contextmanager
def compiling() -> Iterator[None]:
    """Show on a terminal for how many seconds the compilation has run, and log its start and its end."""
    start, done = time.monotonic(), threading.Event()
    _log.info("compiling a step")

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
    _log.info("compiled in %.0f s", time.monotonic() - start)
