"""Bounds of several particles: importance-weighted and filtering, against exact evidence and exact gradients."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer import RenyiELBO

import pyro_elbo as pe
from models.linear_gaussian_ssm import Chain, simulate
from pyro_elbo.errors import ArgumentError, SiteError
from pyro_elbo.programs import trace_filtered
from tests.programs import PROGRAMS
from tests.support.scanned import BOTH, loss_and_gradients


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def importance(num_particles, **options):
    return pe.TraceIW_ELBO(num_particles, vectorize_particles=True, max_plate_nesting=1, **options)


def assert_within(samples, expected, k=5):
    """``|mean - expected| < k SE``; 5 SE of 30 or more: a false alarm in 40 000."""
    assert (samples.mean(0) - expected).abs() < k * samples.std(0) / len(samples) ** 0.5 + 1e-12


def assert_above(larger, smaller, k=5):
    """Two sets of independent values, row by row: the mean difference is above 0 by k SE."""
    difference = larger - smaller
    assert difference.mean() > k * difference.std() / len(difference) ** 0.5


# --- local latents: every row has its own weight -------------------------------------------------------------------


def data(n, evidence, seed=0):
    """Points whose log p under x ~ Normal(0, √2) is ``evidence``, nats."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return x * (-4 * (evidence + n / 2 * math.log(4 * math.pi)) / x.square().sum()).sqrt()


def local_model(x, index=None, size=None):
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x if index is None else x[index])


def local_guide(x, index=None, size=None):
    """Off the posterior Normal(x/2, √½)."""
    with pyro.plate("data", size or len(x), subsample=index):
        rows = x if index is None else x[index]
        pyro.sample("z", dist.Normal(0.3 * rows, pyro.param("scale", lambda: torch.tensor(0.9))))


def values(objective, runs, *args, programs=(local_model, local_guide)):
    """The objective on many sets of draws."""
    with torch.no_grad():
        return torch.stack([objective.terms(*programs, *args).objective for _ in range(runs)])


