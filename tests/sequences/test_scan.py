"""pe.scan against the written-out loop, and under every handler of Pyro."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive, Trace_ELBO, TraceMeanField_ELBO, autoguide
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import LocScaleReparam

import pyro_elbo as pe
from tests.support.scanned import (
    BOTH,
    LENGTHS,
    MEAN_FIELD,
    PROGRAMS,
    N,
    T,
    at,
    chain_guide_step,
    chain_step,
    flow_guide_step,
    frames,
    in_plates,
    known,
    loss_and_gradients,
    number,
    scanned,
    values_over_time,
    written_out,
    zeros,
)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


VECTORIZED = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2}
PARTICLES = {"one": {}, "looped": {"num_particles": 3}, "vectorized": VECTORIZED}


def both(name):
    """(model, guide) by scan and by loop, and the data."""
    model, guide, xs = PROGRAMS[name]
    return *((model(way), guide(way)) for way in BOTH), xs


def assert_same(name, make_objective, particles):
    ours, theirs, xs = both(name)
    found = loss_and_gradients(make_objective(**PARTICLES[particles]), *ours, xs)
    expected = loss_and_gradients(make_objective(**PARTICLES[particles]), *theirs, known(xs))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert any(g.abs().max() > 1e-3 for g in expected[1].values())


OBJECTIVES = {
    "Pyro's Trace_ELBO": Trace_ELBO,
    "sampled": lambda **options: pe.TraceBeta_ELBO(2.0, kl="sampled", **options),
    "auto": lambda **options: pe.TraceBeta_ELBO(0.5, **options),
    "per step": lambda **options: pe.TraceTimestep_ELBO(normalize="step", **options),
    "importance": lambda **options: pe.TraceTimestep_ELBO(bound="importance", **options),
}


@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_equals_the_loop_in_value_and_gradient(name, objective, particles):
    assert_same(name, OBJECTIVES[objective], particles)


@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("name", sorted(MEAN_FIELD))
def test_equals_the_loop_under_pyros_mean_field_elbo(name, particles):
    """Our own form too: the KL is analytic exactly where Pyro's is."""
    assert_same(name, TraceMeanField_ELBO, particles)
    (model, guide), _, xs = both(name)
    ours = loss_and_gradients(pe.TraceBeta_ELBO(**PARTICLES[particles]), model, guide, xs)
    theirs = loss_and_gradients(TraceMeanField_ELBO(**PARTICLES[particles]), model, guide, xs)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_site_appears_once_with_a_dimension_of_time(name):
    (model, _), (loop, _), xs = both(name)
    pyro.set_rng_seed(0)
    ours = poutine.trace(model).get_trace(xs)
    pyro.set_rng_seed(0)
    theirs = poutine.trace(loop).get_trace(known(xs))
    ours.compute_log_prob()
    theirs.compute_log_prob()
    plates = {"sequences", "group", "item"}
    sites = [n for n, node in ours.nodes.items() if node["type"] == "sample" and n not in plates]
    steps = [n.removesuffix("_1") for n, node in theirs.nodes.items() if n.endswith("_1") and node["type"] == "sample"]
    assert sites == [n for n in steps if n not in plates]
    for site in sites:
        node, steps = ours.nodes[site], [theirs.nodes[f"{site}_{t}"] for t in range(T)]
        assert node["is_observed"] == steps[0]["is_observed"]
        event_dim = steps[0]["fn"].event_dim
        assert node["fn"].event_shape == (T, *steps[0]["fn"].event_shape)
        stacked = values_over_time(theirs, site, T, event_dim)
        missing = node["value"].isnan()
        torch.testing.assert_close(node["value"].where(~missing, 0), stacked.where(~missing, 0), rtol=0, atol=0)
        torch.testing.assert_close(node["log_prob"], sum(s["log_prob"] for s in steps), rtol=1e-12, atol=1e-12)
        assert [f.name for f in node["cond_indep_stack"]] == [f.name for f in steps[0]["cond_indep_stack"]]
    torch.testing.assert_close(ours.log_prob_sum(), theirs.log_prob_sum())


