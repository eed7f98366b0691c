"""PSIS: equal to ArviZ 0.23, right on tails whose shape is known, and never "good" when it cannot know."""

import dataclasses
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from pyro_elbo.errors import PyroElboError, WeightsError
from pyro_elbo.posterior.psis import PSIS, _quantiles, describe_k, fit_pareto, pareto_k_threshold, psis

Reference = Callable[[Tensor], tuple[Tensor, Tensor]]

TAILS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "bounded": lambda rng, shape: np.log(rng.uniform(0.1, 1.0, shape)),
    "nearly equal": lambda rng, shape: 1e-3 * rng.standard_normal(shape),
    "light": lambda rng, shape: 0.5 * rng.standard_normal(shape),
    "exponential": lambda rng, shape: np.log(rng.exponential(size=shape)),
    "Student-t, k = 1/3": lambda rng, shape: np.log(np.abs(rng.standard_t(3.0, shape))),
    "Pareto, k = 0.7": lambda rng, shape: 0.7 * rng.exponential(size=shape),
    "Pareto, k = 1.5": lambda rng, shape: 1.5 * rng.exponential(size=shape),
    "shifted": lambda rng, shape: 3.0 * rng.standard_normal(shape) - 1234.5,
    "500 nats": lambda rng, shape: rng.uniform(-500.0, 0.0, shape),
}


@pytest.fixture(scope="module")
def psislw() -> Reference:
    """`psislw` of ArviZ 0.23, which takes log weights as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.23 announces 1.0 at import
        import arviz
    if int(arviz.__version__.split(".")[0]) >= 1:
        pytest.skip("psislw is part of ArviZ 0.x only")

    def reference(log_weights: Tensor) -> tuple[Tensor, Tensor]:
        with np.errstate(all="ignore"):
            weights, k = arviz.psislw(log_weights.numpy().copy())
        return torch.as_tensor(weights), torch.as_tensor(k)

    return reference


def pareto_weights(k: float, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Log weights whose tail is exactly Pareto with shape k: k times an exponential variable."""
    generator = torch.Generator().manual_seed(seed)
    return k * torch.empty(shape, dtype=torch.float64).exponential_(generator=generator)


