"""What cannot be one graph is refused, by line or site, and what cannot be used changes nothing."""

import copy
import functools
import itertools
import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn, optim

import pyro_elbo as pe
from pyro_elbo.compile import inductor
from pyro_elbo.errors import ArgumentError, CompileError, NonFiniteError, PyroElboError, SiteError
from tests.support.compiled import (  # noqa: F401  (fixtures work by name)
    X,
    _as_captured,
    _double,
    _graphs,
    adam,
    exact_or_refused,
    guide,
    model,
    parameters,
    run_both,
    sampled,
    state_of,
    train,
)
from tests.support.untyped import _untyped  # noqa: F401  (a fixture)

VALUE_READS = {
    "a branch": lambda z, x, b: z * 1.0 if z > 0 else z,
    "item": lambda z, x, b: z.detach().item(),
    "item of a parameter": lambda z, x, b: pyro.param("loc").item(),
    "a parameter as a number": lambda z, x, b: float(pyro.param("loc").detach()),
    "numpy": lambda z, x, b: torch.as_tensor(z.detach().numpy()),
    "boolean indexing": lambda z, x, b: x[x > 0].sum(),
    "a buffer as fill value": lambda z, x, b: torch.full((4,), b),
    "a buffer as alpha": lambda z, x, b: torch.add(x, x, alpha=b).sum(),
    "a buffer in a literal": lambda z, x, b: torch.tensor([b]),
    "a buffer as size": lambda z, x, b: torch.zeros(b.long()).sum(),
    "a buffer as slice": lambda z, x, b: x[: b.long()].sum(),
}


