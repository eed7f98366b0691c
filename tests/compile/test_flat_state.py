"""Small parameters are updated as one, equal scalars computed as one: nothing that Python sees changes by it."""

import copy
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal
from torch import nn, optim

import pyro_elbo as pe
from pyro_elbo.compile.flat_state import flatten
from tests.support.compiled import (  # noqa: F401  (fixtures work by name)
    X,
    _double,
    _graphs,
    _interpreted,
    adam,
    assert_same,
    model,
    network,
    network_guide,
    parameters,
    sampled,
    state_of,
    train,
)
from tests.support.rows import every_other

aten = torch.ops.aten


def guide(x):
    """Six parameters of seven elements, of several shapes."""
    locs = [pyro.param(f"loc_{i}", torch.full((i,), 0.1) if i else torch.tensor(0.3)) for i in range(3)]
    more = [pyro.param(f"more_{i}", torch.tensor(0.1 * i)) for i in range(2)]
    scale = pyro.param("scale", torch.tensor([[0.5]]), constraint=constraints.positive)
    pyro.sample("z", dist.Normal(sum(p.sum() for p in locs + more), scale.squeeze()))


FLAT = torch.Size([7])


def inner(wrapper):
    return [o if isinstance(o, optim.Optimizer) else o.optimizer for o in wrapper.optim_objs.values()]


def flat_tensors(graph):
    """How many tensors of all parameters a graph takes, as inputs or in the vectors of small ones."""
    vectors = [n for n in graph.module.graph.nodes if n.op == "placeholder"][: len(graph.packs)]
    parts = [n.args[2:4] for vector in vectors for n in vector.users if n.target is aten.slice.Tensor]
    inputs = graph.fakes[len(graph.packs) : graph.externals]
    return sum(stop - start == FLAT.numel() for start, stop in parts) + sum(x.shape == FLAT for x in inputs)


def trains_alike(optimizer, between=lambda opt: None, program=guide, **options):
    """Losses, parameters and state are those of an uncompiled run, before and after something in between."""

    def scenario(svi_of):
        opt = optimizer()
        svi = svi_of(model, program, opt, sampled())
        losses = train(svi, 4, X)
        between(opt)
        return losses, train(svi, 4, X), svi.run(3, X, progress=False), parameters(), list(map(state_of, inner(opt)))

    assert_same(scenario, **options)


OPTIMIZERS = {
    "Adam": (lambda: pyro.optim.Adam({"lr": 0.05, "amsgrad": True, "weight_decay": 0.1}), 3),
    "AdamW, clipped": (lambda: pyro.optim.AdamW({"lr": 0.05}, {"clip_norm": 0.05}), 2),
    "SGD": (lambda: pyro.optim.SGD({"lr": 0.05}), 0),
    "SGD, momentum": (lambda: pyro.optim.SGD({"lr": 0.05, "momentum": 0.9, "nesterov": True}), 1),
    "RMSprop": (lambda: pyro.optim.RMSprop({"lr": 0.05, "momentum": 0.9, "centered": True}), 3),
    "Adagrad": (lambda: pyro.optim.Adagrad({"lr": 0.05, "lr_decay": 0.1}), 1),
    "Adamax": (lambda: pyro.optim.Adamax({"lr": 0.05}), 2),
    "NAdam": (lambda: pyro.optim.PyroOptim(optim.NAdam, {"lr": 0.05}), 2),
    "Adadelta": (lambda: pyro.optim.Adadelta({"lr": 0.05}), 2),
    "Rprop": (lambda: pyro.optim.Rprop({"lr": 0.05}), 2),
    "ClippedAdam": (lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9, "clip_norm": 0.1}), 2),
}


@pytest.mark.parametrize("name", every_other(OPTIMIZERS))
def test_many_parameters_are_updated_as_one(interpreted, graphs, name):
    optimizer, tensors = OPTIMIZERS[name]
    trains_alike(optimizer)
    assert [flat_tensors(graph) for graph in graphs] == [tensors]


@pytest.mark.slow
def test_flat_updates_compiled():
    trains_alike(lambda: pyro.optim.Adam({"lr": 0.05, "weight_decay": 0.1}), grad_clip=0.5)


def test_rates_per_parameter(interpreted, graphs):
    trains_alike(lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if name.startswith("loc") else 0.02}))
    assert len(graphs) == 1
    assert flat_tensors(graphs[0]) == 0


