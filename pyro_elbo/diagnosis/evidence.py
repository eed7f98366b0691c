"""A training history as the rules read it: curves without gaps, their trend and their noise."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from pyro_elbo.diagnosis.reading import PROBED, read_history

if TYPE_CHECKING:
    import xarray

FEWEST = 6  # epochs that show a trend
FINAL = 0.1  # of the epochs under the final weights: fewer are no training
SURE = 5.0  # standard errors of an average, where the best of many epochs is compared, or one half with the other
LOST = 0.05  # of what was gained: less is the noise of a fit that has settled,
SLIGHT = 0.01  # unless it is more than this, and
UNLIKE = 3.0  # times as deep as any fall before
SPLITS = {"train": "training", "valid": "validation"}


class Fall(NamedTuple):
    """How far a curve ends below its best epoch.

    Attributes:
        since: the best epoch.
        drop: nats from the best to the end, both averaged over neighbors.
        share: the drop as a part of what was gained before it, after the first tenth of the epochs.
        noise: standard deviation of the averages.
        dip: nats of the deepest fall before it, after the first tenth of the epochs.
    """

    since: int
    drop: float
    share: float
    noise: float
    dip: float

    @property
    def is_sure(self) -> bool:
        """Whether the fall is more than noise, and worth a word."""
        return self.drop > SURE * self.noise and self.share > LOST

    @property
    def is_wrong(self) -> bool:
        """Whether what is trained has fallen, which never should: by little, but unlike any fall before, is enough."""
        stands_out = self.share > SLIGHT and self.drop > max(SURE * self.noise, UNLIKE * self.dip)
        return self.is_sure or stands_out


def named_points(history: "xarray.Dataset") -> str:
    """Return the names of the latents of which the guide was a point estimate, as a sentence shows them."""
    names = np.atleast_1d(history.attrs.get("point_estimates", [])).tolist()  # a file returns one name alone
    return ", ".join(map(repr, names))


def _moving_mean(values: Float[np.ndarray, " n"], width: int) -> Float[np.ndarray, " m"]:
    """Return the mean of every ``width`` neighbors, from sums of 1, 2, 4, ... of them: n log n and no cancellation."""
    count, start, size = len(values) - width + 1, 0, 1
    sums, total = values, np.zeros(count)
    while size <= width:
        if width & size:
            total += sums[start : start + count]
            start += size
        sums = sums[:-size] + sums[size:]
        size *= 2
    return total / width


@dataclass(frozen=True)
class Curve:
    """A figure over the epochs in which it is known."""

    epochs: Int[np.ndarray, " epochs"]
    values: Float[np.ndarray, " epochs"]

    def __len__(self) -> int:
        """The number of epochs."""
        return len(self.values)

    @property
    def last(self) -> float | None:
        """The last value."""
        return float(self.values[-1]) if len(self) else None

    @property
    def window(self) -> int:
        """Neighboring epochs that averages take: a tenth of all."""
        return max(1, len(self) // 10)

    @property
    def smooth(self) -> "Curve":
        """The curve averaged over neighboring epochs, each average at its middle epoch."""
        w = self.window
        middle = self.epochs[(w - 1) // 2 : len(self) - w // 2]
        return Curve(middle, _moving_mean(self.values, w))

    @property
    def at_the_end(self) -> "Curve":
        """The curve at the end of each epoch, for one of means over epochs, as those of training are."""
        following = np.append(self.values[1:], self.values[-1:])
        return Curve(self.epochs, (self.values + following) / 2)

    @property
    def noise(self) -> float:
        """The standard deviation of a value around the trend, from second differences, whose median ignores jumps."""
        if len(self) < FEWEST:
            return 0.0
        return float(np.median(np.abs(np.diff(self.values, 2)))) / (0.6745 * 6**0.5)

    @property
    def fall(self) -> Fall:
        """How far the curve ends below its best epoch."""
        smooth = self.smooth
        best = int(smooth.values.argmax())
        drop = float(smooth.values[best] - smooth.values[-1])
        before = smooth.values[min(best, len(smooth) // 10) : best + 1]
        gained, dip = float(before[-1] - before.min()), float((np.maximum.accumulate(before) - before).max())
        share = drop / gained if gained > 0 else float("inf") if drop > 0 else 0.0
        return Fall(int(smooth.epochs[best]), drop, share, self.noise / self.window**0.5, dip)

    @property
    def late_gain(self) -> tuple[float, float]:
        """The last quarter's average less that of the quarter before, and the standard error of this difference."""
        quarter = len(self) // 4
        before, last = (float(self.values[-k * quarter :][:quarter].mean()) for k in (2, 1))
        return last - before, self.noise * (2 / quarter) ** 0.5

    def below_since(self, number: float) -> int:
        """Return the first epoch from which the curve stays below a number until the end."""
        above = np.flatnonzero(self.values >= number)
        return int(self.epochs[above[-1] + 1 if len(above) else 0])

    def change(self, since: int) -> float:
        """The last average less that of the epoch nearest to ``since``."""
        smooth = self.smooth
        return float(smooth.values[-1] - smooth.values[np.abs(smooth.epochs - since).argmin()])


