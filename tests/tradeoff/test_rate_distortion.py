"""The curve of the linear-Gaussian model is known; sweeps find it, go on, and refuse what is no rate."""

import os
import re
import signal

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray

import pyro_elbo as pe
from models.linear_gaussian import LinearGuide, simulate
from models.variational_dropout import LogUniform
from pyro_elbo.errors import ArgumentError, CheckpointError, DataError, SiteError
from pyro_elbo.tradeoff.curve import lower_hull
from tests.support.refusing import refusing
from tests.support.untyped import _untyped  # noqa: F401  (a fixture)

BETAS = (0.25, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0, 8.0)
MODEL, X = simulate(1000, d=4, k=2, orthogonal=True)
CURE = re.compile(r"\b(give|use|return|choose|sweep again|must be|put|expected)\b", re.I)
refuses = refusing(CURE)
QUIET = {"progress": False}


def terms(beta):
    """Terms of the best guide at a weight, without training."""
    with torch.no_grad():
        return pe.TraceBeta_ELBO(beta=beta).terms(MODEL, MODEL.tempered_guide(beta), X)


def trained(beta):
    guide = LinearGuide(*MODEL.weight.shape, full=False)
    loss = pe.TraceBeta_ELBO(beta=beta)
    return pe.fit(
        MODEL,
        guide,
        X,
        loss=loss,
        lr=0.1,
        batch_size=None,
        max_epochs=300,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300),
        **QUIET,
    )


@pytest.mark.slow
def test_a_sweep_of_trained_encoders_lies_on_the_analytic_curve():
    """Eight β; rate and distortion within 1 % of the closed form on the same data."""
    points = pe.sweep(trained, BETAS, num_samples=20, **QUIET)
    for beta in BETAS:
        rate, distortion = (x.item() for x in MODEL.rate_distortion(beta, X))
        found = points.sel(beta=beta)
        assert abs(found.rate / rate - 1) < 0.01, (beta, float(found.rate), rate)
        assert abs(found.distortion / distortion - 1) < 0.01, (beta, float(found.distortion), distortion)


def test_the_closed_form_is_that_of_the_model():
    """At β = 1 rate and distortion add up to -log p(x); the slope of the curve is -β."""
    rate, distortion = MODEL.rate_distortion(1.0, X)
    assert torch.isclose(rate + distortion, -MODEL.log_evidence(X).mean())
    for beta in BETAS:
        above, below = MODEL.rate_distortion(beta * 1.001, X), MODEL.rate_distortion(beta / 1.001, X)
        assert torch.isclose((above[1] - below[1]) / (below[0] - above[0]), torch.tensor(beta).double(), rtol=1e-3)


def test_points_of_the_best_guides():
    """One draw a row: rates and distortions within 4 SE of the closed form (16 figures: false alarm 1e-3)."""
    curve = pe.rate_distortion({beta: terms(beta) for beta in reversed(BETAS)})
    assert curve.points.beta.values.tolist() == list(BETAS)
    for beta in BETAS:
        rate, distortion = (x.item() for x in MODEL.rate_distortion(beta, X))
        found = curve.points.sel(beta=beta)
        assert abs(found.rate - rate) < 4 * found.rate_se
        assert abs(found.distortion - distortion) < 4 * found.distortion_se
        assert np.isclose(found.elbo, -found.rate - found.distortion)


def test_standard_errors_are_those_of_a_mean_over_rows():
    found = terms(1.0)
    point = pe.rate_distortion({1.0: found}).points.isel(beta=0)
    kl = found.kl["z"]
    assert np.isclose(point.rate, found.per_datum.rate.item())
    assert np.isclose(point.distortion, found.per_datum.distortion.item())
    assert np.isclose(point.rate_se, kl.std() / len(kl) ** 0.5)


def test_slopes_between_neighbors_lie_between_their_betas():
    exact = [MODEL.rate_distortion(beta, X) for beta in BETAS]
    columns = {n: ("beta", [0.0] * len(BETAS)) for n in ("rate_se", "distortion_se", "elbo", "elbo_se")}
    columns |= {n: ("beta", [e[i].item() for e in exact]) for i, n in enumerate(("rate", "distortion"))}
    curve = pe.rate_distortion(xarray.Dataset(columns, coords={"beta": list(BETAS)}))
    assert len(curve.hull) == len(BETAS)
    slopes = curve.slopes
    assert all(low < s < high for low, s, high in zip(BETAS[::-1][1:], slopes, BETAS[::-1], strict=False))


def test_the_hull_leaves_out_what_is_dominated():
    rate, distortion = np.array([0.0, 1.0, 1.0, 2.0, 3.0]), np.array([4.0, 1.0, 2.0, 0.9, 3.0])
    assert lower_hull(rate, distortion) == (0, 1, 3)
    curve = pe.rate_distortion({beta: terms(beta) for beta in (0.5, 1.0)}, entropy=1.5)
    data = curve.to_dataset()
    assert data.on_hull.all()
    assert data.attrs["entropy"] == 1.5
    assert "entropy 1.5" in repr(curve)
    assert "<table>" in curve._repr_html_()
    axes = curve.plot()
    assert "D + R = H" in [t.get_text() for t in axes.get_legend().get_texts()]
    assert curve.plot(axes) is axes