def test_a_parameter_of_two_names(interpreted):
    """It is stepped once, as by pyro.infer.SVI."""
    net = network()

    def program(x):
        pyro.module("net", net)
        pyro.module("again", net)
        pyro.sample("z", dist.Normal(net(x[:1, None]).squeeze(), 0.5))

    def scenario(svi_of):
        for p in net.parameters():
            torch.nn.init.constant_(p, 0.3)
        svi = svi_of(model, program, adam(0.05), sampled())
        return train(svi, 5, X), parameters()

    assert_same(scenario)


def test_groups_of_one_optimizer(interpreted):
    def scenario(svi_of):
        net = network()
        groups = [{"params": [p], "weight_decay": 0.1 * (i % 2)} for i, p in enumerate(net.parameters())]
        opt = optim.AdamW(groups, 0.05)
        svi = svi_of(model, network_guide(net), opt, sampled(), grad_clip=0.2)
        return train(svi, 6, X), parameters(), state_of(opt)

    assert_same(scenario)


# --- what Python does in between ---------------------------------------------------------------------------------
def load_own_state(opt):
    for o in inner(opt):
        o.load_state_dict(copy.deepcopy(o.state_dict()))


def change_one(key, value):
    def change(opt):
        first = inner(opt)[0]
        first.param_groups[0][key] = value

    return change


def change_one_count(opt):
    next(iter(inner(opt)[1].state.values()))["step"].add_(5)


def replace_one_tensor(opt):
    state = next(iter(inner(opt)[1].state.values()))
    state["exp_avg"] = state["exp_avg"] + 0.1


def change_one_tensor(opt):
    next(iter(inner(opt)[1].state.values()))["exp_avg"].mul_(0.5)


CHANGES = {
    "state loaded": load_own_state,
    "one rate": change_one("lr", 0.01),
    "one decay": change_one("weight_decay", 0.3),
    "one count": change_one_count,
    "one tensor replaced": replace_one_tensor,
    "one tensor in place": change_one_tensor,
    "state of one cleared": lambda opt: inner(opt)[2].state.clear(),
}


@pytest.mark.parametrize("name", every_other(CHANGES))
def test_changes_to_some_of_the_flat_state(interpreted, name):
    trains_alike(adam, CHANGES[name])


def test_one_count_of_clipped_adam(interpreted):
    def change(opt):
        next(iter(inner(opt)[1].state.values()))["step"] += 5

    trains_alike(lambda: pyro.optim.ClippedAdam({"lr": 0.05}), change)


def test_steps_in_python_in_between(interpreted, graphs):
    def scenario(svi_of):
        opt = adam()
        svi, plain = svi_of(model, guide, opt, sampled()), pyro.infer.SVI(model, guide, opt, sampled())
        losses = train(svi, 3, X) + train(plain, 2, X) + train(svi, 3, X)
        return losses, parameters(), list(map(state_of, inner(opt)))

    assert_same(scenario)
    assert len(graphs) == 1


def test_two_objectives_share_an_optimizer(interpreted, graphs):
    def scenario(svi_of):
        opt = adam()
        first, second = svi_of(model, guide, opt, sampled()), svi_of(model, guide, opt, sampled(4.0))
        losses = [svi.step(X) for _ in range(6) for svi in (first, second)]
        return losses, parameters(), list(map(state_of, inner(opt)))

    assert_same(scenario)
    assert len(graphs) == 2


def test_a_batch_of_another_shape_that_uses_fewer_parameters(interpreted, graphs):
    def some(x):
        names = ["a", "b", "c", "d"][: len(x)]
        shift = sum(pyro.param(name, torch.tensor(0.1 * i)) for i, name in enumerate(names))
        pyro.sample("z", dist.Normal(shift, 0.5))

    def scenario(svi_of):
        opt = adam()
        svi = svi_of(model, some, opt, sampled())
        losses = [svi.step(x) for _ in range(5) for x in (X[:2], X, X[:3])]
        return losses, parameters(), list(map(state_of, inner(opt)))

    assert_same(scenario)
    assert len(graphs) == 3


def test_a_parameter_without_a_gradient(interpreted):
    def scenario(svi_of):
        net = nn.ModuleDict({"used": network(), "idle": nn.Linear(1, 1)})
        opt = optim.Adam(net.parameters(), 0.05)

        def program(x):
            pyro.module("net", net)
            pyro.sample("z", dist.Normal(net["used"](x[:1, None]).squeeze(), 0.5))

        svi = svi_of(model, program, opt, sampled())
        return train(svi, 6, X), parameters(), state_of(opt)

    assert_same(scenario)


@pytest.fixture(name="trained")
def _trained():
    """An optimizer that has taken a step."""
    pyro.clear_param_store()
    opt = adam()
    pe.SVI(model, guide, opt, sampled(), compile=True).step(X)
    return opt


