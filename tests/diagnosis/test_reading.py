"""Histories as a user may have left them: parts, other orders, figures that are missing or not known in all epochs."""

import inspect

import numpy as np
import pytest
import torch
import xarray

import pyro_elbo as pe
from pyro_elbo.diagnosis.reading import PROBED, TOTALS
from pyro_elbo.errors import ArgumentError
from tests.diagnosis.histories import CASES, EPOCHS, T, history

diagnose, plot_history = inspect.unwrap(pe.diagnose), inspect.unwrap(pe.plot_history)  # without the tests' type checks
READERS = pytest.mark.parametrize("read", [diagnose, plot_history])
COMPARED = ("healthy", "overfitting", "KL shrinkage", "diverging", "dead decoder")


@READERS
@pytest.mark.parametrize("wrong", [{"elbo": [1.0]}, None, 3.0, torch.zeros(3), xarray.DataArray(3.0)])
def test_what_is_no_history_is_refused(read, wrong):
    with pytest.raises(
        ArgumentError, match=rf"^{read.__name__}: history must be a history over epoch, split and latent.*pe\.fit"
    ):
        read(wrong)


REFUSED = {
    "no epochs": (lambda h: h.isel(epoch=slice(0)), "no epochs"),
    "a dimension less": (lambda h: h.sel(split="train"), r'without split\..*split=\["train"\]'),
    "no labels": (lambda h: h.drop_vars(["epoch", "split", "latent"]), "labels some epoch not at all"),
    "twice": (lambda h: xarray.concat([h, h], "epoch"), "labels some epoch twice"),
    "epochs by name": (lambda h: h.assign_coords(epoch=[f"e{i}" for i in T]), "epochs of a history are numbers"),
    "validation alone": (lambda h: h.sel(split=["valid"]), r"'train', from which .*got \['valid'\]"),
    "another split": (lambda h: h.assign_coords(split=["train", "test"]), r"got \['train', 'test'\]"),
    "text": (lambda h: h.assign(elbo=h.elbo.astype(str)), "expected numbers in 'elbo'"),
    "other dimensions": (lambda h: h.assign(rate=h.rate.mean("split")), "'rate' of the history over .*'split'"),
}


@READERS
@pytest.mark.parametrize("name", REFUSED)
def test_a_history_from_which_nothing_can_be_judged_is_refused(read, name):
    part, message = REFUSED[name]
    with pytest.raises(ArgumentError, match=f"^{read.__name__}: .*{message}"):
        read(part(history()))


@READERS
@pytest.mark.parametrize("name", TOTALS)
def test_a_figure_that_every_history_has_is_asked_for(read, name):
    with pytest.raises(ArgumentError, match=f"without {name}"):
        read(history().drop_vars(name))


@pytest.mark.parametrize("case", COMPARED)
@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.transpose(),
        lambda h: h.isel(epoch=slice(None, None, -1)),
        lambda h: h.isel(epoch=np.random.default_rng(0).permutation(EPOCHS)),
        lambda h: h.isel(split=[1, 0]),
    ],
)
def test_order_does_not_matter(case, change):
    seen = history(**CASES[case])
    assert str(pe.diagnose(change(seen))) == str(pe.diagnose(seen))


@pytest.mark.parametrize("case", ["healthy", "not converged", "diverging", "dead decoder"])
def test_training_alone_is_a_history_without_validation(case):
    seen = history(**CASES[case])
    found = pe.diagnose(seen.sel(split=["train"]))
    assert str(found) == str(pe.diagnose(history(splits=("train",), **CASES[case])))
    assert found.names == (case,)
    assert "whether it overfits" in found.unsaid[0]
    assert len(plot_history(seen.sel(split=["train"]))[0].lines) >= 2


@pytest.mark.parametrize("name", sorted({*PROBED} & {*history().data_vars}))
@pytest.mark.parametrize("case", CASES)
def test_without_a_probed_figure_the_rest_is_judged(case, name):
    """Nothing is found that the whole history does not show, and no error of NumPy or xarray comes through."""
    found = pe.diagnose(history(**CASES[case]).drop_vars(name))
    assert set(found.names) <= {case, "healthy", "diverging" if case == "noisy objective" else case}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["elbo", "distortion", "rate", "loss"])
@pytest.mark.parametrize("part", [slice(36, None), slice(0, 4), slice(12, 15), slice(1, None, 2)])
def test_validation_that_is_known_in_some_epochs_is_compared_in_these(name, part, value):
    for case in COMPARED:
        seen = history(**CASES[case])
        seen[name].loc[{"split": "valid", "epoch": T[part]}] = value
        assert pe.diagnose(seen).names == (case,)


def test_a_curve_is_compared_in_its_own_epochs():
    """Validation in every third epoch falls behind as it does when all epochs are known."""
    seen = history(**CASES["overfitting"])
    (whole,) = pe.diagnose(seen).findings
    seen["elbo"].loc[{"split": "valid", "epoch": T[T % 3 != 0]}] = np.nan
    (third,) = pe.diagnose(seen).findings
    assert third.evidence["gap"] == pytest.approx(whole.evidence["gap"], rel=0.1)
    assert abs(third.since - whole.since) <= 3


def test_validation_of_earlier_weights_alone_is_none():
    seen = history(beta=np.where(T < 20, 1.0, 1.4))
    seen["elbo"].loc[{"split": "valid", "epoch": T[10:]}] = np.nan
    assert pe.diagnose(seen).unsaid == pe.diagnose(history(splits=("train",))).unsaid


@pytest.mark.parametrize("part", [slice(None), slice(10, 20)])
def test_the_kl_of_what_rows_share_may_be_unknown(part):
    """As where the guide draws all latents together; without units, probes tell that rows share the latent."""
    seen = history().drop_dims("unit").copy(deep=True)
    seen["kl"].loc[{"split": "valid", "epoch": T[part]}] = np.nan
    assert pe.diagnose(seen).names == ("healthy",)


def test_rows_exchanged_in_some_probes_only_are_judged_by_these():
    seen = history(**CASES["dead decoder"])
    seen["swapped_distortion"].loc[{"epoch": EPOCHS - 1}] = np.nan
    assert pe.diagnose(seen).names == ("dead decoder",)


def test_a_result_is_read_by_its_history():
    class Result:
        def __init__(self, history):
            self.history = history

    seen = history()
    assert len(plot_history(Result(seen))[0].lines) == len(plot_history(seen)[0].lines)
