"""Check programs, the fit of their sites to each other and to plates, and the names of options."""

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_elbo.assumptions import check_or_defer
from pyro_elbo.errors import ArgumentError, GuideError, SiteError, describe
from pyro_elbo.programs.data import signature_of
from pyro_elbo.programs.explain import VINDEX
from pyro_elbo.programs.sites import Baseline, Plate, Site, is_point, source_of
from pyro_elbo.sequences import StackedDistribution

_NOTHING = " Where no latent is left to guide, pass lambda *args, **kwargs: None."


def check_programs(model: Any, guide: Any) -> None:
    """Raise ArgumentError unless model and guide are programs: functions, methods or instances of modules."""
    for role, program in (("model", model), ("guide", guide)):
        _check_program(role, program)


def _check_program(role: str, program: Any) -> None:
    if inspect.isclass(program):
        made = f"{program.__name__}(model)" if role == "guide" else f"{program.__name__}(...)"
        raise ArgumentError(f"{role} must be a program, got the class {program.__name__}. Make one: {made}.")
    if not callable(program) or (isinstance(program, nn.Module) and _lacks_forward(program)):
        raise ArgumentError(
            f"{role} must be a program that can be called, such as a function, a method or a module with forward, "
            f"got {type(program).__name__}.{_NOTHING if program is None and role == 'guide' else ''}"
        )


def _lacks_forward(module: nn.Module) -> bool:
    calls_forward = type(module).__call__ in (nn.Module.__call__, PyroModule.__call__)
    return calls_forward and type(module).forward is nn.Module.forward and "forward" not in vars(module)


def check_batch_shape(site: Site, sizes: Mapping[int, int], undeclared: Sequence[int]) -> None:
    """Raise SiteError for a batch dimension outside all plates, whose entries nobody declared independent.

    Args:
        site: the site, with its plates.
        sizes: the rows of each batch dimension.
        undeclared: the dimensions among them that no plate declares, but that lie between plates.
    """
    for plate in site.plates:
        if plate.size == 0:
            raise SiteError(
                f"Site '{site.name}': plate '{plate.name}' is empty, expected at least one row. Skip empty batches."
            )
    value_batch = site.value.shape[: site.value.dim() - site.event_dim]
    for shape in (site.fn.batch_shape, value_batch):
        dims = range(-len(shape), 0)
        if wrong := {d for d in dims if shape[d] not in (1, sizes.get(d, 1))}:
            expected = tuple(sizes.get(d, 1) for d in range(min(sizes, default=0), 0))
            raise SiteError(
                f"Site '{site.name}': expected batch shape {expected} from its plates "
                f"{[p.name for p in site.plates]}, got {tuple(shape)}. {_cure_of_rows(site, wrong)}"
            )
    if site.role == "observed" and any(len(value_batch) < -d or value_batch[d] < sizes[d] for d in undeclared):
        raise SiteError(
            f"Site '{site.name}': one value of batch shape {tuple(value_batch)} would count several times under "
            f"distributions of batch shape {tuple(site.fn.batch_shape)}. Give both the same shape, or put the extra "
            "dimensions into a pyro.plate."
        )


def _cure_of_rows(site: Site, wrong: Collection[int]) -> str:
    """Return the cure of batch dimensions that are not those of the plates."""
    rows = {p.dim: p.size for p in site.plates}
    if isinstance(site.fn, StackedDistribution) and any(rows.get(d) == site.fn.event_shape[0] for d in wrong):
        return "The first dimension of the data is as long as the plate: pass dim=1 to pe.scan if it is not time."
    if all(d in rows for d in wrong):
        return "Give the data and the plate the same number of rows."
    return (
        "Put the extra dimensions into a pyro.plate, or declare them part of one event with .to_event(n)."
        f"{f' {VINDEX}' if site.variables else ''}"
    )


