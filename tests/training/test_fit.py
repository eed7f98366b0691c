"""pe.fit: history, early stopping, checkpoints, exact resume, seeds, and errors before anything is lost."""

import pickle
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from pyro.infer import autoguide
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyro_elbo as pe
from models.linear_gaussian import LinearGuide, simulate
from models.vae import VAEGuide, VAEModel
from pyro_elbo.errors import ArgumentError, CheckpointError, DataError, GuideError, NonFiniteError
from pyro_elbo.training.checkpoint import load_checkpoint

QUIET = {"progress": False}
with torch.random.fork_rng():
    torch.manual_seed(0)
    COUNTS = torch.distributions.Binomial(16, torch.linspace(0.1, 0.9, 12)).sample((60,))


def programs():
    torch.manual_seed(0)
    return VAEModel(12, 2, 8), VAEGuide(12, 2, 8)


def weights(*modules):
    return [p.detach().clone() for m in modules for p in m.parameters()]


def function_model(x):
    spread = pyro.param("spread", torch.tensor(1.0), constraint=dist.constraints.positive)
    z = pyro.sample("z", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, spread), obs=x)


def function_guide(x):
    loc = pyro.param("loc", torch.tensor(0.0))
    pyro.sample("z", dist.Normal(loc, pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)))


def test_history_holds_every_epoch_and_split():
    model, guide = programs()
    beta = pe.LinearWarmup(0.0, 1.0, steps=8)
    result = pe.fit(
        model, guide, COUNTS[:40], COUNTS[40:], loss=pe.TraceBeta_ELBO(beta), max_epochs=3, batch_size=16, **QUIET
    )
    history = result.history
    assert dict(history.sizes) == {"epoch": 3, "split": 2, "latent": 1, "unit": 2, "side": 2}
    assert not any(bool(v.isel(epoch=-1).isnull().any()) for v in history.data_vars.values())
    assert not bool(history[["elbo", "loss", "rate", "distortion", "kl", "beta"]].isnull().to_array().any())
    xarray.testing.assert_allclose(history.elbo, -history.distortion - history.rate, rtol=1e-5)
    xarray.testing.assert_allclose(history.rate, history.kl.sum("latent"), rtol=1e-5)
    assert history.beta.values[:, 0].tolist() == [3 / 8, 6 / 8, 1.0]
    assert result.loss.step == 9
    assert history.elbo.sel(split="valid")[-1] > history.elbo.sel(split="valid")[0]


def test_validation_uses_the_same_noise_every_epoch():
    model, guide = programs()
    frozen = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}
    result = pe.fit(model, guide, COUNTS[:40], COUNTS[40:], max_epochs=3, **frozen, **QUIET)
    valid, train = (result.history.elbo.sel(split=s).values for s in ("valid", "train"))
    assert valid[0] == valid[1] == valid[2]
    assert len(set(train)) == 3


def test_seed_repeats_bit_for_bit_and_leaves_the_callers_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    runs = []
    for seed in (0, 0, 1):
        model, guide = programs()
        torch.manual_seed(5)
        pe.fit(model, guide, COUNTS, max_epochs=2, batch_size=16, seed=seed, **QUIET)
        assert torch.equal(torch.rand(3), expected)
        runs.append(weights(model, guide))
        pyro.clear_param_store()
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


def test_resume_continues_exactly(tmp_path):
    options = {"batch_size": 16, "lr": 1e-2, **QUIET}
    beta = pe.LinearWarmup(0.0, 1.0, steps=10)

    def train(folder, epochs, **more):
        pyro.clear_param_store()
        model, guide = programs()
        loss = pe.TraceBeta_ELBO(beta)
        result = pe.fit(
            model,
            guide,
            COUNTS[:40],
            COUNTS[40:],
            loss=loss,
            max_epochs=epochs,
            dir=tmp_path / folder,
            **options,
            **more,
        )
        return weights(model, guide), result

    whole, one = train("whole", 6)
    train("parts", 4)
    parts, two = train("parts", 6, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    xarray.testing.assert_identical(one.history, two.history)
    assert one.loss.step == two.loss.step == 18
    with xarray.open_dataset(tmp_path / "parts" / "history.nc", engine="h5netcdf") as saved:
        xarray.testing.assert_equal(saved.load(), two.history)


def test_early_stopping_waits_for_the_warm_up_and_restores_the_best_epoch(tmp_path):
    model, guide = programs()
    frozen = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}  # the bound never improves
    loss = pe.TraceBeta_ELBO(pe.LinearWarmup(0.0, 1.0, steps=6))
    result = pe.fit(
        model, guide, COUNTS[:40], COUNTS[40:], loss=loss, max_epochs=30, patience=2, batch_size=20, **frozen, **QUIET
    )
    assert result.stopped_early
    # 2 steps an epoch: the warm-up ends with epoch 2, which is the first to count; two epochs without progress follow.
    assert result.history.sizes["epoch"] == 5

    pyro.clear_param_store()
    model, guide = programs()
    diverging = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.05)}
    result = pe.fit(
        model,
        guide,
        COUNTS[:40],
        COUNTS[40:],
        max_epochs=40,
        patience=3,
        dir=tmp_path,
        batch_size=20,
        **diverging,
        **QUIET,
    )
    best = torch.load(result.best_path, weights_only=True)["state_dict"]
    ours = {f"module.model.{n}": p for n, p in model.named_parameters()}
    assert all(torch.equal(best[name], p) for name, p in ours.items())
    assert result.best_epoch == int(result.history.elbo.sel(split="valid").argmax("epoch"))


