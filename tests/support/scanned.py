"""Scans beside the loops that they stand for: one step program, run both ways."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger

import pyro_elbo as pe

N, T = 3, 4
LENGTHS = torch.tensor([4, 1, 3])


class Numbered(Messenger):
    """Puts the number of a step behind the names of its sites, as a loop has to."""

    def __init__(self, t):
        super().__init__()
        self.t = t

    def _pyro_sample(self, msg):
        msg["name"] = f"{msg['name']}_{self.t}"


def at(xs, t, dim=0):
    """The inputs of one step, of a nest of dictionaries and tuples; None where they have ended."""
    if xs is None:
        return None
    if isinstance(xs, dict):
        return {key: at(x, t, dim) for key, x in xs.items()}
    if isinstance(xs, tuple):
        return tuple(at(x, t, dim) for x in xs)
    return xs.select(dim, t) if t < xs.shape[dim] else None


def written_out(step, init, xs, lengths=None, *, length, horizon=0, reverse=False, dim=0, name=None):
    """The loop: sites z_0, z_1, ...; what has ended is masked; the outs as a list."""
    carry, outs = init, {}
    times = range(length + horizon)
    for t in reversed(times) if reverse else times:
        with Numbered(t), poutine.mask(mask=True if lengths is None else t < lengths):
            new, outs[t] = step(carry, at(xs, t, dim))
        carry = new if lengths is None else torch.where(t < lengths, new, carry)  # a carry without event dimensions
    return carry, [outs[t] for t in times]


def scanned(step, init, xs, lengths=None, *, length, **options):
    """The scan, called like :func:`written_out`."""
    return pe.scan(step, init, xs, lengths, length=length, **options)


BOTH = (scanned, written_out)


def values_over_time(trace, name, length, event_dim=0):
    """What a written-out loop drew for a site, stacked where a scan has its time."""
    return torch.stack([trace.nodes[f"{name}_{t}"]["value"] for t in range(length)], -1 - event_dim)


def parameters():
    """The unconstrained leaves of Pyro's store."""
    return dict(pyro.get_param_store().named_parameters())


def loss_and_gradients(objective, model, guide, *args, seed=3):
    """A loss and its gradient by parameter, on the draws of a seed."""
    poutine.trace(guide).get_trace(*args)  # makes parameters
    poutine.trace(model).get_trace(*args)
    for p in parameters().values():
        p.grad = None
    pyro.set_rng_seed(seed)
    loss = objective.loss_and_grads(model, guide, *args)
    return loss, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters().items()}


def number(name, value=0.3):
    return pyro.param(name, lambda: torch.tensor(value))


