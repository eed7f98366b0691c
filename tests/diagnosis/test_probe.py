"""The probe of a fit: its figures against exact ones, and a training that it does not touch."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_elbo as pe
from models.vae import VAEGuide, VAEModel
from models.vrnn import VRNN
from pyro_elbo.diagnosis import Probe, ProbeData
from tests.diagnosis.test_activity import WEIGHTS, linear, posterior, rows
from tests.support.fitted import VAE

QUIET = {"progress": False}
PROBED = ("kl_per_dim", "active_units", "information", "own_distortion", "swapped_distortion")
GRADIENT = ("gradient_norm", "gradient_noise")


def probe(model, guide, *batches, loss=None, parameters=()):
    calls = [((x,), {}) for x in batches]
    return Probe(model, guide, loss or pe.TraceBeta_ELBO(), parameters, ProbeData((calls[0], calls[-1]), None), 0)()


def test_the_figures_of_a_linear_gaussian_model():
    """KL_d = ½ log(w_d² + 1) on average over rows, I(z; x) is their sum, and an exchange costs Σ w_d²."""
    x = rows(1000)
    found = probe(linear, posterior, x)["train"]
    variance = WEIGHTS.double().square()
    exact = 0.5 * (variance + 1).log()
    kl = torch.tensor([found["kl_per_dim"][f"z[{i}]"] for i in range(4)], dtype=torch.float64)
    torch.testing.assert_close(kl, exact, rtol=2e-3, atol=1e-6)
    assert found["active_units"] == {"z": 2.0}
    low, high = found["information"]["z"]
    assert low <= exact.sum() + 0.01 <= high + 0.02
    # E (x - w z')² - E (x - w z)² = (w² + 1 + w²) - 1 for z of another row
    cost = found["swapped_distortion"] - found["own_distortion"]
    assert cost == pytest.approx(variance.sum().item(), rel=0.15)


def test_gradient_and_noise_are_those_of_two_batches():
    """The objective per datum is the mean of log N(x; loc, 1): its gradient is the mean of x - loc."""
    loc = torch.nn.Parameter(torch.tensor(0.5))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", loc), 1.0), obs=x)

    def guide(x):
        pass

    found = probe(model, guide, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), parameters=[loc])["train"]
    assert found["gradient_norm"] == pytest.approx(math.sqrt(1.0 * 3.0))
    assert found["gradient_noise"] == pytest.approx(math.sqrt((3.0 - 1.0) ** 2 / 2))
    assert loc.grad is None


def counts():
    torch.manual_seed(0)
    return torch.distributions.Binomial(16, torch.rand(12)).sample((80,))


def fitted(**options):
    pyro.clear_param_store()
    x = counts()
    torch.manual_seed(0)
    programs = VAEModel(12, 2, 8), VAEGuide(12, 2, 8)
    return pe.fit(*programs, x[:60], x[60:], **{"max_epochs": 4, "batch_size": 20, "lr": 1e-2} | QUIET | options)


def parameters(result):
    return [p.detach().clone() for program in (result.model, result.guide) for p in program.parameters()]


def test_the_history_of_a_fit_gains_the_figures():
    history = fitted().history
    assert [history[name].dims for name in PROBED] == [
        ("epoch", "split", "unit"),
        ("epoch", "split", "latent"),
        ("epoch", "split", "latent", "side"),
        ("epoch", "split"),
        ("epoch", "split"),
    ]
    assert history.unit.values.tolist() == ["z[0]", "z[1]"]
    assert history.unit_latent.values.tolist() == ["z", "z"]
    for name in (*PROBED, *GRADIENT):
        known = history[name].notnull()
        assert bool(known.isel(epoch=-1).all()), name
        assert not bool(known.isel(epoch=[1, 2]).any()), name
        assert history[name].attrs["units"]
    np.testing.assert_allclose(
        history.kl_per_dim.sum("unit").isel(epoch=-1).sel(split="valid"),
        history.rate.isel(epoch=-1, split=1),
        rtol=1e-4,
    )


def test_training_is_the_same_with_and_without(monkeypatch):
    """Parameters, buffers of batch norm, noise of dropout: bit for bit."""

    def run():
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae = VAE()
        x = torch.randn(60, generator=torch.Generator().manual_seed(1))
        result = pe.fit(vae.model, vae.guide, x[:40], x[40:], max_epochs=3, batch_size=10, lr=0.01, **QUIET)
        return result, [t.clone() for t in (*vae.parameters(), *vae.buffers())], [m.training for m in vae.modules()]

    probed, state, modes = run()
    assert "kl_per_dim" in probed.history
    monkeypatch.setattr("pyro_elbo.training.lightning.PROBE_EVERY", {False: 0.25, True: 0.25})
    often, state_often, _ = run()
    assert bool(often.history.kl_per_dim.notnull().all())
    monkeypatch.setattr(Probe, "__call__", lambda self, move=None: {})
    bare, state_bare, modes_bare = run()
    assert "kl_per_dim" not in bare.history
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(state, state_bare, state_often, strict=True))
    assert modes == modes_bare
    for name in ("elbo", "rate", "distortion", "loss"):
        assert probed.history[name].equals(bare.history[name])


def test_probes_come_again_after_enough_steps(monkeypatch):
    monkeypatch.setattr("pyro_elbo.training.lightning.PROBE_EVERY", {False: 1.5, True: 1.5})
    history = fitted(max_epochs=6).history  # three steps an epoch
    assert np.flatnonzero(history.gradient_norm.notnull()).tolist() == [0, 2, 4, 5]


def test_probes_are_rarer_where_they_take_longer(monkeypatch):
    """A short fit has no room for the first one; ten times the cost is ten times as rare."""
    monkeypatch.setattr("pyro_elbo.training.lightning.PROBE_EVERY", {False: 1.5, True: 1.5})
    assert np.flatnonzero(fitted(max_epochs=3).history.gradient_norm.notnull()).tolist() == [1, 2]
    monkeypatch.setattr("pyro_elbo.training.trained.cost_in_steps", lambda *rows: 8.0)
    history = fitted(max_epochs=9).history
    assert np.flatnonzero(history.gradient_norm.notnull()).tolist() == [0, 4, 8]


def test_a_resumed_run_has_the_same_probes(tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_elbo.training.lightning.PROBE_EVERY", {False: 1.5, True: 1.5})
    whole = fitted(max_epochs=6, dir=tmp_path / "whole")
    fitted(max_epochs=4, dir=tmp_path / "parts")
    parts = fitted(max_epochs=6, dir=tmp_path / "parts", resume=True)
    assert parts.history.identical(whole.history)
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(parts), strict=True))
    assert parts.diagnosis == whole.diagnosis


def test_a_saved_result_keeps_the_diagnosis(tmp_path):
    result = fitted(max_epochs=8)
    result.save(tmp_path / "fit")
    pyro.clear_param_store()
    loaded = pe.load(tmp_path / "fit", VAEModel(12, 2, 8), VAEGuide(12, 2, 8))
    assert loaded.history.identical(result.history)
    assert loaded.diagnosis == result.diagnosis
    assert str(loaded.diagnosis) == str(result.diagnosis)


@pytest.mark.slow
def test_compiled_training_is_probed_alike():
    eager, compiled = fitted().history, fitted(compile=True).history
    for name in PROBED:
        np.testing.assert_allclose(compiled[name], eager[name], rtol=1e-3, atol=1e-4)


def test_sequences_are_probed_frame_by_frame():
    torch.manual_seed(0)
    vrnn = VRNN(5, 2, 6)
    x, lengths = (torch.rand(12, 4, 5) < 0.4).float(), torch.tensor([4, 2, 3, 4, 1, 4, 2, 3, 4, 4, 3, 2])
    history = pe.fit(vrnn.model, vrnn.guide, (x, lengths), batch_size=None, max_epochs=1, **QUIET).history
    of = history.isel(epoch=0).sel(split="train")
    assert history.unit.values.tolist() == ["z[0]", "z[1]"]
    assert of.kl_per_dim.sum().item() == pytest.approx(of.kl.sum().item(), rel=0.5)
    assert np.isfinite(of.active_units).all()
    assert of.swapped_distortion.item() != of.own_distortion.item()
    assert "information" not in history


def regression(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", 20, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


def test_latents_that_all_rows_share_have_no_units():
    data = torch.randn(20), torch.randn(20)
    history = pe.fit(regression, AutoNormal(regression), data, batch_size=10, max_epochs=2, **QUIET).history
    assert not set(PROBED) & set(history.data_vars)
    assert bool(history.gradient_noise.notnull()[-1])
    assert any("no" in text and "latents" in text for text in pe.diagnose(history).unsaid)


def test_what_a_program_does_not_allow_is_left_out():
    """A discrete latent has no pathwise information, and a model that refuses eval mode cannot be probed at all."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample(
                "z", dist.Bernoulli(pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval))
            )

    history = pe.fit(model, guide, torch.randn(10), max_epochs=1, **QUIET).history
    assert "information" not in history
    assert bool(history.active_units.sel(split="train").notnull().all())


# --- watching ---------------------------------------------------------------------------------------------------


def collapsing(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def at_the_prior(x):
    loc = pyro.param("loc", torch.zeros(2))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


@pytest.mark.parametrize("stop", [False, True])
def test_watching_says_it_once_and_stops_if_asked(monkeypatch, capsys, stop):
    monkeypatch.setattr("pyro_elbo.training.lightning.PROBE_EVERY", {False: 0.5, True: 0.5})
    options = {"batch_size": 10, "max_epochs": 12, "callbacks": pe.watch(stop=stop)}
    result = pe.fit(collapsing, at_the_prior, torch.randn(20), **QUIET, **options)
    assert result.history.sizes["epoch"] == (7 if stop else 12)
    assert result.stopped_early is stop
    assert capsys.readouterr().out.count("posterior collapse of 'z'") == 1


def test_the_closing_line_of_a_fit(capsys):
    pe.fit(collapsing, at_the_prior, torch.randn(20), max_epochs=6, progress=True)
    assert "diagnosis: posterior collapse of 'z', since epoch 5" in capsys.readouterr().out
