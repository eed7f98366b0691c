r"""The rules of a diagnosis: one function per finding, from the evidence of a history.

Whether a fit goes wrong is read from the bound at β = 1, and why from its two parts. What is lost, is lost to
distortion or to rate: by the training data after their best epoch, or by new rows beside the training data.

=================  =======================  ===========================
lost to ...        training falls           validation falls or lags
=================  =======================  ===========================
distortion         diverging                overfitting
rate               exploding KL             KL shrinkage
=================  =======================  ===========================

Thresholds are those of the labelled runs in ``docs/diagnosis.md``.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyro_elbo.diagnosis.evidence import FEWEST, SURE, Curve, Evidence
from pyro_elbo.diagnosis.findings import Diagnosis, Finding, FindingName

if TYPE_CHECKING:
    import xarray

BEHIND = 0.15  # of what was gained after the first tenth: new rows are always explained a little worse
WIDENED = 0.25  # of the gap, since a quarter of training: less is the difference of the two samples
LEFT = 0.05  # of what was gained: as much may be left to gain
LONGEST = 0.9  # the largest ratio of the gains of two quarters from which the rest is extrapolated
DEAD = 0.02  # nats per datum: a unit with less carries nothing
PAID = 0.1  # nats per datum: latents with more are paid for
STILL = 0.25  # of the rate, since half of training: a KL that changes more is on its way
USED = 0.03  # of the KL: an exchange of rows that costs less shows that the decoder does not look at them
HEAVY = 1.5  # a weight above it is chosen, not an accident of a schedule
LIGHT = 0.5  # so is one below it
FAR = 5.0  # times the information that a batch shows, at most log B: a rate beyond it is not information
ROUGH = 3.0  # noise of the gradient over its norm, at half of the probes
WANDERS = 0.07  # of what was gained: the standard deviation of the bound from epoch to epoch
MOST = 1000.0  # more cannot be told from two batches
Rule = Callable[[Evidence], Iterator[Finding]]


def diagnose(history: "xarray.Dataset | Any") -> Diagnosis:
    """Say from its history whether a fit is done and healthy, and if not, why.

    The findings, the most important one first: ``diverging``, ``warm-up too long``, ``noisy objective``,
    ``dead decoder``, ``exploding KL``, ``over-regularized``, ``posterior collapse``, ``KL shrinkage``,
    ``overfitting``, ``not converged``; or ``healthy``. ``unused units`` of a latent need no cure. Each carries its evidence in nats per datum.
    What the history does not show is said to be unknown: ``unsaid``.

    Args:
        history: the result of :func:`fit`, or its ``history``.

    Raises:
        ArgumentError: it is no history.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, pyro_elbo as pe
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> result = pe.fit(model, guide, torch.ones(50), batch_size=None, max_epochs=1, progress=False)
        >>> print(pe.diagnose(result))
        Diagnosis of 1 epoch: none
          cannot be said: whether training is done or goes wrong: a trend takes 6 epochs under the final
            weights.
          cannot be said: whether it overfits: there is no validation.
          cannot be said: whether latents collapse: none of them has a value per row of the data that a
            probe could judge.

    References:
        Burda, Grosse, Salakhutdinov (2016), arXiv:1509.00519 (active units); Alemi, Poole, Fischer, Dillon, Saurous,
        Murphy (2018), arXiv:1711.00464 (rate and distortion); Cremer, Li, Duvenaud (2018), arXiv:1801.03558
        (amortized inference on unseen data).
    """
    evidence = Evidence.of(getattr(history, "history", history))
    findings: list[Finding] = []
    for rule, explained_by in RULES if evidence.shows_trends else RULES[:1]:
        if not {f.name for f in findings} & set(explained_by):
            findings += rule(evidence)
    if evidence.shows_trends and all(f.is_harmless for f in findings):
        findings.insert(0, _healthy(evidence))
    return Diagnosis(tuple(findings), tuple(_unsaid(evidence)), evidence.epochs)


def _healthy(evidence: Evidence) -> Finding:
    split = evidence.judged
    elbo = evidence.curve("elbo", split).last
    return Finding(
        "healthy", f"the {split} bound has settled at {elbo:.4g} nats per datum.", evidence={"elbo": elbo or 0.0}
    )


def _unsaid(evidence: Evidence) -> Iterator[str]:
    if not evidence.shows_trends:
        yield f"whether training is done or goes wrong: a trend takes {FEWEST} epochs under the final weights."
    if not len(evidence.curve("elbo", "valid")):
        yield "whether it overfits: there is no validation."
    if not len(evidence.curve("swapped_distortion", evidence.judged)):
        yield "whether latents collapse: none of them has a value per row of the data that a probe could judge."


def diverging(evidence: Evidence) -> Iterator[Finding]:
    """Find NaN, or a training bound that falls and is lost to distortion."""
    values = evidence.history.elbo.sel(split="train").values
    if len(gone := np.flatnonzero(~np.isfinite(values))):
        since = int(evidence.history.epoch.values[gone[0]])
        yield Finding(
            "diverging",
            f"the training bound is not a finite number from epoch {since} on.",
            "the parameters are lost: every figure of the fit is meaningless.",
            "lower the learning rate, clip gradients (grad_clip=10.0), and look for data outside the support.",
            since=since,
        )
        return
    yield from _fallen(evidence, "distortion", _DIVERGING)


def exploding_kl(evidence: Evidence) -> Iterator[Finding]:
    """Find a rate that costs more than it saves: a training bound that falls by it, or a weight far below 1."""
    fallen = list(_fallen(evidence, "rate", _EXPLODING))
    yield from fallen or _unpaid(evidence)


def _unpaid(evidence: Evidence) -> Iterator[Finding]:
    """Find latents whose weight is far below 1, and whose KL is far above the information that a batch shows."""
    split = evidence.judged
    for latent in evidence.latents:
        beta, kl = (evidence.curve("beta", latent=latent).last, evidence.curve("kl", split, latent=latent).last)
        known = evidence.curve("information", split, latent=latent, side="lower").last
        if beta is None or kl is None or known is None or beta >= LIGHT or kl <= FAR * known:
            continue
        yield Finding(
            "exploding KL",
            f"the KL is {kl:.3g} nats per datum, where a batch shows {known:.3g} nats of information; its weight is "
            f"β = {beta:.3g}: a nat of it saves {beta:.3g} nats of distortion.",
            _EXPLODING.why,
            _EXPLODING.cure,
            site=latent,
            evidence={"kl": kl, "information": known, "beta": beta},
        )


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


_DIVERGING = _Words(
    "diverging",
    "steps overshoot: the parameters are worse than those of earlier epochs.",
    "lower the learning rate (a third, a tenth), clip gradients (grad_clip=10.0), or restore_best=True.",
)
_EXPLODING = _Words(
    "exploding KL",
    "the guide leaves the prior faster than the likelihood gains by it: draws of the prior do not look like the data.",
    "keep β at 1 (not far below), bound the scale of the guide and of the likelihood from below, lower the learning "
    "rate.",
)
_OVERFITTING = _Words(
    "overfitting",
    "the programs learn the training rows by heart: new rows are explained worse with every epoch.",
    "stop early (patience=10 restores the best epoch), use more data, a smaller decoder, dropout or weight decay.",
)
_SHRINKAGE = _Words(
    "KL shrinkage",
    "the guide suits the training rows alone: the KL of new rows is larger, although the model explains them as well.",
    "regularize the encoder: weight decay or dropout there, noise on its input; a smaller encoder; patience=10.",
)


def _fallen(evidence: Evidence, part: str, words: _Words) -> Iterator[Finding]:
    """Find a training bound that has fallen since its best epoch, more than half of it lost to one of its two parts."""
    fall = evidence.curve("elbo", "train").fall
    lost = evidence.curve(part, "train").change(fall.since)
    if not fall.is_sure or lost <= fall.drop / 2:
        return
    yield Finding(
        words.name,
        f"the training bound has lost {fall.drop:.3g} nats per datum since epoch {fall.since}, {fall.share:.0%} of its "
        f"gain; the {part} grew by {lost:.3g}.",
        words.why,
        words.cure,
        since=fall.since,
        evidence={"drop": fall.drop, "share": fall.share, part: lost},
    )


def _lagging(evidence: Evidence, part: str, words: _Words) -> Iterator[Finding]:
    """Find a validation bound that falls, or stays behind that of training, mostly by one of its two parts."""
    if evidence.judged != "valid":
        return
    train, valid = (evidence.steady("elbo", split).smooth for split in ("train", "valid"))
    fall, gap = evidence.steady("elbo", "valid").fall, Curve(train.epochs, train.values - valid.values)
    behind, most = gap.values[-1], BEHIND * float(np.ptp(valid.values[len(valid) // 10 :]))
    lags = behind > most and behind - gap.values[len(gap) // 4] > WIDENED * behind
    of_part = (evidence.steady(part, "valid").smooth.values - evidence.steady(part, "train").smooth.values)[-1]
    if not (fall.is_sure or lags) or behind <= 0 or of_part <= behind / 2:
        return
    fell = f"; it has lost {fall.drop:.3g} since epoch {fall.since}" if fall.is_sure else ""
    yield Finding(
        words.name,
        f"the validation bound is {behind:.3g} nats per datum below that of training, of which the {part} makes "
        f"{of_part:.3g}{fell}.",
        words.why,
        words.cure,
        since=fall.since if fall.is_sure else _since(Curve(gap.epochs, -gap.values), -most),
        evidence={"gap": float(behind), part: float(of_part), "drop": fall.drop},
    )


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


def dead_decoder(evidence: Evidence) -> Iterator[Finding]:
    """Find a decoder that does not look at latents that carry something."""
    split = evidence.judged
    own, other = (evidence.curve(f"{name}_distortion", split) for name in ("own", "swapped"))
    if not len(own):
        return
    local = [n for n in evidence.latents if evidence.units(n)]
    kl = sum(evidence.curve("kl", split, latent=n).last or 0.0 for n in local)
    cost = other.values - own.values
    if kl < PAID or cost[-1] >= USED * kl or abs(_trend(evidence.curve("rate", split))) > STILL:
        return
    yield Finding(
        "dead decoder",
        f"rows that exchange their latents lose {cost[-1]:.3g} nats of log-likelihood, although their KL is {kl:.3g}.",
        "the latents are paid for and not used: reconstructions do not depend on them.",
        "look for a detached or zeroed input of the decoder; lower free_bits or a Capacity that force a KL; weaken "
        "the decoder's other inputs.",
        since=_since(Curve(own.epochs, cost), USED * kl),
        evidence={"exchange": float(cost[-1]), "kl": float(kl)},
    )


def _trend(curve: Curve) -> float:
    """Return the change of a curve since half of its epochs, as a part of its last value."""
    last = curve.values[-1]
    return float((last - curve.values[len(curve) // 2]) / last)


def _since(curve: Curve, below: float) -> int:
    """Return the first epoch from which a curve stays below a number until the end."""
    above = np.flatnonzero(curve.values >= below)
    return int(curve.epochs[above[-1] + 1 if len(above) else 0])


def _dead_units(evidence: Evidence, latent: str, split: str) -> tuple[list[str], int]:
    """Return the units of a latent that carry nothing, and the epoch since when there are as many."""
    curves = {unit: evidence.curve("kl_per_dim", split, unit=unit) for unit in evidence.units(latent)}
    dead = [unit for unit, curve in curves.items() if len(curve) and curve.values[-1] < DEAD]
    since = max((_since(curves[unit], DEAD) for unit in dead), default=0)
    return dead, since


def over_regularized(evidence: Evidence) -> Iterator[Finding]:
    """Find latents whose weight is what keeps them from carrying more."""
    split = evidence.judged
    for latent in evidence.latents:
        beta = evidence.curve("beta", latent=latent).last or 0.0
        if beta <= HEAVY:
            continue
        units, (dead, since) = evidence.units(latent), _dead_units(evidence, latent, split)
        if units and 2 * len(dead) < len(units):
            continue
        kl = evidence.curve("kl", split, latent=latent).last or 0.0
        silent = f", and {len(dead)} of {len(units)} units carry nothing" if units else ""
        yield Finding(
            "over-regularized",
            f"the weight of the KL is β = {beta:.3g}, and the KL {kl:.3g} nats per datum{silent}.",
            f"where training stands still, one more nat of rate would save {beta:.3g} nats of distortion: the bound at "
            "β = 1 is not at its optimum.",
            "lower β to 1, or raise it by a schedule that ends there.",
            site=latent,
            units=tuple(dead),
            since=since if dead else None,
            evidence={"beta": beta, "kl": kl},
        )


def posterior_collapse(evidence: Evidence) -> Iterator[Finding]:
    """Find latents none of whose units carries anything."""
    split = evidence.judged
    for latent in evidence.latents:
        units, (dead, since) = evidence.units(latent), _dead_units(evidence, latent, split)
        if not units or len(dead) < len(units):
            continue
        kl = evidence.curve("kl_per_dim", split, unit=units[0]).last
        active = evidence.curve("active_units", split, latent=latent).last
        yield Finding(
            "posterior collapse",
            f"none of the {len(units)} units carries {DEAD:g} nats per datum"
            + ("." if active is None else f"; {active:.0f} are active."),
            "the guide answers with the prior whatever the datum: the latent is no representation of it.",
            "raise β slowly from 0 (pe.LinearWarmup), give free_bits, weaken the decoder (fewer inputs beside the "
            "latent, a smaller scale of the likelihood), lower the learning rate of the decoder.",
            site=latent,
            units=tuple(dead),
            since=since,
            evidence={"kl of the first unit": kl or 0.0} | ({} if active is None else {"active units": active}),
        )


def unused_units(evidence: Evidence) -> Iterator[Finding]:
    """Note units that carry nothing beside others that do."""
    for latent in evidence.latents:
        units, (dead, since) = evidence.units(latent), _dead_units(evidence, latent, evidence.judged)
        if 0 < len(dead) < len(units):
            yield Finding(
                "unused units",
                f"{len(dead)} of {len(units)} units carry less than {DEAD:g} nats per datum: {', '.join(dead)}.",
                "the latent has more units than the data need at this weight; the others are not affected.",
                "nothing; a latent with fewer units does the same.",
                site=latent,
                units=tuple(dead),
                since=since,
                evidence={"unused": len(dead), "units": len(units)},
            )


def noisy_objective(evidence: Evidence) -> Iterator[Finding]:
    """Find a gradient whose noise dwarfs it at every probe, while the bound wanders."""
    norm, noise = evidence.curve("gradient_norm"), evidence.curve("gradient_noise")
    elbo = evidence.steady("elbo", evidence.judged)
    if not len(norm) or len(elbo) < FEWEST:
        return
    rough = float(np.median(noise.values / np.maximum(norm.values, noise.values / MOST)))
    gained = float(np.ptp(elbo.smooth.values))
    if rough < ROUGH or elbo.noise < WANDERS * gained:
        return
    yield Finding(
        "noisy objective",
        f"the gradient's standard deviation is {rough:.0f} times its norm; the bound varies by {elbo.noise:.3g} nats "
        f"per datum from epoch to epoch, beside {gained:.3g} gained.",
        "steps go in random directions: more of them do not help.",
        "more rows per batch, num_particles, a lower learning rate; reparameterized latents in place of a "
        "score-function gradient.",
        evidence={"noise over norm": rough, "noise of the bound": elbo.noise},
    )


def not_converged(evidence: Evidence) -> Iterator[Finding]:
    """Find a bound that still rises."""
    split = evidence.judged
    elbo = evidence.steady("elbo", split)
    if len(elbo) < FEWEST:
        return
    quarter = len(elbo) // 4
    first, second, third = (float(elbo.values[-k * quarter :][:quarter].mean()) for k in (3, 2, 1))
    before, gain = second - first, third - second
    ratio = min(gain / before, LONGEST) if before > 0 else LONGEST
    left = gain * ratio / (1 - ratio)
    whole = float(np.ptp(elbo.smooth.values))
    if gain <= SURE * elbo.noise * (2 / quarter) ** 0.5 or left <= LEFT * whole:
        return
    yield Finding(
        "not converged",
        f"the {split} bound gained {before:.3g}, then {gain:.3g} nats per datum in the last two quarters of training: "
        f"at this pace, about {left:.3g} are left.",
        "training ended on the way: more epochs would give a better bound.",
        "raise max_epochs, or the learning rate; patience=10 ends training when the bound has settled.",
        evidence={"gain before": before, "gain": gain, "left": left},
    )


RULES: tuple[tuple[Rule, tuple[FindingName, ...]], ...] = (
    (diverging, ()),
    (warm_up_too_long, ("diverging",)),
    (noisy_objective, ("diverging",)),
    (dead_decoder, ("diverging", "noisy objective")),
    (exploding_kl, ("diverging", "noisy objective", "dead decoder")),
    (over_regularized, ("diverging", "noisy objective", "dead decoder")),
    (posterior_collapse, ("diverging", "noisy objective", "dead decoder", "over-regularized")),
    (kl_shrinkage, ("diverging", "exploding KL", "noisy objective")),
    (overfitting, ("diverging", "exploding KL", "noisy objective", "KL shrinkage")),
    (not_converged, ("diverging", "exploding KL", "noisy objective", "KL shrinkage", "overfitting")),
    (unused_units, ("diverging", "over-regularized")),
)
"""The rules in the order of what matters, each with the findings that explain what it would find."""
