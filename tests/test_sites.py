"""Roles, plates, masks and scales of sites: Pyro's numbers where it is right, elsewhere the exact ones or a refusal."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.enum import config_enumerate
from pyro.infer.reparam import LocScaleReparam, SplitReparam, TransformReparam

import pyro_elbo as pe
from pyro_elbo.errors import GuideError, SiteError
from tests.support.refusing import refusing

refuses = refusing(re.compile(r"\b(give|remove|use|put|add)\b", re.I))


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def same_as_pyro(model, guide, *args, **options):
    """The bound at β = 1 is Pyro's, on the same draws; return the terms."""
    with poutine.block():
        guide(*args)  # a lazy guide draws when it first runs
    pyro.set_rng_seed(0)
    theirs = -Trace_ELBO(**options).loss(model, guide, *args)
    pyro.set_rng_seed(0)
    terms = pe.TraceBeta_ELBO(kl="sampled", **options).terms(model, guide, *args)
    assert terms.elbo.item() == pytest.approx(theirs, rel=1e-10)
    for group, sums in ((terms.kl, terms.kl_total), (terms.log_likelihood, terms.log_likelihood_total)):
        for name, x in group.items():
            assert (x * terms.scale[name]).sum().item() == pytest.approx(sums[name].item(), rel=1e-10), name
    return terms


Y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)

# --- what poutine.reparam and poutine.condition leave ------------------------------------------------------------


def schools(y, index=None):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(Y), subsample=index):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


REPARAM = {"theta": LocScaleReparam(0.0)}


def test_a_reparameterized_latent_is_deterministic_and_no_datum():
    model = poutine.reparam(schools, REPARAM)
    guide = AutoNormal(model)
    guide(Y)
    terms = same_as_pyro(model, guide, Y)
    assert terms.num_data == 8
    assert list(terms.log_likelihood) == ["y"]
    assert list(terms.kl) == ["mu", "tau", "theta_decentered"]
    data = pe.to_arviz(model, guide, Y, num_samples=30)
    assert set(data.posterior.data_vars) == {"mu", "tau", "theta", "theta_decentered"}
    assert data.posterior.theta.dims == ("chain", "draw", "school")
    p = data.posterior
    torch.testing.assert_close(
        torch.tensor(p.theta.values), torch.tensor((p.mu + p.tau * p.theta_decentered).transpose(*p.theta.dims).values)
    )
    for group in ("observed_data", "log_likelihood", "posterior_predictive", "prior_predictive"):
        assert list(data[group].data_vars) == ["y"]


def test_a_reparameterized_latent_takes_minibatches_and_bounds():
    index = torch.tensor([1, 4])
    model = poutine.reparam(schools, REPARAM)
    guide = AutoNormal(model, create_plates=lambda y, index: pyro.plate("school", 8, subsample=index))
    guide(Y[index], index)
    terms = same_as_pyro(model, guide, Y[index], index)
    assert terms.num_data == 8
    loss = pe.TraceBeta_ELBO(num_particles=3, vectorize_particles=True)
    assert loss.terms(model, guide, Y[index], index).num_data == 8


def test_the_density_of_a_latent_that_is_split_belongs_to_the_rate():
    """SplitReparam leaves log p(z) at the Delta of z, and parts without a density."""

    def model():
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1.0))
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=torch.ones(2))

    split = poutine.reparam(model, {"z": SplitReparam([1, 2], -1)})
    guide = AutoNormal(split)
    guide()
    terms = same_as_pyro(split, guide)
    assert list(terms.log_likelihood) == ["x"]
    pyro.set_rng_seed(1)
    terms = pe.TraceBeta_ELBO(beta=0.0).terms(split, guide)
    assert terms.objective.item() == pytest.approx(terms.log_likelihood_total["x"].item())
    data = pe.to_arviz(split, guide, num_samples=20)
    assert {"z", "z_split_0", "z_split_1"} == set(data.posterior.data_vars)
    assert list(data.log_likelihood.data_vars) == ["x"]


