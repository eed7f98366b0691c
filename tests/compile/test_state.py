"""Compiled steps follow modules, parameters, objectives and memory that change, are shared or are freed."""

import copy
import gc
import math
import pickle
import threading
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn, optim

import pyro_elbo as pe
from pyro_elbo.errors import CompileError
from tests.support.compiled import (  # noqa: F401  (fixtures work by name)
    X,
    _as_captured,
    _double,
    _graphs,
    adam,
    any_guide,
    assert_same,
    decoder_model,
    exact_or_refused,
    guide,
    model,
    network,
    network_guide,
    parameters,
    run_both,
    sampled,
    widths,
)
from tests.support.rows import thorough

# --- modules -----------------------------------------------------------------------------------------------------

CLAIMS = {
    "another activation": lambda net: net.__setitem__(1, nn.Sigmoid()),
    "another layer": lambda net: net.append(nn.Tanh()),
    "another linear": lambda net: net.__setitem__(2, nn.Linear(3, 1)),
    "another weight": lambda net: setattr(net[0], "weight", nn.Parameter(torch.ones(3, 1))),
    "weight in place": lambda net: net[0].weight.data.fill_(1.0),
    "state": lambda net: net.load_state_dict({k: torch.ones_like(v) for k, v in net.state_dict().items()}),
    "state assigned": lambda net: net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True),
    "evaluation mode": lambda net: net.eval(),
    "dropout": lambda net: setattr(net[3], "p", 0.9),
    "a forward of its own": lambda net: setattr(net[1], "forward", lambda x: x * 2),
    "forward hook": lambda net: net[0].register_forward_hook(lambda m, i, o: o * 2) and None,
    "backward hook": lambda net: net[0].register_full_backward_hook(lambda m, i, o: tuple(g * 2 for g in i)) and None,
    "gradient hook": lambda net: net[0].weight.register_hook(lambda g: g * 0.1) and None,
    "weight norm": lambda net: nn.utils.parametrizations.weight_norm(net[0]) and None,
    "frozen weight": lambda net: net[0].requires_grad_(False) and None,
}
DISPLACED = ("another linear", "another weight", "state assigned")  # Pyro's store goes on to train the first ones


ALIKE = ("another layer", "another weight", "state")  # noticed as their neighbors are


@pytest.mark.parametrize("name", [thorough(n) if n in ALIKE else n for n in CLAIMS])
@pytest.mark.filterwarnings("ignore:.*was not registered in the param store:UserWarning")
def test_modules(interpreted, name):
    holder = []

    def fresh():
        torch.manual_seed(3)
        net = network().append(nn.Dropout(0.2))
        holder[:] = [net]
        return decoder_model(net)

    def scenario(svi_of):
        svi = svi_of(fresh(), row_guide, adam(), sampled())
        before = [svi.step(X) for _ in range(3)]
        CLAIMS[name](holder[0])
        return before, [svi.step(X) for _ in range(4)], parameters(), holder[0].state_dict()

    message = exact_or_refused(scenario, rtol=1e-7)
    if name in DISPLACED:
        assert "of another module" in message
    else:
        assert not message or (name.endswith("hook") and "hooks on its gradient" in message)


def row_guide(x):
    loc = pyro.param("loc", lambda: torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc * x, 0.5))


def test_a_gradient_hook_from_the_start(interpreted):
    def scenario(svi_of):
        net = network()
        net[0].weight.register_hook(lambda g: g * 0.1)
        svi = svi_of(model, network_guide(net), optim.SGD(net.parameters(), 0.05), sampled())
        return [svi.step(X) for _ in range(4)], parameters()

    message = exact_or_refused(scenario)
    assert not message or "hooks on its gradient" in message


@pytest.mark.parametrize("clear", [False, True])
def test_gradients_that_others_leave_on_parameters(interpreted, clear):
    """An uncompiled step adds its own to them."""

    def scenario(svi_of):
        net = network()
        svi, losses = svi_of(decoder_model(net), row_guide, adam(), sampled()), []
        for n in range(6):
            losses.append(svi.step(X))
            if clear:
                net.zero_grad()
            if n % 2:
                net(X[:, None]).sum().backward()
        return losses, list(svi.run(4, X, progress=False)), net.state_dict()

    assert_same(scenario)


def test_the_sign_of_a_zero_among_the_arguments(interpreted):
    def signed(x, zero):
        pyro.sample(
            "x",
            dist.Normal(pyro.sample("z", dist.Normal(math.copysign(1.0, zero), 1.0)), 1.0).expand([4]).to_event(1),
            obs=x,
        )

    def scenario(svi_of):
        svi = svi_of(signed, any_guide, adam(), sampled())
        return [svi.step(X, zero) for zero in 3 * [0.0, -0.0]]

    assert_same(scenario)


