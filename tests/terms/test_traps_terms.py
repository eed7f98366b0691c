"""Known traps of terms and weights, each held by a number that was worked out by hand."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from pyro.poutine.util import prune_subsample_sites

import pyro_elbo as pe
from tests.programs import (
    PROGRAMS,
    X,
    bernoulli_guide,
    bernoulli_model,
    global_guide,
    global_model,
    loc,
    local_guide,
    local_model,
    num,
    subsampled_guide,
    subsampled_model,
)
from tests.support.rows import every_other

# The nesting is given because a trial run that finds it would use up random numbers.
VECTORIZED = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2}
several = pytest.mark.parametrize(
    "particles", [{}, {"num_particles": 3}, VECTORIZED], ids=["one", "loop", "vectorized"]
)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def terms_of(loss, model, guide, *args, seed=0):
    """The terms on the draws of ``seed``."""
    pyro.set_rng_seed(seed)
    return loss.terms(model, guide, *args)


def gradient_of(loss, model, guide, *args, seed=0):
    """The loss and the gradient of its parameters, by name."""
    poutine.trace(guide).get_trace(*args)
    parameters = dict(pyro.get_param_store().named_parameters())
    for p in parameters.values():
        p.grad = None
    pyro.set_rng_seed(seed)
    value = loss.loss_and_grads(model, guide, *args)
    return value, {name: p.grad for name, p in parameters.items()}


# --- 1: analytic KL against the order of the sites --------------------------------------------------------------


def chain_model():
    z1 = pyro.sample("z1", dist.Normal(num(0.0), num(1.0)))
    pyro.sample("z2", dist.Normal(z1, num(1.0)))


def reversed_chain_guide():
    """The model's own joint distribution, factorized the other way round: the true KL is 0."""
    z2 = pyro.sample("z2", dist.Normal(num(0.0), num(2.0**0.5)))
    pyro.sample("z1", dist.Normal(z2 / 2, num(0.5**0.5)))


def test_1_sampled_terms_give_the_true_kl_of_zero_at_every_draw():
    for seed in range(20):
        terms = terms_of(pe.TraceBeta_ELBO(kl="sampled"), chain_model, reversed_chain_guide, seed=seed)
        assert terms.rate.item() == pytest.approx(0.0, abs=1e-12)


def test_1_auto_falls_back_to_sampled_terms_for_the_site_whose_parent_is_its_descendant():
    """Bound 5 SE of 20 batches: a false alarm in 12 000 (Student's t)."""
    loss = pe.TraceBeta_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=0)
    batches = [terms_of(loss, chain_model, reversed_chain_guide, seed=seed) for seed in range(20)]
    assert not batches[0].is_analytic["z2"]
    rates = torch.stack([t.rate for t in batches])
    assert abs(rates.mean()) < 5 * rates.std() / len(rates) ** 0.5
    assert abs(rates.mean()) < 0.02


def test_1_pyros_mean_field_bound_is_one_nat_off():
    """E[KL(q(z2) ‖ p(z2|z1))] + E[KL(q(z1|z2) ‖ p(z1))] = (1 - ln 2 / 2) + ln 2 / 2 = 1.

    Bound 5 SE of 20 batches: a false alarm in 12 000.
    """
    loss = TraceMeanField_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=0)
    pyro.set_rng_seed(0)
    with pytest.warns(UserWarning, match="mean field restriction"):
        costs = torch.tensor([loss.loss(chain_model, reversed_chain_guide) for _ in range(20)])
    assert abs(costs.mean() - 1.0) < 5 * costs.std() / len(costs) ** 0.5
    assert costs.mean().item() == pytest.approx(1.0, abs=0.02)


def test_1_the_same_order_in_both_programs_stays_analytic():
    def guide():
        z1 = pyro.sample("z1", dist.Normal(num(0.0), num(1.0)))
        pyro.sample("z2", dist.Normal(z1, num(1.0)))

    terms = terms_of(pe.TraceBeta_ELBO(), chain_model, guide)
    assert terms.is_analytic == {"z1": True, "z2": True}
    assert terms.rate.item() == 0.0


