"""Record a function of tensors as a graph.

The function runs once, unchanged, on fake tensors: it may call Pyro, autograd and an optimizer. Every real tensor that
it touches (parameters, buffers, the optimizer's state, tensors of closures) becomes an input of the graph, by identity.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from pyro_elbo.assumptions import NotAlikeError
from pyro_elbo.compile._torch import FakeTensor, valueless_fakes
from pyro_elbo.compile.fakes import Lifting
from pyro_elbo.compile.recorder import Recorder
from pyro_elbo.errors import CompileError


@dataclass(frozen=True)
class Recording:
    """One call of a function. The inputs of the graph are ``externals``, then those of the function."""

    graph: fx.Graph
    externals: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]  # two of them may be the same object
    frozen: tuple[tuple[Tensor, Tensor], ...]  # tensors that the graph holds by value

    @property
    def tensors(self) -> list[Tensor]:
        """The inputs of the graph."""
        return [x.detach() for x in (*self.externals, *self.inputs)]


def record(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Recording:
    """Record one call of ``function(*inputs)``, which returns a boolean scalar: keep what the call wrote."""
    mode = valueless_fakes()
    fakes = [mode.from_tensor(x.detach()) for x in inputs]
    with mode, Lifting(mode) as lifting:
        recorder = Recorder()
        graph = recorder(function, fakes)
    lifted = lifting.lifted
    externals = [lifted.get(id(x), x) for x in recorder.constants]
    if any(isinstance(x, FakeTensor) for x in externals):
        raise NotAlikeError("a tensor of one particle is used outside of its run")
    return Recording(graph, tuple(externals), tuple(inputs), tuple(lifting.frozen.values()))


def check_writes(recording: Recording, written: Sequence[int]) -> None:
    """Raise CompileError for writes to inputs of the function, and to memory that a graph cannot follow.

    Args:
        recording: the call.
        written: the positions of the graph's inputs that it writes to.
    """
    tensors, externals = recording.tensors, len(recording.externals)
    for i in written:
        if externals <= i < len(tensors):
            raise CompileError(
                f"The program changes its tensor argument number {i - externals} in place, which a compiled step would "
                "not do. Write x = x - y instead of x -= y, or use compile=False."
            )
    end, other = 0, -1
    for first, last, i in sorted((*_memory(x), i) for i, x in enumerate(tensors) if x.numel()):
        if first < end and (i in written or other in written):
            raise CompileError(
                f"Two tensors of the program, of shapes {tuple(tensors[other].shape)} and {tuple(tensors[i].shape)}, "
                "share memory and one of them is trained or updated: a compiled step would miss the change in the "
                "other. Compute one of them from the other in the program, or use compile=False."
            )
        if last > end:
            end, other = last, i
    trained = [recording.externals[i] for i in written if i < externals]
    if changed := [tuple(x.shape) for x, _ in recording.frozen if any(x is y for y in trained)]:
        raise CompileError(
            f"The programs read values of a tensor of shape {changed[0]} and change it in place: a graph would keep "
            "the first values. Compute with the tensor instead (torch.where), or use compile=False."
        )


def _memory(x: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte of a tensor and of the byte after its last one."""
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.data_ptr(), x.data_ptr() + extent * x.element_size()
