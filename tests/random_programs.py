"""Random Pyro programs, and a naive evaluation of each in plain torch.

A :class:`Program` is a description: plates, latents, observations and factors. :meth:`Program.model` and
:meth:`Program.guide` run it in Pyro; :meth:`Program.naive` computes the same densities from ``torch.distributions``
alone, drawing in the same order. The bound is then Σ scale · mask · (log p - log q), site by site.
"""

import contextlib
import dataclasses
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

WIDTH = 3  # elements of an event, and categories

# A family is built from a namespace (Pyro's distributions or torch's), a location on the real line and a positive
# number; the location of the families below has one more dimension, for the event or the categories.
WIDE = {"VectorNormal", "MultivariateNormal", "Dirichlet", "Categorical", "OneHotCategorical"}
FAMILIES = {
    "Normal": lambda d, m, s: d.Normal(m, s),
    "Laplace": lambda d, m, s: d.Laplace(m, s),
    "StudentT": lambda d, m, s: d.StudentT(torch.full_like(m, 4.0), m, s),
    "Cauchy": lambda d, m, s: d.Cauchy(m, s),
    "Gumbel": lambda d, m, s: d.Gumbel(m, s),
    "LogNormal": lambda d, m, s: d.LogNormal(0.5 * m, s),
    "Gamma": lambda d, m, s: d.Gamma(s + 0.5, (0.3 * m).exp()),
    "Exponential": lambda d, m, s: d.Exponential((0.3 * m).exp()),
    "HalfNormal": lambda d, m, s: d.HalfNormal(s * (0.2 * m).exp()),
    "Weibull": lambda d, m, s: d.Weibull((0.3 * m).exp(), s + 0.7),
    "Beta": lambda d, m, s: d.Beta((0.3 * m).exp() + 0.5, s + 0.5),
    "Uniform": lambda d, m, s: d.Uniform(torch.zeros_like(m), torch.ones_like(m)),
    "Bernoulli": lambda d, m, s: d.Bernoulli(logits=m),
    "Poisson": lambda d, m, s: d.Poisson((0.3 * m).exp()),
    "NegativeBinomial": lambda d, m, s: d.NegativeBinomial(torch.full_like(m, 3.0), logits=0.5 * m - 1),
    "Geometric": lambda d, m, s: d.Geometric(logits=0.5 * m),
    "Binomial": lambda d, m, s: d.Binomial(5, logits=m),
    "VectorNormal": lambda d, m, s: (
        d.Normal(m, s).to_event(1) if d is pyro.distributions else d.Independent(d.Normal(m, s), 1)
    ),
    "MultivariateNormal": lambda d, m, s: d.MultivariateNormal(
        m, scale_tril=torch.diag_embed(s) + 0.2 * torch.ones(WIDTH, WIDTH, dtype=m.dtype).tril(-1)
    ),
    "Dirichlet": lambda d, m, s: d.Dirichlet((0.3 * m).exp() + 0.5),
    "Categorical": lambda d, m, s: d.Categorical(logits=m),
    "OneHotCategorical": lambda d, m, s: d.OneHotCategorical(logits=m),
}
# Priors and guides that share a support.
SUPPORTS = {
    "real": (["Normal", "Laplace", "StudentT", "Cauchy", "Gumbel"], ["Normal", "Laplace", "StudentT"]),
    "positive": (["LogNormal", "Gamma", "Exponential", "HalfNormal", "Weibull"], ["LogNormal", "Gamma", "Weibull"]),
    "unit": (["Beta", "Uniform"], ["Beta"]),
    "vector": (["VectorNormal", "MultivariateNormal"], ["VectorNormal", "MultivariateNormal"]),
    "simplex": (["Dirichlet"], ["Dirichlet"]),
    "boolean": (["Bernoulli"], ["Bernoulli"]),
    "count": (["Poisson", "NegativeBinomial", "Geometric"], ["Poisson"]),
    "category": (["Categorical"], ["Categorical"]),
    "one hot": (["OneHotCategorical"], ["OneHotCategorical"]),
}
CONTINUOUS = ("real", "positive", "unit", "vector", "simplex")
OBSERVABLE = [name for name in FAMILIES if name not in ("Uniform", "Cauchy")]
# Functions of an auxiliary Normal: the value, log |dz/du|, and u given z.
TRANSFORMS = {
    "real": (torch.sinh, lambda u: u.cosh().log(), torch.asinh),
    "positive": (torch.exp, lambda u: u, torch.log),
}