def check_wide(site: Site, sizes: Mapping[int, int]) -> None:
    """Raise SiteError for a mask or scale with dimensions that the site lacks: it would count several times."""
    for kind, x in (("mask", site.mask), ("scale", site.scale)):
        if isinstance(x, Tensor) and any(n not in (1, sizes.get(d - x.dim(), 1)) for d, n in enumerate(x.shape)):
            expected = tuple(sizes.get(d, 1) for d in range(min(sizes, default=0), 0))
            raise SiteError(
                f"Site '{site.name}': expected a {kind} that broadcasts to its batch shape {expected}, got shape "
                f"{tuple(x.shape)}, which would count the site several times. Put the handler only around the sites "
                "that lie in the plate."
            )


MOST_ENTRIES = 20_000_000
"""Entries of one log density over the values of enumerated sites: 160 megabytes in double precision."""


def check_entries(name: str, shape: Sequence[int], variables: Sequence[str]) -> None:
    """Raise SiteError for a density over so many enumerated values that memory would not hold it."""
    if variables and math.prod(shape) > MOST_ENTRIES:
        raise SiteError(
            f"Site '{name}': its log density has {math.prod(shape):,} entries, shape {tuple(shape)}, over the values "
            f"of {list(variables)} that are summed out; expected at most {MOST_ENTRIES:,}. Take fewer rows at once, or "
            "write a chain as a pyro.markov loop, or draw some of these sites in the guide."
        )


def check_history(site: Site, shape: Sequence[int], forgotten: Mapping[str, int]) -> None:
    """Raise SiteError for a density that depends on a site further back than ``pyro.markov`` keeps.

    Args:
        site: the site.
        shape: of its log density.
        forgotten: how many steps back other sites lie that have a dimension but are out of the history.
    """
    for d, name in site.variables.items():
        if name in forgotten and len(shape) >= -d and shape[d] > 1:
            raise SiteError(
                f"Site '{site.name}' depends on '{name}', which lies {forgotten[name]} steps back in a pyro.markov "
                "loop that keeps fewer: its values would be taken for those of a later site. Write "
                f"pyro.markov(..., history={forgotten[name]})."
            )


def check_guide_site(site: Site, observed: bool, infer: Mapping[str, Any], in_model: bool) -> None:
    """Raise SiteError for a site that a guide must not have, or for a request that no objective here fulfills."""
    if observed and site.role != "deterministic" and not isinstance(site.fn, Unit):
        raise SiteError(
            f"Site '{site.name}' is observed in the guide, where its log density would count as a negative KL. Remove "
            "it from the guide, or give model and guide in this order if they are swapped."
        )
    if infer.get("enumerate") and not site.is_enumerated:
        raise SiteError(
            f"Site '{site.name}' of the guide is marked for enumeration ({infer['enumerate']!r}), which objectives "
            "here do for 'parallel' and 'sequential', and not with the filtering bound nor for a guide that is itself "
            "a handler of Pyro. Mark it 'parallel' (config_enumerate does), remove the mark to draw it with the "
            "score-function gradient, or use pyro.infer.TraceEnum_ELBO."
        )
    if not observed and not in_model and site.role != "deterministic" and not infer.get("is_auxiliary"):
        raise SiteError(
            f"Site '{site.name}' is in the guide but not in the model. Sample it in the model too, or, if it is an "
            "auxiliary variable of the guide, mark it with infer={'is_auxiliary': True}."
        )


_BASELINE = ("nn_baseline", "nn_baseline_input", "baseline_value", "use_decaying_avg_baseline", "baseline_beta")


def read_baseline(name: str, fn: Distribution, infer: Mapping[str, Any]) -> Baseline | None:
    """Return the baseline of a site of the guide, if it asks for one.

    Raises:
        SiteError: its options are unknown, exclude each other, or cannot be kept by a scan.
    """
    options = infer.get("baseline")
    if not options:
        return None
    if not isinstance(options, Mapping):
        raise SiteError(
            f"Site '{name}': expected a baseline as a dict of options, got {describe(options)}. Use "
            'infer={"baseline": {"use_decaying_avg_baseline": True}}.'
        )
    if unknown := sorted(options.keys() - set(_BASELINE)):
        raise SiteError(f"Site '{name}': a baseline has no options {unknown}. Use some of {list(_BASELINE)}.")
    network, value = options.get("nn_baseline"), options.get("baseline_value")
    _check_predictor(name, network, options.get("nn_baseline_input"), value)
    if isinstance(fn, StackedDistribution) and (network is not None or value is not None):
        raise SiteError(
            f"Site '{name}' lies in a pe.scan, whose reward is one number for all steps: no network can predict it "
            "step by step. Use use_decaying_avg_baseline, or gradient='rloo'."
        )
    decay = options.get("baseline_beta", 0.9)
    if not isinstance(decay, int | float) or not 0 <= decay < 1:
        raise SiteError(f"Site '{name}': expected a baseline_beta of 0 or more and below 1, got {decay!r}. Use 0.9.")
    decaying = bool(options.get("use_decaying_avg_baseline", False))
    return Baseline(network, options.get("nn_baseline_input"), value, decaying, decay)


