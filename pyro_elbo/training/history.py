"""The training history: one record per epoch and split, and a labeled Dataset of all records.

Records are plain dictionaries of numbers, so a checkpoint can hold them and be read without running code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_elbo.diagnosis import ProbeRecord, probe_variables
from pyro_elbo.files import whole_path, writing

if TYPE_CHECKING:
    import xarray

EpochRecord = dict[str, Any]
SPLITS = ("train", "valid")
TOTALS = ("elbo", "distortion", "rate", "loss")


@dataclass
class RunningMean:
    """The running mean of named numbers over the rows of an epoch."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    rows: int = 0

    def add(self, values: Mapping[str, Tensor], rows: int) -> None:
        """Add ``values``, the means of ``rows`` rows; the loss is one of ``divisor`` frames (...) per row."""
        for name, value in values.items():
            weight = values.get("divisor", 1.0) if name == "loss" else 1.0
            self.sums[name] = self.sums.get(name, 0.0) + value * weight * rows
        self.rows += rows

    def reduce(self) -> dict[str, float]:
        """Return the means, over all processes if there are several."""
        sums = list(self.sums.values())
        packed = torch.stack([*sums, torch.full_like(sums[0], self.rows)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(packed)
        means = dict(zip(self.sums, (packed[:-1] / packed[-1]).tolist(), strict=True))
        means["loss"] /= means.pop("divisor", 1.0)
        return means


def recorded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the totals that the history keeps: without the log likelihood of single sites."""
    return {name: x for name, x in values.items() if not name.startswith("log_likelihood")}


def best(records: list[EpochRecord]) -> EpochRecord:
    """Return the record with the highest bound at β = 1, of validation if there is one and after the warm-up.

    While β still moves, a high bound at β = 1 may belong to weights that the user did not ask for.
    """
    validated = [r for r in records if r["split"] == "valid"] or records
    return max([r for r in validated if r["settled"]] or validated, key=lambda r: r["values"]["elbo"])


def to_dataset(records: list[EpochRecord], loss_units: str = "nats per datum") -> "xarray.Dataset":
    """Return the records as a Dataset over ``epoch``, ``split`` and ``latent``.

    Variables: ``elbo``, ``distortion``, ``rate`` (epoch, split) and ``kl`` (epoch, split, latent) in nats per datum;
    ``loss`` (epoch, split) in ``loss_units``; ``beta`` (epoch, latent), the weight at the end of the epoch (the target
    in nats of the latents that its attribute ``targets`` names, those under a Capacity); with penalties,
    ``penalty`` (epoch, split, penalty_name), unweighted, and ``penalty_weight`` (epoch, penalty_name), λ at
    the end of the epoch. Missing values of a split are NaN. Epochs with a probe add the variables of
    :func:`pyro_elbo.diagnosis.probe_variables`.
    """
    import numpy as np
    import xarray

    epochs = sorted({r["epoch"] for r in records})
    places = {epoch: i for i, epoch in enumerate(epochs)}
    latents = list(dict.fromkeys(name for r in records for name in r["beta"]))
    shape = (len(epochs), len(SPLITS))
    totals = {name: np.full(shape, np.nan) for name in TOTALS}
    kl, beta = np.full((*shape, len(latents)), np.nan), np.full((len(epochs), len(latents)), np.nan)
    for r in records:
        i, j = places[r["epoch"]], SPLITS.index(r["split"])
        for name in TOTALS:
            totals[name][i, j] = r["values"][name]
        for k, site in enumerate(latents):
            kl[i, j, k] = r["values"].get(f"kl/{site}", np.nan)
            beta[i, k] = r["beta"].get(site, np.nan)
    units = {"units": "nats per datum"}
    variables: dict[str, Any] = {name: (("epoch", "split"), values, units) for name, values in totals.items()}
    variables["loss"] = (("epoch", "split"), totals["loss"], {"units": loss_units})
    variables["kl"] = (("epoch", "split", "latent"), kl, units)
    targets = list(dict.fromkeys(name for r in records for name in r.get("targets", ())))
    variables["beta"] = (("epoch", "latent"), beta, {"targets": targets} if targets else {})
    coords: dict[str, Any] = {"epoch": epochs, "split": list(SPLITS), "latent": latents}
    names = list(dict.fromkeys(n for r in records for n in r["values"] if n.startswith("penalty/")))
    if names:
        penalty, weight = np.full((*shape, len(names)), np.nan), np.full((len(epochs), len(names)), np.nan)
        for r in records:
            i, j = places[r["epoch"]], SPLITS.index(r["split"])
            penalty[i, j] = [r["values"].get(name, np.nan) for name in names]
            weight[i] = [r["penalty_weight"].get(name.removeprefix("penalty/"), np.nan) for name in names]
        variables["penalty"] = (("epoch", "split", "penalty_name"), penalty, units)
        variables["penalty_weight"] = (("epoch", "penalty_name"), weight)
        coords["penalty_name"] = [name.removeprefix("penalty/") for name in names]
    probes = {(places[r["epoch"]], SPLITS.index(r["split"])): r["probe"] for r in records if r.get("probe")}
    probed, probed_coords = probe_variables(probes, shape, latents)
    return xarray.Dataset(variables | probed, coords=coords | probed_coords)


def save(history: "xarray.Dataset", path: Path) -> None:
    """Write the history as NetCDF: a reader sees the old file or the whole new one.

    Raises:
        CheckpointError: the file cannot be written.
    """
    with writing(path), whole_path(path) as temporary:
        history.to_netcdf(temporary, engine="h5netcdf")


def add_probe(records: list[EpochRecord], found: Mapping[str, ProbeRecord]) -> None:
    """Add what a probe has found to the records of the last epoch."""
    for record in records[-len(SPLITS) :]:
        if record["epoch"] == records[-1]["epoch"]:
            record["probe"] = found.get(record["split"], {})
