r"""Penalties on the mutual information and the total correlation of the aggregate posterior.

.. math:: \text{objective} = \text{bound} - \sum_k \lambda_k\, N\, I_k

A penalty is a function of the terms of the bound (draws and the distributions that they came from) and of the
programs' arguments; it changes no term. Its value is in nats per datum; its share of the objective is scaled to the
full data, like the terms.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, replace
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyro_elbo.errors import (
    ArgumentError,
    SiteError,
    check_choice,
    check_count,
    check_name,
    check_number,
    check_positive,
    check_seed,
    describe,
)
from pyro_elbo.information.aggregate import Mixture, Pairs, in_blocks
from pyro_elbo.information.critics import Critic, CriticSpec, count_levels
from pyro_elbo.information.estimators import (
    CRITIC_ESTIMATORS,
    ESTIMATORS,
    AttributeSource,
    PenaltyContext,
    check_attribute,
    check_varies,
    critic_inputs,
    information_on_data,
    label,
    mean_over_rows,
)
from pyro_elbo.information.penalty_term import PenaltyTerm
from pyro_elbo.programs import Plate
from pyro_elbo.ranks import part_sizes
from pyro_elbo.schedules import Capacity, Schedule
from pyro_elbo.terms import Terms

Estimator = Literal["aggregate", "variational", "club", "adversarial", "hsic"]
Critics = dict[str, Critic]


class Penalty(ABC):
    """A value that an objective charges beside the KL: subclasses define ``name`` and ``estimate``.

    Attributes:
        latent: the penalized site; it lies in a plate whose rows are data.
        weight: λ, a number or a schedule; negative to reward instead.
        name: the name of the penalty in terms, histories and tables.
    """

    latent: str
    weight: float | Schedule
    name: str

    def __repr__(self) -> str:
        estimator = getattr(self, "estimator", None)
        chosen = "" if estimator is None else f", estimator={estimator!r}"
        return f"{type(self).__name__}({self.name!r}, weight={self.weight!r}{chosen})"

    @abstractmethod
    def estimate(self, context: PenaltyContext, critics: Critics) -> PenaltyTerm:
        """Estimate the value from one set of draws."""

    def __call__(
        self, terms: Terms, args: tuple, kwargs: Mapping[str, Any], weight: float | Tensor, critics: Critics
    ) -> PenaltyTerm:
        """Evaluate the penalty at the terms of one step.

        Args:
            terms: terms of the bound.
            args, kwargs: arguments of the programs.
            weight: λ at this step.
            critics: the critics built so far, by the penalty's name; a new one is added.

        Raises:
            SiteError: the latent is missing, or has no rows, no density or no pathwise gradient.
            DataError: an attribute cannot be used.
        """
        context = self._context(terms, args, kwargs)
        free = not isinstance(weight, Tensor) and weight == 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and not (free and not self.has_critic)):
            estimate = self.estimate(context, critics)
        scale = torch.as_tensor(context.term.scale).double().mean().to(terms.objective) * context.term.plates[0].size
        return replace(estimate, weight=weight, scale=scale)

    @property
    def has_critic(self) -> bool:
        """Return whether the penalty trains a critic beside the programs."""
        return False

    def _context(self, terms: Terms, args: tuple, kwargs: Mapping[str, Any]) -> PenaltyContext:
        term = terms.sites.get(self.latent)
        if term is None or term.kind != "latent":
            latents = [n for n, t in terms.sites.items() if t.kind == "latent"]
            raise SiteError(
                f"{self.name}: '{self.latent}' is not a latent of model and guide, which share {latents}. Name one "
                "of them."
            )
        if not term.plates:
            raise SiteError(
                f"{self.name}: latent '{self.latent}' lies in no plate: all data share one value. Penalize a "
                "latent with one value per datum, within the data's pyro.plate."
            )
        if term.posterior is not None or term.expected:
            raise SiteError(
                f"{self.name}: '{self.latent}' is summed out: it has no draws whose information could be estimated. "
                "Draw it in the guide, without a mark for enumeration, or penalize another latent."
            )
        if not term.draws:
            raise SiteError(
                f"{self.name}: '{self.latent}' is joined from the steps of a loop. Penalize a latent with one "
                "value per datum."
            )
        return PenaltyContext(terms, args, kwargs, self.latent, term, _of_all_parts(term.plates[0]))


@dataclass(frozen=True, repr=False)
class MutualInformation(Penalty):
    r"""λ I_q(z; s), the information of a latent on an attribute of the data; or I_q(z; x), on the datum itself.

    .. math:: I_q(z; s) = E \log \frac{q(z \mid s)}{q(z)}

    Args:
        latent: the site z.
        attribute: s: an observed site of the model, a function of the programs' arguments that returns one row per
            datum, or a tuple of these (their joint levels). None: the datum itself.
        weight: λ, a number or a schedule.
        estimator: how the information is estimated (nats per datum, except for ``hsic``):

            * ``"aggregate"``: the densities of the batch's encoder, averaged within a level and over all. s must be
              discrete. The value includes each row's own density: an upper bound in expectation, by up to log B for
              tiny batches. ``low`` leaves the row out, ``high`` keeps it: the truth lies between. For I(z; x) the
              value weighs the rows as in the full data, ``low`` (with the own row) is at most log B.
            * ``"variational"``: :math:`KL(q(z|x) \| p(z)) - E \log p(x|z,s)`, an upper bound up to the constant
              H(x | s), with the model's decoder, which must see s. No other assumption on s. x is everything that the
              model observes except s, a target y included, with the scales of its sites.
            * ``"club"``: :math:`E_{p(z,s)} \log r(s|z) - E_{p(z)p(s)} \log r(s|z)` with a trained critic r: an upper
              bound where r is good, otherwise neither.
            * ``"adversarial"``: :math:`H(s) + E \log r(s|z)`, a lower bound: a critic that finds nothing does not prove
              independence.
            * ``"hsic"``: Hilbert-Schmidt independence criterion of z and s with Gaussian kernels as wide as the batch;
              for continuous s. Not an information, but zero only at independence.
        conditional_on: a discrete attribute y as ``attribute``: the penalty is I(z; s | y) (equalized odds).
        levels: levels of each column of s for critics; counted in the first batch if omitted. Whole numbers from 0
            are levels; other values are continuous.
        hidden: widths of the critic's hidden layers.
        critic_lr: learning rate of the critic's own Adam.
        seed: seed of the critic's initial weights.
        name: name of the penalty in terms and histories, I(z; s) by default; those of one objective differ.
        given: the former name of ``attribute``, refused.

    Raises:
        ArgumentError: an argument is out of range.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, pyro_elbo as pe
        >>> def model(x, s):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z + s, 1.0), obs=x)
        >>> def guide(x, s):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
        >>> penalty = pe.MutualInformation("z", attribute=lambda x, s: s, weight=10.0)
        >>> s = torch.arange(400) % 2
        >>> _ = torch.manual_seed(0)
        >>> found = pe.TraceBeta_ELBO(penalties=[penalty]).terms(model, guide, 4.0 * s, s).penalties["I(z; s)"]
        >>> print(f"{found.low:.2f} <= I <= {found.high:.2f} nats")  # two normals two standard deviations apart
        0.35 <= I <= 0.35 nats

    References:
        Moyer, Gao, Brekelmans, Galstyan, Ver Steeg (2018), arXiv:1805.09458 (variational); Cheng, Hao, Dai, Liu, Gan,
        Carin (2020), arXiv:2006.12013 (CLUB); Ganin, Lempitsky (2015), arXiv:1409.7495 (adversarial); Gretton,
        Bousquet, Smola, Schölkopf (2005), ALT (HSIC); Poole, Ozair, van den Oord, Alemi, Tucker (2019),
        arXiv:1905.06922 (directions of the batch estimates).
    """

    latent: str
    attribute: AttributeSource | None = None
    weight: float | Schedule = 1.0
    estimator: Estimator = "aggregate"
    conditional_on: AttributeSource | None = None
    levels: int | tuple[int, ...] | None = None
    hidden: tuple[int, ...] = (64, 64)
    critic_lr: float = 1e-3
    seed: int = 0
    name: str = ""
    given: InitVar[None] = None

    def __post_init__(self, given: None) -> None:
        if given is not None:
            raise ArgumentError("given= is called attribute= now: in I(z; s | y), y is what is given.")
        _check_common("MutualInformation", self)
        check_attribute("attribute", self.attribute)
        check_attribute("conditional_on", self.conditional_on)
        check_choice("estimator", self.estimator, get_args(Estimator))
        if self.attribute is None and (self.estimator != "aggregate" or self.conditional_on is not None):
            raise ArgumentError(
                "Without an attribute the penalty is I(z; x), which only estimator='aggregate' estimates, not "
                "conditionally. Pass attribute=..., a site of the model or a function of its arguments."
            )
        if self.estimator == "variational" and self.conditional_on is not None:
            raise ArgumentError("estimator='variational' bounds I(z; s) alone. Use another one for I(z; s | y).")
        check_positive("critic_lr", self.critic_lr, "Use about 1e-3, the default.")
        check_seed(self.seed, optional=False)
        for what, sizes in (("hidden", self.hidden), ("levels", self.levels)):
            for size in sizes if isinstance(sizes, tuple | list) else [sizes] if sizes is not None else []:
                check_count(f"every number of {what}", size)
        object.__setattr__(self, "name", self.name or self._default_name())
        if self.has_critic and CRITIC_ESTIMATORS[self.estimator].direction == "lower":
            _say_once(
                f"estimator={self.estimator!r} is a lower bound on the information: a critic that finds nothing does "
                "not show that nothing is there. Judge the latent by pe.audit, with fresh probes."
            )

    def _default_name(self) -> str:
        attribute = "x" if self.attribute is None else label(self.attribute)
        condition = "" if self.conditional_on is None else f" | {label(self.conditional_on)}"
        return f"I({self.latent}; {attribute}{condition})"

    @property
    def has_critic(self) -> bool:
        """Return whether the penalty trains a critic beside the programs."""
        return self.estimator in CRITIC_ESTIMATORS

    def estimate(self, context: PenaltyContext, critics: Critics) -> PenaltyTerm:
        """Estimate the information from one set of draws: see the class for the estimators."""
        if self.attribute is None:
            return information_on_data(context)
        s = context.values_of(self.attribute)
        y = s.new_zeros(len(s), 0) if self.conditional_on is None else context.values_of(self.conditional_on)
        check_varies(label(self.attribute), s)
        if not self.has_critic:
            return ESTIMATORS[self.estimator](context, self.attribute, s, y)
        z = critic_inputs(context, y)
        if self.name not in critics:
            critics[self.name] = self._critic(z, s)
        return CRITIC_ESTIMATORS[self.estimator](context, critics[self.name], z, s, y)

    def _critic(self, z: Tensor, s: Tensor) -> Critic:
        levels = (self.levels,) * s.shape[1] if isinstance(self.levels, int) else self.levels
        levels = count_levels(s) if levels is None else levels
        return CriticSpec(z.shape[-1], s.shape[1], levels, tuple(self.hidden), self.critic_lr, self.seed).make(s)


@dataclass(frozen=True, repr=False)
class TotalCorrelation(Penalty):
    r"""λ TC(z) = λ KL(q(z) ‖ Π_d q(z_d)), the total correlation of the aggregate posterior's dimensions.

    The densities of the full data are estimated from the batch with the debiased weights of
    ``Mixture.of_full_data``. The value is biased down for small batches and exact for the full data.
    With weight β - 1 beside β = 1 this is β-TCVAE.

    Args:
        latent: the site z.
        weight: λ, a number or a schedule.
        groups: sets of dimensions that count as one each, for the correlation between groups (HFVAE); every dimension
            alone if omitted.
        name: name of the penalty in terms and histories, TC(z) by default.

    Raises:
        ArgumentError: an argument is out of range.

    Example:
        >>> import pyro_elbo as pe
        >>> loss = pe.TraceBeta_ELBO(penalties=[pe.TotalCorrelation("z", weight=5.0)])  # β-TCVAE with β = 6

    References:
        Watanabe (1960), IBM Journal; Chen, Li, Grosse, Duvenaud (2018), arXiv:1802.04942; Esmaeili et al. (2019),
        arXiv:1804.02086.
    """

    latent: str
    weight: float | Schedule = 1.0
    groups: tuple[tuple[int, ...], ...] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        _check_common("TotalCorrelation", self)
        _check_dimensions(self.groups)
        default = f"TC({self.latent})" if self.groups is None else f"TC({self.latent}: {self.groups})"
        object.__setattr__(self, "name", self.name or default)

    def estimate(self, context: PenaltyContext, critics: Critics) -> PenaltyTerm:
        """Estimate the total correlation from one set of draws."""
        values = []
        for aggregate in context.aggregate:
            self._check_groups(aggregate.draws.shape[-1])

            def block(
                start: int, stop: int, rows: Tensor = aggregate.rows, pairs: Pairs = aggregate.pairs_per_element
            ) -> tuple[Tensor, ...]:
                elements = parts = pairs(start, stop)
                if self.groups is not None:
                    parts = torch.stack([elements[:, :, list(group)].sum(2) for group in self.groups], 2)
                joint, marginals = (Mixture.of(x, rows, start) for x in (elements.sum(2), parts.transpose(1, 2)))
                full = context.plate.full_size
                return joint.of_full_data(full), marginals.of_full_data(full).mT

            joint, marginals = in_blocks(block, context.plate.size, context.plate.size * aggregate.draws.shape[-1])
            values.append(mean_over_rows(joint - marginals.sum(-1), aggregate.rows))
        return PenaltyTerm(torch.stack(values).mean(), "debiased")

    def _check_groups(self, size: int) -> None:
        if self.groups is not None and sorted(d for group in self.groups for d in group) != list(range(size)):
            raise ArgumentError(
                f"{self.name}: expected groups that hold each of the {size} dimensions of '{self.latent}' once, got "
                f"{self.groups}."
            )


def _of_all_parts(plate: Plate) -> Plate:
    """Return the plate with the rows of all processes that share the batch."""
    size = sum(part_sizes(plate.size))
    return plate._replace(size=size, full_size=size if plate.full_size == plate.size else plate.full_size)


def _check_common(kind: str, penalty: Penalty) -> None:
    check_name(f"{kind}: latent", penalty.latent)
    check_name(f"{kind}: name", penalty.name, "a string")
    if isinstance(penalty.weight, Capacity):
        raise ArgumentError(f"{kind}: pe.Capacity sets a target for a KL; the weight of a penalty is a number.")
    if not isinstance(penalty.weight, Schedule):
        check_number(f"{kind}: weight (or a schedule)", penalty.weight, least=-math.inf)


def _check_dimensions(groups: Any) -> None:
    if groups is None:
        return
    if not isinstance(groups, tuple | list) or not all(isinstance(group, tuple | list) for group in groups):
        raise ArgumentError(
            f"groups must be tuples of dimensions such as ((0, 1), (2,)), or None, got {describe(groups)}."
        )
    for d in (d for group in groups for d in group):
        check_count("every dimension of groups", d, least=0)


@cache
def _say_once(text: str) -> None:
    warnings.warn(text, stacklevel=5)


def check_penalties(penalties: Sequence[Penalty]) -> tuple[Penalty, ...]:
    """Return penalties that can stand beside each other."""
    if not isinstance(penalties, Sequence) or not all(isinstance(p, Penalty) for p in penalties):
        wrong = [p for p in penalties if not isinstance(p, Penalty)] if isinstance(penalties, Sequence) else [penalties]
        raise ArgumentError(
            "penalties must be a list of penalties such as [pe.MutualInformation('z', attribute='s')], got "
            f"{describe(wrong[0])}."
        )
    names = [penalty.name for penalty in penalties]
    if len(set(names)) < len(names):
        raise ArgumentError(f"Each penalty needs a name of its own, got {names}: pass name=... to tell them apart.")
    return tuple(penalties)
