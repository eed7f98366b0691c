"""Baselines that cannot predict a reward are refused by the name of their site."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_elbo as pe
from pyro_elbo.errors import NonFiniteError, SiteError

X = torch.tensor([1.0, -0.5, 2.0])
NET = nn.Linear(1, 1)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


BAD = {
    "no dict": (True, SiteError, r"expected a baseline as a dict of options, got True \(bool\)\. Use infer="),
    "no input": ({"nn_baseline": NET}, SiteError, r"nn_baseline_input, what it predicts .* and None .*Give both"),
    "no network": ({"nn_baseline": 3, "nn_baseline_input": X}, SiteError, "expected nn_baseline, a network.* got 3"),
    "wrong input": (
        {"nn_baseline": NET, "nn_baseline_input": X},
        SiteError,
        r"does not take its nn_baseline_input of shape \(3,\).*such as x\[:, None\]",
    ),
    "no tensor": (
        {"nn_baseline": lambda x: "b", "nn_baseline_input": X},
        SiteError,
        r"expected a tensor from nn_baseline, got 'b' \(str\)",
    ),
    "number": ({"baseline_value": 3.0}, SiteError, "expected a tensor as baseline_value, got 3.0"),
    "decay": ({"use_decaying_avg_baseline": True, "baseline_beta": "0.9"}, SiteError, "got '0.9'. Use 0.9"),
    "NaN value": (
        {"baseline_value": torch.tensor(math.nan)},
        NonFiniteError,
        r"its baseline: 1 of 1 values are not finite.*Look for NaN in nn_baseline_input or baseline_value",
    ),
    "NaN input": (
        {"nn_baseline": nn.Flatten(0), "nn_baseline_input": torch.full((3, 1), math.nan)},
        NonFiniteError,
        "its baseline: 3 of 3 values are not finite",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_baseline_that_cannot_predict_is_refused(case):
    options, kind, message = BAD[case]

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.0)) * x), infer={"baseline": options})

    with pytest.raises(kind, match=f"^Site 'z': .*{message}"):
        pe.TraceBeta_ELBO(num_particles=2).loss_and_grads(model, guide, X)
