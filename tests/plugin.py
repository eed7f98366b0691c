"""Shared set-up: shapes checked at run time, one thread a worker, a clean Pyro for every test."""

import os
import pathlib

import pyro
import pytest
import torch
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (the hook looks it up as an attribute)

install_import_hook("pyro_elbo", "tests.typecheck.typechecker")

torch.set_num_threads(1)


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
