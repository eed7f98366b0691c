r"""The symmetrized KL between a guide before and after its parameters moved.

.. math:: J(q_1, q_2) = E_{q_1}[\log q_1 - \log q_2] + E_{q_2}[\log q_2 - \log q_1]

Both expectations are taken over the same noise. The sum then has no variance at all where a location moves, and little
where a scale does.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_elbo.errors import GuideError
from pyro_elbo.posterior.weights import align, find_point_error
from pyro_elbo.programs import (
    Plate,
    Program,
    SameRows,
    TracePair,
    evaluating,
    seeded,
    shared_plate,
    trace_pair,
    trace_program,
)

VECTORIZED, SINGLE = 256, 32  # draws, in one run of the guide or in one run each


class _Drawn(NamedTuple):
    """Draws at one site of the guide, their log densities (draws, then batch dimensions), and the plates around it."""

    value: Tensor
    log_q: Tensor
    plates: tuple[Plate, ...]


class SymmetrizedKL:
    """Root of the symmetrized KL between a guide at two parameter vectors.

    If a mean moves by a standard deviations, and nothing else, the root is a. Latents inside the plate of the data
    count row by row: the row that moved most is added to the latents that all rows share.

    Args:
        model, guide, args, kwargs: the programs and their data.
        write: gives the guide the parameters of a vector.

    Raises:
        GuideError: the guide draws nothing, or is a point estimate in some latent.
    """

    def __init__(
        self, model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any], write: Callable[[Tensor], None]
    ) -> None:
        self._guide, self._args, self._kwargs, self._write = guide, args, kwargs, write
        with _undisturbed(0), evaluating(model, guide):
            pair, other = (trace_pair(model, guide, args, kwargs) for _ in range(2))
        _check_densities(pair, other)
        self._rows = shared_plate(s.plates for s in pair.model.values() if s.role == "observed")
        self._nesting = pair.nesting
        self._count = VECTORIZED if self._vectorizes() else 1

    def __call__(self, first: Tensor, second: Tensor) -> float:
        """Return the root of J plus twice its standard error; the guide has one of the vectors afterwards."""
        with evaluating(self._guide):
            runs = [self._ratios(first, second, seed) for seed in range(SINGLE if self._count == 1 else 1)]
        shared, rows = (torch.cat(parts) for parts in zip(*runs, strict=True))
        return math.sqrt(max((_upper(shared) + _upper(rows)).item(), 0.0))

    def _ratios(
        self, first: Tensor, second: Tensor, seed: int
    ) -> tuple[Float[Tensor, "draws 1"], Float[Tensor, "draws rows"]]:
        """Return log q₁/q₂ at draws of q₁ plus log q₂/q₁ at draws of q₂: of latents that all rows share, and by row."""
        shared = torch.zeros(self._count, 1, dtype=torch.float64)
        rows = torch.zeros(self._count, self._rows.size if self._rows else 1, dtype=torch.float64)
        with SameRows():
            for one, two in ((first, second), (second, first)):
                drawn = self._run(one, seed)
                again = self._run(two, seed, {name: site.value for name, site in drawn.items()})
                for name, site in drawn.items():
                    ratio = site.log_q - again[name].log_q
                    if self._rows in site.plates:
                        rows += ratio.movedim(self._rows.dim, 1).reshape(*rows.shape, -1).sum(-1)
                    else:
                        shared += ratio.reshape(self._count, -1).sum(-1, keepdim=True)
        return shared, rows

    def _run(self, parameters: Tensor, seed: int, replay: Mapping[str, Tensor] | None = None) -> dict[str, _Drawn]:
        """Run the guide alone, and evaluate its densities while it has these parameters."""
        self._write(parameters)
        with _undisturbed(seed):
            sites = trace_program(self._guide, self._args, self._kwargs, replay, self._count, self._nesting)
            return {
                name: _Drawn(site.value, align(site.log_prob().double().cpu(), self._count, self._nesting), site.plates)
                for name, site in sites.items()
                if site.is_drawn
            }

    def _vectorizes(self) -> bool:
        try:
            with _undisturbed(0), evaluating(self._guide):
                sites = trace_program(self._guide, self._args, self._kwargs, None, VECTORIZED, self._nesting)
                return all(_draws(site.log_prob(), self._nesting) in (1, VECTORIZED) for site in sites.values())
        except Exception:  # single runs raise it again if the guide itself is at fault
            return False


@contextmanager
def _undisturbed(seed: int) -> Iterator[None]:
    with torch.no_grad(), seeded(seed):
        yield


def _draws(x: Tensor, nesting: int) -> int:
    return x.shape[0] if x.dim() > nesting else 1


def _upper(x: Float[Tensor, "draws rows"]) -> Float[Tensor, ""]:
    """Return the largest mean over rows, with two standard errors on top."""
    return (x.mean(0) + 2 * x.std(0) / len(x) ** 0.5).amax()


def _check_densities(pair: TracePair, other: TracePair) -> None:
    """Raise GuideError unless every latent has a density in the guide; the runs have different draws."""
    latents = {
        name: torch.stack([site.value, other.model[name].value])
        for name, site in pair.model.items()
        if site.role == "latent" and name in pair.guide  # what is summed out follows from the others
    }
    if not latents:
        raise GuideError(
            "The guide draws no latent, so that no posterior can have moved: convergence is judged by the KL between "
            "guides. Train maximum likelihood with svi.run and watch its losses."
        )
    if (error := find_point_error(latents, pair)) is not None:
        raise GuideError(f"Convergence is judged by the KL between guides, which needs densities. {error}") from error
