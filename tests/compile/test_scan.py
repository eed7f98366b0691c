"""Scans in compiled steps: equal to uncompiled ones, one step in the graph however many there are, errors that help."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

import pyro_elbo as pe
from models.dmm import DMM
from models.srnn import SRNN
from models.vrnn import VRNN, MarkovVRNN
from pyro_elbo.errors import CompileError, NonFiniteError, PyroElboError
from tests.benchmarks import recurrences_ours
from tests.models import laws
from tests.support.compiled import (  # noqa: F401  (fixtures work by name)
    _double,
    _graphs,
    _interpreted,
    _scalar_loops,
    adam,
    assert_same,
    parameters,
    run_both,
)
from tests.support.rows import thorough
from tests.support.scanned import (
    LENGTHS,
    PROGRAMS,
    N,
    T,
    chain_guide_step,
    chain_step,
    frames,
    in_plates,
    known,
    number,
    scanned,
    zeros,
)

VECTORIZED = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2}


def training(model, guide, *args, make_objective=pe.TraceTimestep_ELBO, steps=20, evaluate=False):
    """Losses of ``steps`` steps and of an evaluation (compiled the second time), and all parameters after them."""

    def scenario(svi_of):
        svi = svi_of(model, guide, adam(0.02), make_objective())
        losses = [svi.step(*args) for _ in range(4)]
        losses += svi.run(steps - 4, *args, progress=False)
        losses += [svi.evaluate_loss(*args) for _ in range(2 * evaluate)]
        return losses, parameters()

    return scenario


def assert_compiled(model, guide, *args, **options):
    """Compiled equals uncompiled on the same noise: losses and parameters."""
    eager, compiled = run_both(training(model, guide, *args, **options))
    torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-11)
    assert compiled[-1]
    return compiled


def loops(graph):
    return [n for n in graph.module.graph.nodes if n.target is torch.ops.pyro_elbo.loop.default]


# --- programs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "particles"),
    [
        ("a carry that grows", "one"),
        ("backward", "vectorized"),
        pytest.param("many sites", "vectorized", marks=pytest.mark.thorough),
        ("flow", "vectorized"),
        pytest.param("plates inside", "vectorized", marks=pytest.mark.thorough),
        ("missing by mask", "one"),
    ],
)
def test_programs(interpreted, name, particles):
    model, guide, xs = PROGRAMS[name]
    options = VECTORIZED if particles == "vectorized" else {}
    assert_compiled(model(scanned), guide(scanned), known(xs), make_objective=lambda: pe.TraceTimestep_ELBO(**options))


def test_evaluation(interpreted):
    """Its graph has no gradient, although parameters are outs of the step as they are."""
    model, guide, xs = PROGRAMS["missing by obs_mask"]
    assert_compiled(model(scanned), guide(scanned), known(xs), evaluate=True)


@pytest.mark.parametrize("lengths", [None, torch.tensor([1, 1, 1])], ids=["full", "ragged"])
def test_one_step_leaves_alone_what_only_a_next_step_would_use(interpreted, graphs, lengths):
    """The recurrence has no gradient then, so that an optimizer does not step it."""

    def program(observe):
        def run(x):
            weight = pyro.param("recurrence" if observe else "loc", torch.tensor(0.5))

            def step(z, x_t):
                z = pyro.sample("z", dist.Normal(z if observe else weight, 1.0))
                if observe:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x_t)
                return weight * z, None

            with pyro.plate("sequences", len(x)):
                pe.scan(step, torch.zeros(len(x)), x, lengths, dim=1)

        return run

    losses, found = assert_compiled(program(True), program(False), torch.ones(3, 1))
    assert found["recurrence"] == 0.5
    assert found["loc"] != 0.5
    assert len(graphs) == 1


MODELS = {"VRNN": VRNN, "MarkovVRNN": MarkovVRNN, "DMM": DMM, "SRNN": SRNN}
OBJECTIVES = {
    "β per step, free bits": lambda: pe.TraceTimestep_ELBO(torch.linspace(0.0, 2.0, laws.T).double(), free_bits=0.05),
    "warm-up per frame": lambda: pe.TraceTimestep_ELBO(pe.LinearWarmup(0.0, 1.0, steps=7), normalize="frame"),
    "particles": lambda: pe.TraceTimestep_ELBO(**laws.VECTORIZED),
    "importance": lambda: pe.TraceTimestep_ELBO(bound="importance", **laws.VECTORIZED),
    "filtering": lambda: pe.TraceTimestep_ELBO(bound="filtering", num_particles=3, max_plate_nesting=1),
    "always resampling": lambda: pe.TraceTimestep_ELBO(
        bound="filtering", num_particles=3, resample=1.0, max_plate_nesting=1
    ),
}


@pytest.mark.parametrize(
    ("name", "objective", "data"),
    [
        ("VRNN", "β per step, free bits", "ragged"),
        pytest.param("VRNN", "filtering", "ragged", marks=pytest.mark.thorough),
        pytest.param("MarkovVRNN", "importance", "ragged", marks=pytest.mark.thorough),
        ("MarkovVRNN", "always resampling", "full"),
        pytest.param("DMM", "particles", "ragged", marks=pytest.mark.thorough),
        pytest.param("SRNN", "warm-up per frame", "ragged", marks=pytest.mark.thorough),
    ],
)
def test_models(interpreted, name, objective, data):
    args = (laws.frames(),) if data == "full" else (laws.ragged(), laws.LENGTHS)

    def scenario(svi_of):
        module = laws.make(MODELS[name])
        return training(module.model, module.guide, *args, make_objective=OBJECTIVES[objective], steps=8)(svi_of)

    assert_same(scenario, rtol=1e-8, atol=1e-10)


def hidden_markov_step(k, x_t):
    logits = pyro.param("transition", lambda: torch.tensor([0.5, -0.5]))
    k = pyro.sample("k", dist.Bernoulli(logits=logits[0] + logits[1] * k))
    pyro.sample("x", dist.Normal(2.0 * k - 1, 1.0), obs=x_t)
    return k, k


def hidden_markov_guide_step(k, x_t):
    k = pyro.sample("k", dist.Bernoulli(logits=number("b") * x_t + number("c") * k))
    return k, k


@pytest.mark.parametrize(
    ("options", "args"),
    [
        pytest.param({}, (frames(N), LENGTHS), id="ragged elbo"),
        pytest.param(
            {"num_particles": 4, "bound": "importance"}, (frames(N),), id="importance", marks=pytest.mark.thorough
        ),
    ],
)
def test_discrete_latents(interpreted, options, args):
    """Each particle of a loop has draws of its own."""
    model, guide = (in_plates(s, zeros(N))(scanned) for s in (hidden_markov_step, hidden_markov_guide_step))
    found = assert_compiled(model, guide, *args, make_objective=lambda: pe.TraceTimestep_ELBO(**options))
    assert set(found[-1]) == {"transition", "b", "c"}


def learned_start(x):
    """Parameters in init, in the carry of a scan without sites, and in inputs over time."""
    start = pyro.param("start", lambda: torch.tensor([0.1, -0.2]))
    decay = pyro.param("decay", lambda: torch.tensor(0.6))
    weights = pyro.param("weights", lambda: torch.linspace(-0.5, 0.5, T))

    def smooth(carry, row):
        level, slope = carry["level"], carry["slope"]
        level = decay * level + slope * row["x"] + row["weight"]
        return {"level": level, "slope": slope * 0.9, "count": carry["count"] + 1}, (level, None)

    init = {"level": start[0].expand(N), "slope": start[1], "count": torch.tensor(0)}
    final, (levels, _) = pe.scan(smooth, init, {"x": x, "weight": weights})
    return final, levels


def summarized_model(x):
    with pyro.plate("sequences", N, dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(N), 1.0))
        mean = z.unsqueeze(-1) + pyro.param("shift", lambda: torch.zeros(T))
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x.T)


def summarizing_guide(x):
    final, levels = learned_start(x)
    with pyro.plate("sequences", N, dim=-1):
        pyro.sample("z", dist.Normal(final["level"] + levels.mean(0) / final["count"], final["slope"].exp()))


def test_scan_without_sites_and_parameters_everywhere(interpreted, graphs):
    found = assert_compiled(summarized_model, summarizing_guide, frames(N), make_objective=pe.TraceBeta_ELBO)
    for name, start in (("start", [0.1, -0.2]), ("decay", 0.6), ("weights", torch.linspace(-0.5, 0.5, T))):
        assert not torch.isclose(found[-1][name], torch.as_tensor(start)).any(), name


@pytest.mark.parametrize("reverse", [False, True])
def test_a_carry_of_several_tensors(interpreted, reverse):
    """Of different shapes and dtypes; one that grows, one that no step changes, one that only counts."""

    def step(carry, x_t):
        z, (total, history), count = carry
        z = pyro.sample("z", dist.Normal(number("a") * z + 0.1 * history.sum(-1), 0.8))
        pyro.sample("x", dist.Normal(z + 0.01 * count, 0.5), obs=x_t)
        history = shifted(history, z)
        return (z, (total + z.square(), history), count + 1), total

    def guide_step(carry, x_t):
        z, history = carry
        z = pyro.sample("z", dist.Normal(number("b") * x_t + number("c") * history.mean(-1), number("s").exp()))
        return (z, shifted(history, z)), None

    def shifted(history, z):
        return torch.cat([history.expand(*z.shape, 3)[..., 1:], z.unsqueeze(-1)], -1)

    def init():
        return torch.zeros(()), (torch.zeros(N), torch.zeros(N, 3)), torch.tensor(0)

    model = in_plates(step, init, reverse=reverse)(scanned)
    guide = in_plates(guide_step, lambda: (torch.zeros(()), torch.zeros(N, 3)), reverse=reverse)(scanned)
    options = VECTORIZED if reverse else {}
    assert_compiled(model, guide, frames(N), make_objective=lambda: pe.TraceTimestep_ELBO(**options))


def dead_parts(carry, z):
    """Parts that nothing reads: one accumulates, one is set anew, one goes through a cell."""
    total, last, hidden = carry
    cell = pyro.module("cell", torch.nn.GRUCell(1, 2))
    z = z.unsqueeze(-1)
    return total * number("decay") + z, number("constant").expand(N, 1), cell(z, hidden)


@pytest.mark.parametrize(
    "lengths", [pytest.param(None, id="full", marks=pytest.mark.thorough), pytest.param(LENGTHS, id="ragged")]
)
def test_parts_of_a_carry_that_nothing_reads(interpreted, lengths):
    """What they alone depend on has no gradient, so that an optimizer, and its weight decay, leave it alone."""

    def step(carry, x_t):
        h, dead = carry
        z = pyro.sample("z", dist.Normal(h, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x_t)
        return (torch.tanh(number("a") * z + h), dead_parts(dead, z)), None

    def guide_step(dead, x_t):
        z = pyro.sample("z", dist.Normal(number("b") * x_t, 0.5))
        return dead_parts(dead, z), None

    def zero_parts():
        return torch.zeros(N, 1), torch.zeros(N, 1), torch.zeros(N, 2)

    model, guide = in_plates(step, lambda: (torch.zeros(N), zero_parts())), in_plates(guide_step, zero_parts)

    def scenario(svi_of):
        torch.manual_seed(0)
        optimizer = pyro.optim.AdamW({"lr": 0.02, "weight_decay": 0.1})
        svi = svi_of(model(scanned), guide(scanned), optimizer, pe.TraceTimestep_ELBO())
        return [svi.step(frames(N), lengths) for _ in range(5)], parameters()

    eager, compiled = run_both(scenario)
    torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-11)
    assert compiled[1]["decay"] == compiled[1]["constant"] == 0.3
    assert compiled[1]["a"] != 0.3


@pytest.mark.parametrize("length", [2, thorough(3)])
def test_a_gradient_that_takes_several_steps(interpreted, length):
    """A value that is read two steps later has a gradient from three steps on; the two initial ones from two on."""

    def guide(x):
        def step(carry, x_t):
            first, second, third = carry
            pyro.sample("z", dist.Normal(number("b") * x_t + first, 0.5))
            return (second, third, number("late").expand(N)), None

        with pyro.plate("sequences", N):
            pe.scan(step, tuple(number(f"start_{i}").expand(N) for i in range(3)), x)

    def model(x):
        with pyro.plate("sequences", N):
            pe.scan(chain_step, torch.zeros(N), x)

    compiled = assert_compiled(model, guide, frames(N)[:length], steps=5)[1]
    moved = {name for name, p in compiled.items() if p != 0.3}
    assert moved >= {"b", "start_0", "start_1"}
    assert "late" not in moved
    assert ("start_2" in moved) == (length == 3)


@pytest.mark.parametrize("reverse", [thorough(False), True])
def test_a_carry_through_which_no_gradient_passes(interpreted, reverse):
    """Its start still has the gradient of the step that runs first."""

    def step(z, x_t):
        return pyro.sample("z", dist.Normal(number("b") * x_t + z, 0.5)).detach(), None

    guide = in_plates(step, lambda: number("start").expand(N), reverse=reverse)(scanned)
    model = in_plates(chain_step, zeros(N), reverse=reverse)(scanned)
    assert assert_compiled(model, guide, frames(N), steps=5)[1]["start"] != 0.3


def test_tensors_that_were_computed_from_each_other_outside_of_the_scan(interpreted):
    """A step reads all of them: the gradient of each counts once."""

    def guide(x):
        weight = number("b")
        double, power = 2 * weight, weight.exp()

        def step(z, x_t):
            return pyro.sample("z", dist.Normal(weight * x_t + double * z, power)), None

        with pyro.plate("sequences", N):
            pe.scan(step, torch.zeros(N), x)

    assert_compiled(in_plates(chain_step, zeros(N))(scanned), guide, frames(N), steps=5)


def test_guide_and_model_with_different_recurrences(interpreted, graphs):
    guide = in_plates(chain_guide_step, zeros(N))(scanned)

    def step(carry, x_t):
        h, z = carry
        z = pyro.sample("z", dist.Normal(h * number("a") + z, 0.8))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x_t)
        return (torch.tanh(number("h") * h + z), z), None

    model = in_plates(step, lambda: (torch.zeros(N), torch.zeros(N)))(scanned)
    assert_compiled(model, guide, frames(N))


FAMILIES = {
    "Gamma": lambda a: (dist.LogNormal(a, 0.5), dist.LogNormal(a - 0.1, 0.6)),
    "correlated": lambda a: (
        dist.MultivariateNormal(a.unsqueeze(-1) + torch.zeros(2), torch.eye(2)),
        dist.MultivariateNormal(a.unsqueeze(-1) + torch.ones(2), scale_tril=torch.tensor([[0.8, 0.0], [0.3, 0.7]])),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(interpreted, family):
    """Distributions that keep several tensors, or compute and hold others."""

    def make(which):
        def step(h, x_t):
            z = pyro.sample("z", FAMILIES[family](number("a") * h)[which])
            mean = z if z.dim() == h.dim() else z.sum(-1)
            if which == 0:
                pyro.sample("x", dist.Normal(mean, 0.5), obs=x_t)
            return torch.tanh(mean + x_t), None

        return in_plates(step, zeros(N))(scanned)

    assert_compiled(make(0), make(1), frames(N), LENGTHS)


STREAMS = {
    "Categorical": lambda a: dist.Categorical(logits=a.unsqueeze(-1) * torch.arange(3.0)),
    "OneHotCategorical": lambda a: dist.OneHotCategorical(logits=a.unsqueeze(-1) * torch.arange(3.0)),
    "StudentT": lambda a: dist.StudentT(3.0, a, 1.0),
}


@pytest.mark.parametrize(
    "family",
    ["Categorical", *map(thorough, ("OneHotCategorical", "StudentT"))],
)
def test_the_random_stream_of_a_scan(interpreted, family):
    """That of an uncompiled run where all noise has a fixed distribution; otherwise the seed repeats a run."""

    def program(observe):
        def step(h, x_t):
            k = pyro.sample("k", STREAMS[family](number("a" if observe else "b") * h))
            k = k @ torch.arange(3.0) if family.startswith("One") else k.double()
            z = pyro.sample("z", dist.Normal(k, 1.0))
            if observe:
                pyro.sample("x", dist.Normal(z, 0.5), obs=x_t)
            return torch.tanh(z + k), None

        return in_plates(step, zeros(N))(scanned)

    scenario = training(program(True), program(False), frames(N), steps=5)
    eager, compiled = run_both(scenario)
    if family == "StudentT":  # a Gamma is drawn by rejection: as many numbers as it takes
        assert run_both(scenario)[1][0] == compiled[0]
        assert torch.isfinite(torch.tensor(compiled[0])).all()
    else:
        torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-11)


# --- the graph -----------------------------------------------------------------------------------------------------


def sizes(module, length, graphs, objective=pe.TraceTimestep_ELBO):
    """Nodes and loops of the graph of a training step on sequences of a length."""
    pyro.clear_param_store()
    x = torch.rand(2, length, laws.X).round()
    svi = pe.SVI(module.model, module.guide, adam(), objective(), compile=True)
    svi.step(x)
    svi.step(x)
    return len(graphs[-1].module.graph.nodes), len(loops(graphs[-1]))


@pytest.mark.slow
def test_the_graph_does_not_grow_with_time(interpreted, graphs):
    module = laws.make(VRNN)
    short, long = (sizes(module, length, graphs) for length in (3, 12))
    assert short == long
    assert short[1] == LOOPS["VRNN"]
    assert len(graphs) == 2


# Forward and backward of each recurrence that nothing else has computed.
LOOPS = {"VRNN": 2, "MarkovVRNN": 4, "SRNN": 6}


@pytest.mark.parametrize("name", ["MarkovVRNN", thorough("SRNN")])
def test_recurrences_of_model_and_guide_are_computed_once(interpreted, graphs, name):
    """VRNN: the state of the cell serves both. MarkovVRNN: the encoder and q. SRNN: h of both, the encoder and q."""
    assert sizes(laws.make(MODELS[name]), 5, graphs)[1] == LOOPS[name]


class Other(VRNN):
    """The same model under another name: a guide with a cell of its own."""


@pytest.mark.slow
def test_different_recurrences_are_computed_twice(interpreted, graphs):
    one, other = laws.make(VRNN), laws.make(Other)
    svi = pe.SVI(one.model, other.guide, adam(), pe.TraceBeta_ELBO(), compile=True)
    for _ in range(2):
        svi.step(laws.frames())
    assert len(loops(graphs[-1])) == 4


def test_a_step_without_recurrence_needs_no_loop(interpreted, graphs):
    """What the carry does not need is evaluated for all steps at once: here that is everything."""

    def step(c, x_t):
        z = pyro.sample("z", dist.Normal(number("a") * x_t, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x_t)
        return c, None

    def guide_step(c, x_t):
        return c, pyro.sample("z", dist.Normal(number("b") * x_t, 1.0)).sum()

    model, guide = (in_plates(s, lambda: None)(scanned) for s in (step, guide_step))
    assert_compiled(model, guide, frames(N))
    assert all(not loops(graph) for graph in graphs)


def test_a_carry_that_is_known_after_one_step_needs_no_loop(interpreted, graphs):
    """z_t given z_{t-1} with values that the guide has drawn: the model runs no loop of its own."""
    model = in_plates(chain_step, zeros(N))(scanned)
    guide = in_plates(lambda z, x_t: (pyro.sample("z", dist.Normal(number("b") * x_t, 1.0)), None), zeros(N))(scanned)
    assert_compiled(model, guide, frames(N))
    assert all(not loops(graph) for graph in graphs)


def test_other_lengths_of_a_batch_need_no_other_graph(interpreted, graphs):
    """Lengths are data."""
    model, guide = (in_plates(s, zeros(N))(scanned) for s in (chain_step, chain_guide_step))

    def scenario(svi_of):
        svi = svi_of(model, guide, adam(), pe.TraceTimestep_ELBO())
        batches = ([4, 1, 3], [1, 1, 1], [4, 4, 4], [2, 3, 1])
        return [svi.step(frames(N), torch.tensor(lengths)) for lengths in batches], parameters()

    assert_same(scenario)
    assert len(graphs) == 1


# --- what cannot be compiled or used -------------------------------------------------------------------------------


def refused(model, guide, *args, match):
    """Compilation fails at the second step and changes nothing; without it the programs go on."""
    svi = pe.SVI(model, guide, adam(), pe.TraceTimestep_ELBO(), compile=True)
    svi.step(*args)
    before = parameters()
    with pytest.raises(CompileError, match=match):
        svi.step(*args)
    torch.testing.assert_close(parameters(), before, rtol=0, atol=0)
    pe.SVI(model, guide, adam(), pe.TraceTimestep_ELBO()).step(*args)
    assert any(not torch.equal(p, before[name]) for name, p in parameters().items())


def test_a_buffer_that_a_step_changes_in_place(interpreted):
    norm = torch.nn.BatchNorm1d(2)

    def step(z, x_t):
        z = pyro.sample("z", dist.Normal(0.3 * z, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(norm(z), 1.0).to_event(1), obs=x_t)
        return z, None

    def guide_step(z, x_t):
        return pyro.sample("z", dist.Normal(number("b") * x_t, 1.0).to_event(1)), None

    model, guide = (in_plates(s, zeros(N, 2))(scanned) for s in (step, guide_step))
    refused(model, guide, frames(N, 2), match=r"pe.scan.*in place.*compile=False")
    assert norm.num_batches_tracked > 0


def noted(x):
    """A guide without latents, and one parameter."""
    number("a")


def test_forecasts(interpreted):
    """The forecast's frames are given, so that there is a bound."""

    def step(z, x_t):
        pyro.sample("x", dist.Normal(number("a") * z, 1.0), obs=x_t)
        return z, None

    def model(x):
        with pyro.plate("sequences", N), poutine.condition(data={"x": torch.zeros(N, T + 2)}):
            pe.scan(step, torch.ones(N), x, horizon=2)

    refused(model, noted, frames(N), match=r"horizon.*compile=False")