def assert_equal_to(result: PSIS, expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(result.log_weights, expected[0], rtol=0.0, atol=1e-8)
    torch.testing.assert_close(result.pareto_k, expected[1], rtol=0.0, atol=1e-10)


# --- equal to the reference


@pytest.mark.parametrize("shape", [(25,), (99,), (4000,), (3, 1000), (2, 3, 401), (1, 20001)], ids=str)
@pytest.mark.parametrize("tail", TAILS)
def test_equals_arviz(psislw: Reference, tail: str, shape: tuple[int, ...]) -> None:
    for seed in range(3):
        log_weights = torch.as_tensor(TAILS[tail](np.random.default_rng(seed), shape))
        assert_equal_to(psis(log_weights), psislw(log_weights))


def test_equals_arviz_with_weights_of_zero(psislw: Reference) -> None:
    log_weights = pareto_weights(0.5, (3, 1000))
    log_weights[0, ::7] = -torch.inf
    log_weights[1, 40:] = -torch.inf  # fewer finite weights than the tail is long
    result = psis(log_weights)
    assert_equal_to(result, psislw(log_weights))
    assert torch.equal(result.log_weights.isinf(), log_weights.isinf())


def test_equals_arviz_with_ties(psislw: Reference) -> None:
    """Log weights in steps of 0.25: ties at the cutoff are outside the tail, ties inside in any order."""
    log_weights = pareto_weights(0.7, (3, 1000)).mul(4).round() / 4
    result, (expected, k) = psis(log_weights), psislw(log_weights)
    tail = (log_weights > log_weights.sort(-1).values[:, -96, None]).sum(-1)
    assert (tail < 95).any()
    ascending = dataclasses.replace(result, log_weights=result.log_weights.sort(-1).values)
    assert_equal_to(ascending, (expected.sort(-1).values, k))


def test_frozen_reference_numbers() -> None:
    """From ArviZ 0.23.4, on weights without randomness; holds whatever ArviZ is installed."""
    rank = torch.arange(0.5, 1000, dtype=torch.float64) / 1000
    log_weights = torch.stack([-0.4 * torch.log1p(-rank), 500.0 * rank])
    result = psis(log_weights)
    expected = torch.tensor([0.4103202088048, 12.9129659647168], dtype=torch.float64)
    torch.testing.assert_close(result.pareto_k, expected, rtol=0.0, atol=1e-10)
    largest = torch.tensor([[-4.79383333404, -4.37543487176], [-1.82659576726, -1.82659576726]], dtype=torch.float64)
    torch.testing.assert_close(result.log_weights[:, -2:], largest, rtol=0.0, atol=1e-8)


@pytest.mark.parametrize("size", [5, 6, 7, 8, 25, 95, 190, 1001])
@pytest.mark.parametrize("k", [-0.5, 0.0, 0.3, 1.2])
def test_fit_equals_pyro(k: float, size: int) -> None:
    """Pyro drops grid weights below 1e-30, we below 10 eps as ArviZ: which moves k by less than 1e-11."""
    exponential = pareto_weights(1.0, (size,), seed=size)
    excesses = exponential if k == 0 else torch.expm1(k * exponential) / k
    shape, scale = fit_pareto(excesses)
    expected_shape, expected_scale = fit_generalized_pareto(excesses)
    assert shape.item() == pytest.approx(expected_shape, abs=1e-11)
    assert scale.item() == pytest.approx(expected_scale, rel=1e-11)


def test_padding_changes_nothing() -> None:
    """Rows whose tails differ in length are fitted in one call as they are one by one."""
    excesses = pareto_weights(1.0, (4, 100)).expm1()
    for row, size in enumerate([100, 64, 5, 4]):
        excesses[row, size:] = 0.0
    shape, scale = fit_pareto(excesses)
    for row, size in enumerate([100, 64, 5]):
        alone = fit_pareto(excesses[row, :size])
        torch.testing.assert_close((shape[row], scale[row]), alone, rtol=1e-13, atol=0.0)
    assert shape[3] == torch.inf
    assert scale[3].isnan()


@pytest.mark.parametrize("size", [0, 1, 4])
def test_fit_of_fewer_than_five_excesses(size: int) -> None:
    assert fit_pareto(torch.ones(2, size))[0].tolist() == [math.inf, math.inf]


def test_quantiles_are_continuous_at_zero() -> None:
    in_tail = torch.ones(2, 50, dtype=torch.bool)
    k = torch.tensor([0.0, 1e-9], dtype=torch.float64)
    exact, near = _quantiles(k, torch.full((2,), 3.0, dtype=torch.float64), in_tail)
    assert exact[0].item() == pytest.approx(3 * math.log(100))  # -sigma log(1 - 49.5 / 50)
    torch.testing.assert_close(exact, near, rtol=1e-7, atol=0.0)


# --- right where the tail is known


@pytest.mark.parametrize("draws", [1000, 4000])
@pytest.mark.parametrize("k", [0.25, 0.5, 0.7, 1.0])
def test_known_shape_and_its_noise(k: float, draws: int) -> None:
    """The noise of k-hat is that of maximum likelihood, (1 + k) / sqrt(M), shrunk by M / (M + 10).

    Its mean is k shrunk towards 1/2, with a bias below 2 / M. At k = 0.5 the noise is 0.14 at 1000 draws,
    where three fits from 0.37 to 0.72 are nothing unusual, and 0.10 at 4000. Mean and standard deviation over
    1000 data sets within 4 SE: false alarms 6e-5 each.
    """
    fits = 1000
    tail = math.ceil(min(draws / 5, 3 * math.sqrt(draws)))
    k_hat = psis(pareto_weights(k, (fits, draws))).pareto_k
    noise = (1 + k) / math.sqrt(tail) * tail / (tail + 10)
    expected = (tail * k + 5) / (tail + 10)
    assert abs(k_hat.mean().item() - expected) < 4 * noise / math.sqrt(fits) + 2 / tail
    assert abs(k_hat.std().item() / noise - 1) < 4 / math.sqrt(2 * fits) + 5 / tail


@pytest.mark.parametrize("degrees", [2.0, 3.0])
def test_student_t_tail(degrees: float) -> None:
    """|t| with nu degrees of freedom has k = 1 / nu; 4000 draws see it with noise 0.10 and bias below 0.03.

    Ten data sets, 4 SE: false alarms 6e-5.
    """
    rng = np.random.default_rng(0)
    log_weights = torch.as_tensor(np.log(np.abs(rng.standard_t(degrees, (10, 4000)))))
    k_hat = psis(log_weights).pareto_k
    noise = (1 + 1 / degrees) / math.sqrt(190)
    assert abs(k_hat.mean().item() - 1 / degrees) < 4 * noise / math.sqrt(10) + 0.03


def test_weighted_draws_have_the_moments_of_the_target() -> None:
    """Guide N(0, 1), target N(0.5, 1.2^2): k = 1 - 1 / 1.44 = 0.31; E z, E z^2 within 4 SE (6e-5 each)."""
    z = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = psis(-0.5 * ((z - 0.5) / 1.2) ** 2 + 0.5 * z**2)
    weights = result.log_weights.exp()
    assert result.pareto_k < 0.5
    for values, truth in [(z, 0.5), (z**2, 0.25 + 1.44)]:
        mean = (weights * values).sum()
        error = (weights * (values - mean)).norm()
        assert abs(mean - truth) < 4 * error


# --- never good when it cannot know


@pytest.mark.parametrize("scale", [100.0, 500.0, 5e3, 1e6])
@pytest.mark.parametrize("draws", [100, 1000, 4000])
def test_a_spread_of_hundreds_of_nats_is_bad(psislw: Reference, scale: float, draws: int) -> None:
    generator = torch.Generator().manual_seed(0)
    log_weights = scale * torch.randn(20, draws, generator=generator, dtype=torch.float64)
    result = psis(log_weights)
    assert (result.pareto_k > 5).all()
    assert result.log_weights.isfinite().all()
    assert describe_k(result.pareto_k[0].item(), draws).startswith("bad")
    assert_equal_to(result, psislw(log_weights))


def test_a_tail_that_underflows_is_infinite() -> None:
    steps = torch.arange(1000, dtype=torch.float64)
    few = psis(-200.0 * steps)  # three weights above the smallest normal number
    assert few.pareto_k == torch.inf
    assert few.ess.item() == pytest.approx(1.0)
    # 95 weights above the cutoff, which is a normal number; excesses so small that the fit overflows
    body, tail = torch.full((905,), -708.39).double(), torch.full((94,), -708.39).double() + 1e-5
    subnormal = torch.cat([body, tail, torch.zeros(1).double()])
    result = psis(subnormal)
    assert result.pareto_k == torch.inf
    assert not result.log_weights.isnan().any()


def test_ties_at_the_top_are_not_a_tail() -> None:
    """A guide wider than a flat posterior: weights 0 or c. No tail can be fitted; the weights stay as they are."""
    log_weights = torch.where(torch.arange(1000) < 600, 3.0, -torch.inf)
    result = psis(log_weights)
    assert result.pareto_k.item() == pytest.approx(math.log(1000 / 600) / math.log(1000))
    assert result.ess.item() == pytest.approx(600.0)


@pytest.mark.parametrize("share", [0.3, 0.05, 0.002])
def test_few_distinct_weights_are_judged_by_their_maximum_over_their_mean(share: float) -> None:
    """The heavier of two weights carries half of the total: ESS = S / (1 / 4q + 1 / 4(1 - q)), no tail to fit."""
    draws, heavy = 4000, int(4000 * share)
    log_weights = torch.zeros(draws, dtype=torch.float64)
    log_weights[:heavy] = math.log((draws - heavy) / heavy)
    result = psis(log_weights)
    assert result.pareto_k.item() == pytest.approx(math.log(0.5 / share) / math.log(draws))
    assert result.ess.item() == pytest.approx(draws / (0.25 / share + 0.25 / (1 - share)))
    torch.testing.assert_close(result.log_weights, log_weights.log_softmax(-1))


def test_few_draws_that_carry_all_the_weight_have_no_tail() -> None:
    log_weights = torch.zeros(4000, dtype=torch.float64)
    log_weights[:3] = 30.0
    assert psis(log_weights).pareto_k == torch.inf
    assert describe_k(math.inf, 4000).startswith("bad")


def test_rounding_makes_no_tail_of_equal_weights() -> None:
    exact = torch.where(torch.arange(4000) % 2 == 0, 0.0, 0.7).double() - 1000.0
    rounded = exact + 1e-4 * torch.rand(4000, generator=torch.Generator().manual_seed(0)).double()
    k = psis(rounded, eps=torch.finfo(torch.float32).eps).pareto_k.item()
    assert k == pytest.approx(psis(exact).pareto_k.item(), abs=1e-4)


# --- constant weights: the guide is the posterior


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("level", [0.0, -17.81, 1e4])
def test_constant_weights_are_uniform(level: float, dtype: torch.dtype) -> None:
    """As an exact guide gives them: log p - log q of the same terms summed in another order."""
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(100, 1000, generator=generator, dtype=torch.float64).to(dtype)
    rounding = terms.sum(0) - terms.flip(0).cumsum(0)[-1]
    assert rounding.abs().max() > 0
    log_weights = level + rounding
    result = psis(log_weights)
    assert result.pareto_k == -torch.inf
    as_they_are = log_weights.double().log_softmax(-1)
    torch.testing.assert_close(result.log_weights, as_they_are, rtol=0.0, atol=1e-14)
    expected = torch.full((1000,), -math.log(1000), dtype=torch.float64)
    torch.testing.assert_close(result.log_weights, expected, rtol=0.0, atol=10 * torch.finfo(dtype).eps * 1e4)
    assert result.ess.item() == pytest.approx(1000, rel=1e-4)


def test_a_large_level_does_not_hide_a_spread() -> None:
    weights = pareto_weights(1.5, (4000,))
    assert psis(weights + 1e9).pareto_k.item() == pytest.approx(psis(weights).pareto_k.item(), abs=1e-3)


def test_constant_row_beside_others() -> None:
    log_weights = torch.stack([pareto_weights(0.5, (1000,)), torch.zeros(1000, dtype=torch.float64)])
    result = psis(log_weights)
    assert result.pareto_k.tolist() == [psis(log_weights[0]).pareto_k.item(), -math.inf]


# --- what holds for all weights


@pytest.mark.parametrize("tail", TAILS)
def test_properties(tail: str) -> None:
    log_weights = torch.as_tensor(TAILS[tail](np.random.default_rng(7), (2, 3, 500)))
    result = psis(log_weights)
    total = result.log_weights.exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0.0, atol=1e-12)
    ascending = result.log_weights.gather(-1, log_weights.argsort(-1))
    assert (ascending.diff(dim=-1) >= 0).all()  # the order of the draws is kept
    assert (result.pareto_k.shape, result.ess.shape) == ((2, 3), (2, 3))
    assert ((result.ess >= 1 - 1e-12) & (result.ess <= 500 + 1e-9)).all()
    torch.testing.assert_close(result.ess, 1 / result.log_weights.exp().square().sum(-1))


