"""Penalties on information: against exact answers, finite differences, and the figures of known mistakes."""

import math
import re
import warnings
from typing import get_args

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError
from pyro_elbo.information import Estimator, aggregate, estimators, penalties
from tests.support.refusing import refusing
from tests.support.rows import every_other

SIGMA, DIMS = 0.5, 4  # of the encoder; with x ~ N(0, 1) the aggregate posterior has variance 1.25
SPREAD = math.sqrt(1 + SIGMA**2)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)


refuses = refusing(
    re.compile(r"Take |Leave out|Name |Give |Draw |Use |Pass |Penalize|Mask|Number|Observe|Train|choose")
)


def model(x, s=None):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        if s is not None:
            pyro.sample("s", dist.Categorical(torch.ones(4)), obs=s)
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def guide(x, s=None):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, SIGMA).to_event(1))


def draw_data(rows, levels, gap, dims=DIMS):
    """x ~ N(gap s, 1) in its first dimension, N(0, 1) in the others."""
    s = torch.randint(levels, (rows,))
    x = torch.randn(rows, dims)
    x[:, 0] += gap * s
    return x, s


def information(levels, gap):
    """I(z; s) of equally likely normals at 0, gap, 2 gap, ... by quadrature."""
    z = np.linspace(-12.0, 12.0 + gap * levels, 20001)
    p = np.stack(
        [np.exp(-0.5 * ((z - gap * k) / SPREAD) ** 2) / SPREAD / math.sqrt(2 * math.pi) for k in range(levels)]
    )
    ratio = np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(p.mean(0), 1e-300))
    return float(np.trapezoid(p * ratio, z).mean())


def gap_of(nats, levels):
    low, high = 0.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if information(levels, middle) < nats else (low, middle)
    return low


@torch.no_grad()
def found(penalty, *args, programs=(model, guide), **options):
    return pe.TraceBeta_ELBO(penalties=[penalty], **options).terms(*programs, *args).penalties[penalty.name]


AGGREGATE = pe.MutualInformation("z", attribute="s")


@pytest.mark.parametrize("levels", every_other([4, 2]))
@pytest.mark.parametrize("nats", [0.0, 0.05, 0.29, 0.6])
def test_bracket_contains_the_truth(nats, levels):
    """In at least 95 % of 200 batches of 128 rows."""
    gap = gap_of(nats, levels)
    brackets = [found(AGGREGATE, *draw_data(128, levels, gap)).bracket for _ in range(200)]
    assert np.mean([low <= nats <= high for low, high in brackets]) >= 0.95