def test_the_scale_stays_outside_of_the_logarithm():
    """Ten points with log p = -17.81: the same bound per point for any size of the data that they stand for."""
    x, index = data(10, -17.81), torch.arange(10)
    assert dist.Normal(0.0, math.sqrt(2)).log_prob(x).sum().item() == pytest.approx(-17.81)
    found = {}
    for size in (10, 1000):
        pyro.set_rng_seed(0)
        found[size] = values(importance(100), 40, x, index, size) * 10 / size
    torch.testing.assert_close(found[1000], found[10])
    assert_within(found[10], -17.81 + 0.0, k=20)
    assert abs(found[10].mean() + 17.81) < 0.05
    renyi = RenyiELBO(alpha=0.0, num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        theirs = torch.tensor([-renyi.loss(local_model, local_guide, x, index, 1000) / 100 for _ in range(40)])
    assert_above(theirs, found[10])  # above log p, by nats
    assert theirs.mean() > -17


def test_never_above_the_evidence_whatever_the_subsample():
    """A thousand local latents with log p = -1860.6, ten particles."""
    x, evidence = data(1000, -1860.6), -1860.6
    full = values(importance(10), 40, x)
    for size in (1, 10, 300):
        index = [torch.randperm(1000)[:size] for _ in range(120)]
        batches = torch.stack([values(importance(10), 1, x, i)[0] for i in index])
        assert batches.mean() < evidence + 5 * batches.std() / 120**0.5
        se = (batches.var() / 120 + full.var() / 40).sqrt()
        assert abs(batches.mean() - full.mean()) < 5 * se
    assert_above(torch.full((40,), evidence), full)
    renyi = RenyiELBO(alpha=0.0, num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        theirs = torch.tensor([-renyi.loss(local_model, local_guide, x, torch.randperm(1000)[:10]) for _ in range(60)])
    assert_above(theirs, torch.full((60,), evidence))


def test_grows_with_the_particles_up_to_the_evidence():
    x = data(10, -17.81)
    counts = (1, 3, 12)
    found = [values(importance(k), 300, x) for k in counts]
    elbo = values(pe.TraceBeta_ELBO(kl="sampled"), 300, x)
    assert abs(elbo.mean() - found[0].mean()) < 5 * ((elbo.var() + found[0].var()) / 300).sqrt()
    for smaller, larger in itertools.pairwise(found):
        assert_above(larger, smaller)
    assert -17.81 - values(importance(1000), 30, x).mean() < 0.03


@pytest.mark.parametrize("num_particles", [1, 2, 7])
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("program", [p for p in PROGRAMS if p.evidence], ids=lambda p: p.name)
def test_exact_posterior_makes_the_bound_the_evidence(program, vectorize, num_particles):
    """With zero variance, discrete latents too."""
    guide = program.guide(program.model)
    options = {"vectorize_particles": vectorize and program.vectorizes, "num_particles": num_particles}
    for objective in (pe.TraceIW_ELBO(**options), pe.TraceTimestep_ELBO(bound="importance", **options)):
        for seed in range(2):
            pyro.set_rng_seed(seed)
            terms = objective.terms(program.model, guide, *program.args)
            torch.testing.assert_close(terms.objective, program.evidence(), rtol=0, atol=1e-10)
            torch.testing.assert_close(terms.elbo, program.evidence(), rtol=0, atol=1e-10)


def test_particles_in_a_loop_and_in_a_plate_are_the_same_bound():
    x = data(10, -17.81)
    looped = pe.TraceIW_ELBO(3)
    pair = values(importance(3), 150, x), values(looped, 150, x)
    assert abs(pair[0].mean() - pair[1].mean()) < 5 * ((pair[0].var() + pair[1].var()) / 150).sqrt()


def test_objective_is_the_log_of_the_mean_weight():
    """From the terms themselves: values that no estimator has touched."""
    x = data(10, -17.81)
    terms = importance(6).terms(local_model, local_guide, x)
    log_w = terms.sites["x"].nats - terms.sites["z"].nats
    assert log_w.shape == (6, 10)
    torch.testing.assert_close(terms.objective, (log_w.logsumexp(0) - math.log(6)).sum())
    torch.testing.assert_close(terms.elbo, log_w.mean(0).sum())
    assert terms.objective > terms.elbo


def test_latents_outside_of_the_plate_make_one_weight_of_all_rows():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x):
        pyro.sample("w", dist.Normal(0.1, 0.8))

    terms = importance(6).terms(model, guide, torch.ones(10))
    log_w = terms.sites["x"].nats.sum(-1) - terms.sites["w"].nats.squeeze(-1)
    torch.testing.assert_close(terms.objective, (log_w.logsumexp(0) - math.log(6)).sum())


# --- gradients -----------------------------------------------------------------------------------------------------

ROWS = 20_000
PRIOR = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def discrete_model(x):
    with pyro.plate("rows", ROWS):
        k = pyro.sample("k", dist.Categorical(PRIOR))
        pyro.sample("x", dist.Normal(pyro.param("means", lambda: torch.tensor([-1.0, 0.0, 1.5]))[k], 1.0), obs=x)


def discrete_guide(x):
    """The same parameters for every row, each with its own copy: one backward gives a gradient a row."""
    logits = pyro.param("logits", lambda: torch.tensor([0.3, -0.2, 0.1]).repeat(ROWS, 1))
    with pyro.plate("rows", ROWS):
        pyro.sample("k", dist.Categorical(logits=logits))


def exact_importance(logits, means, x, num_particles):
    """Σ over all assignments of the particles: Π q log mean w."""
    log_q = logits.log_softmax(-1)
    log_w = dist.Normal(means, 1.0).log_prob(x) + PRIOR.log() - log_q
    total = torch.tensor(0.0)
    for ks in itertools.product(range(3), repeat=num_particles):
        index = torch.tensor(ks)
        total = total + log_q[index].sum().exp() * (log_w[index].logsumexp(0) - math.log(num_particles))
    return total


@pytest.mark.parametrize("num_particles", [1, 2, 4])
def test_score_function_is_unbiased(num_particles):
    """Against enumeration: each of 20 000 rows is a draw of the gradient; 7 numbers within 5 SE."""
    x = torch.tensor(0.8)
    logits = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    means = torch.tensor([-1.0, 0.0, 1.5], requires_grad=True)
    bound = exact_importance(logits, means, x, num_particles)
    expected = torch.autograd.grad(bound, (logits, means))
    loss, gradients = loss_and_gradients(importance(num_particles), discrete_model, discrete_guide, x.expand(ROWS))
    rows = -gradients["logits"]
    assert ((rows.mean(0) - expected[0]).abs() < 5 * rows.std(0) / ROWS**0.5).all()
    runs = torch.stack(
        [
            -loss_and_gradients(importance(num_particles), discrete_model, discrete_guide, x.expand(ROWS), seed=s)[1][
                "means"
            ]
            for s in range(30)
        ]
    )
    assert ((runs.mean(0) / ROWS - expected[1]).abs() < 5 * runs.std(0) / ROWS / 30**0.5).all()
    assert abs(-loss / ROWS - bound.item()) < 0.05


def test_baseline_of_the_other_particles_lowers_the_variance():
    """Against the whole bound as reward, on the same draws."""
    x = torch.tensor(0.8).expand(ROWS)
    gradients = loss_and_gradients(importance(8), discrete_model, discrete_guide, x)[1]["logits"]
    logits = pyro.param("logits")
    pyro.set_rng_seed(3)
    terms = importance(8).terms(discrete_model, discrete_guide, x)
    log_w = terms.sites["x"].nats - terms.sites["k"].nats
    reward = (log_w.logsumexp(0) - math.log(8)).detach()
    (plain,) = torch.autograd.grad((terms.sites["k"].score.sum(0) * reward).sum(), logits)
    assert gradients.var(0).sum() < 0.5 * plain.var(0).sum()


def mixed_model(x):
    with pyro.plate("rows", ROWS):
        k = pyro.sample("k", dist.Categorical(PRIOR))
        z = pyro.sample("z", dist.Normal(k - 1.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def mixed_guide(x):
    logits = pyro.param("logits", lambda: torch.tensor([0.3, -0.2, 0.1]).repeat(ROWS, 1))
    shift = pyro.param("shift", lambda: torch.full((ROWS,), 0.2))
    with pyro.plate("rows", ROWS):
        k = pyro.sample("k", dist.Categorical(logits=logits))
        pyro.sample("z", dist.Normal(0.5 * k + shift, 0.8))


def test_gradient_of_discrete_and_continuous_latents():
    """K = 2, against finite differences of the bound with z integrated on a grid."""
    x, k, points = torch.tensor(0.8), 2, torch.linspace(-7.0, 7.0, 301)

    def exact(logits, shift):
        log_q = logits.log_softmax(-1)[:, None] + dist.Normal(0.5 * torch.arange(3.0)[:, None] + shift, 0.8).log_prob(
            points
        )
        log_p = PRIOR.log()[:, None] + dist.Normal(torch.arange(3.0)[:, None] - 1, 1.0).log_prob(points)
        log_w = (log_p + dist.Normal(points, 1.0).log_prob(x) - log_q).flatten()
        q = log_q.exp().flatten() * (points[1] - points[0])
        pairs = torch.logaddexp(log_w[:, None], log_w) - math.log(k)
        return q @ pairs @ q

    logits, shift = torch.tensor([0.3, -0.2, 0.1], requires_grad=True), torch.tensor(0.2, requires_grad=True)
    expected = torch.autograd.grad(exact(logits, shift), (logits, shift))
    gradients = loss_and_gradients(importance(k), mixed_model, mixed_guide, x.expand(ROWS))[1]
    for name, slope in zip(("logits", "shift"), expected, strict=True):
        rows = -gradients[name]
        assert ((rows.mean(0) - slope).abs() < 5 * rows.std(0) / ROWS**0.5).all(), name


def test_beta_in_the_weights_is_no_bound_and_the_terms_do_not_know():
    x = data(10, -17.81)
    found = []
    for beta in (1.0, 0.0, 3.0):
        pyro.set_rng_seed(0)
        found.append(importance(4, beta=beta).terms(local_model, local_guide, x))
    torch.testing.assert_close(found[1].elbo, found[0].elbo)
    log_likelihood = found[0].sites["x"].nats
    torch.testing.assert_close(found[1].objective, (log_likelihood.logsumexp(0) - math.log(4)).sum())
    log_w = log_likelihood - 3 * found[0].sites["z"].nats
    torch.testing.assert_close(found[2].objective, (log_w.logsumexp(0) - math.log(4)).sum())


def test_a_weight_inside_of_log_weights_needs_a_pathwise_gradient():
    x = torch.tensor(0.8).expand(ROWS)
    for options in ({"beta": 0.5}, {"beta": pe.LinearWarmup(0.0, 1.0, steps=3)}, {"free_bits": 0.1}):
        with pytest.raises(SiteError, match=r"'k'.*beta=1"):
            importance(2, **options).terms(discrete_model, discrete_guide, x)


# --- what has no bound ---------------------------------------------------------------------------------------------


def global_and_local(x, index):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def global_and_local_guide(x, index):
    pyro.sample("w", dist.Normal(0.0, 0.5))
    with pyro.plate("data", len(x), subsample=index):
        pyro.sample("z", dist.Normal(x[index], 1.0))


def test_a_subsampled_plate_that_not_all_sites_share():
    x = torch.ones(10)
    with pytest.raises(SiteError, match=r"'[zx]': plate 'data' is subsampled.*full data"):
        importance(3).terms(global_and_local, global_and_local_guide, x, torch.arange(4))
    full = importance(3).terms(global_and_local, global_and_local_guide, x, torch.arange(10))
    assert full.objective >= full.elbo


def test_a_scale_of_the_guide_alone_is_refused():
    """2 log q would enter the weights: at 1000 particles that is no bound on log p(x)."""
    x = torch.randn(4)
    loss = pe.TraceIW_ELBO(8)
    for guide in (poutine.scale(local_guide, 2.0), poutine.scale(local_guide, torch.tensor(2.0))):
        with pytest.raises(SiteError, match="'z in the guide': .*2.* Scale model and guide alike"):
            loss.terms(local_model, guide, x)
    both = [poutine.scale(program, 2.0) for program in (local_model, local_guide)]
    pyro.set_rng_seed(0)
    scaled = loss.terms(*both, x).objective
    pyro.set_rng_seed(0)
    torch.testing.assert_close(scaled, 2 * loss.terms(local_model, local_guide, x).objective)


def test_scales_that_differ_between_sites():
    def model(x):
        with poutine.scale(scale=2.0):
            local_model(x)

    with pytest.raises(SiteError, match=r"differ in scale.*guide alike, as a whole"):
        importance(3).terms(poutine.scale(local_model, 2.0), scaled_latent_guide, torch.ones(4))
    both = importance(3).terms(model, poutine.scale(local_guide, 2.0), torch.ones(4))
    torch.testing.assert_close(both.objective, 2 * _log_mean(both))


def scaled_latent_guide(x):
    local_guide(x)
    pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})


def _log_mean(terms):
    log_w = terms.sites["x"].nats - terms.sites["z"].nats
    return (log_w.logsumexp(0) - math.log(len(log_w))).sum()


# --- state space models: the Kalman filter knows the answer --------------------------------------------------------


def ssm_programs(ssm, chain, sharpness=1.0):
    """A model, and a guide that draws z_t ~ Normal(gain z + offset, scale) of a chain.

    ``sharpness`` below 1 pulls the guide's gain and offset toward zero, and widens it: it no longer fits, but its
    weights keep their moments.
    """

    def run(x, lengths, chain, observe):
        prior = ssm.prior(*x.shape[:2]) if chain is None else chain

        def step(z, row):
            mean = (row["gain"] @ z[..., None])[..., 0] + row["offset"]
            z = pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=row["scale_tril"]))
            if observe:
                x_mean = z @ ssm.emission.T
                pyro.sample("x", dist.MultivariateNormal(x_mean, scale_tril=ssm.emission_scale_tril), obs=row["x"])
            return z, None

        rows = {**prior._asdict(), "x": x}
        with pyro.plate("sequences", len(x), dim=-1):
            pe.scan(step, torch.zeros(len(x), ssm.transition.shape[0]), rows, lengths, dim=1)

    def model(x, lengths=None):
        run(x, lengths, None, observe=True)

    def guide(x, lengths=None):
        a = pyro.param("sharpness", lambda: torch.tensor(sharpness))
        off = Chain(a * chain.gain, a * chain.offset, chain.scale_tril / sharpness)
        run(x, lengths, off, observe=False)

    return model, guide