def test_no_weight_rises_above_the_largest() -> None:
    """Beside a draw of the body, which smoothing leaves alone."""
    log_weights = pareto_weights(1.5, (20, 1000))
    smallest = log_weights.argmin(-1, keepdim=True)
    smoothed = psis(log_weights).log_weights
    rise = smoothed.amax(-1, keepdim=True) - smoothed.gather(-1, smallest)
    assert (rise <= log_weights.amax(-1, keepdim=True) - log_weights.gather(-1, smallest) + 1e-12).all()


def test_order_of_draws_and_rows_does_not_matter() -> None:
    log_weights = pareto_weights(0.7, (3, 1000))
    shuffle = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    whole, shuffled, alone = psis(log_weights), psis(log_weights[:, shuffle]), psis(log_weights[1])
    torch.testing.assert_close(shuffled.log_weights, whole.log_weights[:, shuffle], rtol=0.0, atol=1e-13)
    torch.testing.assert_close(alone.log_weights, whole.log_weights[1], rtol=0.0, atol=1e-13)


def test_input_is_left_alone_and_result_is_detached() -> None:
    log_weights = pareto_weights(0.5, (1000,)).float().requires_grad_()
    before = log_weights.detach().clone()
    result = psis(log_weights)
    assert torch.equal(log_weights.detach(), before)
    assert result.log_weights.dtype == result.pareto_k.dtype == result.ess.dtype == torch.float64
    outputs = [result.log_weights, result.pareto_k, result.ess, *fit_pareto(log_weights)]
    assert not any(output.requires_grad for output in outputs)


