"""Laws of every sequence model: equal to loops, ragged batches, forecasts, terms over time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

import pyro_elbo as pe

N, T, X, Z, HIDDEN = 3, 5, 4, 2, 6
LENGTHS = torch.tensor([5, 2, 3])
VECTORIZED = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}
PARTICLES = {"one": {}, "looped": {"num_particles": 3}, "vectorized": VECTORIZED}
OBJECTIVES = {
    "pyro": Trace_ELBO,
    "beta": lambda **options: pe.TraceBeta_ELBO(2.0, **options),
    "timestep": pe.TraceTimestep_ELBO,
    "timestep_sampled": lambda **options: pe.TraceTimestep_ELBO(kl="sampled", **options),
    "timestep_beta": lambda **options: pe.TraceTimestep_ELBO(torch.linspace(0.0, 2.0, T).double(), **options),
    "per_frame": lambda **options: pe.TraceTimestep_ELBO(normalize="frame", **options),
}


@dataclass(frozen=True)
class Loops:
    """The programs of a model written out over time, with sites z_0, x_0, z_1, ...; ``model`` returns all frames."""

    model: Callable[..., Any]
    guide: Callable[..., Any]


def normal(loc, raw):
    """Normal with a softplus scale of at least 0.03; mean and scale bend off before 10."""
    loc, scale = (10 * torch.tanh(x / 10) for x in (loc, torch.nn.functional.softplus(raw)))
    return dist.Normal(loc, scale + 0.03).to_event(1)


def split(output):
    """Both halves of a network's output."""
    return output[..., : output.shape[-1] // 2], output[..., output.shape[-1] // 2 :]


def observe(name, logits, x, t):
    """Frame t of x, drawn where x has ended."""
    return pyro.sample(name, dist.Bernoulli(logits=logits).to_event(1), obs=x[:, t] if t < x.shape[1] else None)


def gru(cell, state, *xs):
    """The equations of a gated recurrent unit."""
    gates_x = cell.inputs(*xs).chunk(3, -1)
    gates_h = (state @ cell.state.weight.T + cell.state.bias).chunk(3, -1)
    reset, update = (torch.sigmoid(a + b) for a, b in zip(gates_x[:2], gates_h[:2], strict=True))
    return (1 - update) * torch.tanh(gates_x[2] + reset * gates_h[2]) + update * state


def states(cell, inputs, reverse):
    """The states of a recurrent network over a list of inputs, each a tuple."""
    state, found = torch.zeros(len(inputs[0][0]), cell.hidden).double(), {}
    for t in sorted(range(len(inputs)), reverse=reverse):
        state = found[t] = gru(cell, state, *inputs[t])
    return [found[t] for t in range(len(inputs))]


def zeros(x, size):
    """A start for every sequence."""
    return torch.zeros(len(x), size).double()


def frames(seed=1):
    """Binary sequences."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(N, T, X, generator=generator).gt(0.6).double()


def ragged(padding=float("nan")):
    """The same, with padding after each sequence's end."""
    x = frames()
    x[torch.arange(T) >= LENGTHS[:, None]] = padding
    return x


def make(kind, **options):
    """A model in double precision whose parameters are far enough from zero for every part to matter."""
    torch.manual_seed(0)
    module = kind(X, Z, HIDDEN, **options).double()
    for p in module.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return module


def gradients(module, loss):
    """The gradient of every parameter, zero where the loss does not depend on it."""
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, module.parameters(), strict=True)]


def assert_equals_loops(module, loops, objective, particles):
    """Value and gradient on the same draws."""
    x, results = frames(), []
    for model, guide in ((module.model, module.guide), (loops.model, loops.guide)):
        pyro.set_rng_seed(3)
        loss = OBJECTIVES[objective](**PARTICLES[particles]).differentiable_loss(model, guide, x)
        results.append((loss, gradients(module, loss)))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert all(g.abs().max() > 1e-6 for g in results[0][1])  # every parameter takes part


def assert_ragged_equals_singles(module, kl, particles):
    """Terms and gradient of a ragged batch with NaN padding: the sums over its sequences, each alone, on the same z."""
    objective = pe.TraceTimestep_ELBO(kl=kl, **PARTICLES[particles])
    seen = _trace_of_guide(module, particles)
    whole = objective.terms(module.model, poutine.replay(module.guide, trace=seen), ragged(), LENGTHS)
    total = torch.zeros_like(whole.objective)
    for i, length in enumerate(LENGTHS.tolist()):
        x, z = frames()[i : i + 1, :length], seen.nodes["z"]["value"][..., i : i + 1, :length, :]
        terms = objective.terms(module.model, poutine.replay(module.guide, trace=trace_of(z)), x)
        total = total + terms.objective
        for part in ("kl", "log_likelihood"):
            (ours,), (theirs,) = getattr(whole, part).values(), getattr(terms, part).values()
            torch.testing.assert_close(ours[i : i + 1, :length], theirs, rtol=1e-9, atol=1e-9)
            assert ours[i, length:].abs().sum() == 0
    torch.testing.assert_close(whole.objective, total, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(module, whole.objective), gradients(module, total), rtol=1e-9, atol=1e-9)


