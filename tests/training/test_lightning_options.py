"""What pe.fit passes on to Lightning: loggers, callbacks, accelerator, precision, steps, accumulation, schedulers."""

import csv

import lightning
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.optim import SGD, lr_scheduler

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError
from tests.support.compiled import _interpreted  # noqa: F401  (a fixture)
from tests.support.fitted import guide, model
from tests.support.untyped import _untyped  # noqa: F401  (a fixture)

X = torch.linspace(-1.0, 2.0, 24)


def fit(**options):
    settings = {"model": model, "guide": guide, "train": X, "max_epochs": 2, "batch_size": 4, "progress": False}
    return pe.fit(**settings | options)


class Watch(lightning.Callback):
    """The learning rate before every batch, and the number of optimizer steps after it."""

    def __init__(self):
        self.rates, self.steps = [], []

    def on_train_batch_start(self, trainer, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, *_):
        self.steps.append(trainer.global_step)


# --- steps ----------------------------------------------------------------------------------------------------


def test_a_schedule_moves_once_per_step_of_the_optimizer_under_accumulation():
    """6 batches an epoch in groups of 4: two steps, the second of the two batches that are left."""
    loss, watch = pe.TraceBeta_ELBO(pe.LinearWarmup(0.0, 1.0, steps=4)), Watch()
    result = fit(loss=loss, accumulate_grad_batches=4, callbacks=watch)
    assert watch.steps == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4]
    assert result.history.beta.values.ravel().tolist() == [0.5, 1.0]
    assert loss.step == 4
    with pytest.raises(ArgumentError, match=r"5 optimization steps, but 2 epochs of 2 steps"):
        fit(loss=pe.TraceBeta_ELBO(pe.LinearWarmup(0.0, 1.0, steps=5)), accumulate_grad_batches=4)


def test_accumulation_averages_the_gradients_of_its_batches():
    """KL(N(loc, 1) || N(0, 1)) and the likelihood are analytic in loc: one step of SGD over all rows, or over 6 parts.

    The gradient of the expected bound per datum is mean(x) - 2 loc; the noise of the draws cancels in neither, so both
    runs use a model without noise, where the guide's mean enters the likelihood.
    """

    def plain_model(x):
        loc = pyro.param("loc", torch.tensor(0.5, dtype=torch.float64))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    moved = []
    for options in ({"batch_size": None}, {"accumulate_grad_batches": 6}):
        pyro.clear_param_store()
        fit(model=plain_model, guide=lambda x: None, train=X.double(), max_epochs=1, optimizer=sgd, **options)
        moved.append(pyro.param("loc").item())
    assert moved == pytest.approx([0.5 + 0.1 * (X.mean().item() - 0.5)] * 2, rel=1e-6)


def sgd(parameters):
    return SGD(parameters, lr=0.1)