@dataclass(frozen=True)
class PlateSpec:
    """A plate: of full size, or a subsample that is given or drawn.

    Attributes:
        rows: the rows taken, if given.
        count: the number of rows in a run.
        sized: whether Pyro is told the size.
    """

    name: str
    dim: int
    size: int
    count: int
    rows: tuple[int, ...] | None = None
    sized: bool = True

    @property
    def is_random(self) -> bool:
        return self.rows is None and self.count < self.size

    def enter(self) -> Any:
        if not self.sized:
            return pyro.plate(self.name, dim=self.dim)
        if self.rows is not None:
            return pyro.plate(self.name, self.size, subsample=torch.tensor(self.rows), dim=self.dim)
        return pyro.plate(self.name, self.size, subsample_size=self.count, dim=self.dim)


@dataclass(frozen=True)
class SiteSpec:
    """One site.

    Attributes:
        plates: names, outermost first.
        parents, guide_parents: latents that shift its location, in the model and in the guide.
        family, guide: names of FAMILIES; ``guide`` is None for an observed site.
        support: the key of SUPPORTS, of a latent.
        mask, guide_mask: rows that count, shaped like the plates' full sizes.
        by: the way a mask is set, "poutine" or "dist".
        scale: a factor of its log densities, in both programs.
        auxiliary: the guide's value is a function of an auxiliary site.
        data: the observed value, for full plates.
        obs_mask: rows that are observed.
    """

    name: str
    plates: tuple[str, ...]
    parents: tuple[str, ...]
    family: str
    guide: str | None = None
    guide_parents: tuple[str, ...] = ()
    support: str = ""
    mask: Tensor | None = None
    guide_mask: Tensor | None = None
    by: str = "poutine"
    scale: float = 1.0
    auxiliary: bool = False
    data: Tensor | None = None
    obs_mask: Tensor | None = None


@dataclass(frozen=True)
class NaiveTerm:
    """One log density of a naive run, unscaled and unmasked.

    Attributes:
        sign: 1 for the model's, -1 for the guide's.
        score: log q where the draw has no pathwise gradient.
    """

    site: str
    sign: int
    plates: tuple[str, ...]
    log_prob: Tensor
    mask: Tensor | None
    scale: float
    score: Tensor | None = None

    @property
    def masked(self) -> Tensor:
        return self.log_prob if self.mask is None else torch.where(self.mask, self.log_prob, 0.0)