def _check_predictor(name: str, network: Any, given: Any, value: Any) -> None:
    """Raise SiteError unless a baseline predicts by a network and its input, or by a tensor, or not at all."""
    if network is not None and value is not None:
        raise SiteError(f"Site '{name}': nn_baseline and baseline_value both predict the reward: give one of them.")
    if network is not None and (not callable(network) or given is None):
        raise SiteError(
            f"Site '{name}': expected nn_baseline, a network, and nn_baseline_input, what it predicts the reward from, "
            f"got {describe(network)} and {describe(given)}. Give both, such as data of the site's rows."
        )
    if value is not None and not isinstance(value, Tensor):
        raise SiteError(f"Site '{name}': expected a tensor as baseline_value, got {describe(value)}.")


def check_rows(plate: str, model: Tensor, guide: Tensor) -> None:
    """Raise SiteError where model and guide take different rows of a plate: one would see the other's data."""
    if model is not guide and not (model.shape == guide.shape and check_or_defer((model == guide).all())):
        raise SiteError(
            f"Plate '{plate}': the model takes the rows given by subsample=, the guide takes others. Give the guide's "
            "plate the same subsample; for an AutoGuide, pass create_plates=lambda *args: pyro.plate(...) with it."
        )


def check_pair(model: Mapping[str, Site], guide: Mapping[str, Site], marks: Mapping[str, Any]) -> None:
    """Raise SiteError unless the guide samples every latent of the model, in the same plates and shapes.

    Args:
        model, guide: the sites by name.
        marks: those of sites of the model that are marked for enumeration.
    """
    plates = {p.name: p for site in guide.values() for p in site.plates}
    for name, site in model.items():
        for plate in site.plates:
            _check_plate(site, plate, plates.get(plate.name, plate))
        if site.role == "latent":
            if name in guide:
                _check_shapes(site, guide[name])
            elif site.enum_dim is None:
                raise _missing(site, list(guide), marks.get(name))
        elif site.role == "observed" and name in guide and guide[name].role != "deterministic":
            raise SiteError(
                f"Site '{name}' is observed in the model and sampled in the guide. Remove it from the guide, or do "
                "not condition the model on it."
            )


def _missing(site: Site, guide: list[str], mark: Any) -> SiteError:
    """Return the error for a latent that the guide does not draw and nothing sums out."""
    name = site.name
    if mark is not None and mark not in ("parallel", "sequential"):
        return SiteError(
            f"Site '{name}' has an unknown mark: expected infer={{'enumerate': 'parallel'}}, got {mark!r}. Write "
            "'parallel' to have the site summed out."
        )
    if mark is not None:
        return SiteError(
            f"Latent site '{name}' of the model is marked for enumeration and has no site in the guide. Objectives "
            "here sum it out where the mark is 'parallel' (config_enumerate gives it), but not with the filtering "
            "bound nor for a guide that is itself a handler of Pyro. Change the mark, add the site to the guide, or "
            "use pyro.infer.TraceEnum_ELBO."
        )
    can_sum = getattr(site.fn, "has_enumerate_support", False)
    if can_sum and name.endswith("_unobserved"):
        return SiteError(
            f"Latent site '{name}', what obs_mask leaves unobserved, has no site in the guide, and no mark: obs_mask "
            "drops that of the whole site. Pass pyro.infer.config_enumerate(model) to have it summed out."
        )
    sum_out = (
        "mark it infer={'enumerate': 'parallel'} (config_enumerate marks all such sites) to have it summed out, "
        if can_sum
        else ""
    )
    return SiteError(
        f"Latent site '{name}' of the model has no site in the guide, which samples {guide}. Add "
        f"pyro.sample('{name}', ...) to the guide, {sum_out}or observe the site: give this "
        "call the data, if the model takes them."
    )


