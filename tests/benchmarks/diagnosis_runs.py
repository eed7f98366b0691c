"""The labeled runs of ``bench_diagnosis``: what each is by construction, decided before it was trained.

A row of ``TABLE`` says which mistake was built in and how; what is healthy is trained from two seeds. ``develop``,
``final`` (other seeds, slightly other settings) and ``fresh`` (other rows of the data, other widths, learning rates and
epochs) are the sets on which the rules were made. ``third``, ``fourth`` and ``fifth`` have constructions of their own,
written down before one of them was trained, and judged once; rules were mended after each of the first two. Every run
of ``fifth`` is trained from two seeds.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch

import pyro_elbo as pe
from tests.benchmarks.diagnosis_constructions import FIFTH, FOURTH, TABLE, THIRD
from tests.benchmarks.diagnosis_programs import FAMILIES

SEEDS = {
    "develop": (0, 1),
    "final": (100, 101),
    "fresh": (200, 201),
    "third": (300, 301),
    "fourth": (400, 401),
    "fifth": (500, 501),
}  # the second is for healthy runs alone, of which more are needed, except in ``fifth``


@dataclass(frozen=True)
class Recipe:
    """How a program is trained.

    Attributes:
        lr, epochs, batch: of Adam.
        decay: the learning rate of the last epoch over the first: a settled run ends small, a diverging one large.
        beta: weight of the KL; ``"warm-up"`` rises to 1.
        rises: the part of training in which it does.
        free_bits, capacity: nats that each unit, or the whole latent, is made to carry.
    """

    lr: float = 5e-3
    epochs: int = 40
    batch: int | None = 100
    decay: float = 0.02
    beta: float | str = 1.0
    rises: float = 1.0
    free_bits: float = 0.0
    capacity: float | None = None

    def loss(self, steps: int) -> pe.TraceBeta_ELBO:
        """Return the objective of a training of so many steps."""
        if self.capacity is not None:
            return pe.TraceBeta_ELBO(pe.Capacity(0.0, self.capacity, steps // 2))
        beta = pe.LinearWarmup(0.0, 1.0, steps=int(self.rises * steps)) if isinstance(self.beta, str) else self.beta
        return pe.TraceBeta_ELBO(beta, free_bits=self.free_bits)


class Run(NamedTuple):
    """One run: a construction with a seed."""

    label: str
    family: str
    seed: int
    sizes: dict[str, Any]
    recipe: Recipe

    @property
    def name(self) -> str:
        settings = {**self.sizes, **{k: v for k, v in vars(self.recipe).items() if v != getattr(Recipe, k)}}
        return f"{self.family} {' '.join(f'{k}={v}' for k, v in settings.items())} seed={self.seed}"

    def fit(self, **options: Any) -> pe.FitResult:
        """Train it; ``options`` are further ones of ``pe.fit``."""
        pyro.clear_param_store()
        pyro.set_rng_seed(self.seed)
        programs = FAMILIES[self.family](**self.sizes)
        first = programs.train[0] if isinstance(programs.train, tuple) else programs.train
        r = self.recipe
        steps = r.epochs * -(-len(first) // (r.batch or len(first)))
        return pe.fit(
            *programs,
            loss=r.loss(steps),
            lr=r.lr,
            scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, r.decay ** (1 / r.epochs)),
            max_epochs=r.epochs,
            batch_size=r.batch,
            seed=self.seed,
            progress=False,
            **options,
        )


OTHER_ROWS = {"third": 2, "fourth": 3, "fifth": 4}  # seeds of their order
ROWS = {"vae": 1200, "factors": 1200, "regression": 240, "vrnn": 300}


def _afresh(family: str, sizes: dict[str, Any], recipe: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the sizes and the recipe of a row of the half ``fresh``."""
    sizes = {**sizes, "rows": int(0.9 * sizes.get("rows", ROWS[family]))}
    if "hidden" in sizes:
        sizes["hidden"] = int(1.25 * sizes["hidden"])
    if family in ("vae", "vrnn"):
        sizes["shuffle"] = 1
    lr, epochs = recipe.get("lr", Recipe.lr), recipe.get("epochs", Recipe.epochs)
    return sizes, {**recipe, "lr": 0.8 * lr, "epochs": int(1.2 * epochs)}


def runs(half: str) -> list[Run]:
    """Return the runs of a half."""
    found = []
    for label, family, sizes, recipe, final in {"third": THIRD, "fourth": FOURTH, "fifth": FIFTH}.get(half, TABLE):
        sizes, settings = dict(sizes), dict(recipe)
        for name, value in (final if half == "final" else {}).items():
            (settings if name in Recipe.__dataclass_fields__ else sizes)[name] = value
        if half == "fresh":
            sizes, settings = _afresh(family, sizes, settings)
        if half in OTHER_ROWS and family in ("vae", "vrnn"):
            sizes["shuffle"] = OTHER_ROWS[half]
        twice = half == "fifth" or (label == "healthy" and family != "vrnn")
        seeds = SEEDS[half] if twice else SEEDS[half][:1]
        found += [Run(label, family, seed, sizes, Recipe(**settings)) for seed in seeds]
    return found
