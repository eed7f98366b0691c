"""`import pyro_elbo` costs little beside `import pyro` and pulls in nothing heavy."""

import os
import subprocess
import sys

_TIMED = """
from time import process_time as now
start = now(); import pyro; between = now(); import pyro_elbo
print((now() - between) / (between - start))
"""
_LOADED = "import sys; import pyro_elbo; print(*sys.modules)"


def run(code: str) -> str:
    """Run code in a new interpreter that keeps byte code, as an installed package does."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout


def test_import_adds_less_than_a_tenth_to_that_of_pyro():
    """Processor time, and the best of five: what other processes do at the time does not count."""
    assert min(float(run(_TIMED)) for _ in range(5)) < 0.1


def test_heavy_libraries_are_imported_when_needed():
    heavy = {"lightning", "arviz", "arviz_stats", "xarray", "matplotlib", "sklearn", "pandas"}
    assert not heavy & set(run(_LOADED).split())
