"""Random programs for pe.scan, and a naive oracle: the written-out loop, with log densities summed by hand.

A seed determines a model and guide of one step: their sites, families, plates, masks, scales and carries, and how the
scan runs them. The oracle shares with the library only Pyro's handlers and the log densities of distributions.
"""

import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

import pyro_elbo as pe
from tests.support.scanned import Numbered, number


def _softplus(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x) + 0.2


def _vector(m: Tensor, size: int) -> Tensor:
    return m.unsqueeze(-1) * (0.5 + 0.5 * torch.arange(size)) + 0.1


def _low_rank(m: Tensor) -> dist.LowRankMultivariateNormal:
    return dist.LowRankMultivariateNormal(_vector(m, 3), torch.eye(3)[:, :2] + 0.1, torch.ones(3))


def _mixture(m: Tensor) -> dist.MixtureSameFamily:
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(_vector(m, 2), 1.0))


def _correlated(m: Tensor) -> dist.MultivariateNormal:
    return dist.MultivariateNormal(_vector(m, 2), scale_tril=torch.tensor([[0.8, 0.0], [0.3, 0.7]]))


# Latents: families with the same support, as functions of a location; one for the model, one for the guide.
LATENTS: dict[str, tuple[Callable[[Tensor], Any], ...]] = {
    "real": (
        lambda m: dist.Normal(m, 0.8),
        lambda m: dist.StudentT(5.0, m, 1.0),
        lambda m: dist.Laplace(m, 0.7),
        lambda m: dist.Gumbel(m, 1.0),
        lambda m: dist.Normal(m, _softplus(m)),
    ),
    "normal": (lambda m: dist.Normal(m, 0.6), lambda m: dist.Normal(0.5 * m, _softplus(m))),
    "flow": (lambda m: dist.LogNormal(m, 0.5), lambda m: dist.LogNormal(0.5 * m, 0.6)),
    "vector": (
        lambda m: dist.Normal(_vector(m, 3), 0.8).to_event(1),
        lambda m: dist.LowRankMultivariateNormal(_vector(m, 3), torch.eye(3)[:, :2] + 0.1, torch.ones(3)),
        lambda m: dist.Laplace(_vector(m, 3), 1.0).to_event(1),
    ),
    "plane": (_correlated, lambda m: dist.Normal(_vector(m, 2), 0.8).to_event(1)),
    "positive": (
        lambda m: dist.LogNormal(m, 0.5),
        lambda m: dist.Gamma(_softplus(m), 1.5),
        lambda m: dist.Weibull(_softplus(m), 1.5),
        lambda m: dist.Exponential(_softplus(m)),
    ),
    "interval": (lambda m: dist.Beta(_softplus(m), 1.5), lambda m: dist.Kumaraswamy(_softplus(m), torch.tensor(1.5))),
    "uniform": (
        lambda m: dist.Uniform(torch.tensor(-4.0), torch.tensor(4.0)).expand(m.shape),
        lambda m: dist.Uniform(torch.sigmoid(m) - 2.0, torch.sigmoid(m) + 1.0),
    ),
    "simplex": (
        lambda m: dist.Dirichlet(_softplus(_vector(m, 3))),
        lambda m: dist.RelaxedOneHotCategorical(torch.tensor(0.8), logits=_vector(m, 3)),
    ),
    "binary": (lambda m: dist.Bernoulli(logits=m), lambda m: dist.Bernoulli(torch.sigmoid(m))),
    "category": (lambda m: dist.Categorical(logits=_vector(m, 3)),),
    "one hot": (
        lambda m: dist.OneHotCategorical(logits=_vector(m, 3)),
        lambda m: dist.OneHotCategorical(_vector(m, 3).softmax(-1)),
    ),
    "count": (lambda m: dist.Poisson(_softplus(m)), lambda m: dist.Geometric(torch.sigmoid(m))),
}
DISCRETE = ("binary", "category", "one hot", "count")
# Observations: a family and the data that it takes, from standard normal ones.
OBSERVED: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "normal": (lambda m: dist.Normal(m, 0.7), lambda x: x, ()),
    "vector": (lambda m: dist.Normal(_vector(m, 2), 0.7).to_event(1), lambda x: x, (2,)),
    "correlated": (_correlated, lambda x: x, (2,)),
    "low rank": (_low_rank, lambda x: x, (3,)),
    "mixture": (_mixture, lambda x: x, ()),
    "poisson": (lambda m: dist.Poisson(_softplus(m)), lambda x: x.abs().round(), ()),
    "bernoulli": (lambda m: dist.Bernoulli(logits=m), lambda x: (x > 0).double(), ()),
    "category": (lambda m: dist.Categorical(logits=_vector(m, 3)), lambda x: (x > 0).long(), ()),
    "gamma": (lambda m: dist.Gamma(_softplus(m), 1.0), lambda x: x.abs() + 0.1, ()),
    "gumbel": (lambda m: dist.Gumbel(m, 1.0), lambda x: x, ()),
    "student": (lambda m: dist.StudentT(4.0, m, 1.0), lambda x: x, ()),
    "uniform": (lambda m: dist.Uniform(m - 9.0, m + 9.0), lambda x: x.clamp(-2, 2), ()),
}


