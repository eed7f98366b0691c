"""Programs with discrete latents that are summed out, and the sum over all assignments that they must equal."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex

from tests.programs import X2, X, loc, scale

WORDS = torch.tensor([[0, 2, 1], [3, 3, 0]]).T  # words × documents
LENGTHS = torch.tensor([3, 1])


@dataclass(frozen=True)
class Discrete:
    """One row.

    Attributes:
        factor: the scale of the whole program, which stands outside of the sum.
        vectorizes: the pair runs with particles on the left.
        nesting: the batch dimensions of its plates.
        pyro_runs: Pyro's TraceEnum_ELBO evaluates it.
        looped: the sum over assignments is the bound: the guide draws nothing for enumerated values.
    """

    name: str
    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple = (X,)
    factor: float = 1.0
    vectorizes: bool = True
    nesting: int = 1
    pyro_runs: bool = True
    looped: bool = True


def nothing(*args):
    """The guide of a model whose latents are all summed out."""


def simplex(name, *shape):
    def start():
        n = torch.Size(shape).numel()
        return (0.3 * torch.arange(n, dtype=torch.float64)).sin().reshape(shape).softmax(-1)

    return pyro.param(name, start, constraint=constraints.simplex)


def values(k, *x):
    return torch.stack(x)[k]


def mixture(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(simplex("weights", 3)))
        pyro.sample("x", dist.Normal(loc("means", 3)[k], scale("widths", 3)[k]), obs=x)


def global_switch(x):
    k = pyro.sample("k", dist.Bernoulli(simplex("p", 2)[0]))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc("a") * k, scale("s")), obs=x)


def global_and_local(x):
    k = pyro.sample("k", dist.Categorical(simplex("p", 3)))
    with pyro.plate("data", len(x)):
        j = pyro.sample("j", dist.Categorical(simplex("weights", 3, 2)[k]))
        pyro.sample("x", dist.Normal(loc("means", 3, 2)[k, j], scale("s")), obs=x)


def explaining_away(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Bernoulli(simplex("p", 2)[0]))
        b = pyro.sample("b", dist.Categorical(simplex("w", 3)))
        pyro.sample("x", dist.Normal(loc("u") * a + loc("v", 3)[b], scale("s")), obs=x)


def chain_in_rows(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(simplex("p", 2)))
        b = pyro.sample("b", dist.Categorical(simplex("q", 2, 3)[a]))
        c = pyro.sample("c", dist.Categorical(simplex("r", 3, 2)[b]))
        pyro.sample("x", dist.Normal(loc("m", 2)[c] + loc("n", 2)[a], scale("s")), obs=x)


def nested(x):
    with pyro.plate("group", len(x), dim=-2):
        a = pyro.sample("a", dist.Categorical(simplex("p", 2)))
        with pyro.plate("item", 2, dim=-1):
            b = pyro.sample("b", dist.Categorical(simplex("q", 2, 2)[a]))
            pyro.sample("x", dist.Normal(loc("m", 2, 2)[a, b], scale("s")), obs=x)


def siblings(x):
    k = pyro.sample("k", dist.Categorical(simplex("p", 2)))
    with pyro.plate("left", len(x)):
        i = pyro.sample("i", dist.Categorical(simplex("q", 2, 2)[k]))
        pyro.sample("x", dist.Normal(loc("m", 2)[i], scale("s")), obs=x)
    with pyro.plate("right", 2):
        pyro.sample("y", dist.Normal(loc("n", 2)[k], scale("t")), obs=x[:2])


def two_components(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(simplex("p", 2)))
        pyro.sample("x", dist.Normal(loc("m", 2)[a], scale("s")), obs=x)
        b = pyro.sample("b", dist.Bernoulli(simplex("q", 2)[1]))
        pyro.sample("y", dist.Normal(loc("n") * b, scale("t")), obs=x.cos())


def masked(x):
    mask = torch.tensor([True, False, True, True])
    with pyro.plate("data", len(x)), poutine.mask(mask=mask):
        k = pyro.sample("k", dist.Categorical(simplex("weights", 3)))
        pyro.sample("x", dist.Normal(loc("means", 3)[k], scale("s")), obs=x)


def scaled(x):
    with poutine.scale(scale=2.5):
        mixture(x)


def subsampled(x, index):
    with pyro.plate("data", len(x), subsample=index):
        k = pyro.sample("k", dist.Categorical(simplex("weights", 3)))
        pyro.sample("x", dist.Normal(loc("means", 3)[k], scale("s")), obs=x[index])


def one_hot(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.OneHotCategorical(simplex("weights", 3)))
        pyro.sample("x", dist.Normal((k * loc("means", 3)).sum(-1), scale("s")), obs=x)


def with_factor(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(simplex("weights", 2)))
        pyro.factor("f", -0.5 * k * loc("a"))
        pyro.sample("x", dist.Normal(loc("means", 2)[k], scale("s")), obs=x)


def one_value(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(1, dtype=torch.float64)))
        pyro.sample("x", dist.Normal(loc("means", 1)[k], scale("s")), obs=x)


def lda(words):
    """Topics of words; the topics of a document are integrated by a draw (``lda_guide``)."""
    topics = simplex("topics", 2, 4)
    with pyro.plate("documents", 2, dim=-1):
        theta = pyro.sample("theta", dist.Dirichlet(torch.tensor([0.7, 1.3], dtype=torch.float64)))
        with pyro.plate("words", 3, dim=-2):
            z = pyro.sample("z", dist.Categorical(theta))
            pyro.sample("w", dist.Categorical(topics[z]), obs=words)


def lda_guide(words):
    concentration = pyro.param("alpha", lambda: torch.tensor([[1.5, 0.8], [0.9, 2.0]], dtype=torch.float64))
    with pyro.plate("documents", 2, dim=-1):
        pyro.sample("theta", dist.Dirichlet(concentration))


def toy_mixture(x):
    """Pyro's toy_mixture_model_discrete_enumeration: two assignments of two rows over nested supports."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(simplex("p", 2)[0]))
        m = pyro.sample("m", dist.Bernoulli(values(k.long(), simplex("q", 2)[0], simplex("r", 2)[1])))
        pyro.sample("x", dist.Bernoulli(0.2 + 0.6 * m), obs=(x > 0).double())