def test_a_transformed_latent_in_a_scan_is_deterministic():
    def model(x):
        def step(z, x_t):
            z = pyro.sample("z", dist.LogNormal(0.5 * z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x_t)
            return z.log(), None

        pe.scan(poutine.reparam(step, {"z": TransformReparam()}), torch.tensor(0.0), x)

    def guide(x):
        def step(z, x_t):
            return pyro.sample("z_base", dist.Normal(0.3 * z, 0.8)), None

        pe.scan(step, torch.tensor(0.0), x)

    terms = same_as_pyro(model, guide, torch.tensor([0.5, 1.5, 2.0]))
    assert list(terms.log_likelihood) == ["x"]
    assert list(terms.kl) == ["z_base"]


def test_a_conditioned_hyperparameter_is_a_constant():
    model = poutine.condition(schools, {"tau": torch.tensor(2.0)})
    guide = AutoNormal(model)
    guide(Y)
    terms = same_as_pyro(model, guide, Y)
    assert terms.num_data == 8
    assert terms.log_likelihood_total["tau"].item() == pytest.approx(
        dist.HalfCauchy(5.0).log_prob(torch.tensor(2.0)).item()
    )
    data = pe.to_arviz(model, guide, Y, num_samples=20)
    assert list(data.observed_data.data_vars) == list(data.log_likelihood.data_vars) == ["y"]
    assert list(data.posterior_predictive.data_vars) == list(data.prior_predictive.data_vars) == ["y"]
    assert "tau" not in data.posterior
    assert "tau" not in data.prior
    assert data.constant_data.tau.item() == 2.0
    index = torch.tensor([1, 4])
    guide = AutoNormal(model, create_plates=lambda y, index: pyro.plate("school", 8, subsample=index))
    guide(Y[index], index)
    assert same_as_pyro(model, guide, Y[index], index).num_data == 8


def test_a_constant_stands_in_constant_data_and_outside_the_logarithm_of_the_importance_bound():
    def local(x):
        tau = pyro.sample("tau", dist.HalfNormal(3.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, tau))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, 0.8**0.5))

    model, x = poutine.condition(local, {"tau": torch.tensor(2.0)}), torch.tensor([0.3, -1.0, 2.0])
    exact = dist.Normal(0.0, 5**0.5).log_prob(x).sum() + dist.HalfNormal(3.0).log_prob(torch.tensor(2.0))
    bound = pe.TraceIW_ELBO(num_particles=3).terms(model, guide, x).objective  # the guide is the posterior
    assert bound.item() == pytest.approx(exact.item())
    data = pe.to_arviz(model, guide, x, num_samples=20)
    assert data.constant_data.tau.item() == 2.0
    assert data.sample_stats.log_weight_local.dims == ("chain", "draw", "data")


def test_data_given_by_condition_stay_data():
    def program():
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("data", 8):
            pyro.sample("y", dist.Normal(0.0, sigma))

    model = poutine.condition(program, {"y": Y, "sigma": torch.tensor(1.0)})
    terms = pe.TraceBeta_ELBO().terms(model, lambda: None)
    assert terms.num_data == 8
    assert list(terms.log_likelihood) == ["sigma", "y"]
    assert pe.TraceBeta_ELBO().terms(poutine.condition(program, {"y": Y}), AutoNormal(program_with(Y))).num_data == 8


def program_with(y):
    def program():
        pyro.sample("sigma", dist.HalfNormal(1.0))

    return program


def test_an_observation_outside_the_plate_of_the_data_leaves_their_number():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("total", dist.Normal(z, 1.0), obs=x.sum())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert same_as_pyro(model, AutoNormal(model), Y).num_data == 8


# --- plates without a size, dimensions without a plate -----------------------------------------------------------


def unsized(x):
    with pyro.plate("data"):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def unsized_guide(x):
    with pyro.plate("data"):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


X = torch.tensor([0.3, -1.2, 0.8, 1.9], dtype=torch.float64)
PARTICLES = [{}, {"num_particles": 3}, {"num_particles": 4, "vectorize_particles": True}]


@pytest.mark.parametrize("options", PARTICLES, ids=["one", "looped", "vectorized"])
def test_a_plate_without_a_size_has_the_rows_of_its_sites(options):
    terms = pe.TraceBeta_ELBO(kl="sampled", **options).terms(unsized, unsized_guide, X)
    torch.testing.assert_close(terms.elbo, dist.Normal(0.0, 2**0.5).log_prob(X).sum())  # the exact posterior
    assert terms.num_data == 4
    assert terms.kl["z"].shape == terms.log_likelihood["x"].shape == (4,)
    assert terms.to_dataset().kl_z.dims == ("data",)
    bound = pe.TraceIW_ELBO(**{"num_particles": 3, **options}).terms(unsized, unsized_guide, X)
    torch.testing.assert_close(bound.objective, dist.Normal(0.0, 2**0.5).log_prob(X).sum())