@pytest.mark.parametrize("name", VALUE_READS)
def test_values_are_never_frozen(interpreted, name):
    """A value that Python looks at is an error that names the line; parameters and Pyro are left as they were."""
    buffer, read = torch.tensor(2.0), VALUE_READS[name]

    def program(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        shift = read(z, x, buffer)
        pyro.sample("x", dist.Normal(z + shift, 1.0).expand([4]).to_event(1), obs=x)

    svi = pe.SVI(program, guide, adam(), sampled(), compile=True)
    first = svi.step(X)
    before = parameters()
    with pytest.raises(CompileError, match="lambda z, x, b|Site '[xz]'|Line") as caught:
        svi.step(X)
    assert "compile=False" in str(caught.value)
    torch.testing.assert_close(parameters(), before, rtol=0, atol=0)
    plain = pe.SVI(program, guide, adam(), sampled())
    assert math.isfinite(first + plain.step(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_the_value_of_a_scalar_argument_is_never_frozen(interpreted, dtype):
    def program(x, shift):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + shift.item(), 1.0).expand([4]).to_event(1), obs=x)

    svi = pe.SVI(program, lambda x, shift: guide(x), adam(), sampled(), compile=True)
    svi.step(X, torch.tensor(1, dtype=dtype))
    with pytest.raises(CompileError, match="Site .x. needs a value"):
        svi.step(X, torch.tensor(2, dtype=dtype))


def test_a_branch_names_its_line(interpreted):
    def program(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z > 0:
            pyro.factor("up", z)
        pyro.sample("x", dist.Normal(z, 1.0).expand([4]).to_event(1), obs=x)

    svi = pe.SVI(program, guide, adam(), sampled(), compile=True)
    svi.step(X)
    with pytest.raises(CompileError, match="if z > 0"):
        svi.step(X)


def train_flipping(flip):
    """Train a program one site of which comes and goes."""

    def program(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if flip():
            pyro.factor("sometimes", -(z**2))
        pyro.sample("x", dist.Normal(z, 1.0).expand([4]).to_event(1), obs=x)

    svi = pe.SVI(program, guide, adam(), sampled(), compile=True)
    for _ in range(30):
        svi.step(X)


def test_sites_that_come_and_go_by_a_counter(interpreted):
    count = [0]

    def flip():
        count[0] += 1
        return count[0] % 2

    with pytest.raises(CompileError, match="sometimes|list"):
        train_flipping(flip)


@pytest.mark.parametrize("source", ["random", "numpy", "generator", "iterator"])
def test_random_numbers_of_python_are_refused(interpreted, source):

    rng, alternate = np.random.default_rng(0), itertools.cycle([True, False])
    flips = {
        "random": lambda: random.random() < 0.5,
        "numpy": lambda: np.random.random() < 0.5,  # noqa: NPY002  (what must be noticed)
        "generator": lambda: rng.random() < 0.5,
        "iterator": lambda: next(alternate),
    }
    with pytest.raises(CompileError, match="compile=False"):
        train_flipping(flips[source])


def test_side_effects_do_not_leave_fake_tensors(interpreted):
    """A program that stores a tensor on the side is refused by name, and keeps what it had."""

    class Storing(PyroModule):
        last = None

        def forward(self, x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            self.last = z.detach()
            pyro.sample("x", dist.Normal(z, 1.0).expand([4]).to_event(1), obs=x)

    program = Storing()
    svi = pe.SVI(program, guide, adam(), sampled(), compile=True)
    with pytest.raises(CompileError, match="last"):
        train(svi, 12, X)
    assert type(program.last) is torch.Tensor
    assert math.isfinite(pe.SVI(program, guide, adam(), sampled()).step(X) + program.last.item())


def test_gradients_among_the_arguments_are_refused():
    svi = pe.SVI(model, guide, adam(), sampled(), compile=True)
    with pytest.raises(ArgumentError, match="requires a gradient"):
        svi.step(X.clone().requires_grad_())


@pytest.mark.parametrize("what", ["shapes", "numbers"])
def test_what_never_repeats_is_refused(interpreted, what):
    """New shapes, or new numbers among the arguments, at every step: the cure is named."""
    svi = pe.SVI(lambda x, number: model(x), lambda x, number: guide(x), adam(), sampled(), compile=True)
    calls = [(torch.ones(n), 1.0) if what == "shapes" else (X, float(n)) for n in range(1, 80)]
    with pytest.raises(CompileError, match="pad" if what == "shapes" else "tensor"):
        [svi.step(*args) for args in calls]


def everything(svi):
    inner = svi.optim.optim_objs.values()
    return parameters(), [copy.deepcopy(state_of(o)) for o in inner], svi.loss.step


def test_nan_changes_nothing(graphs):
    """NaN in the middle of training, of a run, and of a parameter: the site is named and the last good step stays."""
    svi = pe.SVI(model, guide, adam(), sampled(pe.LinearWarmup(0.0, 1.0, 99)), compile=True, fallback_random=True)
    svi.run(5, X, progress=False)
    before = everything(svi)
    for attempt in (svi.step, functools.partial(svi.run, 10, progress=False)):
        with pytest.raises(NonFiniteError, match="Site 'x'"):
            attempt(X.where(X < 1, math.nan))
        torch.testing.assert_close(everything(svi), before, rtol=0, atol=0)
    assert math.isfinite(svi.step(X))
    assert svi.loss.step == 6
    assert len(graphs) == 1


def test_divergence_inside_of_a_run_stops_at_the_same_step_as_eager(interpreted):
    def scenario(svi_of):
        svi = svi_of(model, guide, pyro.optim.SGD({"lr": 3.0}), sampled())
        with pytest.raises(NonFiniteError):
            svi.run(400, X, progress=False)
        return parameters(), svi.loss.step

    eager, compiled = run_both(scenario)
    assert eager[1] == compiled[1] < 400


def test_data_outside_of_the_support_raise_as_in_eager(interpreted):
    def positive(x):
        rate = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Exponential(rate), obs=x)

    def positive_guide(x):
        pyro.sample("z", dist.LogNormal(pyro.param("loc", lambda: torch.tensor(0.1)), 0.5))

    svi = pe.SVI(positive, positive_guide, adam(), sampled(), compile=True)
    for _ in range(3):
        svi.step(X.abs())
    before = everything(svi)
    with pytest.raises(SiteError, match="Site 'x'.*support"):
        svi.step(X)
    torch.testing.assert_close(everything(svi), before, rtol=0, atol=0)


def test_masks_that_differ_later_are_not_taken_for_equal(interpreted):
    def masked(x, mask, other):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def masked_guide(x, mask, other):
        with pyro.plate("data", len(x)), poutine.mask(mask=other):
            pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.tensor(0.1)), 0.5))

    svi = pe.SVI(masked, masked_guide, adam(), pe.TraceBeta_ELBO(), compile=True)
    mask = torch.tensor([True, False, True, True])
    for _ in range(3):
        svi.step(X, mask, mask.clone())
    before = everything(svi)
    with pytest.raises(CompileError, match="[Mm]ask"):
        svi.step(X, mask, ~mask)
    torch.testing.assert_close(everything(svi), before, rtol=0, atol=0)


