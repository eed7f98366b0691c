"""The training history: columns of numbers over the epochs of each split, and a labeled Dataset of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_elbo.diagnosis import ProbeRecord, probe_variables
from pyro_elbo.files import whole_path, writing
from pyro_elbo.objectives import TraceBeta_ELBO

if TYPE_CHECKING:
    import xarray

_T = TypeVar("_T")
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


class Table(NamedTuple):
    """Numbers of epochs of one split, a vector per name."""

    split: str
    names: tuple[str, ...]
    epochs: np.ndarray
    values: Float[np.ndarray, "names epochs"]

    def column(self, name: str) -> Float[np.ndarray, " epochs"]:
        """Return the numbers of one name."""
        return self.values[self.names.index(name)]


class History:
    """What the epochs of a fit have recorded.

    Columns: the totals of the objective, such as ``elbo``, ``kl/site`` and ``penalty/name``; its weights at the end of
    the epoch, ``beta/site`` (``target/site`` under a Capacity) and ``penalty_weight/name``; and ``settled``, 1 where no
    schedule moves any more.

    Attributes:
        probes: what probes have found, by epoch and split.
        newest: what was added last.
    """

    newest: Table

    def __init__(self) -> None:
        self._parts: dict[tuple[str, tuple[str, ...]], list[tuple[np.ndarray, np.ndarray]]] = {}
        self.probes: dict[int, dict[str, ProbeRecord]] = {}

    def add(self, split: str, first: int, columns: Mapping[str, Float[np.ndarray, " epochs"]]) -> None:
        """Add the numbers of some epochs in a row."""
        values = np.stack(list(columns.values()))
        self.newest = Table(split, tuple(columns), np.arange(first, first + values.shape[1]), values)
        self._parts.setdefault(self.newest[:2], []).append(self.newest[2:])

    def add_probe(self, found: Mapping[str, ProbeRecord]) -> None:
        """Add what a probe has found after the last epoch."""
        last = self.last
        self.probes[last] = {t.split: found.get(t.split, {}) for t in self.tables() if t.epochs[-1] == last}

    def tables(self) -> Iterator[Table]:
        """Return the epochs of each split; those with different columns apart."""
        for (split, names), parts in self._parts.items():
            if len(parts) > 1:
                epochs, values = zip(*parts, strict=True)
                parts[:] = [(np.concatenate(epochs), np.concatenate(values, 1))]
            yield Table(split, names, *parts[0])

    @property
    def epochs(self) -> np.ndarray:
        """The epochs, in order."""
        found = [t.epochs for t in self.tables()] or [np.empty(0, np.int64)]
        return reduce(lambda x, y: x if np.array_equal(x, y) else np.union1d(x, y), found)

    @property
    def last(self) -> int:
        """The last epoch."""
        return max(int(t.epochs[-1]) for t in self.tables())

    def best(self) -> int:
        """Return the epoch with the highest bound at β = 1, of validation if there is one and after the warm-up.

        While β still moves, a high bound at β = 1 may belong to weights that the user did not ask for.
        """
        tables = list(self.tables())
        judged = [t for t in tables if t.split == "valid"] or tables
        elbo, settled = (np.concatenate([t.column(name) for t in judged]) for name in ("elbo", "settled"))
        elbo = np.where((settled < settled.max()) | np.isnan(elbo), -np.inf, elbo)
        return int(np.concatenate([t.epochs for t in judged])[elbo == elbo.max()].min())

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values, which a file holds and gives back without running code."""
        tables = [(t.split, t.names, *map(torch.from_numpy, (t.epochs, t.values))) for t in self.tables()]
        return {"tables": tables, "probes": self.probes}

    @staticmethod
    def of(state: Mapping[str, Any]) -> "History":
        """Return the history of a state."""
        history = History()
        for split, names, epochs, values in state["tables"]:
            history._parts[split, names] = [(epochs.numpy(), values.numpy())]
        history.probes = dict(state["probes"])
        return history

    def to_dataset(self, loss_units: str = "nats per datum") -> "xarray.Dataset":
        """Return a Dataset over ``epoch``, ``split`` and ``latent``.

        Variables: ``elbo``, ``distortion``, ``rate`` (epoch, split) and ``kl`` (epoch, split, latent) in nats per
        datum; ``loss`` (epoch, split) in ``loss_units``; ``beta`` (epoch, latent), the weight at the end of the epoch
        (the target in nats of the latents that its attribute ``targets`` names, those under a Capacity); with
        penalties, ``penalty`` (epoch, split, penalty_name), unweighted, and ``penalty_weight`` (epoch, penalty_name),
        λ at the end of the epoch. Missing values of a split are NaN. Epochs with a probe add the variables of
        :func:`pyro_elbo.diagnosis.probe_variables`.
        """
        import xarray

        epochs = self.epochs
        shape = len(epochs), len(SPLITS)
        columns: dict[str, np.ndarray] = {}
        for t in self.tables():
            rows = slice(None) if len(t.epochs) == len(epochs) else np.searchsorted(epochs, t.epochs)
            split = SPLITS.index(t.split)
            for name, column in zip(t.names, t.values, strict=True):
                columns.setdefault(name, np.full(shape, np.nan))[rows, split] = column

        def stacked(names: Sequence[str]) -> np.ndarray:
            found = [columns.get(name, np.full(shape, np.nan)) for name in names]
            return np.stack(found, -1) if found else np.empty((*shape, 0))

        def weights(names: Sequence[str]) -> np.ndarray:
            train, valid = stacked(names).swapaxes(0, 1)  # the same where an epoch has both
            return np.where(np.isnan(train), valid, train)

        beta = betas_of({name: name for name in columns})
        penalties = [name.removeprefix("penalty/") for name in columns if name.startswith("penalty/")]
        targets = [site for site, name in beta.items() if name.startswith("target/")]
        places, units = ("epoch", "split"), {"units": "nats per datum"}
        variables: dict[str, Any] = {name: (places, columns[name], units) for name in TOTALS}
        variables["loss"] = (places, columns["loss"], {"units": loss_units})
        variables["kl"] = ((*places, "latent"), stacked([f"kl/{site}" for site in beta]), units)
        note = {"note": "weight at the end of the epoch"} | ({"targets": targets} if targets else {})
        variables["beta"] = (("epoch", "latent"), weights(list(beta.values())), note)
        coords: dict[str, Any] = {"epoch": epochs, "split": list(SPLITS), "latent": list(beta)}
        if penalties:
            penalty, weight = stacked([f"penalty/{n}" for n in penalties]), [f"penalty_weight/{n}" for n in penalties]
            variables["penalty"] = ((*places, "penalty_name"), penalty, units)
            variables["penalty_weight"] = (("epoch", "penalty_name"), weights(weight))
            coords["penalty_name"] = penalties
        probes = {
            (int(np.searchsorted(epochs, epoch)), SPLITS.index(split)): record
            for epoch, found in self.probes.items()
            for split, record in found.items()
            if record
        }
        probed, probed_coords = probe_variables(probes, shape, list(beta))
        return xarray.Dataset(variables | probed, coords=coords | probed_coords)


