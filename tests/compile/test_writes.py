"""Writes to memory of a graph's own become values; those that something else sees stay writes."""

import pytest
import torch
from torch import fx

from pyro_elbo.compile.nodes import written_by
from pyro_elbo.compile.record import record
from pyro_elbo.compile.writes import write_out_writes

BUFFER = torch.arange(3.0)


def masks_its_result(x):
    y = x * 2
    y.masked_fill_(x < 0, -1.0)
    return y + y[0]


def writes_twice(x):
    y = torch.zeros(3)
    y.add_(x).mul_(y)
    z = y.detach()
    z.sub_(1.0)
    return z.exp()


def writes_to_a_part_that_is_read_as_a_whole(x):
    y = x.clone()
    y[0].add_(1.0)
    return y.sum()


def writes_beside_an_older_view(x):
    y = x.clone()
    z = y.view(3, 1)
    y.add_(1.0)
    return z * y


def writes_to_a_buffer(x):
    return BUFFER.detach().add_(x).sum()


def writes_in_another_type(x):
    y = x.long()
    y.mul_(2)
    z = x.clone()
    return z.lt_(1.0) + y


# The function, and the writes that stay.
CASES = {
    masks_its_result: [],
    writes_twice: [],
    writes_to_a_part_that_is_read_as_a_whole: ["add_"],
    writes_beside_an_older_view: ["add_"],
    writes_to_a_buffer: ["add_"],
    writes_in_another_type: ["lt_"],
}


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_only_writes_that_something_else_sees_stay(function):
    x = torch.tensor([0.5, -2.0, 3.0])
    recording = record(function, [x])
    write_out_writes(recording.graph)
    writes = [str(n.target).split(".")[1] for n in recording.graph.nodes if written_by(n)]
    assert writes == CASES[function]
    externals = [e.clone() for e in recording.externals]
    found = fx.GraphModule({}, recording.graph)(*externals, x)
    buffer = BUFFER.clone()
    try:
        torch.testing.assert_close(found, function(x))
        assert all(torch.equal(e, BUFFER) for e in externals)
    finally:
        BUFFER.copy_(buffer)


def test_a_draw_is_a_value_of_fresh_memory():
    def function(x):
        return x + torch.empty(3).normal_() + torch.empty(3).detach().uniform_(0.0, 2.0)

    recording = record(function, [BUFFER])
    write_out_writes(recording.graph)
    draws = [n for n in recording.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())]
    assert [str(n.target) for n in draws] == ["aten.normal_functional.default", "aten.uniform.default"]
    assert all(n.args[0].op == "call_function" and not n.args[0].all_input_nodes for n in draws)
