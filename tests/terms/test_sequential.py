"""Sites of the guide that are enumerated value by value: control flow, refusals, what a term then holds."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate

import pyro_elbo as pe
from pyro_elbo.errors import CompileError, SiteError
from tests import programs_discrete as programs
from tests.programs import X
from tests.programs_discrete import DISCRETE, nothing
from tests.support.compiled import _interpreted  # noqa: F401  (a fixture)
from tests.support.refusing import refusing
from tests.test_conformance import assert_same, value_and_gradient

refuses = refusing(re.compile(r"Give|Put|Mark|mark|Change|remove|Leave"))
by_name = {p.name: p for p in DISCRETE}
IN_TURN = {"enumerate": "sequential"}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def terms_of(program, **options):
    pyro.set_rng_seed(0)
    return pe.TraceBeta_ELBO(**options).terms(program.model, program.guide, *program.args)


def test_a_number_may_steer_the_programs():
    """The bound is that of each branch, weighted by its probability: branches differ in sites and in families."""
    program = by_name["in turn: branching"]
    terms = terms_of(program, num_particles=20_000, vectorize_particles=True, max_plate_nesting=1)
    p, q, qj = (pyro.param(n) for n in ("p", "qk", "qj"))
    first = dist.Normal(pyro.param("a"), pyro.param("s")).log_prob(X).sum()
    qz, pz = dist.Normal(0.5 * X, pyro.param("q_s")), dist.Normal(pyro.param("m"), 1.0)
    spread = qz.scale**2 + (qz.loc - X) ** 2  # E (z - x)²
    second = (dist.Normal(X, pyro.param("s")).log_prob(X) - spread / (2 * pyro.param("s") ** 2)).sum()
    second = second - torch.distributions.kl_divergence(qz, pz).sum()
    at = [dist.Laplace(pyro.param("b") * j, pyro.param("t")).log_prob(X) for j in (0.0, 1.0)]
    on, prior = qj[:, 0], pyro.param("q")[0]
    third = (on * at[1] + (1 - on) * at[0]).sum() - torch.distributions.kl_divergence(
        dist.Bernoulli(on), dist.Bernoulli(prior)
    ).sum()
    exact = (q * (torch.stack([first, second, third]) + p.log() - q.log())).sum()
    assert abs(terms.elbo - exact) < 0.01 * abs(exact)
    torch.testing.assert_close(terms.kl["k"], (q * (q.log() - p.log())).sum())
    torch.testing.assert_close(terms.posterior["k"], q)
    torch.testing.assert_close(terms.posterior["j"][:, 1], q[2] * on)  # j exists where k is 2
    assert terms.log_likelihood["x"].shape == X.shape


@pytest.mark.parametrize("name", ["mixture", "SS-VAE", "nested"])
def test_terms_in_turn_are_those_side_by_side(name):
    """Term by term, where the guide draws nothing; the probabilities of the values too."""
    beside, in_turn = (terms_of(by_name[f"{how}: {name}"]) for how in ("guide", "in turn"))
    names = ["y"] if name == "SS-VAE" else [*beside.sites]
    for n in names:
        torch.testing.assert_close(in_turn.sites[n].nats, beside.sites[n].nats)
    for n, q in beside.posterior.items():
        torch.testing.assert_close(in_turn.posterior[n], q)
    assert in_turn.is_analytic == beside.is_analytic
    in_turn.to_dataset()


def test_a_scan_may_depend_on_a_site_in_turn():
    """Where all values side by side are refused: a sequence under each value, weighted."""
    x = torch.linspace(-1.0, 1.0, 5)

    def model(x):
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)))

        def step(last, x_t):
            z = pyro.sample("z", dist.Normal(last * k, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x_t)
            return z, None

        pe.scan(step, torch.tensor(0.0), x)

    def guide(x, mark="sequential", q=0.6):
        pyro.sample("k", dist.Bernoulli(torch.tensor(q)), infer={"enumerate": mark})

        def step(last, x_t):
            return pyro.sample("z", dist.Normal(x_t / 2, 0.7)), None

        pe.scan(step, torch.tensor(0.0), x)

    def terms(**options):
        pyro.set_rng_seed(1)
        return pe.TraceTimestep_ELBO().terms(model, lambda x: guide(x, **options), x)

    found = terms()
    assert found.kl["z"].shape == (5,)
    assert found.posterior["k"].tolist() == pytest.approx([0.4, 0.6])
    pure = [terms(q=q) for q in (1.0, 0.0)]  # one of both branches counts
    mixed = 0.6 * pure[0].kl["z"] + 0.4 * pure[1].kl["z"]
    torch.testing.assert_close(found.kl["z"], mixed, rtol=1e-5, atol=1e-5)
    with refuses(SiteError, "'z'", "'k'", "enumerates"):
        terms(mark="parallel")


def test_compiled_steps_follow_a_branch(interpreted):
    """``if k == 1`` is decided while the step is captured, since every branch knows its value."""
    program = by_name["in turn: branching"]
    value_and_gradient(pe.TraceBeta_ELBO(), program.model, program.guide, program.args)
    svi = pe.SVI(program.model, program.guide, pyro.optim.SGD({"lr": 0.0}), pe.TraceBeta_ELBO(), compile=True)
    losses = svi.run(600, *program.args, progress=False)
    expected = [pe.TraceBeta_ELBO().loss(program.model, program.guide, *program.args) for _ in range(300)]
    spread = (losses.var() / 600 + torch.tensor(expected).var() / 300).sqrt()
    assert (losses.double().mean() - torch.tensor(expected).mean()).abs() < 5 * spread


def test_branches_see_the_same_random_rows():
    def model(x):
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)))
        with pyro.plate("data", len(x), subsample_size=2) as i:
            pyro.sample("x", dist.Normal(x[i] * k, 1.0), obs=x[i])

    def guide(x):
        pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)), infer=IN_TURN)

    x, zero = 10.0 ** torch.arange(4.0), 0.0
    for seed in range(20):
        pyro.set_rng_seed(seed)
        nats = pe.TraceBeta_ELBO().terms(model, guide, x).log_likelihood["x"]
        chosen = [dist.Normal(zero, 1.0).log_prob(r) / 2 + dist.Normal(r, 1.0).log_prob(r) / 2 for r in x]
        assert all(any(torch.isclose(n, c) for c in chosen) for n in nats)  # each row with itself


# --- refusals -------------------------------------------------------------------------------------------------


def in_turn(guide):
    return config_enumerate(guide, default="sequential")


def test_a_site_outside_of_the_plate_that_it_depends_on_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)
        pyro.sample("y", dist.Normal(k.sum(), 1.0), obs=x.sum())

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(torch.full(x.shape, 0.5)))

    with refuses(SiteError, "'y'", "'k'", "outside", "plate"):
        pe.TraceBeta_ELBO().terms(model, in_turn(guide), X)


def test_a_scale_that_changes_with_the_value_is_refused():
    def model(x):
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)))
        with pyro.poutine.scale(scale=1.0 + float(k)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x.sum())

    def guide(x):
        pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))

    with refuses(SiteError, "'x'", "scale", "'k'"):
        pe.TraceBeta_ELBO().terms(model, in_turn(guide), X)


def test_marks_that_cannot_be_followed_are_refused():
    def programs_of(fn, **mark):
        model = lambda x: pyro.sample("k", fn)  # noqa: E731
        return model, lambda x: pyro.sample("k", fn, infer=IN_TURN | mark)

    with refuses(SiteError, "'k'", "Poisson", "finite support"):
        pe.TraceBeta_ELBO().terms(*programs_of(dist.Poisson(2.0)), X)
    with refuses(SiteError, "'k'", "num_samples"):
        pe.TraceBeta_ELBO().terms(*programs_of(dist.Bernoulli(0.5), num_samples=3), X)
    with refuses(SiteError, "'k'", "'parallel'"):  # in the model nothing is left to run once per value for
        pe.TraceBeta_ELBO().terms(in_turn(programs.global_switch), nothing, X)


def test_importance_weights_are_refused():
    program = by_name["in turn: mixture"]
    with refuses(SiteError, "'k'", "guide enumerates"):
        pe.TraceIW_ELBO(2).terms(program.model, program.guide, *program.args)


def test_a_mark_in_the_model_alone_draws_what_the_guide_draws():
    program = by_name["guide: mixture"]
    plain = programs.mixture_guide
    marked = value_and_gradient(pe.TraceBeta_ELBO(), in_turn(programs.mixture), plain, program.args)
    assert_same(marked, value_and_gradient(pe.TraceBeta_ELBO(), programs.mixture, plain, program.args))


def test_a_vector_that_steers_a_compiled_program_is_refused(interpreted):
    def model(x):
        y = pyro.sample("y", dist.OneHotCategorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Normal(1.0 if torch.nonzero(y)[0, 0] == 1 else 0.0, 1.0), obs=x.sum())

    def guide(x):
        pyro.sample("y", dist.OneHotCategorical(logits=pyro.param("logits", torch.zeros(2))))

    svi = pe.SVI(model, in_turn(guide), pyro.optim.SGD({"lr": 0.1}), pe.TraceBeta_ELBO(), compile=True)
    with pytest.raises(CompileError):
        svi.run(3, X, progress=False)