def trace_of(z):
    """A trace that holds z alone: not the plate, which has another size."""
    return poutine.trace(lambda: pyro.sample("z", dist.Delta(z, event_dim=z.dim()))).get_trace()


def _trace_of_guide(module, particles):
    guide = module.guide
    if particles == "vectorized":
        plate = pyro.plate("num_particles_vectorized", VECTORIZED["num_particles"], dim=-2)
        guide = plate(guide)
    with torch.no_grad():
        return poutine.trace(guide).get_trace(ragged(), LENGTHS)


def assert_padding_is_ignored(module):
    """No padding reaches a number: not NaN, not another value."""
    results = []
    for padding in (float("nan"), 1.0, float("inf")):
        pyro.set_rng_seed(3)
        x = ragged(padding)
        loss = pe.TraceTimestep_ELBO().differentiable_loss(module.model, module.guide, x, LENGTHS)
        results.append((loss, gradients(module, loss)))
    assert all(torch.isfinite(g).all() for g in results[0][1])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)


def assert_terms_add_up(module):
    """The terms have a dimension of time, over which they add up to the bound."""
    objective = pe.TraceTimestep_ELBO()
    terms = objective.terms(module.model, module.guide, ragged(), LENGTHS)
    assert terms.kl["z"].shape == terms.log_likelihood["x"].shape == (N, T)
    assert terms.is_analytic == {"z": True}
    per_step = terms.log_likelihood["x"].sum(0) - terms.kl["z"].sum(0)
    torch.testing.assert_close(per_step.sum(), terms.elbo)
    assert terms.to_dataset()["kl_z"].dims[-1] == "time"


def assert_draws_what_loops_draw(module, loops):
    """Generation and forecast: shapes, the loops' own draws from the same seed, and other draws from another."""
    draw = {
        "generate": lambda: module.generate(N, T),
        "forecast": lambda: module.forecast(frames()[:, :2], 3),
        "generate_loop": lambda: loops.model(frames()[:, :0], T),
        "forecast_loop": lambda: _forecast_loop(loops),
    }
    drawn = {}
    for name, make_it in draw.items():
        pyro.set_rng_seed(5)
        drawn[name] = make_it()
    assert drawn["generate"].shape == (N, T, X)
    assert drawn["forecast"].shape == (N, 3, X)
    assert torch.equal(drawn["generate"], drawn["generate_loop"])
    assert torch.equal(drawn["forecast"], drawn["forecast_loop"])
    assert not torch.equal(drawn["generate"], module.generate(N, T))
    assert set(drawn["generate"].unique().tolist()) == {0.0, 1.0}


def _forecast_loop(loops):
    x = frames()[:, :2]
    seen = poutine.trace(loops.guide).get_trace(x)
    return poutine.replay(loops.model, trace=seen)(x, 3)[:, 2:]


def posterior_changes(module):
    """The steps at which q(z_t | z_{t-1}, ·) changes, at the same draws, when the frame at t = 2 does."""
    x, other = frames(), frames()
    other[:, 2] = 1 - other[:, 2]
    seen = poutine.trace(module.guide).get_trace(x)
    again = poutine.trace(poutine.replay(module.guide, trace=seen)).get_trace(other)
    q, r = (trace.nodes["z"]["fn"].steps.base_dist for trace in (seen, again))
    differs = ((q.loc != r.loc) | (q.scale != r.scale)).any(-1)
    assert torch.equal(differs.all(0), differs.any(0))  # the same for all sequences
    return differs.all(0).nonzero().flatten().tolist()


def bound_of(module, x):
    """The bound on one set of draws."""
    return pe.TraceBeta_ELBO().terms(module.model, module.guide, x).elbo.item()


def assert_trains(module):
    """pe.fit on the programs raises the bound of validation data; parameters of all parts change."""
    module.float()
    before = [p.detach().clone() for p in module.parameters()]
    x = frames().float().repeat(4, 1, 1)
    lengths = LENGTHS.repeat(4)
    loss = pe.TraceTimestep_ELBO(normalize="frame")
    result = pe.fit(
        module.model, module.guide, (x, lengths), (x, lengths), loss=loss, lr=0.02, max_epochs=15, progress=False
    )
    elbo = result.history.elbo.sel(split="valid")
    assert elbo[-1] > elbo[0]
    assert all(not torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


def assert_starts_from_frequencies(module):
    """A model whose output looks at nothing gives each feature the frequency that it was started from."""
    frames_ = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0]], dtype=torch.double)
    module.start_from(frames_)
    torch.nn.init.zeros_(module.output.weight)
    observed = poutine.trace(module.model).get_trace(frames()).nodes["x"]["fn"].steps.base_dist.probs
    expected = torch.tensor([3.5, 0.5, 2.5, 1.5], dtype=torch.double) / 4  # half a count for either value
    torch.testing.assert_close(observed, expected.expand_as(observed))