# --- returned values -----------------------------------------------------------------------------------------------


def test_returns_the_last_carry_and_the_outs_of_all_steps():
    def step(carry, x_t):
        total = {"sum": carry["sum"] + x_t["a"], "kept": carry["kept"]}
        return total, (total["sum"], [x_t["b"], None], "a constant")

    xs = {"a": torch.arange(T).double(), "b": torch.arange(2 * T).reshape(T, 2), "c": None}
    start = {"sum": torch.tensor(0.0), "kept": ("label", 3)}
    final, (sums, (b, nothing), constant) = pe.scan(step, start, xs)
    assert final == {"sum": torch.tensor(6.0), "kept": ("label", 3)}
    assert sums.tolist() == [0, 1, 3, 6]
    assert torch.equal(b, xs["b"])
    assert (nothing, constant) == (None, "a constant")
    final, (sums, *_) = pe.scan(step, start, xs, reverse=True)
    assert final["sum"] == 6
    assert sums.tolist() == [6, 6, 5, 3]  # in the order of time, whatever the direction


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_time_stays_where_it_is_in_the_inputs(dim):
    x = torch.randn(3, 4, 5)
    _, out = pe.scan(lambda carry, x_t: (carry, 2 * x_t), None, x, dim=dim)
    assert torch.equal(out, 2 * x)


def test_a_step_without_inputs_or_carry():
    final, drawn = pe.scan(lambda carry, x_t: (carry, pyro.sample("z", dist.Normal(0.0, 1.0))), None, None, length=6)
    assert final is None
    assert len(drawn.unique()) == 6


def test_one_step():
    for x in (torch.tensor([0.3]), torch.zeros(1, 2)):
        trace = poutine.trace(pe.scan).get_trace(chain_step, torch.zeros(x.shape[1:]), x)
        assert trace.nodes["z"]["value"].shape == x.movedim(0, -1).shape


def test_the_carry_of_a_sequence_that_has_ended_stays():
    x = frames(N)
    final, sums = pe.scan(lambda c, x_t: (c + x_t, c + x_t), torch.zeros(N), x, LENGTHS)
    for i, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(final[i], x[:length, i].sum())
        torch.testing.assert_close(sums[:length, i], x[:length, i].cumsum(0))


def test_backward_starts_at_each_sequences_own_end():
    x = frames(N)
    final, sums = pe.scan(lambda c, x_t: (c + x_t, c + x_t), torch.zeros(N), x, LENGTHS, reverse=True)
    for i, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(final[i], x[:length, i].sum())
        torch.testing.assert_close(sums[:length, i], x[:length, i].flip(0).cumsum(0).flip(0))


# --- ragged batches ------------------------------------------------------------------------------------------------


def ragged(padding=torch.nan):
    inside = torch.arange(T)[:, None] < LENGTHS
    return frames(N).where(inside, torch.tensor(padding, dtype=torch.float64))


RAGGED = {
    "forward": (in_plates(chain_step, zeros(N)), in_plates(chain_guide_step, zeros(N))),
    "backward": (in_plates(chain_step, zeros(N), reverse=True), in_plates(chain_guide_step, zeros(N), reverse=True)),
    "flow": (in_plates(chain_step, zeros(N)), in_plates(flow_guide_step, zeros(N))),
}


