"""Recipes that train sequence models on the Bach chorales, judged on held-out pieces in nats per frame.

Run with ``python -m tests.benchmarks.bench_chorales --data FILE --model vrnn dmm --seeds 0 1 2``, where FILE is the
chorales (229 pieces to train on, 76 to choose by, 77 to test on). Steps are compiled. Pieces are padded to one of few
lengths, so that few graphs are compiled, and some are transposed. What is judged is a running mean of the parameters;
the validation pieces choose the epoch of every stage, the test pieces are looked at once, at the end. ``FIVO`` is the
filtering bound with 16 particles, ``refined`` the ELBO of the semi-amortized guide of a DMM.
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyro
import torch
from torch import Tensor

import pyro_elbo as pe
from models.cells import SequenceModel
from models.dmm import DMM
from models.sequences import KEYS, Sequences, load_chorales, pad
from models.vrnn import VRNN
from pyro_elbo.objectives.weighting import Beta

PARTICLES = 16
COLUMNS = ("ELBO train", "ELBO valid", "ELBO test", "FIVO valid", "FIVO test", "refined valid", "refined test")
REFINING_RATE = 0.05  # of the summaries of a semi-amortized guide, which move within (-1, 1)

Batch = tuple[Tensor, Tensor]  # sequences, lengths
Pieces = dict[str, Sequences]


@dataclass(frozen=True)
class Stage:
    """A part of the training, from the best parameters of the one before.

    Attributes:
        epochs: how many.
        lr: of Adam at the start; it falls along a cosine to ``floor`` times that.
        warmup: epochs over which β rises from ``beta`` to 1.
        particles: of the filtering bound; 1 trains with the ELBO.
        look: epochs between two looks at the validation pieces.
    """

    epochs: int
    lr: float
    floor: float = 0.0
    warmup: int = 0
    beta: float = 0.1
    particles: int = 1
    look: int = 10

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 1."""
        fallen = 0.5 * (1 - math.cos(math.pi * (epoch - 1) / self.epochs))
        return self.lr * (1 - (1 - self.floor) * fallen)

    def objective(self, batches: int) -> pe.TraceTimestep_ELBO:
        """What is trained with; ``batches`` an epoch."""
        if self.particles > 1:
            return objective(self.particles, filtering=True)
        beta = pe.LinearWarmup(self.beta, 1.0, steps=self.warmup * batches) if self.warmup else 1.0
        return objective(1, beta)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        make: the untrained model.
        stages: one after the other.
        weight_decay: of Adam.
        batch: pieces a step, about.
        lengths: to which pieces are padded.
        transposed: share of the pieces that are transposed, each time anew.
        halftones: by how much at most, up or down.
        average: how much of the running mean of the parameters stays at each step.
        targets: what the test pieces should reach, nats per frame.
        refinement: steps of the semi-amortized guide of the judged pieces, which a DMM has.
    """

    make: Callable[[], SequenceModel]
    stages: tuple[Stage, ...]
    weight_decay: float
    targets: dict[str, float]
    refinement: int = 0
    batch: int = 20
    lengths: tuple[int, ...] = (65, 129)
    transposed: float = 0.5
    halftones: int = 3
    average: float = 0.995


RECIPES = {
    "vrnn": Recipe(
        make=lambda: VRNN(KEYS, z_dim=32, hidden=128),
        stages=(Stage(epochs=140, lr=8e-3, floor=0.5, warmup=40), Stage(epochs=90, lr=3e-3, particles=4, look=10)),
        weight_decay=1e-3,
        transposed=0.75,
        targets={"ELBO": -8.0, "FIVO": -6.7},
    ),
    "dmm": Recipe(
        make=lambda: DMM(KEYS, z_dim=32, emission=100, transition=100, rnn=128, residual=True),
        stages=(Stage(epochs=400, lr=8e-3, warmup=40, look=40),),
        weight_decay=0.0,
        transposed=0.5,
        targets={"refined": -6.9},
        refinement=150,
    ),
}


def objective(particles: int, beta: Beta = 1.0, *, filtering: bool = False) -> pe.TraceTimestep_ELBO:
    """The ELBO or the filtering bound, per frame."""
    return pe.TraceTimestep_ELBO(
        beta,
        normalize="frame",
        bound="filtering" if filtering else "elbo",
        num_particles=particles,
        vectorize_particles=True,
        max_plate_nesting=1,
    )


class Batches:
    """Shuffled, transposed and padded pieces; all batches of one padded length have one shape.

    Args:
        pieces: to train on, none longer than the last of the recipe's lengths.
        recipe: says the lengths, the size of batches, and what is transposed.
    """

    def __init__(self, pieces: Sequences, recipe: Recipe) -> None:
        self.recipe = recipe
        bounds = zip((0, *recipe.lengths), recipe.lengths, strict=False)
        groups = [(high, [p for p in pieces if low < len(p) <= high]) for low, high in bounds]
        self.groups = [(high, *pad(group, 0.0)) for high, group in groups if group]
        self.count = sum(self._batches(lengths) for _, _, lengths in self.groups)

    def __iter__(self) -> Iterator[Batch]:
        """One epoch. A few pieces come twice where batches would not be full."""
        chosen = [(g, rows) for g, group in enumerate(self.groups) for rows in self._rows(group[2])]
        for i in torch.randperm(len(chosen)):
            group, rows = chosen[i]
            length, x, lengths = self.groups[group]
            padded = torch.nn.functional.pad(x[rows], (0, 0, 0, length - x.shape[1]))
            yield self._transpose(padded), lengths[rows]

    def _batches(self, lengths: Tensor) -> int:
        return max(1, round(len(lengths) / self.recipe.batch))

    def _rows(self, lengths: Tensor) -> tuple[Tensor, ...]:
        count = self._batches(lengths)
        size = -(-len(lengths) // count)
        order = torch.randperm(len(lengths))
        return torch.cat([order, order[: count * size - len(order)]]).split(size)

    def _transpose(self, x: Tensor) -> Tensor:
        by = torch.randint(-self.recipe.halftones, self.recipe.halftones + 1, (len(x),))
        by = by * (torch.rand(len(x)) < self.recipe.transposed)
        keys = (torch.arange(KEYS) - by[:, None]) % KEYS  # the outer keys are never down
        return x.gather(2, keys[:, None].expand_as(x))


@torch.no_grad()
def bound(model: SequenceModel, pieces: Sequences, particles: int, *, filtering: bool = False) -> float:
    """The ELBO, or the filtering bound, in nats per frame."""
    with pyro.get_param_store().scope():  # the store knows the model in training by the same names
        return -objective(particles, filtering=filtering).loss(model.model, model.guide, *pad(pieces))


def refined(model: DMM, pieces: Sequences, steps: int) -> float:
    """The ELBO in nats per frame of a semi-amortized guide: so many steps on its summaries, the model held fixed.

    The posterior of each piece is optimized on that piece, with other noise than judges it.
    """
    x, lengths = pad(pieces, 0.0)
    fixed = copy.deepcopy(model).eval().requires_grad_(False)
    guide = fixed.semi_amortized(x, lengths)
    with pyro.get_param_store().scope():
        guide(x, lengths)  # makes the parameters
        optim = torch.optim.Adam([pyro.param("summaries")], lr=REFINING_RATE)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)
        svi = pe.SVI(fixed.model, guide, optim, pe.TraceTimestep_ELBO(max_plate_nesting=1), compile=True)
        for _ in range(steps):
            svi.step(x, lengths)
            rates.step()
        with torch.no_grad():
            return -objective(4).loss(fixed.model, guide, x, lengths)


@torch.no_grad()
def follow(mean: SequenceModel, model: SequenceModel, stays: float) -> None:
    """Move the running mean of the parameters."""
    for p, new in zip(mean.parameters(), model.parameters(), strict=True):
        p.lerp_(new, 1 - stays)


def train(recipe: Recipe, pieces: Pieces, seed: int) -> tuple[SequenceModel, list[int]]:
    """Train, and return the model and the best epoch of every stage."""
    pyro.set_rng_seed(seed)
    model, batches, epochs = recipe.make(), Batches(pieces["train"], recipe), []
    model.start_from(torch.cat(pieces["train"]))
    for stage in recipe.stages:
        model, epoch = train_stage(stage, recipe, model, batches, pieces["valid"])
        epochs.append(epoch)
    return model, epochs


def train_stage(
    stage: Stage, recipe: Recipe, model: SequenceModel, batches: Batches, valid: Sequences
) -> tuple[SequenceModel, int]:
    """Train on, and return the averaged model of the best epoch on the validation pieces, and that epoch."""
    pyro.clear_param_store()
    optim = torch.optim.Adam(model.parameters(), lr=stage.lr, weight_decay=recipe.weight_decay)
    svi = pe.SVI(model.model, model.guide, optim, stage.objective(batches.count), compile=True, grad_clip=10.0)
    mean, steps = copy.deepcopy(model), 0
    best: tuple[float, int, SequenceModel] = (-math.inf, 0, model)
    for epoch in range(1, stage.epochs + 1):
        optim.param_groups[0]["lr"] = stage.rate(epoch)
        for x, lengths in batches:
            svi.step(x, lengths)
            steps += 1
            follow(mean, model, min(recipe.average, steps / (10 + steps)))
        if epoch % stage.look == 0 or epoch == stage.epochs:
            value = bound(mean, valid, PARTICLES, filtering=True) if stage.particles > 1 else bound(mean, valid, 4)
            print(f"  epoch {epoch}: validation {value:.3f}", flush=True)
            if value > best[0]:
                best = (value, epoch, copy.deepcopy(mean))
    return best[2], best[1]


def judge(model: SequenceModel, pieces: Pieces, refinement: int) -> dict[str, float]:
    """All bounds of a trained model, by column of the table."""
    pyro.set_rng_seed(0)
    kinds = {
        "ELBO": lambda split: bound(model, pieces[split], 4),
        "FIVO": lambda split: bound(model, pieces[split], PARTICLES, filtering=True),
        "refined": lambda split: refined(model, pieces[split], refinement) if isinstance(model, DMM) else math.nan,
    }
    return {column: kinds[column.split()[0]](column.split()[1]) for column in COLUMNS}


def run(name: str, seeds: Sequence[int], recipe: Recipe, pieces: Pieces, folder: Path | None) -> list[str]:
    """Train from every seed; the rows of the table, and how the targets fared."""
    rows, results = [], []
    for seed in seeds:
        start = time.perf_counter()
        model, epochs = train(recipe, pieces, seed)
        minutes = (time.perf_counter() - start) / 60
        if folder is not None:
            torch.save(model.state_dict(), folder / f"{name}_{seed}.pt")
        results.append(judge(model, pieces, recipe.refinement))
        numbers = "".join(f"{value:15.3f}" for value in results[-1].values())
        rows.append(f"{name:6}{seed:>5}{'+'.join(map(str, epochs)):>9}{numbers}{minutes:9.1f}")
        print(rows[-1], flush=True)
    for kind, target in recipe.targets.items():
        values = [result[f"{kind} test"] for result in results]
        spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        met = "met" if min(values) >= target else "MISSED"
        rows.append(f"{name}: {kind} test {statistics.fmean(values):.3f}{spread}, target >= {target:g}: {met}")
    return rows


def shortened(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe with stages of so many epochs: no more than a try of the machinery."""
    stages = (replace(s, epochs=epochs, warmup=min(s.warmup, epochs)) for s in recipe.stages)
    return replace(recipe, stages=tuple(stages))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="jsb_chorales.npz")
    parser.add_argument("--model", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="of every stage, in place of the recipe's")
    parser.add_argument("--save", type=Path, help="folder for the trained parameters")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pyro.enable_validation(False)  # the data are known
    data, table = load_chorales(args.data), []
    if args.save is not None:
        args.save.mkdir(parents=True, exist_ok=True)
    for key in args.model:
        chosen = shortened(RECIPES[key], args.epochs) if args.epochs else RECIPES[key]
        print(key, chosen, flush=True)
        table += run(key, args.seeds, chosen, data, args.save)
    print(f"\n{'model':6}{'seed':>5}{'epoch':>9}{''.join(f'{c:>15}' for c in COLUMNS)}{'minutes':>9}", *table, sep="\n")
