r"""The rules of a diagnosis: one function per finding, from the evidence of a history.

The rules are in ``trends``, what the curves show, and in ``latents``, what the probes show of the latents. Their
thresholds are those of the labeled runs in ``docs/diagnosis.md``.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pyro_elbo.diagnosis.evidence import FEWEST, SPLITS, Evidence, named_points
from pyro_elbo.diagnosis.findings import Diagnosis, Finding, FindingName
from pyro_elbo.diagnosis.latents import dead_decoder, over_regularized, posterior_collapse, unpaid_rate, unused_units
from pyro_elbo.diagnosis.trends import (
    apart,
    diverging,
    exploding_kl,
    kl_shrinkage,
    noisy_objective,
    not_converged,
    not_finite,
    overfitting,
    warm_up_too_long,
)

if TYPE_CHECKING:
    import xarray

SETTLED = 0.01  # of what was gained: a bound that gained less in the last quarter has settled
Rule = Callable[[Evidence], Iterator[Finding]]


def diagnose(history: "xarray.Dataset | Any") -> Diagnosis:
    """Say from its history whether a fit is done and healthy, and if not, why.

    The findings, the most important one first: ``diverging``, ``noisy objective``, ``warm-up too long``,
    ``dead decoder``, ``exploding KL``, ``over-regularized``, ``posterior collapse``, ``KL shrinkage``,
    ``overfitting``, ``not converged``; or ``healthy``. ``unused units`` of a latent need no cure. Each carries its
    evidence in nats per datum. What the history does not show is said to be unknown: ``unsaid``.

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
        Diagnosis of 1 epoch: cannot be said
          cannot be said: whether training is done or goes wrong: a trend takes 6 epochs under the final
            weights.
          cannot be said: whether it overfits: no validation bound is known.
          cannot be said: whether latents collapse: none of them has a value per row of the data that a
            probe could judge.

    References:
        Burda, Grosse, Salakhutdinov (2016), arXiv:1509.00519 (active units); Alemi, Poole, Fischer, Dillon, Saurous,
        Murphy (2018), arXiv:1711.00464 (rate and distortion); Cremer, Li, Duvenaud (2018), arXiv:1801.03558
        (amortized inference on unseen data).
    """
    evidence = Evidence.of(history)
    findings: list[Finding] = []
    for rule, explained_by in RULES if evidence.shows_trends else RULES[:1]:
        if not {f.name for f in findings} & set(explained_by):
            findings += rule(evidence)
    if evidence.shows_trends and all(f.is_harmless for f in findings):
        findings.insert(0, _healthy(evidence))
    return Diagnosis(tuple(findings), tuple(_unsaid(evidence, {f.name for f in findings})), evidence.epochs)


def _healthy(evidence: Evidence) -> Finding:
    split = evidence.judged
    elbo, (gain, _) = evidence.curve("elbo", split).last or 0.0, evidence.steady("elbo", split).late_gain
    share = gain / evidence.gained(split) if gain > 0 else 0.0
    rises = f"; the last quarter of the epochs raised it by {gain:.2g}, {share:.1%} of what the fit has gained."
    stands = f"is {elbo:.4g} nats per datum{rises}" if share > SETTLED else f"has settled at {elbo:.4g} nats per datum."
    return Finding("healthy", f"the {SPLITS[split]} bound {stands}", evidence={"elbo": elbo, "gain": gain})


def _unsaid(evidence: Evidence, found: set[str]) -> Iterator[str]:
    if not evidence.shows_trends:
        yield f"whether training is done or goes wrong: a trend takes {FEWEST} epochs under the final weights."
    known = len(evidence.curve("elbo", "valid"))
    if 0 < known < evidence.epochs:
        lacking = f"{evidence.epochs - known} of {evidence.epochs} epochs"
        yield f"how validation went in {lacking}: its bound is not known there."
    if points := named_points(evidence.history):
        yield f"what the bound says of log p(x): the guide is a point estimate of {points}, and its elbo is no bound."
    if not known:
        yield "whether it overfits: no validation bound is known."
    elif (
        evidence.shows_trends
        and not found & {"diverging", "overfitting", "KL shrinkage"}
        and (behind := apart(evidence))
    ):
        yield (
            f"whether it overfits: from the start, the validation bound was {behind:.3g} nats per datum behind that of "
            "training, as that of rows of another kind is; pe.compare_splits says at which sites."
        )
    if len(evidence.curve("swapped_distortion", evidence.judged)):
        return
    if not evidence.is_probed:
        yield "what latents carry, and whether they collapse: no probe falls into these epochs."
    elif any(map(evidence.units, evidence.latents)):
        yield "whether data depend on the latents: rows cannot exchange their values (enumerated ones, for example)."
    else:
        yield "whether latents collapse: none of them has a value per row of the data that a probe could judge."


RULES: tuple[tuple[Rule, tuple[FindingName, ...]], ...] = (
    (not_finite, ()),
    (noisy_objective, ("diverging",)),
    (diverging, ("diverging", "noisy objective")),
    (warm_up_too_long, ("diverging",)),
    (dead_decoder, ("diverging",)),
    (exploding_kl, ("diverging", "noisy objective", "dead decoder")),
    (unpaid_rate, ("diverging", "noisy objective", "dead decoder", "exploding KL")),
    (over_regularized, ("diverging", "dead decoder")),
    (posterior_collapse, ("diverging", "dead decoder", "over-regularized")),
    (kl_shrinkage, ("diverging", "exploding KL", "noisy objective")),
    (overfitting, ("diverging", "exploding KL", "noisy objective", "KL shrinkage")),
    (not_converged, ("diverging", "exploding KL", "noisy objective", "KL shrinkage", "overfitting")),
    (unused_units, ("diverging", "over-regularized")),
)
"""The rules in the order of what matters, each with the findings that explain what it would find."""
