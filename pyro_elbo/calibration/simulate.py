"""Draw the latents of a model from its prior, and data from the model, in the place of the data in its arguments."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_elbo.errors import ArgumentError, SiteError, first_line
from pyro_elbo.posterior import lead
from pyro_elbo.programs import (
    Plate,
    Program,
    ResampleObserved,
    Site,
    evaluating,
    fixed_sites,
    read_data,
    seeded,
    sort_by_dim,
    trace_program,
)
from pyro_elbo.sequences import StackedDistribution


class Simulation(NamedTuple):
    """True values, shaped like the plates and the event, the data as arguments, and log p(data | truth) in nats."""

    truth: dict[str, Tensor]
    args: tuple
    kwargs: dict[str, Any]
    log_likelihood: Tensor


@dataclass(frozen=True)
class Simulator:
    """Simulates a model.

    Attributes:
        args, kwargs: arguments of the model; where they hold data, simulations hold theirs.
        places: for every observed site, the leaves of the arguments that it observes.
        quantities: the latents of the model, and its deterministics.
        latents: the latents among them.
        plates, times: the plates and the name of the dimension of time of each quantity.
    """

    model: Program
    args: tuple
    kwargs: Mapping[str, Any]
    places: dict[str, tuple[int, ...]]
    quantities: tuple[str, ...]
    latents: tuple[str, ...]
    plates: dict[str, tuple[Plate, ...]]
    times: dict[str, str]

    def __call__(self, seed: int) -> Simulation:
        """Simulate once."""
        sites = _run(self.model, self.args, self.kwargs, seed, self.places)
        leaves, spec = pytree.tree_flatten((self.args, dict(self.kwargs)))
        for name, places in self.places.items():
            for i in places:
                leaves[i] = _like(sites[name].value, leaves[i], name)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        truth = {n: lead(x := sites[n].value, x.shape, 1, sites[n])[0].clone() for n in self.quantities}
        with torch.no_grad(), evaluating(self.model):
            density = sum(sites[n].log_prob().double().sum() for n in self.places)
        return Simulation(truth, args, kwargs, torch.as_tensor(density))


def make_simulator(model: Program, args: tuple, kwargs: Mapping[str, Any], seed: int) -> Simulator:
    """Find out what a model observes, and refuse models that do not generate their data.

    Raises:
        ArgumentError: a prior or a likelihood cannot be sampled, or an observed site is not one of the arguments.
        SiteError: a subsample, a scale, a factor or a conditioned site; no latent or no data.
    """
    sites = _run(model, args, kwargs, seed, ())
    _check_generative(sites)
    observed = [name for name, site in sites.items() if site.role == "observed"]
    quantities = tuple(name for name, site in sites.items() if site.role in ("latent", "deterministic"))
    latents = tuple(name for name in quantities if sites[name].role == "latent")
    if not observed or not latents:
        raise SiteError(
            f"Calibration needs latents and data, and the model draws {list(latents)} and observes {observed}. Give "
            "the model its data as arguments, as for a fit."
        )
    with torch.no_grad(), seeded(seed), evaluating(model):
        data = read_data(model, _no_guide, args, kwargs).observed
    leaves, _ = pytree.tree_flatten((args, dict(kwargs)))
    places = {name: _find(name, data[name], leaves) for name in observed}
    simulator = Simulator(
        model,
        args,
        kwargs,
        places,
        quantities,
        latents,
        plates={n: sort_by_dim(sites[n].plates) for n in quantities},
        times={n: s.fn.run.time for n in quantities if isinstance((s := sites[n]).fn, StackedDistribution)},
    )
    _check_arrives(simulator, seed)
    return simulator


def _no_guide(*_: Any, **__: Any) -> None:
    """Draw nothing: the model draws from its prior."""


def _run(model: Program, args: tuple, kwargs: Mapping[str, Any], seed: int, resampled: Any) -> dict[str, Site]:
    """Run the model with latents from the prior; the named observed sites are drawn too."""
    drawing = ResampleObserved(tuple(resampled))
    try:
        with torch.no_grad(), seeded(seed), evaluating(model):
            return trace_program(drawing(model), args, kwargs)
    except NotImplementedError as error:
        site = f"site '{drawing.current}'" if drawing.current else "a prior"
        raise ArgumentError(
            f"The model cannot be simulated: {site} cannot be sampled ({first_line(error)}). Give every latent a "
            "proper prior, and every observed site a distribution with a sampler."
        ) from error


def _check_generative(sites: Mapping[str, Site]) -> None:
    """Refuse models whose posterior is not that of the data which they simulate."""
    fixed = fixed_sites(sites.values())
    for name, site in sites.items():
        part = next((p for p in site.plates if p.size < p.full_size), None)
        if part is not None:
            raise SiteError(
                f"Site '{name}': plate '{part.name}' takes {part.size} of its {part.full_size} rows, and the posterior "
                "is that of all rows. Give the model all rows, without a subsample."
            )
        if site.role == "factor" or (site.role == "constant" and name not in fixed):
            kind = "pyro.factor" if site.role == "factor" else "poutine.condition"
            raise SiteError(
                f"Site '{name}' ({kind}) changes the posterior, but not the simulated data. Use a model in which every "
                "term is a prior or the likelihood of an argument."
            )
        if bool((torch.as_tensor(site.scale) != 1).any()):
            raise SiteError(
                f"Site '{name}' has the scale {site.scale}: its posterior is not that of the data which the model "
                "simulates. Use the model without poutine.scale."
            )


def _find(name: str, value: Tensor, leaves: list[Any]) -> tuple[int, ...]:
    """Return which leaves of the arguments are the value of an observed site: the same tensor, or one of its values."""
    tensors = {i: x for i, x in enumerate(leaves) if isinstance(x, Tensor)}
    if same := tuple(i for i, x in tensors.items() if x is value):
        return same
    equal = [i for i, x in tensors.items() if x.shape == value.shape and bool(((x == value) | x.isnan()).all())]
    if len(equal) == 1:
        return tuple(equal)
    raise ArgumentError(
        f"Site '{name}' observes a value of shape {tuple(value.shape)} that is "
        f"{'none' if not equal else 'more than one'} of the arguments, so that simulated data have no place. Pass the "
        f"observed tensor itself to the model: pyro.sample('{name}', ..., obs=y)."
    )


def _like(value: Tensor, old: Tensor, name: str) -> Tensor:
    """Return simulated data in the dtype and shape of the data in whose place they are."""
    new = value.to(old.dtype)
    if value.shape != old.shape or not torch.equal(new.to(value.dtype), value) and not old.is_floating_point():
        raise ArgumentError(
            f"Site '{name}' draws {value.dtype} of shape {tuple(value.shape)}, but the argument that it observes is "
            f"{old.dtype} of shape {tuple(old.shape)}. Give an argument like the draws."
        )
    return new


def _check_arrives(simulator: Simulator, seed: int) -> None:
    """Refuse a model that does not observe the data in its arguments as they are."""
    simulated = simulator(seed)
    with torch.no_grad(), seeded(seed), evaluating(simulator.model):
        data = read_data(simulator.model, _no_guide, simulated.args, simulated.kwargs).observed
    leaves, _ = pytree.tree_flatten((simulated.args, simulated.kwargs))
    for name, places in simulator.places.items():
        if not torch.equal(data[name], leaves[places[0]]):
            raise ArgumentError(
                f"Site '{name}' does not observe the data in the arguments as they are. Give the model the observed "
                "tensor itself, and transform it outside."
            )