@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", RAGGED)
def test_ragged_equals_the_masked_loop(name, objective, particles):
    model, guide = RAGGED[name]
    found, expected = (
        loss_and_gradients(OBJECTIVES[objective](**PARTICLES[particles]), model(way), guide(way), x, LENGTHS)
        for way, x in zip(BOTH, (ragged(), ragged(0.0)), strict=True)
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kl", ["auto", "sampled"])
@pytest.mark.parametrize("padding", [torch.nan, torch.inf, 1e300, 7.0])
def test_padding_reaches_no_number(padding, kl):
    """Bitwise: value, gradient and terms, with free bits whose mean runs over the real steps."""
    model, guide = (make(scanned) for make in RAGGED["forward"])
    objective = pe.TraceTimestep_ELBO(kl=kl, free_bits=0.1, normalize="frame")
    results = []
    for x in (ragged(0.0), ragged(padding)):
        loss, gradients = loss_and_gradients(objective, model, guide, x, LENGTHS)
        pyro.set_rng_seed(3)
        terms = objective.terms(model, guide, x, LENGTHS)
        results.append((loss, gradients, terms.kl, terms.log_likelihood, terms.num_frames))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert results[0][-1] == LENGTHS.sum()


def test_free_bits_take_the_mean_over_real_steps():
    """Two sequences, three real steps with KL(N(m, 1) ‖ N(0, 1)) = m²/2: mean 5/6, whatever the padding says."""
    m = torch.tensor([[1.0, 0.0], [2.0, 100.0]], requires_grad=True)  # (T, N)
    lengths = torch.tensor([2, 1])

    def model():
        with pyro.plate("sequences", 2):
            pe.scan(lambda c, x: (c, pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))), None, m.detach(), lengths)

    def guide():
        with pyro.plate("sequences", 2):
            pe.scan(lambda c, x: (c, pyro.sample("z", dist.Normal(x, 1.0))), None, m, lengths)

    for free_bits, paid, slope in ((0.8, 2.5, [[-1.0, 0.0], [-2.0, 0.0]]), (0.9, 2.7, [[0.0, 0.0], [0.0, 0.0]])):
        objective = pe.TraceTimestep_ELBO(free_bits=free_bits).terms(model, guide).objective
        assert objective.item() == pytest.approx(-paid)
        (gradient,) = torch.autograd.grad(objective, m)
        torch.testing.assert_close(gradient, torch.tensor(slope))


def test_lengths_of_a_batch_with_two_dimensions():
    """Plates in groups: each row has its own length."""
    lengths = torch.tensor([[4, 2, 1], [1, 3, 4]])
    x = frames(2, N)

    def program(way, step):
        def run(x, lengths=None):
            with pyro.plate("group", 2, dim=-2), pyro.plate("item", N, dim=-1):
                return way(step, torch.zeros(2, N), x, lengths, length=len(x))

        return run

    padded = x.where(torch.arange(T)[:, None, None] < lengths, torch.nan)
    terms = pe.TraceTimestep_ELBO().terms(
        program(scanned, chain_step), program(scanned, chain_guide_step), padded, lengths
    )
    assert terms.num_frames == lengths.sum()
    assert ((terms.kl["z"] != 0) == (torch.arange(T) < lengths.unsqueeze(-1))).all()


def test_lengths_may_be_any_integers():
    model, guide = (make(scanned) for make in RAGGED["forward"])
    for lengths in (LENGTHS.tolist(), LENGTHS.int(), LENGTHS.to(torch.uint8)):
        pyro.set_rng_seed(0)
        found = pe.TraceTimestep_ELBO().loss(model, guide, ragged(), lengths)
        pyro.set_rng_seed(0)
        assert found == pe.TraceTimestep_ELBO().loss(model, guide, ragged(), LENGTHS)


# --- Pyro's handlers -----------------------------------------------------------------------------------------------


def chain(xs, lengths=None, **options):
    return in_plates(chain_step, zeros(N), **options)(scanned)(xs, lengths)


def chain_loop(xs, lengths=None):
    return in_plates(chain_step, zeros(N))(written_out)(xs, lengths)


def chain_guide(xs, lengths=None):
    return in_plates(chain_guide_step, zeros(N))(scanned)(xs, lengths)


def in_loop(z):
    """Values over time as those of the loop's sites."""
    return {f"z_{t}": z[..., t] for t in range(z.shape[-1])}