BOUNDS = {
    "ELBO": pe.TraceTimestep_ELBO(kl="sampled"),
    "ELBO, analytic": pe.TraceBeta_ELBO(),
    "importance": pe.TraceTimestep_ELBO(
        num_particles=4, bound="importance", vectorize_particles=True, max_plate_nesting=1
    ),
    "IW": importance(4),
    "filtering, no resampling": pe.TraceTimestep_ELBO(num_particles=4, bound="filtering", resample=0.0),
}


@pytest.mark.parametrize("shortest", [None, 1], ids=["full", "ragged"])
@pytest.mark.parametrize("bound", BOUNDS)
def test_exact_smoother_makes_the_bound_the_kalman_likelihood(bound, shortest):
    ssm, x, lengths = simulate(4, 6, shortest=shortest, seed=3)
    evidence = ssm.log_evidence(x, lengths)
    model, guide = ssm_programs(ssm, ssm.posterior(x, lengths))
    for seed in range(2):
        pyro.set_rng_seed(seed)
        terms = BOUNDS[bound].terms(model, guide, x, lengths)
        if bound != "ELBO, analytic":
            torch.testing.assert_close(terms.objective, evidence.sum(), rtol=0, atol=1e-8)
        if not bound.endswith("analytic"):
            per_sequence = terms.log_likelihood["x"].sum(-1) - terms.kl["z"].sum(-1)
            torch.testing.assert_close(per_sequence, evidence, rtol=0, atol=1e-8)