@dataclass(frozen=True)
class Program:
    """A pair of programs without arguments."""

    seed: int
    plates: dict[str, PlateSpec]
    latents: list[SiteSpec]
    order: list[str]  # of the latents in the guide
    observed: list[SiteSpec]
    factors: list[SiteSpec]
    dtype: torch.dtype
    scale: float = 1.0  # around both programs
    start: dict[str, Tensor] = field(default_factory=dict)  # of the parameters

    # --- in Pyro ---------------------------------------------------------------------------------------------------

    def model(self) -> None:
        plates = self._open()
        values: dict[str, Tensor] = {}
        with poutine.scale(scale=self.scale) if self.scale != 1 else contextlib.nullcontext():
            for site in [*self.latents, *self.observed]:
                fn = self._build(pyro.distributions, site, "model", values, self._parameters(site, "model"), plates)
                with self._context(site, plates, site.mask):
                    fn = fn.mask(self._rows(site, site.mask, plates)) if self._by_dist(site, site.mask) else fn
                    if site.data is None:
                        values[site.name] = pyro.sample(site.name, fn)
                    elif site.obs_mask is None:
                        pyro.sample(site.name, fn, obs=self._rows(site, site.data, plates))
                    else:
                        seen = self._rows(site, site.obs_mask, plates)
                        pyro.sample(site.name, fn, obs=self._rows(site, site.data, plates), obs_mask=seen)
            for site in self.factors:
                with self._context(site, plates, site.mask):
                    pyro.factor(site.name, self._factor(site, values, plates))

    def guide(self) -> None:
        plates = self._open()
        values: dict[str, Tensor] = {}
        with poutine.scale(scale=self.scale) if self.scale != 1 else contextlib.nullcontext():
            for site in self.guided():
                fn = self._build(pyro.distributions, site, "guide", values, self._parameters(site, "guide"), plates)
                with self._context(site, plates, site.guide_mask):
                    if site.auxiliary:
                        u = pyro.sample(f"{site.name}_aux", fn, infer={"is_auxiliary": True})
                        z, slope, _ = TRANSFORMS[site.support]
                        fn = pyro.distributions.Delta(z(u), log_density=-slope(u))
                    elif self._by_dist(site, site.guide_mask):
                        fn = fn.mask(self._rows(site, site.guide_mask, plates))
                    values[site.name] = pyro.sample(site.name, fn)

    def _open(self) -> dict[str, Any]:
        return {name: p.enter() for name, p in self.plates.items()}

    def _parameters(self, site: SiteSpec, side: str) -> dict[str, Tensor]:
        prefix = f"{site.name}.{side}."
        names = [n for n in self.start if n.startswith(prefix)]
        return {n.removeprefix(prefix): pyro.param(n, lambda n=n: self.start[n].clone()) for n in names}

    @contextlib.contextmanager
    def _context(self, site: SiteSpec, plates: Mapping[str, Any], mask: Tensor | None) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in site.plates:
                stack.enter_context(plates[name])
            if site.scale != 1:
                stack.enter_context(poutine.scale(scale=site.scale))
            if mask is not None and not self._by_dist(site, mask):
                stack.enter_context(poutine.mask(mask=self._rows(site, mask, plates)))
            yield

    @staticmethod
    def _by_dist(site: SiteSpec, mask: Tensor | None) -> bool:
        return mask is not None and site.by == "dist"

    # --- shared by both evaluations --------------------------------------------------------------------------------

    def guided(self) -> list[SiteSpec]:
        """The sites of the guide in its order: the latents, and what obs_mask leaves unobserved."""
        latents = {s.name: s for s in self.latents}
        hidden = [
            dataclasses.replace(s, name=f"{s.name}_unobserved", guide="Normal", guide_mask=~s.obs_mask, by="poutine")
            for s in self.observed
            if s.obs_mask is not None
        ]
        return [latents[name] for name in self.order] + hidden

    def _indices(self, name: str, plates: Mapping[str, Any]) -> Tensor:
        """The rows of a plate, in a run: of Pyro (``plates`` are its plates) or of the naive one (they are indices)."""
        spec = self.plates[name]
        if not spec.sized or spec.count == spec.size:
            return torch.arange(spec.size)
        found = plates[name]
        return found if isinstance(found, Tensor) else found._indices

    def _rows(self, site: SiteSpec, full: Tensor, plates: Mapping[str, Any], event: int | None = None) -> Tensor:
        """Take the rows of a run from a tensor for full plates; the plates' dimensions come before the event's."""
        event = full.dim() - len(self.full_shape(site)) if event is None else event
        for name in site.plates:
            full = full.index_select(self.plates[name].dim - event, self._indices(name, plates))
        return full

    def full_shape(self, site: SiteSpec) -> list[int]:
        sizes = {self.plates[name].dim: self.plates[name].size for name in site.plates}
        return [sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0)]

    def _build(
        self,
        d: Any,
        site: SiteSpec,
        side: str,
        values: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        plates: Mapping[str, Any],
    ) -> Any:
        """The distribution of a site, its location shifted by its parents."""
        family = (site.guide if side == "guide" else site.family) or site.family
        wide = family in WIDE
        loc = parameters["loc"]
        raw = parameters["raw"]
        if side == "guide":
            loc, raw = (self._rows(site, x, plates, int(wide)) for x in (loc, raw))
        for parent in site.guide_parents if side == "guide" else site.parents:
            shift = parameters[f"by_{parent}"] * self._feature(site, parent, values[parent])
            loc = loc + (shift.unsqueeze(-1) if wide else shift)
        if any(not self.plates[n].sized for n in site.plates):  # nothing but the data then says how many rows there are
            loc = loc + loc.new_zeros([*self.full_shape(site), *([WIDTH] if wide else [])])
        return FAMILIES[family](d, loc, (0.5 + 0.3 * raw).exp() + torch.zeros_like(loc))

    def _feature(self, site: SiteSpec, parent: str, value: Tensor) -> Tensor:
        """A bounded function of a parent; plates of the parent that the site is not in are averaged over."""
        spec = next(s for s in self.latents if s.name == parent)
        x = value.to(self.dtype)
        if spec.support in ("vector", "simplex", "one hot"):
            x = (x * torch.arange(1.0, 1.0 + WIDTH, dtype=self.dtype)).sum(-1)
        x = torch.tanh(0.5 * x)
        for name in spec.plates:
            if name not in site.plates:
                x = x.mean(self.plates[name].dim, keepdim=True)
        return x

    def _factor(self, site: SiteSpec, values: Mapping[str, Tensor], plates: Mapping[str, Any]) -> Tensor:
        x = 0.3 * sum(self._feature(site, parent, values[parent]) for parent in site.parents)
        sizes = {self.plates[n].dim: len(self._indices(n, plates)) for n in site.plates}
        return x + torch.zeros([sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0)], dtype=self.dtype)

    def naive(
        self,
        parameters: Mapping[str, Tensor],
        values: Mapping[str, Tensor] | None = None,
        particles: int | None = None,
        rows: Mapping[str, Tensor] | None = None,
    ) -> "NaiveRun":
        """Draw the latents in the guide's order (or take ``values``) and return all log densities.

        Args:
            parameters: by name, as in Pyro's store.
            particles: of one more dimension on the left of all plates, if given.
            rows: of subsampled plates, otherwise as the plates say.
        """
        indices = {name: _take(p, rows or {}) for name, p in self.plates.items()}
        run = NaiveRun(self, parameters, indices, particles)
        for site in self.guided():
            run.draw(site, None if values is None else values[site.name])
        for site in [*self.latents, *self.observed]:
            run.weigh(site)
        for site in self.factors:
            run.add(site, 1, self._factor(site, run.values, indices), site.mask)
        return run

    def with_gaps(self, site: SiteSpec, x: Tensor) -> Tensor:
        """Put back the dimensions of size one between the plates of a value without them."""
        event = x.dim() - len(site.plates)
        sizes = dict(zip(sorted(self.plates[n].dim for n in site.plates), x.shape[: len(site.plates)], strict=True))
        return x.reshape(
            [sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0)] + list(x.shape[len(x.shape) - event :])
        )

    # --- what a test asks of a program -----------------------------------------------------------------------------

    @property
    def is_pathwise(self) -> bool:
        return all(s.support in CONTINUOUS for s in self.latents)

    @property
    def is_plain(self) -> bool:
        """Whether every row of the data is seen, and counts once."""
        scales = [self.scale, *(s.scale for s in [*self.latents, *self.observed])]
        return all(p.count == p.size for p in self.plates.values()) and set(scales) == {1.0}

    @property
    def common_scale(self) -> float:
        """The factor that every site has beside N/B; 1 where they differ."""
        found = {self.scale * s.scale for s in [*self.latents, *self.observed, *self.factors]}
        return found.pop() if len(found) == 1 else 1.0

    @property
    def nesting(self) -> int:
        return max((-p.dim for p in self.plates.values()), default=0)

    def leaves(self) -> dict[str, Tensor]:
        """New leaves at the parameters' start, for a naive run."""
        return {name: x.clone().requires_grad_() for name, x in self.start.items()}

    def __str__(self) -> str:
        lines = [f"seed {self.seed}, {self.dtype}, scale {self.scale}, guide order {self.order}"]
        lines += [f"  {p}" for p in self.plates.values()]
        for s in [*self.latents, *self.observed, *self.factors]:
            shown = {f.name: getattr(s, f.name) for f in dataclasses.fields(s)}
            lines.append("  " + ", ".join(f"{n}={v!r}" for n, v in shown.items() if v is not None and v != ""))
        return "\n".join(lines)