def test_replay_and_condition_give_all_values():
    x, z = frames(N), torch.randn(N, T)
    expected = poutine.trace(poutine.condition(chain_loop, in_loop(z))).get_trace(x)
    conditioned = poutine.trace(poutine.condition(chain, {"z": z})).get_trace(x)
    assert conditioned.nodes["z"]["is_observed"]
    source = poutine.trace(
        lambda: pyro.sample("z", dist.Normal(torch.zeros(N, T), 1.0).to_event(2), obs=None)
    ).get_trace()
    source.nodes["z"]["value"] = z
    replayed = poutine.trace(poutine.replay(chain, trace=source)).get_trace(x)
    assert not replayed.nodes["z"]["is_observed"]
    for trace in (conditioned, replayed):
        assert torch.equal(trace.nodes["z"]["value"], z)
        torch.testing.assert_close(trace.log_prob_sum(), expected.log_prob_sum())
    final, outs = poutine.condition(chain, {"z": z})(x)
    assert torch.equal(outs, z.T)
    assert torch.equal(final, z[:, -1])


def test_gradients_flow_into_given_values():
    z = torch.randn(N, T, requires_grad=True)
    traces = [
        poutine.trace(poutine.condition(program, data)).get_trace(frames(N))
        for program, data in ((chain, {"z": z}), (chain_loop, in_loop(z)))
    ]
    ours, theirs = (torch.autograd.grad(trace.log_prob_sum(), z) for trace in traces)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("handler", [poutine.condition, poutine.replay])
def test_given_for_the_first_steps_the_rest_is_drawn(handler):
    z = torch.randn(N, 2)
    if handler is poutine.replay:
        source = poutine.trace(lambda: pyro.sample("z", dist.Normal(z, 1.0).to_event(2))).get_trace()
        z, given = source.nodes["z"]["value"], {"trace": source}
    else:
        given = {"data": {"z": z}}
    pyro.set_rng_seed(0)
    trace = poutine.trace(handler(chain, **given)).get_trace(frames(N))
    node = trace.nodes["z"]
    assert torch.equal(node["value"][:, :2], z)
    assert not node["is_observed"]  # what was drawn is not an observation
    pyro.set_rng_seed(0)
    expected = poutine.trace(poutine.condition(chain_loop, in_loop(z))).get_trace(frames(N))
    torch.testing.assert_close(node["value"], values_over_time(expected, "z", T))
    torch.testing.assert_close(trace.log_prob_sum(), expected.log_prob_sum())


def test_block_hides_a_site_and_draws_it_all_the_same():
    trace = poutine.trace(poutine.block(chain, hide=["z"])).get_trace(frames(N))
    assert "z" not in trace.nodes
    assert "x" in trace.nodes
    with pytest.raises(pe.PyroElboError, match="'z'"):  # the guide's z has no partner any more
        pe.TraceBeta_ELBO().terms(poutine.block(chain, hide=["z"]), chain_guide, frames(N))


def test_mask_and_scale_around_and_inside():
    x, keep = frames(N), torch.tensor([True, False, True])

    def inside(handler):
        def step(z, x_t):
            with handler():
                return chain_step(z, x_t)

        return lambda way: in_plates(step, zeros(N))(way)

    handlers = {
        "mask": lambda: poutine.mask(mask=keep),
        "scale": lambda: poutine.scale(scale=2.5),
        "no mask": lambda: poutine.mask(mask=False),
        "scale by row": lambda: poutine.scale(scale=torch.tensor([1.0, 2.0, 3.0])),
    }
    for name, handler in handlers.items():
        z = torch.randn(N, T)
        totals = []
        for way, values in zip(BOTH, ({"z": z}, in_loop(z)), strict=True):
            around = handler()(in_plates(chain_step, zeros(N))(way))
            for program in (around, inside(handler)(way)):
                totals.append(poutine.trace(poutine.condition(program, values)).get_trace(x).log_prob_sum())
        totals = torch.stack([torch.as_tensor(t, dtype=torch.float64) for t in totals])
        torch.testing.assert_close(totals, totals[:1].expand(4), msg=lambda m, n=name: f"{n}: {m}")


def test_infer_config_and_uncondition():
    x = frames(N)
    trace = poutine.trace(poutine.infer_config(chain, lambda site: {"mark": site["name"]})).get_trace(x)
    assert trace.nodes["z"]["infer"]["mark"] == "z"
    drawn = poutine.trace(poutine.uncondition(chain)).get_trace(x)
    assert not drawn.nodes["x"]["is_observed"]
    assert not torch.equal(drawn.nodes["x"]["value"], x.T)