def test_analytic_terms_of_the_exact_smoother_have_the_evidence_as_mean():
    """Log-likelihoods at the draw no longer cancel against log q: 5 SE of 40 runs of 20 draws (t: 1 in 80 000)."""
    ssm, x, lengths = simulate(4, 6, shortest=2, seed=3)
    model, guide = ssm_programs(ssm, ssm.posterior(x, lengths))
    objective = pe.TraceTimestep_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    bounds = values(objective, 40, x, lengths, programs=(model, guide))
    assert bounds.std() > 0.01
    assert_within(bounds, ssm.log_evidence(x, lengths).sum())


SAME = 3000


def repeated(steps=6, seed=3, sharpness=0.5, shortest=None):
    """One sequence many times over: every row is an estimate of its own."""
    ssm, x, lengths = simulate(2, steps, d=1, k=1, shortest=shortest, seed=seed)
    evidence = ssm.log_evidence(x, lengths).repeat_interleave(SAME)
    x, lengths = x.repeat_interleave(SAME, 0), lengths.repeat_interleave(SAME)
    model, guide = ssm_programs(ssm, ssm.proposal(x, lengths), sharpness)
    return model, guide, x, lengths, evidence


def estimates(programs, args, num_particles, resample):
    """log Ẑ of every sequence."""
    with torch.no_grad():
        return trace_filtered(*programs, args, {}, num_particles, 1, resample)[1]


