"""Data on the disk: read batch by batch, trained on as if they were in memory, and given back."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from torch.utils.data import DataLoader, IterableDataset

import pyro_elbo as pe
from pyro_elbo.errors import DataError
from pyro_elbo.training.data import prepare_data
from pyro_elbo.training.rows import StoredRows

ROWS = 60
X = np.random.default_rng(0).normal(1.0, 1.0, (ROWS, 2)).astype("f4")
Y = X.sum(1).astype("f8")


def model(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("rows", ROWS, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def guide(x, y):
    pyro.sample("w", dist.Normal(pyro.param("loc", torch.zeros(2)), 0.1).to_event(1))


def fit(data, model=model, guide=guide, **options):
    pyro.clear_param_store()
    settings = {"batch_size": 16, "max_epochs": 3, "lr": 0.1, "progress": False} | options
    result = pe.fit(model, guide, data, data, **settings)
    return result, pyro.param("loc").detach().clone()


def mapped(folder, name, x, mode="r"):
    path = folder / name
    x.tofile(path)
    return np.memmap(path, x.dtype, mode, shape=x.shape)


FORMS = {
    "tuple": lambda folder: (mapped(folder, "x", X), mapped(folder, "y", Y, "c")),
    "beside a tensor": lambda folder: {"x": mapped(folder, "x", X), "y": torch.tensor(Y).float()},
    "part of a file": lambda folder: (mapped(folder, "x", np.concatenate([X, X]))[:ROWS], torch.tensor(Y).float()),
    "xarray": lambda folder: stored(folder),
    "arrays of xarray": lambda folder: tuple(stored(folder).data_vars.values()),
}


def stored(folder):
    xarray.Dataset({"x": (("row", "column"), X), "y": ("row", Y)}).to_netcdf(folder / "data.nc", engine="h5netcdf")
    return xarray.open_dataset(folder / "data.nc", engine="h5netcdf")


@pytest.mark.parametrize("form", FORMS)
def test_rows_on_the_disk_train_like_rows_in_memory(form, tmp_path):
    expected, loc = fit((torch.tensor(X), torch.tensor(Y).float()))
    data = FORMS[form](tmp_path)
    found, same = fit(data, dir=tmp_path / "run")
    assert torch.equal(loc, same)
    assert found.history.equals(expected.history)
    with pytest.raises(DataError, match="does not hold training data"):
        found.terms()
    resumed, _ = fit(data, dir=tmp_path / "run", resume=True, max_epochs=4)
    assert resumed.history.sizes["epoch"] == 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the pages in memory are read from /proc")
@pytest.mark.parametrize(("mode", "least", "most"), [("r", 0, 1), ("c", 15, 17)])
def test_pages_of_a_file_are_given_back(mode, least, most, tmp_path):
    """16 MiB are read; a copy on write keeps them, since giving them back would lose what was written."""
    x = mapped(tmp_path, "large", np.ones((2**15, 128), "f4"), mode)
    if mode == "c":
        x[0] = 2.0
    rows = StoredRows(x)
    for start in range(0, len(rows), 512):
        batch = rows.__getitems__(list(range(start, start + 512)))
    assert batch.shape == (512, 128)
    after = Path("/proc/self/smaps").read_text().split(str(tmp_path / "large"))[1]
    assert least <= int(after.split("Rss:")[1].split()[0]) / 1024 <= most
    assert float(rows.__getitems__([0])[0, 0]) == (2.0 if mode == "c" else 1.0)


def test_columns_that_are_not_numbers(tmp_path):
    names = mapped(tmp_path, "names", np.array(["a", "b", "c"]))
    with pytest.raises(DataError, match="expected numbers"):
        fit({"x": torch.zeros(3, 2), "y": names})
    with pytest.raises(DataError, match="the same number of rows"):
        fit({"x": torch.zeros(3, 2), "y": mapped(tmp_path, "y", Y)})


class Stream(IterableDataset):
    def __len__(self):
        return ROWS

    def __iter__(self):
        yield from zip(torch.tensor(X), torch.tensor(Y).float(), strict=True)


def test_a_stream_states_its_rows():
    """Batches in the order of the stream, from the stream itself or from a loader."""
    results = [fit(data)[1] for data in (Stream(), DataLoader(Stream(), 16))]
    assert torch.equal(*results)
    loaders, first = prepare_data(Stream(), None, 16, 0, model, guide)
    assert loaders.row_counts() == (ROWS,)
    assert torch.equal(first["train"][0][0], torch.tensor(X[:16]))

    class Unstated(IterableDataset):
        def __iter__(self):
            return iter(Stream())

    with pytest.raises(DataError, match="of known length"):
        fit(Unstated())

    def wrong(x, y):
        with pyro.plate("rows", ROWS + 1, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(x @ pyro.param("loc", torch.zeros(2)), 1.0), obs=y)

    with pytest.raises(DataError, match=f"declares {ROWS + 1} rows, the training data have {ROWS}"):
        fit(Stream(), wrong, lambda x, y: None)


def test_a_stream_that_yields_fewer_rows_than_it_states():
    class Wrong(Stream):
        def __iter__(self):
            return itertools.islice(super().__iter__(), 40)

    with pytest.raises(DataError, match=f"Wrong states {ROWS} rows an epoch and has yielded 40"):
        fit(Wrong())


@pytest.mark.parametrize("form", FORMS)
def test_every_call_takes_what_a_fit_takes(form, tmp_path):
    data, x, y = FORMS[form](tmp_path), torch.tensor(X), torch.tensor(Y).float()
    result, _ = fit(data, max_epochs=1)
    assert result.terms(data).elbo == result.terms(x, y).elbo
    found, expected = (result.predict(*given, num_samples=3, seed=0)["y"] for given in ((data,), (x, y)))
    assert found.equals(expected)
    parts = data.values() if hasattr(data, "values") else data
    found, expected = (pe.pareto_k(model, guide, *given, num_samples=40) for given in (parts, (x, y)))
    assert repr(found) == repr(expected)
    with pytest.raises(DataError, match="does not hold training data that come from a file"):
        result.sample(3)
