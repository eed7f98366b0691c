"""Run loops over time without Python: the C++ functions that the machine code of a graph calls for its loop operators.

A loop is found by its key. It calls the function that Inductor made of a step.
"""

import ctypes
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

from pyro_elbo.compile import executable
from pyro_elbo.compile.store import load_library

_SOURCE = r"""
#include <Python.h>
#include <cstdarg>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

using Handle = void*;
using Sizes = std::vector<int64_t>;

extern "C" {
int32_t aoti_torch_new_tensor_handle(Handle, Handle*);
int32_t aoti_torch_delete_tensor_object(Handle);
int32_t aoti_torch_get_data_ptr(Handle, void**);
int32_t aoti_torch_get_dim(Handle, int64_t*);
int32_t aoti_torch_get_sizes(Handle, int64_t**);
int32_t aoti_torch_get_strides(Handle, int64_t**);
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);
int32_t aoti_torch__reinterpret_tensor(Handle, int64_t, const int64_t*, const int64_t*, int64_t, Handle*);
int32_t aoti_torch_copy_(Handle, Handle, int32_t);
}

static void check(int32_t error) {
  if (error) throw std::runtime_error("A loop over time failed: torch could not make a tensor.");
}

struct Deleter { void operator()(void* x) const { aoti_torch_delete_tensor_object(x); } };
using Owned = std::unique_ptr<void, Deleter>;

// A tensor of one step: a constant, part of the carry, an input, part of the next carry or an export.
struct Column {
  int64_t dtype, bytes;  // of an element
  Sizes sizes, strides;
  int64_t elements;
};

struct Loop {
  void (*step)(Handle* inputs, Handle* outputs);
  bool reverse;
  int64_t constants, carry, inputs;
  std::vector<Column> columns;

  int64_t given() const { return constants + carry + inputs; }
  int64_t results() const { return columns.size() - given(); }
  // The length of a tensor's dimension of time; 0 where it has none.
  int64_t length(int64_t i, int64_t steps) const {
    return i < constants + carry ? 0 : i >= given() && i < given() + carry ? steps + 1 : steps;
  }
};

// A tensor for all steps, and for `count` runs of the loop where there is more than one.
struct Given {
  Handle handle;
  Owned copy;
  int64_t run = 0;  // elements from one run to the next
};

static Handle empty(const Column& column, Sizes sizes) {
  Sizes strides(sizes.size(), column.elements);
  for (int64_t d = int64_t(sizes.size()) - 2; d >= 0; d--) strides[d] = strides[d + 1] * sizes[d + 1];
  sizes.insert(sizes.end(), column.sizes.begin(), column.sizes.end());
  strides.insert(strides.end(), column.strides.begin(), column.strides.end());
  Handle made;
  check(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), column.dtype, 0, 0, &made));
  return made;
}

// The dimensions before those of a column: runs, time.
static Sizes before(int64_t count, int64_t length) {
  Sizes sizes;
  if (count) sizes.push_back(count);
  if (length) sizes.push_back(length);
  return sizes;
}

static Given laid_out(Handle x, const Column& column, int64_t count, int64_t length) {
  Given result{x};
  int64_t *sizes, *strides, dim;
  check(aoti_torch_get_dim(x, &dim));
  check(aoti_torch_get_sizes(x, &sizes));
  check(aoti_torch_get_strides(x, &strides));
  const int64_t lead = dim - column.sizes.size();
  bool same = !length || length == 1 || strides[lead - 1] == column.elements;
  for (int64_t d = lead; d < dim; d++) same &= sizes[d] == 1 || strides[d] == column.strides[d - lead];
  if (same) {
    result.run = count ? strides[0] : 0;
    return result;
  }
  result.handle = empty(column, before(count, length));
  result.copy.reset(result.handle);
  check(aoti_torch_copy_(result.handle, x, 0));
  result.run = column.elements * (length ? length : 1);
  return result;
}

static char* pointer(const Given& x, const Column& column, int64_t run) {
  void* data;
  check(aoti_torch_get_data_ptr(x.handle, &data));
  return static_cast<char*>(data) + run * x.run * column.bytes;
}

static Handle row(const Given& x, const Column& column, int64_t run, int64_t time) {
  const int64_t offset = run * x.run + time * column.elements;  // from the tensor's own
  Handle made;
  check(aoti_torch__reinterpret_tensor(
      x.handle, column.sizes.size(), column.sizes.data(), column.strides.data(), offset, &made));
  return made;
}

static void call_each(const Loop& loop, const std::vector<Given>& tensors, int64_t run, int64_t steps) {
  const int64_t k = loop.constants, n = loop.carry, given = loop.given();
  for (int64_t i = 0; i < n; i++) {  // the first carry
    const Column& column = loop.columns[k + i];
    const int64_t bytes = column.elements * column.bytes;
    char* states = pointer(tensors[given + i], column, run);
    std::memcpy(states + (loop.reverse ? steps * bytes : 0), pointer(tensors[k + i], column, run), bytes);
  }
  std::vector<Handle> inputs(loop.columns.size());
  for (int64_t step = 0; step < steps; step++) {
    const int64_t t = loop.reverse ? steps - 1 - step : step, now = loop.reverse ? t + 1 : t, after = t + !loop.reverse;
    for (int64_t i = 0; i < int64_t(inputs.size()); i++) {
      const bool is_carry = i >= k && i < k + n, is_next = i >= given && i < given + n;
      const Given& x = tensors[is_carry ? given + i - k : i];
      inputs[i] = row(x, loop.columns[i], run, i < k ? 0 : is_carry ? now : is_next ? after : t);
    }
    loop.step(inputs.data(), nullptr);  // takes ownership
  }
}

static void run_loop(const Loop& loop, const std::vector<Handle>& given, const std::vector<Handle>& results,
                     int64_t steps, int64_t count) {
  std::vector<Given> tensors;
  for (int64_t i = 0; i < int64_t(given.size()); i++)
    tensors.push_back(laid_out(given[i], loop.columns[i], count, loop.length(i, steps)));
  for (int64_t i = 0; i < int64_t(results.size()); i++) {
    const int64_t at = given.size() + i;
    tensors.push_back({results[i], nullptr, loop.columns[at].elements * loop.length(at, steps)});
  }
  const PyGILState_STATE state = PyGILState_Ensure();  // the function of a step lets go of it and takes it again
  try {
    for (int64_t run = 0; run < (count ? count : 1); run++) call_each(loop, tensors, run, steps);
  } catch (...) {
    PyGILState_Release(state);
    throw;
  }
  PyGILState_Release(state);
}

static std::unordered_map<int64_t, std::shared_ptr<const Loop>> loops;
static std::mutex guard;

static std::shared_ptr<const Loop> find(int64_t key) {
  const std::lock_guard<std::mutex> lock(guard);
  return loops.at(key);
}

// `numbers`: reverse, constants, carry, inputs, columns; then dtype, bytes, dim, sizes and strides of each column.
extern "C" void add(int64_t key, void* step, const int64_t* numbers) {
  auto next = [&] { return *numbers++; };
  Loop loop{reinterpret_cast<decltype(Loop::step)>(step)};
  loop.reverse = next();
  loop.constants = next(), loop.carry = next(), loop.inputs = next();
  for (int64_t columns = next(); columns; columns--) {
    Column column{next(), next()};
    const int64_t dim = next();
    column.elements = 1;
    for (int64_t d = 0; d < dim; d++) column.sizes.push_back(next()), column.elements *= column.sizes.back();
    for (int64_t d = 0; d < dim; d++) column.strides.push_back(next());
    loop.columns.push_back(column);
  }
  const std::lock_guard<std::mutex> lock(guard);
  loops[key] = std::make_shared<const Loop>(loop);
}

extern "C" void drop(int64_t key) {
  const std::lock_guard<std::mutex> lock(guard);
  loops.erase(key);
}

// Run a loop from Python.
extern "C" const char* run(int64_t key, PyObject* given, PyObject* results, int64_t steps, int64_t count) {
  static thread_local std::string message;
  auto handles = [](PyObject* list) {
    std::vector<Handle> found;
    for (int64_t i = 0; i < PyList_GET_SIZE(list); i++)
      found.push_back(PyCapsule_GetPointer(PyList_GET_ITEM(list, i), nullptr));
    return found;
  };
  try {
    run_loop(*find(key), handles(given), handles(results), steps, count);
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

// What the machine code of a graph calls: lists of constants, carry and inputs, then a place for each result.
static int32_t call(int64_t key, std::vector<Handle> given, int64_t steps, int64_t count, va_list places) {
  const std::shared_ptr<const Loop> loop = find(key);
  std::vector<Handle> results;
  for (int64_t i = 0; i < loop->results(); i++) {
    const int64_t at = loop->given() + i;
    results.push_back(empty(loop->columns[at], before(count, loop->length(at, steps))));
    *va_arg(places, Handle*) = results.back();
  }
  run_loop(*loop, given, results, steps, count);
  return 0;
}

#define GIVEN const Handle *constants, int64_t k, const Handle *carry, int64_t n, const Handle *inputs, int64_t m
#define LISTED [&] { \
  std::vector<Handle> given(constants, constants + k); \
  given.insert(given.end(), carry, carry + n); \
  given.insert(given.end(), inputs, inputs + m); \
  return given; }()

extern "C" int32_t aoti_torch_cpu_loop(GIVEN, int64_t steps, int64_t key, ...) {
  va_list places;
  va_start(places, key);
  const int32_t error = call(key, LISTED, steps, 0, places);
  va_end(places);
  return error;
}

extern "C" int32_t aoti_torch_cpu_loops(GIVEN, int64_t steps, int64_t key, int64_t count, ...) {
  va_list places;
  va_start(places, count);
  const int32_t error = call(key, LISTED, steps, count, places);
  va_end(places);
  return error;
}
"""

