"""The gap between training and validation rows: exact on linear-Gaussian programs, its standard error by repetition."""

import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal

import pyro_elbo as pe
from models.linear_gaussian import simulate
from pyro_elbo.diagnosis import Gap
from pyro_elbo.errors import ArgumentError, DataError, SiteError
from tests.support.refusing import refusing
from tests.support.untyped import _untyped  # noqa: F401  (a fixture)

refuses = refusing(re.compile("Put |Give |at least|must be|Look for"))
LG, X = simulate(90, d=4, k=3)
ENCODER = LG.encoder.clone()


def guide(x, shrink=1.0):
    with pyro.plate("data", len(x)):
        loc = shrink * (x - LG.mean) @ ENCODER.T
        pyro.sample("z", dist.Normal(loc, 0.4).to_event(1))


def terms(model, guide, *args, loss=None, seed=0, **kwargs):
    pyro.set_rng_seed(seed)
    return (loss or pe.TraceBeta_ELBO()).terms(model, guide, *args, **kwargs)


def known_rows(x, z):
    """Log-likelihood, and KL by dimension, of every row at the draws z: the formulas."""
    loc = (x - LG.mean) @ ENCODER.T
    residual = (x - z @ LG.weight.T - LG.mean) / LG.noise
    fit = -0.5 * residual.square().sum(1) - x.shape[1] * math.log(LG.noise * math.sqrt(2 * math.pi))
    return fit, (0.4**2 + loc.square() - 1) / 2 - math.log(0.4)


def test_gaps_of_a_linear_gaussian_model():
    known, found = [], []
    for x in (X[:30], LG.mean + 2 * (X[30:] - LG.mean)):
        drawn = poutine.trace(guide).get_trace(x)
        known.append(known_rows(x, drawn.nodes["z"]["value"]))
        found.append(terms(LG, poutine.replay(guide, trace=drawn), x))
    (fit, kl), (other_fit, other_kl) = known
    comparison = pe.compare_splits(*found)
    assert comparison.rows == (30, 60)

    def check(gap, train, valid, sign):
        error = (train.var() / 30 + valid.var() / 60).sqrt()
        expected = (train.mean(), valid.mean(), sign * (train.mean() - valid.mean()), error)
        np.testing.assert_allclose((gap.train, gap.valid, gap.gap, gap.standard_error), expected, rtol=1e-10)

    check(comparison.elbo, fit - kl.sum(1), other_fit - other_kl.sum(1), 1)
    check(comparison.distortion, -fit, -other_fit, -1)
    check(comparison.rate, kl.sum(1), other_kl.sum(1), -1)
    check(comparison.log_likelihood["x"], fit, other_fit, 1)
    check(comparison.kl["z"], kl.sum(1), other_kl.sum(1), -1)
    for i in range(3):
        check(comparison.kl_per_dim["z"][f"z[{i}]"], kl[:, i], other_kl[:, i], -1)
    assert comparison.elbo.gap > 2


def test_standard_errors_are_the_spread_over_repetitions():
    """Both splits come from the model, so that every gap is 0 but for noise."""
    generator, gaps, errors, clear = torch.Generator().manual_seed(0), [], [], []
    repetitions, normal = 150, lambda *shape: torch.randn(*shape, generator=generator).double()
    for seed in range(repetitions):
        x = normal(50, 3) @ LG.weight.T + LG.mean + LG.noise * normal(50, 4)
        found = pe.compare_splits(*(terms(LG, guide, part, seed=seed) for part in (x[:20], x[20:])))
        parts = (found.elbo, found.distortion, found.rate, *found.kl_per_dim["z"].values())
        gaps.append([part.gap for part in parts])
        errors.append([part.standard_error**2 for part in parts])
        clear.append([part.is_clear for part in parts])
    gaps, variance = np.array(gaps), np.mean(errors, 0)
    # of six parts, 5 standard errors: false alarms in three of a million seeds
    assert (np.abs(gaps.mean(0)) < 5 * gaps.std(0) / repetitions**0.5).all()
    assert (np.abs(gaps.var(0, ddof=1) / variance - 1) < 5 * (2.5 / repetitions) ** 0.5).all()
    assert 0.01 < np.mean(clear) < 0.11


def rows(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def vector_model(x, scale=1.0):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with poutine.scale(scale=scale):
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def vector_guide(x, scale=1.0):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.stack([x, -x], -1) / 3, 0.8).to_event(1))


def masked(program):
    def run(x):
        with poutine.mask(mask=x > -1.0):
            program(x)

    return run