def test_the_best_epoch_is_one_of_those_after_the_warm_up():
    """As β grows from 1 to 50 the bound at β = 1 falls: its best epoch has weights that nobody asked for."""
    model, guide = programs()
    clusters = torch.tensor([0.3, 0.7]).repeat(30).unsqueeze(-1).expand(60, 12)  # one bit a row, worth some 10 nats
    x = torch.distributions.Binomial(16, clusters).sample()
    data = {"batch_size": 20, "lr": 3e-2, **QUIET}
    pe.fit(model, guide, x[:40], max_epochs=60, **data)
    loss = pe.TraceBeta_ELBO(pe.LinearWarmup(1.0, 50.0, steps=20))
    result = pe.fit(model, guide, x[:40], x[40:], loss=loss, max_epochs=30, patience=3, **data)
    first_settled = 9  # 2 steps an epoch
    assert int(result.history.elbo.sel(split="valid").argmax("epoch")) < first_settled
    assert result.best_epoch >= first_settled


class Corrupted(Dataset):
    """Rows with noise that the dataset draws itself."""

    def __len__(self):
        return len(COUNTS)

    def __getitem__(self, index):
        return torch.clamp(COUNTS[index] + torch.randint(0, 2, (12,)), max=16)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_for_loaders_that_draw_random_numbers(tmp_path, workers):
    def train(folder, epochs, **more):
        pyro.clear_param_store()
        model, guide = programs()
        loader = DataLoader(Corrupted(), batch_size=16, shuffle=True, num_workers=workers)
        pe.fit(model, guide, loader, max_epochs=epochs, dir=tmp_path / folder, **QUIET, **more)
        return weights(model, guide)

    whole = train("whole", 4)
    train("parts", 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, train("parts", 4, resume=True), strict=True))


def test_resume_in_a_folder_that_has_moved_keeps_the_best_epoch(tmp_path):
    def train(folder, epochs, **more):
        pyro.clear_param_store()
        worse = {"optimizer": lambda params: torch.optim.SGD(params, lr=1e-2, maximize=True)}
        return pe.fit(*programs(), COUNTS, max_epochs=epochs, dir=folder, **worse, **QUIET, **more)

    train(tmp_path / "a", 2)
    (tmp_path / "a").rename(tmp_path / "b")
    result = train(tmp_path / "b", 4, resume=True)
    assert result.best_epoch == 0
    assert torch.load(result.best_path, weights_only=True)["epoch"] == 0


def test_progress_bar_shows_the_bound_and_the_loss(capsys):
    pe.fit(*programs(), COUNTS[:40], COUNTS[40:], max_epochs=1, batch_size=40)
    shown = " ".join(capsys.readouterr().out.split())  # the bar wraps where the terminal ends
    assert re.search(r"\belbo: -\d+\.\d+", shown)
    assert "loss:" in shown
    assert "valid_elbo:" in shown


def test_a_second_fit_continues_the_schedule():
    model, guide = programs()
    loss = pe.TraceBeta_ELBO(pe.LinearWarmup(0.0, 1.0, steps=5))
    pe.fit(model, guide, COUNTS, loss=loss, max_epochs=5, **QUIET)
    assert pe.fit(model, guide, COUNTS, loss=loss, max_epochs=1, **QUIET).history.beta.item() == 1.0


def test_parameters_may_be_called_like_methods_of_a_dictionary():
    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("values", torch.tensor(0.0)), pyro.param("a.items", torch.tensor(1.0))))

    pe.fit(function_model, guide, torch.ones(10), max_epochs=2, **QUIET)
    assert pyro.param("values") != 0.0
    assert pyro.param("a.items") != 1.0


