"""Discrete latents that are summed out: values, gradients, terms and refusals."""

import re
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import TraceEnum_ELBO, config_enumerate

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, SiteError
from tests import programs_discrete as programs
from tests.programs import X2, X
from tests.programs_discrete import DISCRETE, brute_force, nothing
from tests.support.compiled import _interpreted  # noqa: F401  (a fixture)
from tests.support.compiled import assert_same as compiled_equals_eager
from tests.support.refusing import refusing
from tests.test_conformance import assert_same, leaves, value_and_gradient

LOOPED = [p for p in DISCRETE if p.looped]
PATHWISE = [p for p in LOOPED if p.name != "coupled draws"]
refuses = refusing(re.compile(r"Give|Leave|Put|Mark|mark|Write|Take|draw|Draw|Add|Remove|Change|use"))
by_name = {p.name: p for p in DISCRETE}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def rows(programs):
    return pytest.mark.parametrize("program", programs, ids=lambda p: p.name)


def start(program):
    """Create the parameters of both programs."""
    pyro.set_rng_seed(7)
    pe.TraceBeta_ELBO(kl="sampled").loss(program.model, program.guide, *program.args)


def draws(program, seed=7):
    """What the guide draws under a seed, without its marked sites."""
    pyro.set_rng_seed(seed)
    trace = poutine.trace(program.guide).get_trace(*program.args)
    sites = {n: m for n, m in trace.nodes.items() if m["type"] == "sample" and m["infer"].get("enumerate") is None}
    return {n: m["value"] for n, m in sites.items() if type(m["fn"]).__name__ != "_Subsample"}


def gradient_of(x):
    names = list(leaves())
    found = torch.autograd.grad(x, [leaves()[n] for n in names], allow_unused=True)
    return {n: torch.zeros_like(leaves()[n]) if g is None else g for n, g in zip(names, found, strict=True)}


def assert_gradient(ours, expected, tol=1e-9):
    assert ours.keys() == expected.keys()
    for name, g in expected.items():
        torch.testing.assert_close(ours[name], g, rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}")


def settings(program):
    yield {}
    yield {"num_particles": 2}
    if program.vectorizes:
        yield {"num_particles": 2, "vectorize_particles": True}


@rows(LOOPED)
def test_value_and_gradient_equal_the_sum_over_all_assignments(program):
    start(program)
    for beta in (1.0, 0.4):
        loss = pe.TraceBeta_ELBO(beta, kl="sampled")
        averaged = program.name.startswith(("guide", "in turn", "beside"))
        exact = brute_force(program, draws(program), beta) if beta == 1 or not averaged else None
        value, gradient = value_and_gradient(loss, program.model, program.guide, program.args)
        if exact is not None:
            assert -value == pytest.approx(exact.item(), rel=1e-9, abs=1e-9)
            if program in PATHWISE:
                assert_gradient({n: -g for n, g in gradient.items()}, gradient_of(exact))