@pytest.mark.parametrize("resample", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shortest", [None, 1], ids=["full", "ragged"])
def test_filters_estimate_of_the_evidence_is_unbiased(shortest, resample):
    """E Ẑ = p(x) within 5 SE, for two sequences of 3000 copies each."""
    model, guide, x, lengths, evidence = repeated(shortest=shortest, seed=4, sharpness=0.8)
    log_z = estimates((model, guide), (x, lengths), 4, resample)
    assert log_z.shape == evidence.shape
    for ratio in (log_z - evidence).exp().reshape(2, SAME):
        assert ratio.std() > 0.05
        assert_within(ratio, torch.tensor(1.0))


def test_ragged_filter_of_one_sequence_does_not_see_the_others():
    """Unbiased for each length, down to a single step, and never resampled after its end."""
    model, guide, x, lengths, evidence = repeated(shortest=1, seed=4)
    assert lengths.unique().numel() == 2
    padded = torch.where(torch.arange(x.shape[1])[None, :, None] < lengths[:, None, None], x, 1e3)
    pyro.set_rng_seed(0)
    first = estimates((model, guide), (x, lengths), 4, 0.5)
    pyro.set_rng_seed(0)
    torch.testing.assert_close(estimates((model, guide), (padded, lengths), 4, 0.5), first, rtol=0, atol=0)


def test_order_of_the_bounds_for_a_guide_that_does_not_fit():
    """ELBO < importance < filtering < log p(x), each by more than 5 SE over 6000 sequences."""
    model, guide, x, _, evidence = repeated(steps=20, sharpness=0.3)
    pair, log_z = trace_filtered(model, guide, (x,), {}, 8, 1, 0.5)
    weighted = trace_filtered(model, guide, (x,), {}, 8, 1, 0.0)[1]
    with torch.no_grad():
        elbo = pe.TraceTimestep_ELBO(kl="sampled").terms(model, guide, x)
    per_sequence = elbo.log_likelihood["x"].sum(-1) - elbo.kl["z"].sum(-1)
    assert_above(weighted.detach(), per_sequence)
    assert_above(log_z.detach(), weighted.detach())
    assert_above(evidence, log_z.detach())
    assert pair.particle_dim == -2


@pytest.mark.parametrize("objective", ["filtering", "importance"])
def test_sequence_bounds_grow_with_the_particles(objective):
    model, guide, x, lengths, evidence = repeated(steps=8, shortest=3, sharpness=0.3)
    found = [estimates((model, guide), (x, lengths), k, 0.5 if objective == "filtering" else 0.0) for k in (2, 4, 16)]
    for smaller, larger in itertools.pairwise([*found, evidence]):
        assert_above(larger, smaller)


def test_without_resampling_the_filter_is_the_importance_bound():
    """On its own draws: the log of the mean of the weights' product."""
    ssm, x, lengths = simulate(3, 5, shortest=2, seed=1)
    model, guide = ssm_programs(ssm, ssm.proposal(x, lengths))
    objective = pe.TraceTimestep_ELBO(num_particles=4, bound="filtering", resample=0.0)
    terms = objective.terms(model, guide, x, lengths)
    log_w = terms.sites["x"].nats - terms.sites["z"].nats
    torch.testing.assert_close(terms.objective, (log_w.logsumexp(0) - math.log(4)).sum())
    always = pe.TraceTimestep_ELBO(num_particles=4, bound="filtering", resample=1.0)
    assert abs(always.terms(model, guide, x, lengths).objective - terms.objective) > 1e-3


@pytest.mark.parametrize("resample", [0.0, 0.5, 1.0])
def test_gradient_of_the_filter_on_its_ancestors(resample):
    """Finite differences with the noise held fixed: the choice of ancestors stays, and has no gradient."""
    ssm, x, lengths = simulate(3, 6, shortest=2, seed=2)
    model, guide = ssm_programs(ssm, ssm.proposal(x, lengths), sharpness=0.7)
    objective = pe.TraceTimestep_ELBO(num_particles=4, bound="filtering", resample=resample, max_plate_nesting=1)
    _, gradients = loss_and_gradients(objective, model, guide, x, lengths)
    sharpness, losses = pyro.get_param_store().named_parameters(), []
    (leaf,) = (p for _, p in sharpness)
    for shift in (1e-6, -1e-6):
        leaf.data += shift
        pyro.set_rng_seed(3)
        losses.append(objective.loss(model, guide, x, lengths))
        leaf.data -= shift
    slope = (losses[0] - losses[1]) / 2e-6
    assert abs(slope) > 1e-3
    assert gradients["sharpness"].item() == pytest.approx(slope, rel=1e-5)


def test_filter_scales_a_subsample_and_normalizes():
    ssm, x, _ = simulate(6, 5, seed=1)

    def subsampled(program, rows):
        def run(x):
            with pyro.plate("all", 12, subsample=torch.arange(rows), dim=-1):
                program(x[:rows])

        return run

    def model(x):
        def step(z, x_t):
            z = pyro.sample("z", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x_t)
            return z, None

        pe.scan(step, torch.zeros(len(x)), x[..., 0], dim=1)

    def guide(x):
        def step(z, x_t):
            z = pyro.sample("z", dist.Normal(0.5 * (z + x_t), 0.7))
            return z, None

        pe.scan(step, torch.zeros(len(x)), x[..., 0], dim=1)

    found = {}
    for normalize in ("total", "sequence", "frame", "step"):
        pyro.set_rng_seed(0)
        objective = pe.TraceTimestep_ELBO(num_particles=3, bound="filtering", normalize=normalize)
        found[normalize] = objective.terms(subsampled(model, 6), subsampled(guide, 6), x).objective
    for normalize, divisor in (("sequence", 12), ("frame", 60), ("step", 5)):
        torch.testing.assert_close(found[normalize], found["total"] / divisor)


# --- what cannot be filtered ---------------------------------------------------------------------------------------


def chain(way=BOTH[0], observe=True, **options):
    def step(z, x_t):
        z = pyro.sample("z", dist.Normal(z, 1.0))
        if observe:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x_t)
        return z, z

    def program(x):
        with pyro.plate("sequences", 3, dim=-1):
            return way(step, torch.zeros(3), x, length=len(x), **options)

    return program