@dataclass(frozen=True)
class Latent:
    """A latent of a step: its support, the families of model and guide, and whether it lies in the inner plate."""

    name: str
    support: str
    families: tuple[int, int]
    inner: bool
    masked: bool
    scale: float


@dataclass(frozen=True)
class RandomScan:
    """A random model and guide for pe.scan; all choices are fixed.

    Attributes:
        batch: the number of sequences; None for one sequence without a plate.
        plate: where the plate of the sequences stands: ``outside`` or ``inside`` the scan.
        inner: the rows of a plate within the step, left of the sequences.
        hidden: the width of the carry's vector.
    """

    seed: int
    batch: int | None
    plate: str
    inner: int
    steps: int
    hidden: int
    lengths: Tensor | None
    reverse: bool
    dim: int
    latents: tuple[Latent, ...]
    observed: tuple[tuple[str, str, bool], ...]
    outer_mask: Tensor | None
    outer_scale: float
    extras: frozenset[str]
    xs: dict[str, Tensor]

    # --- programs

    def model(self, way: Callable[..., Any]) -> None:
        """Run the model by ``pe.scan`` or by the loop."""
        self._run(way, self._model_step)

    def guide(self, way: Callable[..., Any]) -> None:
        """Run the guide by ``pe.scan`` or by the loop."""
        self._run(way, self._guide_step)

    def _run(self, way: Callable[..., Any], step: Callable[..., Any]) -> None:
        outside = self.batch is not None and self.plate == "outside"
        with contextlib.ExitStack() as stack:
            if outside:
                stack.enter_context(pyro.plate("sequences", self.batch, dim=-1))
            if self.outer_mask is not None:
                stack.enter_context(poutine.mask(mask=self.outer_mask))
            stack.enter_context(poutine.scale(scale=self.outer_scale))
            way(step, self)

    def init(self) -> dict[str, Any]:
        """The initial carry: a scalar and a vector for each sequence, and a nest."""
        batch = () if self.batch is None else (self.batch,)
        return {"h": torch.zeros(*batch, self.hidden), "nest": (0.1 * torch.ones(batch), None)}

    def _advance(self, carry: dict[str, Any], total: Tensor, x: Tensor) -> dict[str, Any]:
        level = 0.5 * carry["nest"][0] + 0.1 * torch.tanh(total) + 0.1 * x
        h = torch.tanh(0.5 * carry["h"] + number("decay", 0.4) * level.unsqueeze(-1) * (1 + torch.arange(self.hidden)))
        return {"h": h, "nest": (level, None)}

    def _plates(self, stack: contextlib.ExitStack) -> None:
        if self.batch is not None and self.plate == "inside":
            stack.enter_context(pyro.plate("sequences", self.batch, dim=-1))

    def _draw(self, latent: Latent, m: Tensor, which: int, seen: Tensor) -> Tensor:
        """Draw a latent and return a number for each sequence."""
        family = LATENTS[latent.support][latent.families[which]]
        with contextlib.ExitStack() as stack:
            if latent.inner:
                stack.enter_context(pyro.plate(f"inner_{latent.name}", self.inner, dim=-2))
            if latent.masked:
                stack.enter_context(poutine.mask(mask=seen))
            stack.enter_context(poutine.scale(scale=latent.scale))
            z = pyro.sample(latent.name, family(m))
        z = z.double().sum(-1) if LATENTS[latent.support][0](torch.zeros(())).event_dim else z.double()
        return z.sum(-2) if latent.inner and z.dim() > 1 else z

    def _model_step(self, carry: dict[str, Any], x_t: dict[str, Tensor]) -> tuple[Any, Any]:
        with contextlib.ExitStack() as stack:
            self._plates(stack)
            m, total = carry["h"].sum(-1) + carry["nest"][0], torch.zeros(())
            for latent in self.latents:
                total = total + self._draw(latent, number("a") * m + 0.2 * torch.tanh(total), 0, x_t["seen"])
            mean = torch.tanh(total) + number("shift", 0.1)
            if "factor" in self.extras:
                pyro.factor("bonus", -0.1 * mean**2)
            if "deterministic" in self.extras:
                mean = pyro.deterministic("mean", mean)
            for name, family, is_masked in self.observed:
                with poutine.mask(mask=x_t["seen"] if is_masked else True):
                    pyro.sample(name, OBSERVED[family][0](mean), obs=x_t[name])
        return self._advance(carry, total, x_t["x"]), {"mean": mean, "none": None}

    def _guide_step(self, carry: dict[str, Any], x_t: dict[str, Tensor]) -> tuple[Any, Any]:
        with contextlib.ExitStack() as stack:
            self._plates(stack)
            m, total = carry["h"].sum(-1) + carry["nest"][0], torch.zeros(())
            if "auxiliary" in self.extras:
                pyro.sample("u", dist.Normal(number("b") * m, 1.0), infer={"is_auxiliary": True})
            for latent in self.latents:
                loc = number("b") * m + number("c", 0.2) * x_t["x"] + 0.1 * torch.tanh(total)
                total = total + self._draw(latent, loc, 1, x_t["seen"])
        return self._advance(carry, total, x_t["x"]), total if "out" in self.extras else None