# --- 2: scale or mask in the model alone -------------------------------------------------------------------------


def wide_guide(x):
    """KL(N(1, 1) ‖ N(0, 1)) = 1/2 per row."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(num(1.0), num(1.0)))


def row_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(num(0.0), num(1.0)))
        pyro.sample("x", dist.Normal(z, num(1.0)), obs=x)


MODEL_ONLY = {
    "scale": poutine.scale(row_model, 3.0),
    "mask": poutine.mask(row_model, mask=torch.tensor([True, False, True, False])),
}


@pytest.mark.parametrize("handler", MODEL_ONLY)
@several
def test_2_a_scale_or_mask_in_the_model_alone_gives_the_sampled_bound(handler, particles):
    model = MODEL_ONLY[handler]

    def value(loss):
        pyro.set_rng_seed(1)
        return loss.loss(model, wide_guide, X)

    assert value(pe.TraceBeta_ELBO(**particles)) == pytest.approx(value(Trace_ELBO(**particles)), rel=1e-12)
    assert abs(value(TraceMeanField_ELBO(**particles)) - value(Trace_ELBO(**particles))) > 1
    assert not terms_of(pe.TraceBeta_ELBO(**particles), model, wide_guide, X).is_analytic["z"]


def test_2_model_only_scale_has_the_expectation_that_the_handlers_say():
    """The rate is Σ E[log q - 3 log p] = 4 (1/2 + 2 H) with the cross-entropy H = log √(2π) + 1.

    Bound 5 SE of 20 batches: a false alarm in 12 000.
    """
    loss = pe.TraceBeta_ELBO(num_particles=5000, vectorize_particles=True, max_plate_nesting=1)
    rates = torch.stack([terms_of(loss, MODEL_ONLY["scale"], wide_guide, X, seed=s).rate for s in range(20)])
    expected = 4 * (0.5 + 2 * (0.5 * math.log(2 * math.pi) + 1))
    assert expected == pytest.approx(17.3515, abs=1e-4)
    assert abs(rates.mean() - expected) < 5 * rates.std() / len(rates) ** 0.5


# --- 3: beta on every path ---------------------------------------------------------------------------------------


def three_rows_model():
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(num(0.0), num(1.0)))


def three_rows_guide():
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.ones(3)), num(1.0)))


@several
def test_3_a_beta_per_datum_weighs_row_by_row(particles):
    """KL(N(1, 1) ‖ N(0, 1)) = 1/2 a row: β = (1, 2, 3) charges 3.0; the slopes in the means are β."""
    loss = pe.TraceBeta_ELBO(beta=torch.tensor([1.0, 2.0, 3.0]), **particles)
    terms = terms_of(loss, three_rows_model, three_rows_guide)
    assert terms.objective.item() == pytest.approx(-3.0)
    assert terms.elbo.item() == pytest.approx(-1.5)
    value, gradient = gradient_of(loss, three_rows_model, three_rows_guide)
    assert value == pytest.approx(3.0)
    torch.testing.assert_close(gradient["loc"], torch.tensor([1.0, 2.0, 3.0]))


@several
@pytest.mark.parametrize("program", every_other([p for p in PROGRAMS if p.name != "AutoDelta"]), ids=lambda p: p.name)
def test_3_no_path_ignores_beta(program, particles):
    """AutoDelta is left out: a point has no rate of its own, so nothing tells whether β reached it."""
    guide = program.guide(program.model)
    poutine.trace(guide).get_trace(*program.args)
    for kl in ("auto", "sampled"):
        plain = terms_of(pe.TraceBeta_ELBO(kl=kl, **particles), program.model, guide, *program.args)
        assert abs(plain.rate) > 1e-6
        expected = -plain.distortion - 3 * plain.rate
        for beta in (3.0, torch.tensor(3.0), pe.Constant(3.0), dict.fromkeys(plain.kl, 3.0)):
            loss = pe.TraceBeta_ELBO(beta, kl=kl, **particles)
            weighted = terms_of(loss, program.model, guide, *program.args)
            torch.testing.assert_close(weighted.objective, expected)
            pyro.set_rng_seed(0)
            assert loss.loss(program.model, guide, *program.args) == pytest.approx(-expected.item())


def test_3_beta_weighs_the_reward_of_a_score_function_site():
    """One draw z of Bernoulli(σ(l)): d loss / d l = -(log p(x|z) - β (log q - log p)) (z - σ(l))."""
    for seed, beta in ((0, 4.0), (1, 4.0), (2, 0.25), (3, 0.0)):
        loss = pe.TraceBeta_ELBO(beta, kl="sampled")
        _, gradient = gradient_of(loss, bernoulli_model, bernoulli_guide, X, seed=seed)
        pyro.set_rng_seed(seed)
        logit = pyro.param("logit").detach()
        z = bernoulli_draw(logit)
        likelihood = dist.Normal(2 * z - 1, num(1.0)).log_prob(X).sum()
        kl = dist.Bernoulli(logits=logit).log_prob(z) - dist.Bernoulli(num(0.3)).log_prob(z)
        slope = z - torch.sigmoid(logit)
        torch.testing.assert_close(gradient["logit"], -(likelihood - beta * kl) * slope)


def bernoulli_draw(logit):
    return poutine.trace(bernoulli_guide).get_trace(X).nodes["z"]["value"]


# --- 4: beta = 0 ---------------------------------------------------------------------------------------------------


def test_4_pyros_scale_refuses_zero_and_beta_zero_works():
    with pytest.raises(ValueError, match="0"):
        poutine.scale(global_model, 0.0)(X)
    terms = terms_of(pe.TraceBeta_ELBO(0.0), global_model, global_guide, X)
    torch.testing.assert_close(terms.objective, -terms.distortion)
    assert terms.rate > 0


@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_4_beta_zero_trains(kl):
    """Σ (x - 1/2)² pulls the mean of z to the mean of the data and its scale to zero, prior or not."""
    svi = SVI(global_model, global_guide, pyro.optim.Adam({"lr": 0.05}), loss=pe.TraceBeta_ELBO(0.0, kl=kl))
    losses = [svi.step(X) for _ in range(400)]
    assert all(math.isfinite(x) for x in losses)
    assert pyro.param("loc").item() == pytest.approx(X.mean().item(), abs=0.05)
    assert pyro.param("scale").item() < 0.1  # the posterior's is 0.447


def test_4_beta_zero_leaves_the_likelihood_alone_in_the_score_function_reward():
    _, gradient = gradient_of(pe.TraceBeta_ELBO(0.0), bernoulli_model, bernoulli_guide, X, seed=5)
    pyro.set_rng_seed(5)
    logit = pyro.param("logit").detach()
    z = bernoulli_draw(logit)
    likelihood = dist.Normal(2 * z - 1, num(1.0)).log_prob(X).sum()
    torch.testing.assert_close(gradient["logit"], -likelihood * (z - torch.sigmoid(logit)))


# --- 5: NaN where the mask is false -----------------------------------------------------------------------------


NAN = math.nan
MASK = torch.tensor([True, False, True, True])
MISSING = torch.tensor([0.3, NAN, 0.8, 1.9])


def handler_masked(z, x):
    with poutine.mask(mask=MASK):
        pyro.sample("x", dist.Normal(z, num(1.0)), obs=x)


def dist_masked(z, x):
    pyro.sample("x", dist.Normal(z, num(1.0)).mask(MASK), obs=x)


def positive(z, x):
    """A support that zero does not belong to."""
    with poutine.mask(mask=MASK):
        pyro.sample("x", dist.LogNormal(z, num(1.0)), obs=x)


def counts(z, x):
    with poutine.mask(mask=MASK):
        pyro.sample("x", dist.Poisson(z.exp()), obs=torch.where(MASK, x.round(), x))


def pairs(z, x):
    """A whole event is missing in one row, one of its entries in another; both rows are masked."""
    both = torch.stack([x, torch.where(MASK, x, 7.0)], -1)
    with poutine.mask(mask=MASK):
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) + torch.zeros(4, 2), num(1.0)).to_event(1), obs=both)


def elements(z, x):
    """The mask lies inside of the event: all elements are missing in one row, some in others."""
    both = torch.stack([x, torch.where(x > 0.7, NAN, x)], -1)
    seen = MASK.unsqueeze(-1) & ~both.isnan()
    pyro.sample("x", dist.Normal(z.unsqueeze(-1) + torch.zeros(4, 2), num(1.0)).mask(seen).to_event(1), obs=both)


@pytest.mark.parametrize(
    "observe", [handler_masked, dist_masked, positive, counts, pairs, elements], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("validate", [True, False])
@several
def test_5_nan_under_the_mask_leaves_value_and_gradient_finite_and_unchanged(observe, validate, particles):
    def model(x):
        z = pyro.sample("z", dist.Normal(num(0.0), num(1.0)))
        with pyro.plate("data", len(x)):
            observe(z, x)

    pyro.enable_validation(validate)
    loss = pe.TraceBeta_ELBO(**particles)
    with_nan = gradient_of(loss, model, global_guide, MISSING, seed=3)
    filled = gradient_of(loss, model, global_guide, torch.where(MASK, MISSING, 1.0), seed=3)
    assert math.isfinite(with_nan[0])
    assert with_nan[0] == pytest.approx(filled[0], rel=1e-12)
    for name, gradient in filled[1].items():
        torch.testing.assert_close(with_nan[1][name], gradient)
    likelihood = terms_of(loss, model, global_guide, MISSING).log_likelihood["x"]
    assert likelihood[1] == 0
    assert torch.isfinite(likelihood).all()


def test_5_pyros_gradient_is_nan_there():
    """Scale in the model: NaN · 0 in the backward pass of the masked row. The loss itself is finite."""

    def model(x):
        sigma = pyro.param("sigma", lambda: num(1.5))
        z = pyro.sample("z", dist.Normal(num(0.0), num(1.0)))
        with pyro.plate("data", len(x)), poutine.mask(mask=MASK):
            pyro.sample("x", dist.Normal(z, sigma), obs=x)

    pyro.enable_validation(False)
    pyro.param("sigma", lambda: num(1.5))
    value, gradient = gradient_of(Trace_ELBO(), model, global_guide, MISSING)
    assert math.isfinite(value)
    assert torch.isnan(gradient["sigma"])
    ours = gradient_of(pe.TraceBeta_ELBO(), model, global_guide, MISSING)
    assert math.isfinite(ours[0])
    assert all(torch.isfinite(g).all() for g in ours[1].values())


# --- 6: particles ----------------------------------------------------------------------------------------------


def test_6_particles_add_a_left_dimension_that_is_not_data():
    shapes = []

    def guide(x):
        shapes.append(local_guide_with_record(x))

    def local_guide_with_record(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).expand([len(x), 2]).to_event(1))
        return tuple(z.shape)

    loss = pe.TraceBeta_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    terms = terms_of(loss, local_model, guide, X)
    assert shapes == [(5, 4, 2)]
    assert terms.num_data == 4
    assert terms.kl["z"].shape == (4,)
    assert terms.kl_per_dim["z"].shape == (4, 2)
    assert terms.log_likelihood["x"].shape == (4,)
    assert terms.rate.item() == pytest.approx(0.0, abs=1e-12)


def test_6_more_particles_do_not_multiply_the_bound():
    for particles in ({"num_particles": 7}, {"num_particles": 7, "vectorize_particles": True}):
        terms = terms_of(pe.TraceBeta_ELBO(**particles), three_rows_model, three_rows_guide)
        assert terms.rate.item() == pytest.approx(1.5)


def test_6_a_recurrent_cell_takes_particles_in_a_loop_only():
    cell = torch.nn.GRUCell(1, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            inputs = x.unsqueeze(-1).expand(*h.shape[:-1], 1)
            pyro.sample("x", dist.Normal(cell(inputs, h).sum(-1), num(1.0)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal(loc("h_loc", 2), num(1.0)).to_event(1))

    loop = terms_of(pe.TraceBeta_ELBO(num_particles=3), model, guide, X)
    assert loop.log_likelihood["x"].shape == (4,)
    with pytest.raises((ValueError, RuntimeError), match="GRUCell"):
        terms_of(pe.TraceBeta_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1), model, guide, X)


# --- 7: plates in traces -----------------------------------------------------------------------------------------


def test_7_plates_are_found_although_a_pruned_trace_has_no_site_for_them():
    index = torch.tensor([0, 2])
    trace = poutine.trace(local_model).get_trace(X)
    assert "data" not in prune_subsample_sites(trace).nodes  # what Pyro's ELBOs are left with
    assert terms_of(pe.TraceBeta_ELBO(), local_model, local_guide, X).plates["z"] == (("data", -1, 4, 4),)
    terms = terms_of(pe.TraceBeta_ELBO(), subsampled_model, subsampled_guide, X, index)
    assert terms.plates["z"] == (("data", -1, 2, 4),)
    assert "data" not in {**terms.kl, **terms.log_likelihood}


def test_7_the_scale_enters_once():
    """Pyro's log_prob_sum holds the scale already; ours keeps log density and scale apart."""
    index = torch.tensor([0, 2])
    terms = terms_of(pe.TraceBeta_ELBO(kl="sampled"), subsampled_model, subsampled_guide, X, index)
    pyro.set_rng_seed(0)
    guide_trace = poutine.trace(subsampled_guide).get_trace(X, index)
    trace = poutine.trace(poutine.replay(subsampled_model, trace=guide_trace)).get_trace(X, index)
    trace.compute_log_prob()
    node = trace.nodes["x"]
    unscaled = node["fn"].log_prob(node["value"])
    torch.testing.assert_close(terms.log_likelihood["x"], unscaled)
    torch.testing.assert_close(2 * unscaled.sum(), node["log_prob_sum"])
    torch.testing.assert_close(-terms.distortion, node["log_prob_sum"])
    assert terms.scale["x"] == 2.0