def _check_plate(site: Site, model: Plate, guide: Plate) -> None:
    """Refuse plates of different sizes.

    Pyro replays the rows of the guide's plate, so another size would pass for a subsample, at a wrong scale.
    """
    if (model.size, model.full_size) != (guide.size, guide.full_size):
        raise SiteError(
            f"Site '{site.name}': plate '{model.name}' has {model.full_size} rows in the model and "
            f"{guide.full_size} in the guide (in this run {model.size} and {guide.size}). Give both programs the "
            "same data and plate sizes."
        )


def _check_shapes(model: Site, guide: Site) -> None:
    """Refuse events that differ, and a draw of the guide that the model would count several times."""
    expected, got = model.fn.event_shape, guide.fn.event_shape
    p, q = _without_variables(model), _without_variables(guide)
    if expected != got or (p != q and not _broadcasts_to(p, q)):
        raise SiteError(
            f"Site '{model.name}': the model expects batch shape {tuple(p)} and event shape {tuple(expected)}, the "
            f"guide gives {tuple(q)} and {tuple(got)}. Use the same plates and the same .to_event(n) in both."
        )


def _without_variables(site: Site) -> torch.Size:
    """Return the batch shape at one value of each enumerated site."""
    shape = site.fn.batch_shape
    return torch.Size(1 if d in site.variables else shape[d] for d in range(-len(shape), 0))


def _broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    try:
        return math.prod(torch.broadcast_shapes(shape, target)) == math.prod(target)
    except RuntimeError:
        return False


def mask_unobserved(model: Mapping[str, Site], guide: Mapping[str, Site]) -> dict[str, Site]:
    """Return the guide's sites with the masks of ``obs_mask`` on those that impute what was not observed.

    Pyro masks ``<name>_unobserved`` in the model alone: the entropy of imputations that nothing uses would count, and
    grow without end. A site that the guide masks itself stays.

    Raises:
        GuideError: the guide draws the imputations together with other sites.
    """
    masked = dict(guide)
    sources = [source_of(s, guide) for s in guide.values() if s.role == "latent"]
    joint = any(s.role == "auxiliary" and not any(s is x for x in sources) for s in guide.values())
    for name in model:
        site = guide.get(f"{name}_unobserved")
        if site is None or not (site.mask is None or site.mask is True) or f"{name}_observed" not in model:
            continue
        source = source_of(site, guide)
        if source is None and is_point(site.fn) and joint:
            raise GuideError(
                f"Site '{site.name}': the guide draws what obs_mask leaves out jointly with other sites, so that the "
                "entropy of imputations that nothing uses would count. Use AutoNormal, alone or in an AutoGuideList, "
                f"or sample '{site.name}' under pyro.poutine.mask(mask=~obs_mask) in a guide of your own."
            )
        for part in (site, source):
            if part is not None:
                masked[part.name] = replace(part, mask=model[site.name].mask)
    return masked


_OPTIONS = {
    "n_samples": "num_samples",
    "num_sample": "num_samples",
    "num_draws": "num_samples",
    "n_draws": "num_samples",
    "draws": "num_samples",
    "samples": "num_samples",
    "num_particles": "num_samples",
    "random_seed": "seed",
    "rng_seed": "seed",
}


def check_options(model: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Raise ArgumentError for a keyword that is another library's name of an option, unless the model names it.

    Raises:
        ArgumentError: also where the model is no program.
    """
    _check_program("model", model)
    signature = signature_of(poutine.unwrap(model))
    parameters = {} if signature is None else signature.parameters
    for wrong, right in _OPTIONS.items():
        if wrong in kwargs and wrong not in parameters:
            raise ArgumentError(f"{wrong}= is no argument of the program. The option is called {right}=.")
