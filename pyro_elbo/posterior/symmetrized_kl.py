r"""The symmetrized KL between a guide before and after its parameters moved.

.. math:: J(q_1, q_2) = E_{q_1}[\log q_1 - \log q_2] + E_{q_2}[\log q_2 - \log q_1]

Both expectations are taken over the same noise. The sum then has no variance at all where a location moves, and little
where a scale does.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_elbo.errors import GuideError
from pyro_elbo.posterior.weights import align, find_point_error
from pyro_elbo.programs import (
    Program,
    SameRows,
    Site,
    TracePair,
    evaluating,
    seeded,
    shared_plate,
    trace_program,
)

VECTORIZED, SINGLE = 256, 32  # draws, in one run of the guide or in one run each
KEPT = 3  # runs of the guide that are not repeated


class _Run(NamedTuple):
    """A run of the guide: the sites that it draws, and their log densities (draws, then batch dimensions)."""

    parameters: Tensor
    sites: dict[str, Site]
    log_q: dict[str, Tensor]


class SymmetrizedKL:
    """Root of the symmetrized KL between a guide at two parameter vectors.

    If a mean moves by a standard deviations, and nothing else, the root is a. Latents inside the plate of the data
    count row by row: the row that moved most is added to the latents that all rows share.

    A guide whose distributions do not depend on what it draws runs once for each vector, which must not change then.
    Any other guide runs again at the draws of the other vector.

    Args:
        guide, args, kwargs: the guide and its data.
        runs: two runs of model and guide, with different draws for the same rows.
        write: gives the guide the parameters of a vector.

    Raises:
        GuideError: the guide draws nothing, or is a point estimate in some latent.
    """

    def __init__(
        self,
        guide: Program,
        args: tuple,
        kwargs: Mapping[str, Any],
        runs: tuple[TracePair, TracePair],
        write: Callable[[Tensor], None],
    ) -> None:
        _check_densities(*runs)
        self._guide, self._args, self._kwargs, self._write = guide, args, kwargs, write
        self._rows = shared_plate(s.plates for s in runs[0].model.values() if s.role == "observed")
        self._nesting, self._same_rows, self._known = runs[0].nesting, SameRows(), list[_Run]()
        self._count, self._runs_once = self._ways()

    def __call__(self, first: Tensor, second: Tensor) -> float:
        """Return the root of J plus twice its standard error; the guide has one of the vectors afterwards."""
        with evaluating(self._guide) as modules:
            runs = [self._ratios(first, second, seed) for seed in range(SINGLE if self._count == 1 else 1)]
        if any(True for module in modules for _ in module.buffers()):
            self._known.clear()  # training moves buffers
        shared, rows = (torch.cat(parts) for parts in zip(*runs, strict=True))
        return math.sqrt(max((_upper(shared) + _upper(rows)).item(), 0.0))

    def _ratios(
        self, first: Tensor, second: Tensor, seed: int
    ) -> tuple[Float[Tensor, "draws 1"], Float[Tensor, "draws rows"]]:
        """Return log q₁/q₂ at draws of q₁ plus log q₂/q₁ at draws of q₂: of latents that all rows share, and by row."""
        shared = torch.zeros(self._count, 1, dtype=torch.float64)
        rows = torch.zeros(self._count, self._rows.size if self._rows else 1, dtype=torch.float64)
        with self._same_rows if self._runs_once else SameRows():
            for one, two in ((first, second), (second, first)):
                drawn = self._run(one, seed)
                other = self._log_q(two, drawn.sites, seed)
                for name, site in drawn.sites.items():
                    ratio = drawn.log_q[name] - other[name]
                    if self._rows in site.plates:
                        rows += ratio.movedim(self._rows.dim, 1).reshape(*rows.shape, -1).sum(-1)
                    else:
                        shared += ratio.reshape(self._count, -1).sum(-1, keepdim=True)
        return shared, rows

    def _log_q(self, parameters: Tensor, drawn: Mapping[str, Site], seed: int) -> dict[str, Tensor]:
        """Return the log densities of draws, under other parameters than those that they were drawn with."""
        if not self._runs_once:
            return self._run(parameters, seed, {name: site.value for name, site in drawn.items()}).log_q
        sites = self._run(parameters, seed).sites
        self._write(parameters)  # with which the distributions may share memory
        with torch.no_grad():
            return self._densities({name: replace(sites[name], value=site.value) for name, site in drawn.items()})

    def _run(self, parameters: Tensor, seed: int, replay: Mapping[str, Tensor] | None = None) -> _Run:
        """Run the guide alone, and evaluate its densities while it has these parameters."""
        known = next((run for run in self._known if run.parameters is parameters), None)
        if known is not None:
            return known
        self._write(parameters)
        with _undisturbed(seed):
            sites = trace_program(self._guide, self._args, self._kwargs, replay, self._count, self._nesting)
            drawn = {name: site for name, site in sites.items() if site.is_drawn}
            run = _Run(parameters, drawn, self._densities(drawn))
        if self._runs_once:
            self._known = [*self._known[1 - KEPT :], run]
        return run

    def _densities(self, sites: Mapping[str, Site]) -> dict[str, Tensor]:
        return {n: align(s.log_prob().double().cpu(), self._count, self._nesting) for n, s in sites.items()}

    def _ways(self) -> tuple[int, bool]:
        """Return how many draws a run of the guide can make, and whether their distributions are always the same."""
        try:
            with _undisturbed(0), evaluating(self._guide), self._same_rows:
                sites = trace_program(self._guide, self._args, self._kwargs, None, VECTORIZED, self._nesting).values()
                if any(_draws(site.log_prob(), self._nesting) not in (1, VECTORIZED) for site in sites):
                    return 1, False
                return VECTORIZED, all(_is_constant(site, self._nesting) for site in sites if site.is_drawn)
        except Exception:  # single runs raise it again if the guide itself is at fault
            return 1, False


@contextmanager
def _undisturbed(seed: int) -> Iterator[None]:
    with torch.no_grad(), seeded(seed):
        yield


def _draws(x: Tensor, nesting: int) -> int:
    return x.shape[0] if x.dim() > nesting else 1


def _is_constant(site: Site, nesting: int) -> bool:
    """Return whether all draws of a site have the same distribution: one value has the same density under each."""
    if _draws(site.log_prob(), nesting) == 1:
        return True
    x = replace(site, value=site.value[:1]).log_prob()
    return torch.allclose(x, x[:1].expand_as(x))


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
