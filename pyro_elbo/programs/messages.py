"""Turn the messages of a Pyro trace into sites.

No other module looks inside the messages of a whole program's trace.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import Distribution

from pyro_elbo.errors import SiteError
from pyro_elbo.masking import unmask
from pyro_elbo.programs.checks import (
    check_batch_shape,
    check_entries,
    check_guide_site,
    check_history,
    check_wide,
    read_baseline,
)
from pyro_elbo.programs.data import observed_tensor
from pyro_elbo.programs.enumeration import FORGOTTEN, TURN
from pyro_elbo.programs.explain import PARTICLE_PLATE
from pyro_elbo.programs.precision import in_full, is_mixed
from pyro_elbo.programs.sites import Plate, Site, SiteRole, is_point, shared_plate
from pyro_elbo.sequences import StackedDistribution, fill_masked, is_subsample

Message = Any
Variables = Mapping[int, tuple[str, int]]
NO_VARIABLES: Variables = {}


class Recorder(poutine.trace_messenger.TraceMessenger):
    """Record a trace in full precision, and the names of the sites that ``poutine.condition`` observes."""

    def __init__(self) -> None:
        super().__init__()
        self.conditioned: set[str] = set()

    def _pyro_sample(self, msg: Message) -> None:
        if is_mixed():
            msg["fn"] = in_full(msg["fn"])

    def _pyro_post_sample(self, msg: Message) -> None:
        super()._pyro_post_sample(msg)
        if msg["is_observed"] and any(isinstance(h, ConditionMessenger) and msg["name"] in h.data for h in _PYRO_STACK):
            self.conditioned.add(msg["name"])


class GivenRows(poutine.messenger.Messenger):
    """Record the rows that a program gives to its plates (``subsample=``), before a replay replaces them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Message) -> None:
        if is_subsample(msg) and msg["value"] is not None:
            self.rows[msg["name"]] = torch.as_tensor(msg["value"])


def read_guide(trace: poutine.Trace, model: Mapping[str, Site], variables: Variables = NO_VARIABLES) -> dict[str, Site]:
    """Return the sites of a guide by name, in program order: ``latent`` what the model samples too.

    Raises:
        SiteError: a site cannot be part of a guide, or a batch dimension lies in no plate.
    """
    messages = _sample_messages(trace)
    rows = _rows_without_size(messages)
    sites = {}
    for name, message in messages.items():
        site = _read_site(name, message, "latent" if name in model else "auxiliary", rows, variables)
        check_guide_site(site, message["is_observed"], message["infer"], name in model)
        sites[name] = replace(site, baseline=read_baseline(name, site.fn, message["infer"]))
    return sites


def read_model(
    trace: poutine.Trace,
    conditioned: Collection[str] = (),
    latents: Collection[str] = (),
    variables: Variables = NO_VARIABLES,
) -> dict[str, Site]:
    """Return the sites of a program by name, in program order.

    Args:
        trace: one run of the program.
        conditioned: the sites observed by ``poutine.condition``: they are no data where they lie outside the plate
            of the data.
        latents: observed sites that are ``latent`` nevertheless.
        variables: the enumerated variables of the run: name and number of values, by identifier.

    Raises:
        SiteError: a batch dimension lies in no plate.
    """
    messages = _sample_messages(trace)
    rows = _rows_without_size(messages)
    sites = {n: _read_site(n, m, _model_role(n, m, latents), rows, variables) for n, m in messages.items()}
    return _mark_constants(sites, conditioned)


def enumerated_sites(trace: poutine.Trace) -> dict[str, Any]:
    """Return the marks of the sites that are marked for enumeration."""
    return {name: mark for name, m in _sample_messages(trace).items() if (mark := m["infer"].get("enumerate"))}


def plate_nesting(trace: poutine.Trace) -> int:
    """Return the number of batch dimensions that the plates use, without that of the particles."""
    frames = [f for m in _sample_messages(trace).values() for f in _vectorized(m)]
    return max((-f.dim for f in frames if f.name != PARTICLE_PLATE), default=0)


def _sample_messages(trace: poutine.Trace) -> dict[str, Message]:
    nodes: dict[str, Any] = dict(trace.nodes)
    return {n: m for n, m in nodes.items() if m["type"] == "sample" and not is_subsample(m)}


def _model_role(name: str, message: Message, latents: Collection[str]) -> SiteRole:
    if name in latents:
        return "latent"
    fn = message["fn"]
    if isinstance(fn.steps if isinstance(fn, StackedDistribution) else fn, Unit):
        return "factor"
    if message["is_observed"]:
        return "deterministic" if is_point(message["fn"]) else "observed"
    return "latent"


