"""The probes of a fit as labeled arrays: one entry per epoch and split, NaN where no probe was taken."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyro_elbo.diagnosis.probe import ProbeRecord

NATS = {"units": "nats per datum"}
BY_PARAMETER = {"units": "nats per datum, by unit of parameter"}
SIDES = ("lower", "upper")
Place = tuple[int, int]  # numbers of an epoch and of a split, training first
Variables = dict[str, Any]


def probe_variables(
    probes: Mapping[Place, ProbeRecord], shape: Place, latents: Sequence[str]
) -> tuple[Variables, Variables]:
    """Return the variables that the probes add to a history, those with a finite value, and their coordinates.

    ``kl_per_dim`` (epoch, split, unit), each unit of the latent ``unit_latent``; ``active_units`` (epoch, split,
    latent), a number of units; ``information`` (epoch, split, latent, side), estimates of I(z; x) from below and above;
    ``own_distortion`` and ``swapped_distortion`` (epoch, split), of the rows under their own latents and under those of
    other rows; ``gradient_norm`` and ``gradient_noise`` (epoch). Nats per datum where no other unit is given.
    """
    import numpy as np

    latent_of = {unit: name for p in probes.values() for unit, name in p.get("unit_latent", {}).items()}
    units = [unit for unit, name in latent_of.items() if name in latents]

    def numbers(figure: str) -> Any:
        values = np.full(shape, np.nan)
        for place, probe in probes.items():
            values[place] = probe.get(figure, np.nan)
        return values

    def table(figure: str, labels: Sequence[str], *rest: int) -> Any:
        values = np.full((*shape, len(labels), *rest), np.nan)
        for (i, j), probe in probes.items():
            for k, label in enumerate(labels):
                values[i, j, k] = probe.get(figure, {}).get(label, np.nan)
        return values

    places = ("epoch", "split")
    made: dict[str, Callable[[], Any]] = {
        "kl_per_dim": lambda: ((*places, "unit"), table("kl_per_dim", units), NATS),
        "active_units": lambda: ((*places, "latent"), table("active_units", latents), {"units": "units"}),
        "information": lambda: ((*places, "latent", "side"), table("information", latents, len(SIDES)), NATS),
        "own_distortion": lambda: (places, numbers("own_distortion"), NATS),
        "swapped_distortion": lambda: (places, numbers("swapped_distortion"), NATS),
        "gradient_norm": lambda: (("epoch",), numbers("gradient_norm")[:, 0], BY_PARAMETER),
        "gradient_noise": lambda: (("epoch",), numbers("gradient_noise")[:, 0], BY_PARAMETER),
    }
    found: Variables = {name: make() for name, make in made.items() if any(name in p for p in probes.values())}
    found = {name: variable for name, variable in found.items() if np.isfinite(variable[1]).any()}
    named = {"unit": units, "unit_latent": ("unit", [latent_of[unit] for unit in units])}
    coords = (named if "kl_per_dim" in found else {}) | ({"side": list(SIDES)} if "information" in found else {})
    return found, coords