def minibatch(program):
    def run(x):
        with pyro.plate("data", 1000, subsample=torch.arange(len(x))):
            if program is vector_model:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            else:
                pyro.sample("z", dist.Normal(x / 2, 0.8))

    return run


def nested_model(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("repeats", 3, dim=-2):
            u = pyro.sample("u", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(u, 1.0), obs=x.expand(3, -1))
        pyro.sample("y", dist.Normal(z, 2.0), obs=x)


def nested_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x / 2, 1.0))
        with pyro.plate("repeats", 3, dim=-2):
            pyro.sample("u", dist.Normal(x / 2, 0.5))


def chain_model(x, lengths):
    with pyro.plate("data", len(x)):

        def step(carry, x_t):
            z = pyro.sample("z", dist.Normal(carry, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x_t)
            return z, None

        pe.scan(step, torch.zeros(len(x), 2), x, lengths=lengths, dim=1)


def chain_guide(x, lengths):
    with pyro.plate("data", len(x)):

        def step(carry, x_t):
            z = pyro.sample("z", dist.Normal((carry + x_t.unsqueeze(-1)) / 3, 0.8).to_event(1))
            return z, None

        pe.scan(step, torch.zeros(len(x), 2), x, lengths=lengths, dim=1)


def drawn_guide(x):
    """One draw for a row, passed on at z."""
    with pyro.plate("data", len(x)):
        drawn = pyro.sample("raw", dist.Normal(x / 3, 0.8), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(drawn))


def scalar_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def no_guide(x):
    pass


def no_model(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


PROGRAMS = {
    "vector": (vector_model, vector_guide, {}),
    "loop of particles": (vector_model, vector_guide, {"num_particles": 3}),
    "vectorized particles": (
        vector_model,
        vector_guide,
        {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1},
    ),
    "at the draw": (vector_model, vector_guide, {"kl": "sampled", "num_particles": 2}),
    "masked": (masked(vector_model), masked(vector_guide), {"num_particles": 2}),
    "minibatch": (minibatch(vector_model), minibatch(vector_guide), {}),
    "scaled": (
        lambda x: vector_model(x, torch.linspace(0.5, 1.5, len(x))),
        lambda x: vector_guide(x, torch.linspace(0.5, 1.5, len(x))),
        {},
    ),
    "nested": (nested_model, nested_guide, {"num_particles": 2}),
    "auxiliary": (scalar_model, drawn_guide, {}),
    "AutoNormal": (scalar_model, None, {}),
    "no latents": (no_model, no_guide, {}),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_means_over_rows_are_the_figures_per_datum(name):
    model, guide, settings = PROGRAMS[name]
    loss, found = pe.TraceBeta_ELBO(**settings), []
    for n in (20, 31):
        pyro.clear_param_store()
        found.append(terms(model, guide or AutoNormal(model), rows(n), loss=loss))
    comparison = pe.compare_splits(*found)
    for split, each in zip(("train", "valid"), found, strict=True):
        for part in ("elbo", "distortion", "rate"):
            expected = getattr(each.per_datum, part).item()
            assert math.isclose(getattr(getattr(comparison, part), split), expected, rel_tol=1e-5, abs_tol=1e-6)
        for site, units in comparison.kl_per_dim.items():
            total = sum(getattr(gap, split) for gap in units.values())
            assert math.isclose(total, getattr(comparison.kl[site], split), rel_tol=1e-5)
    assert comparison.rows == (20, 31)
    assert not comparison.shared
    assert math.isclose(comparison.elbo.gap, comparison.distortion.gap + comparison.rate.gap, abs_tol=1e-9)
    assert set(comparison.kl_per_dim) == ({"z"} if guide is vector_guide or name in ("masked", "scaled") else set())


def test_ragged_sequences_count_whole_rows_and_say_where_their_lengths_differ():
    x, lengths = rows(60).view(12, 5), torch.arange(12) % 3 + 1
    found = [terms(chain_model, chain_guide, *part) for part in ((x, lengths), (x[:, :3], lengths))]
    comparison = pe.compare_splits(*found)
    for split, each in zip(("train", "valid"), found, strict=True):
        assert math.isclose(getattr(comparison.elbo, split), each.per_datum.elbo.item(), rel_tol=1e-5)
        ours = torch.tensor([getattr(gap, split) for gap in comparison.kl_per_dim["z"].values()])
        torch.testing.assert_close(ours, each.kl_per_dim["z"].sum((0, 1)).detach() / 12)
    assert not comparison.notes
    (note,) = pe.compare_splits(found[0], terms(chain_model, chain_guide, x, lengths + 2)).notes
    assert "2.0 entries of 'x' in training and 4.0 in validation" in note


def shared_model(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w.sum(), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    pyro.factor("soft", -w.square().sum())


def shared_guide(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 0.5).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((w.sum() + x) / 2, 0.7))


def regression(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)


def test_what_all_rows_share_stands_apart():
    found = [terms(shared_model, shared_guide, rows(n)) for n in (20, 31)]
    comparison = pe.compare_splits(*found)
    kl = 3 * ((0.5**2 - 1) / 2 - math.log(0.5))
    assert set(comparison.shared) == {"kl w", "log_likelihood soft"}
    assert comparison.shared["kl w"] == pytest.approx((kl, kl))
    shared = sum(each.kl_total["w"] - each.log_likelihood_total["soft"] for each in found[:1]).item()
    assert comparison.elbo.train == pytest.approx((found[0].elbo.item() + shared) / 20, rel=1e-5)
    assert list(comparison.kl) == ["z"]
    assert "kl w, in total" in str(comparison)


def test_shared_latents_that_are_drawn_together_are_one_total():
    guide = AutoMultivariateNormal(regression, init_scale=0.5)
    found = [terms(regression, guide, rows(n)) for n in (20, 31)]
    comparison = pe.compare_splits(*found)
    assert comparison.shared == {
        "kl _AutoMultivariateNormal_latent": pytest.approx([each.rate.item() for each in found], rel=1e-5)
    }
    assert comparison.rate == Gap(0.0, 0.0, 0.0, 0.0)


def compare(train, valid, noise=1.0):
    """Compare rows of z + noise whose posterior mean is ``scale`` times x."""

    def model(x, scale):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), noise), obs=x)

    def guide(x, scale):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(scale * torch.stack([x, x], -1), 0.6).to_event(1))

    return pe.compare_splits(*(terms(model, guide, *split) for split in (train, valid)))