@pytest.mark.parametrize("steps", [2, 8])
def test_max_steps_ends_within_an_epoch_which_is_validated(steps):
    """6 steps an epoch."""
    result = fit(valid=X, max_steps=steps, max_epochs=5)
    assert result.loss.step == steps
    assert result.history.sizes["epoch"] == -(-steps // 6)
    assert not result.history.elbo.isnull().any()
    assert not result.stopped_early
    with pytest.raises(ArgumentError, match=r"at most 2, end at step 2"):
        fit(loss=pe.TraceBeta_ELBO(pe.LinearWarmup(0.0, 1.0, steps=3)), max_steps=2)


def test_a_run_that_max_steps_cut_off_within_an_epoch_is_not_resumed(tmp_path):
    fit(max_steps=8, dir=tmp_path)
    with pytest.raises(ArgumentError, match="ends within an epoch"):
        fit(max_steps=20, max_epochs=4, dir=tmp_path, resume=True)
    with pytest.raises(ArgumentError, match=r"holds 8 steps and max_steps=7"):
        fit(max_steps=7, max_epochs=4, dir=tmp_path, resume=True)
    assert fit(max_steps=8, max_epochs=4, dir=tmp_path, resume=True).loss.step == 8  # it has ended
    fit(max_steps=12, dir=tmp_path, overwrite=True)
    assert fit(max_steps=18, max_epochs=4, dir=tmp_path, resume=True).loss.step == 18


# --- schedulers of the learning rate --------------------------------------------------------------------------


def halve(interval):
    made = lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.5)  # noqa: E731
    return made if interval == "epoch" else lambda o: {"scheduler": made(o), "interval": interval, "frequency": 2}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_scheduler_moves_the_learning_rate(interval, compile, interpreted, tmp_path):
    """After every epoch of 6 steps, or after every second step."""
    watch = Watch()
    options = {"optimizer": sgd, "scheduler": halve(interval), "compile": compile}
    fit(callbacks=[watch], dir=tmp_path, **options)
    every = 6 if interval == "epoch" else 2
    expected = [0.1 * 0.5 ** (i // every) for i in range(18)]
    assert watch.rates == pytest.approx(expected[:12])
    again = Watch()
    fit(max_epochs=3, dir=tmp_path, resume=True, callbacks=[again], **options)
    assert again.rates == pytest.approx(expected[12:])


def test_a_plateau_of_the_validation_bound_lowers_the_rate():
    watch = Watch()

    def plateau(optimizer):
        never = {"threshold": 1e6, "threshold_mode": "abs"}  # nats that an epoch would have to gain
        return lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0, **never)

    fit(valid=X, max_epochs=3, optimizer=sgd, scheduler=plateau, callbacks=watch)
    assert watch.rates == pytest.approx([0.1] * 12 + [0.05] * 6)
    with pytest.raises(ArgumentError, match=r"ReduceLROnPlateau watches valid_elbo.*mode='max'"):
        fit(valid=X, scheduler=lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer))


# --- loggers, callbacks, machines -----------------------------------------------------------------------------


