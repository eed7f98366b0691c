"""Stack the terms of several runs of the programs: particles drawn in a loop."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_elbo.assumptions import NotAlikeError
from pyro_elbo.errors import SiteError
from pyro_elbo.terms.term import Term


def stack_particles(runs: list[dict[str, Term]]) -> tuple[dict[str, Term], int | None]:
    """Stack the terms of several runs: particles become a dimension on the left of all plates.

    A site contributes nothing to the runs that lack it.

    Raises:
        SiteError: a plate or an event of a site changes from run to run.
    """
    if len(runs) == 1:
        return runs[0], None
    depth = max((t.nats.dim() for run in runs for t in run.values()), default=0)
    union = {name: term for run in runs for name, term in run.items()}
    return {name: _merge([run.get(name) for run in runs], depth) for name in union}, -(depth + 1)


def map_particles(
    loop: Callable[[Callable[[], list[Tensor]], int], list[Tensor]], run: Callable[[], dict[str, Term]], count: int
) -> tuple[dict[str, Term], int]:
    """Evaluate the terms of all particles in one run that a capture repeats: as :func:`stack_particles` of ``count``.

    Args:
        loop: returns the stacked results of ``count`` runs of a function, which runs only once.
        run: evaluates the terms of one particle.
        count: the number of particles.

    Raises:
        NotAlikeError: the terms hold more than tensors that can be stacked.
    """
    found: dict[str, Term] = {}

    def tensors() -> list[Tensor]:
        found.update(run())
        results: list[Tensor] = []

        def keep(make: Callable[[], Tensor], dims: int) -> Tensor:
            x = make()
            results.append(x.expand(torch.broadcast_shapes((1,) * dims, x.shape)))
            return x

        for term in found.values():
            _map_tensors(term, keep, depth())
        return results

    def depth() -> int:
        return max((t.nats.dim() for t in found.values()), default=0)

    stacked = iter(loop(tensors, count))
    sites = {name: _map_tensors(term, lambda *_: next(stacked), depth()) for name, term in found.items()}
    return sites, -(depth() + 1)


def _map_tensors(term: Term, function: Callable[[Callable[[], Tensor], int], Tensor], dims: int) -> Term:
    """Replace each tensor of a term by a function of what makes it, and of its number of batch and event dimensions."""
    if isinstance(term.scale, Tensor) or isinstance(term.mask, Tensor):
        raise NotAlikeError(f"site '{term.name}' has a scale or a mask per row")
    if term.posterior is not None or term.averaged is not None or term.expected:
        raise NotAlikeError(f"site '{term.name}' is summed out")
    if any(site.baseline is not None for site in term.draws):
        raise NotAlikeError(f"site '{term.name}' has a baseline")

    def mapped(x: Tensor | None) -> Any:
        return None if x is None else function(lambda: x, dims)

    per_dim = None if term.per_dim is None else function(term.per_dim, dims + len(term.event_shape))
    return replace(
        term,
        nats=mapped(term.nats),
        score=mapped(term.score),
        direct=mapped(term.direct),
        per_dim=None if per_dim is None else lambda: per_dim,
        steps=None if term.steps is None else _map_tensors(term.steps, function, dims + 1),
    )


def _merge(runs: Sequence[Term | None], depth: int) -> Term:
    """Stack one site's terms of several runs, with particles at dimension -(depth + 1)."""
    found = [t for t in runs if t is not None]
    term = found[0]
    for other in found:
        _check_alike(term, other)

    def stack(tensors: Iterable[Tensor | None], event_dim: int = 0) -> Tensor:
        tensors = list(tensors)
        like = next(x for x in tensors if x is not None)
        parts = [torch.zeros_like(like) if x is None else x for x in tensors]
        shape = torch.broadcast_shapes((1,) * (depth + event_dim), *(x.shape for x in parts))
        return torch.stack([x.expand(shape) for x in parts])

    def factor(values: Sequence[Any], default: Any) -> Any:
        """Return the scale or mask that all runs share, else one per particle."""
        if (
            all(x is values[0] for x in values)
            or not any(isinstance(x, Tensor) for x in values)
            and len({*values}) == 1
        ):
            return values[0]
        like = next((x for x in values if isinstance(x, Tensor)), term.nats)
        dtype = torch.bool if isinstance(default, bool) else term.nats.dtype
        given = [default if x is None else x for x in values]
        return stack([torch.as_tensor(x, dtype=dtype, device=like.device) for x in given])

    per_dim = averaged = None
    if all(t.averaged is not None for t in found):
        averaged = lambda: stack((t and t.averaged and t.averaged() for t in runs), 1)  # noqa: E731
    if all(t.per_dim is not None for t in found):
        per_dim = lambda: stack([t and t.per_dim and t.per_dim() for t in runs], len(term.event_shape))  # noqa: E731
    return replace(
        term,
        scale=factor([term.scale if t is None else t.scale for t in runs], 1.0),
        mask=factor([term.mask if t is None else t.mask for t in runs], True),
        nats=stack(t and t.nats for t in runs),
        is_analytic=all(t.is_analytic for t in found),
        score=None if all(t.score is None for t in found) else stack(t and t.score for t in runs),
        per_dim=per_dim,
        averaged=averaged,
        steps=None if term.steps is None else _merge([t and t.steps for t in runs], depth + 1),
        draws=tuple(site for t in found for site in t.draws),
        joint=any(t.joint for t in found),
        posterior=None if term.posterior is None else stack((t and t.posterior for t in runs), 1),
        expected=any(t.expected for t in found),
    )


def _check_alike(a: Term, b: Term) -> None:
    if (a.kind, set(a.plates), a.event_shape) != (b.kind, set(b.plates), b.event_shape):
        shapes = [f"plates {[(p.name, p.size) for p in t.plates]} and event {tuple(t.event_shape)}" for t in (a, b)]
        raise SiteError(
            f"Site '{a.name}' changes from particle to particle: expected {shapes[0]} as in the first run, got "
            f"{shapes[1]}. Give the site fixed plates and mask the rows that do not count (pyro.poutine.mask), or use "
            "num_particles=1."
        )
