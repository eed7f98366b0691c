"""Annealed importance sampling where the evidence is known: what its metric and its temperatures are worth.

Run with ``python -m tests.benchmarks.bench_annealing``. Linear-Gaussian models with ten latents, three rows, 16 chains:
one whose posterior lies along the axes, with standard deviations from 0.003 to 0.95, and a rotated one, with 0.003 to
0.013. Equal step sizes stand for a pilot without a metric.
"""

import time
from unittest import mock

import torch
from torch import Tensor

import pyro_elbo as pe
from models.linear_gaussian import LinearGaussian
from pyro_elbo.evidence import pilot


def problem(weight: Tensor, noise: float, generator: torch.Generator) -> tuple[LinearGaussian, Tensor]:
    model = LinearGaussian(weight, torch.zeros(len(weight), dtype=torch.float64), noise)
    z, error = (torch.randn(3, n, generator=generator, dtype=torch.float64) for n in weight.T.shape)
    return model, z @ weight.T + noise * error


def equal_spread(position: Tensor) -> Tensor:
    """The spread of all coordinates together in place of each."""
    log_spread = position.double().std(0).log()
    return log_spread.mean(-1, keepdim=True).expand_as(log_spread)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 10, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-1, 2, 10, dtype=torch.float64)
    problems = {
        "along the axes": problem(torch.linalg.qr(weight)[0] * scales, 0.3, generator),
        "rotated": problem(weight, 0.02, generator),
    }
    print(f"{'posterior':16}{'steps':12}{'temperatures':>13}{'leapfrog':>9}{'error':>8}{'least ess of 16':>17}{'s':>6}")
    for name, (model, x) in problems.items():
        exact = model.log_evidence(x)
        for metric, count, leapfrog in ((False, 1000, 2), (True, 1000, 2), (True, 273, 10), (True, None, 2)):
            spread = pilot._log_spread if metric else equal_spread
            options = {"num_temperatures": count, "num_leapfrog": leapfrog, "progress": False}
            start = time.process_time()
            with mock.patch.object(pilot, "_log_spread", spread):
                found = pe.log_evidence(model, None, x, method="ais", **options)
            error, ess = (found.log_evidence - exact).abs().max().item(), found.ess.min().item()
            row = f"{name:16}{'own' if metric else 'equal':12}{count or 'by pilot':>13}{leapfrog:9}"
            print(f"{row}{error:8.2f}{ess:17.1f}{time.process_time() - start:6.0f}", flush=True)


if __name__ == "__main__":
    main()
