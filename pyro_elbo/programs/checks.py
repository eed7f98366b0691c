"""Check that the sites of a model and a guide fit each other and their plates, and that options have our names."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from pyro import poutine
from torch import nn

from pyro_elbo.errors import ArgumentError, SiteError
from pyro_elbo.programs.sites import Plate, Site


def check_batch_shape(site: Site, sizes: Mapping[int, int]) -> None:
    """Raise SiteError for a batch dimension outside all plates, whose entries nobody declared independent."""
    for plate in site.plates:
        if plate.size == 0:
            raise SiteError(
                f"Site '{site.name}': plate '{plate.name}' is empty, expected at least one row. Skip empty batches."
            )
    value_batch = site.value.shape[: site.value.dim() - site.event_dim]
    for shape in (site.fn.batch_shape, value_batch):
        if any(n not in (1, sizes.get(d - len(shape), 1)) for d, n in enumerate(shape)):
            expected = tuple(sizes.get(d, 1) for d in range(min(sizes, default=0), 0))
            raise SiteError(
                f"Site '{site.name}': expected batch shape {expected} from its plates "
                f"{[p.name for p in site.plates]}, got {tuple(shape)}. Put the extra dimensions into a pyro.plate, or "
                "declare them part of one event with .to_event(n)."
            )


def check_pair(model: Mapping[str, Site], guide: Mapping[str, Site]) -> None:
    """Raise SiteError unless the guide samples every latent of the model, in the same plates and shapes."""
    plates = {p.name: p for site in guide.values() for p in site.plates}
    for name, site in model.items():
        for plate in site.plates:
            _check_plate(site, plate, plates.get(plate.name, plate))
        if site.role == "latent":
            if name not in guide:
                raise SiteError(
                    f"Latent site '{name}' of the model has no site in the guide, which samples {list(guide)}. Add "
                    f"pyro.sample('{name}', ...) to the guide, or observe the site."
                )
            _check_shapes(site, guide[name])
        elif site.role == "observed" and name in guide and guide[name].role != "deterministic":
            raise SiteError(
                f"Site '{name}' is observed in the model and sampled in the guide. Remove it from the guide, or do "
                "not condition the model on it."
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
    expected, got = model.fn.event_shape, guide.fn.event_shape
    if expected != got or math.prod(model.fn.batch_shape) != math.prod(guide.fn.batch_shape):
        raise SiteError(
            f"Site '{model.name}': the model expects batch shape {tuple(model.fn.batch_shape)} and event shape "
            f"{tuple(expected)}, the guide gives {tuple(guide.fn.batch_shape)} and {tuple(got)}. Use the same plates "
            "and the same .to_event(n) in both."
        )


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


def check_options(program: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Raise ArgumentError for a keyword that is another library's name of an option, unless the program names it."""
    unwrapped = poutine.unwrap(program)
    parameters = inspect.signature(unwrapped.forward if isinstance(unwrapped, nn.Module) else unwrapped).parameters
    for wrong, right in _OPTIONS.items():
        if wrong in kwargs and wrong not in parameters:
            raise ArgumentError(f"{wrong}= is no argument of the program. The option is called {right}=.")
