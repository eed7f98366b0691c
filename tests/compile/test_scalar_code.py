"""Loops over scalars: in C++ as in Python, for every operator that can be written out; what is refused."""

import logging

import pytest
import torch

from pyro_elbo.compile import inductor
from pyro_elbo.compile._torch import make_fx
from pyro_elbo.compile.code import Code
from pyro_elbo.compile.scan import operators
from pyro_elbo.compile.scan.operators import register
from pyro_elbo.compile.scan.scalar_code import Layout
from pyro_elbo.errors import CompileError

T = 5


def in_python(step, constants, carry, inputs, reverse):
    """States around all steps and exports of each, as the operator returns them."""
    states, exports = [carry], []
    for t in reversed(range(T)) if reverse else range(T):
        new, outs = step(constants, states[-1], [x[t] for x in inputs])
        states.append([torch.as_tensor(x).expand_as(c).to(c.dtype) for x, c in zip(new, carry, strict=True)])
        exports.append(outs)
    if reverse:
        states, exports = states[::-1], exports[::-1]
    return [torch.stack(x) for columns in (states, exports) for x in zip(*columns, strict=True)]


def loop_of(step, constants, carry, inputs, reverse=False):
    """The loop that the operator runs."""
    outs = step(constants, carry, [x[0] for x in inputs])[1]
    rooms = [torch.empty(x.shape, dtype=x.dtype) for x in (*carry, *outs)]
    like = [*constants, *carry, *(x[0] for x in inputs), *rooms]
    k, n, m = len(constants), len(constants) + len(carry), len(constants) + len(carry) + len(inputs)

    def function(*arguments):
        new, outs = step(list(arguments[:k]), list(arguments[k:n]), list(arguments[n:m]))
        for room, x in zip(arguments[m:], [*new, *outs], strict=True):
            room.copy_(x)
        return ()

    layout = Layout(k, len(carry), len(inputs), [torch.empty_like(x) for x in like])
    loop = register(make_fx(function)(*like), layout, tuple((x.shape, x.dtype) for x in outs), reverse, 0)
    loop.compile()
    return loop


def assert_equal(step, constants, carry, inputs, reverse=False, is_scalar=True):
    loop = loop_of(step, constants, carry, inputs, reverse)
    assert (loop.source is not None) == is_scalar
    found = torch.ops.pyro_elbo.loop(constants, carry, inputs, T, loop.key)
    expected = in_python(step, constants, carry, inputs, reverse)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        tolerance = 1e-5 if a.dtype == torch.float32 else 1e-12
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, i=i: f"{i}: {m}")


