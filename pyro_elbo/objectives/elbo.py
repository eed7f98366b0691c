r"""The ELBO as an objective: :class:`pyro.infer.ELBO` over terms, weighting, bound and penalties.

.. math:: \text{objective} = \text{bound}(\text{terms}, \text{weighted KL}) - \sum_k \lambda_k\, N\, I_k

An objective is maximized; Pyro minimizes a loss. The one minus sign of the library lives here.
"""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from pyro.infer import ELBO
from torch import Tensor

from pyro_elbo.assumptions import active_loop
from pyro_elbo.errors import ArgumentError, DataError, SiteError, check_choice, check_count, check_flag, did_you_mean
from pyro_elbo.information import Critic, Penalty, check_penalties, critic_gradients
from pyro_elbo.objectives import baselines
from pyro_elbo.objectives.gradients import BoundKind, Gradient, Runs, check_gradient
from pyro_elbo.objectives.module import TermsModule
from pyro_elbo.objectives.saved_state import read_state
from pyro_elbo.objectives.score_function import moved_averages, surrogate
from pyro_elbo.objectives.step_count import advance_after_backward
from pyro_elbo.objectives.weighting import Beta, KLWeighting, ScheduleValue
from pyro_elbo.programs import (
    Program,
    SameRows,
    TracePair,
    check_arguments,
    check_programs,
    collect_parameters,
    differentiate,
    each_branch,
    evaluating,
    find_plate_nesting,
    full_precision,
    program_arguments,
    trace_fixed,
    trace_pair,
)
from pyro_elbo.ranks import check_alone
from pyro_elbo.schedules import Schedule
from pyro_elbo.terms import KLForm, Term, Terms, WeightOf, evaluate_branches, map_particles, stack_particles

_nesting_found: "WeakKeyDictionary[TraceBeta_ELBO, tuple[Program, Program, int]]" = WeakKeyDictionary()
"""The batch dimensions that a trial run found, with its programs: of the last programs of each objective."""


