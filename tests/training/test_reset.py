"""`SVI.reset`: the second fit is the first one again, compiled or not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError

X = torch.tensor([0.8, 1.2, 1.0])


def model(x):
    z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("z", dist.LogNormal(pyro.param("loc", torch.tensor(0.0)), scale))


def fitted(svi, x, steps=20):
    svi.reset()
    pyro.set_rng_seed(1)
    return svi.run(steps, x, progress=False)


@pytest.mark.parametrize("make", [lambda: guide, lambda: AutoNormal(model)], ids=["store", "AutoNormal"])
@pytest.mark.parametrize("kind", ["Adam", "SGD", "ClippedAdam"])
def test_a_fit_after_reset_repeats_the_first_one(make, kind):
    options = {"lr": 0.002, "momentum": 0.9} if kind == "SGD" else {"lr": 0.05}
    beta = pe.LinearWarmup(0.0, 1.0, steps=10)
    programs = make()
    programs(X)  # an AutoGuide draws its initial values now
    svi = pe.SVI(model, programs, getattr(pyro.optim, kind)(options), pe.TraceBeta_ELBO(beta=beta))
    first = fitted(svi, X)
    fitted(svi, X + 3)
    assert svi.loss.step == 20
    assert torch.equal(fitted(svi, X), first)


@pytest.mark.slow
def test_compiled_steps_begin_again_after_the_store_was_cleared():
    svi = pe.SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), pe.TraceBeta_ELBO(), compile=True)
    fitted(svi, X)
    first = fitted(svi, X)  # all steps by the graph
    for _ in range(12):  # more often than graphs may be made anew
        pyro.clear_param_store()
        assert torch.equal(fitted(svi, X), first)
    assert len(svi._steps._known) == 1
    assert sum(map(len, svi._steps._known.values())) == 1


def test_reset_before_the_first_step_does_nothing():
    svi = pe.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pe.TraceBeta_ELBO())
    svi.reset()
    assert not list(pyro.get_param_store().keys())


def test_optimizers_that_do_not_start_from_zero_are_refused():
    for optim in (pyro.optim.Adagrad({"lr": 0.1}), pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.9})):
        pyro.clear_param_store()
        svi = pe.SVI(model, guide, optim, pe.TraceBeta_ELBO())
        svi.step(X)
        with pytest.raises(ArgumentError, match="not known how"):
            svi.reset()


def test_trained_critics_are_refused():
    with pytest.warns(UserWarning, match="lower bound"):
        penalty = pe.MutualInformation("z", attribute=lambda x, s: s, weight=1.0, estimator="adversarial")

    def local(x, s):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def local_guide(x, s):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)) + x, 1.0))

    loss = pe.TraceBeta_ELBO(penalties=[penalty])
    svi = pe.SVI(local, local_guide, pyro.optim.Adam({"lr": 0.05}), loss)
    svi.step(X, torch.tensor([0, 1, 0]))
    with pytest.raises(ArgumentError, match="critics"):
        svi.reset()
