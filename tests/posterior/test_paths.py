"""Draws of the paths of a scan's states, their modes, and what exports, leave-one-out and forecasts make of them."""

import itertools
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.nn.functional import one_hot

import pyro_elbo as pe
from models.hmm import HMM
from pyro_elbo.errors import ArgumentError, SiteError
from pyro_elbo.posterior.draws import _collect, draw
from tests.programs_chains import CHAINS, LENGTHS, STEPS, start
from tests.programs_discrete import DISCRETE, assignments, log_density, nothing
from tests.support.refusing import refusing

refuses = refusing(re.compile(r"Give|Remove|Mark|must be"))
by_name = {c.name: c for c in CHAINS}
ALONE = [c for c in CHAINS if c.guide is nothing]
MARK = {"enumerate": "parallel"}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def rows(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.name)


def drawn(chain, num_samples):
    start(chain)
    return draw(chain.scan, chain.guide, (STEPS,), {}, num_samples, seed=1)


def joint(program, values):
    """Log p of data and values per sequence, those that are masked left out."""
    sites = poutine.trace(poutine.condition(program, data=values)).get_trace(STEPS).nodes.values()
    sites = [m for m in sites if m["type"] == "sample" and type(m["fn"]).__name__ != "_Subsample"]
    return sum((x if (x := m["fn"].log_prob(m["value"])).dim() < 2 else x.sum(0)) for m in sites)


def all_paths(size, total=4):
    """All paths of one state, those first whose last state comes first, then the state before, and so on."""
    paths = torch.tensor(list(itertools.product(range(size), repeat=total)))
    return paths.flip(1)


# --- draws ----------------------------------------------------------------------------------------------------


@rows(ALONE)
def test_every_draw_has_the_weight_of_the_sum(case):
    """p(x, k) / p(k | x) is p(x), whatever the path."""
    draws = drawn(case, 60)
    terms = pe.TraceBeta_ELBO().terms(case.scan, case.guide, STEPS)
    assert draws.way == "plate"
    torch.testing.assert_close(draws.log_weight, terms.elbo.detach().expand(60), rtol=1e-12, atol=0)


@rows([by_name["a level around it"], by_name["switching"]])
def test_weights_beside_other_latents_are_those_of_the_sum(case):
    """p(x, z, k) / (q(z) p(k | x, z)) is log Σ_k p(x, z, k) - log q(z) at the draws of z."""
    draws = drawn(case, 5)
    (name,) = draws.latents.keys() - {"k"}
    for i, z in enumerate(draws.latents[name]):
        model = poutine.condition(case.scan, data={name: z})
        guide = poutine.trace(poutine.condition(case.guide, data={name: z})).get_trace(STEPS)
        exact = pe.TraceBeta_ELBO().terms(model, nothing, STEPS).elbo - guide.log_prob_sum()
        torch.testing.assert_close(draws.log_weight[i], exact.detach(), rtol=1e-10, atol=1e-10)


def test_draws_have_the_joint_distribution_of_paths():
    """Marginals and pairs within 5 SE (1 in 10^4 over 60 numbers), all 81 paths by a chi-square test (1 in 10^5)."""
    chain, count = by_name["HMM"], 3000
    k = drawn(chain, count).latents["k"]
    log_p = torch.stack([joint(chain.scan, {"k": path.expand(2, 4)}) for path in all_paths(3)]).detach()
    paths, p = one_hot(all_paths(3), 3).double(), log_p.softmax(0)
    found = one_hot(k, 3).double()
    marginals = torch.einsum("ps,ptk->stk", p, paths)
    pairs = torch.einsum("ps,ptj,ptk->stjk", p, paths[:, :-1], paths[:, 1:])
    found_pairs = torch.einsum("nstj,nstk->nstjk", found[:, :, :-1], found[:, :, 1:])
    for ours, exact in ((found, marginals), (found_pairs, pairs)):
        assert ((ours.mean(0) - exact).abs() <= 5 * (exact * (1 - exact) / count).sqrt()).all()
    index = (k * 3 ** torch.arange(4)).sum(-1)
    for s in range(2):
        counts = torch.bincount(index[:, s], minlength=81).double()
        expected = count * p[(all_paths(3) * 3 ** torch.arange(4)).sum(1).argsort(), s]
        often = expected >= 5
        counts, expected = (torch.cat([x[often], x[~often].sum()[None]]) for x in (counts, expected))
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2.0), statistic / 2) > 1e-5