@rows([p for p in DISCRETE if p.pyro_runs])
def test_equals_trace_enum_elbo(program):
    start(program)
    model, guide, args = program.model, program.guide, program.args
    for particles in settings(program):
        options = {"max_plate_nesting": program.nesting} | particles
        ours = value_and_gradient(pe.TraceBeta_ELBO(kl="sampled", **options), model, guide, args)
        assert_same(ours, value_and_gradient(TraceEnum_ELBO(**options), model, guide, args))


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("name", ["coupled draws", "guide: scored", "in turn: scored"])
def test_draws_without_pathwise_gradient_are_rewarded_by_what_they_change(name, beta):
    """Against the same guide with pathwise gradient: means of 40 x 500 particles within 5 SE (1 in 40 000).

    TraceEnum_ELBO leaves a sum outside of the plate out of the reward of the draws inside.
    """
    program = by_name[name]
    start(program)
    loss = pe.TraceBeta_ELBO(beta, num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    found, guide_of = [], programs.coupled_guide if name == "coupled draws" else programs.scored_guide
    for family in (NonreparameterizedNormal, dist.Normal):
        mark = "sequential" if name.startswith("in turn") else "parallel"
        guide = config_enumerate(partial(guide_of, family=family), default=mark)
        runs = [value_and_gradient(loss, program.model, guide, program.args, seed)[1] for seed in range(40)]
        found.append({n: torch.stack([g[n] for g in runs]) for n in runs[0]})
    for n, ours in found[0].items():
        theirs = found[1][n]
        error = (ours.mean(0) - theirs.mean(0)).abs()
        assert (error <= 5 * ((ours.var(0) + theirs.var(0)) / 40).sqrt() + 1e-7).all(), n


@rows(DISCRETE)
def test_terms_add_up_and_have_the_shape_of_their_plates(program):
    start(program)
    for particles in settings(program):
        pyro.set_rng_seed(1)
        terms = pe.TraceBeta_ELBO(0.5, **particles).terms(program.model, program.guide, *program.args)
        torch.testing.assert_close(sum(terms.kl_total.values(), torch.zeros(())), terms.rate)
        for name, x in {**terms.kl, **terms.log_likelihood}.items():
            assert x.shape == tuple(p.size for p in terms.plates[name])
        for name, q in terms.posterior.items():
            assert q.shape[:-1] == terms.kl[name].shape
            exists = terms.posterior["k"][2] if name == "j" and "branching" in program.name else torch.ones(())
            torch.testing.assert_close(q.sum(-1), exists.expand(q.shape[:-1]))
            assert terms.is_analytic[name]
            assert (terms.kl[name] > -1e-9).all()
        pyro.set_rng_seed(1)
        plain = pe.TraceBeta_ELBO(**particles).terms(program.model, program.guide, *program.args)
        torch.testing.assert_close(plain.elbo, terms.elbo, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(plain.objective, plain.elbo)
        terms.to_dataset()


def test_posterior_of_a_mixture_and_its_kl():
    program = by_name["mixture"]
    start(program)
    terms = pe.TraceBeta_ELBO().terms(program.model, program.guide, *program.args)
    weights, means, widths = (pyro.param(n) for n in ("weights", "means", "widths"))
    joint = weights.log() + dist.Normal(means, widths).log_prob(program.args[0][:, None])
    q = joint.softmax(-1)
    torch.testing.assert_close(terms.posterior["k"], q)
    torch.testing.assert_close(terms.kl["k"], (q * (q / weights).log()).sum(-1))
    torch.testing.assert_close(terms.elbo, joint.logsumexp(-1).sum())


def test_temperature_zero_takes_the_best_value_that_is_possible():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.0, 0.7])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(torch.tensor([0.0, 1.0, 2.0])[k], 1.0), obs=x)

    x = torch.tensor([-1.0, 1.1, 5.0])
    best = dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(x[:, None]).amax(-1).sum()
    for beta in (0.0, pe.LinearWarmup(0.0, 1.0, steps=5)):
        objective = pe.TraceBeta_ELBO(beta).terms(model, nothing, x).objective
        torch.testing.assert_close(objective, best, rtol=0, atol=1e-7)


def test_a_beta_per_datum_is_a_temperature_per_row():
    program = by_name["mixture"]
    start(program)
    beta = torch.tensor([0.3, 1.0, 2.5])
    together = pe.TraceBeta_ELBO({"k": beta}).terms(program.model, program.guide, *program.args).objective
    (x,) = program.args
    alone = [
        pe.TraceBeta_ELBO(b).terms(program.model, program.guide, x[i : i + 1]).objective
        for i, b in enumerate(beta.tolist())
    ]
    torch.testing.assert_close(together, torch.stack(alone).sum())


@rows([by_name[n] for n in ("explaining away", "HMM 4", "mixture VAE", "guide and model: chain")])
def test_gradient_of_the_weighted_objective_equals_finite_differences(program):
    start(program)
    loss = pe.TraceBeta_ELBO(0.6, kl="sampled")
    _, gradient = value_and_gradient(loss, program.model, program.guide, program.args)
    for name, p in leaves().items():
        flat, slopes = p.data.reshape(-1), []
        for i in range(len(flat)):
            both = []
            for sign in (1, -2):
                flat[i] += sign * 1e-5
                pyro.set_rng_seed(7)
                both.append(loss.loss(program.model, program.guide, *program.args))
            flat[i] += 1e-5
            slopes.append((both[0] - both[1]) / 2e-5)
        torch.testing.assert_close(gradient[name].reshape(-1), torch.tensor(slopes), rtol=1e-5, atol=1e-7)


