"""What goes wrong: killed processes, damaged and foreign files, a full disk, Ctrl-C, numbers that are not finite."""

import errno
import os
import signal
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from lightning import Callback
from torch.utils.data import DataLoader, TensorDataset

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, CheckpointError, NonFiniteError, ProgramError
from tests.support.full_disk import filling_disk
from tests.support.killed import Programs, run

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
S = torch.arange(24) % 2


def fit(dir, data=None, programs=None, **options):
    pyro.clear_param_store()
    torch.manual_seed(0)
    programs = programs or Programs()
    settings = {"batch_size": 8, "max_epochs": 2, "progress": False} | options
    return pe.fit(programs.model, programs.guide, (X, S) if data is None else data, dir=dir, **settings)


@pytest.mark.slow
def test_a_killed_run_ends_bit_for_bit_like_one_that_was_not(tmp_path):
    """Buffers, optimizers, schedules, critics, early stopping and random streams (bench_kills.py: 50 kills)."""
    assert run(tmp_path / "whole", 8, save_every=2)
    for after in (0.5, 0.9, 1.3):
        run(tmp_path / "killed", 8, after, save_every=2)
    assert run(tmp_path / "killed", 8, save_every=2)
    checksums = [(tmp_path / name / "checksum").read_text() for name in ("whole", "killed")]
    assert checksums[0] == checksums[1]


class Stop(Callback):
    def __init__(self, epoch=1):
        self.epoch = epoch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, 4):
            raise KeyError("stop")


def by_step(optimizer):
    return {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}


def shuffled():
    return DataLoader(TensorDataset(X, S), 4, shuffle=True)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (None, {}),
        (shuffled, {"scheduler": by_step}),
        (None, {"accumulate_grad_batches": 2, "save_every": 1}),
        pytest.param(None, {"batch_size": 2, "devices": 2}, marks=pytest.mark.slow),
    ],
    ids=["rows", "loader", "accumulated", "processes"],
)
def test_a_run_continues_within_an_epoch(tmp_path, data, options):
    """Six batches an epoch; the run stops before the fifth of the second one, with the third or the fourth saved."""
    made = (lambda: None) if data is None else data
    options = {"valid": (X, S), "save_every": 3, "max_epochs": 3, "batch_size": 4} | options
    expected = fit(tmp_path / "whole", made(), **options)
    with pytest.raises(Exception, match="stop"):
        fit(tmp_path / "run", made(), callbacks=Stop(), **options)
    left = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert (left["epoch"], left["global_step"]) == (1, 5 if options["save_every"] == 1 else 9)
    found = fit(tmp_path / "run", made(), resume=True, **options)
    assert found.history.equals(expected.history)
    states = [r._trained.state_dict() for r in (found, expected)]
    assert all(torch.equal(x, states[1][n]) for n, x in states[0].items() if torch.is_tensor(x))
    with pytest.raises(CheckpointError, match=r"save_every: expected \d, got None"):
        fit(tmp_path / "run", made(), resume=True, **options | {"save_every": None, "max_epochs": 4})


def test_a_run_continues_within_its_first_epoch(tmp_path):
    """Its checkpoint holds no epoch yet."""
    options = {"valid": (X, S), "save_every": 3, "max_epochs": 2, "batch_size": 4}
    expected = fit(tmp_path / "whole", **options)
    with pytest.raises(Exception, match="stop"):
        fit(tmp_path / "run", callbacks=Stop(0), **options)
    found = fit(tmp_path / "run", resume=True, **options)
    assert found.history.equals(expected.history)


def test_checkpoints_within_an_epoch_that_cannot_be(tmp_path):
    for place, options, words in (
        (None, {"save_every": 2}, "save_every needs dir"),
        (tmp_path, {"save_every": 0}, "save_every.*whole number >= 1"),
        (tmp_path, {"save_every": 2, "lr": "auto"}, "lr='auto' continues at the end"),
        (tmp_path, {"save_every": 2, "data": shuffled(), "devices": 2}, "processes cannot share a DataLoader"),
    ):
        with pytest.raises(ArgumentError, match=words):
            fit(place, **options)