# --- 8: auxiliary sites and the Jacobian of Delta sites ---------------------------------------------------------


def lognormal_model():
    pyro.sample("rate", dist.LogNormal(num(0.0), num(1.0)))


def at_the_prior(kind):
    """An AutoGuide over log rate ~ N(0, 1), which is the model itself: KL 0, whatever the draw."""
    init = pyro.infer.autoguide.init_to_value(values={"rate": num(1.0)})
    return kind(lognormal_model, init_loc_fn=init, init_scale=1.0)


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
@several
@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_8_log_q_of_the_auxiliary_site_and_the_jacobian_of_the_delta_site_cancel_the_prior(kind, particles, kl):
    guide = at_the_prior(kind)
    guide()
    for seed in range(5):
        terms = terms_of(pe.TraceBeta_ELBO(kl=kl, **particles), lognormal_model, guide, seed=seed)
        assert terms.rate.item() == pytest.approx(0.0, abs=1e-10)
        assert terms.elbo.item() == pytest.approx(0.0, abs=1e-10)


def test_8_pyros_mean_field_bound_loses_the_jacobian():
    """It loses log|d rate / d log rate| = log rate, a draw of N(0, 1)."""
    guide = at_the_prior(AutoNormal)
    guide()
    pyro.set_rng_seed(0)
    rate = guide()["rate"].detach()
    pyro.set_rng_seed(0)
    assert abs(rate.log()) > 0.1
    assert abs(TraceMeanField_ELBO().loss(lognormal_model, guide)) == pytest.approx(rate.log().abs().item())


