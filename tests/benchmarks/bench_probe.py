"""What the probes of a fit cost: the share of its processor time, and ``pe.fit`` with and without them, alternating.

Run with ``python -m tests.benchmarks.bench_probe [--only PART ...] [--repeats N]``. ``inside`` is the time of a probed
fit over the same less what passed inside the probes, the median over the fits: it does not see what probes do to the
steps that follow. ``ratio`` does, with the noise of a machine: the geometric mean over pairs of neighbors, with its
95 % interval by Student's t. Seconds are medians.
"""

import argparse
import math
import statistics
import time
from typing import Any, NamedTuple
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


class Cost(NamedTuple):
    """Processor seconds of a fit, and those inside its probes."""

    whole: float
    probes: float


def cost(run: Run, compile: bool, probed: bool) -> Cost:
    """Time one fit."""
    inside = 0.0
    measure = Probe.__call__

    def timed(self: Probe, *args: Any) -> dict[str, Any]:
        nonlocal inside
        begin = time.process_time()
        found = measure(self, *args) if probed else {}
        inside += time.process_time() - begin
        return found

    start = time.process_time()
    with patch.object(Probe, "__call__", timed):
        run.fit(compile=compile)
    return Cost(time.process_time() - start, inside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="parts of the names of fits")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'one fit':48} {'seconds':>8} {'probed':>8} {'inside':>7} {'ratio':>7}  95 % interval")
    for name, (run, compile) in FITS.items():
        if options.only and not any(part in name for part in options.only):
            continue
        for probed in (True, False):
            cost(run, compile, probed)
        bare, full = [], []
        for i in range(options.repeats):
            for probed in (True, False) if i % 2 else (False, True):
                (full if probed else bare).append(cost(run, compile, probed))
        logs = [math.log(b.whole / a.whole) for a, b in zip(bare, full, strict=True)]
        mean, error = statistics.mean(logs), statistics.stdev(logs) / len(logs) ** 0.5
        reach = student.ppf(0.975, len(logs) - 1) * error
        low, ratio, high = (math.exp(mean + x) for x in (-reach, 0.0, reach))
        inside = statistics.median(x.whole / (x.whole - x.probes) for x in full)
        times = [statistics.median(x.whole for x in fits) for fits in (bare, full)]
        print(
            f"{name:48} {times[0]:8.2f} {times[1]:8.2f} {inside:7.3f} {ratio:7.3f}  {low:.3f} to {high:.3f}", flush=True
        )


if __name__ == "__main__":
    main()
