"""Shared set-up: shapes checked at run time, one thread a worker, a clean Pyro for every test."""

import functools
import os
import pathlib
from unittest import mock

import pyro
import pytest
import torch
from jaxtyping import _import_hook

import tests.typecheck  # noqa: F401  (the hook looks it up as an attribute)


def _exec_module(loader, module):
    """Run a module's checked code.

    The hook's own version keeps its name of cache files while the module runs, for every module imported by then:
    torch's compiler, SymPy, ArviZ and Lightning are then compiled from source in every process.
    """
    checked = functools.partial(_import_hook._optimized_cache_from_source, loader._typechecker.get_hash())
    with mock.patch("importlib._bootstrap_external.cache_from_source", checked):
        code = loader.get_code(module.__name__)
    exec(code, module.__dict__)


_import_hook._JaxtypingLoader.exec_module = _exec_module
_import_hook.install_import_hook("pyro_elbo", "tests.typecheck.typechecker")

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="the first row of every table of tests, and nothing slow")


def pytest_collection_modifyitems(config, items):
    """Under ``--fast``, keep one row of each parametrized test and leave out what is marked slow or thorough."""
    if not config.getoption("--fast"):
        return
    kept, left_out, seen = [], [], set()
    for item in items:
        test = item.nodeid.split("[")[0]
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