def betas_of(columns: Mapping[str, _T]) -> dict[str, _T]:
    """Return the columns of the weights of the KL by site, whether they are weights or targets."""
    return {name.partition("/")[2]: x for name, x in columns.items() if name.startswith(("beta/", "target/"))}


class Weights:
    """The weights of an objective after each of its steps; those asked for last are kept."""

    def __init__(self, elbo: TraceBeta_ELBO) -> None:
        self._elbo = elbo
        self._kept: tuple[Any, dict[str, np.ndarray]] = None, {}

    def after(self, steps: range, names: Iterable[str]) -> dict[str, Float[np.ndarray, " steps"]]:
        """Return the columns of the weights after each of so many steps; ``names`` are those of the totals."""
        settled, sites = self._elbo.settled, [name.removeprefix("kl/") for name in names if name.startswith("kl/")]
        clipped = np.minimum(steps, settled).astype(int)  # constant from there on; a schedule may settle at infinity
        key = clipped[0], clipped[-1], sites
        if key != self._kept[0]:
            rows = [self._at(step, sites) for step in range(clipped[0], clipped[-1] + 1)]
            self._kept = key, {name: np.array([row[name] for row in rows]) for name in rows[0]}
        return {name: x[clipped - clipped[0]] for name, x in self._kept[1].items()}

    def _at(self, step: int, sites: list[str]) -> dict[str, float]:
        elbo = self._elbo
        kinds = {site: "target" if elbo.weighting.is_target(site) else "beta" for site in sites}
        beta = {f"{kinds[site]}/{site}": x for site, x in elbo.beta_at(step, sites).items()}
        penalties = {p.name: float(p.weight(step) if callable(p.weight) else p.weight) for p in elbo.penalties}
        weights = {f"penalty_weight/{name}": x for name, x in penalties.items()}
        return beta | weights | {"settled": float(step >= elbo.settled)}


def save_history(history: "xarray.Dataset", path: Path) -> None:
    """Write the history as NetCDF: a reader sees the old file or the whole new one.

    Raises:
        CheckpointError: the file cannot be written.
    """
    with writing(path), whole_path(path) as temporary:
        history.to_netcdf(temporary, engine="h5netcdf")
