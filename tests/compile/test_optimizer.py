"""Optimizers do in a compiled step what they do in Python, or are refused by name."""

import collections
import copy

import pyro
import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError
from tests.support.compiled import (  # noqa: F401  (fixtures work by name)
    X,
    _as_captured,
    _double,
    _graphs,
    adam,
    assert_same,
    changes,
    exact_or_refused,
    guide,
    model,
    network,
    network_guide,
    parameters,
    sampled,
    state_of,
)
from tests.support.rows import every_other, thorough

# --- optimizers --------------------------------------------------------------------------------------------------


def trains_alike(optimizer, schedule=None, steps=6, **options):
    """The steps of a torch optimizer leave the same losses, parameters and state, one by one and in a run."""

    def scenario(svi_of):
        net = network()
        opt = optimizer(net.parameters())
        svi = svi_of(model, network_guide(net), opt, sampled())
        scheduler = schedule and schedule(opt)
        losses = []
        for _ in range(steps):
            losses.append(svi.step(X))
            if scheduler:
                scheduler.step()
        midway = copy.deepcopy(state_of(opt))
        return losses, parameters(), midway, svi.run(3, X, progress=False), parameters(), state_of(opt)

    assert_same(scenario, **options)


TORCH_OPTIMIZERS = {
    "AdamW": lambda p: optim.AdamW(p, 0.05),
    "SGD": lambda p: optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "RMSprop": lambda p: optim.RMSprop(p, 0.05, momentum=0.9, centered=True),
    "Adam fused": lambda p: optim.Adam(p, 0.05, fused=True),
    "Adam foreach, maximize": lambda p: optim.Adam(p, 0.001, foreach=True, maximize=True),
    "Adam, rate as a tensor": lambda p: optim.Adam(p, torch.tensor(0.01)),
    "AdamW amsgrad": lambda p: optim.AdamW(p, 0.05, amsgrad=True, weight_decay=0.1),
    "SGD dampened": lambda p: optim.SGD(p, 0.05, momentum=0.9, dampening=0.2),
    "Adagrad": lambda p: optim.Adagrad(p, 0.05, lr_decay=0.1, weight_decay=0.1),
    "Adamax": lambda p: optim.Adamax(p, 0.05),
    "NAdam": lambda p: optim.NAdam(p, 0.05, weight_decay=0.1, decoupled_weight_decay=True),
    "Adadelta": lambda p: optim.Adadelta(p, 0.05),
    "Rprop": lambda p: optim.Rprop(p, 0.05),
    "groups": lambda p: optim.Adam([{"params": [q], "lr": 0.02 * i} for i, q in enumerate(p)], betas=(0.8, 0.9)),
}