def test_a_plate_without_a_size_names_the_rows_of_an_export():
    data = pe.to_arviz(unsized, unsized_guide, X, num_samples=20)
    for group in ("posterior", "log_likelihood", "posterior_predictive", "observed_data"):
        assert data[group].sizes["data"] == 4
    assert data.sample_stats.log_weight_local.dims == ("chain", "draw", "data")


def test_a_site_that_all_rows_of_a_plate_without_a_size_share_counts_once():
    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(0.4, 0.8))

    terms = same_as_pyro(model, guide, X)
    assert terms.kl["z"].shape == ()
    assert terms.num_data == 4


def test_a_prior_without_rows_takes_those_of_the_guide_in_a_plate_without_a_size():
    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    terms = pe.TraceBeta_ELBO(kl="sampled").terms(model, unsized_guide, X)
    torch.testing.assert_close(terms.elbo, dist.Normal(0.0, 2**0.5).log_prob(X).sum())
    assert terms.kl["z"].shape == (4,)


def test_sites_of_different_lengths_in_a_plate_without_a_size_are_refused():
    def model(x):
        with pyro.plate("data"):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=x[:2])

    with refuses(SiteError, "'y'", "'data'", "4", "2"):
        pe.TraceBeta_ELBO().terms(model, lambda x: None, X)