def test_points_below_the_entropy_are_named():
    """-log p(x) of the rows is their entropy under the model that is the truth, so that D + R touches it at β = 1."""
    found = {beta: terms(beta) for beta in (0.5, 1.0)}
    entropy = -MODEL.log_evidence(X).mean().item()
    fine = pe.rate_distortion(found, entropy=entropy)
    assert fine.below_entropy == ()
    assert "D + R < H" not in repr(fine)
    wrong = pe.rate_distortion(found, entropy=entropy + 1000.0)
    assert wrong.below_entropy == (0, 1)
    assert re.search(r"D \+ R < H at β = 0.5, 1, by up to (999|1000)[.\d]* nats: no code", repr(wrong))
    assert "D + R &lt; H" in wrong._repr_html_()
    alone = pe.rate_distortion({1.0: found[1.0]}, entropy=entropy)
    assert "of 1 fit in" in repr(alone)
    assert alone.plot().get_legend() is not None


def test_fits_name_their_beta_themselves():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.5)) * x, 0.7))

    def fit(beta):
        return pe.fit(model, guide, torch.randn(50), loss=pe.TraceBeta_ELBO(beta=beta), max_epochs=1, **QUIET)

    result = fit(2.0)
    assert pe.rate_distortion([result]).points.beta.item() == 2.0
    assert pe.rate_distortion([result, result]).points.beta.values.tolist() == [2.0, 2.0]
    assert pe.rate_distortion(result).points.equals(pe.rate_distortion({2.0: result}).points)
    with refuses(ArgumentError, "no single β"):
        pe.rate_distortion([fit(pe.LinearWarmup(0.0, 1.0, steps=1))])


def test_what_rows_share_is_shared_out():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(0.3, 0.1))

    found = pe.TraceBeta_ELBO().terms(model, guide, torch.randn(50))
    point = pe.rate_distortion({1.0: found}).points.isel(beta=0)
    assert np.isclose(point.rate, found.per_datum.rate.item())
    assert point.rate_se == 0
    assert np.isclose(point.distortion, found.per_datum.distortion.item())


def test_an_interrupted_sweep_goes_on_and_gives_the_same_points(tmp_path):
    whole, calls = pe.sweep(terms, BETAS, **QUIET), []

    def interrupted(beta):
        calls.append(beta)
        if len(calls) > 3:
            raise RuntimeError("out of patience")
        return terms(beta)

    with pytest.raises(RuntimeError, match="patience") as caught:
        pe.sweep(interrupted, BETAS, dir=tmp_path, **QUIET)
    assert caught.value.__notes__ == ["in fit(1)"]
    calls.clear()

    def counting(beta):
        calls.append(beta)
        return terms(beta)

    assert pe.sweep(counting, BETAS, dir=tmp_path, **QUIET).equals(whole)
    assert calls == list(BETAS[3:])
    assert pe.sweep(counting, (*BETAS[::-1], 9.0), dir=tmp_path, **QUIET).sizes["beta"] == 9
    assert calls[-1] == 9.0
    with refuses(CheckpointError, "seed", "overwrite=True"):
        pe.sweep(terms, BETAS, seed=1, dir=tmp_path, **QUIET)
    assert pe.sweep(terms, BETAS, num_workers=2, **QUIET).equals(whole)


def test_a_killed_worker_is_named_and_the_others_are_kept(tmp_path):
    def fit(beta):
        if beta == 2.0 and not (tmp_path / "disarmed").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return terms(beta)

    with refuses(ArgumentError, "fit(2.0)", "exit code -9"):
        pe.sweep(fit, BETAS, dir=tmp_path / "runs", num_workers=2, **QUIET)
    assert len(list((tmp_path / "runs").glob("beta-*.pt"))) == 7
    (tmp_path / "disarmed").touch()
    assert pe.sweep(fit, BETAS, dir=tmp_path / "runs", num_workers=2, **QUIET).equals(pe.sweep(terms, BETAS, **QUIET))


def test_the_log_uniform_prior_has_no_rate():
    def model(x):
        weight = pyro.sample("w", LogUniform())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(weight, 1.0), obs=x)

    def guide(x):
        pyro.sample("w", dist.Normal(pyro.param("theta", torch.tensor(0.5)), 0.1))

    result = pe.fit(model, guide, torch.randn(50), batch_size=None, max_epochs=1, **QUIET)
    with refuses(ArgumentError, "'w'", "LogUniform", "constant"):
        pe.rate_distortion([result])


def row(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def single(beta):
    return pe.TraceBeta_ELBO().terms(row, row_guide, torch.zeros(1))


def row_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))


def plateless(beta):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return pe.TraceBeta_ELBO().terms(model, lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)), torch.tensor(0.0))


@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_swept():
    for fit, betas, error, part in (
        (3, BETAS, ArgumentError, "fit must be"),
        (terms, [], ArgumentError, "betas"),
        (terms, [1.0, 1.0], ArgumentError, "different"),
        (terms, [-1.0], ArgumentError, "betas"),
        (terms, ["1"], ArgumentError, "betas"),
        (lambda beta: None, [1.0], ArgumentError, "fit(1)"),
        (single, [1.0], DataError, "fit(1)"),
        (plateless, [1.0], SiteError, "plate"),
    ):
        with refuses(error, part):
            pe.sweep(fit, betas, **QUIET)


@pytest.mark.usefixtures("untyped")
def test_what_is_no_curve():
    for results, part in (({}, "no fits"), ([], "no fits"), (3, "3"), ({"a": terms(1.0)}, "beta"), ({1.0: 2}, "2")):
        with refuses(ArgumentError, part):
            pe.rate_distortion(results)
    with refuses(ArgumentError, "distortion"):
        pe.rate_distortion(xarray.Dataset({"rate": ("beta", [1.0])}, coords={"beta": [1.0]}))
