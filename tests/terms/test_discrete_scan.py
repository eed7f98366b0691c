import re

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, SiteError
from tests.programs_chains import CHAINS, LENGTHS, START, STEPS, start
from tests.programs_discrete import nothing
from tests.support.compiled import _interpreted  # noqa: F401  (a fixture)
from tests.support.compiled import assert_same as compiled_equals_eager
from tests.support.refusing import refusing
from tests.test_conformance import assert_same, leaves, value_and_gradient

refuses = refusing(re.compile(r"Write|Flip|Pass|Draw|Move|Mark|Give|write"))
by_name = {c.name: c for c in CHAINS}
MARK = {"enumerate": "parallel"}
LOSSES = {
    "elbo": lambda: pe.TraceTimestep_ELBO(kl="sampled"),
    "beta": lambda: pe.TraceTimestep_ELBO(0.4, kl="sampled"),
    "particles": lambda: pe.TraceTimestep_ELBO(kl="sampled", num_particles=2),
    "vectorized": lambda: pe.TraceTimestep_ELBO(
        kl="sampled", num_particles=3, vectorize_particles=True, max_plate_nesting=2
    ),
    "importance": lambda: pe.TraceIW_ELBO(3, vectorize_particles=True, max_plate_nesting=2),
}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def rows(chains):
    return pytest.mark.parametrize("chain", chains, ids=lambda c: c.name)


@rows(CHAINS)
@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradient_equal_those_of_the_loop(chain, loss):
    start(chain)
    scan, loop = (
        value_and_gradient(LOSSES[loss](), model, guide, (STEPS,))
        for model, guide in ((chain.scan, chain.guide), (chain.loop, chain.loop_guide))
    )
    assert_same(scan, loop)


@rows(CHAINS)
def test_terms_equal_those_of_the_loop_step_by_step(chain):
    start(chain)
    pyro.set_rng_seed(1)
    ours = pe.TraceTimestep_ELBO(kl="sampled").terms(chain.scan, chain.guide, STEPS)
    pyro.set_rng_seed(1)
    theirs = pe.TraceTimestep_ELBO(kl="sampled").terms(chain.loop, chain.loop_guide, STEPS)
    counted = torch.arange(4) < LENGTHS[:, None] if chain.name == "ragged" else torch.tensor(True)
    for kind in ("kl", "log_likelihood"):
        a, b = getattr(ours, kind), getattr(theirs, kind)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-9)
    for name, q in theirs.posterior.items():
        counts = counted.unsqueeze(-1) if name == "k" else torch.tensor(True)
        torch.testing.assert_close(ours.posterior[name] * counts, q * counts, rtol=1e-9, atol=1e-9)
    ours.to_dataset()


@rows(CHAINS)
def test_compiled_steps_equal_eager_ones(interpreted, chain):
    def scenario(SVI):
        svi = SVI(chain.scan, chain.guide, pyro.optim.SGD({"lr": 1e-3}), pe.TraceBeta_ELBO())
        pyro.set_rng_seed(3)
        losses = svi.run(3, STEPS, progress=False)
        return [losses, *(p.detach().clone() for p in leaves().values())]

    compiled_equals_eager(scenario)


def brute_force(x, first=1):
    """Log p of one sequence of the HMM: a sum over all paths."""
    step, means, width = pyro.param("step"), pyro.param("m"), pyro.param("s")
    paths = torch.cartesian_prod(*[torch.arange(3)] * len(x))
    before = torch.cat([torch.full((len(paths), 1), first), paths[:, :-1]], 1)
    return (step[before, paths].log() + dist.Normal(means, width).log_prob(x[:, None])[torch.arange(4), paths]).sum(1)


def test_the_terms_are_those_of_the_sum_over_all_paths():
    chain = by_name["HMM"]
    start(chain)
    terms = pe.TraceBeta_ELBO().terms(chain.scan, nothing, STEPS)
    log_joint = torch.stack([brute_force(STEPS[:, i]) for i in range(2)])
    torch.testing.assert_close(terms.elbo, log_joint.logsumexp(-1).sum(), rtol=1e-12, atol=0)
    paths = torch.nn.functional.one_hot(torch.cartesian_prod(*[torch.arange(3)] * 4), 3) * 1.0
    smoothed = torch.einsum("bp,ptk->btk", log_joint.softmax(-1), paths)
    torch.testing.assert_close(terms.posterior["k"], smoothed, rtol=1e-12, atol=1e-14)
    names = list(leaves())
    ours = torch.autograd.grad(terms.objective, [leaves()[n] for n in names])
    exact = torch.autograd.grad(log_joint.logsumexp(-1).sum(), [leaves()[n] for n in names])
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


