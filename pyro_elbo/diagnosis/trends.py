r"""What the curves of a fit show: a bound that falls, lags, wanders, or still rises.

Whether a fit goes wrong is read from the bound at β = 1, and why from what falls with it. A training bound that falls
together with the objective that is trained is a step size too large; one that falls while the objective rises is sold
for something else. New rows lose to one of the two parts of their bound.

============================  ============
what falls                    finding
============================  ============
training, with the objective  diverging
training alone, by the rate   exploding KL
validation, by distortion     overfitting
validation, by the rate       KL shrinkage
============================  ============
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pyro_elbo.diagnosis.evidence import FEWEST, SPLITS, SURE, Curve, Evidence
from pyro_elbo.diagnosis.findings import Finding, FindingName

BEHIND = 0.15  # of what was gained after the first tenth: new rows are always explained a little worse
WIDENED = 0.25  # of the gap, since a quarter of training: less is the difference of the two samples
APART = 0.5  # of what was gained, and a nat: so far behind from the start are rows of another kind
RISING = 3.0  # standard errors of the gain of a quarter
AHEAD = 0.15  # of what was gained: an exponential with 5 % left to gain would gain as much if it kept its pace
ROUGH = 1.0  # noise of the gradient over its norm, at half of the probes
WANDERS = 0.025  # of what was gained: the standard deviation of the bound from epoch to epoch
MOST = 1000.0  # more cannot be told from two batches


def not_finite(evidence: Evidence) -> Iterator[Finding]:
    """Find NaN, which is divergence whatever else the history shows."""
    values = evidence.history.elbo.sel(split="train").values
    if len(gone := np.flatnonzero(~np.isfinite(values))):
        since, last = (int(evidence.history.epoch.values[gone[i]]) for i in (0, -1))
        is_lost = len(gone) == len(values) - gone[0]
        when = f"from epoch {since} on" if is_lost else f"in {len(gone)} of the epochs {since} to {last}"
        yield Finding(
            "diverging",
            f"the training bound is not a finite number {when}.",
            "the parameters are lost: every figure of the fit is meaningless."
            if is_lost
            else "the steps leave what the programs can compute: the fit around these epochs shows no trend.",
            "lower the learning rate, clip gradients (grad_clip=10.0), and look for data outside the support.",
            since=since if is_lost else None,
        )


def diverging(evidence: Evidence) -> Iterator[Finding]:
    """Find a training bound that falls together with the objective."""
    if _objective(evidence).fall.is_wrong:
        since = evidence.curve("elbo", "train").fall.since
        grown = {part: evidence.curve(part, "train").change(since) for part in ("distortion", "rate")}
        yield from _fallen(evidence, max(grown, key=grown.__getitem__), _DIVERGING)


def exploding_kl(evidence: Evidence) -> Iterator[Finding]:
    """Find a training bound that falls because the rate grows, while the objective does not fall."""
    if not _objective(evidence).fall.is_wrong:
        asked = any(evidence.weight(n) is None for n in evidence.latents)
        yield from _fallen(evidence, "rate", _ASKED_FOR if asked else _EXPLODING)


def overfitting(evidence: Evidence) -> Iterator[Finding]:
    """Find new rows that are explained worse than the training data."""
    yield from _lagging(evidence, "distortion", _OVERFITTING)


def kl_shrinkage(evidence: Evidence) -> Iterator[Finding]:
    """Find new rows whose KL is larger than that of the training data."""
    yield from _lagging(evidence, "rate", _SHRINKAGE)


class _Words(NamedTuple):
    name: FindingName
    why: str
    cure: str


class _Lag(NamedTuple):
    """The words for a validation bound that falls, and those for one that stays behind without falling."""

    falls: _Words
    behind: _Words


_DIVERGING = _Words(
    "diverging",
    "steps overshoot: the parameters are worse than those of earlier epochs.",
    "lower the learning rate (a third, a tenth), clip gradients (grad_clip=10.0), or restore_best=True; where the rate "
    "grew, bound the scale of the guide from below.",
)
_EXPLODING = _Words(
    "exploding KL",
    "the guide leaves the prior faster than the likelihood gains by it: draws of the prior do not look like the data.",
    "keep β at 1 (not far below), bound the scale of the guide and of the likelihood from below, lower the learning "
    "rate.",
)
_ASKED_FOR = _Words(
    "exploding KL",
    "a Capacity asks for more KL than the data pay for.",
    "lower the target of the Capacity, or use a weight: β = 1.",
)
_OVERFITTING = _Lag(
    _Words(
        "overfitting",
        "the programs learn the training rows by heart: new rows are explained worse with every epoch.",
        "stop early (patience=10 restores the best epoch), use more data, a smaller decoder, dropout or weight decay.",
    ),
    _Words(
        "overfitting",
        "the programs learn also what is peculiar to the training rows: new rows gain less than these.",
        "use more data, a smaller decoder, dropout or weight decay. Stopping early would not raise the validation "
        "bound.",
    ),
)
_SHRINKAGE = _Lag(
    _Words(
        "KL shrinkage",
        "the guide suits the training rows alone: the KL of new rows grows, although the model explains them as well.",
        "regularize the encoder: weight decay or dropout there, noise on its input; a smaller encoder; patience=10.",
    ),
    _Words(
        "KL shrinkage",
        "the guide suits the training rows better than others: the KL of new rows shrinks less than theirs.",
        "regularize the encoder: weight decay or dropout there, noise on its input; a smaller encoder. Stopping early "
        "would not raise the validation bound.",
    ),
)


def _fallen(evidence: Evidence, part: str, words: _Words) -> Iterator[Finding]:
    """Find a training bound that has fallen since its best epoch, at least half of it lost to one of its two parts."""
    fall = evidence.curve("elbo", "train").fall
    lost = evidence.curve(part, "train").change(fall.since)
    if not fall.is_wrong or lost < fall.drop / 2:
        return
    before = f", {fall.share:.0%} of what it had gained after the first tenth" if fall.share <= 1 else ""
    yield Finding(
        words.name,
        f"the training bound has lost {fall.drop:.3g} nats per datum since epoch {fall.since}{before}; the {part} grew "
        f"by {lost:.3g}.",
        words.why,
        words.cure,
        since=fall.since,
        evidence={"drop": fall.drop, "share": fall.share, part: lost},
    )


def _objective(evidence: Evidence) -> Curve:
    """Return what is trained, over the epochs under its final weights."""
    loss = evidence.steady("loss", "train")
    return Curve(loss.epochs, -loss.values)


def _lagging(evidence: Evidence, part: str, lag: _Lag) -> Iterator[Finding]:
    """Find a validation bound that falls, or stays behind that of training, mostly by one of its two parts.

    It falls since its best epoch; it stays behind since the gap is more than half of what it is at the end.
    """
    if evidence.judged != "valid":
        return
    every, fall = evidence.gap("elbo"), evidence.of_rows("elbo", "valid").fall
    gap, noise = every.smooth, every.noise / every.window**0.5
    behind, widened = gap.values[-1], gap.values[-1] - gap.values[len(gap) // 4]
    lags = behind > BEHIND * evidence.gained("valid", after=0.1) and widened > max(WIDENED * behind, SURE * noise)
    of_part = evidence.gap(part).smooth.values[-1]
    if not (fall.is_sure or lags) or behind <= 0 or of_part <= behind / 2:
        return
    words = lag.falls if fall.is_sure else lag.behind
    since = fall.since if fall.is_sure else Curve(gap.epochs, -gap.values).below_since(-behind / 2)
    kept = "still rises" if any(not_converged(evidence)) else "has not fallen"
    moved = f"it has lost {fall.drop:.3g}" if fall.is_sure else f"it {kept}, and the gap is over half as wide"
    yield Finding(
        words.name,
        f"the validation bound is {behind:.3g} nats per datum below that of training, of which the {part} makes "
        f"{of_part:.3g}; {moved} since epoch {since}.",
        words.why,
        words.cure,
        since=since,
        evidence={"gap": float(behind), part: float(of_part), "drop": fall.drop},
    )


def apart(evidence: Evidence) -> float:
    """Return how far the validation bound was behind since the first quarter, where that is much; otherwise 0."""
    gap = evidence.gap("elbo").smooth.values
    always = float(gap[len(gap) // 4 :].min())
    return always if always > max(APART * evidence.gained("valid"), 1.0) else 0.0


def warm_up_too_long(evidence: Evidence) -> Iterator[Finding]:
    """Find weights that move until the end."""
    if not evidence.moves_until_the_end:
        return
    epochs, beta = evidence.history.epoch.values, evidence.history.beta.mean("latent").values
    yield Finding(
        "warm-up too long",
        f"the weight β still moved in epoch {evidence.settled} of {epochs[-1]}, from {beta[0]:.3g} to {beta[-1]:.3g}.",
        "the programs were trained for smaller weights than the one that they end with: their bound is not at its "
        "optimum.",
        "shorten the schedule to a third of training, or train three times as long.",
        since=int(epochs[0]),
        evidence={"first epoch of the final weight": float(evidence.settled), "beta": float(beta[-1])},
    )


def noisy_objective(evidence: Evidence) -> Iterator[Finding]:
    """Find a gradient whose noise exceeds it, while the bound wanders more than it moves.

    Such a bound may end below its best epoch. That is no divergence: what diverges has a gradient above its noise.
    """
    norm, noise = evidence.curve("gradient_norm"), evidence.curve("gradient_noise")
    elbo = evidence.steady("elbo", evidence.judged)
    if not len(norm) or len(elbo) < FEWEST:
        return
    least = np.maximum(norm.values, noise.values / MOST)
    rough = float(np.median(noise.values / np.where(least > 0, least, 1.0)))
    smooth = elbo.smooth.values
    late = abs(float(smooth[-1] - smooth[len(smooth) // 2]))
    wanders = elbo.noise >= WANDERS * evidence.gained(evidence.judged)
    if rough < ROUGH or not wanders or late > SURE * elbo.noise / elbo.window**0.5:
        return
    size = f"{rough:.0f} times" if rough >= 1.5 else "as large as"
    yield Finding(
        "noisy objective",
        f"the gradient's standard deviation is {size} its norm; the bound varies by {elbo.noise:.3g} nats "
        f"per datum from epoch to epoch, where the second half of the epochs has changed it by {late:.3g}.",
        "steps go in random directions: more of them do not help.",
        "more rows per batch, num_particles, a lower learning rate; if a latent is drawn with a score-function "
        "gradient, a reparameterized one in its place, or a sum over its values.",
        evidence={"noise over norm": rough, "noise of the bound": elbo.noise, "late change": late},
    )


def not_converged(evidence: Evidence) -> Iterator[Finding]:
    """Find a bound that still rises."""
    split = evidence.judged
    elbo = evidence.steady("elbo", split)
    if len(elbo) < FEWEST:
        return
    gain, error = elbo.late_gain
    last = elbo.values[-max(len(elbo) // 4, 3) :]
    ahead = float(np.polyfit(np.arange(len(last)), last, 1)[0]) * len(elbo)
    if gain <= RISING * error or ahead <= AHEAD * evidence.gained(split):
        return
    yield Finding(
        "not converged",
        f"the {SPLITS[split]} bound gained {gain:.3g} nats per datum from one of the last two quarters to the "
        f"other: at the pace of the end, as many epochs again would gain {ahead:.3g}.",
        "training ended on the way: more epochs would give a better bound.",
        "raise max_epochs, or the learning rate; patience=10 ends training when the bound has settled.",
        evidence={"gain": gain, "ahead": ahead},
    )