def test_handlers_inside_of_the_step():
    """LocScaleReparam and an intervention, which put other sites in the place of one."""
    x, z = frames(N), torch.randn(N)
    for handler in (
        lambda step: poutine.reparam(step, {"z": LocScaleReparam(0.3)}),
        lambda step: poutine.do(step, {"z": z}),
    ):
        totals = []
        for way in BOTH:
            pyro.set_rng_seed(0)
            trace = poutine.trace(in_plates(handler(chain_step), zeros(N))(way)).get_trace(x)
            totals.append(trace.log_prob_sum())
        assert any(n.startswith("z") and n not in ("z", "z_0") for n in trace.nodes)
        torch.testing.assert_close(*totals)


def test_a_handler_around_that_observes_a_latent():
    """Conditioning the model on a site makes it a likelihood, in terms with time."""
    z = torch.randn(N, T)
    terms = pe.TraceTimestep_ELBO().terms(poutine.condition(chain, {"z": z}), lambda x: None, frames(N))
    assert set(terms.log_likelihood) == {"z", "x"}
    assert terms.log_likelihood["z"].shape == (N, T)


def subsampled(step, rows):
    def program(x):
        with pyro.plate("sequences", 2 * N, subsample=rows):
            pe.scan(step, torch.zeros(len(rows)), x[:, rows])

    return program


def test_subsampled_sequences_are_scaled():
    x, rows = torch.cat([frames(N), frames(N, seed=2)], 1), torch.tensor([0, 4])
    terms = pe.TraceTimestep_ELBO().terms(subsampled(chain_step, rows), subsampled(chain_guide_step, rows), x)
    assert terms.scale == {"z": 3.0, "x": 3.0}
    torch.testing.assert_close(terms.elbo, 3 * (terms.log_likelihood["x"].sum() - terms.kl["z"].sum()))
    pairs = [torch.tensor(p) for p in ([0, 4], [1, 3], [2, 5])]
    full = pe.TraceTimestep_ELBO(kl="sampled")
    z = torch.randn(2 * N, T)

    def value(rows):
        source = poutine.trace(lambda: pyro.sample("z", dist.Delta(z[rows], event_dim=2))).get_trace()
        guide = poutine.replay(subsampled(chain_guide_step, rows), trace=source)
        return full.terms(subsampled(chain_step, rows), guide, x).elbo

    mean = torch.stack([value(p) for p in pairs]).mean()
    torch.testing.assert_close(mean, value(torch.arange(2 * N)))


def test_predictive_one_by_one_and_parallel():
    x = frames(N)
    for parallel in (False, True):
        draws = Predictive(chain, guide=chain_guide, num_samples=5, parallel=parallel, return_sites=["z"])(x)
        assert draws["z"].shape[0] == 5
        assert draws["z"].reshape(5, -1).shape[1] == N * T
        assert len(draws["z"].flatten().unique()) == 5 * N * T
    z = torch.randn(5, N, T)
    for parallel in (False, True):
        predictive = Predictive(poutine.uncondition(chain), {"z": z}, parallel=parallel, return_sites=["x", "z"])
        draws = predictive(x)
        assert torch.equal(draws["z"].reshape(z.shape), z)
        noise = (draws["x"].reshape(z.shape) - z) / 0.5  # the model's x_t ~ Normal(z_t, 0.5)
        assert noise.abs().max() < 5  # 60 standard normals: a false alarm in 30 000
        assert noise.abs().max() > 1e-3


AUTOGUIDES = {
    "AutoNormal": autoguide.AutoNormal,
    "AutoDelta": autoguide.AutoDelta,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRank": autoguide.AutoLowRankMultivariateNormal,
    "AutoDiagonal": autoguide.AutoDiagonalNormal,
    "AutoLaplace": autoguide.AutoLaplaceApproximation,
    "AutoIAF": autoguide.AutoIAFNormal,
    "AutoStructured": autoguide.AutoStructured,
    "init_to_sample": lambda model: autoguide.AutoNormal(model, init_loc_fn=autoguide.init_to_sample),
    "init_to_median": lambda model: autoguide.AutoNormal(model, init_loc_fn=autoguide.init_to_median),
    "init_to_value": lambda model: autoguide.AutoNormal(
        model, init_loc_fn=autoguide.init_to_value(values={"z": torch.ones(N, T)})
    ),
}