def filtered(model, guide, x=None, **options):
    objective = pe.TraceTimestep_ELBO(num_particles=3, bound="filtering", max_plate_nesting=1, **options)
    return objective.terms(model, guide, torch.zeros(4, 3) if x is None else x)


def discrete(observe):
    def step(k, x_t):
        k = pyro.sample("k", dist.Bernoulli(0.3 + 0.1 * k))
        if observe:
            pyro.sample("x", dist.Normal(k, 1.0), obs=x_t)
        return k, None

    def program(x):
        with pyro.plate("sequences", 3, dim=-1):
            pe.scan(step, torch.zeros(3), x)

    return program


def before(program):
    def run(x):
        pyro.sample("level", dist.Normal(0.0, 1.0))
        program(x)

    return run


def twice(program):
    def run(x):
        for prefix in ("one", "two"):
            scope(program, prefix=prefix)(x)

    return run


def nothing(x):
    pass


def not_over_time(x):
    with pyro.plate("sequences", 3):
        pyro.sample("z", dist.Normal(torch.zeros(3, 4), 1.0).to_event(1))


def other_site(x):
    def step(c, x_t):
        return c, pyro.sample("y", dist.Normal(torch.zeros(3), 1.0), infer={"is_auxiliary": True})

    with pyro.plate("sequences", 3, dim=-1):
        pe.scan(step, None, x)


