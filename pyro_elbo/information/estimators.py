r"""Estimators of the mutual information between a latent and an attribute, from one set of draws.

.. math:: I_q(z; s) = E \log q(z \mid s) - E \log q(z)

Including the row's own density in q(z | s) and q(z) biases the estimate up, leaving it out biases it down: the two
means bracket the truth. See :class:`pyro_elbo.MutualInformation`.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_elbo.assumptions import check_or_defer, is_capturing
from pyro_elbo.errors import ArgumentError, DataError, SiteError, count_nonfinite, describe
from pyro_elbo.information.aggregate import AggregatePosterior, Mixture, Pairs, in_blocks
from pyro_elbo.information.critics import Critic
from pyro_elbo.information.penalty_term import PenaltyTerm
from pyro_elbo.programs import Plate, Site
from pyro_elbo.ranks import gather_rows
from pyro_elbo.terms import Term, Terms

AttributeSource = str | Callable[..., Tensor] | tuple["str | Callable[..., Tensor]", ...]
STANDARD_ERRORS = 2.5  # on either side of a bracket: 95 % coverage for means of skewed ratios, see _margins


@dataclass(frozen=True)
class PenaltyContext:
    """The input of a penalty: the terms of the bound, the programs' arguments, and the rows of the latent.

    Where several processes hold parts of a batch, terms and arguments are those of this process; ``plate``, draws and
    values of attributes have the rows of all.
    """

    terms: Terms
    args: tuple
    kwargs: Mapping[str, Any]
    latent: str
    term: Term
    plate: Plate

    @property
    def draws(self) -> Iterator[Site]:
        """Yield the draws of the latent, one site per run of the programs."""
        for site in self.term.draws:
            if not site.fn.has_rsample:
                raise SiteError(
                    f"Latent '{self.latent}' has no pathwise gradient ({type(site.fn).__name__}), which penalties "
                    "need. Draw it from a reparameterized or a relaxed distribution (pyro's RelaxedBernoulli...)."
                )
            yield site

    @property
    def aggregate(self) -> Iterator[AggregatePosterior]:
        """Yield the draws of the latent with their densities."""
        return (AggregatePosterior(site, self.term.plates[0], self.terms.particle_dim) for site in self.draws)

    def values_of(self, attribute: AttributeSource) -> Float[Tensor, "rows columns"]:
        """Return the values of an attribute, one row per row of the latent's plate."""
        if attribute is None:
            raise ArgumentError("attribute must be the name of an observed site or a function, got None.")
        check_attribute("attribute", attribute)
        parts = attribute if isinstance(attribute, tuple) else (attribute,)
        return gather_rows(torch.cat([self._column(part) for part in parts], 1), 0)

    def _call(self, attribute: Callable[..., Tensor]) -> Any:
        """Call a function of the programs' arguments, and refuse one that does not take them."""
        try:
            inspect.signature(attribute).bind(*self.args, **self.kwargs)
        except TypeError as error:
            named = f" and {list(self.kwargs)}" if self.kwargs else ""
            raise ArgumentError(
                f"Attribute '{label(attribute)}': a function of the programs' arguments is called with all of them, "
                f"here {len(self.args)} positional{named}, but {error}. Give it the parameters of the model, as in "
                "lambda x, s: s for model(x, s)."
            ) from error
        return attribute(*self.args, **self.kwargs)

    def _column(self, attribute: str | Callable[..., Tensor]) -> Tensor:
        if callable(attribute):
            name, value, axis = label(attribute), self._call(attribute), 0
        else:
            name, (value, axis) = attribute, self._observed(attribute)
        rows = self.term.plates[0].size
        if not isinstance(value, Tensor) or not value.dim() or value.shape[axis] != rows:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise DataError(
                f"Attribute '{name}': expected {rows} rows, those of plate '{self.plate.name}' around "
                f"latent '{self.latent}', got {got}. Give it one value, or one row of values, per datum."
            )
        columns = value.movedim(axis, 0).reshape(rows, -1)
        if not columns.is_floating_point():
            columns = columns.to(self.term.nats.dtype)
        if not check_or_defer(torch.isfinite(columns).all()):
            raise DataError(
                f"Attribute '{name}': {count_nonfinite(columns)}. Leave out the rows where it is missing, or make "
                "'missing' a level of its own."
            )
        return columns.to(self.term.nats)

    def _observed(self, name: str) -> tuple[Tensor, int]:
        found = self.terms.sites.get(name)
        if found is None or found.kind != "likelihood" or not found.draws:
            names = [n for n, t in self.terms.sites.items() if t.kind == "likelihood"]
            raise SiteError(
                f"attribute='{name}' is no observed site of the model, which observes {names}. Name one of them, or "
                f"pass a function of the model's arguments: attribute=lambda x, {name}: {name}."
            )
        site = found.draws[0]
        if self.plate.name not in [p.name for p in site.plates]:
            raise SiteError(
                f"attribute='{name}' lies outside of plate '{self.plate.name}' of latent '{self.latent}': expected one "
                "value per row. Observe it within the plate."
            )
        return site.value, self.plate.dim - site.event_dim + site.value.dim()


