"""What the probes of a fit cost: ``pe.fit`` with and without them, alternating.

Run with ``python -m tests.benchmarks.bench_probe [--only PART ...] [--repeats N]``. Medians of the processor time; the
geometric mean of the ratios of neighbors, with its 95 % interval by Student's t; and all these ratios.
"""

import argparse
import math
import statistics
import time
from unittest.mock import patch

import torch
from scipy.stats import t as student

from pyro_elbo.diagnosis import Probe
from tests.benchmarks.diagnosis_runs import Recipe, Run

FITS = {
    "VAE of digits, 40 epochs of 12 steps": (Run("", "vae", 0, {}, Recipe()), False),
    "VAE of 30 latents and 400 hidden, 40 epochs": (
        Run("", "vae", 0, {"z_dim": 30, "hidden": 400, "encoder_hidden": 400}, Recipe()),
        False,
    ),
    "regression, 300 epochs of one step": (Run("", "regression", 0, {}, Recipe(epochs=300, batch=None)), False),
    "VRNN, 30 epochs of 3 steps": (Run("", "vrnn", 0, {}, Recipe(epochs=30)), False),
    "VAE of digits, compiled, 400 epochs": (Run("", "vae", 0, {}, Recipe(epochs=400)), True),
}


def seconds(run: Run, compile: bool, probed: bool) -> float:
    """Time one fit."""
    start = time.process_time()
    if probed:
        run.fit(compile=compile)
    else:
        with patch.object(Probe, "__call__", lambda self, move=None: {}):
            run.fit(compile=compile)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="parts of the names of fits")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'one fit':48} {'seconds':>8} {'probed':>8} {'ratio':>7}  95 % interval")
    for name, (run, compile) in FITS.items():
        if options.only and not any(part in name for part in options.only):
            continue
        for probed in (True, False):
            seconds(run, compile, probed)
        pairs = []
        for i in range(options.repeats):
            order = (True, False) if i % 2 else (False, True)
            times = {probed: seconds(run, compile, probed) for probed in order}
            pairs.append((times[False], times[True]))
        bare, probed = (statistics.median(x) for x in zip(*pairs, strict=True))
        logs = [math.log(b / a) for a, b in pairs]
        mean, error = statistics.mean(logs), statistics.stdev(logs) / len(logs) ** 0.5
        reach = student.ppf(0.975, len(logs) - 1) * error
        low, ratio, high = (math.exp(mean + x) for x in (-reach, 0.0, reach))
        print(f"{name:48} {bare:8.2f} {probed:8.2f} {ratio:7.3f}  {low:.3f} to {high:.3f}")
        print(f"  ratios {' '.join(f'{math.exp(x):.3f}' for x in logs)}", flush=True)


if __name__ == "__main__":
    main()