def positive_chain(x):
    """A latent that is positive: the guide's draw goes through exp."""

    def step(z, x_t):
        z = pyro.sample("z", dist.LogNormal(0.5 * z.log(), 0.5))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x_t)
        return z, z

    with pyro.plate("sequences", N, dim=-1):
        pe.scan(step, torch.ones(N), x)


def positive_loop(x):
    z = torch.ones(N)
    with pyro.plate("sequences", N, dim=-1):
        for t in range(T):
            z = pyro.sample(f"z_{t}", dist.LogNormal(0.5 * z.log(), 0.5))
            pyro.sample(f"x_{t}", dist.Normal(z, 0.5), obs=x[t])


@pytest.mark.parametrize("kind", AUTOGUIDES)
@pytest.mark.parametrize(
    ("model", "loop"), [(chain, chain_loop), (positive_chain, positive_loop)], ids=["real", "positive"]
)
def test_autoguides(kind, model, loop):
    """The bound is log p of the loop at the guide's draw, minus log q."""
    x, guide = frames(N), AUTOGUIDES[kind](model)
    guide(x)
    pyro.set_rng_seed(2)
    drawn = poutine.trace(guide).get_trace(x)
    z = drawn.nodes["z"]["value"]
    assert z.shape == (N, T)
    log_p = poutine.trace(poutine.condition(loop, in_loop(z))).get_trace(x).log_prob_sum()
    for objective in (pe.TraceBeta_ELBO(kl="sampled"), pe.TraceTimestep_ELBO()):
        pyro.set_rng_seed(2)
        terms = objective.terms(model, guide, x)
        torch.testing.assert_close(terms.elbo, log_p - drawn.log_prob_sum())
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert torch.isfinite(torch.tensor([svi.step(x) for _ in range(2)])).all()


def test_nuts_sees_the_loops_potential():
    x = frames(N)
    z, params = torch.randn(N, T), {}
    params["ours"] = initialize_model(poutine.block(positive_chain, hide_types=["param"]), model_args=(x,))
    params["theirs"] = initialize_model(poutine.block(positive_loop, hide_types=["param"]), model_args=(x,))
    ours = params["ours"][1]({"z": z})
    theirs = params["theirs"][1](in_loop(z))
    torch.testing.assert_close(ours, theirs)
    mcmc = MCMC(NUTS(positive_chain, max_tree_depth=2), num_samples=3, warmup_steps=2, disable_progbar=True)
    mcmc.run(x)
    draws = mcmc.get_samples()["z"]
    assert draws.shape == (3, N, T)
    assert (draws > 0).all()


# --- forecasts -----------------------------------------------------------------------------------------------------


def forecast(way):
    def program(x):
        given = x.shape[0]
        with pyro.plate("sequences", N, dim=-1):
            return way(chain_with_frames, torch.zeros(N), x, length=given, horizon=3)

    return program


def chain_with_frames(z, x_t):
    z = pyro.sample("z", dist.Normal(number("a", 0.9) * z, 0.8))
    return z, pyro.sample("x", dist.Normal(z, 0.5), obs=x_t)


@pytest.mark.parametrize("observed", [0, 1, T])
def test_forecasts_are_those_of_the_loop(observed):
    x = frames(N)[:observed]
    pyro.set_rng_seed(0)
    trace = poutine.trace(forecast(scanned)).get_trace(x)
    pyro.set_rng_seed(0)
    loop = poutine.trace(forecast(written_out)).get_trace(x)
    for name in ("z", "x"):
        assert torch.equal(trace.nodes[name]["value"], values_over_time(loop, name, observed + 3))
    assert not trace.nodes["x"]["is_observed"]
    assert torch.equal(trace.nodes["_RETURN"]["value"][1][:observed], x)
    torch.testing.assert_close(trace.log_prob_sum(), loop.log_prob_sum())