@dataclass
class NaiveRun:
    """One evaluation of a program in plain torch: the values of its latents and all its terms.

    Attributes:
        indices: the rows of each plate.
        particles: of one more dimension on the left of all plates, if given.
    """

    program: Program
    parameters: Mapping[str, Tensor]
    indices: dict[str, Tensor]
    particles: int | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    terms: list[NaiveTerm] = field(default_factory=list)

    def distribution(self, site: SiteSpec, side: str) -> Any:
        prefix = f"{site.name.removesuffix('_unobserved') if side == 'model' else site.name}.{side}."
        own = {n.removeprefix(prefix): x for n, x in self.parameters.items() if n.startswith(prefix)}
        fn = self.program._build(torch.distributions, site, side, self.values, own, self.indices)
        return fn.expand(self.batch(site))

    def batch(self, site: SiteSpec) -> list[int]:
        sizes = {self.program.plates[n].dim: len(self.indices[n]) for n in site.plates}
        depth = self.program.nesting if self.particles is not None else -min(sizes, default=0)
        lead = [] if self.particles is None else [self.particles]
        return lead + [sizes.get(dim, 1) for dim in range(-depth, 0)]

    def draw(self, site: SiteSpec, value: Tensor | None) -> None:
        """Draw a latent from the guide, unless its value is given."""
        fn = self.distribution(site, "guide")
        z, slope, inverse = TRANSFORMS[site.support] if site.auxiliary else (lambda u: u, None, lambda z: z)
        u = inverse(value) if value is not None else fn.rsample() if fn.has_rsample else fn.sample()
        self.values[site.name] = z(u)
        log_q = fn.log_prob(u)
        self.add(site, -1, log_q, site.guide_mask, None if fn.has_rsample else log_q)
        if slope is not None:
            self.add(site, -1, -slope(u), site.guide_mask)

    def weigh(self, site: SiteSpec) -> None:
        """Add the model's log density of a latent or an observation."""
        fn = self.distribution(site, "model")
        if site.data is None:
            self.add(site, 1, fn.log_prob(self.values[site.name]), site.mask)
            return
        log_p = fn.log_prob(self.program._rows(site, site.data, self.indices))
        self.add(site, 1, log_p, site.mask if site.obs_mask is None else site.obs_mask)
        if site.obs_mask is not None:
            hidden = dataclasses.replace(site, name=f"{site.name}_unobserved")
            self.add(hidden, 1, fn.log_prob(self.values[hidden.name]), ~site.obs_mask)

    def add(
        self, site: SiteSpec, sign: int, log_prob: Tensor, mask: Tensor | None, score: Tensor | None = None
    ) -> None:
        scale = self.program.scale * site.scale
        for name in site.plates:
            scale = scale * self.program.plates[name].size / len(self.indices[name])
        mask = None if mask is None else self.program._rows(site, mask, self.indices)
        shape = torch.Size(self.batch(site))
        score = None if score is None else score.expand(shape)
        self.terms.append(NaiveTerm(site.name, sign, site.plates, log_prob.expand(shape), mask, scale, score))

    def kl(self, site: SiteSpec) -> Tensor:
        """KL(q || p) of a latent given its parents, by torch, masked and unscaled."""
        kl = torch.distributions.kl_divergence(self.distribution(site, "guide"), self.distribution(site, "model"))
        if site.guide_mask is None:
            return kl
        return torch.where(self.program._rows(site, site.guide_mask, self.indices), kl, 0.0)


