"""Data of every form, sizes of loaders, validation of global latents, and data that do not fit the programs."""

import math

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import pyro_elbo as pe
from pyro_elbo.errors import DataError
from pyro_elbo.programs import as_tensors
from pyro_elbo.training.data import prepare_data
from tests.support.rows import thorough

QUIET = {"progress": False}
HEIGHT = np.array([1.2, 0.3, -0.7, 2.1])
WEIGHT = np.array([3, 1, 0, 4])


def model(height, weight):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(height)):
        pyro.sample("y", dist.Normal(z * weight, 1.0), obs=height)


def guide(height, weight):
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 0.5))


def matrix_model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(z * x[:, 1], 1.0), obs=x[:, 0])


def matrix_guide(x):
    guide(*x.T)


FRAME = pd.DataFrame({"height": HEIGHT, "weight": WEIGHT})
FORMS = {
    "tensors": (torch.tensor(HEIGHT).float(), torch.tensor(WEIGHT)),
    "arrays": (HEIGHT, WEIGHT),
    "reversed view": (HEIGHT[::-1].copy()[::-1], WEIGHT),
    "dict of arrays": {"height": HEIGHT, "weight": WEIGHT},
    "dict of Series": {"height": FRAME["height"], "weight": FRAME["weight"]},
    "DataFrame": FRAME,
    "matrix": np.stack([HEIGHT, WEIGHT], -1),
    "DataFrame of other columns": FRAME.rename(columns={"height": "a", "weight": "b"}),
}


def programs(data):
    matrix = isinstance(data, np.ndarray) or (isinstance(data, pd.DataFrame) and "a" in data)
    return (matrix_model, matrix_guide) if matrix else (model, guide)


@pytest.mark.parametrize("form", FORMS)
def test_fit_takes_tensors_arrays_and_frames_alike(form):
    losses = []
    for data in (FORMS["tensors"], FORMS[form]):
        pyro.clear_param_store()
        result = pe.fit(*programs(data), data, data, batch_size=None, max_epochs=3, **QUIET)
        losses.append(result.history.loss.values)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith("dict")])
def test_svi_takes_tensors_arrays_and_frames_alike(form):
    losses = []
    for data in (FORMS["tensors"], FORMS[form]):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = pe.SVI(*programs(data), pyro.optim.Adam({"lr": 0.1}), pe.TraceBeta_ELBO())
        args = data if isinstance(data, tuple) else (data,)
        losses.append([svi.step(*args), *svi.run(2, *args, progress=False).tolist(), svi.evaluate_loss(*args)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_floats_get_the_default_dtype_and_other_dtypes_stay():
    arrays = {"f8": HEIGHT, "f2": HEIGHT.astype("f2"), "big": HEIGHT.astype(">f8"), "i4": WEIGHT.astype("i4")}
    arrays |= {"bool": WEIGHT > 1, "scalar": np.float32(0.5), "count": np.int64(3), "text": "a"}
    found = as_tensors(arrays)
    assert [found[name].dtype for name in ("f8", "f2", "big", "i4", "bool")] == [
        torch.float32,
        torch.float32,
        torch.float32,
        torch.int32,
        torch.bool,
    ]
    assert (found["scalar"], type(found["scalar"]), found["count"], found["text"]) == (0.5, float, 3, "a")
    assert as_tensors(FRAME).dtype == torch.float32
    assert as_tensors(FRAME[["weight"]]).dtype == torch.int64
    frozen = HEIGHT.copy()
    frozen.flags.writeable = False
    assert torch.equal(as_tensors(frozen), torch.tensor(HEIGHT).float())


def test_numbers_are_part_of_every_batch():
    def scaled(x, sigma):
        assert isinstance(sigma, float)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, sigma), obs=x)

    def local(x, sigma):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), sigma))

    assert pe.fit(scaled, local, (torch.randn(10), 0.5), batch_size=4, max_epochs=1, **QUIET).loss.step == 3


@pytest.mark.parametrize("x", [3.0, np.float64(3.0), np.array(3.0), torch.tensor(3.0), (3.0,), {"x": 3}])
def test_a_single_number_is_one_datum(x):
    def scalar_model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def scalar_guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(1.5)), 0.5**0.5))  # the posterior

    evidence = dist.Normal(0.0, 2.0**0.5).log_prob(torch.tensor(3.0)).item()
    loss = pe.TraceBeta_ELBO(kl="sampled")
    svi = pe.SVI(scalar_model, scalar_guide, pyro.optim.Adam({"lr": 1e-9}), loss)
    found = svi.step(**x) if isinstance(x, dict) else svi.step(*(x if isinstance(x, tuple) else (x,)))
    assert found == pytest.approx(-evidence, rel=1e-5)
    history = pe.fit(scalar_model, scalar_guide, x, loss=loss, max_epochs=2, lr=1e-9, **QUIET).history
    assert history.elbo.sel(split="train").values == pytest.approx([evidence] * 2, rel=1e-5)