def check_attribute(what: str, attribute: Any) -> None:
    """Raise ArgumentError unless ``attribute`` is None, a name, a function or a tuple of these."""
    parts = attribute if isinstance(attribute, tuple) else (attribute,)
    wrong = [x for x in parts if not (isinstance(x, str) or callable(x) and not isinstance(x, type))]
    if attribute is not None and (wrong or not parts):
        raise ArgumentError(
            f"{what} must be the name of an observed site, a function of the programs' arguments such as "
            f"lambda x, s: s, or a tuple of these, got {describe(wrong[0] if wrong else attribute)}."
        )


def label(attribute: AttributeSource) -> str:
    """Return the name of an attribute for tables and messages."""
    if isinstance(attribute, tuple):
        return ", ".join(label(part) for part in attribute)
    if isinstance(attribute, str):
        return attribute
    name = getattr(attribute, "__name__", type(attribute).__name__)
    return "s" if name == "<lambda>" else name


def check_varies(name: str, s: Tensor) -> None:
    """Raise DataError where all rows have the same value."""
    if not check_or_defer((s != s[:1]).any()):
        raise DataError(
            f"Attribute '{name}' has one level only, {s[0].tolist()}, in {len(s)} rows: its information is undefined. "
            "Take larger batches or a stratified loader, and check that the data hold another level at all."
        )


def counted(context: PenaltyContext) -> Bool[Tensor, "rows"]:
    """Return the mask of the rows of the latent that count."""
    return next(context.aggregate).rows


def flat_draws(context: PenaltyContext, site: Site) -> Float[Tensor, "particles rows elements"]:
    """Return the draws of the latent with all elements of a row flattened."""
    return AggregatePosterior(site, context.term.plates[0], context.terms.particle_dim).draws


def mean_over_rows(x: Float[Tensor, "*particles rows"], rows: Bool[Tensor, "rows"]) -> Float[Tensor, ""]:
    """Average over particles and over the rows that count."""
    rows = rows.expand(x.shape)
    return torch.where(rows, x, 0.0).sum() / rows.sum()


def peer_weights(
    y: Float[Tensor, "rows columns"], rows: Bool[Tensor, "rows"], block: slice = slice(None)
) -> Float[Tensor, "#block rows"]:
    """Return weights of each row of a block over the rows with the same y; they add up to one."""
    same = _alike(y, block) & rows
    return same.to(y) / same.sum(-1, keepdim=True).clamp(min=1)


def _alike(x: Float[Tensor, "rows columns"], block: slice) -> Bool[Tensor, "block rows"]:
    """Mask the rows that have the same values as each row of a block."""
    if not x.shape[1]:
        return torch.ones(1, len(x), dtype=torch.bool, device=x.device)
    return (x[block, None] == x).all(-1)


def information_between_levels(
    context: PenaltyContext, attribute: AttributeSource, s: Tensor, y: Tensor
) -> PenaltyTerm:
    """Estimate E log q(z | s) - E log q(z) from the densities of the batch, with and without each row's own."""
    found = []
    for aggregate in context.aggregate:

        def block(
            start: int, stop: int, rows: Tensor = aggregate.rows, pairs: Pairs = aggregate.pairs
        ) -> tuple[Tensor, ...]:
            found, peers = pairs(start, stop), _alike(y, slice(start, stop)) & rows
            level = peers & _alike(s, slice(start, stop))
            of_level, of_peers = (Mixture.of(found, among, start) for among in (level, peers))
            with_own = of_level.with_own - of_peers.with_own
            without = of_level.without_own - of_peers.without_own
            return with_own, without.detach(), level.sum(-1).expand(with_own.shape)

        high, low, count = in_blocks(block, len(s), len(s))
        _check_discrete(label(attribute), count[0], aggregate.rows)
        found.append((high, low, aggregate.rows, aggregate.rows & (count[0] > 1)))
    high = torch.stack([mean_over_rows(high, rows) for high, _, rows, _ in found]).mean()
    low = torch.stack([mean_over_rows(low, paired) for _, low, _, paired in found]).mean()
    margins = [_margins(high.detach(), low, rows, paired) for high, low, rows, paired in found]
    return PenaltyTerm(high, "upper", low, high.detach(), torch.stack(margins).mean(0))