def test_reading_names_the_part_behind_the_gap():
    x, other = 2 * rows(400), 2 * rows(400, seed=1)
    same = compare((x, 0.3), (other, 0.3))
    assert same.reading.startswith("No gap beyond noise")
    drawn_in = compare((x, 0.3), (other, 0.1))
    assert drawn_in.distortion.gap > drawn_in.elbo.gap > 0 > drawn_in.rate.gap
    assert not drawn_in.kl_shrinkage
    assert "The distortion explains it. The KL of a validation row is" in drawn_in.reading
    assert "smaller: the encoder draws rows that it has not seen toward the prior" in drawn_in.reading
    spread = compare((x, 0.3), (other, 0.9), noise=0.4)
    assert not spread.kl_shrinkage
    assert re.search(r"The distortion explains \d+% of it and the rate \d+%\. The KL .* nats larger\.$", spread.reading)
    assert "above that of a training row" in compare((other, 0.9), (x, 0.3)).reading


def test_kl_shrinkage_is_a_gap_that_the_rate_explains():
    x, other = 2 * rows(400), 2 * rows(400, seed=1)
    found = compare((x, 0.1), (other, 0.6), noise=3.0)
    assert found.kl_shrinkage
    assert found.rate.gap > found.elbo.gap / 2 > 0
    assert f"KL shrinkage: the KL of a training row is {found.rate.train:.2f} nats" in found.reading
    assert "Either training has shrunk the KL" in found.reading
    assert "Or the validation rows lie farther from the prior" in found.reading
    assert "weight decay" in found.reading
    assert not compare((other, 0.6), (x, 0.1), noise=3.0).kl_shrinkage