@pytest.mark.slow
def test_functions_train_through_the_parameter_store():
    x = 2.0 + torch.randn(200, generator=torch.Generator().manual_seed(0))
    loss = pe.TraceBeta_ELBO(num_particles=10, vectorize_particles=True)
    pe.fit(function_model, function_guide, x, loss=loss, batch_size=None, max_epochs=400, lr=0.02, **QUIET)
    exact = x.sum() / (len(x) + 1 / 9)
    assert abs(pyro.param("loc") - exact) < 0.05
    assert abs(pyro.param("spread") - x.std()) < 0.1


def test_tuples_dicts_datasets_and_loaders_mean_the_same():
    x = torch.randn(30, generator=torch.Generator().manual_seed(0))
    losses = []
    loader = DataLoader(TensorDataset(x), batch_size=30)
    for data in (x, (x,), {"x": x}, TensorDataset(x), loader):
        pyro.clear_param_store()
        result = pe.fit(function_model, function_guide, data, batch_size=None, max_epochs=2, **QUIET)
        losses.append(result.history.loss.sel(split="train").values.tolist())
    assert all(values == pytest.approx(losses[0], rel=1e-6) for values in losses[1:])


@pytest.mark.slow
def test_linear_gaussian_reaches_the_evidence():
    model, x = simulate(300)
    guide = LinearGuide(*model.weight.shape)
    result = pe.fit(model, guide, x, batch_size=None, max_epochs=300, lr=0.03, **QUIET)
    gap = model.log_evidence(x).mean().item() - float(result.history.elbo.sel(split="train")[-5:].mean())
    assert -0.1 < gap < 0.15


