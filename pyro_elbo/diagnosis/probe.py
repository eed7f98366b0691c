r"""The probe of a fit: what the bound does not show, measured on a few rows while training goes on.

Per unit of a local latent its KL, and whether it is active; per local latent two estimates of :math:`I_q(z; x)`; the
distortion of rows that exchange their latents; and the gradient's size beside its noise. Of what is enumerated, and of
what the guide draws given it, there is the KL alone. With gradients g, g' of two
independent batches,

.. math:: |E g|^2 = E\, g \cdot g', \qquad \mathrm{tr}\,\mathrm{Var}(g) = \tfrac12\, E\,|g - g'|^2.

The programs run in Python, in evaluation mode and with the same noise every time. Parameters, buffers, modes,
gradients and the caller's random stream stay as they were.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_elbo.diagnosis.activity import threshold, variance_of_means
from pyro_elbo.information import PenaltyContext, information_on_data
from pyro_elbo.objectives import TraceBeta_ELBO
from pyro_elbo.programs import Plate, Program, SameRows, Site, evaluating, is_point, seeded, trace_program
from pyro_elbo.sequences import StackedDistribution
from pyro_elbo.terms import Term, Terms

MAX_ROWS = 250
MAX_UNITS = 256  # of a latent; larger ones are judged as a whole
Call = tuple[tuple, dict[str, Any]]
ProbeRecord = dict[str, Any]  # plain numbers, so that a checkpoint can hold them


class ProbeData(NamedTuple):
    """Arguments of the programs: two training batches (one twice, where there is only one), a validation batch."""

    train: tuple[Call, Call]
    valid: Call | None


@dataclass(frozen=True)
class Probe:
    """A measurement of the programs on the same rows with the same noise.

    Attributes:
        model, guide, loss: what is trained.
        parameters: the tensors that are trained.
        data: the rows.
        seed: seed of the noise.
        cost: training steps that a measurement takes; see :func:`cost_in_steps`.
    """

    model: Program
    guide: Program
    loss: TraceBeta_ELBO
    parameters: Sequence[Tensor]
    data: ProbeData
    seed: int
    cost: float = 4.0

    def __call__(self, move: Callable[[ProbeData], ProbeData] = lambda data: data) -> dict[str, ProbeRecord]:
        """Measure the programs as they are and return a record for each split; ``move`` brings rows to a device."""
        data = move(self.data)
        calls = {"train": data.train[0]} | ({} if data.valid is None else {"valid": data.valid})
        with seeded(self.seed), evaluating(self.model, self.guide):
            found = {split: _if_possible(self._rows, call) for split, call in calls.items()}
            found["train"] |= _if_possible(self._gradient, data.train)
        return found

    def _rows(self, call: Call) -> ProbeRecord:
        """Measure the latents of one batch; two draws of each tell noise from activity."""
        plain = TraceBeta_ELBO(kl=self.loss.kl, num_particles=2)
        with torch.no_grad(), SameRows():
            terms = plain.checked_terms(self.model, self.guide, *call)
            plate = terms.data_plate
            local = local_latents(terms)
            if plate is None or not local:
                return {}
            drawn = [name for name in local if terms.sites[name].draws]
            kl = {name: _kl_per_dim(terms, name) for name in local}
            record: ProbeRecord = {
                "kl_per_dim": {unit: x for of_latent in kl.values() for unit, x in of_latent.items()},
                "unit_latent": {unit: name for name, of_latent in kl.items() for unit in of_latent},
            }
            for figure, measure in (("active_units", _count_active), ("information", _information)):
                record[figure] = {n: x for n in drawn if (x := _if_possible(measure, terms, call, n, plate)) != {}}
            return record | _if_possible(self._exchange, terms, call, plate)

    def _exchange(self, terms: Terms, call: Call, plate: Plate) -> ProbeRecord:
        """Return the distortion of the rows under their own latents, and under those of other rows."""
        if any(not t.draws for t in terms.sites.values() if t.kind == "latent"):
            return {}  # a latent that is enumerated has no value to exchange
        drawn = {name: t.draws[0].value for name, t in terms.sites.items() if t.kind == "latent"}
        moved = {name: _exchanged(terms.sites[name], plate, value) for name, value in drawn.items()}
        own, swapped = (self._distortion(call, values) / terms.num_data for values in (drawn, moved))
        return {"own_distortion": own, "swapped_distortion": swapped}

    def _distortion(self, call: Call, latents: Mapping[str, Tensor]) -> float:
        sites = trace_program(self.model, *call, latents).values()
        return -sum((s.log_prob() * s.scale).sum().item() for s in sites if s.role in ("observed", "factor"))

    def _gradient(self, calls: tuple[Call, Call]) -> ProbeRecord:
        """Return the norm of the objective's expected gradient, per datum, and the gradient's standard deviation."""
        first, second = (self._gradients(call) for call in calls)
        signal = sum(torch.sum(a * b).item() for a, b in zip(first, second, strict=True))
        noise = sum(torch.sum((a - b).square()).item() for a, b in zip(first, second, strict=True)) / 2
        return {"gradient_norm": max(signal, 0.0) ** 0.5, "gradient_noise": noise**0.5}

    def _gradients(self, call: Call) -> list[Tensor]:
        with torch.enable_grad():
            objective = self.loss.checked_terms(self.model, self.guide, *call).per_datum.objective
            parameters = [p for p in self.parameters if p.requires_grad]
            found = torch.autograd.grad(objective, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def _if_possible(measure: Callable[..., Any], *args: Any) -> Any:
    """Return a figure, or an empty record where the programs do not allow it: training goes on without it."""
    try:
        return measure(*args)
    except Exception:  # a density at other rows' draws, a mean, values in eval mode: programs fail in many ways
        return {}


def cost_in_steps(batch: int, train: int, valid: int, particles: int) -> float:
    """Return the training steps that a probe takes, counted in rows that pass through both programs.

    A step passes ``batch`` rows for each particle, and a backward pass counts twice. A probe passes the rows of both
    splits twice, and twice more through the model alone; the gradients of two batches are those of two steps.

    Example:
        >>> cost_in_steps(100, 100, 100, 1), cost_in_steps(100, 100, 5000, 1)
        (4.0, 53.0)
    """
    return (3 * (train + valid) + 6 * particles * train) / (3 * particles * batch)


def are_local(terms: Terms) -> bool:
    """Return whether every latent belongs to one row of the data."""
    return terms.data_plate is not None and all(terms.data_plate in t.plates for t in terms.sites.values() if t.is_kl)


def local_latents(terms: Terms) -> list[str]:
    """Return the latents that have a value for each row of the data and a KL of their own."""
    plate = terms.data_plate
    return [n for n, t in terms.sites.items() if t.kind == "latent" and plate in t.plates and not t.joint]


def _kl_per_dim(terms: Terms, name: str) -> dict[str, float]:
    """Return the KL of each unit in nats per datum; nothing where it does not factorize."""
    term, x = terms.sites[name], terms.kl_per_dim.get(name)
    shape = (term.steps or term).event_shape
    if x is None or shape.numel() > MAX_UNITS:
        return {}
    scale = torch.as_tensor(term.scale, dtype=torch.float64).mean().item()
    values = x.reshape(-1, shape.numel()).sum(0) * scale / terms.num_data
    units = itertools.product(*(range(n) for n in shape))
    labels = [f"{name}[{','.join(map(str, unit))}]" if unit else name for unit in units]
    return dict(zip(labels, values.tolist(), strict=True))


def _count_active(terms: Terms, call: Call, name: str, plate: Plate) -> float:
    """Count the units whose posterior mean varies with the rows, from the means given a draw of the other latents."""
    sites = terms.sites[name].draws
    has_time = isinstance(sites[0].fn, StackedDistribution)
    means = torch.stack([_means(site.stepwise(), plate.name, has_time) for site in sites])
    spread = variance_of_means(means.double(), has_time)
    if not spread.isfinite().all():
        raise ValueError("the posterior has no mean")
    return float((spread > threshold(terms.sites[name]).to(spread)).sum())


def _means(site: Site, plate: str, has_time: bool) -> Float[Tensor, "rows *rest"]:
    """Return the guide's means of a site, rows first, then time if it has one; NaN where a step does not count."""
    if is_point(site.fn):
        raise ValueError("a point has no mean given the row")
    event, dim = site.event_dim, next(p.dim for p in site.plates if p.name == plate)
    counted = site.mask if isinstance(site.mask, Tensor) else torch.ones((), dtype=torch.bool)
    sizes = [1] * -min(p.dim for p in site.plates)
    for p in site.plates:
        sizes[p.dim] = p.size
    means = site.fn.mean.expand(*torch.broadcast_shapes(site.fn.batch_shape, sizes), *site.fn.event_shape)
    means = means.where(counted.reshape(counted.shape + (1,) * event).to(means.device), torch.nan)
    rows_first = means.movedim(dim - event, 0)
    return rows_first.movedim(-1 - event, 1) if has_time else rows_first


def _information(terms: Terms, call: Call, name: str, plate: Plate) -> list[float]:
    """Return estimates of I_q(z; x) whose expectations lie below and above it, nats per datum.

    With its own density in q(z), a row's information is at most log B; without it, it is too high. The KL is an upper
    bound as well.
    """
    found = information_on_data(PenaltyContext(terms, *call, name, terms.sites[name], plate))
    assert found.low is not None
    assert found.high is not None
    kl = terms.kl_total[name].item() / terms.num_data
    return [found.low.item(), min(found.high.item(), kl)]


def _exchanged(term: Term, plate: Plate, value: Tensor) -> Tensor:
    """Return a latent's values with those of the rows exchanged; one that all rows share stays as it is."""
    if plate not in term.plates:
        return value
    dim = plate.dim - term.draws[0].event_dim
    return value.roll(plate.size // 2, dim) if -dim <= value.dim() else value