@dataclass(frozen=True)
class Evidence:
    """A history with what the rules ask of it.

    Attributes:
        history: the Dataset.
        settled: the epoch in which every weight took its final value.
    """

    history: "xarray.Dataset"
    settled: int

    @staticmethod
    def of(history: Any) -> "Evidence":
        """Read a history.

        Raises:
            ArgumentError: it is none, or one from which nothing can be judged.
        """
        history = read_history("diagnose", history)
        beta, epochs = history.beta.values, history.epoch.values
        moves = np.flatnonzero((np.diff(beta, axis=0) != 0).any(1)) if beta.size else np.empty(0, int)
        first = moves[-1] + 1 if len(moves) else 0
        settled = int(epochs[first])
        if not np.isfinite(history.elbo.sel(split="valid").values[first:]).any():  # of other weights: not of this fit
            history = history.assign(elbo=history.elbo.where(history.split == "train"))
        return Evidence(history, settled)

    @property
    def epochs(self) -> int:
        """The number of epochs."""
        return self.history.sizes["epoch"]

    @property
    def shows_trends(self) -> bool:
        """Whether there are enough epochs under the final weights; a schedule that ends with the fit is seen anyway."""
        return self.epochs >= FEWEST and (self.moves_until_the_end or len(self.steady("elbo", self.judged)) >= FEWEST)

    @property
    def moves_until_the_end(self) -> bool:
        """Whether a weight still moves in the last tenth of the epochs."""
        epochs = self.history.epoch.values
        return bool(self.settled > epochs[0] and (epochs > self.settled).sum() < FINAL * len(epochs))

    @property
    def latents(self) -> list[str]:
        """The latent sites."""
        return [str(name) for name in self.history.latent.values]

    @property
    def is_probed(self) -> bool:
        """Whether a probe falls into the epochs, as far as the history knows of probes."""
        probed = [self.history[name] for name in PROBED if name in self.history]
        return not probed or any(bool(x.notnull().any()) for x in probed)

    @property
    def judged(self) -> str:
        """The split that tells how good the fit is: validation if its bound is known under the final weights."""
        return "valid" if len(self.curve("elbo", "valid")) else "train"

    def curve(self, name: str, split: str | None = None, **labels: str) -> Curve:
        """Return a figure over all epochs in which it is known; without any where the history lacks it."""
        if name not in self.history:
            return Curve(np.empty(0, int), np.empty(0))
        chosen: dict[Any, str | None] = {"split": split, **labels}
        variable = self.history.variables[name]
        places = [list(self.history.variables[d].values).index(chosen[d]) for d in variable.dims if d != "epoch"]
        values = variable.values[(slice(None), *places)].astype(float)
        known = np.isfinite(values)
        return Curve(self.history.epoch.values[known], values[known])

    def steady(self, name: str, split: str, **labels: str) -> Curve:
        """Return a figure over the epochs under the final weights."""
        curve = self.curve(name, split, **labels)
        known = curve.epochs >= self.settled
        return Curve(curve.epochs[known], curve.values[known])

    def gained(self, split: str, after: float = 0.0) -> float:
        """Return the nats per datum that the bound gained after a part of the epochs, whatever the weights were."""
        curve = self.curve("elbo", split)
        start = curve.smooth.values[int(after * len(curve.smooth))] if after else curve.values[0]
        return float(curve.smooth.values.max() - start)

    @property
    def shared(self) -> list[str]:
        """The latents that all rows share, as far as probes tell: none of their units belongs to a row."""
        seen = len(self.curve("gradient_norm")) > 0
        return [n for n in self.latents if not self.units(n)] if seen else []

    def of_rows(self, name: str, split: str) -> Curve:
        """Return the bound or a part of it under the final weights, without the KL of the latents that all rows share.

        That KL is one number, whichever rows the bound divides it by.
        """
        curve, sign = self.steady(name, split), {"elbo": 1.0, "rate": -1.0}.get(name, 0.0)
        for kl in (self.steady("kl", split, latent=n) for n in self.shared):
            if len(kl):
                both, i, j = np.intersect1d(curve.epochs, kl.epochs, return_indices=True)
                curve = Curve(both, curve.values[i] + sign * kl.values[j])
        return curve

    def gap(self, name: str) -> Curve:
        """Return how far the validation bound is behind that of training, or what a part of it makes of that."""
        train, valid = self.of_rows(name, "train").at_the_end, self.of_rows(name, "valid")
        both, i, j = np.intersect1d(train.epochs, valid.epochs, return_indices=True)
        return Curve(both, (train.values[i] - valid.values[j]) * (1.0 if name == "elbo" else -1.0))

    def weight(self, latent: str) -> float | None:
        """Return the last weight of a latent's KL; None for one that is drawn to a target instead (Capacity)."""
        targets = np.atleast_1d(self.history.beta.attrs.get("targets", [])).tolist()  # a file returns one name alone
        return None if latent in targets else self.curve("beta", latent=latent).last

    def units(self, latent: str) -> list[str]:
        """Return the names of a latent's units."""
        if "kl_per_dim" not in self.history:
            return []
        return [str(u) for u in self.history.unit.values[self.history.unit_latent.values == latent]]