@pytest.mark.slow
def test_subsampled_global_latents_train_on_minibatches():
    x = 2.0 + torch.randn(64, generator=torch.Generator().manual_seed(0))

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        with pyro.plate("data", 64, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = autoguide.AutoNormal(model, create_plates=lambda x: pyro.plate("data", 64, subsample_size=len(x)))
    result = pe.fit(model, guide, x, batch_size=16, max_epochs=100, lr=0.05, **QUIET)
    assert result.history.elbo.sel(split="train")[-10:].mean() > -1.6  # nats per datum of 64
    assert abs(guide.median(x)["z"] - x.mean()) < 0.15


class Batchnorm(PyroModule):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(12)
        self.vae = VAEGuide(12, 2, 8)

    def forward(self, x):
        return self.vae(self.norm(x))


def test_buffers_are_trained_and_validation_runs_in_eval_mode():
    model, guide = programs()[0], Batchnorm()
    pe.fit(model, guide, COUNTS[:40], COUNTS[40:], max_epochs=2, batch_size=20, **QUIET)
    assert guide.norm.num_batches_tracked == 4


# --- bad input ------------------------------------------------------------------------------------------------


def expect(error, match, *args, **kwargs):
    with pytest.raises(error, match=match):
        pe.fit(*args, **QUIET, **kwargs)


def test_schedule_longer_than_training():
    loss = pe.TraceBeta_ELBO(pe.LinearWarmup(0.0, 1.0, steps=100))
    expect(ArgumentError, r"100 optimization steps.*3 epochs of 1", *programs(), COUNTS, loss=loss, max_epochs=3)


def test_patience_and_resume_need_their_arguments():
    expect(ArgumentError, "valid", *programs(), COUNTS, patience=3)
    expect(ArgumentError, "dir", *programs(), COUNTS, resume=True)
    for name in ("batch_size", "max_epochs", "devices"):
        expect(ArgumentError, f"{name}.* must be a whole number >= 1, got 0", *programs(), COUNTS, **{name: 0})


def test_optimizers_that_would_train_nothing():
    wrong = pyro.optim.Adam({"lr": 0.1})
    expect(ArgumentError, "torch.optim.Optimizer, got NoneType", *programs(), COUNTS, optimizer=wrong)
    without = lambda x: pyro.sample("z", dist.Normal(0.0, 1.0))  # noqa: E731

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    expect(GuideError, "nor guide has a parameter", model, without, torch.ones(5))
    network = torch.nn.Linear(1, 1)
    unused = lambda x: (pyro.module("unused", network), without(x))  # noqa: E731
    for compiled in (False, True):
        expect(GuideError, "depends on none", model, unused, torch.ones(5), compile=compiled)


def test_unusable_data():
    expect(DataError, "yields nothing", *programs(), DataLoader(TensorDataset(torch.zeros(0, 12))))
    expect(DataError, "yields nothing", *programs(), TensorDataset(torch.zeros(0, 12)), batch_size=None)
    expect(DataError, "no rows", *programs(), torch.zeros(0, 12))
    expect(DataError, "known length, got generator", *programs(), (row for row in COUNTS))
    expect(DataError, "same number of rows.*60.*59", *programs(), (COUNTS, COUNTS[1:]))
    bad = COUNTS.clone()
    bad[3, 4] = float("nan")
    expect(NonFiniteError, r"1 of 720 values are not finite.*\(3, 4\)", *programs(), bad)


def test_minibatches_of_a_model_with_global_latents():
    x = torch.randn(64)
    expect(DataError, r"Site 'z'.*4 minibatches of 64", function_model, function_guide, x, batch_size=16)

    def wrong_size(x):
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        with pyro.plate("data", 1000, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = autoguide.AutoNormal(wrong_size, create_plates=lambda x: pyro.plate("data", 1000, subsample_size=len(x)))
    for size in (16, None):
        expect(DataError, "declares 1000 rows.*64", wrong_size, guide, x, batch_size=size)


def test_parameters_of_another_guide_of_the_same_name():
    x = torch.randn(20)
    pe.fit(function_model, autoguide.AutoNormal(function_model), x, max_epochs=1, **QUIET)
    second = autoguide.AutoNormal(function_model)
    expect(GuideError, r"AutoNormal.*clear_param_store", function_model, second, x, max_epochs=1)
    with pyro.settings.context(module_local_params=True):
        for _ in range(2):
            pe.fit(*programs(), COUNTS, max_epochs=1, **QUIET)


def test_folder_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    expect(CheckpointError, "cannot be written", *programs(), COUNTS, dir=file / "below")


def counts_with(decoder, encoder):
    """Functions in Pyro's older style: the store, not a module, holds their parameters."""

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Binomial(16, logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.5).to_event(1))

    return model, guide


def test_modules_of_the_same_name_are_never_left_untrained():
    """Pyro's store would hand the optimizer the first decoder, while the second one runs."""
    first = nn.Linear(2, 12), nn.Linear(12, 2)
    for _ in range(2):  # training the same modules again is fine
        before = first[0].weight.clone()
        pe.fit(*counts_with(*first), COUNTS, max_epochs=1, **QUIET)
        assert not torch.equal(before, first[0].weight)
    second = nn.Linear(2, 12), nn.Linear(12, 2)
    expect(GuideError, "decoder.*weight.*clear_param_store", *counts_with(*second), COUNTS, max_epochs=1)
    for _ in range(2):  # modules that bring their parameters along replace the store's
        model, guide = programs()
        pe.fit(model, guide, COUNTS, max_epochs=1, **QUIET)
        assert pyro.get_param_store().get_state()["params"]["decoder$$$0.weight"] is model.decoder[0].weight


class Malice:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_checkpoints_that_cannot_be_trusted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    last = tmp_path / "last.ckpt"
    options = {"dir": tmp_path, "resume": True, "max_epochs": 2}
    expect(CheckpointError, "does not exist", *programs(), COUNTS, **options)
    last.write_bytes(pickle.dumps(Malice()))
    pyro.clear_param_store()
    expect(CheckpointError, "damaged", *programs(), COUNTS, **options)
    assert not (tmp_path / "executed").exists()
    pyro.clear_param_store()
    pe.fit(*programs(), COUNTS, dir=tmp_path, overwrite=True, max_epochs=2, **QUIET)
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    pyro.clear_param_store()
    expect(CheckpointError, "damaged", *programs(), COUNTS, **options)
    last.write_bytes(whole)
    pyro.clear_param_store()
    other = VAEModel(12, 2, 9), VAEGuide(12, 2, 9)
    expect(CheckpointError, r"other programs.*decoder", *other, COUNTS, **options)
    pyro.clear_param_store()
    expect(ArgumentError, r"holds 2 epochs and max_epochs=1", *programs(), COUNTS, **options | {"max_epochs": 1})
    other = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1)}
    expect(
        CheckpointError,
        "another run. optimizer: expected Adam, got SGD",
        *programs(),
        COUNTS,
        **options,
        **other,
    )
    torch.save({"state_dict": {}}, last)
    pyro.clear_param_store()
    expect(CheckpointError, r"no checkpoint of pe.fit.*optimizer_states", *programs(), COUNTS, **options)


def test_damage_anywhere_in_a_checkpoint_is_reported_as_such(tmp_path):
    pe.fit(*programs(), COUNTS, dir=tmp_path, max_epochs=1, **QUIET)
    whole, file = (tmp_path / "last.ckpt").read_bytes(), tmp_path / "damaged.ckpt"
    random, refused = np.random.default_rng(0), 0
    for _ in range(200):
        damaged = bytearray(whole)
        for at in random.integers(6000, size=3):  # the pickled structure comes first
            damaged[at] = random.integers(256)
        file.write_bytes(damaged)
        try:
            load_checkpoint(
                file
            )  # a byte that nothing reads may change unnoticed; nothing but a CheckpointError may escape
        except CheckpointError as error:
            refused += "damaged.ckpt" in str(error)
    assert refused > 150