def refuses(match, *args, **options):
    with pytest.raises(DataError, match=match):
        pe.fit(*args, max_epochs=1, **QUIET, **options)


def test_data_that_are_no_tensors():
    refuses(r"expected tensors.*got str", model, guide, "data.csv")
    refuses(r"train: expected tensors.*got set", model, guide, {1, 2})
    refuses(r"valid: expected tensors.*got dict_keys", model, guide, torch.ones(4), valid={1: 2}.keys())
    refuses(r"got {0: 'float', 1: 'list'}. Convert lists by torch.tensor", model, guide, (1.0, [1.0, 2.0]))
    refuses(r"train: expected tensors.*got {}", model, guide, ())


def test_columns_that_are_not_numbers():
    named = FRAME.assign(weight=["a", "b", "c", "d"])
    refuses(r"Series 'weight' has dtype (object|str).*expected numbers.*cat.codes", model, guide, named)
    refuses(r"Column 'b'.*expected numbers", matrix_model, matrix_guide, named.set_axis(["a", "b"], axis=1))
    svi = pe.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pe.TraceBeta_ELBO())
    with pytest.raises(DataError, match=r"array of shape \(2,\).*expected numbers"):
        svi.step(np.array(["a", "b"]), WEIGHT)


def test_data_that_do_not_fit_the_arguments_of_the_programs():
    x = torch.ones(4)
    refuses(r"train:.*model\(tensor of shape \(4,\)\), but it takes \(height, weight\).*'weight'", model, guide, x)
    refuses(r"train:.*height=tensor of shape \(4,\), mass=", model, guide, {"height": x, "mass": x})
    refuses(r"guide\(.*takes \(x\)", model, matrix_guide, (x, x))
    refuses(r"valid:.*takes \(height, weight\)", model, guide, (x, x), valid=x, batch_size=None)
    svi = pe.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pe.TraceBeta_ELBO())
    for call in (svi.step, svi.evaluate_loss):
        with pytest.raises(DataError, match=r"model\(tensor.*takes \(height, weight\)"):
            call(x)


# --- rows of loaders ------------------------------------------------------------------------------------------


ROWS = TensorDataset(torch.arange(100.0))


