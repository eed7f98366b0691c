"""What a fit says of latents that are summed out, or that its guide enumerates: the truth, and where it cannot tell."""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate

import pyro_elbo as pe
from pyro_elbo.errors import SiteError

MEANS = torch.tensor([-3.0, 3.0])
X = (MEANS[torch.arange(120) % 2] + 0.5 * torch.randn(120, generator=torch.Generator().manual_seed(0)))[:, None]


@config_enumerate
def model(x, listens=True):
    """Two clusters, or with ``listens=False`` a switch that nothing depends on."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
        loc = (MEANS if listens else torch.zeros(2))[k]
        z = pyro.sample("z", dist.Normal(loc.unsqueeze(-1).expand(*k.shape, 2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., :1], 0.5).to_event(1), obs=x)


class Guide(torch.nn.Module):
    """Draws z from x, given k where ``mark`` says how to enumerate it."""

    def __init__(self, mark):
        super().__init__()
        self.mark, self.k, self.z = mark, torch.nn.Linear(1, 2), torch.nn.Linear(1, 2)
        self.shift = torch.nn.Parameter(torch.zeros(2, 1))

    def forward(self, x, listens=True):
        with pyro.plate("data", len(x)):
            loc = self.z(x)
            if self.mark is not None:
                k = pyro.sample("k", dist.Categorical(logits=self.k(x)), infer={"enumerate": self.mark})
                loc = loc + self.shift[k]
            pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))


def fit(mark, epochs=8, listens=True):
    torch.manual_seed(0)
    programs = partial(model, listens=listens), Guide(mark)
    return pe.fit(*programs, X, X[:40], max_epochs=epochs, batch_size=60, lr=0.02, progress=False)


@pytest.mark.parametrize("mark", [None, "parallel", "sequential"])
def test_a_fit_with_enumerated_latents_says_what_it_knows(mark):
    """The KL of each unit is exact and adds up to that of the site; active units of categories are not claimed."""
    result = fit(mark)
    history = result.history
    assert {"k", "z[0]", "z[1]"} == set(history.unit.values)
    of_z = history.kl_per_dim.sel(unit=["z[0]", "z[1]"], split="valid").sum("unit")
    last = {"epoch": -1}
    noise = 0.3 if mark is None else 1e-4  # the prior of z, a mixture, has no analytic KL
    assert float(of_z[last]) == pytest.approx(float(history.kl.sel(latent="z", split="valid")[last]), rel=noise)
    kl_of_k = float(history.kl.sel(latent="k", split="valid")[last])
    assert float(history.kl_per_dim.sel(unit="k", split="valid")[last]) == pytest.approx(kl_of_k, rel=max(noise, 0.05))
    if mark is None:  # z is drawn once per row
        assert float(history.active_units.sel(latent="z", split="valid")[last]) == 1
        assert np.isnan(history.active_units.sel(latent="k")).all()
    else:
        assert "active_units" not in history
    assert "swapped_distortion" not in history
    assert any("cannot exchange" in said for said in result.diagnosis.unsaid)
    assert "cannot be said" in str(result.diagnosis)
    assert set(pe.active_units(model, result.guide, X)) == {"z"}
    assert all(s.active_units is None for s in result.summary().sites if s.site == "k")
    draws = result.sample(50)
    assert draws["k"].dims == ("draw", "data")


def test_a_switch_that_nothing_depends_on_has_collapsed():
    result = fit(None, listens=False)
    found = [f for f in result.diagnosis.findings if f.name == "posterior collapse"]
    assert [f.site for f in found] == ["k"]
    assert found[0].units == ("k",)


def test_the_decomposition_of_the_kl_of_enumerated_latents_is_refused():
    guide = Guide("parallel")
    with pytest.raises(SiteError, match=r"'k', 'z'.*enumerated.*without marks"):
        pe.kl_decomposition(model, guide, X)
