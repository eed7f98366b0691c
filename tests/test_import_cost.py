"""`import pyro_elbo` costs little beside `import pyro` and pulls in nothing heavy."""

import statistics
import subprocess
import sys

_TIMED = "import time; import pyro; t = time.perf_counter(); import pyro_elbo; print(time.perf_counter() - t)"
_LOADED = "import sys; import pyro_elbo; print(*sys.modules)"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_adds_less_than_three_tenths_of_a_second():
    assert statistics.median(float(run(_TIMED)) for _ in range(5)) < 0.3


def test_heavy_libraries_are_imported_when_needed():
    heavy = {"lightning", "arviz", "arviz_stats", "xarray", "matplotlib", "sklearn", "pandas"}
    assert not heavy & set(run(_LOADED).split())