class TraceBeta_ELBO(ELBO):  # noqa: N801  (Pyro's naming)
    r"""The evidence lower bound with a weight on the KL.

    .. math:: E_q[\log p(x \mid z)] - \sum_s \beta_s\, KL(q(z_s) \,\|\, p(z_s))

    Usable wherever Pyro takes an ELBO: ``pyro.infer.SVI``, the module form, Lightning.

    Args:
        beta: a number, a tensor that broadcasts against the plates, a schedule, or ``{site: any of these}``
            (sites that are not named have β = 1).
        kl: ``"auto"``: analytic where a formula exists and is exact, site by site; ``"sampled"``: always
            log q - log p at the draw.
        free_bits: λ, nats per latent dimension (per site where the KL does not factorize). A KL whose mean over the
            data is below λ is charged as λ, without a gradient.
        num_particles: draws per step, averaged.
        vectorize_particles: draw them in one run, inside a plate on the left of all others.
        max_plate_nesting: the number of batch dimensions that the plates use; found by a trial run if omitted.
        gradient: the estimator of the gradient. ``"auto"``: pathwise, by the score function for draws without a path.
            ``"stl"``: pathwise without the score of the guide, zero at the exact posterior. ``"rloo"``: rewards of
            score functions less those of the other particles. ``"vargrad"``: that for all draws, without any path.
            ``"stl"`` and ``"vargrad"`` take every KL at the draw.
        retain_graph: keep the autograd graph after ``loss_and_grads``.
        penalties: charges beside the KL, such as :class:`MutualInformation`; each needs a name of its own.

    Raises:
        ArgumentError: a weight is negative, NaN or infinite, or another argument is out of range.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> terms = TraceBeta_ELBO(beta=4.0, kl="sampled").terms(model, guide, torch.tensor(1.0))
        >>> round(terms.elbo.item(), 4)  # the guide is the posterior: log p(x), whatever the draw
        -1.5155

    References:
        Higgins et al. (2017), β-VAE: Learning basic visual concepts with a constrained variational framework,
        ICLR; Kingma, Welling (2014), arXiv:1312.6114.
    """

    def __init__(
        self,
        beta: Beta = 1.0,
        *,
        kl: KLForm = "auto",
        free_bits: float = 0.0,
        num_particles: int = 1,
        vectorize_particles: bool = False,
        max_plate_nesting: float = math.inf,
        retain_graph: bool | None = None,
        gradient: Gradient = "auto",
        penalties: Sequence[Penalty] = (),
        **unknown: Any,
    ) -> None:
        for name in unknown:
            raise ArgumentError(f"{type(self).__name__} has no option {name}=. {did_you_mean(name, self._defaults())}")
        check_choice("kl", kl, ("auto", "sampled"))
        check_count("num_particles", num_particles)
        check_flag("vectorize_particles", vectorize_particles)
        check_flag("retain_graph", retain_graph, optional=True)
        if not (isinstance(max_plate_nesting, float) and max_plate_nesting == math.inf):
            check_count("max_plate_nesting", max_plate_nesting, least=0)
        super().__init__(num_particles=num_particles, retain_graph=retain_graph)
        self.vectorize_particles = vectorize_particles
        self.max_plate_nesting = max_plate_nesting
        self.kl: KLForm = kl
        self.weighting = KLWeighting(beta, free_bits)
        self.gradient: Gradient = gradient
        self.estimator = check_gradient(gradient, self.bound_kind, num_particles, self.weighting.is_identity())
        if self.estimator.samples:
            self.kl = "sampled"
        self.averages: dict[str, Tensor] = {}
        self.penalties = check_penalties(penalties)
        self.critics: dict[str, Critic] = {}
        self.step = 0

    @property
    def bound_kind(self) -> BoundKind:
        """Which bound the objective maximizes: this decides on the estimators of its gradient."""
        return "elbo"

    def __call__(self, model: Any, guide: Any) -> "TermsModule":
        """Bind model and guide to a module whose forward is the loss (Pyro's ELBOModule, with terms)."""
        return TermsModule(model, guide, self)

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Terms:
        """Evaluate every term of the bound on one set of draws, with modules in evaluation mode.

        Returns:
            The terms in nats; ``objective`` uses the weights of the current step and carries the gradient of
            the estimator.

        Raises:
            ArgumentError: model or guide is no program, such as the class of a guide.
            DataError: the arguments do not fit those of the programs.
            SiteError: model and guide do not fit each other.
            NonFiniteError: data or a term hold NaN or infinity.
        """
        check_programs(model, guide)
        with evaluating(model, guide):
            return self.checked_terms(model, guide, *program_arguments(model, args, kwargs))

    def checked_terms(self, model: Program, guide: Program, args: tuple, kwargs: dict[str, Any]) -> Terms:
        """Evaluate the terms in the modes that modules have, as a training step does, and check them."""
        try:
            terms = self.evaluate(model, guide, args, kwargs, lambda schedule: schedule(self.step))
        except DataError:
            check_arguments("The objective", {"model": model, "guide": guide}, args, kwargs)
            raise
        if not torch.isfinite(terms.objective):
            baselines.check_finite(terms.sites)
            terms.check_finite()
        return terms

    def evaluate(
        self, model: Program, guide: Program, args: tuple, kwargs: dict[str, Any], value: ScheduleValue
    ) -> Terms:
        """Return :meth:`terms` for given values of the schedules, without checking any number."""
        terms = self._unpenalized(model, guide, args, kwargs, value)
        with full_precision():
            return self._penalize(terms, args, kwargs, value)

    def bound(
        self,
        sites: Mapping[str, Term],
        weighted: Mapping[str, Tensor],
        constant: float | Tensor,
        particle_dim: int | None,
    ) -> Float[Tensor, ""]:
        """Reduce the terms to the objective before penalties; a subclass overrides it to maximize another bound.

        Args:
            sites: the terms of the bound by site, unscaled and unreduced.
            weighted: the charge for each KL site (β KL, capacity, free bits), shaped like the term's nats.
            constant: nats subtracted once.
            particle_dim: the batch dimension of the particles, counted from the right; None for one particle.

        Returns:
            The bound in nats, to be maximized: scaled to the full data, with the gradient of the estimator (that of
            the score function included, for terms that have a ``score``).
        """
        return surrogate(sites, weighted, constant, particle_dim, self.estimator.compares, self.averages)

    def _unpenalized(
        self, model: Program, guide: Program, args: tuple, kwargs: dict[str, Any], value: ScheduleValue
    ) -> Terms:
        sites, charged, particle_dim = self._all_sites(model, guide, args, kwargs, value)
        with full_precision():
            weighted, constant = self.weighting(charged, particle_dim, value)
            bound = self.bound(charged, weighted, constant, particle_dim)
            averages = moved_averages(charged, weighted, particle_dim, self.averages)
            return Terms(sites, particle_dim, bound, averages=averages)

    def _penalize(self, terms: Terms, args: tuple, kwargs: dict[str, Any], value: ScheduleValue) -> Terms:
        found, objective = {}, terms.objective
        for penalty in self.penalties:
            weight = value(penalty.weight) if isinstance(penalty.weight, Schedule) else penalty.weight
            found[penalty.name] = penalty(terms, args, kwargs, weight, self.critics)
            if isinstance(weight, Tensor) or weight != 0:
                objective = objective - found[penalty.name].cost
        return replace(terms, objective=objective, penalties=found)

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return -objective as a number, without gradients; no step is counted."""
        with torch.no_grad():
            return -self.terms(model, guide, *args, **kwargs).objective.item()

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Float[Tensor, ""]:
        """Return -objective, differentiable; a backward followed by an optimizer's step counts as one step."""
        check_programs(model, guide)
        terms = self.checked_terms(model, guide, *program_arguments(model, args, kwargs))
        return self.count_step(-terms.objective, terms)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return -objective as a number, after a backward through it.

        Raises:
            NonFiniteError: the objective or a gradient is not finite.
            ArgumentError: this is one of several processes, whose steps would not average gradients.
        """
        check_alone()
        with collect_parameters() as parameters:
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            differentiate(loss, parameters, self.retain_graph)
        return loss.item()

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that make an objective like this one, by name."""
        names = ("num_particles", "vectorize_particles", "max_plate_nesting", "retain_graph", "gradient", "penalties")
        weights = {"beta": self.weighting.beta, "kl": self.kl, "free_bits": self.weighting.free_bits}
        return weights | {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        """The class with β, the form of the KL, and every other setting that is not the default."""
        defaults = self._defaults()
        shown = {n: x for n, x in self.settings.items() if n in ("beta", "kl") or x != defaults[n]}
        return f"{type(self).__name__}({', '.join(f'{n}={_brief(x)}' for n, x in shown.items())})"

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        """Return the options of the class and of those that it extends, with their defaults."""
        inits = [c.__init__ for c in reversed(cls.__mro__) if issubclass(c, TraceBeta_ELBO)]
        every = [p for init in inits for p in inspect.signature(init).parameters.values()]
        return {p.name: p.default for p in every if p.name != "self" and p.kind is not p.VAR_KEYWORD}

    @property
    def loss_units(self) -> str:
        """The units of the loss of training by epochs, where one of ``terms.per_datum`` is minimized."""
        return "nats per datum"

    @property
    def settled(self) -> int:
        """The step from which no schedule changes any more; 0 for constant weights."""
        return max([self.weighting.settled, *(schedule.settled for schedule in self.schedules)])

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The different schedules that the objective asks."""
        penalties = (p.weight for p in self.penalties if isinstance(p.weight, Schedule))
        return tuple(dict.fromkeys([*self.weighting.schedules, *penalties]))

    def beta_at(self, step: int, sites: Iterable[str]) -> dict[str, float]:
        """Return the β of each site at a step, averaged over data; for a ``Capacity`` its target in nats."""
        return self.weighting.at(step, sites)

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact continuation needs beside parameters and optimizer: step count, critics, averages."""
        averages = {"averages": dict(self.averages)} if self.averages else {}
        critics = {"critics": {n: critic.state() for n, critic in self.critics.items()}} if self.critics else {}
        return {"step": self.step} | critics | averages

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned; any other raises CheckpointError and changes nothing."""
        self.step, self.critics, self.averages = read_state(state)

    def advance(self) -> None:
        """Count one step of an optimizer and step the critics."""
        self.step += 1
        for critic in self.critics.values():
            critic.step()

    def _all_sites(
        self, model: Program, guide: Program, args: tuple, kwargs: dict[str, Any], value: ScheduleValue
    ) -> tuple[dict[str, Term], dict[str, Term], int | None]:
        """Return the terms, those that the weights charge, and the dimension of particles."""
        programs, loop = (model, guide, args, kwargs), active_loop()
        count = 1 if self.vectorize_particles else self.num_particles
        if count > 1 and loop is not None and loop.maps and not self.penalties:
            sites, dim = map_particles(loop.map, lambda: self._sites(self._runs(programs, 1))[0], count)
            return sites, sites, dim
        runs = self._runs(programs, count)
        sites, particle_dim = self._sites(runs)
        weights = self.weighting.of_summed_out(sites, value)
        charged = sites if weights is None else self._sites(runs, weights)[0]
        return sites, charged, particle_dim

    def _runs(self, programs: tuple[Program, Program, tuple, dict[str, Any]], times: int) -> list[list[Runs]]:
        """Run the programs so many times, each time once per value of the sites that a guide marks ``"sequential"``."""
        count, nesting = self.num_particles, 0 if math.isinf(self.max_plate_nesting) else int(self.max_plate_nesting)
        vectorized = self.vectorize_particles and count > 1
        trace = self._vectorized if vectorized else partial(trace_pair, max_plate_nesting=nesting)
        with SameRows():
            once = partial(trace, *programs)
            again = lambda pair: trace_fixed(pair, *programs, count, nesting)  # noqa: E731
            run = partial(self.estimator.run, once, again)
            return [each_branch(run) for _ in range(times)]

    @full_precision()
    def _sites(
        self, runs: Sequence[Sequence[Runs]], weight_of: WeightOf | None = None
    ) -> tuple[dict[str, Term], int | None]:
        """Return the terms of all particles; ``weight_of`` as in :func:`evaluate_branches`."""
        sites, particle_dim = self._terms_of([[pair for pair, _ in branches] for branches in runs], weight_of)
        fixed = [[pair for _, pair in branches if pair is not None] for branches in runs]
        if all(fixed):
            direct = self._terms_of(fixed, weight_of)[0]
            sites = {name: replace(t, direct=direct[name].nats) for name, t in sites.items()}
        return sites, particle_dim

    def _terms_of(
        self, runs: Sequence[Sequence[TracePair]], weight_of: WeightOf | None
    ) -> tuple[dict[str, Term], int | None]:
        sites, particle_dim = stack_particles([evaluate_branches(branches, self.kl, weight_of) for branches in runs])
        return sites, particle_dim if len(runs) > 1 else runs[0][0].particle_dim

    def _vectorized(self, model: Program, guide: Program, args: tuple, kwargs: dict[str, Any]) -> TracePair:
        for _ in range(2):
            nesting = self._nesting(model, guide, args, kwargs)
            pair = trace_pair(model, guide, args, kwargs, self.num_particles, nesting)
            if pair.nesting <= nesting:
                return pair
            _nesting_found.pop(self, None)  # the programs have more plates than with earlier arguments
        raise SiteError(
            f"The plates use {pair.nesting} batch dimensions, expected at most max_plate_nesting={nesting}, left of "
            f"which the particles lie. Give max_plate_nesting={pair.nesting}, or leave it out."
        )

    def _nesting(self, model: Program, guide: Program, args: tuple, kwargs: dict[str, Any]) -> int:
        if not math.isinf(self.max_plate_nesting):
            return int(self.max_plate_nesting)
        known = _nesting_found.get(self)
        if known is None or known[0] != model or known[1] != guide:
            known = model, guide, find_plate_nesting(model, guide, args, kwargs)
            _nesting_found[self] = known
        return known[2]

    def _get_trace(self, model: Program, guide: Program, args: tuple, kwargs: dict[str, Any]) -> None:
        raise NotImplementedError("The terms of the bound replace Pyro's pair of traces: call .terms(...).")

    def count_step(self, loss: Float[Tensor, "*"], terms: Terms) -> Float[Tensor, "*"]:
        """Return ``loss``, marked so that the optimizer's step after its backward counts as one step.

        The critics of ``terms`` receive their gradients now and step with the optimizer.
        """
        if loss.requires_grad:
            advance_after_backward(loss, self)
            self.keep_averages(terms)
            for critic, gradients in critic_gradients(terms):
                critic.accept(gradients)
        return loss

    def keep_averages(self, terms: Terms) -> None:
        """Keep the decaying averages of rewards, in the tensors of earlier steps where they fit."""
        for name, new in terms.averages.items():
            kept = self.averages.get(name)
            if kept is not None and kept.shape == new.shape:
                kept.copy_(new)
            else:
                self.averages[name] = new.clone()


def _brief(value: Any) -> str:
    """Return a setting as a ``repr`` shows it: a tensor by its shape, penalties by their names."""
    if isinstance(value, Tensor):
        return f"<tensor of shape {tuple(value.shape)}>" if value.dim() else f"{value.item():g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {_brief(x)}" for name, x in value.items()) + "}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_brief, value))}]"
    return value.name if isinstance(value, Penalty) else repr(value)
