"""Workers, folders, failures, and everything that is refused."""

import os
import re
import signal

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, CheckpointError, GuideError, SiteError
from tests.calibration.programs import AutoNormalFit, Y, exact, normal
from tests.support.refusing import refusing
from tests.support.untyped import _untyped  # noqa: F401  (a fixture)

CURE = re.compile(r"\b(give|use|pass|return|choose|write|must be|put)\b", re.I)
refuses = refusing(CURE)
FEW = {"num_simulations": 20, "num_draws": 19, "progress": False}


def calibrate(fit, model=normal, *args, **options):
    return pe.simulation_based_calibration(model, fit, *(args or (Y,)), **FEW | options)


def test_ranks_do_not_depend_on_the_number_of_workers():
    one, two = (calibrate(exact, num_workers=n) for n in (1, 2))
    assert one.positions.equals(two.positions)
    assert not one.positions.equals(calibrate(exact, seed=1).positions)


@pytest.mark.slow
def test_a_compiled_svi_that_begins_again_gives_the_same_ranks_in_every_process():
    one, two = (calibrate(AutoNormalFit(normal, 50, compile=True), num_workers=n) for n in (1, 2))
    assert one.positions.equals(two.positions)


def test_the_callers_store_generator_and_threads_come_back():
    pyro.param("mine", torch.tensor(1.0))
    state, threads = torch.get_rng_state(), torch.get_num_threads()

    def fit(y):
        assert "mine" not in pyro.get_param_store()
        pyro.param("theirs", torch.tensor(2.0))
        torch.rand(3)
        return exact(y)

    calibrate(fit)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_failures_are_counted_and_named():
    calls = []

    def fit(y):
        calls.append(y)
        if len(calls) in (3, 4):  # the first is not counted
            raise RuntimeError("diverged")
        return exact(y)

    found = calibrate(fit, num_simulations=25)
    assert found.failures == {1: "RuntimeError: diverged", 2: "RuntimeError: diverged"}
    assert found.ranks.sizes["simulation"] == 23
    assert 1 not in found.ranks.simulation
    assert "2 failed" in repr(found)
    assert "Failed: [1, 2]. Simulation 1: RuntimeError: diverged" in repr(found)


def test_an_interrupted_run_goes_on_and_gives_the_same_ranks(tmp_path):
    whole, calls = calibrate(exact), []

    def interrupted(y):
        calls.append(y)
        if len(calls) > 8:
            raise KeyboardInterrupt
        return exact(y)

    with pytest.raises(KeyboardInterrupt):
        calibrate(interrupted, dir=tmp_path)
    assert len(list(tmp_path.glob("simulation-*.pt"))) == 7
    calls.clear()

    def counting(y):
        calls.append(y)
        return exact(y)

    assert calibrate(counting, dir=tmp_path).positions.equals(whole.positions)
    assert len(calls) == 13 + 1
    calls.clear()
    assert calibrate(counting, dir=tmp_path).positions.equals(whole.positions)
    assert not calls
    more = calibrate(counting, dir=tmp_path, num_simulations=22)
    assert len(calls) == 2 + 1
    assert more.positions.isel(simulation=slice(20)).equals(whole.positions)


def test_a_killed_worker_loses_the_simulation_that_it_was_at(tmp_path):
    whole = calibrate(exact, num_simulations=24)
    target = whole.truth["mean"].values[5]

    def fit(y):
        if (tmp_path / "armed").exists() and abs(float(y.mean()) - means[5]) < 1e-12:
            os.kill(os.getpid(), signal.SIGKILL)
        return exact(y)

    means = {}

    def recording(y):
        means[len(means) - 1] = float(y.mean())  # the first is not counted
        return exact(y)

    calibrate(recording, num_simulations=24)
    (tmp_path / "armed").touch()
    found = calibrate(fit, num_simulations=24, num_workers=2, dir=tmp_path / "runs")
    assert list(found.failures) == [5]
    assert "exit code -9" in found.failures[5]
    (tmp_path / "armed").unlink()
    again = calibrate(fit, num_simulations=24, num_workers=2, dir=tmp_path / "runs")
    assert again.positions.equals(whole.positions)
    assert again.truth["mean"].values[5] == target