def test_values_for_the_first_steps(interpreted):
    """The rest is drawn, out of the bound's sight."""

    def model(x):
        with poutine.block(hide=["z"]), poutine.condition(data={"z": torch.zeros(N, 2)}):
            in_plates(chain_step, zeros(N))(scanned)(x)

    refused(model, noted, frames(N), match=r"'z'.*first steps only.*compile=False")


def test_a_scan_inside_of_a_step(interpreted):
    """One without sites is a function, but only one step can be traced at a time."""

    def step(z, x_t):
        z = pyro.sample("z", dist.Normal(0.3 * z, 1.0))
        mean = pe.scan(lambda c, row: (0.5 * c + row, None), torch.zeros(N), x_t)[0]
        pyro.sample("x", dist.Normal(z, 1.0), obs=mean)
        return z, None

    def guide_step(z, x_t):
        return pyro.sample("z", dist.Normal(number("b") * x_t.sum(0), 1.0)), None

    model, guide = (in_plates(s, zeros(N))(scanned) for s in (step, guide_step))
    refused(model, guide, frames(5, N), match=r"within the step.*loop out.*compile=False")


def test_values_that_a_step_looks_at(interpreted):
    def step(z, x_t):
        z = pyro.sample("z", dist.Normal(0.3 * z, 1.0))
        pyro.sample("x", dist.Normal(z if z.sum() > 0 else -z, 1.0), obs=x_t)
        return z, None

    model, guide = (in_plates(s, zeros(N))(scanned) for s in (step, chain_guide_step))
    refused(model, guide, frames(N), match=r"(?s)z.sum\(\) > 0|Site 'x'")


