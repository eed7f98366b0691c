"""Full-batch fits without Lightning's loops: the same numbers as with them."""

import signal

import lightning
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pyro_elbo as pe

X = torch.linspace(-1.0, 1.0, 30).reshape(10, 3)
Y = torch.linspace(0.0, 2.0, 10)


def model(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)


class Spy(lightning.Callback):
    """A callback: Lightning then runs the epochs."""

    def __init__(self):
        self.epochs = 0

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs += 1


def fitted(beta=1.0, **options):
    pyro.clear_param_store()
    guide, loss = AutoNormal(model), pe.TraceBeta_ELBO(beta=beta, num_particles=2)
    options = {"loss": loss, "batch_size": None, "max_epochs": 12, "progress": False, **options}
    result = pe.fit(model, guide, (X, Y), **options)
    return result, [p.detach().clone() for p in guide.parameters()]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grad_clip": 0.1, "seed": 3},
        {"max_steps": 7, "beta": pe.LinearWarmup(0.1, 1.0, steps=5)},
    ],
)
def test_a_fit_without_lightning_has_the_numbers_of_one_with_it(options, compile):
    ours, parameters = fitted(compile=compile, **options)
    spy = Spy()
    theirs, expected = fitted(compile=compile, callbacks=spy, **options)
    assert spy.epochs == ours.history.sizes["epoch"] == options.get("max_steps", 12)
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))
    assert ours.history.identical(theirs.history)
    assert ours.stopped_early == theirs.stopped_early


def test_a_course_of_epochs_stops_for_probes_and_seeds_what_the_graph_draws(monkeypatch):
    """Gamma draws are made inside of the graph, whose epochs then run one by one. Probes become rarer."""
    from pyro_elbo.training import lightning as adapter

    monkeypatch.setitem(adapter.PROBE_EVERY, True, 1)

    def rates(x):
        r = pyro.sample("r", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(r), obs=x)

    def guide(x):
        a = pyro.param("a", torch.tensor(2.0), constraint=dist.constraints.positive)
        pyro.sample("r", dist.Gamma(a, a))

    def history(**options):
        pyro.clear_param_store()
        counts = torch.tensor([1.0, 3.0, 2.0])
        return pe.fit(
            rates, guide, counts, batch_size=None, max_epochs=60, compile=True, progress=False, **options
        ).history

    ours, theirs = history(), history(callbacks=Spy())
    assert ours.identical(theirs)
    assert ours.gradient_norm.dropna("epoch").epoch.values.tolist() == [0, 4, 8, 12, 16, 20, 25, 31, 39, 49, 59]


@pytest.mark.parametrize("draws", [0, 20], ids=["none", "many"])
def test_epochs_of_programs_without_draws_or_with_many_have_the_numbers_of_lightnings(draws):
    """So do those before and after a schedule has settled."""

    def target(x, y):
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        u = pyro.sample("u", dist.Normal(torch.zeros(20), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ b + u.sum(), 1.0), obs=y)

    def history(**options):
        pyro.clear_param_store()
        guide = (AutoNormal if draws else AutoDelta)(target)
        loss = pe.TraceBeta_ELBO(beta=pe.LinearWarmup(0.1, 1.0, steps=30), kl="sampled")
        options = {"loss": loss, "batch_size": None, "max_epochs": 70, "compile": True, "progress": False, **options}
        return pe.fit(target, guide, (X, Y), **options).history

    assert history().identical(history(callbacks=Spy()))


def test_ctrl_c_ends_a_course_of_epochs_with_a_result(monkeypatch):
    """The epochs that are being computed are finished first."""
    from pyro_elbo.compile import executable

    def press(seeds, *arguments):
        draw(seeds, *arguments)
        if len(seeds) > 50 and not pressed:
            pressed.append(len(seeds))
            signal.raise_signal(signal.SIGINT)

    draw, usual, pressed = executable.draw, signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(executable, "draw", press)
    result, _ = fitted(compile=True, max_epochs=10**8)
    epochs = result.history.epoch.values
    assert result.stopped_early
    assert len(epochs) > 50
    assert result.loss.step == len(epochs) == epochs[-1] + 1
    assert result.history.elbo.sel(split="train").notnull().all()
    assert signal.getsignal(signal.SIGINT) is usual


def test_what_has_to_be_watched_runs_on_lightning(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise RuntimeError("Lightning runs")

    monkeypatch.setattr(lightning.Trainer, "fit", refuse)
    fitted()
    constant = lambda made: torch.optim.lr_scheduler.ConstantLR(made)  # noqa: E731
    for options in ({"callbacks": Spy()}, {"valid": (X, Y)}, {"dir": tmp_path}, {"scheduler": constant}):
        with pytest.raises(RuntimeError, match="Lightning runs"):
            fitted(**options)


def test_the_progress_bar_shows_the_bound(capsys):
    fitted(progress=True)
    assert "elbo=" in capsys.readouterr().err