def test_forecast_goes_on_from_what_the_guide_drew():
    x = frames(N)
    seen = poutine.trace(chain_guide).get_trace(x)
    trace = poutine.trace(poutine.replay(forecast(scanned), trace=seen)).get_trace(x)
    z = trace.nodes["z"]["value"]
    assert z.shape == (N, T + 3)
    assert torch.equal(z[:, :T], seen.nodes["z"]["value"])
    assert len(z[:, T:].unique()) == 3 * N


def test_forecast_by_predictive():
    x = frames(N)
    guide_draws = Predictive(chain_guide, num_samples=6, parallel=True, return_sites=["z"])(x)
    for parallel in (False, True):
        draws = Predictive(forecast(scanned), guide_draws, parallel=parallel, return_sites=["z", "x"])(x)
        z, frame = (draws[n].reshape(6, N, T + 3) for n in ("z", "x"))
        assert torch.equal(z[..., :T], guide_draws["z"].reshape(6, N, T))
        assert torch.equal(frame[..., :T], x.T.expand(6, N, T))
        assert len(frame[..., T:].unique()) == 6 * N * 3


def test_forecast_without_any_frame_generates():
    """Moments of x_1 = z_1 + noise with variance 0.64 + 0.25: 4000 draws, 5 SE, a false alarm in a million."""

    def program():
        with pyro.plate("sequences", 4000):
            return pe.scan(chain_with_frames, torch.zeros(4000), torch.zeros(0, 4000), horizon=1)[1]

    x = program()
    assert x.shape == (1, 4000)
    variance = 0.64 + 0.25
    assert abs(x.mean()) < 5 * (variance / 4000) ** 0.5
    assert abs(x.var() - variance) < 5 * variance * (2 / 4000) ** 0.5


# --- several scans, names, discrete latents ------------------------------------------------------------------------


def two_scans(way):
    """Counts a week, levels a day, and a latent that both share."""

    def days(z, x_t):
        z = pyro.sample("day", dist.Normal(number("a") * z, 0.8))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x_t)
        return z, z

    def weeks(z, y_t):
        z = pyro.sample("week", dist.Normal(z, 0.8))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y_t)
        return z, z

    def program(x, y):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        last, _ = way(days, level, x, length=len(x), name="day_of_year")
        way(weeks, last, y, length=len(y), name="week_of_year")

    return program


def two_scans_guide(way):
    def days(z, x_t):
        z = pyro.sample("day", dist.Normal(number("b") * z + x_t, 0.8))
        return z, z

    def weeks(z, y_t):
        z = pyro.sample("week", dist.Normal(number("c") * z + y_t, 0.8))
        return z, z

    def program(x, y):
        level = pyro.sample("level", dist.Normal(number("d"), 1.0))
        last, _ = way(days, level, x, length=len(x), name="day_of_year")
        way(weeks, last, y, length=len(y), name="week_of_year")

    return program


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO, pe.TraceBeta_ELBO, pe.TraceTimestep_ELBO])
def test_two_scans_in_one_program(objective):
    args = frames(), frames()[:2]
    found, expected = (loss_and_gradients(objective(), two_scans(way), two_scans_guide(way), *args) for way in BOTH)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_name_is_the_dimension_in_the_dataset():
    args = frames(), frames()[:2]
    data = pe.TraceTimestep_ELBO().terms(two_scans(scanned), two_scans_guide(scanned), *args).to_dataset()
    assert data["kl_day"].dims == data["log_likelihood_x"].dims == ("day_of_year",)
    assert data["kl_week"].dims == data["log_likelihood_y"].dims == ("week_of_year",)
    assert data["kl_level"].dims == ()
    assert dict(data.sizes) == {"day_of_year": T, "week_of_year": 2}


def hidden_markov(way):
    def step(k, x_t):
        logits = pyro.param("transition", lambda: torch.tensor([[0.5, -0.5], [-0.2, 0.3]]))
        k = pyro.sample("k", dist.Categorical(logits=logits[k.long()]))
        pyro.sample("x", dist.Normal(2.0 * k - 1, 1.0), obs=x_t)
        return k, k

    def program(x):
        with pyro.plate("sequences", N, dim=-1):
            way(step, torch.zeros(N, dtype=torch.long), x, length=T)

    return program


