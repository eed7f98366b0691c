"""A recorded graph computes what the function did, and its nodes know the layout of every value."""

import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from pyro_elbo.compile.layouts import Layouts
from pyro_elbo.compile.record import record

BUFFER = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)


class Checked(fx.Interpreter):
    """Runs a graph and compares the layout of each value with what its node says."""

    def run_node(self, n):
        result = super().run_node(n)
        found, expected = pytree.tree_leaves(result), pytree.tree_leaves(n.meta.get("val", result))
        assert [*map(layout, found)] == [*map(layout, expected)], n
        return result


def layout(x):
    return (x.shape, x.dtype, x.stride(), x.storage_offset()) if isinstance(x, Tensor) else x


def twice(function):
    """Call a function again with equal layouts: what the first call computed is known to the second."""
    return lambda x: function(x) + function(x * 2)


def writes_to_views(x):
    y = x.clone()
    y[0].mul_(2.0)
    y.detach().t()[1].add_(y[:, 0].sum())
    y.data.select(0, 1).copy_(y[0])
    return y


def changes_layouts(x):
    y = x.clone()
    before = y.sum(0)
    z = y.mul_(2.0).t_().unsqueeze_(0)
    return z.squeeze_(0).t() + before + y.t()


def changes_a_literal(x):
    width, row = torch.tensor(1.0), torch.tensor([1.0, 2.0, 3.0])
    width.add_(x.sum())
    row.mul_(width)
    return x * row + torch.tensor(2)


def makes_many(x):
    a, b = x.split([1, 2], dim=1)
    values, places = x.max(dim=1)
    first, *_ = x.unbind()
    return torch.cat([a, b], 1) + values.unsqueeze(1) + places.unsqueeze(1) + torch.stack([first, first])


def differentiates(x):
    y = x.detach().requires_grad_()
    loss = torch.nn.functional.softplus(y @ BUFFER.t()).logsumexp(-1).sum() + (y.abs() ** 1.5).prod()
    (first,) = torch.autograd.grad(loss, y, create_graph=True)
    return torch.autograd.grad(first.square().sum(), y)[0]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2 + BUFFER

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3 + BUFFER


def of_a_custom_function(x):
    y = x.detach().requires_grad_()
    return torch.autograd.grad(Doubled.apply(y).square().sum(), y)[0]


def mixes_types(x):
    whole = (x > 0).long()
    return x * whole + whole.double().mean() + x.half().float() + whole.float().expand(4, 2, 3)[1]


FUNCTIONS = (
    *(writes_to_views, changes_layouts, changes_a_literal, makes_many, differentiates, of_a_custom_function),
    mixes_types,
)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("x", [torch.randn(2, 3).double(), torch.randn(3, 2).double().t()], ids=["rows", "columns"])
def test_a_graph_computes_what_the_function_did(function, x):
    recording = record(twice(function), [x])
    module = fx.GraphModule({}, recording.graph)
    torch.testing.assert_close(Checked(module).run(*recording.externals, x), twice(function)(x), rtol=1e-12, atol=1e-12)


def test_what_the_function_reads_becomes_inputs_and_what_it_writes_is_written():
    state, rate = torch.zeros(3), torch.tensor(0.5)

    def function(x):
        state.mul_(rate).add_(x)
        return state.sum() > 0

    recording = record(function, [torch.ones(3)])
    assert [x is y for x, y in zip(recording.externals, (state, rate), strict=True)] == [True, True]
    assert state.tolist() == [0, 0, 0]
    fx.GraphModule({}, recording.graph)(*recording.externals, torch.ones(3))
    assert state.tolist() == [1, 1, 1]


def test_layouts_are_computed_once_for_each_kind_of_call(monkeypatch):
    known = []
    make = Layouts._made
    monkeypatch.setattr(Layouts, "_made", lambda *given: known.append(given) or make(*given))

    def function(x):
        return torch.stack([(part * 2.0 + 1.0).exp() for part in x.unbind()]).sum()

    record(function, [torch.randn(50)])
    assert len(known) == 3 * 49