def test_wrong_arguments_are_refused():
    with pytest.raises(ArgumentError, match="grad_clip"):
        pe.SVI(model, guide, adam(), sampled(), grad_clip=0.0)


# --- programs that look simple: exact, or refused ---------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """Rounds; its gradient is three."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3


def with_noise(make_noise):
    def program(x):
        loc = pyro.param("loc", lambda: torch.tensor(0.6))
        pyro.sample("z", dist.Normal(loc + 0.1 * make_noise(), 0.5))

    return program


def forked_noise():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return torch.randn(())


def seeded_noise():
    torch.manual_seed(1)
    return torch.randn(())


def on_network(act):
    """A guide whose network is acted upon before it is used."""
    net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))

    def program(x):
        pyro.module("net", net)
        pyro.sample("z", dist.Normal(act(net, x[:1, None]).squeeze(), 0.5))

    return program


def project(net, x):
    net[0].weight.data = net[0].weight.data / net[0].weight.data.norm()
    return net(x)


def project_in_place(net, x):
    with torch.no_grad():
        net[0].weight.div_(net[0].weight.norm())
    return net(x)


def checkpointed(net, x):
    return torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)


def with_its_gradient(net, x):
    x = x.clone().requires_grad_()
    out = net(x).squeeze()
    return out + torch.autograd.grad(out, x, create_graph=True)[0].squeeze()


def straight_through(x):
    pyro.sample("z", dist.Normal(StraightThrough.apply(pyro.param("loc", lambda: torch.tensor(0.6))), 0.5))


SUBTLE = {
    "straight through": lambda: straight_through,
    "torch.manual_seed": lambda: with_noise(seeded_noise),
    "fork_rng": lambda: with_noise(forked_noise),
    "a torch generator": lambda: with_noise(
        functools.partial(torch.randn, (), generator=torch.Generator().manual_seed(1))
    ),
    "torch noise": lambda: with_noise(lambda: torch.randn(()) + torch.rand(()) + torch.randperm(4)[0]),
    "data assigned": lambda: on_network(project),
    "projection in place": lambda: on_network(project_in_place),
    "checkpoint with dropout": lambda: on_network(checkpointed),
    "gradient inside": lambda: on_network(with_its_gradient),
}


@pytest.mark.parametrize("name", SUBTLE)
def test_subtle_programs_are_exact_or_refused(interpreted, name):
    def scenario(svi_of):
        svi = svi_of(model, SUBTLE[name](), pyro.optim.SGD({"lr": 0.01}), sampled())
        return train(svi, 5, X), parameters()

    message = exact_or_refused(scenario)
    exact = ("straight through", "torch noise", "projection in place", "gradient inside")
    assert not message or (name not in exact and "compile=False" in message)


@pytest.mark.parametrize("compiled", [False, True])
def test_parameters_that_pyro_does_not_see_are_refused_or_trained_right(interpreted, compiled):
    """A network in the optimizer without pyro.module: its gradients must not add up from step to step."""
    net = nn.Linear(1, 1)
    expected = copy.deepcopy(net)

    def unregistered(x):
        pyro.sample("z", dist.Normal(net(x[:1, None]).squeeze(), 0.5))

    svi = pe.SVI(model, unregistered, optim.SGD(net.parameters(), 0.01), sampled(), compile=compiled)
    pyro.set_rng_seed(1)
    try:
        train(svi, 3, X)
    except PyroElboError as error:
        assert "pyro.module" in str(error)  # noqa: PT017
        return
    net, trained = expected, net
    opt = optim.SGD(net.parameters(), 0.01)
    pyro.set_rng_seed(1)
    for _ in range(3):
        opt.zero_grad()
        sampled().loss_and_grads(model, unregistered, X)
        opt.step()
    torch.testing.assert_close(trained.state_dict(), net.state_dict())