def _mark_constants(sites: dict[str, Site], conditioned: Collection[str]) -> dict[str, Site]:
    """Give conditioned sites outside the plate of the data their role: no datum, but ``constant``."""
    observed = [s for s in sites.values() if s.role == "observed"]
    plate = shared_plate([s.plates for s in observed if s.name not in conditioned] or [s.plates for s in observed])
    if plate is None:
        return sites
    known = {s.name for s in observed if s.name in conditioned and plate not in s.plates}
    return {name: replace(site, role="constant") if name in known else site for name, site in sites.items()}


def _read_site(
    name: str, message: Message, role: SiteRole, rows: Mapping[str, int], variables: Variables = NO_VARIABLES
) -> Site:
    fn, mask = unmask(message["fn"], message["mask"])
    value = message["value"]
    if message["infer"].get("_deterministic"):
        role = "deterministic"
    if message["is_observed"]:
        value = fill_masked(fn, observed_tensor(value, name), mask)
    frames = _vectorized(message)
    sizes = {f.dim: rows[f.name] if f.size == -1 else int(f.size) for f in frames}
    shape = batch_shape(fn, value)
    plates = []
    for f in frames:
        size = sizes[f.dim]
        if f.name == PARTICLE_PLATE:
            continue
        if f.size == -1 and role != "deterministic" and (len(shape) < -f.dim or shape[f.dim] < size):
            sizes[f.dim] = 1  # a site that all rows of the plate share
        else:
            plates.append(Plate(f.name, f.dim, size, size if f.size == -1 else int(f.full_size or f.size)))
    leftmost = min((p.dim for p in plates), default=0)
    undeclared = [d for d in range(leftmost, 0) if d not in sizes and _size_at(shape, d) > 1]
    for i, d in enumerate(undeclared):
        sizes[d] = _size_at(shape, d)
        plates.append(Plate(f"{name}_rows_{i}", d, sizes[d], sizes[d]))
    behind = {d: variables[i] for d, i in message["infer"].get("_dim_to_id", {}).items() if i in variables}
    names, enum_dim = {d: v for d, (v, _) in behind.items()}, message["infer"].get("_enumerate_dim")
    marked = bool(message["infer"].get("enumerate"))
    turn = message["infer"].get(TURN) if role == "latent" or role == "auxiliary" else None
    enumeration: dict[str, Any] = {"variables": names, "enum_dim": enum_dim, "marked": marked, "turn": turn}
    site = Site(name, role, fn, value, tuple(plates), message["scale"], mask, **enumeration)
    sizes |= {d: size for d, (_, size) in behind.items()}
    if behind:
        check_entries(name, shape, list(names.values()))
        check_history(site, shape, message["infer"].get(FORGOTTEN, {}))
    check_batch_shape(site, sizes, undeclared)
    check_wide(site, sizes)
    return site


def batch_shape(fn: Distribution, value: Tensor) -> torch.Size:
    """Return the shape of the log density of ``value``."""
    value_batch = value.shape[: value.dim() - len(fn.event_shape)]
    if value_batch == fn.batch_shape:
        return value_batch
    try:
        return torch.broadcast_shapes(fn.batch_shape, value_batch)
    except RuntimeError:  # log_prob fails with a better message
        return torch.Size(fn.batch_shape)


def _vectorized(message: Message) -> list[Any]:
    return [f for f in message["cond_indep_stack"] if f.dim is not None]


def _size_at(shape: torch.Size, dim: int) -> int:
    return shape[dim] if len(shape) >= -dim else 1


def _rows_without_size(messages: Mapping[str, Message]) -> dict[str, int]:
    """Return the rows of each ``pyro.plate(name)`` without a size, read off the shapes of its sites.

    Raises:
        SiteError: two sites have different numbers of rows there.
    """
    found: dict[str, tuple[int, str]] = {}
    for name, message in messages.items():
        for f in _vectorized(message):
            if f.size != -1:
                continue
            n = _size_at(batch_shape(message["fn"], observed_tensor(message["value"], name)), f.dim)
            rows, other = found.get(f.name, (1, name))
            if n != 1 and rows not in (1, n):
                raise SiteError(
                    f"Site '{name}': plate '{f.name}' has no size; expected {rows} rows as at site '{other}', got {n}. "
                    "Give both sites the same rows, or their own plates."
                )
            found[f.name] = (n, name) if n > rows or f.name not in found else (rows, other)
    return {plate: rows for plate, (rows, _) in found.items()}