@pytest.mark.parametrize("lengths", [[0, 1, 2], [5, 1, 2]])
def test_lengths_are_checked_at_every_step(interpreted, lengths):
    """The graph assumes that they fit; a step whose lengths do not changes nothing and says so."""
    model, guide = (in_plates(s, zeros(N))(scanned) for s in (chain_step, chain_guide_step))
    svi = pe.SVI(model, guide, adam(), pe.TraceTimestep_ELBO(), compile=True)
    for _ in range(3):
        svi.step(frames(N), LENGTHS)
    before = parameters()
    with pytest.raises(PyroElboError, match="between 1 and T = 4"):
        svi.step(frames(N), torch.tensor(lengths))
    torch.testing.assert_close(parameters(), before, rtol=0, atol=0)
    assert svi.step(frames(N), LENGTHS) < float("inf")


def test_nan_in_the_real_part_changes_nothing(interpreted):
    model, guide = (in_plates(s, zeros(N))(scanned) for s in (chain_step, hidden_from_x))
    svi = pe.SVI(model, guide, adam(), pe.TraceTimestep_ELBO(), compile=True)
    for _ in range(3):
        svi.step(frames(N), LENGTHS)
    before = parameters()
    x = frames(N)
    x[2, 2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"'x'.*\(2, 2\)"):
        svi.step(x, LENGTHS)
    torch.testing.assert_close(parameters(), before, rtol=0, atol=0)
    x[2, 2], x[3, 1] = 0.0, torch.nan  # padding
    assert svi.step(x, LENGTHS) < float("inf")


