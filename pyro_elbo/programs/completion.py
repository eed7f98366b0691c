"""Run a model given what a guide has drawn so far, and draw further sites where the model has them.

A guide that is itself run inside of plates (of particles) can so draw, one by one, the sites that the model sums out.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from pyro_elbo.masking import both
from pyro_elbo.programs.enumeration import ROOM_FOR_PLATES, Enumerator, separate_dimensions
from pyro_elbo.programs.explain import PARTICLE_PLATE
from pyro_elbo.programs.messages import Recorder, is_subsample
from pyro_elbo.programs.tracing import Program, Traced, TracePair, pair_traces

DrawSite = Callable[[TracePair, str], None]
Record = Callable[[TracePair], Mapping[str, Tensor]]


class _Apart(poutine.messenger.Messenger):
    """Hides the sites inside from all handlers around but the plate of the particles, where draws differ in it."""

    def __init__(self, drawn: poutine.Trace) -> None:
        super().__init__()
        plate = next((h for h in _PYRO_STACK if getattr(h, "name", None) == PARTICLE_PLATE), None)
        self.particles = plate if plate is not None and _differ_along(plate.dim, drawn) else None

    def _process_message(self, msg: Any) -> None:
        if self.particles is not None and msg["type"] == "sample":
            self.particles._process_message(msg)
        msg["stop"] = True


class _Place(NamedTuple):
    """Where a model has a site: its plates, without that of the particles, and its scale and mask there."""

    frames: tuple[Any, ...]
    scale: float | Tensor
    mask: Tensor | bool | None


class _InPlace(poutine.messenger.Messenger):
    def __init__(self, place: _Place) -> None:
        super().__init__()
        self.place = place

    def _pyro_sample(self, msg: Any) -> None:
        msg["cond_indep_stack"] = self.place.frames + msg["cond_indep_stack"]
        msg["scale"] = self.place.scale * msg["scale"]
        msg["mask"] = both(msg["mask"], self.place.mask)


def complete_guide(model: Program, guide: Program, draw: DrawSite, record: Record) -> Program:
    """Return a guide that also draws the sites that the model sums out, each given those before.

    Args:
        model: the model, with sites marked for enumeration that the guide lacks.
        guide: the guide; it marks none itself.
        draw: a program that draws one site of a run from its exact posterior given what is drawn, with the batch
            dimensions of the run.
        record: values to keep as deterministic sites of the guide, from the run before anything is drawn.
    """

    def program(*args: Any, **kwargs: Any) -> Any:
        with poutine.trace() as drawn:
            result = guide(*args, **kwargs)
            pair, places = _trace_given(model, drawn.trace, args, kwargs)
            for name, value in record(pair).items():
                pyro.deterministic(name, value)
            for i, name in enumerate(pair.summed_out):
                if i > 0:
                    pair, places = _trace_given(model, drawn.trace, args, kwargs)
                with _InPlace(places[name]):
                    draw(pair, name)
            return result

    return program


def _differ_along(dim: int, trace: poutine.Trace) -> bool:
    """Return whether some value of a guide extends along a batch dimension."""
    nodes: dict[str, Any] = dict(trace.nodes)
    sites = (m for m in nodes.values() if m["type"] == "sample" and not is_subsample(m))
    shapes = (m["value"].shape[: m["value"].dim() - m["fn"].event_dim] for m in sites)
    return any(len(shape) >= -dim and shape[dim] > 1 for shape in shapes)


def _as_draws(trace: poutine.Trace) -> poutine.Trace:
    """Copy a guide's trace, with the values that handlers gave to its sites as if they were drawn."""
    copied = separate_dimensions(trace)
    nodes: Any = copied.nodes
    for name, message in nodes.items():
        given = message["type"] == "sample" and not isinstance(message["fn"], Unit)
        if given and not message["infer"].get("_deterministic"):
            nodes[name] = message | {"is_observed": False}
    return copied


def _trace_given(
    model: Program, drawn: poutine.Trace, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[TracePair, dict[str, _Place]]:
    """Run the model with the values of a trace, its other marked sites enumerated."""
    apart, drawn = _Apart(drawn), _as_draws(drawn)
    particles = apart.particles
    leftmost = -1 - ROOM_FOR_PLATES if particles is None else particles.dim - 1
    recorder = Recorder()
    with apart, torch.no_grad():
        enumerated = Enumerator(leftmost, given=drawn.nodes)(model)
        recorder(poutine.replay(enumerated, trace=drawn))(*args, **kwargs)
    pair = pair_traces(
        Traced(recorder.trace, recorder.conditioned), Traced(drawn), None if particles is None else particles.dim
    )
    nodes: dict[str, Any] = dict(recorder.trace.nodes)
    frames = {n: tuple(f for f in nodes[n]["cond_indep_stack"] if f.name != PARTICLE_PLATE) for n in pair.summed_out}
    return pair, {n: _Place(frames[n], nodes[n]["scale"], nodes[n]["mask"]) for n in pair.summed_out}