GUIDE = chain(observe=False)
UNFILTERED = {
    "discrete": (discrete(True), discrete(False), r"'k'.*Bernoulli.*bound='importance'"),
    "latent before": (before(chain()), before(GUIDE), r"'level'.*first step"),
    "no scan in the guide": (chain(), nothing, r"pe.scan.*step of a scan"),
    "a guide without steps": (chain(), not_over_time, r"pe.scan.*step of a scan"),
    "loops": (chain(BOTH[1]), chain(BOTH[1], observe=False), r"pe.scan|one pe.scan"),
    "another latent": (chain(), other_site, r"\['z'\].*guide's scan"),
    "backward guide": (chain(), chain(observe=False, reverse=True), r"forward.*4 steps backward"),
    "backward model": (chain(reverse=True), GUIDE, r"forward.*4 steps backward"),
    "another length": (chain(), lambda x: GUIDE(x[:3]), r"4 steps.*3 steps"),
    "two scans": (twice(chain()), twice(GUIDE), r"one pe.scan"),
}


@pytest.mark.parametrize("name", UNFILTERED)
def test_what_cannot_be_filtered(name):
    model, guide, words = UNFILTERED[name]
    with pytest.raises(SiteError, match=words):
        filtered(model, guide)


def test_a_filter_has_several_particles_and_no_weights():
    with pytest.raises(ArgumentError, match="num_particles >= 2, got 1"):
        pe.TraceTimestep_ELBO(bound="filtering", num_particles=1)
    for options in ({"beta": 0.5}, {"free_bits": 0.1}):
        with pytest.raises(ArgumentError, match="neither beta nor free_bits"):
            pe.TraceTimestep_ELBO(bound="filtering", num_particles=4, **options)