def hidden_from_x(z, x_t):
    return pyro.sample("z", dist.Normal(number("b") * z + number("c"), 0.7)), None


# --- loops over scalars --------------------------------------------------------------------------------------------


FILTERS = {"ARMA(1,1)": 1, "GARCH(1,1)": 3, "local level": 1, "HMM filter": 3}


@pytest.mark.parametrize(
    ("name", "particles"),
    [*FILTERS.items(), *(pytest.param(name, 4 - n, marks=pytest.mark.thorough) for name, n in FILTERS.items())],
)
def test_filters_of_a_few_scalars(scalar_loops, name, particles):
    """Their parameters act at every step: gradients add up over time."""
    model, y = recurrences_ours.WORKS[name], recurrences_ours.data(7)
    options = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 0} if particles > 1 else {}

    def scenario(svi_of):
        guide = AutoNormal(model)
        return training(model, guide, y, make_objective=lambda: pe.TraceBeta_ELBO(**options), steps=6)(svi_of)

    assert_same(scenario, rtol=1e-9, atol=1e-11)
    assert scalar_loops
    assert all(scalar_loops)
    if name == "HMM filter":  # forward and backward take functions of all pairs of states
        assert all("::exp(" in source for source in scalar_loops)


@pytest.mark.parametrize("name", ["backward", *map(thorough, ("many sites", "missing by mask", "plates inside"))])
def test_scalars_of_programs(scalar_loops, name):
    model, guide, xs = PROGRAMS[name]
    objective = lambda: pe.TraceTimestep_ELBO(**VECTORIZED)  # noqa: E731
    assert_compiled(model(scanned), guide(scanned), known(xs), make_objective=objective, steps=6)
    assert any(scalar_loops)


