"""``pe.fit(lr="auto")``: the run to convergence by epochs, against exact posteriors."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, CheckpointError, NonFiniteError
from pyro_elbo.training import comparable, converge, options
from tests.support.compiled import _as_captured  # noqa: F401  (a fixture)
from tests.support.untyped import _untyped  # noqa: F401  (a fixture)

with torch.random.fork_rng():
    torch.manual_seed(0)
    X = torch.randn(200, dtype=torch.float64)
    Y = 1.5 * X + 0.7 * torch.randn(200, dtype=torch.float64)

PRECISION = (X @ X).item() / 0.49 + 1 / 9
MEAN, SPREAD = (X @ Y).item() / 0.49 / PRECISION, PRECISION**-0.5


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def brief(monkeypatch):
    """Shorter windows and epochs."""
    for room, name, value in (
        (converge, "RECORDS", 32),
        (converge, "THIN", 1),
        (comparable, "LEAST_STEPS", 60),
        (options, "AUTO_EPOCH", 20),
    ):
        monkeypatch.setattr(room, name, value)


def model(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
    with pyro.plate("data", 200, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(slope * x, 0.7), obs=y)


def guide(x, y):
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(0.1), constraint=dist.constraints.positive)
    pyro.sample("slope", dist.Normal(loc, scale))


def fit(train=(X, Y), **settings):
    given = {"lr": "auto", "accuracy": 0.4, "batch_size": None, "progress": False}
    return pe.fit(model, guide, train, **given | settings)


def errors():
    """Return the errors of the guide's mean and of its log scale, in standard deviations of the posterior."""
    return (pyro.param("loc").item() - MEAN) / SPREAD, math.log(pyro.param("scale").item() / SPREAD)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("seed", [0, 1])
def test_an_autoguide_that_has_not_run_is_no_point_estimate(seed):
    """Whatever the seed, the runs that guides are compared by draw different values."""
    fresh = pyro.infer.autoguide.AutoNormal(model)
    result = pe.fit(model, fresh, (X, Y), lr="auto", batch_size=None, max_steps=200, seed=seed, progress=False)
    assert result.convergence.steps <= 200


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, pytest.param(100, marks=pytest.mark.thorough)])
def test_a_regression_converges_without_any_other_setting(batch_size):
    """Windows of full length, in machine code: within a tenth of a standard deviation."""
    result = pe.fit(model, guide, (X, Y), lr="auto", batch_size=batch_size, compile=True, progress=False)
    report = result.convergence
    assert report.converged
    assert report.distance <= report.accuracy == 0.1
    assert max(map(abs, errors())) < 0.1
    assert result.stopped_early
    assert result.history.sizes["epoch"] == math.ceil(report.steps / 100)


def test_full_batches_converge(brief):
    """The last epoch ends with the run, so that its validation, whose noise is fixed, sees the averages."""
    result = fit(valid=(X, Y))
    assert result.convergence.converged
    assert max(map(abs, errors())) < 0.4
    assert result.convergence.windows[-1].elbo == pytest.approx(result.history.elbo[-1, 0].item(), rel=0.05)
    assert "Converged after" in repr(result)
    assert result.holds == "last"
    again = fit(valid=(X, Y), lr=0.0, accuracy=None, max_epochs=1)
    assert result.history.elbo.sel(split="valid")[-1].item() == again.history.elbo.sel(split="valid").item()


@pytest.mark.thorough
def test_minibatches_converge(brief):
    """Three batches of unequal size, drawn in a new order at each pass."""
    result = fit(batch_size=80)
    assert result.convergence.converged
    assert max(map(abs, errors())) < 0.4


def test_too_few_epochs_are_called_unconverged(brief):
    result = fit(accuracy=1e-6, max_epochs=6)
    assert not result.convergence.converged
    assert result.convergence.steps <= 6 * 20
    assert "Ended by max_epochs" in result.convergence.summary
    assert "Ended by max_steps" in fit(accuracy=1e-6, max_epochs=50, max_steps=100).convergence.summary