@pytest.mark.parametrize("kind", [AutoMultivariateNormal, AutoLowRankMultivariateNormal])
def test_8_a_joint_auxiliary_site_carries_the_entropy_of_all_latents(kind):
    """log q of ``_latent`` and -log p - log|J| of each site are separate terms that add up to the rate."""

    def model():
        pyro.sample("a", dist.LogNormal(num(0.0), num(1.0)))
        pyro.sample("b", dist.Normal(num(0.0), num(1.0)))

    guide = kind(model, init_scale=0.5)
    guide()
    terms = terms_of(pe.TraceBeta_ELBO(), model, guide)
    (auxiliary,) = set(terms.kl) - {"a", "b"}
    assert auxiliary.endswith("_latent")
    torch.testing.assert_close(sum(terms.kl_total.values()), terms.rate)
    pyro.set_rng_seed(0)
    trace = poutine.trace(guide).get_trace()
    torch.testing.assert_close(terms.kl_total[auxiliary], trace.log_prob_sum(lambda name, _: name == auxiliary))


# --- 9: subsampling and global sites ------------------------------------------------------------------------------


def prior_model(x, index):
    """w and z at N(1, 1) against N(0, 1): 1/2 nat each, known without a draw."""
    pyro.sample("w", dist.Normal(num(0.0), num(1.0)))
    with pyro.plate("data", len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(num(0.0), num(1.0)))
        pyro.sample("x", dist.Normal(z, num(1.0)), obs=x[index])