def _is_flow(family: Callable[[Tensor], Any]) -> bool:
    fn = family(torch.zeros(()))
    return isinstance(fn, torch.distributions.TransformedDistribution) and not isinstance(fn, dist.LogNormal)


def draw_scan(seed: int, *, supports: Sequence[str] = (), stacked: bool = False) -> RandomScan:
    """Draw a program.

    Args:
        seed: determines the program.
        supports: only latents with these supports; by default any.
        stacked: only latents whose distribution can be stacked over time (not a flow).
    """
    choose = random.Random(seed)
    chance = lambda p: choose.random() < p  # noqa: E731
    batch = choose.choice([None, 2, 3, 3])
    steps, inner = choose.choice([1, 2, 3, 3, 4]), choose.choice([2, 3])
    widths = [w for w in (1, 2, 3) if not w == inner == batch]  # a carry of shape (3, 3) might begin with either plate
    ragged = batch is not None and chance(0.5)
    supports = supports or list(LATENTS)
    latents = []
    for i in range(choose.choice([1, 1, 2, 3])):
        support = choose.choice(supports)
        count = [i for i in range(len(LATENTS[support])) if not (stacked and _is_flow(LATENTS[support][i]))]
        families = (choose.choice(count), choose.choice(count))
        if support == "uniform":
            families = (0, 1)  # the guide within the prior
        if support == "count":
            families = (0, families[1])
        where = batch is not None and chance(0.3), chance(0.2)
        latents.append(Latent(f"z{i}", support, families, *where, choose.choice([1.0, 1.0, 2.5])))
    observed = tuple((f"x{i}", choose.choice(list(OBSERVED)), chance(0.3)) for i in range(choose.choice([1, 1, 2])))
    outer_mask = None
    if batch is not None and chance(0.2):
        outer_mask = torch.tensor([chance(0.6) for _ in range(batch)])
    shape = (steps,) if batch is None else (steps, batch)
    noise = torch.Generator().manual_seed(seed)
    xs = {"x": torch.randn(shape, generator=noise), "seen": torch.rand(shape, generator=noise) < 0.7}
    for name, family, _ in observed:
        _, make, event = OBSERVED[family]
        xs[name] = make(torch.randn(*shape, *event, generator=noise))
    lengths = torch.tensor([choose.randint(1, steps) for _ in range(batch)]) if batch is not None and ragged else None
    dim = choose.choice([0, 1]) if batch is not None else 0
    extras = frozenset(x for x in ("factor", "deterministic", "auxiliary", "out") if chance(0.3))
    return RandomScan(
        seed,
        batch,
        choose.choice(["outside", "outside", "inside"]),
        inner,
        steps,
        choose.choice(widths),
        lengths,
        chance(0.3),
        dim,
        tuple(latents),
        observed,
        outer_mask,
        choose.choice([1.0, 1.0, 3.0]),
        extras,
        xs,
    )