def test_steps_after_the_end_are_left_out_of_the_density_of_a_draw():
    """They are predictions: at each, the frequency of a state is that of the terms' posterior."""
    chain = by_name["ragged"]
    k = drawn(chain, 2000).latents["k"][:, 1]
    q = pe.TraceBeta_ELBO().terms(chain.scan, nothing, STEPS).posterior["k"][1].detach()
    error = (one_hot(k, 3).double().mean(0) - q).abs()
    assert (error <= 5 * (q * (1 - q) / 2000).sqrt()).all()


def test_two_plates_in_one_run_or_mapped():
    def model(x, reshape=False):
        level = pyro.sample("level", dist.Normal(torch.zeros(()), 1.0))
        level = level.reshape(()) if reshape else level

        def step(k, x_t):
            k = pyro.sample("k", dist.Categorical(torch.tensor([[0.8, 0.2], [0.3, 0.7]])[k]), infer=MARK)
            pyro.sample("x", dist.Normal(2.0 * k + level, 1.0), obs=x_t)
            return k, None

        with pyro.plate("groups", 3, dim=-2), pyro.plate("sequences", 2, dim=-1):
            pe.scan(step, torch.tensor(0), x)

    def guide(x, reshape=False):
        pyro.sample("level", dist.Normal(torch.tensor(0.3), 0.1))

    x = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
    for reshape, way in ((False, "plate"), (True, "map")):
        draws = draw(model, guide, (x, reshape), {}, 20, seed=0)
        assert draws.way == way
        assert draws.latents["k"].shape == (20, 3, 2, 5)
        for i in (0, 7):
            given = poutine.condition(model, data={"level": draws.latents["level"][i]})
            exact = pe.TraceBeta_ELBO().terms(given, nothing, x).elbo
            exact = exact - dist.Normal(0.3, 0.1).log_prob(draws.latents["level"][i])
            torch.testing.assert_close(draws.log_weight[i], exact, rtol=1e-10, atol=0)


# --- modes ----------------------------------------------------------------------------------------------------


@rows(ALONE)
def test_the_most_probable_path_is_the_best_of_all(case):
    start(case)
    best = pe.infer_discrete(case.scan, case.guide, STEPS, temperature=0)
    with torch.no_grad():
        others = {n: range(2 if n == "g" else 3) for n in best if n != "k"}
        size = 2 if case.name == "autoregressive" else 3
        found = []
        for path in all_paths(size):
            k = one_hot(path, 3).double() if case.name == "one-hot" else path.to(best["k"].dtype)
            for choice in itertools.product(*others.values()):
                values = {n: torch.tensor([v, v]) for n, v in zip(others, choice, strict=True)}
                rows = () if case.name == "one sequence" else (2,)
                found.append(joint(case.scan, {"k": k.expand(*rows, *k.shape), **values}))
        torch.testing.assert_close(joint(case.scan, best), torch.stack(found).amax(0), rtol=1e-12, atol=0)
    if case.name == "ragged":  # the two steps after the end: the most probable ones given the path up to there
        log_a, (_, last, first, second) = pyro.param("step").log(), best["k"][1].tolist()
        assert LENGTHS[1] == 2
        assert (log_a[last][:, None] + log_a).argmax().item() == 3 * first + second


@rows([p for p in DISCRETE if p.guide is nothing and p.name not in ("capture-recapture", "subsampled")])
def test_the_mode_of_other_sites_is_the_best_of_all_assignments(case):
    pe.TraceBeta_ELBO().loss(case.model, case.guide, *case.args)
    best = pe.infer_discrete(case.model, case.guide, *case.args, temperature=0)
    every = [log_density(case.model, case.args, k).detach() for k in assignments(case.model, case.args, {})]
    found = log_density(case.model, case.args, best).detach()
    torch.testing.assert_close(found, torch.stack(every).max(), rtol=1e-12, atol=0)


