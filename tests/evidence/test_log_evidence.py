"""Estimates of log p(x) against exact evidence: 5 standard errors have a false-alarm rate below 1e-6 per comparison."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

import pyro_elbo as pe
from models.linear_gaussian import LinearGaussian, simulate
from pyro_elbo.errors import ArgumentError, GuideError, SiteError, WeightsError
from pyro_elbo.posterior import draw_in_chunks
from tests.support.rows import thorough

MODEL, X = simulate(6, d=4, k=2, noise=0.7)
EXACT = MODEL.log_evidence(X)


def guide(widen=1.2):
    """The exact posterior of MODEL with its covariance widened."""

    def program(x):
        with pyro.plate("data", len(x)):
            loc = (x - MODEL.mean) @ MODEL.encoder.T
            pyro.sample("z", dist.MultivariateNormal(loc, widen * MODEL.covariance))

    return program


def evidence(model, guide, *args, **options):
    return pe.log_evidence(model, guide, *args, progress=False, **options)


def annealed(model, *args, guide=None, **options):
    return evidence(model, guide, *args, method="ais", **options)


def close(result, exact, least=1e-6):
    return bool(((result.log_evidence - exact).abs() < 5 * result.standard_error + least).all())


def mean_model(x):
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def mean_guide(x):
    pyro.sample("mu", dist.Normal(x.sum() / (len(x) + 1), x.new_tensor(0.6)))


def exact_mean_model(x):
    n = len(x)
    return dist.MultivariateNormal(torch.zeros(n).double(), torch.eye(n).double() + 1).log_prob(x)


def mixture(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.3)))
        pyro.sample("x", dist.Normal(2 * k, x.new_tensor(1.0)), obs=x)


def mixture_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Bernoulli(torch.full_like(x, 0.5)))


def exact_mixture(x):
    return (0.3 * dist.Normal(2.0, 1.0).log_prob(x).exp() + 0.7 * dist.Normal(0.0, 1.0).log_prob(x).exp()).log()


def test_importance_sampling_of_a_linear_gaussian_is_within_five_standard_errors_per_row():
    result = evidence(MODEL, guide(), X, num_samples=4000)
    assert result.plate == "data"
    assert result.log_evidence.shape == (6,)
    assert close(result, EXACT)
    assert (result.standard_error < 0.02).all()
    assert abs(float(result) - EXACT.sum()) < 5 * result.total_standard_error


def test_the_exact_posterior_has_the_evidence_in_every_draw():
    result = evidence(MODEL, MODEL.exact_guide(), X, num_samples=2)
    assert torch.allclose(result.log_evidence, EXACT, atol=1e-9)
    assert torch.allclose(result.ess, torch.full((6,), 2.0).double())


def test_importance_sampling_of_a_mixture_sums_its_discrete_latent_out():
    assert close(evidence(mixture, mixture_guide, POINTS, num_samples=4000), exact_mixture(POINTS))


def test_the_standard_error_is_the_spread_over_seeds():
    results = [evidence(mean_model, mean_guide, X[:, 0], num_samples=200, seed=seed) for seed in range(60)]
    spread = torch.stack([r.log_evidence for r in results]).std()
    stated = torch.stack([r.standard_error for r in results]).mean()
    assert 0.5 < spread / stated < 1.6  # the spread of 60 has a relative standard error of 0.09


POINTS = torch.linspace(-2.0, 4.0, 7, dtype=torch.float64)
BOUNDS = {
    "linear-Gaussian": (MODEL, guide(3.0), X, EXACT.sum()),
    "mixture": (mixture, mixture_guide, POINTS, exact_mixture(POINTS).sum()),
}


@pytest.mark.parametrize("case", BOUNDS)
def test_the_bound_rises_with_the_draws_and_stays_below_the_evidence(case):
    """E log mean of K weights grows in K: paired, on groups of the same weights."""
    model, program, x, exact = BOUNDS[case]
    with torch.no_grad():
        chunks = list(draw_in_chunks(model, program, (x,), {}, 12_800, 2**20))
    weights = torch.cat([c.local_log_weight for c in chunks]).sum(1).reshape(-1, 64)
    means = {k: (weights.reshape(len(weights), -1, k).logsumexp(-1) - math.log(k)).mean(1) for k in (1, 4, 16, 64)}
    for few, many in ((1, 4), (4, 16), (16, 64)):
        gain = means[many] - means[few]
        assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5
    assert means[64].mean() < exact + 5 * means[64].std() / len(weights) ** 0.5


def test_chunks_of_draws_and_of_rows_bound_the_memory_and_keep_the_answer(monkeypatch):
    monkeypatch.setattr("pyro_elbo.evidence.estimate.MAX_ELEMENTS", 60)
    assert close(evidence(MODEL, guide(), X, num_samples=500), EXACT)
    batches = evidence(MODEL, guide(), X, num_samples=500, batch_size=4)
    assert batches.log_evidence.shape == (6,)
    assert close(batches, EXACT)
    assert close(annealed(MODEL, X, num_temperatures=100, batch_size=4), EXACT)


def test_programs_that_do_not_vectorize_run_draw_by_draw():
    def alone(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            assert z.dim() == 2
            pyro.sample("x", dist.Normal(z @ MODEL.weight.T + MODEL.mean, MODEL.noise).to_event(1), obs=x)

    assert close(evidence(alone, guide(), X, num_samples=50), EXACT)
    assert close(annealed(alone, X, num_temperatures=50, num_samples=4), EXACT, least=0.02)


def test_latents_of_all_rows_give_one_number_and_the_report_says_so():
    x = X[:, 0]
    for result in (evidence(mean_model, mean_guide, x), annealed(mean_model, x, num_temperatures=100)):
        assert result.plate is None
        assert result.log_evidence.shape == ()
        assert close(result, exact_mean_model(x))
        assert "One number for all data" in repr(result)
        assert "One number for all data" in result._repr_html_()


def test_masked_rows_count_nothing_and_numpy_data_are_taken():
    keep = torch.tensor([True, False, True, True, True, False])

    def masked(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            with poutine.mask(mask=keep):
                loc = z @ MODEL.weight.T + MODEL.mean
                pyro.sample("x", dist.Normal(loc, MODEL.noise).to_event(1), obs=x)

    def wide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.2).to_event(1))

    exact = EXACT.where(keep, 0.0)
    torch.set_default_dtype(torch.float64)
    assert close(evidence(masked, wide, X.numpy(), num_samples=20_000), exact)
    assert close(annealed(masked, np.asarray(X), num_temperatures=100), exact)


def test_a_scale_common_to_both_programs_is_taken_out():
    scaled = [poutine.scale(p, scale=0.25) for p in (MODEL, guide())]
    assert close(evidence(*scaled, X, num_samples=2000), EXACT)


def test_a_value_that_is_given_counts_in_the_total():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def local(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, x.new_tensor(0.8)))

    x, mu = X[:, 0], torch.tensor(0.5, dtype=torch.float64)
    given = poutine.condition(model, data={"mu": mu})
    rows = dist.Normal(mu, math.sqrt(2)).log_prob(x)
    for result in (evidence(given, local, x), annealed(given, x, num_temperatures=100)):
        assert close(result, rows)
        assert abs(result.shared - dist.Normal(0.0, 1.0).log_prob(mu)) < 1e-9
        assert abs(float(result) - result.log_evidence.sum().item() - result.shared) < 1e-9


def far(noise=0.3):
    """Ten latents, sharp data: the prior and a stray guide are hopeless starts for importance sampling."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 10, generator=generator, dtype=torch.float64)
    model = LinearGaussian(weight, torch.zeros(20, dtype=torch.float64), noise)
    z = torch.randn(3, 10, generator=generator, dtype=torch.float64)
    return model, z @ weight.T + noise * torch.randn(3, 20, generator=generator, dtype=torch.float64)