def _margins(high: Tensor, low: Tensor, rows: Tensor, paired: Tensor) -> Float[Tensor, "2"]:
    """Return 2.5 standard errors below and above; more below where a few rows of small ratio decide the mean.

    Rows are independent to first order. Their ratios are bounded above by H(s) and have a long tail below. A sample
    that lacks the rare rows overestimates the mean; Johnson's skewness correction widens the interval downward.

    References:
        Johnson (1978), Modified t tests and confidence intervals for asymmetrical populations, JASA 73.
    """
    high, low, count = high.mean(0), low.mean(0), rows.sum()
    centered = torch.where(paired, low - mean_over_rows(low, paired), 0.0)
    spread = _spread(high, rows).maximum(_spread(low, paired))
    skewness = centered.pow(3).sum() / (paired.sum() * _spread(low, paired).pow(3)).clamp(
        min=torch.finfo(low.dtype).tiny
    )
    longer = (1 + 2 * STANDARD_ERRORS**2) / (6 * count.sqrt()) * (-skewness).clamp(min=0.0)
    return torch.stack([STANDARD_ERRORS + longer, torch.full_like(longer, STANDARD_ERRORS)]) * spread / count.sqrt()


def _spread(x: Float[Tensor, "rows"], rows: Bool[Tensor, "rows"]) -> Float[Tensor, ""]:
    return (torch.where(rows, x - mean_over_rows(x, rows), 0.0).square().sum() / (rows.sum() - 1)).sqrt()


def _check_discrete(name: str, count: Tensor, rows: Tensor) -> None:
    if not is_capturing() and bool((count[rows] < 2).all()):
        raise DataError(
            f"Attribute '{name}' has a different value in each of {int(rows.sum())} rows: it looks continuous, and "
            "estimator='aggregate' compares levels. Use estimator='hsic', 'variational' or 'club', or bin it."
        )


def information_on_data(context: PenaltyContext) -> PenaltyTerm:
    """Estimate I(z; x) = E log q(z | x) - E log q(z), with the weights of the full data."""
    values, margins = [], []
    for aggregate in context.aggregate:

        def block(
            start: int, stop: int, rows: Tensor = aggregate.rows, pairs: Pairs = aggregate.pairs
        ) -> tuple[Tensor, ...]:
            found = Mixture.of(pairs(start, stop), rows, start)
            means = found.of_full_data(context.plate.full_size), found.with_own, found.without_own
            return tuple(found.own - mean for mean in means)

        found = in_blocks(block, context.plate.size, context.plate.size)
        values.append(torch.stack([mean_over_rows(x, aggregate.rows) for x in found]))
        error = STANDARD_ERRORS * _spread(found[0].detach().mean(0), aggregate.rows) / aggregate.rows.sum().sqrt()
        margins.append(error.expand(2))
    nats, low, high = torch.stack(values).mean(0)
    return PenaltyTerm(nats, "debiased", low.detach(), high.detach(), torch.stack(margins).mean(0))


def variational(context: PenaltyContext, attribute: AttributeSource, s: Tensor, y: Tensor) -> PenaltyTerm:
    """Bound I(z; s) by KL(q(z | x) || p(z)) - E log p(x | z, s), up to the unknown constant H(x | s)."""
    names = attribute if isinstance(attribute, tuple) else (attribute,)
    likelihood = sum(x for n, x in context.terms.log_likelihood_total.items() if n not in names)
    return PenaltyTerm(
        (context.terms.kl_total[context.latent] - likelihood) / context.terms.num_data, "upper, up to a constant"
    )


