"""The history of a fit holds the value and the weight of every penalty."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_elbo as pe


def test_the_history_holds_the_weight_of_a_penalty() -> None:
    def model(x: Tensor, s: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, s: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 1.0))

    pyro.set_rng_seed(0)
    x, s = torch.randn(64), torch.arange(64) % 2
    penalty = pe.MutualInformation("z", attribute=lambda x, s: s, weight=pe.LinearWarmup(0.0, 4.0, steps=4))
    loss = pe.TraceBeta_ELBO(penalties=[penalty])
    history = pe.fit(model, guide, (x, s), loss=loss, max_epochs=6, batch_size=64, progress=False).history
    assert history.penalty_weight.dims == ("epoch", "penalty_name")
    assert history.penalty_weight.sel(penalty_name="I(z; s)").values.tolist() == [1.0, 2.0, 3.0, 4.0, 4.0, 4.0]