def test_a_failed_filter_leaves_no_trace():
    """Handlers, plates and the filter itself are gone: what runs next is a plain scan."""
    for model, guide, _ in UNFILTERED.values():
        with pytest.raises(SiteError):
            filtered(model, guide)
    pyro.set_rng_seed(0)
    found = pe.TraceTimestep_ELBO().loss(chain(), GUIDE, torch.zeros(4, 3))
    pyro.set_rng_seed(0)
    assert found == pytest.approx(
        pe.TraceTimestep_ELBO().loss(chain(BOTH[1]), chain(BOTH[1], observe=False), torch.zeros(4, 3))
    )


def test_filter_over_several_sites_and_an_encoder_that_runs_backward():
    """Deterministic scans beside the one with sites; two latents; an observation of each."""

    def encoder(x):
        return pe.scan(lambda h, x_t: (h * 0.5 + x_t,) * 2, torch.zeros(3), x, reverse=True)[1]

    def model(x):
        def step(c, x_t):
            z, level = c
            z = pyro.sample("z", dist.Normal(0.5 * z + level, 1.0))
            level = pyro.sample("level", dist.Normal(level, 0.2))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x_t)
            pyro.sample("y", dist.Normal(level, 1.0), obs=-x_t)
            pyro.deterministic("sum", z + level)
            return (z, level), None

        with pyro.plate("sequences", 3, dim=-1):
            pe.scan(step, (torch.zeros(3), torch.zeros(3)), x)

    def guide(x):
        def step(c, row):
            z, level = c
            z = pyro.sample("z", dist.Normal(0.3 * z + 0.3 * row, 0.8))
            level = pyro.sample("level", dist.Normal(level + 0.1 * row, 0.3))
            return (z, level), None

        with pyro.plate("sequences", 3, dim=-1):
            pe.scan(step, (torch.zeros(3), torch.zeros(3)), encoder(x))

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    terms = filtered(model, guide, x, resample=0.0)
    log_w = sum(t.nats if not t.is_kl else -t.nats for t in terms.sites.values())
    torch.testing.assert_close(terms.objective, (log_w.logsumexp(0) - math.log(3)).sum())
    assert set(terms.kl) == {"z", "level"}
    assert terms.to_dataset()["kl_z"].dims == ("sequences", "time")