def mixture_vae(x):
    """A latent whose prior is a mixture: k is summed out for each draw of z."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(simplex("weights", 3)))
        z = pyro.sample("z", dist.Normal(loc("means", 3)[k].unsqueeze(-1).expand((*k.shape, 2)), 0.8).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1) * loc("slope"), scale("s")), obs=x)


def mixture_vae_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc("w", 2) * x.unsqueeze(-1), scale("q_scale", 2)).to_event(1))


def dp_mixture(x):
    """A Dirichlet process cut at three sticks."""
    with pyro.plate("sticks", 2):
        v = pyro.sample("v", dist.Beta(torch.ones(2, dtype=torch.float64), 1.5))
    with pyro.plate("components", 3):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3, dtype=torch.float64), 2.0))
    v = torch.cat([v, v.new_ones((*v.shape[:-1], 1))], -1)
    rest = torch.cat([v.new_ones((*v.shape[:-1], 1)), (1 - v[..., :-1]).cumprod(-1)], -1)
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical((v * rest).unsqueeze(-2) if v.dim() > 1 else v * rest))
        pyro.sample("x", dist.Normal(Vindex(mu)[..., k], scale("s")), obs=x)


def dp_guide(x):
    with pyro.plate("sticks", 2):
        pyro.sample("v", dist.Beta(scale("a", 2) + 1, scale("b", 2) + 1))
    with pyro.plate("components", 3):
        pyro.sample("mu", dist.Normal(loc("mu_loc", 3), scale("mu_scale", 3)))


def recapture(x):
    """Capture-recapture (Cormack-Jolly-Seber): alive or not, over time; seen only alive."""
    seen = (X2.T > 0).double()  # times × animals
    with pyro.plate("animals", 3):
        alive = torch.ones(3, dtype=torch.float64)
        first = torch.zeros(3, dtype=torch.bool)
        for t in pyro.markov(range(2)):
            with poutine.mask(mask=first):
                alive = pyro.sample(f"z_{t}", dist.Bernoulli(alive * simplex("survive", 2)[0]))
                pyro.sample(f"y_{t}", dist.Bernoulli(alive * simplex("recapture", 2)[1]), obs=seen[t])
            first = first | seen[t].bool()


def hmm1(x):
    """A hidden Markov model, sequences of different length masked (models 1 of Pyro's examples)."""
    with pyro.plate("sequences", 2):
        z = torch.tensor(0)
        for t in pyro.markov(range(3)):
            with poutine.mask(mask=t < LENGTHS):
                z = pyro.sample(f"z_{t}", dist.Categorical(simplex("step", 2, 2)[z]))
                pyro.sample(f"x_{t}", dist.Normal(loc("m", 2)[z], scale("s")), obs=x[t, :2])


def hmm2(x):
    """Emissions depend on the last emission too (model 2)."""
    with pyro.plate("sequences", 2):
        z, last = torch.tensor(0), torch.zeros(2, dtype=torch.long)
        for t in pyro.markov(range(3)):
            z = pyro.sample(f"z_{t}", dist.Categorical(simplex("step", 2, 2)[z]))
            seen = (x[t, :2] > 0).long()
            pyro.sample(f"y_{t}", dist.Categorical(Vindex(simplex("emit", 2, 2, 2))[z, last]), obs=seen)
            last = seen


def hmm3(x):
    """Two chains that do not meet but in the emission (model 3, factorial)."""
    with pyro.plate("sequences", 2):
        a, b = torch.tensor(0), torch.tensor(0)
        for t in pyro.markov(range(2)):
            a = pyro.sample(f"a_{t}", dist.Categorical(simplex("step_a", 2, 2)[a]))
            b = pyro.sample(f"b_{t}", dist.Categorical(simplex("step_b", 2, 2)[b]))
            pyro.sample(f"x_{t}", dist.Normal(Vindex(loc("m", 2, 2))[a, b], scale("s")), obs=x[t, :2])


def hmm4(x):
    """One chain drives the other (model 4)."""
    with pyro.plate("sequences", 2):
        a, b = torch.tensor(0), torch.tensor(0)
        for t in pyro.markov(range(2)):
            a = pyro.sample(f"a_{t}", dist.Categorical(simplex("step_a", 2, 2)[a]))
            b = pyro.sample(f"b_{t}", dist.Categorical(Vindex(simplex("step_b", 2, 2, 2))[a, b]))
            pyro.sample(f"x_{t}", dist.Normal(Vindex(loc("m", 2, 2))[a, b], scale("s")), obs=x[t, :2])


def mixed_hmm(x):
    """Groups and individuals with discrete effects on the steps of a chain (the mixed HMM of the examples)."""
    with pyro.plate("group", 2, dim=-1):
        g = pyro.sample("g", dist.Categorical(simplex("groups", 2)))
        with pyro.plate("individual", 1, dim=-2):
            i = pyro.sample("i", dist.Categorical(simplex("individuals", 2)))
            z = torch.tensor(0)
            for t in pyro.markov(range(2)):
                probs = Vindex(simplex("step", 2, 2, 2, 2))[g, i, z]
                z = pyro.sample(f"z_{t}", dist.Categorical(probs))
                pyro.sample(f"x_{t}", dist.Normal(loc("m", 2)[z], scale("s")), obs=x[t : t + 1, :2])


def second_order(x):
    """A chain with memory of two steps."""
    y, z = torch.tensor(0), torch.tensor(0)
    for t in pyro.markov(range(4), history=2):
        y, z = z, pyro.sample(f"z_{t}", dist.Categorical(Vindex(simplex("step", 2, 2, 2))[y, z]))
        pyro.sample(f"x_{t}", dist.Normal(loc("m", 2)[z], scale("s")), obs=x[t])


def ssvae(x):
    """Semi-supervised: the class is summed out, the style given the class drawn in the guide."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.OneHotCategorical(simplex("classes", 3)))
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("x", dist.Normal((y * loc("m", 3)).sum(-1) + z, scale("s")), obs=x)


def ssvae_guide(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.OneHotCategorical(simplex("q", 4, 3)))
        pyro.sample("z", dist.Normal((y * loc("q_m", 3)).sum(-1), scale("q_s")))


def mixture_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Categorical(simplex("q", 3, 3)))


def chain_guide(x):
    """Enumerates a and b; c is summed out given them."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(simplex("qa", 2, 2)))
        pyro.sample("b", dist.Categorical(Vindex(simplex("qb", 2, 2, 3))[torch.arange(2), a]))


def nested_guide(x):
    with pyro.plate("group", len(x), dim=-2):
        a = pyro.sample("a", dist.Categorical(simplex("qa", 2, 1, 2)))
        with pyro.plate("item", 2, dim=-1):
            pyro.sample("b", dist.Categorical(simplex("qb", 2, 2)[a]))


def global_guide(x):
    """Enumerates k; j of each row is summed out given k."""
    pyro.sample("k", dist.Categorical(simplex("qk", 3)))


def coupled_draws(x):
    """The draws of z, without pathwise gradient, meet in the sum over k."""
    k = pyro.sample("k", dist.Categorical(simplex("p", 2)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc("m", 2)[k], 1.0))
        pyro.sample("x", dist.Normal(z, scale("s")), obs=x)


def coupled_guide(x, family=NonreparameterizedNormal):
    with pyro.plate("data", len(x)):
        pyro.sample("z", family(loc("q_m", 4), scale("q_s")))


def scored_guide(x, family=NonreparameterizedNormal):
    """Enumerates the class and draws the style for each without pathwise gradient."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.OneHotCategorical(simplex("q", 4, 3)))
        pyro.sample("z", family((y * loc("q_m", 3)).sum(-1), scale("q_s")))


def branching(x):
    """Other latents for each value of a switch, which is a plain number."""
    k = pyro.sample("k", dist.Categorical(simplex("p", 3)))
    with pyro.plate("data", len(x)):
        if k == 0:
            pyro.sample("x", dist.Normal(loc("a"), scale("s")), obs=x)
        elif k == 1:
            z = pyro.sample("z", dist.Normal(loc("m"), 1.0))
            pyro.sample("x", dist.Normal(z, scale("s")), obs=x)
        else:
            j = pyro.sample("j", dist.Bernoulli(simplex("q", 2)[0]))
            pyro.sample("x", dist.Laplace(loc("b") * j, scale("t")), obs=x)


def branching_guide(x):
    k = pyro.sample("k", dist.Categorical(simplex("qk", 3)))
    with pyro.plate("data", len(x)):
        if k == 1:
            pyro.sample("z", dist.Normal(0.5 * x, scale("q_s")))
        elif k == 2:
            pyro.sample("j", dist.Bernoulli(simplex("qj", 4, 2)[:, 0]))


def drawn_before(x):
    """A latent before the switch, which the branches share, and one after."""
    w = pyro.sample("w", dist.Normal(loc("w0"), 1.0))
    k = pyro.sample("k", dist.Bernoulli(simplex("p", 2)[0]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w * k, 1.0))
        pyro.sample("x", dist.Normal(z, scale("s")), obs=x)


def drawn_before_guide(x):
    w = pyro.sample("w", dist.Normal(loc("q_w"), scale("q_ws")))
    k = pyro.sample("k", dist.Bernoulli((loc("q_k") * w).sigmoid()))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x + loc("q_m") * k, scale("q_s")))


def in_turn_guide(x, **marks):
    """A chain in rows, of which ``marks`` say how each site is enumerated."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(simplex("qa", 2, 2)), infer={"enumerate": marks["a"]})
        probs = Vindex(simplex("qb", 2, 2, 3))[torch.arange(2), a]
        pyro.sample("b", dist.Categorical(probs), infer={"enumerate": marks["b"]})


def row(name, model, guide=nothing, **more):
    return Discrete(name, config_enumerate(model), guide, **more)


def both(name, model, guide, **more):
    return Discrete(name, config_enumerate(model), config_enumerate(guide), **more)


def in_turn(name, model, guide, **more):
    return Discrete(name, config_enumerate(model), config_enumerate(guide, default="sequential"), **more)


DISCRETE = [
    row("mixture", mixture, args=(X[:3],)),
    row("global switch", global_switch),
    row("global and local", global_and_local, args=(X[:3],)),
    row("explaining away", explaining_away, args=(X[:2],)),
    row("chain in rows", chain_in_rows, args=(X[:2],)),
    row("nested", nested, args=(X2[:2],), nesting=2),
    row("siblings", siblings, args=(X[:3],)),
    row("two components", two_components, args=(X[:2],)),
    row("masked", masked),
    row("scaled", scaled, factor=2.5),
    row("subsampled", subsampled, args=(X, torch.tensor([3, 1])), factor=2.0),
    row("one-hot", one_hot),
    row("factor", with_factor),
    row("one value", one_value),
    row("LDA", lda, lda_guide, args=(WORDS,), nesting=2),
    row("toy mixture", toy_mixture, args=(X[:2],)),
    row("mixture VAE", mixture_vae, mixture_vae_guide),
    row("Dirichlet process", dp_mixture, dp_guide, vectorizes=False),
    row("capture-recapture", recapture, pyro_runs=False),
    row("HMM 1", hmm1, args=(X2,)),
    row("HMM 2", hmm2, args=(X2,)),
    row("HMM 3", hmm3, args=(X2,)),
    row("HMM 4", hmm4, args=(X2,)),
    row("mixed HMM", mixed_hmm, args=(X2,), nesting=2),
    row("second order", second_order),
    row("coupled draws", coupled_draws, coupled_guide, pyro_runs=False),
    both("guide: mixture", mixture, mixture_guide, args=(X[:3],)),
    both("guide: SS-VAE", ssvae, ssvae_guide, looped=False),
    both("guide: nested", nested, nested_guide, args=(X2[:2],), nesting=2),
    both("guide and model: chain", chain_in_rows, chain_guide, args=(X[:2],)),
    both("guide and model: global and local", global_and_local, global_guide, args=(X[:3],)),
    both("guide: scored", ssvae, scored_guide, looped=False, pyro_runs=False),
    in_turn("in turn: mixture", mixture, mixture_guide, args=(X[:3],)),
    in_turn("in turn: SS-VAE", ssvae, ssvae_guide, looped=False),
    in_turn("in turn: nested", nested, nested_guide, args=(X2[:2],), nesting=2),
    in_turn("in turn: global, local summed out", global_and_local, global_guide, args=(X[:3],)),
    in_turn("in turn: branching", branching, branching_guide, looped=False),
    in_turn("in turn: drawn before", drawn_before, drawn_before_guide, looped=False),
    in_turn("in turn: scored", ssvae, scored_guide, looped=False, pyro_runs=False),
    row("in turn, then beside", chain_in_rows, partial(in_turn_guide, a="sequential", b="parallel"), args=(X[:2],)),
    row("beside, then in turn", chain_in_rows, partial(in_turn_guide, a="parallel", b="sequential"), args=(X[:2],)),
]


# --- the oracle -----------------------------------------------------------------------------------------------


def marked(trace):
    """The sites of a trace that are marked for enumeration."""
    sites = {n: m for n, m in trace.nodes.items() if m["type"] == "sample" and not m["is_observed"]}
    return {n: m for n, m in sites.items() if m["infer"].get("enumerate")}


def assignments(program, args, given):
    """All joint values of the marked sites of a program that ``given`` does not fix, every row on its own."""
    trace = poutine.trace(poutine.condition(program, data=given)).get_trace(*args)
    sites = marked(trace)
    supports = {}
    for name, m in sites.items():
        fn = m["fn"]
        support = fn.enumerate_support(expand=False).flatten(0, len(fn.batch_shape))
        rows = m["value"].shape[: m["value"].dim() - fn.event_dim]
        supports[name] = [
            torch.stack(choice).reshape(rows + fn.event_shape) if rows else choice[0]
            for choice in itertools.product(support, repeat=rows.numel())
        ]
    for choice in itertools.product(*supports.values()):
        yield dict(zip(supports, choice, strict=True))


def log_density(program, args, values, summed=(), temperature=1.0):
    """The log density of one assignment, unscaled; the mask of a summed site does not touch its prior."""
    trace = poutine.trace(poutine.condition(program, data=values)).get_trace(*args)
    total = torch.zeros((), dtype=torch.float64)
    for name, m in trace.nodes.items():
        if m["type"] == "sample" and type(m["fn"]).__name__ != "_Subsample":
            log_p = m["fn"].log_prob(m["value"])
            if name not in summed and m["mask"] is not None:
                log_p = torch.where(m["mask"], log_p, torch.zeros_like(log_p))
            total = total + log_p.sum() / (1.0 if name in values else temperature)
    return total


def brute_force(program, drawn, temperature=1.0):
    """The weighted bound by loops over all assignments, for the draws of the guide's unmarked sites.

    log p(k) + log p(z | k) + log p(x | z, k) / β, summed over k, times β, less β log q(z); averaged under a guide that
    enumerates instead of drawing.
    """
    args, total = program.args, torch.zeros((), dtype=torch.float64)
    for guided in assignments(program.guide, args, drawn):
        log_q = log_density(program.guide, args, drawn | guided, guided)
        parts = [
            log_density(program.model, args, drawn | guided | k, {**k, **guided}, temperature)
            for k in assignments(program.model, args, drawn | guided)
        ]
        weight = log_q.exp() if guided else 1.0
        total = total + weight * temperature * (torch.stack(parts).logsumexp(0) - log_q)
    return total * program.factor