def stray(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_ones(10), 1.5).to_event(1))


@pytest.mark.parametrize("start", ["guide", thorough("prior")])
def test_annealing_finds_the_evidence_where_importance_sampling_fails(start):
    model, x = far()
    exact = model.log_evidence(x)
    failed = evidence(model, stray, x, num_samples=1000)
    assert (failed.log_evidence < exact - 1).all()
    assert "Few draws carry all the weight" in repr(failed)
    result = annealed(model, x, guide=stray, start=start, num_temperatures=500)
    assert close(result, exact)
    assert (result.standard_error < 1).all()


@pytest.mark.thorough
def test_the_temperatures_that_the_pilot_asks_for_are_enough():
    """The posterior is 80 to 350 times as narrow as the prior in ten rotated directions."""
    model, x = far(0.02)
    result = annealed(model, x)
    assert close(result, model.log_evidence(x))
    assert (result.ess > 6).all()


def counts(x):
    """x ~ Poisson(r), r ~ Gamma(2, 1), with two rates on a simplex beside it: the evidence is negative binomial."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
        pyro.sample("share", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def exact_counts(x):
    return dist.NegativeBinomial(2.0, probs=torch.tensor(0.5)).log_prob(x)


def test_annealing_keeps_to_supports():
    x = torch.tensor([0.0, 1.0, 7.0])
    assert close(annealed(counts, x, num_temperatures=200), exact_counts(x))


def test_both_directions_enclose_the_evidence_of_counts():
    both = pe.bidirectional_evidence(counts, torch.zeros(5), num_temperatures=100, progress=False)
    exact = exact_counts(both.observed["x"])
    assert close(both.lower, exact)
    assert close(both.upper, exact)
    assert both.gap.abs().max() < 0.3


def test_trajectories_that_diverge_are_rejected():
    """A funnel: where tau is small, long steps in z leave it for scales of zero and infinity."""

    def funnel(x):
        tau = pyro.sample("tau", dist.LogNormal(x.new_zeros(()), 3.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, tau))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.5, -1.0, 2.0, 3.0])
    grid = torch.linspace(-25, 25, 8001, dtype=torch.float64)
    spread = (1 + grid.exp()[:, None] ** 2) ** 0.5
    joint = dist.Normal(0.0, 3.0).log_prob(grid) + dist.Normal(0.0, spread).log_prob(x).sum(1)
    exact = joint.logsumexp(0) + grid.diff()[0].log()
    assert close(annealed(funnel, x, num_temperatures=150), exact)


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
def test_annealing_starts_from_what_an_auto_guide_draws(make):
    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(()), scale), obs=x)

    x = torch.tensor([0.5, -1.0, 2.0])
    grid = torch.linspace(-8, 8, 4001)
    joint = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(0.0, grid.exp()[:, None]).log_prob(x).sum(1)
    exact = torch.trapezoid(joint.double().exp(), grid.double()).log()
    fitted = make(model)
    fitted(x)
    assert close(annealed(model, x, guide=fitted, start="guide", num_temperatures=100, num_leapfrog=5), exact)


def test_annealing_walks_through_the_latents_of_a_scan():
    def model(xs):
        def step(z, x):
            z = pyro.sample("z", dist.Normal(0.5 * z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            return z, None

        with pyro.plate("data", xs.shape[1]):
            pe.scan(step, xs.new_zeros(xs.shape[1]), xs)

    xs = torch.tensor([[0.3, 1.0], [-1.0, 0.5], [2.0, 0.0]])
    cov = torch.zeros(3, 3)
    loadings = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 1.0]])
    cov = loadings @ loadings.T + torch.eye(3)
    exact = dist.MultivariateNormal(torch.zeros(3), cov).log_prob(xs.T)
    assert close(annealed(model, xs, num_temperatures=100), exact)


def test_both_directions_enclose_the_evidence():
    model, x = far()
    both = pe.bidirectional_evidence(model, x, num_temperatures=400, progress=False)
    exact = model.log_evidence(both.observed["x"])
    assert not torch.equal(both.observed["x"], x)
    assert (both.lower.log_evidence < exact + 5 * both.lower.standard_error).all()
    assert (both.upper.log_evidence > exact - 5 * both.upper.standard_error).all()
    assert (both.gap.abs() < 1).all()
    assert "gap per row of 'data'" in repr(both)
    coarse = pe.bidirectional_evidence(model, x, num_temperatures=20, num_leapfrog=2, progress=False)
    truth = model.log_evidence(coarse.observed["x"]).sum()
    assert float(coarse.lower) < truth - 1 < truth + 1 < float(coarse.upper)


@pytest.mark.parametrize("method", ["importance", "ais"])
def test_modes_and_the_callers_stream_stay_and_a_seed_repeats(method):
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.9)).double()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    options = {"method": method, "num_samples": 8} | ({"num_temperatures": 20} if method == "ais" else {})
    pyro.set_rng_seed(3)
    expected = torch.randn(2)
    pyro.set_rng_seed(3)
    first = evidence(model, guide(), X, **options)
    assert torch.equal(torch.randn(2), expected)
    assert net.training
    net.eval()
    assert torch.equal(evidence(model, guide(), X, **options).log_evidence, first.log_evidence)
    assert not torch.equal(evidence(model, guide(), X, seed=1, **options).log_evidence, first.log_evidence)
    assert all(p.grad is None for p in net.parameters())


def subsampled(x):
    with pyro.plate("data", len(x), subsample_size=2) as rows:
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ MODEL.weight.T, 1.0).to_event(1), obs=x[rows])


def subsampled_guide(x):
    with pyro.plate("data", len(x), subsample_size=2):
        pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))


class Strange(dist.Delta):
    """A likelihood that is NaN."""

    def log_prob(self, x):
        return self.v * torch.nan


def nan_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).mask(False).to_event(1), obs=x[:, :2])
        pyro.sample("y", Strange(z.sum(-1)), obs=x[:, 0])


def outside(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.MultivariateNormal(x.new_zeros(2), torch.eye(2).double()))
        pyro.factor("x", torch.full_like(z[..., 0], -torch.inf))


def bounded(x):
    with pyro.plate("data", len(x)):
        high = pyro.sample("high", dist.Gamma(x.new_tensor(2.0), 1.0))
        z = pyro.sample("z", dist.Uniform(0.0, high))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def flat(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def no_latent(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x[:, 0])


REFUSED = {
    "one draw": (ArgumentError, "num_samples must be", MODEL, guide(), {"num_samples": 1}),
    "another name": (ArgumentError, "called num_samples=", MODEL, guide(), {"num_particles": 10}),
    "no guide": (ArgumentError, "guide must be", MODEL, None, {}),
    "method": (ArgumentError, "method must be", MODEL, guide(), {"method": "smc"}),
    "start": (ArgumentError, "start must be", MODEL, None, {"method": "ais", "start": "here"}),
    "temperatures": (ArgumentError, "num_temperatures must", MODEL, None, {"method": "ais", "num_temperatures": 1}),
    "leapfrog": (ArgumentError, "num_leapfrog must be", MODEL, None, {"method": "ais", "num_leapfrog": 0}),
    "batch size": (ArgumentError, "batch_size must be", MODEL, guide(), {"batch_size": 0}),
    "subsample": (SiteError, "without subsample_size", subsampled, subsampled_guide, {}),
    "subsample, ais": (SiteError, "without subsample_size", subsampled, None, {"method": "ais"}),
    "shared rows": (SiteError, "Leave batch_size out", lambda x: mean_model(x[:, 0]), lambda x: mean_guide(x[:, 0]),
                    {"batch_size": 2}),
    "NaN": (WeightsError, "NaN or infinite", nan_model, guide(), {}),
    "NaN, ais": (WeightsError, "NaN or infinite", nan_model, None, {"method": "ais", "num_temperatures": 4}),
    "no weight": (WeightsError, "outside its support", outside, guide(), {}),
    "discrete": (SiteError, "'k' is a discrete latent", lambda x: mixture(x[:, 0]), None, {"method": "ais"}),
    "moving support": (SiteError, "depends on other latents", bounded, None, {"method": "ais"}),
    "flat prior": (SiteError, "start='guide'", flat, None, {"method": "ais"}),
    "no latent": (SiteError, "no latent to anneal", no_latent, None, {"method": "ais"}),
    "scales": (WeightsError, "different scales", poutine.scale(MODEL, scale=2.0), guide(), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_evidence_is_refused_by_name_with_the_cure(case):
    kind, message, model, program, options = REFUSED[case]
    with pytest.raises(kind, match=message):
        evidence(model, program, X, **options)


@pytest.mark.parametrize("options", [{}, {"method": "ais", "start": "guide"}])
def test_point_estimates_are_refused(options):
    fitted = AutoDelta(mean_model)
    fitted(X[:, 0])
    with pytest.raises(GuideError, match="point estimate"):
        evidence(mean_model, fitted, X[:, 0], **options)
    with pytest.raises(GuideError):
        evidence(mean_model, AutoNormal(mean_model), X[:, 0])


def test_an_array_that_has_no_rows_cannot_be_split():
    with pytest.raises(ArgumentError, match="batch_size splits"):
        evidence(lambda: MODEL(X), lambda: guide()(X), batch_size=2)
    with pytest.raises(SiteError, match="has 6 rows for a batch of 2"):
        evidence(lambda x: MODEL(X), lambda x: guide()(X), X, batch_size=2)
