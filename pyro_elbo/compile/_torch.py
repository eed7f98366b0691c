"""The private interfaces of torch that compiled steps rely on, each under one plain name.

Nothing else in this package imports a private name of torch, so that a new torch version is fitted here. The names at
the top are loaded with torch itself. Those in ``_LAZY`` take a second to import and load when they are first used.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._C import DisableTorchFunction, DispatchKey, _dispatch_has_kernel_for_dispatch_key, _TorchDispatchModeKey
from torch._C._aoti import unsafe_alloc_void_ptrs_from_tensors as tensor_handles
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._guards import TracingContext, tracing
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.fx._lazy_graph_module import _use_lazy_graph_module as lazy_graph_modules
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, make_fx
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "PROXY",
    "DataDependentOutputException",
    "DisableTorchFunction",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "TorchDispatchMode",
    "TracingContext",
    "custom_functions_taking",
    "disable_proxy_modes_tracing",
    "get_proxy_mode",
    "import_compiler",
    "in_kernel_invocation_manager",
    "is_composite",
    "is_functorch_wrapped_tensor",
    "joint_graph_passes",
    "lazy_graph_modules",
    "make_fx",
    "mutates",
    "optimizers_compiling",
    "pytree",
    "step_without_hooks",
    "tensor_handles",
    "tracing",
    "unset_fake_temporarily",
    "valueless_fakes",
    "write_out",
    "faster_builds",
]

PROXY = _TorchDispatchModeKey.PROXY

_LAZY = {
    "BoxedBool": "torch._inductor.utils",
    "CppCodeCache": "torch._inductor.codecache",
    "CppCompileError": "torch._inductor.exc",
    "FakeTensorProp": "torch.fx.passes.fake_tensor_prop",
    "InductorError": "torch._inductor.exc",
    "InvalidCxxCompiler": "torch._inductor.exc",
    "ShapeEnv": "torch.fx.experimental.symbolic_shapes",
    "compile_fx_inner": "torch._inductor.compile_fx",
    "cache_dir": "torch._inductor.runtime.cache_dir_utils",
    "config": "torch._inductor",
    "detect_fake_mode": "torch._dynamo.utils",
    "fx_graph_cse": "torch._functorch.compile_utils",
    "lowerings": "torch._inductor.lowering",
    "make_fallback": "torch._inductor.lowering",
    "rand_ops": "torch._functorch.compile_utils",
    "select_decomp_table": "torch._inductor.decomposition",
    "stable_topological_sort": "torch._inductor.pattern_matcher",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def is_composite(function: OpOverload) -> bool:
    """Return whether an operator is a function of others, which torch calls in its place."""
    return _dispatch_has_kernel_for_dispatch_key(function.name(), DispatchKey.CompositeImplicitAutograd)


def valueless_fakes() -> FakeTensorMode:
    """Make a mode whose fake tensors never know a value: torch 2.14 has some answer item() with that of a real one."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    convert = mode.fake_tensor_converter.from_real_tensor

    def without_value(*args: Any, **kwargs: Any) -> FakeTensor:
        fake = convert(*args, **kwargs)
        fake.item_memo = None
        return fake

    mode.fake_tensor_converter.from_real_tensor = without_value
    return mode


def mutates(target: Any) -> bool:
    """Return whether an operator changes one of its arguments in place."""
    return isinstance(target, OpOverload) and target._schema.is_mutable


@contextmanager
def custom_functions_taking(transform: Callable[[Any], Any]) -> Iterator[None]:
    """Apply ``transform`` to the arguments of custom autograd functions, which no torch function mode sees."""
    original = torch.autograd.Function.__dict__["apply"]  # a classmethod; from torch 2.14 on, one written in C

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        return original.__get__(None, cls)(*transform(args), **transform(kwargs))

    torch.autograd.Function.apply = classmethod(apply)
    try:
        yield
    finally:
        torch.autograd.Function.apply = original


@contextmanager
def optimizers_compiling() -> Iterator[None]:
    """Have torch's optimizers keep counts and rates as tensors, as they do under torch.compile."""
    compiling = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = compiling


def step_without_hooks(optimizer: Optimizer) -> None:
    """Run the step that the optimizer's class defines, without the hooks around it."""
    type(optimizer).step.__wrapped__(optimizer)