def shifted_guide(x, index):
    pyro.sample("w", dist.Normal(num(1.0), num(1.0)))
    with pyro.plate("data", len(x), subsample=index):
        pyro.sample("z", dist.Normal(num(1.0), num(1.0)))


@pytest.mark.parametrize("rows", [[0], [1, 3], [0, 1, 2], [0, 1, 2, 3]])
def test_9_local_kl_is_scaled_and_global_kl_counts_once(rows):
    """Rate = 1/2 (w) + N/B · B · 1/2 (z) = 0.5 + 2.0 with N = 4, for every B; per datum 0.625."""
    terms = terms_of(pe.TraceBeta_ELBO(), prior_model, shifted_guide, X, torch.tensor(rows))
    assert terms.kl_total["w"].item() == pytest.approx(0.5)
    assert terms.kl_total["z"].item() == pytest.approx(2.0)
    assert terms.rate.item() == pytest.approx(2.5)
    assert terms.num_data == 4
    assert (terms.rate / terms.num_data).item() == pytest.approx(0.625)
    torch.testing.assert_close(terms.kl["z"], torch.full((len(rows),), 0.5))


# --- 10: KL is summed over dimensions ---------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 16])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_10_kl_is_summed_over_dimensions(dims, mean):
    """KL(N(m, 1) ‖ N(0, 1)) = m²/2 per dimension: D/2 nats for m = 1; 0 for m = 0, not the -D/2 of a dropped +1."""

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(dims), 1.0).to_event(1))

    def guide():
        pyro.sample("z", dist.Normal(torch.full((dims,), mean), 1.0).to_event(1))

    terms = terms_of(pe.TraceBeta_ELBO(), model, guide)
    assert terms.kl["z"].item() == pytest.approx(dims * mean**2 / 2, abs=1e-12)
    torch.testing.assert_close(terms.kl_per_dim["z"], torch.full((dims,), mean**2 / 2))


def test_10_the_kl_of_weights_is_summed_over_weights():
    """A 3 × 5 matrix of weights at N(1, 1): 7.5 nats in all, not its average of 0.5."""

    def model():
        pyro.sample("weight", dist.Normal(torch.zeros(3, 5), 1.0).to_event(2))

    def guide():
        pyro.sample("weight", dist.Normal(torch.ones(3, 5), 1.0).to_event(2))

    terms = terms_of(pe.TraceBeta_ELBO(), model, guide)
    assert terms.rate.item() == pytest.approx(7.5)
    assert terms.kl_per_dim["weight"].shape == (3, 5)
