"""Shared set-up: shapes checked at run time, one thread a worker, a clean Pyro for every test."""

import os
import pathlib

import pyro
import pytest
import torch

from tests import typecheck

typecheck.install()
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--fast", action="store_true", help="one row of every table, one captured step a file, nothing slow"
    )


def pytest_collection_modifyitems(config, items):
    """Under ``--fast``, keep one row of a test, one test of captured steps a file, and nothing slow or thorough."""
    if not config.getoption("--fast"):
        return
    kept, left_out, seen = [], [], set()
    for item in items:
        test = item.nodeid.split("::" if "interpreted" in item.fixturenames else "[")[0]
        dear = item.get_closest_marker("slow") or item.get_closest_marker("thorough")
        (left_out if dear or test in seen else kept).append(item)
        if not dear:
            seen.add(test)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(autouse=True)
def _clean_pyro():
    """Every test starts from an empty parameter store, a fixed seed and single precision."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(True)
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of real data that PYRO_ELBO_DATA names; tests skip where it is unset and fail where it is wrong."""
    if "PYRO_ELBO_DATA" not in os.environ:
        pytest.skip("PYRO_ELBO_DATA is not set")
    folder = pathlib.Path(os.environ["PYRO_ELBO_DATA"])
    assert folder.is_dir(), f"PYRO_ELBO_DATA names {folder}, which is not a folder"
    return folder