def test_of_equal_paths_the_one_comes_first_whose_last_states_come_first():
    def model(step_probs, x):
        def step(k, x_t):
            k = pyro.sample("k", dist.Categorical(step_probs[k]), infer=MARK)
            pyro.sample("x", dist.Normal(torch.tensor([1.0, -1.0, 1.0])[k], 1.0), obs=x_t)
            return k, None

        pe.scan(step, torch.tensor(0), x)

    x = torch.tensor([1.0, 1.0, 0.0, 1.0])
    for probs in (torch.full((3, 3), 1 / 3), torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.5, 0.5], [0.5, 0.5, 0.0]])):
        found = pe.infer_discrete(model, lambda *args: None, probs, x, temperature=0)["k"]
        paths = torch.tensor(sorted(map(tuple, all_paths(3).tolist()), key=lambda p: p[::-1]))
        log_p = torch.stack([log_density(model, (probs, x), {"k": path}) for path in paths])
        first = (log_p > log_p.max() - 1e-9).double().argmax()
        assert found.tolist() == paths[first].tolist()


def test_the_path_of_a_long_sequence_in_single_precision():
    torch.set_default_dtype(torch.float32)
    pyro.set_rng_seed(0)
    hmm, x = HMM(4), torch.randn(3, 600)
    found = pe.infer_discrete(hmm.model, hmm.guide, x, temperature=0)["k"]
    hmm, x = hmm.double(), x.double()
    with torch.no_grad():
        log_step, emit = hmm.step.log_softmax(-1), hmm.emission(torch.arange(4)).log_prob(x.unsqueeze(-1))
        best, pointers = log_step[0] + emit[:, 0], []
        for t in range(1, 600):
            best, chosen = (best.unsqueeze(-1) + log_step + emit[:, t].unsqueeze(-2)).max(1)
            pointers.append(chosen)
        k = best.argmax(-1)
        path = [k]
        for chosen in reversed(pointers):
            path.append(k := chosen.gather(-1, k.unsqueeze(-1)).squeeze(-1))
        assert (found == torch.stack(path[::-1], 1)).double().mean() > 0.999


def test_a_draw_at_temperature_one_has_the_seed_of_the_caller():
    chain = by_name["HMM"]
    start(chain)
    one, two, other = (pe.infer_discrete(chain.scan, nothing, STEPS, seed=s)["k"] for s in (0, 0, 5))
    assert one.shape == (2, 4)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_what_has_no_mode_or_draw_is_refused():
    chain = by_name["HMM"]
    with refuses(ArgumentError, "temperature", "0.5"):
        pe.infer_discrete(chain.scan, nothing, STEPS, temperature=0.5)
    with refuses(SiteError, "no site", "config_enumerate"):
        pe.infer_discrete(lambda x: pyro.sample("x", dist.Normal(0.0, 1.0), obs=x), nothing, torch.tensor(0.0))

    def model(x):
        def step(k, inputs):
            x_t, seen = inputs
            with poutine.mask(mask=seen):
                k = pyro.sample("k", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[k]), infer=MARK)
            pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x_t)
            return k, None

        pe.scan(step, torch.tensor(0), (x, torch.tensor([True, False, True, True])))

    for temperature in (0, 1):
        with refuses(SiteError, "'k'", "masked", "same mask"):
            pe.infer_discrete(model, nothing, STEPS[:, 0], temperature=temperature)


# --- exports --------------------------------------------------------------------------------------------------


def test_leave_one_out_of_sequences_whose_states_are_summed_out():
    """All parameters are fixed: elpd is Σ log p(x_n) of each whole sequence."""
    pyro.set_rng_seed(0)
    hmm, x, lengths = HMM(3), torch.randn(5, 12), torch.tensor([12, 3, 7, 12, 1])
    data = pe.to_arviz(hmm.model, hmm.guide, x, lengths, num_samples=100)
    exact = hmm.log_evidence(x, lengths).detach()
    found = torch.as_tensor(data.log_likelihood["x"].values)
    torch.testing.assert_close(found, exact.expand(1, 100, 5), rtol=1e-10, atol=1e-10)
    assert pe.loo(data).elpd == pytest.approx(exact.sum().item(), abs=1e-8)
    assert data.posterior["k"].dims == ("chain", "draw", "sequences", "time")
    assert data.posterior_predictive["x"].shape == (1, 100, 5, 12)
    assert float(pe.pareto_k(hmm.model, hmm.guide, x, lengths, num_samples=100)) < 0.1