def test_flat_state_saves_and_copies_as_any_other(trained):
    state = trained.get_state()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    for other in (copy.deepcopy(state), torch.load(file)):
        torch.testing.assert_close(other, state, rtol=0, atol=0)
    assert file.getbuffer().nbytes < 50_000  # shared memory is written once


def test_flattening_again_moves_nothing(trained):
    optimizers = inner(trained)
    before = [id(x) for o in optimizers for s in o.state.values() for x in s.values()]
    (flat,) = flatten(optimizers)
    assert len(flat.parameters) == len(optimizers) == 6
    assert [id(x) for o in optimizers for s in o.state.values() for x in s.values()] == before


# --- equal operators on scalars ----------------------------------------------------------------------------------
def many(x):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    weights = [pyro.sample(f"w_{i}", dist.Normal(0.1 * i, scale)) for i in range(6)]
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.stack(weights).sum(), 1.0), obs=x)


def by_hand(x):
    pyro.sample("scale", dist.LogNormal(pyro.param("s", torch.tensor(0.1)), 0.5))
    for i in reversed(range(6)):
        loc = pyro.param(f"loc_{i}", torch.tensor(0.1 * i))
        pyro.sample(f"w_{i}", dist.Normal(loc, pyro.param(f"sd_{i}", torch.tensor(0.3 + i)).exp()))


@pytest.mark.parametrize("guide_of", [lambda model: by_hand, AutoNormal], ids=["by hand", "AutoNormal"])
def test_equal_sites_are_computed_as_one(interpreted, graphs, guide_of):
    def scenario(svi_of):
        svi = svi_of(many, guide_of(many), pyro.optim.Adam({"lr": 0.05}, {"clip_norm": 0.5}), sampled())
        return train(svi, 4, X), svi.run(3, X, progress=False), parameters()

    assert_same(scenario)
    assert sum(n.target is aten.log.default for n in graphs[0].module.graph.nodes) < 6


def sites(count):
    def program(x):
        mean, scale = pyro.sample("mean", dist.Normal(0.0, 1.0)), pyro.sample("scale", dist.HalfNormal(1.0))
        weights = [pyro.sample(f"w_{i}", dist.Normal(mean, scale)) for i in range(count)]
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.stack(weights).sum(), 1.0), obs=x)

    return program


def test_the_graph_does_not_grow_with_equal_sites(interpreted, graphs):
    """Neither in the sums over sites, nor in their parameters, whose means and scales alternate."""
    for count in (12, 30):
        pyro.clear_param_store()
        train(pe.SVI(sites(count), AutoNormal(sites(count)), adam(), pe.TraceBeta_ELBO(), compile=True), 2, X)
    small, large = (list(graph.module.graph.nodes) for graph in graphs)
    assert len(large) == len(small)


def test_tensors_in_vectors_stay_those_of_the_store(interpreted):
    """A parameter whose memory is replaced between steps, one of several dimensions, and one that no step trains."""

    def program(x):
        loc, scales = pyro.param("loc", torch.tensor(0.1)), pyro.param("scales", torch.full((2, 3), 0.2))
        fixed = pyro.param("fixed", torch.ones(2).requires_grad_(False))
        pyro.sample("z", dist.Normal(loc + fixed.sum(), scales.exp().sum()))

    def scenario(svi_of):
        svi = svi_of(model, program, adam(), sampled())
        losses = train(svi, 3, X)
        loc = pyro.get_param_store().get_param("loc").unconstrained()
        loc.data = torch.tensor(0.7)
        return losses, train(svi, 3, X), svi.run(3, X, progress=False), parameters()

    assert_same(scenario)


@pytest.mark.slow
def test_equal_sites_compiled():
    def scenario(svi_of):
        svi = svi_of(many, by_hand, adam(0.05), sampled())
        return train(svi, 4, X), svi.run(3, X, progress=False), parameters()

    assert_same(scenario)


def test_scalars_written_in_place_and_drawn_in_order(interpreted):
    """Neither a scalar that is changed later nor the stream of draws is moved."""

    def program(x):
        locs = [pyro.param(f"loc_{i}", torch.tensor(0.1 * i)) for i in range(6)]
        changed = [loc * 2 for loc in locs]
        before = [y + 1 for y in changed]
        copies = [y.sum() for y in changed]
        with torch.no_grad():
            for y in changed:
                y.mul_(3)
        flips = [dist.Bernoulli(torch.sigmoid(y.detach())).sample() for y in before]
        pyro.sample("z", dist.Normal(sum(changed) + sum(flips) + sum(before) + 2 * sum(copies), 0.5))

    def scenario(svi_of):
        svi = svi_of(model, program, adam(), sampled())
        return train(svi, 4, X), parameters()

    assert_same(scenario)