def test_a_run_that_has_ended_is_given_back(tmp_path):
    """A process may be killed between the last checkpoint and its result."""
    options = {"valid": (X, S), "max_epochs": 9, "patience": 1, "lr": 1.0}
    first = fit(tmp_path, **options)
    again = fit(tmp_path, resume=True, **options)
    assert first.stopped_early
    assert again.stopped_early
    assert again.history.equals(first.history)
    assert all(
        torch.equal(x, again._trained.state_dict()[n])
        for n, x in first._trained.state_dict().items()
        if torch.is_tensor(x)
    )


def test_another_run_is_not_resumed(tmp_path):
    fit(tmp_path, valid=(X[:8], S[:8]))
    changed = X.clone()
    changed[3, 1] += 1
    for options, words in (
        ({"seed": 7}, "seed: expected 0, got 7"),
        ({"batch_size": 6}, "batch_size: expected 8, got 6"),
        ({"data": (changed, S)}, r"train: expected 24 rows with checksum \w+, got 24 rows"),
        ({"data": (X[1:], S[1:])}, "train: expected 24 rows .* got 23 rows"),
        ({"valid": (X[:9], S[:9])}, "valid: expected 8 rows"),
        ({"valid": None}, "valid: .* got no data"),
    ):
        with pytest.raises(CheckpointError, match=f"last.ckpt belongs to another run. {words}"):
            fit(tmp_path, resume=True, max_epochs=3, **{"valid": (X[:8], S[:8])} | options)


class Jump(pe.Schedule):
    settled = 1

    def __init__(self, height):
        self.height = height

    def __call__(self, step):
        return self.height


def charged(weight):
    return pe.MutualInformation("z", attribute=lambda x, s: s, weight=weight)


def adam(lr):
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        ({"loss": pe.TraceBeta_ELBO(beta=50.0)}, {}, "loss.beta: expected 50, got 1"),
        ({}, {"loss": pe.TraceIW_ELBO(kl="sampled")}, "loss: expected TraceBeta_ELBO, got TraceIW_ELBO"),
        (
            {"loss": pe.TraceBeta_ELBO(beta={"z": pe.LinearWarmup(0.0, 1.0, steps=4)})},
            {"loss": pe.TraceBeta_ELBO(beta={"z": pe.LinearWarmup(0.0, 1.0, steps=3)})},
            r"loss.beta: expected {'z': LinearWarmup\(start=0, end=1, steps=4\)}, got .*steps=3",
        ),
        (
            {"loss": pe.TraceBeta_ELBO(beta=Jump(2.0))},
            {"loss": pe.TraceBeta_ELBO(beta=Jump(3.0))},
            r"loss.beta: expected Jump\(height=2\), got Jump\(height=3\)",
        ),
        (
            {"loss": pe.TraceBeta_ELBO(beta=torch.tensor([1.0, 2.0] * 4))},
            {"loss": pe.TraceBeta_ELBO(beta=torch.tensor([2.0, 1.0] * 4))},
            r"loss.beta: expected tensor of shape \(8,\) with checksum",
        ),
        (
            {"loss": pe.TraceBeta_ELBO(penalties=[charged(1.0)])},
            {"loss": pe.TraceBeta_ELBO(penalties=[charged(2.0)])},
            r"loss.penalties: expected \[MutualInformation\(.*weight=1, .*got .*weight=2, ",
        ),
        ({"loss": pe.TraceBeta_ELBO(free_bits=0.5)}, {}, "loss.free_bits: expected 0.5, got 0"),
        ({"grad_clip": 1.0}, {"grad_clip": None}, "grad_clip: expected 1, got None"),
        ({"lr": 0.01}, {"lr": 0.02}, "lr: expected 0.01, got 0.02"),
        ({"optimizer": adam(0.01)}, {"optimizer": adam(0.02)}, r"optimizer: expected Adam\({'lr': 0.01, .*got .*0.02"),
        ({}, {"scheduler": by_step}, "scheduler: expected None, got ExponentialLR"),
    ],
)
def test_a_run_is_not_resumed_under_another_objective_or_optimizer(tmp_path, first, then, words):
    fit(tmp_path, max_epochs=2, **first)
    with pytest.raises(CheckpointError, match=f"last.ckpt belongs to another run. {words}"):
        fit(tmp_path, resume=True, max_epochs=3, **then)


def test_equal_objectives_resume(tmp_path):
    def loss(whole):
        return pe.TraceBeta_ELBO(beta={"z": Jump(whole(2))}, penalties=[charged(whole(1))])

    fit(tmp_path, loss=loss(int), lr=1)
    found = fit(tmp_path, loss=loss(float), lr=1.0, resume=True, max_epochs=3, callbacks=[])
    assert found.history.sizes["epoch"] == 3