class Comparing(optim.SGD):
    """Moves by the gradient where it is negative, and by 1 elsewhere."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * torch.where((p.grad - p.grad.abs()) != 0, p.grad, 1.0))


def test_an_optimizer_that_compares_with_zero(interpreted):
    trains_alike(lambda p: Comparing(p, 0.05))


@pytest.mark.slow
def test_machine_code_of_a_torch_optimizer():
    trains_alike(lambda p: optim.Adam(p, 0.05, amsgrad=True, weight_decay=0.1))


IN_WRAPPERS = ("Adagrad", "Adamax", "NAdam", "Adadelta", "Rprop")  # test_flat_state.py steps them under pyro.optim


@pytest.mark.parametrize(
    "name",
    [thorough(n) if n in IN_WRAPPERS else n for n in TORCH_OPTIMIZERS],
)
def test_torch_optimizers(interpreted, name):
    trains_alike(TORCH_OPTIMIZERS[name])


@pytest.mark.parametrize("clip", [0.01, 1000.0], ids=["clips", "does not clip"])
def test_grad_clip(interpreted, clip):
    trains_alike(lambda p: optim.SGD(p, 0.05), grad_clip=clip)


def adam_of(parameters):
    return optim.Adam(parameters, 0.05)


@pytest.mark.parametrize(
    ("make", "schedule"),
    [
        (adam_of, lambda o: lr_scheduler.ExponentialLR(o, 0.5)),
        (adam_of, lambda o: lr_scheduler.StepLR(o, 2)),
        (adam_of, lambda o: lr_scheduler.OneCycleLR(o, 0.1, 40, cycle_momentum=False)),
        (adam_of, lambda o: lr_scheduler.OneCycleLR(o, 0.1, 40)),
        (lambda p: optim.SGD(p, 0.05, 0.9, nesterov=True), lambda o: lr_scheduler.OneCycleLR(o, 0.1, 40)),
        (lambda p: optim.SGD(p, 0.05, 0.9), lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 4)),
    ],
    ids=["exponential", "step", "one cycle", "one cycle of betas", "one cycle of momentum", "cyclic"],
)
def test_torch_schedulers_cost_no_graph(interpreted, graphs, make, schedule):
    trains_alike(make, schedule, steps=12)
    assert len(graphs) == 1


def pyro_alike(optimizer, after=lambda o: None, steps=6, **options):
    """The steps of a Pyro optimizer leave the same losses, parameters and state."""

    def scenario(svi_of):
        opt = optimizer()
        svi = svi_of(model, guide, opt, sampled())
        losses = []
        for _ in range(steps):
            losses.append(svi.step(X))
            after(opt)
        inner = [o if isinstance(o, optim.Optimizer) else o.optimizer for o in opt.optim_objs.values()]
        rates = [g["lr"] for o in inner for g in o.param_groups]
        return losses, svi.run(3, X, progress=False), parameters(), rates, [state_of(o) for o in inner]

    assert_same(scenario, **options)


def lower_by_hand(opt):
    for inner in opt.optim_objs.values():
        inner.param_groups[0]["lr"] *= 0.9


ADAM = {"optimizer": optim.Adam, "optim_args": {"lr": 0.1}}
PYRO_OPTIMIZERS = {
    "options per parameter": lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if name == "loc" else 0.02}),
    "clip_norm": lambda: pyro.optim.SGD({"lr": 0.1}, {"clip_norm": 0.05}),
    "clip_value": lambda: pyro.optim.SGD({"lr": 0.1, "momentum": 0.9}, {"clip_value": 0.05}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.1, "centered_variance": True, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", PYRO_OPTIMIZERS)
def test_pyro_optimizers(interpreted, name):
    pyro_alike(PYRO_OPTIMIZERS[name])


def test_clipped_adam_with_decay(interpreted):
    pyro_alike(lambda: pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.9, "clip_norm": 0.3, "betas": (0.9, 0.95)}))


@pytest.mark.parametrize(
    ("optimizer", "after"),
    [
        (lambda: pyro.optim.ExponentialLR({**ADAM, "gamma": 0.5}), lambda o: o.step()),
        (lambda: pyro.optim.StepLR({**ADAM, "step_size": 2}), lambda o: o.step()),
        (lambda: pyro.optim.ReduceLROnPlateau({**ADAM, "patience": 0}), lambda o: o.step(1.0)),
        (adam, lower_by_hand),
    ],
    ids=["exponential", "step", "plateau", "by hand"],
)
def test_pyro_rates_change_without_a_graph(interpreted, graphs, optimizer, after):
    pyro_alike(optimizer, after)
    assert len(graphs) == 1


class CountsInGroup(optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] / group["count"])


class RebindsState(optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["mean"] = 0.9 * self.state[p].get("mean", 0.0) + p.grad
            p.sub_(self.state[p]["mean"], alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize(
    "optimizer",
    [CountsInGroup, RebindsState, optim.RAdam, optim.ASGD, optim.Adafactor],
    ids=lambda o: o.__name__,
)
def test_other_torch_optimizers_are_exact_or_refused_by_name(interpreted, optimizer):
    def scenario(svi_of):
        net = network()
        svi = svi_of(model, network_guide(net), optimizer(net.parameters(), lr=0.05), sampled())
        return [svi.step(X) for _ in range(8)], parameters()

    message = exact_or_refused(scenario)
    assert not message or optimizer.__name__ in message


@pytest.mark.parametrize("name", ["AdagradRMSProp", "DCTAdam"])
def test_other_pyro_optimizers_are_exact_or_refused_by_name(interpreted, name):
    def scenario(svi_of):
        svi = svi_of(model, guide, getattr(pyro.optim, name)({}), sampled())
        return [svi.step(X) for _ in range(6)], parameters()

    message = exact_or_refused(scenario)
    assert not message or name in message


def test_optimizer_hooks_act_or_are_refused(interpreted):
    def scenario(svi_of):
        net = network()
        opt = optim.SGD(net.parameters(), 0.05)
        opt.register_step_post_hook(lambda *_: [p.data.mul_(0.9) for p in net.parameters()] and None)
        svi = svi_of(model, network_guide(net), opt, sampled())
        return [svi.step(X) for _ in range(5)], parameters()

    message = exact_or_refused(scenario)
    assert not message or "hook" in message


def test_an_optimizer_without_the_parameters_is_refused():
    svi = pe.SVI(model, guide, optim.Adam([nn.Parameter(torch.ones(1))]), sampled(), compile=True)
    with pytest.raises(ArgumentError, match="'loc'"):
        svi.step(X)


# --- what changes in the middle of training ----------------------------------------------------------------------
def first_group(o):
    return o.param_groups[0]


OPTIMIZER_CHANGES = {
    "rate": lambda o: first_group(o).update(lr=0.5),
    "betas": lambda o: first_group(o).update(betas=(0.1, 0.2)),
    "decay": lambda o: first_group(o).update(weight_decay=0.5),
    "direction": lambda o: first_group(o).update(maximize=True),
    "state cleared": lambda o: o.state.clear(),
    "state assigned": lambda o: setattr(o, "state", collections.defaultdict(dict)),
    "state tensor": lambda o: [s.update(exp_avg=torch.ones_like(s["exp_avg"])) for s in o.state.values()],
    "count": lambda o: [s["step"].fill_(99.0) for s in o.state.values()],
    "groups assigned": lambda o: setattr(o, "param_groups", [{**first_group(o), "lr": 0.5}]),
    "group added": lambda o: o.add_param_group({"params": [first_group(o)["params"].pop()], "lr": 0.5}),
    "hook added": lambda o: o.register_step_post_hook(
        lambda o, *_: [p.data.mul_(0.9) for p in first_group(o)["params"]] and None
    ),
}


@pytest.mark.parametrize("name", every_other(OPTIMIZER_CHANGES))
def test_torch_optimizers_that_change(interpreted, name):
    def scenario(svi_of):
        net = network()
        opt = optim.Adam(net.parameters(), 0.05)
        svi = svi_of(model, network_guide(net), opt, sampled())
        losses = [svi.step(X) for _ in range(3)]
        OPTIMIZER_CHANGES[name](opt)
        return losses, [svi.step(X) for _ in range(4)], parameters(), state_of(opt)

    message = exact_or_refused(scenario)
    assert not message or name == "hook added"


def test_checkpoints_in_the_middle(interpreted):
    """Model, optimizer and objective are brought back: the same steps follow, with the same graphs or new ones."""

    def scenario(svi_of):
        net = network()
        opt = optim.Adam(net.parameters(), 0.05)
        svi = svi_of(model, network_guide(net), opt, sampled(pe.LinearWarmup(0.0, 1.0, 20)))
        losses = [svi.step(X) for _ in range(4)]
        saved = copy.deepcopy((net.state_dict(), opt.state_dict(), svi.loss.state_dict()))
        pyro.set_rng_seed(1)
        first = [svi.step(X) for _ in range(4)]
        net.load_state_dict(saved[0])
        opt.load_state_dict(saved[1])
        svi.loss.load_state_dict(saved[2])
        pyro.set_rng_seed(1)
        second = [svi.step(X) for _ in range(4)]
        assert second == pytest.approx(first, rel=1e-12)
        return losses, first, second, parameters(), state_of(opt), svi.loss.step

    assert_same(scenario)


def test_state_of_pyro_optimizers(interpreted, tmp_path):
    def scenario(svi_of):
        opt = adam()
        svi = svi_of(model, guide, opt, sampled())
        losses = [svi.step(X) for _ in range(3)]
        opt.save(tmp_path / "optimizer.pt")
        losses += [svi.step(X) for _ in range(3)]
        opt.load(tmp_path / "optimizer.pt")
        pyro.clear_param_store()
        losses += [svi.step(X) for _ in range(4)]
        return losses, parameters(), [state_of(o) for o in opt.optim_objs.values()], opt.get_state()["loc"]["state"]

    assert_same(scenario)