def _take(plate: PlateSpec, rows: Mapping[str, Tensor]) -> Tensor:
    """The rows of a plate: from ``rows``, drawn, or as the plate says."""
    if plate.name in rows:
        return rows[plate.name]
    if plate.is_random:
        return torch.randperm(plate.size)[: plate.count]
    return torch.arange(plate.size) if plate.rows is None else torch.tensor(plate.rows)


def bound(run: NaiveRun) -> Tensor:
    """Σ scale · mask · (log p - log q)."""
    return sum((t.sign * t.scale * t.masked.sum() for t in run.terms), torch.zeros(()))


def surrogate(program: Program, run: NaiveRun) -> Tensor:
    """A number with the gradient of the bound's estimator: pathwise, and log q times its reward where there is no path.

    The reward of a row is the sum of all terms of that row, and of those that belong to no row. The gradient of log q
    itself has mean zero there and is left out, as in Pyro.
    """
    total = bound(run) + sum(t.scale * (t.masked - t.masked.detach()).sum() for t in run.terms if t.score is not None)
    for site in run.terms:
        if site.score is None:
            continue
        dims = {program.plates[n].dim: n for n in site.plates}
        reward = torch.zeros(())
        for term in run.terms:
            x = (term.sign * term.scale * term.masked).detach()
            theirs = {program.plates[n].dim: n for n in term.plates}
            gone = [dim for dim, name in theirs.items() if dims.get(dim) != name]
            reward = reward + (x.sum(gone, keepdim=True) if gone else x)
        total = total + (site.score * reward).sum() - (site.score.detach() * reward).sum()
    return total