def joint_graph_passes(module: fx.GraphModule, mode: FakeTensorMode, on_cpu: bool) -> None:
    """Run Inductor's passes over forward and backward together.

    On a CPU, skip the half second in which Inductor builds its patterns of attention and of padded products on a GPU.
    """
    passes = importlib.import_module("torch._inductor.fx_passes.joint_graph")
    virtualized = importlib.import_module("torch._inductor.virtualized").V
    lazy_init = passes.lazy_init
    try:
        if on_cpu:
            passes.lazy_init = lambda device=None: None
        with virtualized.set_fake_mode(mode):
            passes.joint_graph_passes(module)
    finally:
        passes.lazy_init = lazy_init


@cache
def write_out(
    operator: OpOverload, function_of: Callable[..., tuple[str, str, Sequence[Sequence[int]]] | None]
) -> None:
    """Have Inductor write a call of an operator as one of a C++ function of our own, into the code of a graph.

    Args:
        operator: takes lists of tensors, then numbers, and returns a list of tensors.
        function_of: numbers -> the call of the function for ``columns``, the addresses of the operator's tensors and
            its results; its definition, which may stand in the code more than once; and the strides that tensors must
            have. None to call the operator instead.
    """
    ir, lowering, virtualized = (
        importlib.import_module(f"torch._inductor.{name}") for name in ("ir", "lowering", "virtualized")
    )

    class Call(ir.ExternKernel):
        def __init__(self, call: str, source: str, given: list, results: list) -> None:
            self.device, self.call, self.source = results[0].get_device(), call, source
            layout = ir.NoneLayout(device=self.device)
            super().__init__(None, layout, self.unwrap_storage([self.realize_input(x) for x in (*given, *results)]))
            self.mutation_outputs = [ir.MutationOutput(layout, x, self) for x in results]
            virtualized.V.graph.register_operation(self)

        def get_outputs(self) -> list:
            return self.mutation_outputs

        def get_device(self) -> torch.device:
            return self.device

        def codegen(self, wrapper: Any) -> None:
            addresses = [
                f"static_cast<char*>(static_cast<void*>(get_data_ptr_wrapper({x.get_name()})))"
                f" + {x.get_layout().offset * x.get_dtype().itemsize}"
                for x in self.inputs
            ]
            wrapper.define_kernel(self.call, self.source, gpu=False)
            wrapper.writeline(f"{{ void* columns[] = {{{', '.join(addresses)}}}; {self.call}; }}")

    def lower(*args: Any) -> Any:
        numbers = [x for x in args if isinstance(x, int)]
        if (made := function_of(*numbers)) is None:
            return lowering.fallback_handler(operator)(*args)
        call, source, strides = made
        tensors = [x for part in args if not isinstance(part, int) for x in part]
        given = [ir.ExternKernel.require_exact_strides(x, s) for x, s in zip(tensors, strides, strict=True)]
        empty = lowering.lowerings[torch.ops.aten.empty_strided.default]
        values = virtualized.V.graph.current_node.meta["val"]
        results = [empty(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in values]
        Call(call, source, given, results)
        return results

    lowering.register_lowering(operator, type_promotion_kind=None)(lower)


@contextmanager
def faster_builds() -> Iterator[None]:
    """Spare the C++ compiler work that it need not do.

    It does not try instructions of 2019 and 2020 where the processor has them, and finds the headers of kernels among
    the precompiled ones, not only those of the code around kernels.
    """
    vectors, code = map(importlib.import_module, ("torch._inductor.cpu_vec_isa", "torch._inductor.codecache"))
    known = vectors.VecAVX512._avx512_bf16_code, vectors.VecAVX512VNNI._avx512_vnni_code
    build, header = vectors.VecISA.check_build, code._get_cpp_wrapper_header
    vectors.VecISA.check_build = lambda self, source: source in known or build(self, source)
    code._get_cpp_wrapper_header = lambda device: f"{header(device)}>\n#include <torch/csrc/inductor/cpp_prefix.h"
    try:
        yield
    finally:
        vectors.VecISA.check_build, code._get_cpp_wrapper_header = build, header


def import_compiler() -> None:
    """Import what the first steps use of torch; under the profiler of the first one this would take twice as long."""
    importlib.import_module("torch._inductor.config")
