"""Seconds of processor time of 4000 draws, of programs that broadcast, that are mapped, and one run per draw.

Run as ``python -m tests.benchmarks.bench_export``; ``--loop`` also times one run per draw.
"""

import sys
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_elbo as pe
from pyro_elbo.posterior import draws

NUM_DRAWS, ROWS, COLUMNS = 4000, 100, 5


def _regression(predict: Callable) -> Callable:
    def model(x, y):
        b = pyro.sample("b", dist.Normal(torch.zeros(COLUMNS), 1.0).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(predict(x, b), s), obs=y)

    return model


def _solve(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    lower = torch.eye(COLUMNS) + 0.1 * torch.ones(COLUMNS, COLUMNS).tril(-1)
    return x @ torch.linalg.solve_triangular(lower, b[:, None], upper=False)[:, 0]


PROGRAMS = {
    "broadcasting": _regression(lambda x, b: (x * b).sum(-1)),
    "X @ beta": _regression(lambda x, b: x @ b),
    "triangular solve": _regression(_solve),
}
TASKS = {
    "draws": lambda *call: draws.draw(*call[:2], call[2:], {}, NUM_DRAWS, seed=0),
    "pareto_k": lambda *call: pe.pareto_k(*call, num_samples=NUM_DRAWS),
    "log_evidence": lambda *call: pe.log_evidence(*call, num_samples=NUM_DRAWS, progress=False),
    "to_arviz": lambda *call: pe.to_arviz(*call, num_samples=NUM_DRAWS),
}


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, COLUMNS)
    y = x.sum(1) + torch.randn(ROWS)
    print(f"{'seconds of 4000 draws':24}" + "".join(f"{name:>14}" for name in TASKS))
    for loop in (False, True) if "--loop" in sys.argv else (False,):
        if loop:
            draws._FIRST_CHOICES.clear()
        for name, model in PROGRAMS.items():
            pyro.clear_param_store()
            guide = AutoNormal(model)
            guide(x, y)
            pe.to_arviz(model, guide, x, y, num_samples=20)
            print(f"{name + (', loop' if loop else ''):24}" + _row(model, guide, x, y), flush=True)


def _row(*call: object) -> str:
    seconds = []
    for task in TASKS.values():
        start = time.process_time()
        task(*call)
        seconds.append(time.process_time() - start)
    return "".join(f"{s:14.2f}" for s in seconds)


if __name__ == "__main__":
    main()