@rows(
    [
        by_name[n]
        for n in (
            "mixture",
            "global and local",
            "LDA",
            "mixture VAE",
            "HMM 3",
            "guide: SS-VAE",
            "coupled draws",
            "in turn: branching",
        )
    ]
)
@pytest.mark.parametrize("beta", [1.0, pe.LinearWarmup(0.2, 1.0, steps=4)], ids=["beta=1", "warm-up"])
def test_compiled_steps_equal_eager_ones(interpreted, program, beta):
    def scenario(SVI):
        svi = SVI(program.model, program.guide, pyro.optim.SGD({"lr": 1e-3}), pe.TraceBeta_ELBO(beta))
        pyro.set_rng_seed(3)
        losses = svi.run(6, *program.args, progress=False)
        return [losses, *(p.detach().clone() for p in leaves().values())]

    compiled_equals_eager(scenario)


@pytest.mark.parametrize("name", ["mixture", "mixture VAE", "global and local"])
def test_importance_weights_are_those_of_the_sum(name):
    """Without draws the weights have one value, the evidence; with draws more particles tighten the bound."""
    program = by_name[name]
    start(program)
    pyro.set_rng_seed(0)
    elbo, tighter = (
        pe.TraceIW_ELBO(n, vectorize_particles=True, max_plate_nesting=1).terms(
            program.model, program.guide, *program.args
        )
        for n in (2, 2000)
    )
    if name == "mixture VAE":
        assert tighter.objective > tighter.elbo + 0.1
    else:
        torch.testing.assert_close(tighter.objective, elbo.elbo)


def many(make, gradient):
    return make(gradient=gradient, num_particles=300, vectorize_particles=True, max_plate_nesting=1)


@pytest.mark.parametrize(
    ("make", "gradient", "name"),
    [
        (partial(pe.TraceBeta_ELBO, 0.5), "stl", "guide: SS-VAE"),
        (partial(pe.TraceBeta_ELBO, 0.5), "vargrad", "mixture VAE"),
        (partial(pe.TraceBeta_ELBO, 0.5), "rloo", "guide: scored"),
        (partial(pe.TraceBeta_ELBO, 0.5), "stl", "in turn: drawn before"),
        (partial(pe.TraceBeta_ELBO, 0.5), "vargrad", "in turn: SS-VAE"),
        (pe.TraceIW_ELBO, "dreg", "mixture VAE"),
    ],
)
def test_every_estimator_has_the_gradient_of_the_sum(make, gradient, name):
    """Means of 30 gradients within 5 SE of those of the plain estimator (1 in 70 000)."""
    program = by_name[name]
    start(program)
    found = []
    for loss in (many(make, "auto"), many(make, gradient)):
        runs = [value_and_gradient(loss, program.model, program.guide, program.args, seed)[1] for seed in range(30)]
        found.append({n: torch.stack([g[n] for g in runs]) for n in runs[0]})
    for n, plain in found[0].items():
        error = (plain.mean(0) - found[1][n].mean(0)).abs()
        assert (error <= 5 * ((plain.var(0) + found[1][n].var(0)) / 30).sqrt() + 1e-7).all(), n


def test_a_long_chain_is_summed_in_linear_time():
    x = torch.linspace(-1, 1, 120)

    def chain(x):
        z = torch.tensor(0)
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[z]))
            pyro.sample(f"x_{t}", dist.Normal(z * 1.0, 1.0), obs=x[t])

    terms = pe.TraceTimestep_ELBO().terms(config_enumerate(chain), nothing, x)
    start, step = torch.tensor([0.0, -torch.inf]), torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    hmm = dist.DiscreteHMM(start, step.log(), dist.Normal(torch.tensor([0.0, 1.0]), 1.0))
    torch.testing.assert_close(terms.elbo, hmm.log_prob(x))
    assert terms.kl["z"].shape == (120,)
    assert terms.posterior["z"].shape == (120, 2)


# --- refusals -------------------------------------------------------------------------------------------------


def terms_of(model, guide=nothing, *args, loss=None):
    return (loss or pe.TraceBeta_ELBO()).terms(config_enumerate(model), guide, *(args or (X,)))


