"""Two processes: averaged gradients, noise of their own, shares of the rows, and parameters that come back."""

import math
import os
import subprocess
import sys
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning import Callback
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyro_elbo as pe
from models.vae import VAEGuide, VAEModel
from pyro_elbo.errors import ArgumentError, DataError, NonFiniteError
from pyro_elbo.programs.rng import mix_seed
from pyro_elbo.ranks import group_of_one
from pyro_elbo.training.options import Steps
from pyro_elbo.training.rows import Shares
from tests.support.hosts import ADDRESSES, on_two_hosts
from tests.support.unprobed import _unprobed  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow


class Remember(Callback):
    """Leaves what each process has seen, and where it ends."""

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 0:
            self.seen.append(batch)

    def on_train_end(self, trainer, pl_module):
        state = {name: x for name, x in pl_module.state_dict().items() if isinstance(x, torch.Tensor)}
        objective = pl_module.module.elbo.state_dict()
        torch.save({"state": state, "objective": objective, "seen": self.seen}, self.folder / f"{trainer.global_rank}")


def test_two_processes_train_one_model(tmp_path):
    """For 200 steps with a schedule, a critic and parts of different size: parameters stay equal bit for bit."""
    x = torch.distributions.Binomial(16, torch.linspace(0.1, 0.9, 12)).sample((413,))
    x[:, 0] = torch.arange(413) % 17
    torch.manual_seed(0)
    model, guide = VAEModel(12, 2, 8), VAEGuide(12, 2, 8)
    before = [p.detach().clone() for p in model.parameters()]
    critic = pe.MutualInformation("z", lambda x: x[:, 0] % 2, 2.0, "club", levels=2)
    loss = pe.TraceBeta_ELBO(pe.LinearWarmup(0.0, 1.0, steps=100), penalties=[critic])
    options = {"max_epochs": 8, "max_steps": 200, "batch_size": 8, "lr": 1e-2, "progress": False}
    result = pe.fit(
        model, guide, x, x[:21], loss=loss, devices=2, dir=tmp_path / "run", callbacks=Remember(tmp_path), **options
    )
    first, second = (torch.load(tmp_path / rank, weights_only=True) for rank in "01")
    assert all(torch.equal(a, second["state"][name]) for name, a in first["state"].items())
    (one,), (other,) = (tuple(at["objective"]["critics"].values()) for at in (first, second))
    assert all(torch.equal(a, other["critic"][name]) for name, a in one["critic"].items())
    assert (first["objective"]["step"], second["objective"]["step"], result.loss.step) == (200, 200, 200)
    assert [[len(batch) for batch in at["seen"]] for at in (first, second)] == [[8] * 25 + [7], [8] * 25 + [6]]
    rows = torch.cat([*first["seen"], *second["seen"]])
    assert torch.equal(rows.unique(dim=0, return_counts=True)[1], x.unique(dim=0, return_counts=True)[1])

    assert result.history.sizes["epoch"] == 8
    assert not bool(result.history.elbo.isnull().any())
    assert bool(result.history.kl_per_dim.isel(epoch=-1).notnull().all())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(first["state"][f"module.model.{n}"], p) for n, p in model.named_parameters())


class Gradients(Callback):
    def __init__(self, path):
        self.path, self.found = path, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found.append(pyro.param("loc").grad.item())

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(torch.tensor(self.found), self.path)


def test_noise_of_their_own_halves_the_variance_of_the_gradient(unprobed, tmp_path):
    """The gradient z - x + loc / N of equal rows has the variance of z ~ N(loc, 1): 1 in one process, 1/2 in two."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 1600, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    options = {"batch_size": 4, "max_epochs": 2, "devices": 2, "optimizer": still, "progress": False}
    pe.fit(model, guide, torch.full((1600,), 2.0), callbacks=Gradients(tmp_path / "found"), **options)
    found = torch.load(tmp_path / "found", weights_only=True).double()
    assert len(found) == 400
    assert abs(found.mean() + 2.0) < 5 * math.sqrt(0.5 / 400)
    assert abs(found.var() - 0.5) < 5 * 0.5 * math.sqrt(2 / 400)  # 5 standard errors


def still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def test_processes_that_share_the_data_are_checked_as_such():
    """A process takes half of the steps, and sees half of the rows even where batch_size=None."""
    x = torch.arange(8.0)

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    with pytest.raises(DataError, match=r"Site 'z'.*2 minibatches of 8.*devices=1"):
        pe.fit(model, guide, x, batch_size=None, devices=2, progress=False)
    loss = pe.TraceBeta_ELBO(pe.LinearWarmup(0.0, 1.0, steps=4))
    with pytest.raises(ArgumentError, match=r"4 optimization steps.*1 steps a process end at step 3"):
        pe.fit(model, guide, x, loss=loss, batch_size=4, max_epochs=3, devices=2, progress=False)


def test_an_error_inside_a_process_keeps_its_type():
    x = torch.zeros(8, 12)
    x[-1, 3] = float("nan")
    torch.manual_seed(0)
    programs = VAEModel(12, 2, 8), VAEGuide(12, 2, 8)
    with pytest.raises(NonFiniteError, match="1 of 12 values are not finite"):
        pe.fit(*programs, TensorDataset(x), batch_size=1, devices=2, max_epochs=1, progress=False)


def test_streams_differ_by_seed_epoch_and_rank():
    seeds = {mix_seed(seed, epoch, rank) for seed in range(3) for epoch in range(3) for rank in range(3)}
    assert len(seeds) == 27


@pytest.mark.parametrize(("rows", "size", "world"), [(41, 8, 2), (17, 8, 2), (16, 8, 2), (100, 7, 3), (5, 8, 4)])
def test_processes_share_the_rows_of_an_epoch(rows, size, world):
    """Each row once, as many batches for each, and the rows of one process with batches ``world`` times as large."""
    parts = [list(Shares(rows, size, True, 3, rank, world)) for rank in range(world)]
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(rows))
    assert len({len(part) for part in parts}) == 1
    whole = list(Shares(rows, size * world, True, 3))
    for k in range(len(parts[0]) - 1):
        assert set(whole[k]) == {i for part in parts for i in part[k]}


class Held(Callback):
    """Leaves the number of the optimizer's moments that each process holds."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        state = getattr(optimizer, "optim", optimizer).state  # of the part, where there are parts
        held = sum(s["exp_avg"].numel() for s in state.values())
        torch.save(torch.tensor(held), self.folder / f"{trainer.global_rank}")


