"""What the probes of a fit show of its latents: units that carry nothing, weights too large, codes not listened to."""

from collections.abc import Iterator

from pyro_elbo.diagnosis.evidence import Curve, Evidence
from pyro_elbo.diagnosis.findings import Finding

DEAD = 0.02  # nats per datum: a unit with less carries nothing
PAID = 0.1  # nats per datum: latents with more are paid for
STILL = 0.25  # of the rate, since half of training: a KL that changes more is on its way
USED = 0.03  # of the KL: an exchange of rows that costs less shows that the decoder does not look at them
HEAVY = 1.5  # a weight above it is chosen, not an accident of a schedule
LIGHT = 0.5  # so is one below it
FAR = 5.0  # times the information that a batch shows, at most log B: a rate beyond it is not information


def dead_decoder(evidence: Evidence) -> Iterator[Finding]:
    """Find a decoder that does not look at latents that carry something."""
    split = evidence.judged
    own, other = (evidence.curve(f"{name}_distortion", split) for name in ("own", "swapped"))
    if not len(own):
        return
    local = [n for n in evidence.latents if evidence.units(n)]
    kl = sum(evidence.curve("kl", split, latent=n).last or 0.0 for n in local)
    cost = other.values - own.values
    if kl < PAID or abs(cost[-1]) >= USED * kl or abs(_trend(evidence.curve("rate", split))) > STILL:
        return
    yield Finding(
        "dead decoder",
        f"rows that exchange their latents lose {cost[-1]:.3g} nats of log-likelihood, although their KL is {kl:.3g}.",
        "the latents are paid for and not used: reconstructions do not depend on them.",
        "look for a detached or zeroed input of the decoder; lower free_bits or a Capacity that force a KL; weaken "
        "the decoder's other inputs.",
        since=Curve(own.epochs, abs(cost)).below_since(USED * kl),
        evidence={"exchange": float(cost[-1]), "kl": float(kl)},
    )


def unpaid_rate(evidence: Evidence) -> Iterator[Finding]:
    """Find latents whose weight is far below 1, and whose KL is far above the information that a batch shows."""
    split = evidence.judged
    for latent in evidence.latents:
        beta, kl = evidence.weight(latent), evidence.curve("kl", split, latent=latent).last
        known = evidence.curve("information", split, latent=latent, side="lower").last
        if beta is None or kl is None or known is None or beta >= LIGHT or kl <= FAR * known:
            continue
        yield Finding(
            "exploding KL",
            f"the KL is {kl:.3g} nats per datum, where a batch shows {known:.3g} nats of information; its weight is "
            f"β = {beta:.3g}: a nat of it saves {beta:.3g} nats of distortion.",
            "the guide leaves the prior for next to nothing: draws of the prior do not look like the data.",
            "raise β to 1, at once or by a schedule.",
            site=latent,
            evidence={"kl": kl, "information": known, "beta": beta},
        )


def over_regularized(evidence: Evidence) -> Iterator[Finding]:
    """Find latents whose weight is what keeps them from carrying more."""
    split = evidence.judged
    for latent in evidence.latents:
        beta, weights = evidence.weight(latent), evidence.curve("beta", latent=latent)
        if beta is None or beta <= HEAVY:
            continue
        units, (dead, _) = evidence.units(latent), _dead_units(evidence, latent, split)
        if units and 2 * len(dead) < len(units):
            continue
        kl = evidence.curve("kl", split, latent=latent).last or 0.0
        silent = f", and {len(dead)} of {len(units)} units carry less than {DEAD:g}" if units else ""
        yield Finding(
            "over-regularized",
            f"the weight of the KL is β = {beta:.3g}; the KL is {kl:.3g} nats per datum{silent}.",
            f"where training stands still, one more nat of rate would save {beta:.3g} nats of distortion: the bound at "
            "β = 1 is not at its optimum.",
            "lower β to 1, or raise it by a schedule that ends there.",
            site=latent,
            units=tuple(dead),
            since=Curve(weights.epochs, -weights.values).below_since(-HEAVY),
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
            + ("." if active is None else f", and {active:.0f} of them move their posterior means with the data."),
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


def _dead_units(evidence: Evidence, latent: str, split: str) -> tuple[list[str], int]:
    """Return the units of a latent that carry nothing, and the epoch since when there are as many."""
    curves = {unit: evidence.curve("kl_per_dim", split, unit=unit) for unit in evidence.units(latent)}
    dead = [unit for unit, curve in curves.items() if len(curve) and curve.values[-1] < DEAD]
    since = max((curves[unit].below_since(DEAD) for unit in dead), default=0)
    return dead, since


def _trend(curve: Curve) -> float:
    """Return the change of a curve since half of its epochs, as a part of its last value."""
    last = curve.values[-1]
    return float((last - curve.values[len(curve) // 2]) / last)