def test_folders_of_other_settings_and_of_others_are_refused(tmp_path):
    calibrate(exact, dir=tmp_path / "a")
    for options, name in (({"seed": 1}, "seed"), ({"num_draws": 29}, "num_draws")):
        with refuses(CheckpointError, name, "overwrite=True"):
            calibrate(exact, dir=tmp_path / "a", **options)
    with refuses(CheckpointError, "arguments"):
        calibrate(exact, normal, Y + 1, dir=tmp_path / "a")
    assert calibrate(exact, dir=tmp_path / "a", seed=1, overwrite=True).ranks.sizes["simulation"] == 20
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    for overwrite in (False, True):
        with refuses(CheckpointError, "thesis.tex", "settings.json"):
            calibrate(exact, dir=tmp_path / "b", overwrite=overwrite)
    with pytest.raises(CheckpointError, match="is a file"):
        calibrate(exact, dir=tmp_path / "b" / "thesis.tex")
    (tmp_path / "a" / "settings.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        calibrate(exact, dir=tmp_path / "a")


def guide_of_nothing(y):
    return lambda y: None


def delta(y):
    return lambda y: pyro.sample("mean", dist.Delta(y.sum() / 6))


RETURNS = {
    "nothing": (lambda y: None, ArgumentError, "None"),
    "a number": (lambda y: 3.0, ArgumentError, "3.0"),
    "no latent": (guide_of_nothing, GuideError, "'mean'"),
    "a point": (delta, GuideError, "'mean'"),
    "few draws": (lambda y: {"mean": torch.randn(5)}, ArgumentError, "(5,)"),
    "wrong shape": (lambda y: {"mean": torch.randn(50, 2)}, ArgumentError, "(2,)"),
    "another site": (lambda y: {"z": torch.randn(50)}, GuideError, "'mean'"),
}


@pytest.mark.parametrize("case", RETURNS)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_a_fit_must_not_return(case, num_workers):
    fit, error, part = RETURNS[case]
    with refuses(error, part):
        calibrate(fit, num_workers=num_workers)


def test_auto_delta_is_refused():
    def fit(y):
        guide = AutoDelta(normal)
        guide(y)
        return guide

    with refuses(GuideError, "'mean'"):
        calibrate(fit)


def test_draws_that_are_not_finite_are_failures():
    with refuses(ArgumentError, "20 of 20", "NonFiniteError"):
        calibrate(lambda y: {"mean": torch.full((50,), torch.nan)})


def subsampled(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y[rows])


def with_factor(y):
    normal(y)
    pyro.factor("more", torch.tensor(1.0))


def flat(y):
    mean = pyro.sample("mean", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(mean, 1.0).expand([5]).to_event(1), obs=y)


def transformed(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y + 1)


def no_latent(y):
    pyro.sample("y", dist.Normal(0.0, 1.0).expand([5]).to_event(1), obs=y)


def conditioned(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    mean = pyro.sample("mean", dist.Normal(a, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


MODELS = {
    "subsample": (subsampled, SiteError, "2 of its 5 rows"),
    "factor": (with_factor, SiteError, "'more'"),
    "scale": (poutine.scale(normal, scale=2.0), SiteError, "scale"),
    "flat prior": (flat, ArgumentError, "prior"),
    "transformed data": (transformed, ArgumentError, "'y'"),
    "no latent": (no_latent, SiteError, "latents and data"),
    "conditioned": (poutine.condition(conditioned, {"mean": torch.tensor(0.0)}), SiteError, "'mean'"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_that_do_not_generate_their_data_are_refused(case):
    model, error, part = MODELS[case]
    with refuses(error, part):
        calibrate(exact, model)


@pytest.mark.parametrize(
    "options",
    [{"num_simulations": 19}, {"num_draws": 18}, {"num_workers": 0}, {"seed": -1}, {"false_alarm": 1.0}, {"dir": 3}],
)
@pytest.mark.usefixtures("untyped")
def test_bad_options_are_refused(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        calibrate(exact, **options)


@pytest.mark.usefixtures("untyped")
def test_a_fit_must_be_a_function():
    with refuses(ArgumentError, "fit must be a function"):
        calibrate("fit")


def test_two_equal_arguments_have_no_place_for_data():
    def model(x, y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mean, 1.0).expand([5]).to_event(1), obs=y.clone())

    with refuses(ArgumentError, "more than one"):
        calibrate(exact, model, Y, Y.clone())
