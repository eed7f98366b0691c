"""Two processes: averaged gradients, noise of their own, and parameters that come back."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import TensorDataset

import pyro_elbo as pe
from models.vae import VAEGuide, VAEModel
from pyro_elbo.errors import ArgumentError, DataError, NonFiniteError
from pyro_elbo.programs.rng import mix_seed
from tests.support.unprobed import _unprobed  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow


def test_two_processes_train_one_model(tmp_path):
    x = torch.distributions.Binomial(16, torch.linspace(0.1, 0.9, 12)).sample((64,))
    torch.manual_seed(0)
    model, guide = VAEModel(12, 2, 8), VAEGuide(12, 2, 8)
    before = [p.detach().clone() for p in model.parameters()]
    result = pe.fit(
        model, guide, x[:48], x[48:], max_epochs=3, batch_size=12, lr=1e-2, devices=2, dir=tmp_path, progress=False
    )
    assert result.history.sizes["epoch"] == 3
    assert not bool(result.history.elbo.isnull().any())
    assert bool(result.history.kl_per_dim.isel(epoch=-1).notnull().all())
    assert result.loss.step == 6  # 24 rows a process, batches of 12
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    saved = torch.load(result.last_path, weights_only=True)["state_dict"]
    assert all(torch.equal(saved[f"module.model.{n}"], p) for n, p in model.named_parameters())


def test_ranks_draw_their_own_noise_and_share_parameters(unprobed, tmp_path):
    """Each rank writes down its first draw and its parameter after training."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 8, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        if torch.distributed.is_initialized():
            rank = torch.distributed.get_rank()
            with open(tmp_path / f"rank{rank}", "a") as file:
                file.write(f"{(z - loc).item()} {loc.item()}\n")

    pe.fit(model, guide, torch.arange(8.0), batch_size=4, max_epochs=5, devices=2, lr=0.1, progress=False)
    lines = [(tmp_path / f"rank{rank}").read_text().splitlines() for rank in (0, 1)]
    rows = [[tuple(map(float, line.split())) for line in of_rank] for of_rank in lines]
    assert len(rows[0]) == len(rows[1]) == 5
    assert all(a[0] != b[0] for a, b in zip(*rows, strict=True))
    assert all(a[1] == b[1] for a, b in zip(*rows, strict=True))
    assert rows[0][-1][1] > 0.2
    assert pyro.param("loc") > rows[0][-1][1]


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