def test_spectral_norm_updates_its_buffers(interpreted):
    def scenario(svi_of):
        net = network()
        nn.utils.parametrizations.spectral_norm(net[0])
        svi = svi_of(decoder_model(net), row_guide, adam(), sampled())
        return [svi.step(X) for _ in range(4)], net.state_dict()

    assert_same(scenario)


class Counting(PyroModule):
    """Changes buffers in place, in the ways that also assign them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        self.mean = torch.lerp(self.mean, x.mean(), 0.1, out=self.mean)
        model(x - self.mean * self.seen)


def test_a_buffer_that_is_assigned_after_a_change_in_place(interpreted):
    def scenario(svi_of):
        program = Counting()
        svi = svi_of(program, guide, adam(), sampled())
        return [svi.step(X) for _ in range(4)], program.state_dict()

    assert_same(scenario)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of Dynamo
def test_modules_and_functions_that_torch_compile_has_compiled(interpreted):
    """They run as written: they are a part of the graph, and not one of their own within it."""

    def scenario(svi_of):
        net, center = network(), torch.compile(lambda x: x - x.mean(), backend="eager")
        net[0].compile(backend="eager")
        decoder = decoder_model(torch.compile(net, backend="eager"))
        svi = svi_of(lambda x: decoder(center(x)), row_guide, adam(), sampled())
        return [svi.step(X) for _ in range(4)], net.state_dict()

    assert_same(scenario)


class Walking(PyroModule):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean()
        model(x - self.mean)


def test_a_buffer_that_is_assigned_is_refused_by_name(interpreted):
    program = Walking()
    svi = pe.SVI(program, guide, adam(), sampled(), compile=True)
    svi.step(X)
    with pytest.raises(CompileError, match="mean"):
        svi.step(X)
    assert type(program.mean) is torch.Tensor
    assert program.mean.item() == pytest.approx(0.1 * X.mean().item())


@pytest.mark.thorough
def test_memory_of_another_layout(graphs):
    """On Inductor: ``.data`` of another shape, stride or precision behind the same tensor."""

    def scenario(svi_of):
        net, data = nn.Linear(4, 3), torch.ones(4)

        def program(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(data)):
                pyro.sample("x", dist.Normal(z, 1.0), obs=data)

        def linear_guide(x):
            pyro.module("net", net)
            pyro.sample("z", dist.Normal(net(x).sum(), 0.5))

        svi = svi_of(program, linear_guide, pyro.optim.SGD({"lr": 0.01}), sampled())
        losses = [svi.step(X) for _ in range(3)]
        data.data = torch.arange(2.0)
        net.weight.data = (torch.arange(24.0).reshape(3, 8) * 0.01)[:, ::2]
        return [*losses, *(svi.step(X) for _ in range(3))], parameters()

    assert_same(scenario)


# --- parameters and objective ------------------------------------------------------------------------------------


def test_the_store_is_cleared_saved_and_loaded(interpreted, tmp_path):
    def scenario(svi_of):
        store = pyro.get_param_store()
        svi = svi_of(model, guide, adam(), sampled())
        losses = [svi.step(X) for _ in range(3)]
        store.save(tmp_path / "store.pt")
        state = copy.deepcopy(store.get_state())
        losses += [svi.step(X) for _ in range(3)]
        pyro.clear_param_store()
        losses += [svi.step(X) for _ in range(3)]
        assert set(store) == {"loc", "scale"}
        store.load(tmp_path / "store.pt")
        losses += [svi.step(X) for _ in range(3)]
        store.set_state(state)
        losses += [svi.step(X) for _ in range(3)]
        store["loc"] = torch.tensor(2.0)
        losses += [svi.step(X) for _ in range(3)]
        del store["scale"]
        losses += [svi.step(X) for _ in range(3)]
        with torch.no_grad():
            store["loc"].fill_(-1.0)
        return [*losses, *(svi.step(X) for _ in range(3))], parameters()

    assert_same(scenario)


def test_stores_in_scopes(interpreted):
    def scenario(svi_of):
        svi = svi_of(model, guide, adam(), sampled())
        losses = [svi.step(X) for _ in range(3)]
        with pyro.get_param_store().scope() as scope:
            losses += [svi.step(X) for _ in range(3)]
        losses.append(svi.step(X))
        with pyro.get_param_store().scope(scope):
            losses += [svi.step(X) for _ in range(2)]
        return losses, parameters()

    assert_same(scenario)


@pytest.mark.parametrize(
    "change",
    [
        lambda loss: setattr(loss, "num_particles", 3),
        lambda loss: setattr(loss, "kl", "auto"),
        lambda loss: setattr(loss, "weighting", pe.TraceBeta_ELBO(7.0).weighting),
        lambda loss: setattr(loss, "step", 15),
    ],
    ids=["particles", "kl", "weighting", "step"],
)
def test_objectives_that_change(interpreted, change):
    def scenario(svi_of):
        loss = sampled(pe.LinearWarmup(0.0, 1.0, 20))
        svi = svi_of(model, guide, adam(), loss)
        losses = [svi.step(X) for _ in range(3)]
        change(loss)
        return losses, [svi.step(X) for _ in range(3)], svi.run(2, X, progress=False), parameters(), loss.step

    assert_same(scenario)


@pytest.mark.parametrize("compiled", [False, True])
def test_attributes_of_the_svi_act_or_cannot_be_set(interpreted, compiled):
    svi = pe.SVI(model, guide, adam(), sampled(), compile=compiled)
    svi.run(3, X, progress=False)
    new = {"model": widths(lambda: 9.0), "guide": any_guide, "optim": adam(0.0), "loss": sampled(100.0)}
    before = parameters()
    for name, value in new.items():
        try:
            setattr(svi, name, value)
        except AttributeError:
            continue
        svi.run(3, X, progress=False)
        assert getattr(svi._steps, name, value) is value
        if name == "optim":
            torch.testing.assert_close(parameters(), before, rtol=0, atol=0)
        before = parameters()


def test_evaluation_between_steps_sees_the_trained_parameters(interpreted):
    def scenario(svi_of):
        loss = sampled(pe.LinearWarmup(1.0, 5.0, 9))
        svi, seen = svi_of(model, guide, adam(), loss), []
        for _ in range(4):
            seen += [svi.step(X), loss.loss(model, guide, X), pyro.param("loc").item(), svi.evaluate_loss(X), loss.step]
            seen.append(parameters()["scale"])
        return seen

    assert_same(scenario)


# --- several owners, memory --------------------------------------------------------------------------------------


def test_two_that_share_guide_optimizer_and_objective(interpreted):
    def scenario(svi_of):
        auto, opt, loss = AutoNormal(model), adam(), sampled(pe.LinearWarmup(0.0, 1.0, 9))
        first, second = svi_of(model, auto, opt, loss), svi_of(widths(lambda: 2.0), auto, opt, loss)
        third = svi_of(model, auto, adam(0.01), sampled(3.0))
        losses = [svi.step(X) for _ in range(4) for svi in (first, second, third)]
        return losses, parameters(), loss.step, third.loss.step

    assert_same(scenario)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda svi: pickle.loads(pickle.dumps(svi))])
def test_copies_train_on_their_own(interpreted, duplicate):
    with pyro.settings.context(module_local_params=True):
        guide_module = Guide()
        opt = optim.Adam(guide_module.parameters(), 0.1)
        svi = pe.SVI(model, guide_module, opt, sampled(), compile=True, fallback_random=True)
        svi.run(4, X, progress=False)
        before = guide_module.loc.item()
        other = duplicate(svi)
        pyro.set_rng_seed(7)
        losses = other.run(4, X, progress=False)
        assert guide_module.loc.item() == before != other.guide.loc.item()
        pyro.set_rng_seed(7)
        torch.testing.assert_close(svi.run(4, X, progress=False), losses, rtol=1e-9, atol=0)


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def forward(self, x):
        pyro.sample("z", dist.Normal(self.loc, 0.5))


@pytest.mark.slow
def test_memory_is_freed_after_its_last_use():
    """On Inductor: data are freed at once, programs with the SVI object; parameters outlive both."""
    svi = pe.SVI(model, guide, adam(), sampled(), compile=True)
    data = [X + i for i in range(8)]
    alive = [weakref.ref(x) for x in data]
    while data:
        svi.step(data.pop())
    gc.collect()
    assert [ref() is None for ref in alive[:6]] == [True] * 6  # all but those of the first step and the capture
    gone, kept = weakref.ref(svi), pyro.param("loc")
    del svi
    gc.collect()
    assert gone() is None
    assert torch.isfinite(kept)
    torch.randn(1000)
    assert torch.isfinite(pyro.param("loc"))


@pytest.mark.slow
def test_threads_take_turns():
    svi = pe.SVI(model, guide, adam(), sampled(), compile=True)
    svi.run(3, X, progress=False)
    failures = []

    def work():
        try:
            for _ in range(100):
                svi.step(X)
        except Exception as error:  # noqa: BLE001  (any failure of a thread fails the test)
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert svi.loss.step == 403


def test_run_both_would_notice():
    """``assert_same`` can fail."""
    results = run_both(lambda svi_of: svi_of.keywords["compile"])
    assert results == [False, True]
    with pytest.raises(AssertionError):
        assert_same(lambda svi_of: float(svi_of.keywords["compile"]))