def shared_plates(run: NaiveRun) -> set[str]:
    return set.intersection(*({*t.plates} for t in run.terms))


def rows_of(program: Program, run: NaiveRun, particle_dim: int | None = None) -> Tensor:
    """The log weight of each row of the plates that all terms share, unscaled."""
    keep = {program.plates[n].dim for n in shared_plates(run)} | ({particle_dim} if particle_dim is not None else set())
    total = torch.zeros(())
    for t in run.terms:
        gone = [d for d in range(-t.log_prob.dim(), 0) if d not in keep]
        x = t.sign * t.masked
        total = total + (x.sum(gone, keepdim=True) if gone else x)
    return total


# --- the generator -------------------------------------------------------------------------------------------------


def _plates(rng: random.Random) -> dict[str, PlateSpec]:
    layout = rng.choice(["none", "one", "one", "outer", "nested", "nested", "siblings", "nested and sibling"])
    dims = {
        "none": {},
        "one": {"rows": -1},
        "outer": {"rows": -2},
        "nested": {"groups": -2, "rows": -1},
        "siblings": {"rows": -1, "others": -1},
        "nested and sibling": {"groups": -2, "rows": -1, "others": -1},
    }[layout]
    plates = {}
    for name, dim in dims.items():
        size = rng.choice([2, 3, 4])
        kind = rng.choice(["full", "full", "given", "random", "unsized"])
        if kind == "unsized" and len(dims) > 1:
            kind = "full"
        count = size - 1 if kind in ("given", "random") else size
        rows = tuple(rng.sample(range(size), count)) if kind == "given" else None
        plates[name] = PlateSpec(name, dim, size, count, rows, kind != "unsized")
    return plates


def _stacks(plates: Mapping[str, PlateSpec]) -> list[tuple[str, ...]]:
    """The sets of plates that a site may lie in."""
    stacks: list[tuple[str, ...]] = [()]
    stacks += [(name,) for name in plates]
    stacks += [("groups", name) for name in ("rows", "others") if name in plates and "groups" in plates]
    return stacks


def _mask(rng: random.Random, shape: list[int]) -> Tensor:
    return torch.tensor([rng.random() < 0.7 for _ in range(torch.Size(shape).numel())]).reshape(shape)