def frames(*shape, seed=1):
    return torch.randn(T, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- programs: a step of the model and one of the guide, run by scan or by loop ------------------------------------


def chain_step(z, x_t):
    z = pyro.sample("z", dist.Normal(number("a") * z, 0.8))
    pyro.sample("x", dist.Normal(z, 0.5), obs=x_t)
    return z, z


def chain_guide_step(z, x_t):
    z = pyro.sample("z", dist.Normal(number("b") * z + number("c") * x_t, number("s", 0.7).exp()))
    return z, z


def rich_step(carry, x_t):
    """Two latents, one of them discrete, and events; two observations; a factor and a deterministic site."""
    h, count = carry
    z = pyro.sample("z", dist.Normal(h * number("a"), 0.8).to_event(1))
    k = pyro.sample("k", dist.Bernoulli(logits=z.sum(-1) - 0.1 * count))
    pyro.factor("bonus", -0.1 * k * z[..., 0] ** 2)
    m = pyro.deterministic("m", z + k.unsqueeze(-1))
    pyro.sample("x", dist.Normal(m, 0.5).to_event(1), obs=x_t["x"])
    pyro.sample("y", dist.Poisson(z.sum(-1).exp() + 0.1), obs=x_t["y"])
    return (0.5 * h + z, count + k), {"m": m, "nothing": None}


def rich_guide_step(carry, x_t):
    h, count = carry
    z = pyro.sample("z", dist.Normal(h * number("b") + number("c") * x_t["x"], number("s", 0.7).exp()).to_event(1))
    k = pyro.sample("k", dist.Bernoulli(logits=number("d") * z.sum(-1)))
    return (0.5 * h + z, count + k), None


def flow_guide_step(h, x_t):
    """Its distribution cannot be stacked over time."""
    base = dist.Normal(number("b") * h, 1.0)
    scale = pyro.param("scale", lambda: torch.tensor(0.6), constraint=constraints.positive)
    z = pyro.sample(
        "z", dist.TransformedDistribution(base, [dist.transforms.AffineTransform(number("c") * x_t, scale)])
    )
    return z, z


def nested_step(z, x_t):
    """A plate inside of the step, and one that is nested in it."""
    with pyro.plate("group", 2, dim=-2):
        z = pyro.sample("z", dist.Normal(number("a") * z, 0.8))
        with pyro.plate("item", N, dim=-1):
            w = pyro.sample("w", dist.Normal(z, 0.7))
            pyro.sample("x", dist.Normal(w, 0.5), obs=x_t)
    return z, w


def nested_guide_step(z, x_t):
    with pyro.plate("group", 2, dim=-2):
        z = pyro.sample("z", dist.Normal(number("b") * z + number("c") * x_t.mean(-1, keepdim=True), 0.7))
        with pyro.plate("item", N, dim=-1):
            w = pyro.sample("w", dist.Normal(z + number("d") * x_t, 0.7))
    return z, w


def missing_step(z, x_t):
    """Steps that were not observed, by mask; their data are NaN."""
    z = pyro.sample("z", dist.Normal(number("a") * z, 0.8))
    with poutine.mask(mask=x_t["seen"]):
        pyro.sample("x", dist.Normal(z, 0.5), obs=x_t["x"])
    return z, z


def missing_guide_step(z, x_t):
    return chain_guide_step(z, x_t["x"].nan_to_num())


def filled_step(z, x_t):
    """Steps that were not observed, by obs_mask."""
    z = pyro.sample("z", dist.Normal(number("a") * z, 0.8))
    x = pyro.sample("x", dist.Normal(z, 0.5), obs=x_t["x"].nan_to_num(), obs_mask=x_t["seen"])
    return 0.5 * z + 0.1 * x, z


def filled_guide_step(z, x_t):
    z = pyro.sample("z", dist.Normal(number("b") * z, 0.7))
    with poutine.mask(mask=~x_t["seen"]):
        x = pyro.sample("x_unobserved", dist.Normal(number("c"), 0.7))
    return 0.5 * z + 0.1 * torch.where(x_t["seen"], x_t["x"].nan_to_num(), x), z


def in_plates(step, init, **options):
    """The program of a step, by either way of running it, for a batch of sequences."""

    def make(way):
        def program(xs, lengths=None):
            with pyro.plate("sequences", N, dim=-1):
                return way(step, init(), xs, lengths, length=T, **options)

        return program

    return make


def alone(step, init, **options):
    """The same without a plate."""
    return lambda way: lambda xs, lengths=None: way(step, init(), xs, lengths, length=T, **options)


def zeros(*shape):
    return lambda: torch.zeros(shape)


SEEN = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
RICH = {"x": frames(N, 2), "y": frames(N).abs().round()}
MISSING = {"x": frames(N).where(SEEN, torch.nan), "seen": SEEN}

PROGRAMS = {
    "one sequence": (alone(chain_step, zeros()), alone(chain_guide_step, zeros()), frames()),
    "sequences": (in_plates(chain_step, zeros(N)), in_plates(chain_guide_step, zeros(N)), frames(N)),
    "a carry that grows": (in_plates(chain_step, zeros()), in_plates(chain_guide_step, zeros()), frames(N)),
    "backward": (
        in_plates(chain_step, zeros(N), reverse=True),
        in_plates(chain_guide_step, zeros(N), reverse=True),
        frames(N),
    ),
    "time second": (
        in_plates(chain_step, zeros(N), dim=1),
        in_plates(chain_guide_step, zeros(N), dim=1),
        frames(N).T,
    ),
    "many sites": (
        in_plates(rich_step, lambda: (torch.zeros(N, 2), torch.zeros(N))),
        in_plates(rich_guide_step, lambda: (torch.zeros(N, 2), torch.zeros(N))),
        RICH,
    ),
    "flow": (in_plates(chain_step, zeros(N)), in_plates(flow_guide_step, zeros(N)), frames(N)),
    "plates inside": (alone(nested_step, zeros(2, 1)), alone(nested_guide_step, zeros(2, 1)), frames(2, N)),
    "missing by mask": (in_plates(missing_step, zeros(N)), in_plates(missing_guide_step, zeros(N)), MISSING),
    "missing by obs_mask": (in_plates(filled_step, zeros(N)), in_plates(filled_guide_step, zeros(N)), MISSING),
}
MEAN_FIELD = {"one sequence", "sequences", "a carry that grows", "backward", "time second", "plates inside"}


def known(xs):
    """What Pyro can take: its log densities refuse NaN, masked or not, and its gradients are NaN there."""
    return {**xs, "x": xs["x"].nan_to_num()} if isinstance(xs, dict) else xs