def test_a_sharded_optimizer_trains_as_a_whole_one(unprobed, tmp_path):
    """Each process holds half of Adam's moments, and the run goes on from its checkpoint."""

    def fit(make, **options):
        pyro.clear_param_store()
        torch.manual_seed(0)
        x = torch.arange(240.0).reshape(20, 12) % 17
        options = {"max_epochs": 3, "devices": 2, "batch_size": 5, "progress": False} | options
        return pe.fit(VAEModel(12, 2, 8), VAEGuide(12, 2, 8), x, optimizer=make, callbacks=Held(tmp_path), **options)

    def sharded(parameters):
        return ZeroRedundancyOptimizer(parameters, torch.optim.Adam, lr=0.01)

    expected = fit(partial(torch.optim.Adam, lr=0.01))
    whole = [torch.load(tmp_path / rank).item() for rank in "01"]
    fit(sharded, max_epochs=2, dir=tmp_path / "run")
    found = fit(sharded, dir=tmp_path / "run", resume=True)
    held = [torch.load(tmp_path / rank).item() for rank in "01"]
    assert sum(held) == whole[0] == whole[1]
    assert max(held) < 0.75 * whole[0]
    assert found.history.equals(expected.history)
    trained = zip(found.guide.parameters(), expected.guide.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in trained)
    with pytest.raises(ArgumentError, match=r"needs several processes.*devices=2"):
        fit(sharded, devices=1)


def test_sharded_parameters_are_refused():
    with group_of_one():
        mesh = init_device_mesh("cpu", (1,))
        part = torch.nn.Parameter(distribute_tensor(torch.zeros(3), mesh, [Shard(0)]))
    with pytest.raises(ArgumentError, match=r"'w'.* are sharded .*ZeroRedundancyOptimizer"):
        Steps(0.01, None, None, None, 1, None, False).make({"w": part})


class Stream(IterableDataset):
    def __len__(self):
        return 8

    def __iter__(self):
        return iter(torch.arange(8.0))


def test_data_that_processes_cannot_share():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    options = {"devices": 2, "progress": False}
    with pytest.raises(DataError, match="1 rows for 2 processes"):
        pe.fit(model, lambda x: None, torch.zeros(1), **options)
    for data in (Stream(), DataLoader(Stream(), 4)):
        with pytest.raises(DataError, match=r"IterableDataset gives every one of 2 processes the same rows.*np.memmap"):
            pe.fit(model, lambda x: None, data, **options)
    with pytest.raises(ArgumentError, match=r"num_nodes=3.*torchrun --nnodes=3 --nproc-per-node=2"):
        pe.fit(model, lambda x: None, torch.zeros(8), num_nodes=3, **options)


SCRIPT = """
import os, sys, torch, pyro_elbo as pe
from models.vae import VAEGuide, VAEModel

torch.manual_seed(int(os.environ["RANK"]))  # the programs differ until training begins
x = torch.arange(240.0).reshape(20, 12) % 17
model, guide = VAEModel(12, 2, 8), VAEGuide(12, 2, 8)
options = {"batch_size": 4, "lr": 0.05, "dir": sys.argv[1] + "/run", "progress": False}
try:
    pe.fit(model, guide, x, **options)
except ValueError as error:
    refused = str(error)
local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
result = pe.fit(model, guide, x, x[:7], devices=local, num_nodes=world // local, max_epochs=4, patience=2, **options)
rank = torch.distributed.get_rank()
state = {name: p.detach() for name, p in guide.named_parameters()}
found = {"state": state, "refused": refused, "elbo": result.history.elbo.values.tolist()}
torch.save(found, f"{sys.argv[1]}/{rank}")
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A script that torchrun starts, and its argument."""
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return [str(script), str(tmp_path)]


def test_processes_that_torchrun_has_started(script, tmp_path):
    """Each runs the whole script: they end with one set of parameters, and with the same history."""
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", *script]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    check_alike(tmp_path, "torchrun has started 2 processes on each of 1 nodes")


def test_two_hosts(script, tmp_path):
    """The first one holds the files, which the second one sees here, as on a shared disk."""
    command = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    on_two_hosts([*command, f"--rdzv-endpoint={ADDRESSES[0]}:29400"], script)
    check_alike(tmp_path, "torchrun has started 1 processes on each of 2 nodes")


def check_alike(tmp_path, refused):
    first, second = (torch.load(tmp_path / rank, weights_only=True) for rank in "01")
    assert refused in first["refused"]
    assert all(torch.equal(x, second["state"][name]) for name, x in first["state"].items())
    assert first["elbo"] == second["elbo"]
    assert {"best.ckpt", "last.ckpt", "history.nc"} <= {file.name for file in (tmp_path / "run").iterdir()}