def test_compiled_steps_have_the_same_report(brief, interpreted):
    settings = {"accuracy": 1e-6, "max_epochs": 10}
    expected = fit(**settings).convergence
    pyro.clear_param_store()
    found = fit(compile=True, **settings).convergence
    assert [(w.verdict, w.steps, w.step_size) for w in found.windows] == [
        (w.verdict, w.steps, w.step_size) for w in expected.windows
    ]
    for figure in ("r_hat", "elbo", "error", "moved"):
        ours, theirs = ([getattr(w, figure) for w in report.windows] for report in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_resumed_run_is_the_same_run(brief, tmp_path):
    """It stops within a window; a callback ends it there, as a crash would."""
    from lightning import Callback

    class Crash(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if pl_module.current_epoch == 7:
                raise KeyError("power")

    settings = {"accuracy": 1e-6, "max_epochs": 15, "batch_size": 80}
    expected = fit(**settings).convergence
    loc = pyro.param("loc").item()
    pyro.clear_param_store()
    with pytest.raises(KeyError):
        fit(dir=tmp_path, callbacks=Crash(), **settings)
    pyro.clear_param_store()
    resumed = fit(dir=tmp_path, resume=True, **settings)
    assert repr(resumed.convergence) == repr(expected)
    assert pyro.param("loc").item() == loc
    ended = fit(dir=tmp_path, resume=True, **settings)
    assert repr(ended.convergence) == repr(expected)
    assert pyro.param("loc").item() == loc
    with pytest.raises(CheckpointError, match="another run. lr: expected 'auto', got 0.1"):
        fit(dir=tmp_path, resume=True, **settings | {"lr": 0.1, "accuracy": None})


def test_a_report_is_saved_with_the_result(brief, tmp_path):
    result = fit(accuracy=1e-6, max_epochs=6)
    result.save(tmp_path / "fit")
    assert repr(pe.load(tmp_path / "fit", model, guide).convergence) == repr(result.convergence)
    assert fit(lr=0.01, accuracy=None, max_epochs=1).convergence is None


def test_patience_ends_training_earlier_and_restores_the_best_epoch(brief):
    result = fit(valid=(X, Y), accuracy=1e-6, patience=1)
    assert not result.convergence.converged
    assert "Ended by early stopping" in result.convergence.summary
    assert result.holds == ("last" if result.best_epoch == result.history.epoch[-1] else "best")


def test_a_run_that_is_stopped_at_once_has_no_window():
    """Windows of full length take 1024 steps."""
    from lightning import Callback

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    report = fit(callbacks=Stop()).convergence
    assert report.windows == ()
    assert "before one window of iterates was complete" in report.summary


def test_rates_of_the_given_optimizer_move_together(brief):
    """The scale's rate is a tenth of the other."""
    made = []

    def optimizer(parameters):
        loc, scale = parameters
        made.append(torch.optim.Adam([{"params": [loc], "lr": 0.1}, {"params": [scale], "lr": 0.01}]))
        return made[-1]

    report = fit(optimizer=optimizer, accuracy=1e-6, max_epochs=40).convergence
    assert report.windows[0].step_size == 0.1
    assert [group["lr"] for group in made[-1].param_groups] == [0.1, 0.01]
    assert report.windows[-1].step_size < 0.1


def test_a_step_size_that_is_far_too_large_is_lowered(brief):
    """The objective or its gradient is not finite, or the bound gets worse."""
    result = fit(optimizer=lambda p: torch.optim.SGD(p, lr=1e5), accuracy=1e-6, max_epochs=20)
    verdicts = [w.verdict for w in result.convergence.windows]
    assert verdicts[:2] == ["too large"] * 2
    assert verdicts[-1] != "too large"
    assert abs(errors()[0]) < 5


def test_a_gradient_that_is_never_finite_is_an_error(brief):
    def broken(x, y):
        z = pyro.sample("slope", dist.Normal(0.0, 3.0))
        pyro.factor("root", (z - z).sqrt() if torch.is_grad_enabled() else z * 0)
        with pyro.plate("data", 200, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(z * x, 0.7), obs=y)

    with pytest.raises(NonFiniteError, match="gradient"):
        pe.fit(broken, guide, (X, Y), lr="auto", batch_size=None, progress=False)


def test_amortized_guides_converge(brief):
    """The exact posterior of z given x has mean 0.8 x and variance 0.2."""
    encode = nn.Linear(1, 1)

    def rows(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def amortized(x):
        pyro.module("encode", encode)
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encode(x[:, None])[:, 0], scale))

    result = pe.fit(rows, amortized, X, lr="auto", accuracy=0.4, batch_size=50, progress=False)
    assert result.convergence.converged
    distances = (encode(X[:50, None])[:, 0] - 0.8 * X[:50]).abs() / 0.2**0.5
    assert distances.max() < 0.4
    assert pyro.param("scale").item() == pytest.approx(0.2**0.5, rel=0.3)


def test_the_end_is_told(brief, capsys):
    fit(progress=True, accuracy=1e-6, max_epochs=6)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("convergence: Not converged after")
    assert "Step sizes from 0.05" in last


BAD = {
    "lr": ({"lr": "fast"}, r'lr must be a finite number >= 0, or "auto", got \'fast\''),
    "accuracy 0": ({"accuracy": 0}, "accuracy must be a finite number > 0, got 0. It is the distance"),
    "accuracy negative": ({"accuracy": -1.0}, "accuracy must be a finite number"),
    "accuracy alone": ({"lr": 0.1}, "pass lr='auto', or leave accuracy out"),
    "scheduler": ({"scheduler": lambda o: None}, "leave scheduler out"),
    "accumulation": ({"accumulate_grad_batches": 2}, "Raise batch_size"),
    "precision": ({"precision": "bf16-mixed"}, "in the dtypes of the programs"),
    "devices": ({"devices": 2}, "on one device"),
    "epochs": (
        {"max_epochs": 2},
        r"The steps of lr='auto' \(max_epochs=2, 100 an epoch\) must be at least 3073, got 200",
    ),
    "steps": (
        {"max_steps": 100},
        r"The steps of lr='auto' \(max_steps=100, 100 an epoch\) must be at least 3073, got 100",
    ),
    "decay": ({"optimizer": lambda p: torch.optim.Adam(p, lr=0.0)}, "learning rate must be positive"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, untyped):
    settings, match = BAD[case]
    with pytest.raises(ArgumentError, match=match):
        fit(**settings)