def test_a_torn_checkpoint_names_the_one_before(tmp_path):
    expected = fit(tmp_path / "whole", max_epochs=3)
    fit(tmp_path / "run")
    last = tmp_path / "run" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"last.ckpt is damaged.*continues from .*previous.ckpt"):
        fit(tmp_path / "run", resume=True, max_epochs=3)
    last.unlink()
    found = fit(tmp_path / "run", resume=True, max_epochs=3)
    assert found.history.equals(expected.history)
    foreign = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)
    torch.save({"state_dict": foreign["state_dict"]}, last)
    with pytest.raises(CheckpointError, match=r"last.ckpt is no checkpoint of pe.fit: it lacks.*previous.ckpt"):
        fit(tmp_path / "run", resume=True, max_epochs=4)


class Fill(Callback):
    def __init__(self, fill):
        self.fill = fill

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.fill()


def test_a_full_disk_leaves_the_checkpoint_that_there_was(tmp_path):
    with (
        filling_disk() as fill,
        pytest.raises(CheckpointError, match=r"ckpt cannot be written: .*too large.*unchanged"),
    ):
        fit(tmp_path, callbacks=Fill(fill))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 0
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert fit(tmp_path, resume=True).history.equals(fit(tmp_path / "whole").history)


def test_a_full_disk_at_the_end_leaves_the_checkpoint(tmp_path, monkeypatch):
    def full(self, path, **options):
        raise OSError(errno.ENOSPC, f"no room for {path}")

    with monkeypatch.context() as patch:
        patch.setattr(xarray.Dataset, "to_netcdf", full)
        with pytest.raises(CheckpointError, match="history.nc cannot be written: No space left on device. Choose"):
            fit(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    (tmp_path / ".history.nc.x1").touch()  # of a process that was killed
    fit(tmp_path, resume=True)
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "history.nc", "last.ckpt", "previous.ckpt"]


class PressCtrlC(Callback):
    def __init__(self, times=1):
        self.times = times

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


def test_ctrl_c_ends_training_with_a_result(tmp_path):
    usual = signal.getsignal(signal.SIGINT)
    result = fit(tmp_path, callbacks=PressCtrlC(), max_epochs=4)
    assert (result.history.sizes["epoch"], result.loss.step, result.stopped_early) == (2, 5, True)
    assert signal.getsignal(signal.SIGINT) is usual
    resumed = fit(tmp_path, resume=True, max_epochs=4)
    assert resumed.history.equals(fit(None, max_epochs=4).history)
    with pytest.raises(KeyboardInterrupt):
        fit(None, callbacks=PressCtrlC(times=2))
    assert signal.getsignal(signal.SIGINT) is usual


class Kill(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, trainer.global_rank) == (1, 1):
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_and_the_run_continues(tmp_path):
    options = {"devices": 2, "batch_size": 4}
    with pytest.raises(ProgramError, match="process 1 terminated with signal SIGKILL.*|Another process of this run"):
        fit(tmp_path / "run", callbacks=Kill(), **options)
    found = fit(tmp_path / "run", resume=True, **options)
    assert found.history.equals(fit(tmp_path / "whole", **options).history)


def test_training_in_a_thread_leaves_signals_alone():
    found = []
    thread = threading.Thread(target=lambda: found.append(fit(None, max_epochs=1)))
    thread.start()
    thread.join()
    assert found[0].history.sizes["epoch"] == 1


def test_a_number_that_is_not_finite_names_site_batch_and_checkpoint(tmp_path):
    """The eleventh run of the model yields NaN: three batches an epoch, and one run before training."""
    runs = []

    class Sick(Programs):
        def model(self, x, s):
            runs.append(len(x))
            sick = self.training and len(runs) > 8
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                loc = self.decode(z) * (float("nan") if sick else 1.0)
                pyro.sample("x", dist.Normal(loc, 0.5, validate_args=False).to_event(1), obs=x)

    with pytest.raises(NonFiniteError) as error:
        fit(tmp_path, programs=Sick(), max_epochs=5)
    assert "Site 'x'" in str(error.value)
    assert "This was batch 1 of epoch 2." in str(error.value)
    assert f"after 7 steps; {tmp_path / 'last.ckpt'} holds those of epoch 1" in str(error.value)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 1
