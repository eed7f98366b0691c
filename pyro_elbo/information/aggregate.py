r"""The aggregate posterior of a latent: the density of each row's draw under every other row's guide distribution.

.. math:: q(z) = \frac1N \sum_j q(z \mid x_j)

Every penalty on information compares sums of the pairs :math:`\log q(z_i \mid x_j)`. For normal densities the pairs
are matrix products, in double precision because their squares cancel; other densities are evaluated pair by pair.
Pairs are computed in blocks of rows, which bounds the memory; the backward pass computes each block a second time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution, Normal
from torch.utils.checkpoint import checkpoint

from pyro_elbo.assumptions import is_capturing
from pyro_elbo.errors import CompileError, SiteError
from pyro_elbo.programs import Plate, Site, is_point
from pyro_elbo.ranks import gather_rows
from pyro_elbo.sequences import StackedDistribution
from pyro_elbo.terms import univariate

BLOCK = 2**20  # pairs in memory at once: about 64 MB with the tensors saved for the gradient
MAX_UNROLLED = 32  # blocks in one captured graph
Pairs = Callable[[int, int], Tensor]
EXCLUDED = -1e30  # log density under a row that does not count: finite, so that its gradient is zero


@dataclass(frozen=True)
class AggregatePosterior:
    """The draws of a latent and the distributions that they came from, one per row of a plate.

    Where several processes hold parts of a batch, the rows are those of all of them.

    Args:
        site: the guide's site.
        plate: the plate whose rows are compared; all other plates of the site belong to a row.
        particle_dim: the batch dimension of the particles, if any.

    Raises:
        SiteError: the site has no density, is drawn step by step, or is masked within a row.
    """

    site: Site
    plate: Plate
    particle_dim: int | None

    def __post_init__(self) -> None:
        name, fn = self.site.name, self.site.fn
        if isinstance(fn, StackedDistribution):
            raise SiteError(
                f"Latent '{name}' is drawn step by step: its density at another row's draws is that of a whole "
                "sequence, which no penalty can evaluate. Penalize a latent outside pe.scan."
            )
        if is_point(fn):
            raise SiteError(
                f"Latent '{name}' has no density: the guide puts all mass on a point ({type(fn).__name__}). Draw it "
                "in the guide from a distribution, such as Normal(loc, scale).to_event(1)."
            )

    @cached_property
    def shape(self) -> torch.Size:
        """Batch shape of the site in this process, with all of its rows."""
        shape = torch.broadcast_shapes(
            self.site.fn.batch_shape, self.site.value.shape[: self.site.value.dim() - self.site.event_dim]
        )
        shape = (1,) * (-self.plate.dim - len(shape)) + tuple(shape)
        axis = self.plate.dim % len(shape)
        return torch.Size(shape[:axis] + (self.plate.size,) + shape[axis + 1 :])

    @cached_property
    def rows(self) -> Bool[Tensor, "rows"]:
        """Return the mask of the rows that count."""
        mask = self.site.mask
        if mask is None or isinstance(mask, bool):
            return gather_rows(torch.full((self.plate.size,), mask is not False, device=self.site.value.device), 0)
        if any(n != 1 for d, n in enumerate(mask.shape) if d - mask.dim() != self.plate.dim):
            raise SiteError(
                f"Latent '{self.site.name}' is masked within the rows of '{self.plate.name}' (mask of shape "
                f"{tuple(mask.shape)}): such rows have no common density. Mask whole rows."
            )
        return gather_rows(mask.expand(self.shape[self.plate.dim :]).reshape(self.plate.size), 0)

    @cached_property
    def draws(self) -> Float[Tensor, "particles rows elements"]:
        """Return the draws with all elements of a row flattened."""
        return self._flat(self.site.value)

    @cached_property
    def pairs(self) -> Pairs:
        """Return a function (start, stop) -> log q(z_i | x_j), i in the block, j all rows: (particles, block, rows).

        Read this property before :func:`in_blocks` runs, not within a block: the backward pass runs every block again,
        and would repeat the preparation each time.
        """
        base = univariate(self.site.fn)
        if not isinstance(base, Normal):
            value = self._values
            return lambda start, stop: self._evaluate(self.site.fn, value[start:stop]).sum(-1)
        double = torch.float32 if base.loc.device.type == "mps" else torch.float64
        loc, scale, z = (self._flat(x).to(double) for x in (base.loc, base.scale, self.site.value))
        center = self.draws.detach().mean((0, 1))
        loc, z, precision = loc - center, z - center, scale.square().reciprocal()
        constant = (-0.5 * loc.square() * precision - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1, keepdim=True)
        of_draws = torch.cat([z.square(), z, torch.ones_like(z[..., :1])], -1)
        of_densities = torch.cat([-0.5 * precision, loc * precision, constant], -1)
        return lambda start, stop: (of_draws[:, start:stop] @ of_densities.mT).to(self.site.value.dtype)

    @cached_property
    def pairs_per_element(self) -> Pairs:
        """Return the same function for q(z_id | x_j), element d by element: (particles, block, elements, rows)."""
        base = univariate(self.site.fn)
        if base is None:
            raise SiteError(
                f"Latent '{self.site.name}': {type(self.site.fn).__name__} does not factorize over its dimensions, so "
                "that their total correlation within one row is not zero. Use a distribution with .to_event(n)."
            )
        if not isinstance(base, Normal):
            value = self._values
            return lambda start, stop: self._evaluate(base, value[start:stop]).mT
        loc, scale = (self._flat(x).mT.unsqueeze(1).contiguous() for x in (base.loc, base.scale))
        factor, constant = (math.sqrt(2) * scale).reciprocal(), -scale.log() - 0.5 * math.log(2 * math.pi)
        z = self.draws.unsqueeze(-1)
        return lambda start, stop: constant - ((z[:, start:stop] - loc) * factor).square()

    def like_draws(self, x: Tensor) -> Float[Tensor, "particles rows elements"]:
        """Arrange values that have the site's batch and event dimensions like :attr:`draws`."""
        return self._flat(x)

    @cached_property
    def _axis(self) -> int:
        return self.plate.dim % len(self.shape)

    @cached_property
    def _particle_axis(self) -> int | None:
        axis = None if self.particle_dim is None else self.particle_dim + len(self.shape)
        return axis if axis is not None and axis >= 0 else None

    def _flat(self, x: Tensor) -> Tensor:
        """Reshape (batch, event) to (particles, rows, elements)."""
        return gather_rows(self._arrange(x.expand(*self.shape, *self.site.fn.event_shape), (self._axis,), 0), 1)

    @property
    def _values(self) -> Tensor:
        """The draws with their batch and event dimensions, rows first."""
        value = self.site.value.expand(*self.shape, *self.site.fn.event_shape)
        return gather_rows(value.movedim(self._axis, 0), 0)

    def _evaluate(self, fn: Distribution, value: Tensor) -> Tensor:
        """Evaluate log densities of a block of draws pair by pair: (particles, block, rows, elements)."""
        try:
            found = fn.log_prob(value.unsqueeze(self._axis + 1))
        except (NotImplementedError, KeyError) as error:  # Pyro looks up the inverses of draws that it has cached
            raise SiteError(
                f"Latent '{self.site.name}': {type(fn).__name__} has no density at another row's draws. Use a flow "
                "whose inverse is known, or a penalty that needs draws only (estimator='adversarial' or 'hsic')."
            ) from error
        left = self.site.fn.event_shape[: self.site.event_dim - len(fn.event_shape)]
        found = found.expand(len(value), *self.shape, *left)
        return gather_rows(self._arrange(found, (0, self._axis + 1), 1), 2)

    def _arrange(self, x: Tensor, rows: tuple[int, ...], shift: int) -> Tensor:
        """Move particles and rows to the front and flatten the rest."""
        first = rows if self._particle_axis is None else (self._particle_axis + shift, *rows)
        x = x.permute(*first, *(d for d in range(x.dim()) if d not in first))
        x = x.unsqueeze(0) if self._particle_axis is None else x
        return x.flatten(1 + len(rows)) if x.dim() > 1 + len(rows) else x.unsqueeze(-1)