class Groups(Dataset):
    """Items that are batches of their own."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.ones(20 - 5 * index)


LOADERS = {
    "a subset": (DataLoader(ROWS, 10, sampler=SubsetRandomSampler(range(80))), [80]),
    "drop_last": (DataLoader(ROWS, 30, shuffle=True, drop_last=True), [100, 90]),
    "drawn with replacement": (DataLoader(ROWS, 10, sampler=RandomSampler(ROWS, True, 500)), [500, 100]),
    "weighted": (DataLoader(ROWS, 10, sampler=WeightedRandomSampler([1.0] * 100, 60)), [60, 100]),
    "a batch sampler": (DataLoader(ROWS, batch_sampler=BatchSampler(SequentialSampler(range(45)), 10, True)), [40]),
    "items that are batches": (DataLoader(Groups(), batch_size=None), [35]),
    "all rows": (DataLoader(ROWS, 30), [100]),
}


@pytest.mark.parametrize("name", LOADERS)
def test_rows_are_those_that_a_loader_draws_from(name):
    loader, expected = LOADERS[name]
    program = lambda x: None  # noqa: E731
    loaders, _ = prepare_data(loader, None, None, 0, program, program)
    assert list(loaders.row_counts()) == expected


def global_programs(size):
    def global_model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("n", size or len(x), subsample_size=len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def global_guide(x):
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(1.4)), 1e-3))

    return global_model, global_guide


@pytest.mark.parametrize("name", LOADERS)
def test_the_guard_names_those_rows_and_takes_its_own_advice(name):
    loader, expected = LOADERS[name]
    refuses(rf"minibatches of {expected[0]} rows.*'n', {expected[0]}, subsample_size", *global_programs(None), loader)
    refuses(rf"declares 99 rows, the training data have {expected[0]}\.", *global_programs(99), loader)
    for rows in expected:
        pyro.clear_param_store()
        pe.fit(*global_programs(rows), loader, max_epochs=1, **QUIET)


# --- validation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tensor", "dict", "dataset", "loader"])
def test_validation_counts_a_global_latent_once(form):
    """1000 rows in eight batches: the KL of 7.6 nats counts once, as in the bound of all rows together."""
    generator = torch.Generator().manual_seed(0)
    train, valid = (torch.randn(n, generator=generator) + 1.5 for n in (100, 1000))
    log_likelihood = dist.Normal(1.4, 1.0).log_prob(valid).sum().item()
    kl = torch.distributions.kl_divergence(dist.Normal(1.4, 1e-3), dist.Normal(0.0, 5.0)).item()
    assert kl == pytest.approx(math.log(5000) + (1e-6 + 1.4**2) / 50 - 0.5)
    given = {"tensor": valid, "dict": {"x": valid}, "dataset": TensorDataset(valid)}
    given["loader"] = DataLoader(TensorDataset(valid), 128, shuffle=True)
    frozen = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}
    data = {"x": train} if form == "dict" else train
    history = pe.fit(*global_programs(None), data, given[form], max_epochs=1, **frozen, **QUIET).history
    found = history.sel(split="valid", epoch=0)
    assert found.kl.item() * 1000 == pytest.approx(kl, rel=1e-5)
    assert found.elbo.item() * 1000 == pytest.approx(log_likelihood - kl, abs=0.5)  # the draw of mu moves it by 0.1
    assert found.loss.item() == pytest.approx(-found.elbo.item(), rel=1e-6)


def test_validation_of_a_subsampled_model_divides_the_global_kl_by_the_rows_of_training():
    train, valid = torch.ones(200), torch.ones(90)
    programs = global_programs(200)
    frozen = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}
    history = pe.fit(*programs, train, valid, batch_size=40, max_epochs=1, **frozen, **QUIET).history
    kl = torch.distributions.kl_divergence(dist.Normal(1.4, 1e-3), dist.Normal(0.0, 5.0)).item()
    assert history.kl.values.ravel() * 200 == pytest.approx([kl, kl], rel=1e-5)


def test_a_declared_size_counts_for_validation_even_where_one_batch_holds_all_training_rows():
    train, valid = DataLoader(TensorDataset(torch.ones(100)), 100), DataLoader(TensorDataset(torch.ones(200)), 50)
    frozen = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}
    history = pe.fit(*global_programs(100), train, valid, max_epochs=1, **frozen, **QUIET).history
    kl = torch.distributions.kl_divergence(dist.Normal(1.4, 1e-3), dist.Normal(0.0, 5.0)).item()
    assert history.kl.values.ravel() * 100 == pytest.approx([kl, kl], rel=1e-5)


def test_validation_of_another_width_is_named_before_training():
    net = nn.Linear(4, 1)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(x), 1.0).to_event(1), obs=x[:, :1])

    def fit(valid):
        return pe.fit(model, lambda x: pyro.module("net", net) and None, torch.ones(8, 4), valid, max_epochs=1, **QUIET)

    message = r"valid: the programs fail on rows of shape \(2,\), where train has \(4,\): .*Give both splits the same"
    with pytest.raises(DataError, match=message):
        fit(torch.ones(8, 2))
    fit(torch.ones(9, 4))


def test_validation_of_other_lengths_is_fine():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[:, None], 1.0).expand(x.shape).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.5)) * x.mean(1), 1.0))

    history = pe.fit(model, guide, torch.ones(8, 4), torch.ones(8, 6), max_epochs=1, **QUIET).history
    assert bool(history.elbo.notnull().all())


def test_validation_batches_that_cannot_be_joined():
    ragged = DataLoader([torch.ones(4, 2), torch.ones(4, 3)], batch_size=None)

    def rows_model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[:, 0])

    refuses("valid: .*cannot be joined", rows_model, global_programs(None)[1], torch.ones(4, 2), valid=ragged)


@pytest.mark.parametrize("compile", [False, thorough(True)])
def test_the_loss_per_frame_of_an_epoch_counts_each_frame_once(compile):
    """Whatever the number of frames of a batch; the bound stays one per sequence."""
    x = torch.arange(12.0).reshape(4, 3) / 5
    lengths = torch.tensor([3, 3, 1, 2])

    def model(x, lengths):
        loc = pyro.param("loc", lambda: torch.tensor(0.0))

        def step(carry, x_t):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x_t)
            return carry, None

        with pyro.plate("sequences", 4, subsample_size=len(x)):
            pe.scan(step, None, x, lengths, dim=1)

    objective = pe.TraceTimestep_ELBO(normalize="frame")
    options = {"lr": 1e-12, "batch_size": 2, "max_epochs": 1, "progress": False, "compile": compile}
    history = pe.fit(model, lambda x, lengths: None, (x, lengths), loss=objective, **options).history
    nats = dist.Normal(0.0, 1.0).log_prob(x)[torch.arange(3) < lengths.unsqueeze(-1)].sum()
    assert history.loss.sel(split="train").item() == pytest.approx(-nats.item() / 9, rel=1e-6)
    assert history.elbo.sel(split="train").item() == pytest.approx(nats.item() / 4, rel=1e-6)