def test_leave_one_out_beside_a_latent_that_all_sequences_share():
    """The level is integrated on a grid, the states by the forward algorithm."""
    step_probs = torch.tensor([[0.8, 0.2], [0.3, 0.7]])

    def model(x):
        level = pyro.sample("level", dist.Normal(torch.zeros(()), 1.0))

        def step(k, x_t):
            k = pyro.sample("k", dist.Categorical(step_probs[k]), infer=MARK)
            pyro.sample("x", dist.Normal(2.0 * k + level, 1.0), obs=x_t)
            return k, None

        with pyro.plate("sequences", 6):
            pe.scan(step, torch.tensor(0), x, dim=1)

    x = 2.0 * (torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.4)
    x = x + torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    grid = torch.linspace(-5, 5, 4001)
    emit = dist.Normal(2.0 * torch.arange(2) + grid[:, None, None, None], 1.0).log_prob(x.unsqueeze(-1))
    message = step_probs[0].log() + emit[..., 0, :]
    for t in range(1, 5):
        message = (message.unsqueeze(-1) + step_probs.log()).logsumexp(-2) + emit[..., t, :]
    log_p = message.logsumexp(-1)  # grid × sequences
    prior = dist.Normal(0.0, 1.0).log_prob(grid).unsqueeze(-1)
    others = prior + log_p.sum(1, keepdim=True) - log_p
    exact = ((others + log_p).logsumexp(0) - others.logsumexp(0)).sum()
    q = (prior.squeeze(-1) + log_p.sum(1)).softmax(0)
    mean = (q * grid).sum()
    sd = (q * (grid - mean) ** 2).sum().sqrt()
    data = pe.to_arviz(model, lambda x: pyro.sample("level", dist.Normal(mean, sd)), x, num_samples=4000)
    assert pe.loo(data).elpd == pytest.approx(exact.item(), abs=0.08)  # 4 SE, from 6 seeds


def test_forecasts_continue_the_path_from_its_end():
    """The mean of x after the end is that of the last smoothing marginal carried on, within 5 SE (18 numbers)."""
    step_probs = torch.tensor([[0.95, 0.05], [0.1, 0.9]])

    def model(x, lengths=None, horizon=0):
        means = pyro.param("means", torch.tensor([-2.0, 2.0]))

        def step(k, x_t):
            k = pyro.sample("k", dist.Categorical(step_probs[k]), infer=MARK)
            pyro.sample("x", dist.Normal(means[k], 1.0), obs=x_t)
            return k, None

        with pyro.plate("sequences", len(x)):
            pe.scan(step, torch.zeros(len(x), dtype=torch.long), x, lengths, dim=1, horizon=horizon)

    pyro.set_rng_seed(0)
    x, count = torch.randn(3, 6), 1500
    result = pe.fit(model, lambda *args, **kwargs: None, x, max_epochs=1)
    for args in ((x,), (x, torch.tensor([6, 4, 2]))):
        q, means = result.terms(*args).posterior["k"].detach(), pyro.param("means").detach()
        last = q[torch.arange(3), (args[1] if len(args) > 1 else torch.full((3,), 6)) - 1]
        found = torch.as_tensor(result.predict(*args, num_samples=count, horizon=3)["x"].values)[..., 6:]
        for h in range(3):
            last = last @ step_probs
            mean = last @ means
            sd = (1 + last @ means**2 - mean**2).sqrt()
            assert ((found[..., h].mean(0) - mean).abs() <= 5 * sd / count**0.5).all()
    assert result.sample(10)["k"].dims == ("draw", "sequences", "time")


def test_draws_with_densities_of_their_own_come_in_chunks_that_fit_in_memory(monkeypatch):
    """A draw of the level has a density over 9 pairs of states, 2 sequences and 4 steps."""
    counts = []

    def collect(pair, frame, count):
        counts.append(count)
        return _collect(pair, frame, count)

    monkeypatch.setattr("pyro_elbo.posterior.summed_out.MOST_ENTRIES", 72 * 20)
    monkeypatch.setattr("pyro_elbo.posterior.draws._collect", collect)
    assert drawn(by_name["a level around it"], 50).way == "plate"
    assert counts == [20, 20, 10]
