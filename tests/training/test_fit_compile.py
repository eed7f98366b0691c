"""pe.fit(compile=True): the same training as uncompiled, with two graphs for batches of two sizes."""

import numpy as np
import pytest
import torch
import xarray

import pyro_elbo as pe
from models.vae import VAEGuide, VAEModel
from pyro_elbo.compile import inductor
from tests.support.compiled import _interpreted  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow

with torch.random.fork_rng():
    torch.manual_seed(0)
    COUNTS = torch.distributions.Binomial(16, torch.linspace(0.1, 0.9, 12)).sample((56,))


@pytest.fixture
def compiled(interpreted, monkeypatch):
    """The graphs that get compiled."""
    graphs = []
    compile = inductor.compile_graph
    monkeypatch.setattr(inductor, "compile_graph", lambda graph, cpu: graphs.append(graph) or compile(graph, cpu))
    return graphs


def fit(compile, valid=COUNTS[40:], **options):
    torch.manual_seed(0)
    loss = pe.TraceBeta_ELBO(pe.LinearWarmup(0.0, 1.0, steps=8))
    settings = {"max_epochs": 4, "batch_size": 16, "grad_clip": 50.0, "progress": False} | options
    return pe.fit(VAEModel(12, 2, 8), VAEGuide(12, 2, 8), COUNTS[:40], valid, loss=loss, compile=compile, **settings)


def test_compiled_training_is_the_same_training(compiled, tmp_path):
    expected, result = fit(False), fit(True, dir=tmp_path)
    xarray.testing.assert_allclose(result.history, expected.history, rtol=1e-5)
    assert result.loss.step == expected.loss.step == 12
    trained = zip(result.guide.parameters(), expected.guide.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in trained)
    assert len(compiled) == 3  # 16 and 8 rows to train, 16 to validate

    resumed = fit(True, dir=tmp_path, resume=True, max_epochs=6)
    xarray.testing.assert_allclose(resumed.history, fit(False, max_epochs=6).history, rtol=1e-5)
    assert np.isfinite(resumed.history.elbo).all()


def test_processes_average_the_gradients_of_compiled_steps(compiled):
    """The same training as that of uncompiled processes, with parts of 8 rows, and of 4 and 4 at the end."""
    options = {"devices": 2, "batch_size": 8, "grad_clip": 5.0}
    expected, result = fit(False, **options), fit(True, **options)
    xarray.testing.assert_allclose(result.history, expected.history, rtol=1e-4, atol=1e-4)
    assert result.loss.step == expected.loss.step == 12
    trained = zip(result.guide.parameters(), expected.guide.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in trained)


def test_compiled_steps_of_two_processes_see_the_rows_of_both(compiled):
    """A critic and free bits, in training and validation, with parts of 8 rows, of 4 and 3 at the end."""
    penalty = pe.MutualInformation("z", lambda x: x[:, 0] % 2, 2.0, "club", levels=2)
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        loss = pe.TraceBeta_ELBO(penalties=[penalty], free_bits=0.1)
        programs, options = (VAEModel(12, 2, 8), VAEGuide(12, 2, 8)), {"max_epochs": 4, "progress": False}
        found.append(
            pe.fit(*programs, COUNTS[:39], COUNTS[40:], loss=loss, batch_size=8, devices=2, compile=compile, **options)
        )
    expected, result = found
    xarray.testing.assert_allclose(result.history, expected.history, rtol=1e-4, atol=1e-4)
    critics = zip(*(tuple(r.loss.critics.values())[0].network.parameters() for r in found), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in critics)