def test_parts_that_do_not_differ_beyond_noise_share_the_gap():
    """Wider rows under a guide that was never trained: the exact gaps of distortion and rate differ by a tenth."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    for seed in range(20):
        pyro.set_rng_seed(seed)
        x, other = 1.4 * rows(200, seed), 2.0 * rows(200, seed + 100)
        found = pe.compare_splits(terms(model, guide, x, seed=seed), terms(model, guide, other, seed=seed + 1))
        assert found.rate_excess.gap == pytest.approx(found.rate.gap - found.distortion.gap)
        if found.elbo.is_clear and not found.rate_excess.is_clear:
            assert not found.kl_shrinkage
            assert "Both parts share it: the distortion explains" in found.reading
            assert "KL shrinkage" not in found.reading


def test_the_excess_of_the_rate_has_the_error_of_a_difference():
    """Rate and distortion of a row go together here: their difference is surer than either gap."""
    found = compare((2 * rows(400), 0.3), (2 * rows(400, seed=1), 0.3))
    assert found.rate_excess.standard_error < math.hypot(found.rate.standard_error, found.distortion.standard_error)


def test_reading_names_the_worst_of_several_sites():
    x = rows(200)

    def observed(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    found = [terms(observed, lambda x, y: None, x, scale * x) for scale in (1.0, 3.0)]
    assert "The distortion explains it, most of it at 'y'." in pe.compare_splits(*found).reading


def test_table_frame_and_html():
    comparison = compare((rows(30), 0.3), (rows(40, seed=1), 0.3))
    printed, frame = str(comparison), comparison.to_dataframe()
    names = ["elbo", "distortion", "log_likelihood x", "rate", "kl z", "kl z[0]", "kl z[1]"]
    assert list(frame.index) == names
    assert [line[:24].strip() for line in printed.splitlines()[2:9]] == names
    assert frame.loc["kl z[1]", "gap"] == comparison.kl_per_dim["z"]["z[1]"].gap
    assert set(frame.units) == {"nats per row"}
    for name in names:
        assert name in printed
        assert name in comparison._repr_html_()
    assert comparison.reading in " ".join(printed.split())
    shared = pe.compare_splits(*(terms(shared_model, shared_guide, rows(n)) for n in (20, 31))).to_dataframe()
    assert shared.loc["kl w", "units"] == "nats"
    assert math.isnan(shared.loc["kl w", "gap"])


def test_the_table_shows_the_elements_with_the_largest_gaps():
    def wide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, 4), 1.0).to_event(2))
            pyro.sample("x", dist.Normal(z.sum((-2, -1)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = x[:, None, None] * torch.arange(12.0).view(3, 4) / 12
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(2))

    comparison = pe.compare_splits(*(terms(wide, guide, scale * rows(20)) for scale in (1.0, 2.0)))
    assert len(comparison.kl_per_dim["z"]) == 12
    assert [f"kl z[{i // 4},{i % 4}]" in str(comparison) for i in range(12)] == 4 * [False] + 8 * [True]
    assert "kl z[0,0]" in comparison.to_dataframe().index


def test_other_arguments_are_refused(untyped):
    good = terms(vector_model, vector_guide, rows(20))
    with refuses(ArgumentError, "valid_terms", "ndarray"):
        pe.compare_splits(good, np.zeros(3))
    with refuses(ArgumentError, "train_terms", "3.0"):
        pe.compare_splits(3.0, good)


def unplated(x):
    pyro.sample("x", dist.Normal(0.0, 1.0).expand(x.shape).to_event(1), obs=x)


def test_data_without_a_plate_are_refused():
    found = terms(unplated, no_guide, rows(20))
    with refuses(SiteError, "train_terms", "'x'", "plate"):
        pe.compare_splits(found, found)


def test_terms_of_other_programs_are_refused():
    good = terms(vector_model, vector_guide, rows(20))
    with refuses(SiteError, "Site 'z'", "only train_terms"):
        pe.compare_splits(good, terms(no_model, no_guide, rows(20)))
    with refuses(SiteError, "Site 'z'", "event shape (2,)", "event shape ()"):
        pe.compare_splits(good, terms(scalar_model, AutoNormal(scalar_model), rows(20)))


def test_one_row_is_refused():
    good = terms(vector_model, vector_guide, rows(20))
    with refuses(DataError, "valid_terms", "at least 2 rows of 'data'", "got 1"):
        pe.compare_splits(good, terms(vector_model, vector_guide, rows(1)))


def test_rows_drawn_together_with_what_they_share_are_refused():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    found = terms(model, AutoMultivariateNormal(model), rows(6))
    with refuses(SiteError, "train_terms", "_AutoMultivariateNormal_latent", "AutoGuideList"):
        pe.compare_splits(found, found)
    pyro.clear_param_store()
    guide = AutoGuideList(model)
    guide.append(AutoMultivariateNormal(poutine.block(model, hide=["z"])))
    guide.append(AutoNormal(poutine.block(model, hide=["w"])))
    found = terms(model, guide, rows(6))
    assert list(pe.compare_splits(found, found).kl) == ["z"]


def test_comparison_keeps_terms_and_random_stream():
    found = terms(vector_model, vector_guide, rows(20), loss=pe.TraceBeta_ELBO(num_particles=2))
    state, before = torch.get_rng_state(), {name: x.clone() for name, x in found.kl.items()}
    pe.compare_splits(found, found)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(found.kl[name], x) for name, x in before.items())
