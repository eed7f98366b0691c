"""Discrete states of a scan that are summed out, each also as a loop under ``pyro.markov``: equal terms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex

import pyro_elbo as pe
from tests.programs import loc, scale
from tests.programs_discrete import nothing, simplex

STEPS = torch.tensor([[0.3, -1.2], [0.8, 1.9], [-0.4, 0.1], [1.1, -0.6]], dtype=torch.float64)  # time × sequences
LENGTHS = torch.tensor([4, 2])
SEEN = torch.tensor([[1, 1], [0, 1], [1, 0], [1, 1]], dtype=torch.bool)
START = torch.tensor(1)


@dataclass(frozen=True)
class Chain:
    """One row: a scan, the same model as a loop, and their guides."""

    name: str
    scan: Callable[..., Any]
    loop: Callable[..., Any]
    guide: Callable[..., Any] = nothing
    loop_guide: Callable[..., Any] = nothing
    vectorizes: bool = True


def start(chain):
    """Create the parameters of both programs."""
    pyro.set_rng_seed(7)
    pe.TraceBeta_ELBO().loss(chain.loop, chain.loop_guide, STEPS)


def over(steps):
    """The steps of a loop with their numbers."""
    return pyro.markov(list(enumerate(steps)))


def hmm_step(k, x_t):
    k = pyro.sample("k", dist.Categorical(simplex("step", 3, 3)[k]))
    pyro.sample("x", dist.Normal(loc("m", 3)[k], scale("s")), obs=x_t)
    return k, None


def hmm_scan(x):
    with pyro.plate("sequences", 2):
        pe.scan(hmm_step, START, x)


def hmm_loop(x, mask=None, seen=None):
    k, every = START, torch.ones(4, 2, dtype=torch.bool)
    mask, seen = every if mask is None else mask, every if seen is None else seen
    with pyro.plate("sequences", 2):
        for t, x_t in over(x):
            with poutine.mask(mask=mask[t]):
                k = pyro.sample(f"k_{t}", dist.Categorical(simplex("step", 3, 3)[k]))
                with poutine.mask(mask=seen[t]):
                    pyro.sample(f"x_{t}", dist.Normal(loc("m", 3)[k], scale("s")), obs=x_t)


def one_sequence_scan(x):
    pe.scan(hmm_step, START, x[:, 0])


def one_sequence_loop(x):
    k = START
    for t, x_t in over(x[:, 0]):
        k = pyro.sample(f"k_{t}", dist.Categorical(simplex("step", 3, 3)[k]))
        pyro.sample(f"x_{t}", dist.Normal(loc("m", 3)[k], scale("s")), obs=x_t)


def ragged_scan(x):
    with pyro.plate("sequences", 2):
        pe.scan(hmm_step, START, x, LENGTHS)


def ragged_loop(x):
    hmm_loop(x, mask=torch.arange(4)[:, None] < LENGTHS)


def missing_scan(x):
    def step(k, inputs):
        x_t, seen = inputs
        k = pyro.sample("k", dist.Categorical(simplex("step", 3, 3)[k]))
        with poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(loc("m", 3)[k], scale("s")), obs=x_t)
        return k, None

    with pyro.plate("sequences", 2):
        pe.scan(step, START, (x, SEEN))


def missing_loop(x):
    hmm_loop(x, seen=SEEN)


def autoregressive_scan(x):
    """Inputs drive the steps, a counter goes along, and an emission depends on the state and x of the step before."""

    def step(carry, x_t):
        before, last, n = carry
        logits = loc("step", 2, 2)[before.long()] * (1 + n.unsqueeze(-1))
        k = pyro.sample("k", dist.Bernoulli(logits=logits[..., 0]))
        pyro.sample("x", dist.Normal(loc("m") * k + loc("a") * last + loc("b") * before, scale("s")), obs=x_t)
        return (k, x_t, n + 1), None

    zeros = torch.zeros(2, dtype=torch.float64)
    with pyro.plate("sequences", 2):
        pe.scan(step, (zeros, zeros, zeros), x)


def autoregressive_loop(x):
    before = last = torch.zeros(2, dtype=torch.float64)
    with pyro.plate("sequences", 2):
        for t, x_t in over(x):
            logits = loc("step", 2, 2)[before.long()] * (1.0 + t)
            k = pyro.sample(f"k_{t}", dist.Bernoulli(logits=logits[..., 0]))
            pyro.sample(f"x_{t}", dist.Normal(loc("m") * k + loc("a") * last + loc("b") * before, scale("s")), obs=x_t)
            before, last = k, x_t


def one_hot_scan(x):
    def step(k, x_t):
        k = pyro.sample("k", dist.OneHotCategorical(k @ simplex("step", 3, 3)))
        with pyro.plate("features", 2, dim=-2):
            pyro.sample("x", dist.Normal((k * loc("m", 2, 1, 3)).sum(-1), scale("s")), obs=x_t)
        return k, None

    with pyro.plate("sequences", 2, dim=-1):
        pe.scan(step, torch.eye(3, dtype=torch.float64)[1], torch.stack([x, x.cos()], 1))


def one_hot_loop(x):
    k, features = torch.eye(3, dtype=torch.float64)[1], pyro.plate("features", 2, dim=-2)
    with pyro.plate("sequences", 2, dim=-1):
        for t, x_t in over(torch.stack([x, x.cos()], 1)):
            k = pyro.sample(f"k_{t}", dist.OneHotCategorical(k @ simplex("step", 3, 3)))
            with features:
                pyro.sample(f"x_{t}", dist.Normal((k * loc("m", 2, 1, 3)).sum(-1), scale("s")), obs=x_t)


def mixture_scan(x):
    """A class of each sequence and a first state are summed out around the scan."""
    with pyro.plate("sequences", 2):
        g = pyro.sample("g", dist.Categorical(simplex("classes", 2)))
        start = pyro.sample("start", dist.Categorical(simplex("starts", 2, 3)[g]))

        def step(k, x_t):
            k = pyro.sample("k", dist.Categorical(Vindex(simplex("step", 2, 3, 3))[g, k]))
            pyro.sample("x", dist.Normal(Vindex(loc("m", 2, 3))[g, k], scale("s")), obs=x_t)
            return k, None

        pe.scan(step, start, x)


def mixture_loop(x):
    with pyro.plate("sequences", 2):
        g = pyro.sample("g", dist.Categorical(simplex("classes", 2)))
        k = pyro.sample("start", dist.Categorical(simplex("starts", 2, 3)[g]))
        for t, x_t in over(x):
            k = pyro.sample(f"k_{t}", dist.Categorical(Vindex(simplex("step", 2, 3, 3))[g, k]))
            pyro.sample(f"x_{t}", dist.Normal(Vindex(loc("m", 2, 3))[g, k], scale("s")), obs=x_t)


def independent_scan(x):
    """A mixture at every step: nothing is carried on."""

    def step(carry, x_t):
        k = pyro.sample("k", dist.Categorical(simplex("weights", 3)))
        pyro.sample("x", dist.Normal(loc("m", 3)[k], scale("s")), obs=x_t)
        return carry, None

    with pyro.plate("sequences", 2):
        pe.scan(step, torch.zeros(2), x)


def independent_loop(x):
    with pyro.plate("sequences", 2):
        for t, x_t in over(x):
            k = pyro.sample(f"k_{t}", dist.Categorical(simplex("weights", 3)))
            pyro.sample(f"x_{t}", dist.Normal(loc("m", 3)[k], scale("s")), obs=x_t)


def level_scan(x):
    """A continuous latent around the scan."""
    with pyro.plate("sequences", 2):
        level = pyro.sample("level", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))

        def step(k, x_t):
            k = pyro.sample("k", dist.Categorical(simplex("step", 3, 3)[k]))
            pyro.sample("x", dist.Normal(loc("m", 3)[k] + level, scale("s")), obs=x_t)
            return k, None

        pe.scan(step, START, x)


def level_loop(x):
    with pyro.plate("sequences", 2):
        level = pyro.sample("level", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        k = START
        for t, x_t in over(x):
            k = pyro.sample(f"k_{t}", dist.Categorical(simplex("step", 3, 3)[k]))
            pyro.sample(f"x_{t}", dist.Normal(loc("m", 3)[k] + level, scale("s")), obs=x_t)


def level_guide(x):
    with pyro.plate("sequences", 2):
        pyro.sample("level", dist.Normal(loc("q", 2), scale("q_s")))


def switching_scan(x):
    """A linear dynamical system whose drift switches: the guide draws z, the regime is summed out."""

    def step(carry, x_t):
        k, z = carry
        k = pyro.sample("k", dist.Categorical(simplex("step", 2, 2)[k]))
        z = pyro.sample("z", dist.Normal(0.5 * z + loc("m", 2)[k], scale("s")))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x_t)
        return (k, z), None

    with pyro.plate("sequences", 2):
        pe.scan(step, (START, torch.zeros(2, dtype=torch.float64)), x)


def switching_guide(x):
    def step(z, x_t):
        z = pyro.sample("z", dist.Normal(loc("q") * z + x_t, scale("q_s")))
        return z, None

    with pyro.plate("sequences", 2):
        pe.scan(step, torch.zeros(2, dtype=torch.float64), x)


def switching_loop(x):
    k, z = START, torch.zeros(2, dtype=torch.float64)
    with pyro.plate("sequences", 2):
        for t, x_t in over(x):
            k = pyro.sample(f"k_{t}", dist.Categorical(simplex("step", 2, 2)[k]))
            z = pyro.sample(f"z_{t}", dist.Normal(0.5 * z + loc("m", 2)[k], scale("s")))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x_t)


def switching_loop_guide(x):
    z = torch.zeros(2, dtype=torch.float64)
    with pyro.plate("sequences", 2):
        for t, x_t in enumerate(x):
            z = pyro.sample(f"z_{t}", dist.Normal(loc("q") * z + x_t, scale("q_s")))


def row(name, scan, loop, guide=nothing, loop_guide=None, **more):
    return Chain(name, config_enumerate(scan), config_enumerate(loop), guide, loop_guide or guide, **more)


CHAINS = [
    row("HMM", hmm_scan, hmm_loop),
    row("one sequence", one_sequence_scan, one_sequence_loop),
    row("ragged", ragged_scan, ragged_loop),
    row("missing steps", missing_scan, missing_loop),
    row("autoregressive", autoregressive_scan, autoregressive_loop),
    row("one-hot", one_hot_scan, one_hot_loop),
    row("mixture of HMMs", mixture_scan, mixture_loop),
    row("independent steps", independent_scan, independent_loop),
    row("a level around it", level_scan, level_loop, level_guide),
    row("switching", switching_scan, switching_loop, switching_guide, switching_loop_guide),
]