def hsic(context: PenaltyContext, attribute: AttributeSource, s: Tensor, y: Tensor) -> PenaltyTerm:
    """Average the product of two kernels, each centered within the levels of y."""
    rows, count = counted(context), len(s)
    of_s = _scaled(s.unsqueeze(0), rows)
    values = []
    for site in context.draws:
        of_z = _scaled(flat_draws(context, site), rows)

        def products(start: int, stop: int, of_z: Tensor = of_z) -> tuple[Tensor, ...]:
            peers = peer_weights(y, rows, slice(start, stop))
            kernel_z, kernel_s = (_kernel(x, start, stop) for x in (of_z, of_s))
            means = [(kernel * peers).sum(-1) for kernel in (kernel_z * kernel_s, kernel_z, kernel_s)]
            return tuple(x.expand(len(of_z), -1) for x in means)

        product, mean_z, mean_s = in_blocks(products, count, count)

        def levels(start: int, stop: int, means: tuple[Tensor, ...] = (mean_z, mean_s)) -> tuple[Tensor, ...]:
            peers = peer_weights(y, rows, slice(start, stop))
            return tuple((x @ peers.mT).expand(-1, stop - start) for x in means)

        level_z, level_s = in_blocks(levels, count, count)
        values.append(mean_over_rows(product - 2 * mean_z * mean_s + level_z * level_s, rows))
    return PenaltyTerm(torch.stack(values).mean(), "index")


def _scaled(x: Float[Tensor, "*particles rows columns"], rows: Tensor) -> Float[Tensor, "*particles rows columns"]:
    """Scale rows so that their mean squared distance is one."""
    mean = torch.where(rows[:, None], x, 0.0).sum(-2, keepdim=True) / rows.sum()
    x = x - mean.detach()
    square = 2 * torch.where(rows, x.square().sum(-1), 0.0).sum(-1) / rows.sum()
    return x / square.sqrt()[..., None, None]


def _kernel(
    x: Float[Tensor, "*particles rows columns"], start: int, stop: int
) -> Float[Tensor, "*particles block rows"]:
    """Evaluate exp(-½ |x_i - x_j|²) for the rows i of a block and all rows j."""
    square = x.square().sum(-1)
    distance = square[..., start:stop, None] + square[..., None, :] - 2 * x[..., start:stop, :] @ x.mT
    return (-0.5 * distance.clamp(min=0.0)).exp()


Estimate = Callable[[PenaltyContext, AttributeSource, Tensor, Tensor], PenaltyTerm]
"""An estimator from densities: of the context, the attribute, and the values of s and of y, one row per datum."""
ESTIMATORS: dict[str, Estimate] = {
    "aggregate": information_between_levels,
    "variational": variational,
    "hsic": hsic,
}


def critic_inputs(context: PenaltyContext, y: Tensor) -> Float[Tensor, "particles rows inputs"]:
    """Return the draws of the latent, with the values that are conditioned on: what a critic predicts s from."""
    z = torch.cat([flat_draws(context, site) for site in context.draws])
    return torch.cat([z, y.expand(len(z), *y.shape)], -1)


@dataclass(frozen=True)
class CriticEstimator:
    """The mean over rows of a function of a critic r(s | z).

    Attributes:
        direction: as in :class:`PenaltyTerm`.
        of_rows: nats of each row, from the critic, the parameters of r that it gives at z, s, and each row's weights
            of its peers, the rows with the same y. A row that does not count may have no peers: all its weights are 0.
    """

    direction: str
    of_rows: Callable[[Critic, Tensor, Tensor, Tensor], Tensor]

    def __call__(self, context: PenaltyContext, critic: Critic, z: Tensor, s: Tensor, y: Tensor) -> PenaltyTerm:
        """Estimate the information by the critic as it is, and return it with the loss that trains the critic."""
        rows = counted(context)
        nats = mean_over_rows(self.of_rows(critic, critic.frozen(z), s, peer_weights(y, rows)), rows)
        return PenaltyTerm(nats, self.direction, critic=critic, critic_loss=critic.loss(z, s, rows))


def _club(critic: Critic, out: Tensor, s: Tensor, peers: Tensor) -> Tensor:
    """Return log r(s | z) less its mean over the peers' s."""
    return critic.log_prob(out, s) - critic.expected(out, s, peers)


def _adversarial(critic: Critic, out: Tensor, s: Tensor, peers: Tensor) -> Tensor:
    """Return log r(s | z) less the log of the share of s among the peers."""
    return critic.log_prob(out, s) + critic.entropy(s, peers)


CRITIC_ESTIMATORS = {
    "club": CriticEstimator("upper", _club),
    "adversarial": CriticEstimator("lower", _adversarial),
}
