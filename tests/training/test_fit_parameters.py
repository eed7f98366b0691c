"""Every parameter is trained once or refused, and no step follows a gradient that is not finite."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, NonFiniteError
from tests.support.compiled import _double, _interpreted  # noqa: F401  (fixtures)

QUIET = {"progress": False}


class Groups(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.full((20 - 5 * index,), 3.0)


def model(x):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    loc = pyro.param(f"loc_{len(x)}", torch.tensor(0.0))
    with pyro.plate("n", len(x)):
        pyro.sample("z", dist.Normal(loc, 1.0))


@pytest.mark.parametrize("compile", [False, True])
def test_a_parameter_of_a_later_batch_is_refused(compile, interpreted):
    loader = DataLoader(Groups(), batch_size=None)
    with pytest.raises(ArgumentError, match=r"\['loc_15'\].*would never train them"):
        pe.fit(model, guide, loader, max_epochs=5, compile=compile, **QUIET)


def test_an_optimizer_that_leaves_parameters_out_is_refused():
    def two(x):
        with pyro.plate("n", len(x)):
            loc, scale = pyro.param("loc", torch.tensor(0.0)), pyro.param("scale", torch.tensor(1.0))
            pyro.sample("z", dist.Normal(loc, scale))

    with pytest.raises(ArgumentError, match=r"does not hold the parameters \['scale'\].*requires_grad_\(False\)"):
        pe.fit(model, two, torch.ones(5), optimizer=lambda params: torch.optim.SGD(params[:1], 0.1), **QUIET)
    net = nn.Linear(1, 2)

    def amortized(x):
        pyro.module("net", net)
        with pyro.plate("n", len(x)):
            loc, scale = net(x[:, None]).unbind(-1)
            pyro.sample("z", dist.Normal(loc, scale.exp()))

    with pytest.raises(ArgumentError, match="bias"):
        pe.fit(model, amortized, torch.ones(5), optimizer=lambda params: torch.optim.SGD(params[:1], 0.1), **QUIET)


@pytest.mark.parametrize("compile", [False, True])
def test_a_module_that_is_not_registered_is_refused_unless_it_is_frozen(compile, interpreted):
    known, unknown = nn.Linear(1, 2), nn.Linear(1, 1)

    def half_registered(x):
        pyro.module("known", known)
        with pyro.plate("n", len(x)):
            loc, scale = known(unknown(x[:, None])).unbind(-1)
            pyro.sample("z", dist.Normal(loc, scale.exp()))

    x = torch.ones(5)
    with pytest.raises(ArgumentError, match=r"\['Linear.weight', 'Linear.bias'\].*pyro.module.*requires_grad_"):
        pe.fit(model, half_registered, x, max_epochs=1, compile=compile, **QUIET)
    unknown.requires_grad_(False).zero_grad()
    before = unknown.weight.clone(), known.weight.clone()
    pe.fit(model, half_registered, x, max_epochs=2, compile=compile, **QUIET)
    assert torch.equal(unknown.weight, before[0])
    assert not torch.equal(known.weight, before[1])


def tied(weight=0.5):
    """One weight under two names in Pyro's store."""
    a, b = (nn.Linear(1, 1, bias=False) for _ in range(2))
    nn.init.constant_(a.weight, weight)
    b.weight = a.weight

    def tied_guide(x):
        pyro.module("a", a)
        pyro.module("b", b)
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.Normal(b(a(x[:, None]))[:, 0], 0.5))

    return tied_guide, a.weight


@pytest.mark.parametrize("compile", [False, True])
def test_one_parameter_under_two_names_moves_and_clips_once(compile, interpreted):
    """A step of SGD whose gradient is clipped to norm 0.1 moves the parameter by 0.1 · lr."""
    tied_guide, weight = tied()
    sgd = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.5), "grad_clip": 0.1}
    pe.fit(model, tied_guide, torch.tensor([3.0, 2.0, 4.0]), max_epochs=2, compile=compile, **sgd, **QUIET)
    assert abs(weight.item() - 0.5) == pytest.approx(2 * 0.05, rel=1e-5)


def root_guide(x):
    """The gradient of √(p²) at 0 is 0 / 0."""
    loc = pyro.param("loc", torch.tensor(0.0)).square().sqrt()
    with pyro.plate("n", len(x)):
        pyro.sample("z", dist.Normal(loc + pyro.param("shift", torch.tensor(1.0)), 1.0))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_changes_nothing(clip):
    x = torch.ones(5)
    match = r"gradient is not finite for 'loc' \(1 of 1 values.*before this step"
    with pytest.raises(NonFiniteError, match=match):
        pe.fit(model, root_guide, x, max_epochs=1, grad_clip=clip, **QUIET)
    assert (pyro.param("loc").item(), pyro.param("shift").item()) == (0.0, 1.0)
    for kind in ("pe.SVI", "pe.SVI with torch.optim", "pyro.infer.SVI"):
        pyro.clear_param_store()
        root_guide(x)
        leaves = [p for _, p in pyro.get_param_store().named_parameters()]
        optim = torch.optim.Adam(leaves, lr=0.1) if "torch" in kind else pyro.optim.Adam({"lr": 0.1})
        make, options = (pyro.infer.SVI, {}) if kind == "pyro.infer.SVI" else (pe.SVI, {"grad_clip": clip})
        svi = make(model, root_guide, optim, loss := pe.TraceBeta_ELBO(), **options)
        with pytest.raises(NonFiniteError, match=match):
            svi.step(x)
        assert (pyro.param("loc").item(), pyro.param("shift").item()) == (0.0, 1.0)
        assert all(p.grad is None or not p.grad.any() for p in leaves)
        with torch.no_grad():
            pyro.param("loc").unconstrained().fill_(0.5)
        svi.step(x)
        assert pyro.param("shift").item() != 1.0
        assert loss.step == 1