def generate(seed: int) -> Program:
    """The program of a seed."""
    rng = random.Random(seed)
    plates = _plates(rng)
    stacks = _stacks(plates)
    dtype = torch.float32 if rng.random() < 0.1 else torch.float64
    blank = Program(seed, plates, [], [], [], [], dtype)
    latents: list[SiteSpec] = []

    def full_shape(stack: tuple[str, ...]) -> list[int]:
        return blank.full_shape(SiteSpec("", stack, (), ""))

    def masks(stack: tuple[str, ...], kinds: list[str]) -> dict[str, Any]:
        kind = rng.choice(kinds)
        if kind == "none" or not stack:
            return {}
        mask = _mask(rng, full_shape(stack))
        found: dict[str, Any] = {"by": rng.choice(["poutine", "dist"])}
        if kind in ("both", "model"):
            found["mask"] = mask
        if kind in ("both", "guide"):
            found["guide_mask"] = mask
        return found

    for i in range(rng.choice([1, 2, 2, 3])):
        support = rng.choice([*CONTINUOUS, *CONTINUOUS, *SUPPORTS])
        priors, guides = SUPPORTS[support]
        stack = rng.choice(stacks)
        earlier = _fitting(latents, stack, plates)
        auxiliary = support in TRANSFORMS and rng.random() < 0.15
        latents.append(
            SiteSpec(
                f"z{i}",
                stack,
                tuple(rng.sample(earlier, rng.randint(0, len(earlier)))),
                rng.choice(priors),
                "Normal" if auxiliary else rng.choice(guides),
                support=support,
                auxiliary=auxiliary,
                scale=rng.choice([1.0, 1.0, 1.0, 1.0, 2.0]),
                **masks(stack, ["none"] * 7 + ["both", "both", "model", "guide"]),
            )
        )
    order = [s.name for s in latents]
    if rng.random() < 0.5:
        rng.shuffle(order)
    for i, site in enumerate(latents):
        earlier = [s for s in latents if order.index(s.name) < order.index(site.name)]
        before = _fitting(earlier, site.plates, plates)
        by = "poutine" if site.auxiliary else site.by
        latents[i] = dataclasses.replace(
            site, guide_parents=tuple(rng.sample(before, rng.randint(0, len(before)))), by=by
        )
    observed = _observations(rng, blank, latents, stacks, full_shape, masks)
    factors = []
    if rng.random() < 0.25:
        parent = rng.choice(latents)
        factors.append(SiteSpec("f", parent.plates, (parent.name,), "", **masks(parent.plates, ["none", "model"])))
        factors[-1] = dataclasses.replace(factors[-1], by="poutine")
    scale = rng.choice([1.0] * 6 + [3.0])
    program = Program(seed, plates, latents, order, observed, factors, dtype, scale)
    program.start.update(_start(rng, program))
    return program


def _fitting(latents: list[SiteSpec], stack: tuple[str, ...], plates: Mapping[str, PlateSpec]) -> list[str]:
    """The latents whose value, averaged over other plates, has no more dimensions than a site in these plates."""

    def depth(names: tuple[str, ...]) -> int:
        return max((-plates[n].dim for n in names), default=0)

    return [s.name for s in latents if depth(s.plates) <= depth(stack)]


def _observations(
    rng: random.Random, blank: Program, latents: list[SiteSpec], stacks: Any, full_shape: Any, masks: Any
) -> list[SiteSpec]:
    observed = []
    for i in range(rng.choice([1, 1, 2])):
        stack = rng.choice(stacks)
        imputed = bool(stack) and rng.random() < 0.1
        family = "Normal" if imputed else rng.choice(OBSERVABLE)
        parents = tuple(name for name in _fitting(latents, stack, blank.plates) if rng.random() < 0.8)
        obs_mask = None
        options: dict[str, Any] = {}
        if imputed:
            obs_mask = _mask(rng, full_shape(stack))
        else:
            options = masks(stack, ["none", "none", "model"])
        site = SiteSpec(f"x{i}", stack, parents, family, obs_mask=obs_mask, **options)
        shape = full_shape(stack)
        wide = [WIDTH] if family in WIDE else []
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        loc = torch.randn([*shape, *wide], generator=generator, dtype=torch.float64).to(blank.dtype)
        with torch.random.fork_rng():
            torch.manual_seed(rng.randrange(2**31))
            data = FAMILIES[family](torch.distributions, loc, torch.ones_like(loc)).sample()
        observed.append(dataclasses.replace(site, data=data, scale=rng.choice([1.0, 1.0, 1.0, 0.5])))
    return observed


def _start(rng: random.Random, program: Program) -> dict[str, Tensor]:
    """Starting values: of the guide for every row of full plates, of the model one for all rows."""

    def normal(shape: list[int]) -> Tensor:
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        return (0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(program.dtype)

    start = {}
    for site in [*program.latents, *program.observed]:
        wide = [WIDTH] if site.family in WIDE else []
        start[f"{site.name}.model.loc"] = normal(wide)
        start[f"{site.name}.model.raw"] = normal(wide)
        start |= {f"{site.name}.model.by_{parent}": normal([]) for parent in site.parents}
    for site in program.guided():
        shape = [*program.full_shape(site), *([WIDTH] if site.guide in WIDE else [])]
        start[f"{site.name}.guide.loc"] = normal(shape)
        start[f"{site.name}.guide.raw"] = normal(shape)
        start |= {f"{site.name}.guide.by_{parent}": normal([]) for parent in site.guide_parents}
    return start