def in_blocks(function: Callable[[int, int], tuple[Tensor, ...]], rows: int, entries: int) -> tuple[Tensor, ...]:
    """Evaluate ``function(start, stop)`` block by block of rows and join its results along the rows.

    Args:
        function: returns tensors of shape (particles, stop - start, ...). Under autograd it runs twice per block.
        rows: number of rows.
        entries: numbers that one row occupies.

    Raises:
        CompileError: a captured step would unroll too many blocks.
    """
    size = max(1, BLOCK // entries)
    if is_capturing() and rows > MAX_UNROLLED * size:
        raise CompileError(
            f"A penalty compares {rows} rows by {rows * entries / 1e6:.0f} million numbers, more than the "
            f"{MAX_UNROLLED * BLOCK / 1e6:.0f} million of a compiled step. Take smaller batches, or use compile=False."
        )
    if size >= rows:
        return function(0, rows)
    parts = []
    for start in range(0, rows, size):
        block = start, min(start + size, rows)
        if torch.is_grad_enabled():
            parts.append(checkpoint(function, *block, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(function(*block))
    return tuple(torch.cat(x, 1) for x in zip(*parts, strict=True))


@dataclass(frozen=True)
class Mixture:
    """Densities of each row's draw under a subset of the rows, the row itself kept apart.

    Attributes:
        own: log density under the row itself.
        others: log of the sum of the densities under the other rows of the subset.
        count: number of those rows.
    """

    own: Float[Tensor, "*batch block"]
    others: Float[Tensor, "*batch block"]
    count: Float[Tensor, "block"]

    @staticmethod
    def of(pairs: Float[Tensor, "*batch block rows"], among: Bool[Tensor, "*#block rows"], start: int) -> "Mixture":
        """Return the mixture for a block of rows that begins at ``start``; ``among`` masks the rows that count."""
        stop, rows = start + pairs.shape[-2], pairs.shape[-1]
        own = torch.arange(start, stop, device=pairs.device)[:, None] == torch.arange(rows, device=pairs.device)
        others = among & ~own
        log_sum = torch.where(others, pairs, EXCLUDED).logsumexp(-1)
        return Mixture(pairs.diagonal(start, -2, -1), log_sum, others.sum(-1).to(pairs))

    @property
    def without_own(self) -> Float[Tensor, "*batch block"]:
        """Log mean density under the other rows."""
        return self.others - self.count.log()

    @property
    def with_own(self) -> Float[Tensor, "*batch block"]:
        """Log mean density under the other rows and the row itself."""
        return torch.logaddexp(self.others, self.own) - (self.count + 1).log()

    def of_full_data(self, full: float) -> Float[Tensor, "*batch block"]:
        r"""Estimate log q(z_i) of the full data from a batch: weight 1/N for the own row, (N-1) / (N (B-1)) for others.

        The row's own density counts as much as in the full data. The published weight matrix puts the own weight into
        a column instead of the diagonal.

        References:
            Chen, Li, Grosse, Duvenaud (2018), arXiv:1802.04942, appendix C.1.
        """
        others = self.others + ((full - 1) / self.count.clamp(min=1)).log()
        return torch.logaddexp(self.own, others) - math.log(full)
