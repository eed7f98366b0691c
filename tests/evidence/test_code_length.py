"""Code lengths against lengths computed by hand."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pyro_elbo as pe
from models.linear_gaussian import simulate
from pyro_elbo.errors import ArgumentError, GuideError, SiteError
from tests.support.untyped import _untyped  # noqa: F401  (a fixture)

LOSS = pe.TraceBeta_ELBO()
X = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)


def coins(p):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(torch.tensor(p, dtype=torch.float64)).expand([3]).to_event(1), obs=x)

    return LOSS.terms(model, lambda x: None, X)


def biased(x):
    p = pyro.sample("p", dist.Beta(1.0, 1.0)).unsqueeze(-1)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(p * torch.ones(3)).to_event(1), obs=x)


def test_discrete_data_cost_what_is_computed_by_hand():
    length = pe.code_length(coins(0.25))  # a one costs 2 bits, a zero log2(4/3)
    zero = math.log2(4 / 3)
    by_hand = torch.tensor([4 + zero, 6.0, 2 + 2 * zero, 3 * zero], dtype=torch.float64)
    assert torch.allclose(length.bits, by_hand)
    assert abs(float(length) - by_hand.sum()) < 1e-9
    assert abs(length.per_datum - by_hand.mean()) < 1e-9
    assert length.num_dims == 12
    assert abs(length.per_dim - by_hand.sum() / 12) < 1e-9
    assert abs(length.standard_error - by_hand.std() / 2) < 1e-9
    assert "per dimension" in repr(length)
    assert "per dimension" in length._repr_html_()


def test_latents_and_particles_are_in_the_length():
    guide = AutoNormal(biased)
    guide(X)
    terms = pe.TraceBeta_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1).terms(biased, guide, X)
    length = pe.code_length(terms)
    assert abs(length.total + terms.elbo.item() / math.log(2)) < 1e-6
    assert abs(length.bits.sum() - length.total) < 1e-6


def test_a_density_has_a_length_at_a_resolution():
    model, x = simulate(5, d=4, k=2)
    terms = LOSS.terms(model, model.exact_guide(), x)
    length = pe.code_length(terms, resolution=0.125)
    assert abs(length.total - (-terms.elbo.item() / math.log(2) + 3 * 20)) < 1e-6
    assert "at resolution 0.125" in repr(length)


def test_masked_and_subsampled_rows_count_as_they_should():
    def masked(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=torch.tensor([True, True, False, True])):
            pyro.sample("x", dist.Bernoulli(0.5).expand([3]).to_event(1), obs=x)

    length = pe.code_length(LOSS.terms(masked, lambda x: None, X))
    assert (length.total, length.num_dims) == pytest.approx((9.0, 9.0))

    def half(x):
        with pyro.plate("data", 4, subsample_size=2) as rows:
            pyro.sample("x", dist.Bernoulli(0.5).expand([3]).to_event(1), obs=x[rows])

    part = pe.code_length(LOSS.terms(half, lambda x: None, X))
    assert (part.total, part.num_data, part.num_dims, part.per_datum) == pytest.approx((12.0, 4, 12.0, 3.0))
    with pytest.raises(ArgumentError, match=r"different data|subsampled"):
        _ = part - part


def test_the_standard_error_of_a_difference_is_that_of_paired_rows():
    a, b = pe.code_length(coins(0.25)), pe.code_length(coins(0.5))
    difference = a - b
    assert abs(float(difference) - (a.total - b.total)) < 1e-9
    assert abs(difference.standard_error - (a.bits - b.bits).std().item() / 2) < 1e-9
    assert "first code is longer by" in repr(difference)
    assert "no difference is shown" in repr(difference)
    assert "first code is shorter by" in repr(pe.code_length(coins(0.5)) - pe.code_length(coins(0.05)))


def test_a_number_is_no_terms(untyped):
    with pytest.raises(ArgumentError, match="terms must be"):
        pe.code_length(-12.0)
    with pytest.raises(ArgumentError, match=r"A code length less 3: expected another one"):
        _ = pe.code_length(coins(0.5)) - 3


def normal(scale, y):
    """Numbers of which the last is masked."""

    def model(y):
        with pyro.plate("data", len(y)), poutine.mask(mask=torch.arange(len(y)) < len(y) - 1):
            pyro.sample("y", dist.Normal(0.0, scale), obs=y)

    return LOSS.terms(model, lambda y: None, y)


def test_a_bin_that_would_hold_most_of_the_probability_is_refused_by_name():
    """The widest bin that is allowed is 1.25 standard deviations; its length is right to a hundredth of a bit."""
    y = torch.randn(20_001, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y[:2], y[-1] = torch.tensor([0.0, 3.0]), 0.0
    width = 0.5 * (2 * math.pi) ** 0.5
    for scale in (1.0, 0.05):
        length = pe.code_length(normal(scale, scale * y), 0.999 * scale * width)
        edges = y[:-1, None] + torch.tensor([-0.4995, 0.4995]) * width
        exact = -dist.Normal(0.0, 1.0).cdf(edges).diff(dim=-1).log2().mean().item()
        assert abs(length.per_dim - exact) < 0.01
        message = (
            f"Site 'y': at resolution .* would give one bin the probability .* Give a resolution of {scale * width:.2g}"
        )
        for wide in (1.001, 2.0, 50.0):
            with pytest.raises(ArgumentError, match=message):
                pe.code_length(normal(scale, scale * y), wide * scale * width)
    y[0] = y[2:-1] = 3.0  # far from the mode, a wide bin is no more than a guess
    assert pe.code_length(normal(1.0, y), 5.0).per_dim > 0


def test_densities_of_other_kinds_are_watched_too():
    y = torch.zeros(4, 2)
    for fn, kwargs in (
        (dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), {}),
        (dist.Laplace(torch.zeros(4, 2), 1.0).to_event(1), {}),
        (dist.Normal(torch.zeros(4, 2), 1.0).mask(torch.tensor([True, False])).to_event(1), {}),
    ):

        def model(y, fn=fn):
            with pyro.plate("data", len(y)):
                pyro.sample("y", fn, obs=y)

        terms = LOSS.terms(model, lambda y: None, y, **kwargs)
        assert pe.code_length(terms, 0.9).total > 0
        with pytest.raises(ArgumentError, match="Site 'y': at resolution 2"):
            pe.code_length(terms, 2.0)


def test_every_site_with_a_density_has_its_own_resolution():
    def model(y, b, w):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
            pyro.sample("b", dist.Bernoulli(0.5), obs=b)
            pyro.sample("w", dist.Normal(0.0, 4.0), obs=w)

    terms = LOSS.terms(model, lambda *data: None, torch.zeros(8), torch.ones(8), torch.zeros(8))
    length = pe.code_length(terms, {"y": 0.25, "w": 1.0})
    assert abs(length.total - (-terms.elbo.item() / math.log(2) + 8 * 2)) < 1e-4
    assert repr(length).splitlines()[0] == "Code length of 8 data in bits at resolution 0.25 of 'y', 1 of 'w'"
    assert abs(float(length - length)) == 0
    for wrong in ({"y": 0.25}, {"y": 0.25, "w": 1.0, "b": 1.0}, {"x": 1.0}):
        with pytest.raises(ArgumentError, match=r"expected a width for each of .* \['y', 'w'\], got one for"):
            pe.code_length(terms, wrong)
    with pytest.raises(ArgumentError, match=r"\['b'\] are discrete.*resolution=\{'y': ..., 'w': ...\}"):
        pe.code_length(terms, 0.25)
    with pytest.raises(ArgumentError, match="resolution of 'w' must be a finite number > 0, got nan"):
        pe.code_length(terms, {"y": 0.25, "w": math.nan})


def test_numbers_that_are_missing_are_no_difference_of_rows():
    """A mask in the event, over NaN that each distribution fills in by a point of its own support."""
    x, seen = torch.full((4, 2), 0.5), torch.tensor([True, False])
    x[:, 1] = math.nan

    def length(fn):
        def model(x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", fn.expand([4, 2]).mask(seen).to_event(1), obs=x)

        return pe.code_length(LOSS.terms(model, lambda x: None, x), 0.1)

    assert abs(float(length(dist.Exponential(1.0)) - length(dist.Uniform(0.0, 1.0))) * math.log(2) - 2.0) < 1e-4


def test_a_density_without_end_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Gamma(0.1, 1.0), obs=x)

    for least in (1e-30, 1e-45):
        terms = LOSS.terms(model, lambda x: None, torch.tensor([1.0, least], dtype=torch.float64))
        with pytest.raises(ArgumentError, match="Site 'x': at resolution 0.1 a density of"):
            pe.code_length(terms, 0.1)


def test_rows_that_differ_cannot_be_compared():
    lengths = [pe.code_length(normal(1.0, y), 0.1) for y in (torch.arange(5.0), torch.arange(5.0).flip(0))]
    with pytest.raises(ArgumentError, match="the numbers of row 0 add up to 0 and 4"):
        _ = lengths[0] - lengths[1]

    def as_columns(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("column", 3, dim=-2):
            pyro.sample("pixel", dist.Bernoulli(0.5), obs=x.T)

    other = pe.code_length(LOSS.terms(as_columns, lambda x: None, X))
    assert abs(float(pe.code_length(coins(0.5)) - other)) < 1e-6


def test_what_has_no_code_is_refused():
    model, x = simulate(5, d=4, k=2)
    density = LOSS.terms(model, model.exact_guide(), x)
    with pytest.raises(ArgumentError, match="have densities"):
        pe.code_length(density)
    for wrong in (0, -0.5):
        with pytest.raises(ArgumentError, match="resolution of 'x' must be a finite number > 0"):
            pe.code_length(density, resolution=wrong)
    with pytest.raises(ArgumentError, match="are discrete"):
        pe.code_length(coins(0.5), resolution=0.1)
    with pytest.raises(ArgumentError, match="different data"):
        _ = pe.code_length(density, resolution=0.5) - pe.code_length(density, resolution=0.25)
    point = AutoDelta(biased)
    point(X)
    with pytest.raises(GuideError, match="point estimate in \\['p'\\]"):
        pe.code_length(LOSS.terms(biased, point, X))

    def factor(x):
        with pyro.plate("data", len(x)):
            pyro.factor("f", x.sum(-1))
            pyro.sample("x", dist.Bernoulli(0.5).expand([3]).to_event(1), obs=x)

    with pytest.raises(SiteError, match="factors"):
        pe.code_length(LOSS.terms(factor, lambda x: None, X))
    with pytest.raises(SiteError, match="observes nothing"):
        pe.code_length(LOSS.terms(lambda x: None, lambda x: None, X))


def test_the_code_of_a_mixture_without_a_guide_has_the_length_of_its_evidence():
    weights, p = torch.tensor([0.3, 0.7], dtype=torch.float64), torch.tensor([0.2, 0.9], dtype=torch.float64)

    def mixture(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Bernoulli(p[k]), obs=x)

    x = X.flatten()
    length = pe.code_length(LOSS.terms(mixture, lambda x: None, x))
    one = float(weights @ p)
    by_hand = torch.where(x > 0.5, x.new_tensor(-math.log2(one)), x.new_tensor(-math.log2(1 - one)))
    torch.testing.assert_close(length.bits, by_hand)
