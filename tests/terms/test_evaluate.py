"""Which form a latent's term takes, and where log q of an auxiliary site goes."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import kl_divergence

import pyro_elbo as pe
from pyro_elbo.terms import evaluate
from tests.support.compiled import _interpreted  # noqa: F401  (a fixture)

X = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def param(name, value):
    return pyro.param(name, lambda: torch.tensor(value))


def values_and_gradients(loss, model, guide, seed=0):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    value = loss.loss_and_grads(model, guide)
    return value, [p.grad for _, p in pyro.get_param_store().named_parameters()]


REACHING = {
    "Normal, Uniform": (lambda m: dist.Normal(m, 0.05), lambda: dist.Uniform(0.0, 10.0)),
    "Normal, Exponential": (lambda m: dist.Normal(m, 0.05), lambda: dist.Exponential(1.0)),
    "Normal, Beta": (lambda m: dist.Normal(m / 2, 0.05), lambda: dist.Beta(2.0, 3.0)),
    "Gamma, Uniform": (lambda m: dist.Gamma(100 * m, 100.0), lambda: dist.Uniform(0.0, 10.0)),
    "events": (
        lambda m: dist.Normal(m.expand(3), 0.05).to_event(1),
        lambda: dist.Uniform(torch.zeros(3), 9.0).to_event(1),
    ),
}


@pytest.mark.parametrize(("q", "p"), REACHING.values(), ids=REACHING)
def test_a_guide_wider_than_the_prior_has_the_term_at_the_draw_and_says_so_once(q, p):
    """The registered KL is infinite, Pyro's Trace_ELBO is finite at the draw."""

    def model():
        s = pyro.sample("s", p())
        pyro.sample("y", dist.Normal(0.0, s).to_event(s.dim()), obs=torch.ones(s.shape))

    def guide():
        pyro.sample("s", q(param("m", 1.0)))

    evaluate._warn_of_support.cache_clear()
    with pytest.warns(UserWarning, match="Site 's': the guide's .* reaches beyond the support"):
        ours = values_and_gradients(pe.TraceBeta_ELBO(), model, guide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = values_and_gradients(pe.TraceBeta_ELBO(), model, guide)
    theirs = values_and_gradients(Trace_ELBO(), model, guide)
    for value, gradients in (ours, again):
        assert value == pytest.approx(theirs[0])
        torch.testing.assert_close(gradients, theirs[1])


HALF = torch.tensor([0.5, 0.5])
THIRDS = torch.full((3,), 1 / 3)
SOME = torch.tensor([0.5, 0.5, 0.0])
INFINITE = {
    "a narrower interval": (lambda a: dist.Beta(a, 20.0), lambda: dist.Uniform(0.01, 0.99)),
    "a later start": (lambda a: dist.Gamma(a, 1.0), lambda: dist.Pareto(0.01, 2.0)),
    "no variance": (lambda a: dist.Pareto(a / 40, 2.0), lambda: dist.Normal(0.0, 1.0)),
    "a sure event": (lambda a: dist.Bernoulli(a / 21), lambda: dist.Bernoulli(1.0)),
    "a category left out": (lambda a: dist.Categorical(logits=a * SOME), lambda: dist.Categorical(SOME)),
    "one-hot": (lambda a: dist.OneHotCategorical(logits=a * SOME), lambda: dist.OneHotCategorical(SOME)),
    "no counts": (lambda a: dist.Poisson(a / 1e9), lambda: dist.Poisson(0.0)),
    "events": (
        lambda a: dist.Beta(a.expand(2), 20.0).to_event(1),
        lambda: dist.Uniform(torch.tensor([0.0, 0.01]), 1.0).to_event(1),
    ),
}


@pytest.mark.parametrize(("q", "p"), INFINITE.values(), ids=INFINITE)
def test_where_a_formula_is_not_finite_stands_the_term_at_the_draw(q, p):
    def model():
        pyro.sample("s", p())

    def guide():
        pyro.sample("s", q(param("a", 20.0)))

    evaluate._warn_of_infinity.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = [values_and_gradients(pe.TraceBeta_ELBO(), model, guide) for _ in range(2)]
    theirs = values_and_gradients(Trace_ELBO(), model, guide)
    for value, gradients in ours:
        assert value == pytest.approx(theirs[0])
        torch.testing.assert_close(gradients, theirs[1])
    assert [str(w.message).split(":")[0] for w in said] == ["Site 's'"]


def test_categories_of_different_numbers_have_the_term_at_the_draw():
    """There is no formula, but a sum over the categories of the guide."""

    def model():
        pyro.sample("s", dist.Categorical(THIRDS))

    def guide():
        pyro.sample("s", dist.Categorical(logits=param("a", [0.0, 0.2])))

    ours, theirs = (values_and_gradients(loss, model, guide) for loss in (pe.TraceBeta_ELBO(), Trace_ELBO()))
    assert ours[0] == pytest.approx(theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])


