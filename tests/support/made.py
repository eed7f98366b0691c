"""What small programs give, each made once, when it is first asked for."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch

import pyro_elbo as pe
from tests.support.small_programs import Guide, Mean, model, shared

X = torch.linspace(-2.0, 2.0, 24)
QUIET = {"progress": False}
GUIDE, MEAN = Guide(), Mean()
FIT = {"model": model, "train": X, "max_epochs": 1, "batch_size": 12, **QUIET}


@cache
def fitted() -> pe.FitResult:
    """A fit of one epoch."""
    return pe.fit(guide=Guide(), **FIT)


@cache
def saved() -> str:
    """The file of a fit."""
    path = Path(tempfile.mkdtemp()) / "fit"
    fitted().save(path)
    return str(path)


@cache
def terms(beta: float = 1.0) -> pe.Terms:
    """Terms of the fit's programs."""
    torch.manual_seed(0)
    return pe.TraceBeta_ELBO(beta=beta).terms(model, GUIDE, X)


@cache
def audited() -> pe.Audit:
    """An audit of a latent that shows s."""
    z = torch.randn(48, 1, generator=torch.Generator().manual_seed(0))
    s = torch.arange(48) % 2
    return pe.audit(z + s[:, None], s, torch.arange(48) // 2 % 2, probes=["logistic"], folds=2)


@cache
def calibrated() -> pe.Calibration:
    """A calibration of the exact posterior."""
    return pe.simulation_based_calibration(shared, exact, torch.zeros(4), num_simulations=20, num_draws=19, **QUIET)


@cache
def responded() -> pe.LinearResponse:
    """The linear response of one mean."""
    return pe.linear_response(shared, MEAN, X, num_samples=20)


@cache
def exported() -> Any:
    """An export to ArviZ."""
    return pe.to_arviz(model, GUIDE, X, num_samples=40)


def exact(x: torch.Tensor) -> Any:
    """Return the posterior of ``shared``."""
    posterior = dist.Normal(x.sum() / (1 + len(x)), (1 + len(x)) ** -0.5)
    return lambda x: pyro.sample("mean", posterior)
