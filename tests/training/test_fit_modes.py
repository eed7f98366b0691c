"""Training runs in train mode, validation in eval mode; checkpoints hold the buffers of every module in use."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

import pyro_elbo as pe
from tests.support.compiled import _double, _interpreted  # noqa: F401  (fixtures)
from tests.support.unprobed import _unprobed  # noqa: F401  (a fixture)

X = torch.linspace(-2.0, 3.0, 96, dtype=torch.float64).reshape(32, 3).sin() * 3 + 2
QUIET = {"batch_size": 16, "lr": 0.01, "progress": False}


class VAE(nn.Module):
    """Batch norm counts the batches that it sees in train mode; the log holds mode, rows and gradients of each run."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.log = []
        self.enc = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4))
        self.dec = nn.Linear(2, 3)

    def model(self, x):
        pyro.module("vae", self)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.dec(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        if self.log is not None:
            self.log.append((self.training, self.enc[2].training, len(x), torch.is_grad_enabled()))
        pyro.module("vae", self)
        self.encode(x)

    def encode(self, x):
        with pyro.plate("n", len(x)):
            loc, log_scale = self.enc(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    @property
    def seen(self):
        return int(self.enc[1].num_batches_tracked)


class Parts:
    """An object that is no module; it registers two modules under names of their own."""

    def __init__(self, vae):
        self.vae = vae

    def model(self, x):
        pyro.module("dec", self.vae.dec)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.vae.dec(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("enc", self.vae.enc)
        self.vae.encode(x)


class Guide(PyroModule):
    def __init__(self, vae):
        super().__init__()
        self.enc = PyroModule[nn.Sequential](*vae.enc)

    forward = VAE.encode


KINDS = {
    "methods": lambda v: (v.model, v.guide),
    "functions": lambda v: (lambda x: v.model(x), lambda x: v.guide(x)),
    "partials": lambda v: (partial(VAE.model, v), partial(VAE.guide, v)),
    "an object's methods": lambda v: (Parts(v).model, Parts(v).guide),
    "module": lambda v: (v.model, Guide(v)),
}


@pytest.mark.parametrize("valid", [None, X[:7]], ids=["without validation", "with validation"])
@pytest.mark.parametrize("kind", KINDS)
def test_batch_norm_counts_the_training_batches_alone(unprobed, kind, valid):
    vae = VAE()
    pe.fit(*KINDS[kind](vae), X, valid, max_epochs=3, **QUIET)
    assert vae.seen == 6
    assert vae.enc[1].training
    trained = [mode for *modes, rows, grad in vae.log if rows == 16 and grad for mode in modes]
    held = [mode for *modes, rows, _ in vae.log if rows == 7 for mode in modes]
    assert all(trained)
    assert not any(held)
    if kind in ("methods", "functions", "partials"):
        assert len(trained) == 12
        assert len(held) == (0 if valid is None else 6)


@pytest.mark.parametrize("kind", ["methods", "functions"])
def test_compiled_training_switches_modes_alike(kind, interpreted):
    runs = []
    for compile in (False, True):
        pyro.clear_param_store()
        vae = VAE()
        vae.log = None  # a captured step sets nothing in Python
        history = pe.fit(*KINDS[kind](vae), X, X[:7], max_epochs=3, compile=compile, **QUIET).history
        assert vae.seen == 6
        runs.append((vae.enc[1].running_mean.clone(), torch.tensor(history.elbo.values)))
    torch.testing.assert_close(*runs)


def test_modes_after_training_are_those_before():
    vae = VAE()
    vae.eval()
    vae.enc.train()
    before = {name: part.training for name, part in vae.named_modules()}
    pe.fit(vae.model, vae.guide, X, X[:7], max_epochs=2, **QUIET)
    assert vae.seen == 4
    assert {name: part.training for name, part in vae.named_modules()} == before


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_training_ends_with_the_same_statistics(kind, tmp_path):
    def fit(epochs, **more):
        pyro.clear_param_store()
        vae = VAE()
        pe.fit(*KINDS[kind](vae), X, X[:7], max_epochs=epochs, **QUIET, **more)
        return vae.state_dict()

    whole = fit(4)
    fit(2, dir=tmp_path)
    torch.testing.assert_close(fit(4, dir=tmp_path, resume=True), whole, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["methods", "functions"])
def test_the_best_epoch_comes_back_with_its_statistics(kind, tmp_path):
    """Gradient ascent: the first epoch is the best, two epochs of two batches follow."""
    vae = VAE()
    worse = {"optimizer": lambda params: torch.optim.SGD(params, lr=1e-3, maximize=True)}
    result = pe.fit(*KINDS[kind](vae), X, X[:7], max_epochs=9, patience=2, dir=tmp_path, **worse, **QUIET)
    assert result.best_epoch == 0
    assert result.history.sizes["epoch"] == 3
    assert vae.seen == 2


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", ["methods", "functions"])
def test_evaluate_loss_runs_in_eval_mode(kind, compile, interpreted):
    vae = VAE()
    vae.log = None
    programs = KINDS[kind](vae)
    svi = pe.SVI(*programs, pyro.optim.Adam({"lr": 0.01}), pe.TraceBeta_ELBO(), compile=compile, fallback_random=True)
    for step in range(4):  # recorded, captured, run as a graph
        svi.step(X)
        vae.eval()
        pyro.set_rng_seed(step)
        expected = pe.TraceBeta_ELBO().terms(*programs, X).objective.item()
        vae.train()
        pyro.set_rng_seed(step)
        assert svi.evaluate_loss(X) == pytest.approx(-expected, rel=1e-9)
        assert vae.seen == step + 1
        assert all(part.training for part in vae.modules())
