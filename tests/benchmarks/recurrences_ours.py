"""The works of ``bench_recurrences`` as Pyro programs: scans over a handful of numbers, each ending in a factor."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_elbo as pe

STATES = 4  # of the hidden Markov model


def data(steps: int) -> Tensor:
    """An autoregression with noise of two sizes; every model is fitted to it."""
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(1))
    y, level = [], 0.0
    for t, x in enumerate(noise.tolist()):
        level = 0.5 * level + (0.3 if t % 100 < 50 else 1.0) * x
        y.append(level)
    return torch.tensor(y)


def arma(y: Tensor) -> None:
    mean, ar, ma = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("mean", "ar", "ma"))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))

    def step(carry: tuple[Tensor, Tensor], y_t: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        before, error = carry
        error = y_t - mean - torch.tanh(ar) * before - torch.tanh(ma) * error
        return (y_t, error), error

    errors = pe.scan(step, (torch.zeros(()), torch.zeros(())), y)[1]
    pyro.factor("y", dist.Normal(0.0, scale).log_prob(errors).sum(0))


def garch(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    base = pyro.sample("base", dist.LogNormal(-2.0, 1.0))
    arch, keep = (torch.sigmoid(pyro.sample(name, dist.Normal(0.0, 1.0))) for name in ("arch", "keep"))

    def step(carry: tuple[Tensor, Tensor], y_t: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        variance, shock = carry
        variance = base + arch * (1 - keep) * shock.square() + keep * variance
        shock = y_t - mean
        return (variance, shock), dist.Normal(0.0, variance.sqrt()).log_prob(shock)

    terms = pe.scan(step, (torch.ones(()), torch.zeros(())), y)[1]
    pyro.factor("y", terms.sum(0))


def local_level(y: Tensor) -> None:
    """The Kalman filter of a random walk that is observed with noise."""
    walk, noise = (pyro.sample(name, dist.LogNormal(-1.0, 1.0)).square() for name in ("walk", "noise"))

    def step(carry: tuple[Tensor, Tensor], y_t: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        mean, variance = carry
        variance = variance + walk
        total = variance + noise
        error = y_t - mean
        mean = mean + variance / total * error
        return (mean, variance * noise / total), dist.Normal(0.0, total.sqrt()).log_prob(error)

    terms = pe.scan(step, (torch.zeros(()), torch.ones(())), y)[1]
    pyro.factor("y", terms.sum(0))


def markov(y: Tensor) -> None:
    """The forward filter of a hidden Markov model with normal emissions."""
    means = pyro.sample("means", dist.Normal(torch.linspace(-1.5, 1.5, STATES), 0.5).to_event(1))
    logits = pyro.sample("logits", dist.Normal(torch.zeros(STATES, STATES), 1.0).to_event(2))
    transition = torch.log_softmax(logits, -1)

    def step(log_p: Tensor, y_t: Tensor) -> tuple[Tensor, None]:
        log_p = torch.logsumexp(log_p.unsqueeze(-1) + transition, -2)
        return log_p + dist.Normal(means, 0.5).log_prob(y_t), None

    log_p = pe.scan(step, torch.full((STATES,), 1 / STATES).log(), y)[0]
    pyro.factor("y", torch.logsumexp(log_p, -1))


WORKS = {"ARMA(1,1)": arma, "GARCH(1,1)": garch, "local level": local_level, "HMM filter": markov}