def test_a_plate_of_the_guide_without_a_size_does_not_stand_for_a_minibatch():
    def model(x):
        with pyro.plate("data", 8, subsample_size=4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with refuses(SiteError, "'data'", "8", "4"):
        pe.TraceBeta_ELBO().terms(model, unsized_guide, X)


class Grouped(EasyGuide):
    def guide(self, x):
        group = self.group()
        loc = pyro.param("loc", lambda: torch.zeros(group.event_shape))
        width = pyro.param("width", lambda: torch.ones(group.event_shape), constraint=dist.constraints.positive)
        group.sample("joint", dist.Normal(loc, width).to_event(1))


def test_the_group_of_an_easyguide():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    terms = same_as_pyro(model, Grouped(model), X)
    assert terms.num_data == 4


def between(x):
    """Rows in a plate on dimension -2, columns in none."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("cells", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 3), 1.0))
        pyro.sample("x", dist.Normal(z + w, torch.tensor([0.5, 1.0, 2.0])), obs=x)


def between_guide(x):
    pyro.sample("w", dist.Normal(0.3, 0.8))
    with pyro.plate("cells", len(x), dim=-2):
        pyro.sample("z", dist.Normal(0.5 * x, torch.tensor([0.4, 0.7, 0.9])))


X3 = torch.tensor([[0.3, -1.2, 1.0], [0.8, 1.9, -0.2]], dtype=torch.float64)


@pytest.mark.parametrize("options", PARTICLES, ids=["one", "looped", "vectorized"])
def test_dimensions_between_plates_count_as_rows_of_their_site(options):
    terms = same_as_pyro(between, between_guide, X3, **options)
    assert terms.num_data == 2
    assert terms.kl["z"].shape == terms.log_likelihood["x"].shape == (2, 3)
    assert terms.to_dataset().kl_z.dims == ("cells", "z_rows_0")
    analytic = pe.TraceBeta_ELBO(**options).terms(between, between_guide, X3)
    q = dist.Normal(0.5 * X3, torch.tensor([0.4, 0.7, 0.9]))
    torch.testing.assert_close(analytic.kl["z"], torch.distributions.kl_divergence(q, dist.Normal(0.0, 1.0)))


def test_dimensions_between_plates_are_exported():
    data = pe.to_arviz(between, between_guide, X3, num_samples=20)
    assert data.posterior.z.dims == ("chain", "draw", "cells", "z_rows_0")
    assert data.log_likelihood.x.dims == ("chain", "draw", "cells", "x_rows_0")
    assert data.observed_data.x.dims == ("cells", "x_rows_0")


def test_one_value_under_several_distributions_between_plates_is_refused():
    def model(x):
        with pyro.plate("cells", len(x), dim=-2):
            pyro.sample("x", dist.Normal(torch.zeros(len(x), 3), 1.0), obs=x)

    with refuses(SiteError, "'x'", "(2, 1)", "(2, 3)"):
        pe.TraceBeta_ELBO().terms(model, lambda x: None, X3[:, :1])


def test_one_draw_under_several_priors_between_plates_is_refused():
    def guide(x):
        pyro.sample("w", dist.Normal(0.3, 0.8))
        with pyro.plate("cells", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x[:, :1], 1.0))

    with refuses(SiteError, "'z'", "(2, 3)", "(2, 1)"):
        pe.TraceBeta_ELBO().terms(between, guide, X3)


def test_an_objective_serves_a_deeper_program_after_a_shallow_one():
    loss = pe.TraceBeta_ELBO(kl="sampled", num_particles=4, vectorize_particles=True)

    def shallow():
        pyro.sample("w", dist.Normal(0.0, 1.0))

    loss.terms(shallow, shallow)
    terms = loss.terms(unsized, unsized_guide, X)
    torch.testing.assert_close(terms.elbo, dist.Normal(0.0, 2**0.5).log_prob(X).sum())


def test_an_objective_serves_a_program_that_becomes_deeper():
    def model(x, deep):
        if deep:
            unsized(x)

    def guide(x, deep):
        if deep:
            unsized_guide(x)

    loss = pe.TraceBeta_ELBO(kl="sampled", num_particles=4, vectorize_particles=True)
    loss.terms(model, guide, X, False)
    terms = loss.terms(model, guide, X, True)
    torch.testing.assert_close(terms.elbo, dist.Normal(0.0, 2**0.5).log_prob(X).sum())


# --- masks and scales --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", [lambda x: poutine.mask(mask=x > 0.5), lambda x: poutine.scale(scale=x)])
def test_a_mask_or_scale_wider_than_the_plates_of_a_site_is_refused(handler):
    def model(x):
        with handler(torch.ones(4)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 4):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with handler(torch.ones(4)):
            pyro.sample("z", dist.Normal(1.0, 1.0))

    with refuses(SiteError, "'z'", "()", "(4,)"):
        pe.TraceBeta_ELBO().terms(model, guide, X)


def test_masks_inside_an_event_that_differ_are_not_analytic():
    mp, mq = torch.tensor([True, False, True]), torch.tensor([True, True, False])

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).mask(mp).to_event(1))

    def guide(mask=mq):
        pyro.sample("z", dist.Normal(torch.tensor([1.0, 2.0, 3.0]), 0.5).mask(mask).to_event(1))

    terms = same_as_pyro(model, guide)
    assert not pe.TraceBeta_ELBO().terms(model, guide).is_analytic["z"]
    same = pe.TraceBeta_ELBO().terms(model, lambda: guide(mp))
    assert same.is_analytic["z"]
    kl = torch.distributions.kl_divergence(dist.Normal(torch.tensor([1.0, 3.0]), 0.5), dist.Normal(0.0, 1.0))
    torch.testing.assert_close(same.rate, kl.sum())
    assert terms.rate.item() != pytest.approx(kl.sum().item())


def test_a_point_under_a_mask_inside_an_event_keeps_its_density():
    mask = torch.tensor([True, False, True])

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).mask(mask).to_event(1))

    def guide():
        pyro.sample("z", dist.Delta(torch.ones(3), log_density=torch.ones(3)).mask(mask).to_event(1))

    expected = 2.0 - dist.Normal(0.0, 1.0).log_prob(torch.ones(2)).sum()
    torch.testing.assert_close(pe.TraceBeta_ELBO().terms(model, guide).rate, expected)


def test_particles_in_a_loop_keep_their_own_scales_and_masks():
    """Each particle has a scale and a mask of its own: the bound is the mean of those of single runs."""
    state = {"run": 0}

    def model():
        state["run"] += 1
        run = state["run"]
        with pyro.plate("data", 2), poutine.mask(mask=torch.tensor([True, run % 2 == 0])):
            with poutine.scale(scale=float(run)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([1.0, 2.0]))

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Delta(torch.tensor([0.5, 1.5])))

    log_p = dist.Normal(0.0, 1.0).log_prob(torch.tensor([0.5, 1.5]))
    log_x = dist.Normal(0.0, 1.0).log_prob(torch.tensor([0.5, 0.5]))
    single = [run * (log_p[: 2 - run % 2]).sum() + log_x[: 2 - run % 2].sum() for run in (1, 2, 3)]
    terms = pe.TraceBeta_ELBO(num_particles=3).terms(model, guide)
    torch.testing.assert_close(terms.elbo, torch.stack(single).mean())
    torch.testing.assert_close(terms.objective, torch.stack(single).mean())


def test_an_auxiliary_site_is_merged_for_what_it_is_and_not_for_its_name():
    def model():
        with pyro.plate("d", 4):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(4))

    def guide(name):
        u = pyro.sample(name, dist.Normal(torch.zeros(4), 1.0).to_event(1), infer={"is_auxiliary": True})
        with pyro.plate("d", 4):
            pyro.sample("z", dist.Delta(u.exp(), log_density=-u))

    for name in ("u", "z_unconstrained"):
        terms = same_as_pyro(model, lambda name=name: guide(name))
        assert set(terms.kl) == {"z", name}


def test_a_latent_drawn_through_an_auxiliary_site_in_a_scan_has_all_of_its_kl_at_every_step():
    def model(x):
        def step(c, x_t):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x_t)
            return c, None

        pe.scan(step, torch.zeros(()), x)

    def guide(x):
        def step(c, x_t):
            u = pyro.sample("z_unconstrained", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.exp(), log_density=-u))
            return c, None

        pe.scan(step, torch.zeros(()), x)

    pyro.set_rng_seed(0)
    one = pe.TraceTimestep_ELBO(beta=1.0).terms(model, guide, X)
    pyro.set_rng_seed(0)
    each = pe.TraceTimestep_ELBO(beta=torch.ones(4)).terms(model, guide, X)
    torch.testing.assert_close(one.kl["z"].sum(), one.kl_total["z"])
    torch.testing.assert_close(each.objective, one.objective)
    torch.testing.assert_close(one.objective, one.elbo)


# --- obs_mask ----------------------------------------------------------------------------------------------------

SEEN = torch.tensor([True, False, True, True])


def missing(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=SEEN)


@pytest.mark.parametrize("width", [1.0, 1e3])
def test_imputations_of_what_was_seen_have_no_share_in_the_bound(width):
    """Whatever the guide holds there: the bound stays below log p(x_seen)."""
    values = {"x_unobserved": torch.tensor([7.0, 0.1, -5.0, 3.0]), "mu": torch.tensor(0.3)}
    guide = AutoNormal(missing, init_loc_fn=init_to_value(values=values), init_scale=width)
    guide(X)
    terms = pe.TraceBeta_ELBO(num_particles=100, vectorize_particles=True).terms(missing, guide, X)
    assert terms.kl["x_unobserved"][[0, 2, 3]].abs().max() == 0
    assert terms.kl["x_unobserved"][1] != 0
    evidence = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 9.0).log_prob(X[SEEN])
    assert terms.elbo < evidence


@pytest.mark.parametrize("kind", [AutoMultivariateNormal, AutoDiagonalNormal])
def test_a_joint_guide_of_imputations_is_refused(kind):
    with refuses(GuideError, "'x_unobserved'", "AutoNormal", "poutine.mask"):
        pe.TraceBeta_ELBO().terms(missing, kind(missing), X)


def test_a_guide_of_ones_own_may_leave_the_mask_to_the_library():
    def guide(x, masked=False):
        pyro.sample("mu", dist.Normal(0.4, 0.5))
        with pyro.plate("data", len(x)), poutine.mask(mask=~SEEN if masked else True):
            pyro.sample("x_unobserved", dist.Normal(0.1 * torch.arange(4.0), 0.7))

    pyro.set_rng_seed(0)
    plain = pe.TraceBeta_ELBO().terms(missing, guide, X)
    pyro.set_rng_seed(0)
    explicit = pe.TraceBeta_ELBO().terms(missing, lambda x: guide(x, masked=True), X)
    torch.testing.assert_close(plain.elbo, explicit.elbo)
    assert pe.TraceBeta_ELBO().terms(missing, AutoDelta(missing), X).num_data == 4


def test_imputations_export_with_their_weights():
    guide = AutoNormal(missing)
    guide(X)
    data = pe.to_arviz(missing, guide, X, num_samples=50)
    assert data.posterior.x_unobserved.dims == ("chain", "draw", "data")
    assert math.isfinite(float(data.sample_stats.log_weight.mean()))


# --- guides that do not fit --------------------------------------------------------------------------------------


def rows_model(y, index):
    with pyro.plate("n", 8, subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def rows_guide(rows):
    def guide(y, index):
        loc = pyro.param("loc", lambda: torch.arange(8.0))
        with pyro.plate("n", 8, **rows(index)) as i:
            pyro.sample("z", dist.Normal(loc[i], 1.0))

    return guide


INDEX = torch.tensor([5, 0, 3])


@pytest.mark.parametrize("index", [INDEX, torch.arange(8).flip(0)], ids=["some", "all, in another order"])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_autoguide_that_draws_rows_of_its_own_is_refused(index, compiled):
    svi = pe.SVI(
        rows_model, AutoNormal(rows_model), pyro.optim.Adam({"lr": 0.1}), pe.TraceBeta_ELBO(), compile=compiled
    )
    with refuses(pe.errors.PyroElboError, *([] if compiled else ["'n'", "subsample", "create_plates"])):
        svi.step(Y[index], index)


@pytest.mark.parametrize(
    "rows",
    [lambda i: {"subsample": i}, lambda i: {"subsample": i.clone()}],
    ids=["the same tensor", "an equal one"],
)
def test_equal_rows_in_model_and_guide(rows):
    same_as_pyro(rows_model, rows_guide(rows), Y[INDEX], INDEX)


def test_other_rows_in_the_guide_are_refused():
    for rows in (lambda i: {"subsample": (i + 1) % 8}, lambda i: {"subsample_size": 3}):
        with refuses(SiteError, "'n'", "subsample"):
            pe.TraceBeta_ELBO().terms(rows_model, rows_guide(rows), Y[INDEX], INDEX)


def test_rows_that_the_guide_chooses_are_those_of_the_model():
    def model(y):
        with pyro.plate("n", 8, subsample_size=3) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[i])

    guide = rows_guide(lambda i: {"subsample_size": 3})
    same_as_pyro(model, lambda y: guide(y, None), Y)


def pair_model(x):
    k = pyro.sample("k", dist.Bernoulli(0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)


def pair_guide(x):
    pyro.sample("k", dist.Bernoulli(0.4))


def test_model_and_guide_swapped_are_refused():
    with refuses(SiteError, "'x'", "observed in the guide", "swapped"):
        pe.TraceBeta_ELBO().terms(pair_guide, pair_model, X)


def test_a_site_marked_for_sequential_enumeration():
    pe.TraceBeta_ELBO().terms(pair_model, config_enumerate(pair_guide, "sequential"), X)
    with refuses(SiteError, "'k'", "marked for enumeration", "parallel"):
        pe.TraceBeta_ELBO().terms(config_enumerate(pair_model, "sequential"), lambda x: None, X)


def test_a_model_marked_for_enumeration_whose_site_the_guide_draws():
    same_as_pyro(config_enumerate(pair_model), pair_guide, X)


def baseline_refused(options, loss, *parts):
    def guide(x):
        pyro.sample("k", dist.Bernoulli(0.4), infer={"baseline": options})

    with refuses(SiteError, "'k'", *parts):
        loss.terms(pair_model, guide, X)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"use_decaying_average": True}, ("['use_decaying_average']", "use_decaying_avg_baseline")),
        ({"nn_baseline": torch.nn.ReLU(), "baseline_value": torch.zeros(())}, ("give one of them",)),
        ({"use_decaying_avg_baseline": True, "baseline_beta": 1.0}, ("baseline_beta", "1.0")),
        ({"baseline_value": torch.zeros(4)}, ("shape (1,)", "(4,)")),
    ],
    ids=["unknown option", "two predictions", "decay of one", "shape"],
)
def test_a_baseline_that_cannot_be_meant_is_refused(options, parts):
    baseline_refused(options, pe.TraceBeta_ELBO(), *parts)


def test_a_baseline_has_no_use_in_an_importance_weighted_bound():
    baseline_refused({"use_decaying_avg_baseline": True}, pe.TraceIW_ELBO(2), "Remove it")


def test_a_baseline_has_no_use_beside_a_pathwise_gradient():
    def guide(x):
        pyro.sample("z", dist.Normal(0.0, 1.0), infer={"baseline": {"use_decaying_avg_baseline": True}})

    def model(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with refuses(SiteError, "'z'", "pathwise gradient", "Remove it"):
        pe.TraceBeta_ELBO().terms(model, guide, X)


def test_a_baseline_in_a_loop_over_time_or_a_scan():
    options = {"nn_baseline": torch.nn.ReLU(), "nn_baseline_input": torch.zeros(())}

    def program(infer):
        def run(x):
            for t in range(2):
                pyro.sample(f"k_{t}", dist.Bernoulli(0.4), infer=infer)

        return run

    def scanned(infer):
        return lambda x: pe.scan(lambda c, x_t: (pyro.sample("k", dist.Bernoulli(0.4), infer=infer), None), X[0], X)

    infer = {"baseline": options}
    with refuses(SiteError, "'k_0'", "baseline", "TraceBeta_ELBO"):
        pe.TraceTimestep_ELBO().terms(program({}), program(infer), X)
    with refuses(SiteError, "'k'", "pe.scan", "use_decaying_avg_baseline"):
        pe.TraceBeta_ELBO().terms(scanned({}), scanned(infer), X)