def test_different_weights_of_coupled_sites_are_refused():
    with refuses(ArgumentError, "'a'", "'b'", "same beta"):
        terms_of(programs.explaining_away, loss=pe.TraceBeta_ELBO({"a": 0.5}))
    with refuses(ArgumentError, "'k'", "couple", "one beta"):
        terms_of(programs.global_and_local, loss=pe.TraceBeta_ELBO(torch.tensor([0.1, 0.2, 0.3, 0.4])))
    with refuses(ArgumentError, "'z'", "steps", "one beta"):
        terms_of(programs.second_order, loss=pe.TraceTimestep_ELBO(torch.tensor([0.1, 0.2, 0.3, 0.4])))


def test_targets_for_the_kl_of_a_summed_out_site_are_refused():
    with refuses(ArgumentError, "free_bits", "'k'", "Leave out"):
        terms_of(programs.mixture, nothing, X[:3], loss=pe.TraceBeta_ELBO(free_bits=0.1))
    with refuses(ArgumentError, "'k'", "Capacity"):
        terms_of(programs.mixture, nothing, X[:3], loss=pe.TraceBeta_ELBO(pe.Capacity(0.0, 1.0, steps=3)))


def test_a_global_sum_over_subsampled_data_is_refused():
    def model(x):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        with pyro.plate("data", len(x), subsample_size=2) as i:
            pyro.sample("x", dist.Normal(k, 1.0), obs=x[i])

    with refuses(SiteError, "'k': 1.0", "'x': 2.0", "do not subsample"):
        terms_of(model)


def test_a_sum_over_crossed_plates_is_refused():
    def model(x):
        rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1)
        with rows:
            a = pyro.sample("a", dist.Bernoulli(0.3))
        with columns:
            b = pyro.sample("b", dist.Bernoulli(0.6))
        with rows, columns:
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    with refuses(SiteError, "'a'", "'b'", "exponentially", "loop"):
        terms_of(model, nothing, X2)


def test_a_site_outside_of_the_plate_that_it_sums_over_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(k.sum(-1, keepdim=True), 1.0), obs=x.sum())

    with refuses(SiteError, "'x'", "'k'", "outside", "plate"):
        terms_of(model)


def test_importance_weights_of_what_the_guide_enumerates_are_refused():
    program = by_name["guide: mixture"]
    with refuses(SiteError, "'k'", "guide enumerates", "sums"):
        pe.TraceIW_ELBO(2).terms(program.model, program.guide, *program.args)


def test_a_penalty_on_a_summed_out_latent_is_refused():
    with refuses(SiteError, "'k'", "summed out"):
        terms_of(programs.mixture, nothing, X[:3], loss=pe.TraceMI_ELBO("k", "x"))


def test_marks_that_cannot_be_followed_are_refused():
    def poisson(x):
        pyro.sample("k", dist.Poisson(2.0), infer={"enumerate": "parallel"})

    def many(x):
        pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel", "num_samples": 3})

    def sequential(x):
        pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "sequential"})

    def huge(x):
        k = pyro.sample("k", dist.Categorical(torch.ones(5000)))
        j = pyro.sample("j", dist.Categorical(torch.ones(5000)))
        pyro.factor("f", (k + j) * 1.0)

    with refuses(SiteError, "'k'", "Poisson", "finite support"):
        pe.TraceBeta_ELBO().terms(poisson, nothing, X)
    with refuses(SiteError, "'k'", "num_samples"):
        pe.TraceBeta_ELBO().terms(many, nothing, X)
    with refuses(SiteError, "'k'", "'parallel'"):
        pe.TraceBeta_ELBO().terms(sequential, nothing, X)
    with refuses(SiteError, "'f'", "25,000,000 entries", "markov"):
        terms_of(huge)


def test_an_unmarked_discrete_latent_without_guide_site_names_both_ways():
    with refuses(SiteError, "'k'", "to the guide", "enumerate", "summed out"):
        pe.TraceBeta_ELBO().terms(programs.mixture, nothing, X[:3])


def test_plates_beyond_the_room_for_them_are_refused():
    def model(x):
        with pyro.plate("far", 2, dim=-8):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 1.0), obs=torch.zeros(2, 1, 1, 1, 1, 1, 1, 1))

    with refuses(SiteError, "'k'", "max_plate_nesting=8"):
        terms_of(model)
    assert torch.isfinite(terms_of(model, loss=pe.TraceBeta_ELBO(max_plate_nesting=8)).elbo)