def test_loggers_get_the_numbers_of_the_history(tmp_path):
    result = fit(valid=X, logger=CSVLogger(tmp_path, name="a", version=0), callbacks=[LearningRateMonitor("epoch")])
    with (tmp_path / "a" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for split in ("train", "valid"):
        for name in ("elbo", "loss", "rate", "kl/z"):
            logged = [float(row[f"{split}_{name}"]) for row in rows if row[f"{split}_{name}"]]
            kept = result.history.kl.sel(latent="z") if name == "kl/z" else result.history[name]
            np.testing.assert_allclose(logged, kept.sel(split=split).values, rtol=1e-5)
    assert [row["train_beta/z"] for row in rows if row["train_beta/z"]] == ["1.0", "1.0"]
    assert any(row["lr-Adam"] for row in rows)


def test_callbacks_watch_the_bound_and_stop_training(tmp_path):
    frozen = {"optimizer": lambda params: SGD(params, lr=0.0)}
    keep = ModelCheckpoint(tmp_path, "mine", monitor="valid_elbo", mode="max")
    stop = EarlyStopping("valid_elbo", mode="max", patience=1)
    result = fit(valid=X, max_epochs=9, callbacks=[stop, keep], **frozen)
    assert result.history.sizes["epoch"] == 2
    assert result.stopped_early
    assert (tmp_path / "mine.ckpt").exists()


def test_precision_runs_the_programs_under_autocast():
    seen = set()

    def watching(x):
        seen.add(
            (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")) if torch.is_grad_enabled() else None
        )
        guide(x)

    fit(guide=watching, precision="bf16-mixed", accelerator="cpu", max_epochs=1)
    assert (True, torch.bfloat16) in seen
    assert pyro.param("loc").dtype == torch.float32
    seen.clear()
    fit(guide=watching, accelerator="cpu", max_epochs=1)
    assert not any(on for on, _ in seen - {None})


COVARIANCE = torch.eye(1000) + 0.01 * torch.ones(1000, 1000).tril(-1)
LIKELIHOODS = {
    "independent": lambda loc: dist.Normal(loc, torch.ones_like(loc)).to_event(1),
    "joint": lambda loc: dist.MultivariateNormal(loc, scale_tril=COVARIANCE.to(loc.dtype)),
}
OFF = {"independent": 1.0, "joint": 0.05}  # nats by which autocast alone is off at least


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_log_densities_are_in_full_precision_under_autocast(kind):
    """A layer gives its 1000 outputs in 8 bits of mantissa. Their densities are those of these outputs, to 24 bits."""
    torch.manual_seed(0)
    layer, x, outputs = torch.nn.Linear(3, 1000), torch.randn(4, 1000), []

    def wide_model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            outputs.append(layer(z))
            loc = outputs[-1] if kind == "independent" else outputs[-1].float()
            pyro.sample("x", LIKELIHOODS[kind](loc), obs=x)

    def wide_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(layer.weight.mean(0), 1.0).to_event(1))

    with torch.autocast("cpu", torch.bfloat16):
        terms = pe.TraceBeta_ELBO().checked_terms(wide_model, wide_guide, (x,), {})
        half = LIKELIHOODS[kind](outputs[0] if kind == "independent" else outputs[0].float()).log_prob(x.bfloat16())
    exact = LIKELIHOODS[kind](outputs[0].double()).log_prob(x.double())
    assert outputs[0].dtype == torch.bfloat16
    assert terms.log_likelihood["x"].dtype == torch.float32
    assert (terms.log_likelihood["x"] - exact).abs().max() < 1e-5 * exact.abs().max()
    assert (half - exact).abs().max() > OFF[kind]


class Remember(lightning.Callback):
    def on_fit_start(self, trainer, pl_module):
        self.kind = type(trainer.accelerator).__name__


def test_the_accelerator_is_lightnings():
    remember = Remember()
    fit(accelerator="cpu", callbacks=remember, max_epochs=1)
    assert remember.kind == "CPUAccelerator"
    if not torch.cuda.is_available():
        with pytest.raises(ArgumentError, match="Lightning cannot train so.*CUDA"):
            fit(accelerator="cuda")


WRONG = {
    "logger": (True, "logger must be a Logger of Lightning or a list of them.*CSVLogger.*got True"),
    "logger of another kind": ([3], "logger must be a Logger.*got 3"),
    "callbacks": ([print], "callbacks must be a Callback of Lightning"),
    "accelerator": ("abacus", r"accelerator must be one of auto, gpu, cpu.*got 'abacus' \(str\)"),
    "accelerator of another type": (1, "accelerator must be one of.*got 1"),
    "precision": ("64-true", r"precision must be one of 32-true, bf16-mixed, 16-mixed, got '64-true'"),
    "max_steps": (0, "max_steps, unless it is None, must be a whole number >= 1, got 0"),
    "accumulate_grad_batches": (1.5, "accumulate_grad_batches must be a whole number >= 1, got 1.5"),
    "restore_best": ("yes", "restore_best must be True, False or None, got 'yes'"),
    "scheduler": (lr_scheduler.StepLR(SGD([torch.zeros(1)]), 1), "scheduler must be a function.*got a StepLR instance"),
    "scheduler name": ("cosine", "scheduler must be a function from the optimizer.*'cosine'"),
    "scheduler of nothing": (lambda optimizer: None, "scheduler must return a scheduler of torch.*got None"),
    "scheduler of another": (
        lambda _: lr_scheduler.StepLR(SGD([torch.zeros(1)]), 1),
        "the optimizer that it is called",
    ),
    "scheduler interval": (
        lambda o: {"scheduler": lr_scheduler.StepLR(o, 1), "interval": "batch"},
        "interval must be 'epoch' or 'step', got 'batch'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_before_training(name, untyped):
    value, match = WRONG[name]
    with pytest.raises(ArgumentError, match=match):
        fit(**{name.split()[0]: value})


def test_arguments_that_exclude_each_other():
    for options, match in (
        ({"compile": True, "accumulate_grad_batches": 2}, "a compiled step is one batch"),
        ({"compile": True, "precision": "bf16-mixed"}, "a compiled step has the dtypes of the programs"),
        ({"devices": 2, "accelerator": "gpu"}, "2 processes train on the CPU"),
        ({"restore_best": True}, "restore_best needs validation data"),
    ):
        with pytest.raises(ArgumentError, match=match):
            fit(**options)
