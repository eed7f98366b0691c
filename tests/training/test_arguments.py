"""Wrong arguments of fit and SVI: refused at once, with what was expected, what came, and the cure."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, CheckpointError, DataError
from tests.support.fitted import guide, model
from tests.support.untyped import _untyped  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("untyped")

X = torch.linspace(-1.0, 2.0, 33)


def fit(**options):
    settings = {"model": model, "guide": guide, "train": X, "max_epochs": 1, "progress": False}
    return pe.fit(**settings | options)


WRONG = {
    "loss class": ({"loss": pe.TraceBeta_ELBO}, r"got the class TraceBeta_ELBO. Make one: pe.TraceBeta_ELBO\(\)"),
    "Pyro's loss": ({"loss": pyro.infer.Trace_ELBO()}, "must be an objective of this library.*got Trace_ELBO"),
    "guide class": (
        {"guide": AutoNormal},
        r"got the class AutoNormal. Make one: AutoNormal\(model",
    ),
    "model class": ({"model": nn.Linear}, r"model must be a program, got the class Linear"),
    "no forward": ({"model": nn.ModuleList()}, r"model must be a program.*forward, got ModuleList"),
    "no program": ({"guide": 3}, "guide must be a program.*got int"),
    "optimizer instance": ({"optimizer": torch.optim.Adam([torch.zeros(1)])}, r"got a Adam instance.*lambda params"),
    "optimizer that fails": (
        {"optimizer": lambda p: torch.optim.Adam(p, lr=-1.0)},
        "optimizer fails on the parameters: Invalid learning rate: -1.0",
    ),
    "optimizer name": ({"optimizer": "adam"}, "must be a function.*'adam'"),
    "max_epochs": ({"max_epochs": 2.5}, "max_epochs, unless it is None, must be a whole number >= 1, got 2.5"),
    "lr": ({"lr": "1e-3"}, r"lr must be a finite number >= 0, or .auto., got .1e-3. \(str\)"),
    "negative lr": ({"lr": -1.0}, "lr must be a finite number >= 0, got -1"),
    "batch_size": (
        {"batch_size": "auto"},
        r"batch_size, unless it is None, must be a whole.* >= 1, got 'auto' \(str\)",
    ),
    "grad_clip": ({"grad_clip": -1}, "grad_clip must be a finite number > 0, got -1"),
    "grad_clip 0": ({"grad_clip": 0.0}, "grad_clip must be a finite number > 0, got 0.0. Leave it out"),
    "patience 0": ({"patience": 0, "valid": X}, "patience, unless it is None, must be a whole number >= 1, got 0"),
    "patience -1": ({"patience": -1, "valid": X}, "patience, unless it is None, must be a whole number >= 1, got -1"),
    "devices": ({"devices": True}, "devices must be a whole number"),
    "seed": ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
    "dir": ({"dir": 3}, r"dir must be a path, got 3\."),
    "overwrite": ({"overwrite": True}, "overwrite=True needs dir"),
    "both": ({"overwrite": True, "resume": True, "dir": "a"}, "resume=True continues.*overwrite=True deletes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_fit_refuses(name):
    options, match = WRONG[name]
    with pytest.raises(ArgumentError, match=match):
        fit(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss": pe.TraceBeta_ELBO}, "got the class TraceBeta_ELBO"),
        ({"guide": AutoNormal}, "got the class AutoNormal"),
        ({"optim": torch.optim.Adam}, "got the class Adam"),
        ({"optim": pyro.optim.Adam}, "optim must be a pyro.optim or a torch.optim optimizer"),
        ({"grad_clip": "1"}, "grad_clip must be a finite number > 0, got '1'"),
    ],
)
def test_svi_refuses(options, match):
    settings = {"model": model, "guide": guide, "optim": pyro.optim.Adam({"lr": 0.1}), "loss": pe.TraceBeta_ELBO()}
    with pytest.raises(ArgumentError, match=match):
        pe.SVI(**settings | options)


def test_the_number_of_steps_is_whole():
    svi = pe.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pe.TraceBeta_ELBO())
    for steps in (0, 2.5):
        with pytest.raises(ArgumentError, match=f"num_steps must be a whole number >= 1, got {steps}"):
            svi.run(steps, X, progress=False)


def test_a_folder_keeps_its_run_unless_told_otherwise(tmp_path):
    fit(dir=tmp_path, seed=1)
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(CheckpointError, match=r"already holds a run \(best.ckpt, last.ckpt, history.nc\).*overwrite"):
        fit(dir=tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == before
    fit(dir=tmp_path, resume=True, max_epochs=2, seed=1)
    assert fit(dir=tmp_path, overwrite=True).history.sizes["epoch"] == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    fit(dir=tmp_path / "other")


def test_batch_norm_of_a_single_row():
    net = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))

    def amortized(x):
        pyro.module("net", net)
        with pyro.plate("n", len(x)):
            loc, scale = net(x[:, None]).unbind(-1)
            pyro.sample("z", dist.Normal(loc, scale.exp()))

    with pytest.raises(DataError, match=r"batch norm.*one row.*batch_size"):
        fit(guide=amortized, batch_size=16)