@pytest.mark.parametrize("compile", [False, True])
def test_modules_whose_names_the_store_gives_to_others_are_not_left_untrained(compile):
    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 1)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.linear(x[:, None])[:, 0], 1.0))

    def prior(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    pyro.clear_param_store()
    x = torch.tensor([0.3, -1.2])
    pe.SVI(prior, Net(), pyro.optim.Adam({"lr": 0.1}), pe.TraceBeta_ELBO()).step(x)
    again = Net()
    svi = pe.SVI(prior, again, pyro.optim.Adam({"lr": 0.1}), pe.TraceBeta_ELBO(), compile=compile)
    with pytest.raises(ArgumentError, match=r"store holds \['linear\$\$\$weight', 'linear\$\$\$bias'\] of another"):
        svi.step(x)
    assert not any(p.grad.any() for p in again.parameters())
    pyro.clear_param_store()
    before = again.linear.weight.clone()
    svi.step(x)
    assert again.linear.weight != before


def test_old_versions_of_torch_are_refused_before_the_first_step(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    pe.SVI(model, guide, adam(), sampled())
    with pytest.raises(CompileError, match="torch 2.13 or later, this is 2.9.1"):
        pe.SVI(model, guide, adam(), sampled(), compile=True)


def torch_version(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))


def test_a_torch_newer_than_the_tested_ones_is_tried_once(interpreted, graphs, monkeypatch):
    torch_version(monkeypatch, "2.97.0")
    for _ in range(2):
        pe.SVI(model, guide, adam(), sampled(), compile=True)
    assert len(graphs) == 1


@pytest.mark.parametrize("compile", [True, "auto"])
def test_a_torch_whose_graphs_are_wrong(interpreted, monkeypatch, compile):
    torch_version(monkeypatch, f"2.98.{len(str(compile))}")
    monkeypatch.setattr(inductor, "compile_graph", lambda graph, on_cpu: lambda inputs: None)
    tested = r"tested up to torch 2.14, this is 2.98.4, where a small program fails \(\w+"
    if compile == "auto":
        with pytest.warns(UserWarning, match=f"(?s)Steps run in Python.*{tested}"):
            svi = pe.SVI(model, guide, adam(), sampled(), compile="auto")
        assert svi.run(3, X, progress=False).isfinite().all()
        return
    with pytest.raises(CompileError, match=tested):
        pe.SVI(model, guide, adam(), sampled(), compile=True)


def branching(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z if z > 0 else -z, 1.0), obs=x)


def test_auto_goes_on_in_python_where_a_program_cannot_be_compiled(interpreted):
    def losses(compile):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = pe.SVI(branching, guide, adam(), sampled(), compile=compile, fallback_random=True)
        return [svi.step(X) for _ in range(5)], svi.run(4, X, progress=False).tolist(), svi.evaluate_loss(X)

    with pytest.warns(UserWarning, match="Steps run in Python.*Site 'x' needs a value") as caught:
        automatic = losses("auto")
    assert len(caught) == 1
    assert automatic == losses(False)


def test_auto_compiles_what_can_be_compiled(interpreted, graphs):
    pe.SVI(model, guide, adam(), sampled(), compile="auto").run(3, X, progress=False)
    assert len(graphs) == 1


@pytest.mark.parametrize("compile", ["yes", 1, None])
def test_other_values_of_compile_are_refused(untyped, compile):
    with pytest.raises(ArgumentError, match='compile must be True, False or "auto"'):
        pe.SVI(model, guide, adam(), sampled(), compile=compile)
    with pytest.raises(ArgumentError, match='compile must be True, False or "auto"'):
        pe.fit(model, guide, X, compile=compile, progress=False)