def test_a_compiled_step_leaves_an_infinite_formula_to_the_graph(interpreted):
    """A formula that becomes infinite, and finite again, as the prior moves with the data."""

    def model(low):
        s = pyro.sample("s", dist.Uniform(low, 0.99).to_event(1))
        pyro.sample("y", dist.Normal(0.0, s).to_event(1), obs=torch.ones(2))

    def guide(low):
        a = param("a", [20.0, 30.0])
        pyro.sample("s", dist.Beta(a, 20.0).to_event(1))

    found = []
    for compile in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        optimizer, objective = pyro.optim.SGD({"lr": 1e-3}), pe.TraceBeta_ELBO(free_bits=0.01)
        svi = pe.SVI(model, guide, optimizer, objective, compile=compile, fallback_random=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = [svi.step(torch.tensor([0.0, low])) for low in (0.0, 0.01, 0.0, 0.02)]
        found.append((losses, pyro.param("a").detach().clone()))
    torch.testing.assert_close(found[1], found[0])


def test_a_compiled_step_takes_the_same_form(interpreted):
    def model():
        s = pyro.sample("s", dist.Uniform(0.0, 10.0))
        pyro.sample("y", dist.Normal(0.0, s), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("s", dist.Normal(param("m", 1.0), 0.05))

    losses = []
    for compile in (False, True):
        evaluate._warn_of_support.cache_clear()
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = pe.SVI(
            model, guide, pyro.optim.SGD({"lr": 1e-3}), pe.TraceBeta_ELBO(), compile=compile, fallback_random=True
        )
        with pytest.warns(UserWarning, match="reaches beyond"):
            losses.append(svi.run(6, progress=False))
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize(
    ("q", "p"),
    [
        (dist.Uniform(1.0, 2.0), dist.Uniform(0.0, 10.0)),
        (dist.Beta(2.0, 2.0), dist.Uniform(0.0, 1.0)),
        (dist.Gamma(2.0, 1.0), dist.Exponential(1.0)),
        (dist.Uniform(1.0, 2.0), dist.Normal(0.0, 1.0)),
        (dist.MultivariateNormal(torch.ones(2), torch.eye(2)), dist.MultivariateNormal(torch.zeros(2), torch.eye(2))),
        (dist.Dirichlet(torch.ones(3)), dist.Dirichlet(2 * torch.ones(3))),
        (dist.Bernoulli(0.3), dist.Bernoulli(0.5)),
        (dist.Poisson(2.0), dist.Poisson(3.0)),
    ],
)
def test_a_guide_within_the_prior_keeps_the_formula(q, p):
    """Without a warning: warnings are errors here."""
    evaluate._warn_of_support.cache_clear()
    terms = pe.TraceBeta_ELBO().terms(lambda: pyro.sample("s", p), lambda: pyro.sample("s", q))
    assert terms.is_analytic["s"]
    torch.testing.assert_close(terms.rate, kl_divergence(q, p))


BY_VALUE = {
    "Weibull": (lambda m: dist.Weibull(m, 1.5), lambda: dist.Weibull(1.0, 2.0)),
    "Kumaraswamy": (lambda m: dist.Kumaraswamy(m, 2.0), lambda: dist.Kumaraswamy(1.0, 3.0)),
    "Binomial": (lambda m: dist.Binomial(5, m / 3), lambda: dist.Binomial(5, torch.tensor(0.5))),
}


@pytest.mark.parametrize(("q", "p"), BY_VALUE.values(), ids=BY_VALUE)
def test_formulas_that_branch_on_values_compile(q, p, interpreted):
    """Compiled equals eager, and Pyro's Trace_ELBO or the closed form 5 KL(q || p) of a binomial."""

    def model():
        with pyro.plate("d", 3):
            z = pyro.sample("z", p())
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(3))

    def guide():
        with pyro.plate("d", 3):
            pyro.sample("z", q(param("m", 0.9)))

    losses = []
    for compile in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        optim = pyro.optim.SGD({"lr": 1e-3})
        svi = pe.SVI(model, guide, optim, pe.TraceBeta_ELBO(), compile=compile, fallback_random=True)
        losses.append(svi.run(5, progress=False))
    torch.testing.assert_close(losses[1], losses[0])
    terms = pe.TraceBeta_ELBO().terms(model, guide)
    if terms.is_analytic["z"]:
        a, b = q(param("m", 0.9)).probs, p().probs
        bernoulli = a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()
        torch.testing.assert_close(terms.kl["z"], (5 * bernoulli).expand(3))
    else:
        pyro.set_rng_seed(1)
        ours = pe.TraceBeta_ELBO().loss(model, guide)
        pyro.set_rng_seed(1)
        assert ours == pytest.approx(Trace_ELBO().loss(model, guide))


def positive_model():
    with pyro.plate("d", 4):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X)