# Declarations of the functions that stand for operators in machine code.
_GIVEN = ", ".join(["const AtenTensorHandle*, int64_t"] * 3)
DECLARATIONS = {
    "loop": f"AOTITorchError aoti_torch_cpu_loop({_GIVEN}, int64_t, int64_t, ...)",
    "loops": f"AOTITorchError aoti_torch_cpu_loops({_GIVEN}, int64_t, int64_t, int64_t, ...)",
}


class NativeLoop:
    """A loop that machine code finds by its key as long as this object lives.

    Args:
        key: its key.
        counts: the numbers of constants, parts of the carry, and inputs.
        like: a tensor like each constant, carry, input, next carry and export of one step.
        reverse: run from the last step to the first.
        step: the address of the C++ function of a step.
    """

    def __init__(
        self,
        key: int,
        counts: Sequence[int],
        like: Sequence[Tensor],
        reverse: bool,
        step: ctypes.c_void_p,
    ) -> None:
        numbers = [int(reverse), *counts, len(like)]
        for x, dtype in zip(like, executable.dtype_numbers(like), strict=True):
            numbers += [dtype, x.element_size(), x.dim(), *x.shape, *x.stride()]
        self._key = key
        _library().add(key, step, (ctypes.c_int64 * len(numbers))(*numbers))
        weakref.finalize(self, _library().drop, key)

    def __call__(self, given: Sequence[Tensor], results: Sequence[Tensor], steps: int, count: int = 0) -> None:
        """Run all steps, ``count`` times on rows of tensors unless it is 0.

        Args:
            given: constants, carry and inputs, the last with time first.
            results: states around all steps and exports of each, contiguous, with time first.
            steps: the number of steps.
            count: the number of rows.
        """
        handles = executable.Handles(given), executable.Handles(results)
        message = _library().run(self._key, *(x.capsules for x in handles), steps, count)
        if message is not None:
            raise RuntimeError(f"The compiled step failed: {message.decode()}")


@cache
def _library() -> Any:
    """Build and load the C++ functions, for all libraries that are loaded later."""
    library = load_library(_SOURCE, ctypes.RTLD_GLOBAL)()
    key, count, address = ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    library.add.restype, library.add.argtypes = None, [key, address, address]
    library.drop.restype, library.drop.argtypes = None, [key]
    library.run.restype = ctypes.c_char_p
    library.run.argtypes = [key, ctypes.py_object, ctypes.py_object, count, count]
    return library
