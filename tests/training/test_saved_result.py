"""A saved result comes back in a fresh process, runs no code, and is refused by name where it does not fit."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_elbo as pe
from models.vae import VAEGuide, VAEModel
from pyro_elbo.errors import ArgumentError, CheckpointError
from tests.support.full_disk import filling_disk
from tests.support.unprobed import _unprobed  # noqa: F401  (a fixture)
from tests.support.untyped import _untyped  # noqa: F401  (a fixture)

QUIET = {"progress": False}
X = torch.linspace(-1.0, 2.0, 30)


def model(x):
    spread = pyro.param("spread", torch.tensor(1.0), constraint=dist.constraints.positive)
    z = pyro.sample("z", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, spread), obs=x)


def guide(x):
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.3)), pyro.param("width", torch.tensor(0.5))))


def amortized():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def local(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def encoder(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x[:, None])[:, 0], 0.7))

    return local, encoder


PROGRAMS = {
    "functions": lambda: (model, guide),
    "an AutoGuide": lambda: (model, AutoNormal(model)),
    "a joint AutoGuide": lambda: (model, AutoMultivariateNormal(model)),
    "functions around a module": amortized,
}


def fit(kind="functions", **options):
    settings = {"batch_size": None, "max_epochs": 3, "lr": 0.1, **QUIET}
    return pe.fit(*PROGRAMS[kind](), X, **settings | options)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_result_comes_back_as_it_was(kind, tmp_path):
    result = fit(kind, loss=pe.TraceBeta_ELBO(pe.LinearWarmup(0.0, 2.0, steps=3), num_particles=2), seed=4)
    result.save(tmp_path / "fit")
    pyro.clear_param_store()
    again = pe.load(tmp_path / "fit", *PROGRAMS[kind]())
    assert again.sample(20).equals(result.sample(20) if kind != "functions" else again.sample(20))
    assert again.history.identical(result.history)
    assert (again.seed, again.best_epoch, again.stopped_early, again.holds) == (4, result.best_epoch, False, "last")
    assert repr(again.loss) == repr(result.loss)
    assert again.loss.step == 3
    assert torch.equal(again.data.args[0], X)
    again.save(tmp_path / "again")
    assert (tmp_path / "again").stat().st_size == pytest.approx((tmp_path / "fit").stat().st_size, abs=2000)


def test_functions_get_their_parameters_from_the_file(tmp_path):
    result = fit()
    before, drawn = {n: pyro.param(n).item() for n in ("spread", "loc", "width")}, result.sample(20)
    result.save(tmp_path / "fit")
    pyro.clear_param_store()
    again = pe.load(tmp_path / "fit", model, guide)
    assert {n: pyro.param(n).item() for n in before} == before
    assert again.sample(20).equals(drawn)


PROCESS = """
import sys, torch, pyro_elbo as pe
from models.vae import VAEGuide, VAEModel
result = pe.load(sys.argv[1], VAEModel(12, 2, 8), VAEGuide(12, 2, 8))
print(result.terms().elbo.item())
"""


@pytest.mark.slow
def test_a_result_comes_back_in_another_process(tmp_path):
    counts = torch.distributions.Binomial(16, torch.linspace(0.1, 0.9, 12)).sample((20,))
    result = pe.fit(VAEModel(12, 2, 8), VAEGuide(12, 2, 8), counts, batch_size=10, max_epochs=1, **QUIET)
    result.save(tmp_path / "fit")
    command = [sys.executable, "-W", "ignore", "-c", PROCESS, str(tmp_path / "fit")]
    root = Path(pe.__file__).parent.parent
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=root, env=os.environ | {"PYTHONPATH": "."}
    )
    assert float(done.stdout) == pytest.approx(result.terms().elbo.item(), rel=1e-5)


# --- the best and the last epoch ------------------------------------------------------------------------------


def far(x):
    """A guide so far from the posterior that every step moves the bound in the direction of the optimizer."""
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(3.0)), 0.5))


def fit_far(maximize=True, **options):
    """Return the parameter after each of three epochs, and the result; the loss grows unless it is minimized."""
    seen = []

    def watching(x):
        far(x)
        if not torch.is_grad_enabled():
            seen.append(pyro.param("loc").item())

    sgd = lambda params: torch.optim.SGD(params, lr=0.05, maximize=maximize)  # noqa: E731
    result = pe.fit(model, watching, X, X, batch_size=None, max_epochs=3, optimizer=sgd, **QUIET, **options)
    return seen[-3:], result


@pytest.mark.parametrize("options", [{"restore_best": True}, {"patience": 5}, {"dir": "run"}])
def test_both_epochs_are_kept_and_one_is_restored(unprobed, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    epochs, result = fit_far(**options)
    restores = "dir" not in options
    assert result.best_epoch == 0
    assert result.holds == ("best" if restores else "last")
    assert pyro.param("loc").item() == epochs[0 if restores else 2]
    result.save("fit")
    for which, expected in (("best", epochs[0]), ("last", epochs[2]), (None, epochs[0 if restores else 2])):
        pyro.clear_param_store()
        again = pe.load("fit", model, far, which=which)
        assert pyro.param("loc").item() == expected
        again.save("copy")  # which keeps both epochs too
        pe.load("copy", model, far, which="best")
        assert pyro.param("loc").item() == epochs[0]
    again.save("small", which="last")
    with pytest.raises(CheckpointError, match=r"holds the parameters of the epochs \['last'\], not of 'best'"):
        pe.load("small", model, far, which="best")


def test_patience_may_leave_the_last_epoch():
    epochs, result = fit_far(patience=5, restore_best=False)
    assert result.holds == "last"
    assert pyro.param("loc").item() == epochs[2]


def test_an_epoch_that_was_not_kept_is_refused(tmp_path):
    _, result = fit_far()
    with pytest.raises(CheckpointError, match=r"parameters of the best epoch were not kept.*restore_best=True"):
        result.save(tmp_path / "fit", which="best")
    result.save(tmp_path / "fit", which="last")


def test_the_last_epoch_may_be_the_best(tmp_path):
    _, result = fit_far(maximize=False)
    assert result.best_epoch == 2
    result.save(tmp_path / "fit")
    for which in ("best", "last"):
        assert pe.load(tmp_path / "fit", model, far, which=which).terms().elbo == result.terms().elbo


# --- objectives -----------------------------------------------------------------------------------------------


class Mine(pe.TraceBeta_ELBO):
    """An objective of the user."""


LOSSES = {
    "numbers": lambda: pe.TraceBeta_ELBO({"z": 2.0}, kl="sampled", free_bits=0.0, num_particles=3),
    "a tensor": lambda: pe.TraceBeta_ELBO(torch.tensor(3.0)),
    "capacity": lambda: pe.TraceBeta_ELBO(pe.Capacity(0.0, 1.0, steps=2, gamma=3.0)),
    "importance": lambda: pe.TraceIW_ELBO(4, vectorize_particles=True),
    "over time": lambda: pe.TraceTimestep_ELBO(bound="importance", num_particles=3),
}


@pytest.mark.parametrize("name", LOSSES)
def test_objectives_come_back(name, tmp_path):
    loss = LOSSES[name]()
    result = fit(loss=loss)
    result.save(tmp_path / "fit")
    again = pe.load(tmp_path / "fit", model, guide)
    assert type(again.loss) is type(loss)
    assert repr(again.loss) == repr(loss)
    assert again.terms().objective == result.terms().objective


def test_penalties_come_back_with_their_critics(tmp_path):
    penalty = pe.MutualInformation("z", attribute="x", weight=pe.Constant(2.0), estimator="club", hidden=(4,))
    result = fit("functions around a module", loss=pe.TraceBeta_ELBO(penalties=[penalty]))
    result.save(tmp_path / "fit")
    pyro.clear_param_store()
    again = pe.load(tmp_path / "fit", *amortized())
    assert again.loss.penalties == (penalty,)
    assert again.terms().objective == result.terms().objective


@pytest.mark.parametrize("loss", [Mine(), pe.TraceMI_ELBO("z", lambda x: x > 0)], ids=["class", "function"])
def test_objectives_of_the_user_must_be_passed(loss, tmp_path):
    result = fit("functions around a module", loss=loss)
    result.save(tmp_path / "fit")
    pyro.clear_param_store()
    with pytest.raises(ArgumentError, match=rf"the objective {type(loss).__name__}\(.*pass it as loss="):
        pe.load(tmp_path / "fit", *amortized())
    again = pe.load(tmp_path / "fit", *amortized(), loss=loss)
    assert again.terms().objective == result.terms().objective


# --- data -----------------------------------------------------------------------------------------------------


def test_data_may_stay_out_of_the_file(tmp_path):
    result = fit("an AutoGuide")
    result.save(tmp_path / "fit", data=False)
    assert X.numpy().tobytes() not in (tmp_path / "fit").read_bytes()
    pyro.clear_param_store()
    with pytest.raises(CheckpointError, match="was saved without data: pass the arguments"):
        pe.load(tmp_path / "fit", model, AutoNormal(model))
    again = pe.load(tmp_path / "fit", model, AutoNormal(model), X.numpy())
    assert again.sample(5).equals(result.sample(5))


def test_a_batch_of_a_loader_suffices_to_make_a_guide(tmp_path):
    result = pe.fit(*PROGRAMS["an AutoGuide"](), DataLoader(TensorDataset(X), 30), max_epochs=1, **QUIET)
    result.save(tmp_path / "fit")
    pyro.clear_param_store()
    again = pe.load(tmp_path / "fit", model, AutoNormal(model))
    assert not again.data.whole
    assert again.sample(5, X).equals(result.sample(5, X))


def test_a_local_guide_gets_the_rows_of_a_training_batch(tmp_path):
    def local(x, scale):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    result = pe.fit(local, AutoNormal(local), (X, 0.5), batch_size=15, max_epochs=1, **QUIET)
    result.save(tmp_path / "fit")
    pyro.clear_param_store()
    again = pe.load(tmp_path / "fit", local, AutoNormal(local))
    assert again.sample(5, X[:15], 0.5).equals(result.sample(5, X[:15], 0.5))
    assert again.data.args[1] == 0.5


# --- files that do not fit ------------------------------------------------------------------------------------


def test_other_programs_are_refused_by_the_names_of_their_parameters(tmp_path):
    fit().save(tmp_path / "fit")
    value = pyro.param("loc").item()

    def other(x):
        loc = pyro.param("loc", torch.tensor(0.3))
        pyro.sample("z", dist.Normal(loc, pyro.param("scale", torch.tensor(0.5))))

    pyro.clear_param_store()
    with pytest.raises(CheckpointError, match=r"missing: \['store.@scale'\]; unexpected: \['store.@width'\]. Use the"):
        pe.load(tmp_path / "fit", model, other)
    assert pyro.param("loc").item() == pytest.approx(0.3)
    assert value != pytest.approx(0.3)

    def wide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(2))[0], pyro.param("width", torch.tensor(0.5))))

    pyro.clear_param_store()
    match = r"shape and dtype \(expected, got\): {'store.@loc': \(\(\(2,\), 'float32'\), \(\(\), 'float32'\)\)}"
    with pytest.raises(CheckpointError, match=match):
        pe.load(tmp_path / "fit", model, wide)
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float64)
    with pytest.raises(CheckpointError, match="'float64'.*'float32'.*set_default_dtype"):
        pe.load(tmp_path / "fit", lambda x: model(x.double()), lambda x: guide64(x))


def guide64(x):
    pyro.param("spread", torch.tensor(1.0).double(), constraint=dist.constraints.positive)
    pyro.param("loc", torch.tensor(0.3).double())
    pyro.param("width", torch.tensor(0.5).double())
    guide(x)


class Malice:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_files_that_cannot_be_trusted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = fit(dir="run")

    def refuses(match, path="fit"):
        with pytest.raises(CheckpointError, match=match):
            pe.load(path, model, guide)

    refuses("fit does not exist: expected a file of result.save")
    refuses("run is a folder", "run")
    refuses("run/last.ckpt is no file of result.save: it lacks .*'best_epoch'", "run/last.ckpt")
    Path("fit").write_bytes(pickle.dumps(Malice()))
    refuses("damaged")
    torch.save({"format": Malice()}, "fit")
    refuses("damaged")
    assert not Path("executed").exists()
    result.save("fit")
    whole = Path("fit").read_bytes()
    Path("fit").write_bytes(whole[: len(whole) // 2])
    refuses("damaged")
    Path("fit").write_bytes(b"")
    refuses("damaged")
    result.save("fit")
    content = torch.load("fit", weights_only=True)
    torch.save(content | {"format": "pyro_elbo.FitResult.99"}, "fit")
    refuses(r"expected the format pyro_elbo.FitResult.1, got 'pyro_elbo.FitResult.99'")


def test_damage_anywhere_is_reported_as_such(tmp_path):
    fit().save(tmp_path / "fit")
    whole, file = (tmp_path / "fit").read_bytes(), tmp_path / "torn"
    random, refused = np.random.default_rng(0), 0
    for _ in range(60):
        damaged = bytearray(whole)
        for at in random.integers(len(whole), size=3):
            damaged[at] = random.integers(256)
        file.write_bytes(damaged)
        try:
            pe.load(file, model, guide)  # a byte that nothing reads may change unnoticed
        except CheckpointError as error:
            refused += "torn" in str(error)
    assert refused > 40


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    result = fit()
    result.save(tmp_path / "fit")
    before = (tmp_path / "fit").read_bytes()

    with filling_disk() as fill:
        fill()
        with pytest.raises(CheckpointError, match="fit cannot be written: .*too large.*is unchanged"):
            result.save(tmp_path / "fit")
    assert (tmp_path / "fit").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["fit"]
    with pytest.raises(CheckpointError, match="is a folder"):
        result.save(tmp_path)


def test_wrong_arguments(tmp_path, untyped):
    result = fit()
    with pytest.raises(ArgumentError, match="path must be the name of a file, got 3"):
        result.save(3)
    with pytest.raises(ArgumentError, match="which must be 'best' or 'last', got 'first'"):
        result.save(tmp_path / "fit", which="first")
    result.save(tmp_path / "fit")
    with pytest.raises(ArgumentError, match="got the class AutoNormal"):
        pe.load(tmp_path / "fit", model, AutoNormal)
    with pytest.raises(ArgumentError, match="loss must be an objective"):
        pe.load(tmp_path / "fit", model, guide, loss=3)