def hidden_markov_guide(way):
    def step(k, x_t):
        logit = number("b") * x_t + number("c") * k
        logits = torch.stack([torch.zeros_like(logit), logit], -1)
        k = pyro.sample("k", dist.Categorical(logits=logits))
        return k, k

    def program(x):
        with pyro.plate("sequences", N, dim=-1):
            way(step, torch.zeros(N, dtype=torch.long), x, length=T)

    return program


@pytest.mark.parametrize("particles", PARTICLES)
def test_discrete_latents_have_the_score_function_of_the_loop(particles):
    x = frames(N)
    for objective in (Trace_ELBO, lambda **o: pe.TraceBeta_ELBO(0.7, **o), lambda **o: pe.TraceTimestep_ELBO(**o)):
        found, expected = (
            loss_and_gradients(objective(**PARTICLES[particles]), hidden_markov(way), hidden_markov_guide(way), x)
            for way in BOTH
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert expected[1]["b"].abs() > 1e-3


def test_draws_of_a_scan_are_fresh_on_every_run():
    first, second = (poutine.trace(chain).get_trace(frames(N)).nodes["z"]["value"] for _ in range(2))
    assert not torch.isclose(first, second).any()


def test_inputs_and_carries_are_left_as_they_were():
    x, start = ragged(), torch.zeros(N)
    before = x.clone(), start.clone()
    with pyro.plate("sequences", N, dim=-1):
        pe.scan(chain_step, start, x, LENGTHS)
    torch.testing.assert_close((x, start), before, rtol=0, atol=0, equal_nan=True)


def test_at_gives_one_steps_inputs():
    """The helper that this file's loops rest on."""
    nest = {"a": torch.arange(3), "b": (None, torch.arange(6).reshape(3, 2))}
    assert at(nest, 2)["a"] == 2
    assert at(nest, 2)["b"][1].tolist() == [4, 5]
    assert at(nest, 3) == {"a": None, "b": (None, None)}


def test_padding_of_discrete_latents_enters_no_gradient():
    """A parameter of each step: none behind the ends gets a gradient; the batch is the sum of its sequences."""

    def step(k, row):
        k = pyro.sample("k", dist.Bernoulli(0.3 + 0.2 * k))
        pyro.sample("x", dist.Normal(k, 1.0), obs=row["x"])
        return k, None

    def guide_step(k, row):
        return pyro.sample("k", dist.Bernoulli(logits=row["logit"] + 0.1 * k)), None

    def programs(rows, lengths):
        def run(a_step):
            with pyro.plate("sequences", len(rows), dim=-1):
                logits = pyro.param("logits", lambda: torch.linspace(-1.0, 1.0, T * N).reshape(T, N))
                xs = {"x": ragged()[:, rows], "logit": logits[:, rows]}
                xs = {name: x[: max(lengths)] for name, x in xs.items()}
                pe.scan(a_step, torch.zeros(len(rows)), xs, torch.as_tensor(lengths))

        return lambda: run(step), lambda: run(guide_step)

    def gradient(objective, rows, lengths, k):
        model, guide = programs(rows, lengths)
        source = poutine.trace(lambda: pyro.sample("k", dist.Delta(k, event_dim=2))).get_trace()
        _, found = loss_and_gradients(objective, model, poutine.replay(guide, trace=source))
        return found["logits"]

    k = torch.bernoulli(torch.full((N, T), 0.5))
    for objective in (Trace_ELBO(), pe.TraceBeta_ELBO(0.7), pe.TraceTimestep_ELBO(kl="sampled")):
        whole = gradient(objective, [0, 1, 2], LENGTHS.tolist(), k)
        inside = torch.arange(T)[:, None] < LENGTHS
        assert torch.equal(whole != 0, inside)
        parts = [gradient(objective, [i], [n], k[i : i + 1, :n]) for i, n in enumerate(LENGTHS.tolist())]
        torch.testing.assert_close(whole, sum(parts))
