"""The diagnosis of labeled runs: what each finding is worth.

Run with ``python -m tests.benchmarks.bench_diagnosis develop --cache FOLDER``. The mistakes are built in
(``diagnosis_runs``). The rules were made with a look at ``develop``, ``final`` and ``fresh``, and mended once ``third``
and then ``fourth`` had been judged; ``fifth`` was judged once, after that. Histories are kept in the folder, so that
rules can be tried again without training. Prints each run with what was found, the confusion matrix, and the F1 of each
finding.
"""

import argparse
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import xarray

import pyro_elbo as pe
from pyro_elbo.errors import NonFiniteError
from tests.benchmarks.diagnosis_runs import SEEDS, Run, runs


class Verdict(NamedTuple):
    """A run with the most important finding; one that ``pe.fit`` stopped has no history and counts as missed."""

    run: Run
    found: str
    words: str


def history_of(run: Run, cache: Path) -> xarray.Dataset:
    """Train a run, or read its history from the folder."""
    path = cache / f"{hashlib.sha1(run.name.encode()).hexdigest()[:16]}.nc"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        history = run.fit().history.assign_attrs(run=run.name, seconds=time.perf_counter() - start)
        history.to_netcdf(path.with_suffix(".part"), engine="h5netcdf")
        path.with_suffix(".part").rename(path)
    with xarray.open_dataset(path, engine="h5netcdf") as history:
        return history.load()


def judge(run: Run, cache: Path) -> Verdict:
    """Diagnose a run by its history."""
    try:
        diagnosis = pe.diagnose(history_of(run, cache))
    except NonFiniteError as error:
        return Verdict(run, "stopped", f"pe.fit stopped: {error}")
    return Verdict(run, diagnosis.names[0], f"{', '.join(diagnosis.names)}\n{diagnosis}")


def f1(label: str, verdicts: Sequence[Verdict]) -> float:
    """Return the harmonic mean of precision and recall of a finding."""
    right = sum(v.run.label == v.found == label for v in verdicts)
    return 2 * right / (sum(v.run.label == label for v in verdicts) + sum(v.found == label for v in verdicts))


def report(verdicts: Sequence[Verdict]) -> None:
    """Print the confusion matrix with the F1 of each finding, and what became of the healthy runs."""
    labels = list(dict.fromkeys(v.run.label for v in verdicts))
    found = labels + sorted({v.found for v in verdicts} - set(labels))
    print(f"\n{'built in (rows), found':24}" + "".join(f"{i + 1:>4}" for i in range(len(found))) + f"{'F1':>8}")
    for i, label in enumerate(labels):
        counts = [sum(v.run.label == label and v.found == other for v in verdicts) for other in found]
        print(f"{i + 1:3} {label:20}" + "".join(f"{n or '.':>4}" for n in counts) + f"{f1(label, verdicts):8.3f}")
    print(f"\nmacro-F1 {sum(f1(label, verdicts) for label in labels) / len(labels):.3f} of {len(verdicts)} runs")
    healthy = [v for v in verdicts if v.run.label == "healthy"]
    print(f"healthy runs called sick: {sum(v.found != 'healthy' for v in healthy)} of {len(healthy)}")


def main(half: str, cache: Path, explain: bool) -> None:
    torch.set_num_threads(1)
    verdicts = []
    for run in runs(half):
        verdicts.append(judge(run, cache))
        names, _, words = verdicts[-1].words.partition("\n")
        right = verdicts[-1].found == run.label
        print(f"{'   ' if right else ' X '}{run.label:20} {names:40} {run.name}", flush=True)
        if explain and not right:
            print(words)
    report(verdicts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("half", choices=list(SEEDS))
    parser.add_argument("--cache", type=Path, default=Path("runs/diagnosis"))
    parser.add_argument("--explain", action="store_true", help="print the diagnosis of each run that was missed")
    options = parser.parse_args()
    main(options.half, options.cache, options.explain)
