"""One check of counts, of seeds and of positive numbers: every public function refuses what is none, by its name."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_elbo as pe
from models.autoencoder import around_codes
from pyro_elbo.errors import ArgumentError, DataError
from tests.support.untyped import _untyped  # noqa: F401  (a fixture)

X = torch.linspace(-2.0, 2.0, 30)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.8)) * x, 0.45))


def result():
    return pe.fit(model, guide, X, max_epochs=1, progress=False)


TERMS = pe.TraceBeta_ELBO().terms(model, guide, X)
QUIET = {"progress": False}
COUNTS = {
    "pareto_k": lambda n: pe.pareto_k(model, guide, X, num_samples=n),
    "to_arviz": lambda n: pe.to_arviz(model, guide, X, num_samples=n),
    "active_units": lambda n: pe.active_units(model, guide, X, num_samples=n),
    "kl_decomposition": lambda n: pe.kl_decomposition(model, guide, X, num_samples=n),
    "linear_response": lambda n: pe.linear_response(model, guide, X, num_samples=n),
    "log_evidence": lambda n: pe.log_evidence(model, guide, X, num_samples=n, **QUIET),
    "bidirectional_evidence": lambda n: pe.bidirectional_evidence(model, X, num_samples=n, **QUIET),
    "rate_distortion": lambda n: pe.rate_distortion({1.0: TERMS}, num_samples=n),
    "sweep": lambda n: pe.sweep(lambda beta: TERMS, [1.0], num_samples=n, **QUIET),
    "result.sample": lambda n: result().sample(n),
    "result.predict": lambda n: result().predict(X, num_samples=n),
    "result.summary": lambda n: result().summary(num_samples=n),
    "result.pareto_k": lambda n: result().pareto_k(num_samples=n),
    "result.to_arviz": lambda n: result().to_arviz(num_samples=n),
}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("wrong", [2.5, "10", -3, True, None])
def test_counts(name, wrong, untyped):
    if name in ("linear_response", "log_evidence") and wrong is None:
        return  # the default
    with pytest.raises(ArgumentError, match=r"num_samples must be a whole number >= \d, got"):
        COUNTS[name](wrong)


@pytest.mark.parametrize(
    "seeded",
    [
        lambda seed: pe.pareto_k(model, guide, X, seed=seed),
        lambda seed: pe.active_units(model, guide, X, seed=seed),
        lambda seed: pe.kl_decomposition(model, guide, X, seed=seed),
        lambda seed: pe.linear_response(model, guide, X, seed=seed),
        lambda seed: pe.log_evidence(model, guide, X, seed=seed, **QUIET),
        lambda seed: pe.to_arviz(model, guide, X, seed=seed),
        lambda seed: result().summary(seed=seed),
    ],
)
def test_seeds(seeded, untyped):
    for wrong in (-1, 1.5, "0"):
        with pytest.raises(ArgumentError, match="seed must be a whole number >= 0, got"):
            seeded(wrong)


POSITIVE = {
    "accuracy": lambda x: pe.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pe.TraceBeta_ELBO()).converge(
        X, accuracy=x, **QUIET
    ),
    "grad_clip": lambda x: pe.fit(model, guide, X, grad_clip=x, **QUIET),
    "resolution of 'x'": lambda x: pe.code_length(TERMS, x),
    "critic_lr": lambda x: pe.MutualInformation("z", attribute="s", critic_lr=x),
    "SigmoidWarmup: steepness": lambda x: pe.SigmoidWarmup(0.0, 1.0, steps=3, steepness=x),
    "width": lambda x: around_codes(lambda x: x, lambda z: z, dist.Normal, torch.randn(5, 2), x),
}


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("wrong", [0, -1.0, math.nan, math.inf, "1", True])
def test_positive_numbers(name, wrong, untyped):
    with pytest.raises(ArgumentError, match=f"^{re.escape(name)} must be a finite number > 0, got"):
        POSITIVE[name](wrong)


def test_one_row_and_one_draw_show_no_spread():
    with pytest.raises(DataError, match="active units need 2 rows of 'data' or more, got 1"):
        pe.active_units(model, guide, X[:1])
    with pytest.raises(DataError, match="expected at least 2 rows of 'data' for an aggregate posterior, got 1"):
        pe.kl_decomposition(model, guide, X[:1])
    with pytest.raises(ArgumentError, match="num_samples must be a whole number >= 2, got 1"):
        result().summary(num_samples=1)
    one = result().summary(X[:1], num_samples=50)
    assert one.sites[0].units is None
    assert "Active" not in repr(one)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"hidden": (64, 2.5)}, "every number of hidden"),
        ({"hidden": 0}, "every number of hidden"),
        ({"levels": "3"}, "every number of levels"),
        ({"levels": (2, 0)}, "every number of levels"),
        ({"seed": -1}, "seed"),
    ],
)
def test_sizes_of_critics(options, what, untyped):
    with pytest.raises(ArgumentError, match=rf"^{what} must be a whole number >= \d, got"):
        pe.MutualInformation("z", attribute="s", estimator="club", **options)


def test_folds(untyped):
    for wrong in (1, 2.5, "5"):
        with pytest.raises(ArgumentError, match="folds must be a whole number >= 2, got"):
            pe.audit(X[:, None], (X > 0).long(), folds=wrong)