def joint_guide(name):
    """One auxiliary vector for all rows."""

    def guide():
        u = pyro.sample(name, dist.Normal(torch.zeros(4), 1.0).to_event(1), infer={"is_auxiliary": True})
        with pyro.plate("d", 4):
            pyro.sample("z", dist.Delta(u.exp(), log_density=-u))

    return guide


def test_an_auxiliary_site_of_other_plates_stays_a_term_whatever_its_name():
    for name in ("u", "z_unconstrained"):
        pyro.set_rng_seed(0)
        terms = pe.TraceBeta_ELBO().terms(positive_model, joint_guide(name))
        pyro.set_rng_seed(0)
        assert -terms.elbo.item() == pytest.approx(Trace_ELBO().loss(positive_model, joint_guide(name)))
        assert set(terms.kl) == {"z", name}
        assert terms.kl[name].shape == ()


def test_a_latent_that_the_guide_draws_itself_keeps_its_term():
    """``z_unconstrained`` is a variable of its own here: z is no function of it."""

    def guide():
        with pyro.plate("d", 4):
            pyro.sample("z_unconstrained", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.LogNormal(0.0, 0.5))

    terms = pe.TraceBeta_ELBO().terms(positive_model, guide)
    assert set(terms.kl) == {"z", "z_unconstrained"}


def test_an_unconstrained_latent_of_a_scan_has_one_kl_per_step():
    """q is the prior: the KL is zero at every step, and a beta per step finds it there."""

    def step(carry, x):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        return carry, None

    def guide_step(carry, x):
        u = pyro.sample("z_unconstrained", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(u.exp(), log_density=-u))
        return carry, None

    for beta in (1.0, torch.tensor([1.0, 2.0, 3.0, 4.0])):
        terms = pe.TraceTimestep_ELBO(beta).terms(
            lambda: pe.scan(step, torch.zeros(()), X), lambda: pe.scan(guide_step, torch.zeros(()), X)
        )
        assert set(terms.kl) == {"z"}
        torch.testing.assert_close(terms.kl["z"], torch.zeros(4))
        torch.testing.assert_close(terms.objective, -terms.distortion)