def test_no_rows() -> None:
    result = psis(torch.empty(0, 100))
    assert (result.log_weights.shape, result.pareto_k.shape, result.ess.shape) == ((0, 100), (0,), (0,))


def test_result_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        psis(pareto_weights(0.5, (100,))).ess = torch.zeros(())  # pyright: ignore[reportAttributeAccessIssue]


# --- bad input


def with_values(values: dict[int, float]) -> Tensor:
    """Two rows of 100 zeros, with other values in the second."""
    log_weights = torch.zeros(2, 100)
    log_weights[1, list(values)] = torch.tensor(list(values.values()))
    return log_weights


def finite(count: int, draws: int = 100) -> Tensor:
    """Zeros, then -inf."""
    return torch.where(torch.arange(draws) < count, 0.0, -torch.inf)


@pytest.mark.parametrize(
    ("log_weights", "message"),
    [
        (
            with_values({3: math.nan, 7: math.nan, 9: math.inf}),
            r"2 NaN and 1 \+inf among 200 .* index \(1, 3\)",
        ),
        (with_values({99: math.inf}), r"0 NaN and 1 \+inf .* index \(1, 99\).*Find the site"),
        (torch.zeros(3, 24), r"^24 draws, expected at least 25 .*set num_samples to 4000"),
        (torch.zeros(3, 0), r"^0 draws, expected at least 25"),
        (finite(24), r"^log_weights hold 24 weights above zero among 100"),
        (torch.stack([finite(100), finite(0)]), r"^log_weights\[1\] hold 0 weights .*support of the model"),
    ],
)
def test_bad_weights(log_weights: Tensor, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as error:
        psis(log_weights)
    assert isinstance(error.value, PyroElboError)


def test_25_draws_are_enough() -> None:
    assert psis(pareto_weights(0.5, (25,))).pareto_k.isfinite()


@pytest.mark.parametrize(
    ("log_weights", "message"),
    [
        (torch.arange(100), r"dtype torch\.int64, expected float64"),
        (torch.tensor(0.0), r"^1 draws, expected at least 25"),
    ],
)
def test_weights_that_are_no_vector_of_floats(log_weights: Tensor, message: str) -> None:
    # the undecorated function: with run-time type checks on, the annotation speaks first
    with pytest.raises(WeightsError, match=message):
        getattr(psis, "__wrapped__", psis)(log_weights)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_excesses(bad: float) -> None:
    with pytest.raises(WeightsError, match="1 of 6 excesses are NaN or infinite"):
        fit_pareto(torch.tensor([1.0, 2.0, bad, 3.0, 4.0, 5.0]))


# --- what k-hat means


def test_threshold() -> None:
    """min(1 - 1 / log10 S, 0.7): the cap is reached at S = 10^(1 / 0.3) = 2154.4."""
    assert pareto_k_threshold(1000) == pytest.approx(2 / 3)
    assert pareto_k_threshold(2154) < 0.7
    assert pareto_k_threshold(2155) == pareto_k_threshold(10**6) == 0.7
    with pytest.raises(WeightsError, match="24 draws"):
        pareto_k_threshold(24)


@pytest.mark.parametrize(
    ("k", "draws", "verdict"),
    [
        (-math.inf, 100, "good: all importance weights are equal"),
        (-0.2, 4000, "good: k-hat -0.20"),
        (0.49, 4000, "good: k-hat 0.49"),
        (0.5, 4000, "usable: k-hat 0.50, below 0.70"),
        (0.69, 4000, "usable: k-hat 0.69"),
        (0.7, 4000, "bad: k-hat 0.70, not below 0.70; the guide misses"),
        (0.68, 1000, "bad: k-hat 0.68, not below 0.67; 1000 draws are too few for this tail. Take 4000"),
        (0.4, 30, "bad: k-hat 0.40, not below 0.32; 30 draws are too few"),
        (37.0, 4000, "bad: k-hat 37.00"),
        (math.inf, 4000, "bad: no tail could be fitted"),
    ],
)
def test_description(k: float, draws: int, verdict: str) -> None:
    assert describe_k(k, draws).startswith(verdict)


def test_description_warns_of_noise_where_it_could_change_the_verdict() -> None:
    assert "noisy at 1000 draws" in describe_k(0.4, 1000)
    assert "noisy" not in describe_k(0.4, 4000)


def test_description_of_nan() -> None:
    with pytest.raises(WeightsError, match="k-hat is NaN"):
        describe_k(math.nan, 4000)
