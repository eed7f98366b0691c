"""What a diagnosis says: findings as data, and the words around them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Literal

from pyro_elbo.display import count_noun, html_table

FindingName = Literal[
    "healthy",
    "not converged",
    "posterior collapse",
    "over-regularized",
    "overfitting",
    "KL shrinkage",
    "warm-up too long",
    "diverging",
    "dead decoder",
    "exploding KL",
    "noisy objective",
    "unused units",
]
WIDTH = 100
HARMLESS = ("healthy", "unused units")


@dataclass(frozen=True)
class Finding:
    """One thing that a history shows.

    Attributes:
        name: what it is called: ``"healthy"``, ``"posterior collapse"``, ...
        seen: what was seen, with its figures.
        why: why it matters.
        cure: what to do.
        site: the latent that it concerns; None for the fit as a whole.
        units: the units of the latent that it concerns.
        since: the first epoch from which it held until the end; None where that cannot be said.
        evidence: the figures that led to it, nats per datum where they have a unit.
    """

    name: FindingName
    seen: str
    why: str = ""
    cure: str = ""
    site: str | None = None
    units: tuple[str, ...] = ()
    since: int | None = None
    evidence: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_harmless(self) -> bool:
        """Whether nothing needs to be done: a healthy fit, or units that the latent does not need."""
        return self.name in HARMLESS

    @property
    def title(self) -> str:
        """The name with its place: ``"posterior collapse of 'z', since epoch 3"``."""
        site = "" if self.site is None else f" of '{self.site}'"
        return f"{self.name}{site}" + ("" if self.since is None else f", since epoch {self.since}")

    def __str__(self) -> str:
        """What was seen, why it matters and what to do, a paragraph each."""
        parts = {"seen": self.seen, "why": self.why, "do": self.cure}
        lines = [f"  {self.title}"]
        for head, text in parts.items():
            lines += wrap(text, WIDTH, initial_indent=f"    {head:6}", subsequent_indent=" " * 10)
        return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """The findings of a history, the most important one first; print it for an explanation.

    Attributes:
        findings: what was found.
        unsaid: what cannot be said from the history, and why.
        epochs: epochs that it covers.
    """

    findings: tuple[Finding, ...]
    unsaid: tuple[str, ...]
    epochs: int

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the findings, the most important one first."""
        return tuple(dict.fromkeys(finding.name for finding in self.findings))

    @property
    def is_healthy(self) -> bool | None:
        """Whether training is done and nothing is wrong; None where the history does not tell."""
        if not all(finding.is_harmless for finding in self.findings):
            return False
        return True if "healthy" in self.names else None

    @property
    def summary(self) -> str:
        """The findings in one line."""
        if not self.findings:
            return f"cannot be said from {count_noun(self.epochs, 'epoch')}"
        return "; ".join(finding.title for finding in self.findings)

    def __repr__(self) -> str:
        """The findings in plain words, and what cannot be said."""
        notes = [
            line
            for text in self.unsaid
            for line in wrap(f"cannot be said: {text}", WIDTH, initial_indent="  ", subsequent_indent="    ")
        ]
        return "\n".join([self._title, *map(str, self.findings), *notes])

    def _repr_html_(self) -> str:
        rows = [(f.title, f.seen, f.why, f.cure) for f in self.findings]
        return html_table(
            self._title, ("", "seen", "why", "what to do"), rows, [f"cannot be said: {x}" for x in self.unsaid]
        )

    @property
    def _title(self) -> str:
        return f"Diagnosis of {count_noun(self.epochs, 'epoch')}: {', '.join(self.names) or 'cannot be said'}"