UNARY = (
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "sin", "cos", "tan", "asin", "acos", "atan"),
    *("sinh", "cosh", "tanh", "asinh", "atanh", "erf", "erfc", "lgamma", "floor", "ceil", "trunc", "neg", "abs"),
    *("sign", "relu", "sigmoid", "rsqrt", "reciprocal", "square", "isnan", "isinf", "isfinite", "logit"),
)
BINARY = ("add", "sub", "mul", "div", "pow", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "atan2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pointwise_operators(dtype):
    def step(constants, carry, inputs):
        (c,), (x,) = carry, inputs
        u = torch.sigmoid(c + x)  # between 0 and 1, the domain of all
        outs = [getattr(torch, name)(u) for name in UNARY]
        outs += [getattr(torch, name)(u, constants[0]) for name in BINARY]
        outs += [torch.acosh(1 + u), torch.nn.functional.softplus(x), x.clamp(-0.3, 0.4), u**3, u**-1, u**0.5, 2.5**u]
        outs += [torch.where(x > 0, u, 0.5), (x > 0) & (u < 0.5), (x > 0) | ~(u < 0.5), torch.logical_xor(x > 0, u < x)]
        outs += [(x > 0) + u, (10 * u).long() * 3, torch.logaddexp(u, x), u - 2 * x]
        return [torch.tanh(u - x)], outs

    torch.manual_seed(0)
    inputs, start = torch.randn(T, 13, dtype=dtype), torch.zeros(13, dtype=dtype)  # vectors, and one that is left
    assert_equal(step, [torch.tensor(0.6, dtype=dtype)], [start], [inputs])


@pytest.mark.parametrize("lanes", [1, 5])
def test_not_a_number_and_infinity_pass_through(lanes):
    def step(constants, carry, inputs):
        (x,) = inputs
        a, b = x.unbind()
        outs = [torch.maximum(a, b), torch.minimum(a, b), x.amax(0), x.amin(0), a.clamp(min=0.5), torch.relu(a)]
        outs += [torch.logsumexp(x, 0), a == b, x.sign(), torch.where(a < b, a, torch.inf)]
        return [carry[0] * a], [*outs, a.isinf(), a.isnan(), a.exp(), a.log(), torch.where(a.isnan() | (b > a), b, -a)]

    inf, nan = torch.inf, torch.nan
    values = torch.tensor([[nan, 1.0], [1.0, nan], [inf, 1.0], [-inf, -inf], [0.0, -2.0]], dtype=torch.float64)
    values = torch.stack([values.roll(i, 0) for i in range(lanes)], -1)
    assert_equal(step, [], [torch.ones(lanes, dtype=torch.float64)], [values])


def test_lanes_of_several_vectors():
    def step(constants, carry, inputs):
        (c,), (x,) = carry, inputs
        pairs = c.unsqueeze(-1) + x.unsqueeze(-2)
        new = torch.logsumexp(pairs, -2).flip(-1)
        seen = (new > 0).logical_and(x.flip(0) < 0.5)
        outs = [pairs.transpose(1, 2), pairs[:, ::2], torch.where(seen, x, c.T[0][:, None][:3]), seen, pairs.sum(0)]
        return [0.5 * new], [*outs, torch.cat([c, x.flip(0)], 1), (pairs * pairs).mean((0, 2)), torch.ones_like(x) * 3]

    torch.manual_seed(0)
    assert_equal(step, [], [torch.randn(3, 6).double()], [torch.randn(T, 3, 6).double()])


def test_views_sums_and_products():
    def step(constants, carry, inputs):
        (weight,), (c,), (x,) = constants, carry, inputs
        a, b = c.unbind(-1)[:2]
        outs = [
            c.T,
            c.permute(1, 0),
            c.reshape(-1),
            c[:, 1:],
            c[0],
            c[1, 2],
            c[:, ::2],
            c.unsqueeze(1),
            c[:, :1].squeeze(1),
        ]
        outs += [
            torch.cat([c, x], 1),
            torch.stack([a, b]),
            c.flip(0),
            c.repeat(2, 1),
            *c.split(2, 1),
            x.expand(2, 2, 3),
        ]
        outs += [torch.select_scatter(c, b[:1].expand(3), 0, 1), torch.slice_scatter(c, x[:, :2], 1, 1)]
        outs += [c.sum(), c.sum(0), c.sum((0, 1)), c.sum(1, keepdim=True), c.mean(), c.mean(1), c.prod(1), c.amax(1)]
        outs += [c.amin((0, 1)), (c > 0).any(), (c > 0).all(1), (c > 0).sum(), torch.softmax(c, 1)]
        outs += [c @ weight, x.T @ c, a @ b, weight @ c[0]]
        outs += [torch.bmm(c[None], weight[None]), torch.addmm(c, x, weight), torch.ones(2, dtype=c.dtype) * a]
        return [torch.tanh(c @ weight + x)], outs

    torch.manual_seed(0)
    weight, start = torch.randn(3, 3).double().T, torch.randn(2, 3).double()  # not contiguous
    assert_equal(step, [weight], [start], [torch.randn(T, 2, 3).double()])


@pytest.mark.parametrize("reverse", [False, True])
def test_several_parts_of_a_carry(reverse):
    """Two that change places, one that counts, one that remembers whether, one in less precision."""

    def step(constants, carry, inputs):
        a, b, count, seen, rough = carry
        seen = seen | (inputs[0] > 1)
        return [b, a + inputs[0] * count, count + 1, seen, (rough * 0.5 + a).to(torch.float32)], [
            torch.where(seen, a, b)
        ]

    torch.manual_seed(1)
    double = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731
    carry = [double(0.3), double(-0.2), torch.tensor(0), torch.tensor(False), torch.tensor(0.1)]
    assert_equal(step, [], carry, [2 * torch.randn(T).double()], reverse)


# --- steps that are called one by one ------------------------------------------------------------------------------


def halved(constants, carry, inputs):
    return [carry[0] * 0.5 + inputs[0]], []


def test_products_in_a_step_that_is_called(monkeypatch):
    """Their rows and columns fill vectors and blocks, and some are left."""
    targets, code_of = set(), inductor.code_of

    def watched(graph, on_cpu):
        targets.update(node.target for node in graph.module.graph.nodes)
        return code_of(graph, on_cpu)

    def step(constants, carry, inputs):
        pairs = zip(carry, inputs, (constants[:3], constants[3:]), strict=True)
        return [torch.tanh(torch.addmm(bias, c, a)) @ b + x for c, x, (bias, a, b) in pairs], []

    monkeypatch.setattr(inductor, "code_of", watched)
    torch.manual_seed(0)
    constants, carry, inputs = [], [], []
    for dtype in (torch.float32, torch.float64):
        constants += [torch.randn(shape, dtype=dtype) / 10 for shape in ((33,), (133, 33), (33, 133))]
        carry.append(torch.randn(7, 133, dtype=dtype))
        inputs.append(torch.randn(T, 7, 133, dtype=dtype))
    assert_equal(step, constants, carry, inputs, is_scalar=False)
    assert torch.ops.pyro_elbo.product.default in targets
    assert not targets & {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


REFUSED = {
    "too much work": (lambda k, c, x: ([torch.tanh(c[0]) + x[0]], []), torch.float64, 32, "more work than 32"),
    "too many elements": (halved, torch.float64, 5, "elements"),
    "a type": (halved, torch.bfloat16, 100, "bfloat16"),
    "an operator": (lambda k, c, x: ([c[0].sort()[0] + x[0]], []), torch.float64, 100, "sort"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_written_out(monkeypatch, caplog, name):
    step, dtype, limit, reason = REFUSED[name]
    monkeypatch.setattr(operators, "SCALARS", limit)
    monkeypatch.setattr(inductor, "code_of", lambda graph, on_cpu: Code(None, None))
    carry, inputs = [torch.zeros(3, dtype=dtype)], [torch.ones(T, 3, dtype=dtype)]
    with caplog.at_level(logging.DEBUG, logger="pyro_elbo.compile.scan"):
        loop = loop_of(step, [], carry, inputs)
    assert loop.source is None
    assert loop.machine == Code(None, None)
    assert "step by step" in caplog.text
    assert reason in caplog.text


def test_a_missing_compiler(monkeypatch):
    def load_async(source, **_):
        raise inductor.CppCompileError(["g++"], "not found")

    monkeypatch.setattr(inductor.CppCodeCache, "load_async", load_async)
    carry, inputs = [torch.zeros(2)], [torch.ones(T, 2)]
    loop = loop_of(halved, [], carry, inputs)
    with pytest.raises(CompileError, match=r"Install a C\+\+ compiler"):
        torch.ops.pyro_elbo.loop([], carry, inputs, T, loop.key)