def test_scalars_of_a_carry_that_is_indexed(scalar_loops):
    def step(h, x_t):
        h = torch.stack([torch.tanh(h[0] + number("a") * x_t), torch.tanh(h[1] * x_t * number("a"))])
        pyro.sample("x", dist.Normal(h.sum(), 1.0), obs=x_t)
        return h, None

    assert_compiled(lambda x: pe.scan(step, torch.zeros(2), x), lambda x: None, torch.randn(5), steps=6)
    assert all(scalar_loops)


def test_scalars_of_ragged_sequences(scalar_loops):
    model, guide = (in_plates(s, zeros(N))(scanned) for s in (chain_step, chain_guide_step))
    assert_compiled(model, guide, frames(N), LENGTHS, steps=6)
    assert all(scalar_loops)


# --- machine code --------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_machine_code_of_a_ragged_scan():
    model, guide = (in_plates(s, zeros(N))(scanned) for s in (chain_step, chain_guide_step))
    assert_compiled(model, guide, frames(N), LENGTHS)


def test_machine_code_of_a_step_of_products():
    """Its loop calls the step time after time."""
    weight = torch.eye(65) + 0.01 * torch.randn(65, 65)

    def step(h, x_t):
        h = torch.tanh(h @ weight + number("c"))
        pyro.sample("x", dist.Normal(h.sum(), 1.0), obs=x_t)
        return h, None

    def model(x):
        pe.scan(step, torch.zeros(65), x)

    assert_compiled(model, lambda x: None, torch.randn(5))


@pytest.mark.thorough
def test_machine_code_of_a_ragged_vrnn():
    def scenario(svi_of):
        module = laws.make(VRNN)
        return training(module.model, module.guide, laws.ragged(), laws.LENGTHS)(svi_of)

    assert_same(scenario, rtol=1e-9, atol=1e-11)


@pytest.mark.thorough
def test_machine_code_of_a_smoother_with_particles():
    def scenario(svi_of):
        module = laws.make(MarkovVRNN)
        objective = lambda: pe.TraceTimestep_ELBO(bound="importance", **laws.VECTORIZED)  # noqa: E731
        return training(module.model, module.guide, laws.frames(), make_objective=objective)(svi_of)

    assert_same(scenario, rtol=1e-9, atol=1e-11)


@pytest.mark.thorough
def test_machine_code_of_a_filter():
    model, guide = (in_plates(s, zeros(N))(scanned) for s in (chain_step, chain_guide_step))
    assert_compiled(model, guide, frames(N), LENGTHS, make_objective=OBJECTIVES["filtering"])