@pytest.mark.parametrize("levels", every_other([4, 2]))
@pytest.mark.parametrize("nats", [0.0, 0.05, 0.29, 0.6])
def test_full_data_give_the_truth(nats, levels):
    """Within 0.01 nats; the data are quantiles, so that only the draws of z vary."""
    n = 8192
    quantiles = dist.Normal(0.0, 1.0).icdf((torch.arange(n // levels) + 0.5) / (n // levels))
    s = torch.arange(n) % levels
    x = quantiles.repeat_interleave(levels)[:, None] + gap_of(nats, levels) * s[:, None]
    result = found(AGGREGATE, x, s)
    assert abs(result.nats - nats) < 0.01
    assert abs(result.low - nats) < 0.01


@pytest.mark.parametrize(
    ("nats", "size", "with_own", "without"),
    [
        (0.0, 32, 0.32, -0.80),
        (0.0, 128, 0.17, -0.28),
        (0.0, 512, 0.07, -0.10),
        (0.29, 32, 0.47, -0.17),
        (0.29, 128, 0.39, 0.13),
        (0.29, 512, 0.34, 0.24),
    ],
)
def test_a_row_s_own_density_flatters_and_its_absence_slanders(nats, size, with_own, without):
    """Trap 15: means over batches; 0.06 covers the other encoder that the figures come from, and 5 SE."""
    gap = gap_of(nats, 2)
    results = [found(AGGREGATE, *draw_data(size, 2, gap)) for _ in range(4096 // size + 20)]
    assert abs(np.mean([r.high.item() for r in results]) - with_own) < 0.06
    assert abs(np.mean([r.low.item() for r in results]) - without) < 0.06


@pytest.mark.slow
def test_silence_of_a_lower_bound_is_no_invariance():
    """Trap 16: a linear critic finds nothing of an attribute that is symmetric in z; the densities do."""
    x = torch.randn(2000, 1)
    s = (x[:, 0].abs() > 0.67).long()
    blind = trained(pe.MutualInformation("z", attribute="s", estimator="adversarial", hidden=()), (x, s), 200)
    seeing = trained(pe.MutualInformation("z", attribute="s", estimator="adversarial", critic_lr=1e-2), (x, s), 200)
    truth = found(AGGREGATE, x, s)
    assert blind.nats < 0.02 < 0.1 < truth.low
    assert 0.1 < seeing.nats < truth.bracket[1]


def test_a_lower_bound_says_so_once():
    penalties._say_once.cache_clear()
    with pytest.warns(UserWarning, match="lower bound on the information"):
        pe.MutualInformation("z", attribute="s", estimator="adversarial")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pe.MutualInformation("z", attribute="s", estimator="adversarial")


def trained(penalty, args, steps, programs=(model, guide)):
    """The penalty once its critic has learnt beside an optimizer that moves nothing."""
    loss = pe.TraceBeta_ELBO(penalties=[penalty])
    idle = nn.Parameter(torch.zeros(()))
    optim = torch.optim.SGD([idle], lr=0.0)
    for _ in range(steps):
        terms = loss.terms(*programs, *args)
        loss.count_step(-terms.objective.detach() + idle, terms).backward()
        optim.step()
    with torch.no_grad():
        return loss.terms(*programs, *args).penalties[penalty.name]


@pytest.mark.slow
def test_club_is_above_and_adversarial_below():
    """With a good critic; the truth is 0.29 nats, a critic's own sampling error on 4000 rows below 0.05."""
    args = draw_data(4000, 2, gap_of(0.29, 2), dims=1)
    club = trained(pe.MutualInformation("z", attribute="s", estimator="club", critic_lr=1e-2), args, 150)
    adversarial = trained(pe.MutualInformation("z", attribute="s", estimator="adversarial", critic_lr=1e-2), args, 150)
    assert club.nats > 0.29 - 0.05
    assert 0.29 - 0.06 < adversarial.nats < 0.29 + 0.05


@pytest.mark.slow
def test_critics_of_a_continuous_attribute():
    """s = x with z = x + noise: I(z; s) = ½ log(1 + 1/σ²)."""
    x = torch.randn(4000, 1)
    truth = 0.5 * math.log(1 + 1 / SIGMA**2)
    given = {"attribute": lambda x, s: x[:, 0], "critic_lr": 1e-2}
    adversarial = trained(pe.MutualInformation("z", estimator="adversarial", **given), (x, None), 300)
    club = trained(pe.MutualInformation("z", estimator="club", **given), (x, None), 300)
    assert truth - 0.1 < adversarial.nats < truth + 0.08
    assert club.nats > truth


def test_variational_is_above():
    """KL - E log p(x | z) - H(x | s), where the truth is 0 and H(x | s) that of normals."""
    x, s = draw_data(4000, 2, 0.0, dims=1)
    result = found(pe.MutualInformation("z", attribute="s", estimator="variational"), x, s)
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    assert result.direction == "upper, up to a constant"
    assert result.nats - entropy > 0


def test_hsic_is_zero_at_independence_only():
    x = torch.randn(1000, 2)
    programs = {"programs": (model, guide)}

    def value(given):
        return found(pe.MutualInformation("z", attribute=given, estimator="hsic"), x, **programs).nats.item()

    independent, shuffled = value(lambda x: torch.randn(len(x))), value(lambda x: x[torch.randperm(len(x)), 0])
    assert value(lambda x: x[:, 0]) > 20 * max(independent, shuffled)
    assert value(lambda x: x[:, 0].square()) > 5 * max(independent, shuffled)


def test_conditional_information():
    """s = y, so that z tells of s what it tells of y and nothing more."""
    x, y = draw_data(1000, 2, 2.0)
    plain = found(AGGREGATE, x, y)
    noisy = y ^ (torch.rand(len(y)) < 0.3)
    given_y = found(pe.MutualInformation("z", attribute=lambda x, s: noisy, conditional_on="s"), x, y)
    assert plain.low > 0.2
    assert given_y.bracket[0] <= 0 <= given_y.bracket[1]
    same = found(pe.MutualInformation("z", attribute="s", conditional_on=lambda x, s: torch.zeros(len(s))), x, y)
    assert abs(same.high - found(AGGREGATE, x, y).high) < 0.1


@pytest.mark.slow
def test_conditional_forms_of_critics_and_of_hsic():
    x, y = draw_data(1500, 2, 2.0, dims=1)
    noisy = y ^ (torch.rand(1500) < 0.3)
    for estimator in ("club", "adversarial", "hsic"):
        options = {"attribute": lambda x, s: noisy, "estimator": estimator, "critic_lr": 1e-2}
        steps = 0 if estimator == "hsic" else 100
        alone = trained(pe.MutualInformation("z", **options), (x, y), steps)
        given_y = trained(pe.MutualInformation("z", conditional_on="s", **options), (x, y), steps)
        assert given_y.nats < 0.4 * alone.nats, estimator


def test_several_attributes_are_their_joint_levels():
    x, s = draw_data(500, 4, 1.0)
    columns = {"attribute": (lambda x, s: s % 2, lambda x, s: s // 2)}
    torch.manual_seed(1)
    joint = found(pe.MutualInformation("z", **columns), x, s)
    torch.manual_seed(1)
    single = found(pe.MutualInformation("z", attribute="s"), x, s)
    assert joint.nats == single.nats
    assert trained(pe.MutualInformation("z", estimator="club", **columns), (x, s), 2).critic.spec.levels == (2, 2)


def test_pairs_of_normals_as_matrix_products():
    """Against the densities one by one: far away and narrow, where squares cancel."""
    loc, scale = 50.0 + torch.randn(3, 40, 2, dtype=torch.float32), torch.rand(3, 40, 2) + 0.01
    scale = scale.float()
    site = _site(dist.Normal(loc, scale).to_event(1))
    encoded = aggregate.AggregatePosterior(site, site.plates[0], -2)
    exact = dist.Normal(loc.double(), scale.double()).to_event(1)
    expected = torch.stack([exact.log_prob(site.value[:, i : i + 1].double()) for i in range(40)], 1)
    assert torch.allclose(encoded.pairs(0, 40).double(), expected, rtol=1e-5, atol=1e-4)


def _site(fn, plate=-1):
    from pyro_elbo.programs import Plate, Site

    shape = fn.batch_shape
    return Site("z", "latent", fn, fn.sample(), (Plate("data", plate, shape[plate], shape[plate]),), 1.0, None)


def test_other_densities_and_inner_plates_agree_with_normals():
    """A flow that does nothing, a plate inside of the row, particles on the left: one value."""
    loc, scale = torch.randn(3, 20, 2), torch.rand(3, 20, 2) + 0.3
    normal = dist.Normal(loc, scale)
    site = _site(normal.to_event(1))
    affine = dist.TransformedDistribution(normal.to_event(1), [dist.transforms.AffineTransform(0.0, 1.0)])
    other = type(site)("z", "latent", affine, site.value, site.plates, 1.0, None)
    inner = type(site)("z", "latent", normal, site.value, (site.plates[0]._replace(dim=-2),), 1.0, None)
    studentlike = dist.Laplace(loc, scale)
    laplace = type(site)("z", "latent", studentlike.to_event(1), site.value, site.plates, 1.0, None)
    encoded = [
        aggregate.AggregatePosterior(s, s.plates[0], p)
        for s, p in ((site, -2), (other, -2), (inner, -3), (laplace, -2))
    ]
    pairs = [x.pairs(3, 9) for x in encoded]
    assert pairs[0].shape == (3, 6, 20)
    assert torch.allclose(pairs[0], pairs[1], atol=1e-10)
    assert torch.allclose(pairs[0], pairs[2], atol=1e-10)
    elements = encoded[0].pairs_per_element(3, 9)
    assert torch.allclose(elements.sum(2), pairs[0], atol=1e-10)
    assert torch.allclose(encoded[2].pairs_per_element(3, 9), elements)
    assert torch.allclose(encoded[3].pairs_per_element(3, 9).sum(2), pairs[3])


def test_blocks_change_nothing(monkeypatch):
    args = draw_data(60, 2, 1.0)
    loc = nn.Parameter(torch.zeros(DIMS))

    def moved(x, s):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x + loc * x, SIGMA).to_event(1))

    def value_and_gradient():
        torch.manual_seed(0)
        kinds = [pe.MutualInformation("z", attribute="s"), pe.MutualInformation("z"), pe.TotalCorrelation("z")]
        objective = pe.TraceBeta_ELBO(penalties=kinds).terms(model, moved, *args).objective
        return objective, torch.autograd.grad(objective, loc)[0]

    whole = value_and_gradient()
    monkeypatch.setattr(aggregate, "BLOCK", 500)
    for a, b in zip(whole, value_and_gradient(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_two_functions_as_attributes_have_names_of_their_own():
    x, s = draw_data(64, 2, 1.0)
    options = {"latent": "z", "estimator": "aggregate"}
    unnamed = [pe.MutualInformation(attribute=lambda x, s: s, **options) for _ in range(2)]
    with pytest.raises(pe.PyroElboError, match="name="):
        pe.TraceBeta_ELBO(penalties=unnamed)
    named = [
        pe.MutualInformation(attribute=lambda x, s: s, name="I(z; s)", weight=2.0, **options),
        pe.MutualInformation(attribute=lambda x, s: (x[:, 0] > 0).long(), name="I(z; sign)", weight=3.0, **options),
    ]
    terms = pe.TraceBeta_ELBO(penalties=named).terms(model, guide, x, s)
    assert list(terms.penalties) == ["I(z; s)", "I(z; sign)"]
    cost = sum(w * len(x) * p.nats for w, p in zip((2.0, 3.0), terms.penalties.values(), strict=True))
    assert torch.allclose(terms.objective, terms.elbo - cost)
    assert pe.TraceMI_ELBO("z", lambda x, s: s, name="I(z; age)").penalties[0].name == "I(z; age)"
    assert pe.MutualInformation("z", "s", conditional_on="y").name == "I(z; s | y)"


def test_an_attribute_takes_the_arguments_of_the_programs():
    x, s = draw_data(8, 2, 1.0)
    with refuses(ArgumentError, "2 positional", "too many"):
        pe.TraceMI_ELBO("z", lambda x: x[:, 0] > 0).terms(model, guide, x, s)


def test_every_estimator_has_a_name_and_every_name_an_estimator():
    assert {*estimators.ESTIMATORS, *estimators.CRITIC_ESTIMATORS} == set(get_args(Estimator))


def test_penalties_and_their_terms_print_as_one_line():
    penalty = pe.MutualInformation("z", attribute=lambda x, s: s, weight=10.0)
    assert repr(penalty) == "MutualInformation('I(z; s)', weight=10.0, estimator='aggregate')"
    term = pe.PenaltyTerm(torch.tensor(0.25), "debiased", torch.tensor(0.2), torch.tensor(0.3), torch.full((2,), 0.1))
    assert repr(term) == "PenaltyTerm(0.25, debiased, bracket 0.1 to 0.4, weight 0)"