def by_scan(step: Callable[..., Any], program: RandomScan) -> Any:
    """Run a step by pe.scan."""
    xs = {name: x.movedim(0, program.dim) for name, x in program.xs.items()}
    return pe.scan(step, program.init(), xs, program.lengths, reverse=program.reverse, dim=program.dim)


def by_loop(step: Callable[..., Any], program: RandomScan) -> Any:
    """Run a step by the written-out loop: numbered sites, masks and frozen carries where sequences have ended."""
    carry, times = program.init(), range(program.steps)
    for t in reversed(times) if program.reverse else times:
        valid = None if program.lengths is None else t < program.lengths
        with Numbered(t), poutine.mask(mask=True if valid is None else valid):
            new, _ = step(carry, {name: _frame(x, t, program.lengths) for name, x in program.xs.items()})
        if valid is not None:
            level = torch.where(valid, new["nest"][0], carry["nest"][0])
            new = {"h": torch.where(valid.unsqueeze(-1), new["h"], carry["h"]), "nest": (level, None)}
        carry = new


def _frame(x: Tensor, t: int, lengths: Tensor | None) -> Tensor:
    """One step of the inputs, each sequence's last one where it has ended."""
    if lengths is None:
        return x[t]
    return torch.stack([x[min(t, int(n) - 1), i] for i, n in enumerate(lengths)])


@dataclass(frozen=True)
class Expected:
    """The oracle's values.

    Attributes:
        elbo: Σ scale · mask · (log p − log q), nats.
        surrogate: has the gradient of the ELBO's estimator: score functions weighted by the reward of their rows.
        log_p, log_q: sums over time of log densities by site, shaped like the plates.
    """

    elbo: Tensor
    surrogate: Tensor
    log_p: dict[str, Tensor]
    log_q: dict[str, Tensor]


def oracle(program: RandomScan, seed: int) -> Expected:
    """Sum over all sites and steps of the written-out loop."""
    pyro.set_rng_seed(seed)
    guide = poutine.trace(program.guide).get_trace(by_loop)
    model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(by_loop)
    terms: list[tuple[set[Any], Tensor]] = []
    sums: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for trace, sign, by_site in ((model, 1, sums[0]), (guide, -1, sums[1])):
        for name, node in _sample_nodes(trace):
            log_prob = _log_prob(node)
            site = name.rpartition("_")[0]
            by_site[site] = by_site.get(site, torch.zeros(())) + log_prob
            terms.append((_plates(node), sign * node["scale"] * log_prob))
    elbo = surrogate = torch.stack([x.sum() for _, x in terms]).sum()
    for name, node in _sample_nodes(guide):
        if not node["fn"].has_rsample:
            reward = sum(_sum_to(_plates(node), plates, x.detach()) for plates, x in terms)
            score = node["fn"].log_prob(node["value"])
            if program.lengths is not None:  # nothing depends on draws after the end
                score = torch.where(int(name.rpartition("_")[2]) < program.lengths, score, 0.0)
            own = node["scale"] * _log_prob(node)  # its gradient has mean zero
            surrogate = surrogate + (reward * score).sum() + own.sum()
    return Expected(elbo, surrogate, *sums)


def _sample_nodes(trace: poutine.Trace) -> list[tuple[str, dict[str, Any]]]:
    nodes = [(name, node) for name, node in trace.nodes.items() if node["type"] == "sample"]
    return [(name, node) for name, node in nodes if type(node["fn"]).__name__ != "_Subsample"]


def _log_prob(node: dict[str, Any]) -> Tensor:
    log_prob = node["fn"].log_prob(node["value"])
    return torch.where(node["mask"], log_prob, 0.0) if isinstance(node["mask"], Tensor) else log_prob


def _plates(node: dict[str, Any]) -> set[Any]:
    return set(node["cond_indep_stack"])


def _sum_to(kept: set[Any], plates: set[Any], x: Tensor) -> Tensor:
    """Sum a term over its plates that a site does not have."""
    gone = [frame.dim for frame in plates - kept]
    return x.sum(gone, keepdim=True) if gone else x