def test_beta_is_a_temperature_of_the_paths():
    chain = by_name["HMM"]
    start(chain)
    terms = pe.TraceBeta_ELBO(0.3).terms(chain.scan, nothing, STEPS)
    step = pyro.param("step")
    paths = torch.cartesian_prod(*[torch.arange(3)] * 4)
    prior = step[torch.cat([torch.ones(81, 1, dtype=torch.long), paths[:, :-1]], 1), paths].log().sum(1)
    logs = torch.stack([prior + (brute_force(STEPS[:, i]) - prior) / 0.3 for i in range(2)])
    torch.testing.assert_close(terms.objective, 0.3 * logs.logsumexp(-1).sum(), rtol=1e-12, atol=0)


def test_single_precision_over_a_long_chain_with_impossible_steps():
    torch.set_default_dtype(torch.float32)
    step_probs = torch.tensor([[0.9, 0.1], [0.0, 1.0]])  # no way back

    def model(x):
        def step(k, x_t):
            k = pyro.sample("k", dist.Categorical(step_probs[k]), infer=MARK)
            pyro.sample("x", dist.Normal(3.0 * k, 0.1), obs=x_t)
            return k, None

        pe.scan(step, torch.tensor(0), x)

    x = torch.cat([torch.zeros(60), torch.full((60,), 3.0)])
    terms = pe.TraceBeta_ELBO().terms(model, nothing, x)
    exact = 60 * torch.tensor(0.9).log() + torch.tensor(0.1).log()
    exact = exact + dist.Normal(0.0, 0.1).log_prob(torch.zeros(())) * 120
    torch.testing.assert_close(terms.elbo, exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.posterior["k"][:, 1], (torch.arange(120) >= 60).float(), rtol=0, atol=1e-6)
    assert (terms.kl["k"] > -1e-5).all()


def test_a_marked_state_is_drawn_where_nothing_sums_it_out():
    chain = by_name["HMM"]
    start(chain)
    trace = pyro.poutine.trace(chain.scan).get_trace(STEPS)
    assert trace.nodes["k"]["value"].shape == (2, 4)


# --- refusals -------------------------------------------------------------------------------------------------


def terms_of(step, init=START, guide=nothing, loss=None, **options):
    def model(x):
        with pyro.plate("sequences", 2):
            pe.scan(step, init, x, **options)

    return (loss or pe.TraceBeta_ELBO()).terms(model, guide, STEPS)


def draw(k, name="k"):
    return pyro.sample(name, dist.Categorical(torch.full((3, 3), 1 / 3)[k.long()]), infer=MARK)


def emit(k, x_t):
    pyro.sample("x", dist.Normal(1.0 * k, 1.0), obs=x_t)


def test_what_else_depends_on_the_state_is_refused():
    def carries(carry, x_t):
        k, total = carry
        k = draw(k)
        emit(k, x_t)
        return (k, total + k), None

    def returns(k, x_t):
        k = draw(k)
        emit(k, x_t)
        return k, 2 * k

    def draws(k, x_t):
        k = draw(k)
        z = pyro.sample("z", dist.Normal(1.0 * k, 1.0))
        emit(z, x_t)
        return k, None

    with refuses(SiteError, "'k'", "part of the carry"):
        terms_of(carries, (START, torch.zeros(2, dtype=torch.long)))
    with refuses(SiteError, "'k'", "the step's out"):
        terms_of(returns)
    with refuses(SiteError, "'k'", "the draw of 'z'"):
        terms_of(draws)


def test_scans_that_cannot_be_summed_out_are_refused():
    def plain(k, x_t):
        k = draw(k)
        emit(k, x_t)
        return k, None

    def two(carry, x_t):
        k, j = draw(carry[0]), draw(carry[1], "j")
        emit(k + j, x_t)
        return (k, j), None

    with refuses(SiteError, "'k'", "backward"):
        terms_of(plain, reverse=True)
    with refuses(SiteError, "'k'", "forecast"):
        terms_of(plain, horizon=2)
    with refuses(SiteError, "'k'", "'j'", "K1"):
        terms_of(two, (START, START))
    with refuses(ArgumentError, "'k'", "torch.int64", "torch.float"):
        terms_of(plain, torch.tensor(1.0))
    with refuses(ArgumentError, "'k'", "one beta"):
        terms_of(plain, loss=pe.TraceTimestep_ELBO(torch.tensor([0.1, 0.2, 0.3, 0.4])))


def test_a_site_outside_of_the_scan_that_depends_on_the_last_state_is_refused():
    def model(x):
        def step(k, x_t):
            k = draw(k)
            emit(k, x_t)
            return k, None

        with pyro.plate("sequences", 2):
            last, _ = pe.scan(step, START, x)
            pyro.sample("y", dist.Normal(1.0 * last, 1.0), obs=x[0])

    with refuses(SiteError, "'y'", "'k'", "outside of the pe.scan"):
        pe.TraceBeta_ELBO().terms(model, nothing, STEPS)
