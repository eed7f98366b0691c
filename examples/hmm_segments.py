"""Segment sequences with a hidden Markov model whose state is summed out.

The script simulates sequences of unlike length that stay in one of four states for a while each, fits a hidden Markov
model by its exact log evidence, and asks three things of the states: their smoothing marginals (``terms.posterior``),
their most probable path (``pe.infer_discrete(..., temperature=0)``, Viterbi), and draws of the whole path
(``pe.to_arviz``). The simulator knows the true states and parameters. So it also says how well anyone can do: with the
true parameters. The most probable path has too few segments, since short ones are never most probable. Draws have as
many as there are.

With ``--data ts_japanesevowels.npz`` (UCI's Japanese vowels, 12 coefficients a frame) it fits a model to each of nine
speakers, and names the speaker of each new utterance by the evidence, beside a Gaussian without states. Run with
``python -m examples.hmm_segments``; figure and posterior (ArviZ) of the simulation are saved to
``runs/hmm_segments/``.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import NamedTuple

import pyro
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import pyro_elbo as pe
from models.hmm import HMM
from models.sequences import load_speakers, load_vowels, pad

STATES = 4
COLORS = ("#1f5fa8", "#d08c3f", "#4f8f5b", "#b3452c")

Paths = Int[Tensor, "... sequences T"]


class Simulated(NamedTuple):
    """Padded sequences, their lengths, their true states, and the model that made them."""

    x: Float[Tensor, "sequences T"]
    lengths: Int[Tensor, " sequences"]
    k: Paths
    truth: HMM

    @property
    def valid(self) -> Bool[Tensor, "sequences T"]:
        """The steps before the end of each sequence."""
        return torch.arange(self.x.shape[1]) < self.lengths.unsqueeze(-1)


class Segmented(NamedTuple):
    """Smoothing marginals and most probable paths under one model, its labels those of the truth."""

    marginals: Float[Tensor, "sequences T K"]
    path: Paths


@torch.no_grad()
def simulate(sequences: int, longest: int) -> Simulated:
    """Draw sequences from a model whose states are left with a probability of 0.08 a step."""
    truth = HMM(STATES)
    stay = 0.92 * torch.eye(STATES) + 0.08 / (STATES - 1) * (1 - torch.eye(STATES))
    truth.step.copy_(stay.log())
    truth.emit.copy_(torch.tensor([[-3.0], [-1.0], [1.0], [3.0]]))
    truth.log_scale.fill_(torch.tensor(1.3).log())
    lengths = torch.randint(longest // 3, longest + 1, (sequences,))
    k, states = torch.zeros(sequences, dtype=torch.long), []
    for _ in range(longest):
        k = truth.transition(k).sample()
        states.append(k)
    k = torch.stack(states, 1)
    x = truth.emission(k).sample()
    return Simulated(x.where(torch.arange(longest) < lengths.unsqueeze(-1), torch.nan), lengths, k, truth)


def fit(hmm: HMM, x: Tensor, lengths: Tensor, steps: int, compile: bool) -> None:
    """Maximize the exact log evidence: nothing is left to guide."""
    pyro.clear_param_store()
    svi = pe.SVI(hmm.model, hmm.guide, pyro.optim.Adam({"lr": 0.05}), pe.TraceBeta_ELBO(), compile=compile)
    svi.run(steps, x, lengths, progress=False)


def segment(hmm: HMM, data: Simulated) -> Segmented:
    """Return the states of all sequences, named after those of the truth that they agree with most often."""
    pyro.clear_param_store()
    terms = pe.TraceTimestep_ELBO().terms(hmm.model, hmm.guide, data.x, data.lengths)
    path = pe.infer_discrete(hmm.model, hmm.guide, data.x, data.lengths, temperature=0)["k"]
    rename = names_of(path, data)
    marginals = terms.posterior["k"].detach()
    return Segmented(marginals[..., rename.argsort()], rename[path])


def names_of(path: Paths, data: Simulated) -> Int[Tensor, " K"]:
    """Return the true label of each state of a path: the assignment with the most frames in common."""
    pairs = STATES * path[data.valid] + data.k[data.valid]
    together = torch.bincount(pairs, minlength=STATES**2).reshape(STATES, STATES)
    return torch.tensor(linear_sum_assignment(together.numpy(), maximize=True)[1])


def accuracy(path: Paths, data: Simulated) -> float:
    return (path == data.k)[data.valid].double().mean().item()


def count_segments(path: Paths, valid: Bool[Tensor, "sequences T"]) -> Int[Tensor, "..."]:
    """Count the segments of all sequences together."""
    changes = (path.diff(dim=-1) != 0) & valid[:, 1:]
    return changes.sum((-1, -2)) + len(valid)


def draw(data: Simulated, found: Segmented, counts: Tensor, path: Path) -> None:
    """Plot one sequence with its states, how sure the marginals are and how right, and the number of segments."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    figure, axes = plt.subplot_mosaic(
        [["x", "sure"], ["bands", "sure"], ["marginals", "counts"]],
        figsize=(11, 6),
        layout="constrained",
        width_ratios=[2, 1],
        height_ratios=[1.3, 0.5, 1],
    )
    i = int(data.lengths.argmax())
    n = int(data.lengths[i])
    axes["x"].scatter(range(n), data.x[i, :n].numpy(), c=[COLORS[k] for k in data.k[i, :n].tolist()], s=14)
    axes["x"].set(xlim=(-0.5, n - 0.5), ylabel="x", title="one sequence, colored by its true states")
    bands = torch.stack([data.k[i, :n], found.path[i, :n]])
    axes["bands"].imshow(bands.numpy(), aspect="auto", cmap=ListedColormap(COLORS), vmin=0, vmax=STATES - 1)
    axes["bands"].set_yticks([0, 1], ["truth", "best path"])
    axes["marginals"].stackplot(range(n), found.marginals[i, :n].T.numpy(), colors=COLORS)
    axes["marginals"].set(xlim=(-0.5, n - 0.5), ylim=(0, 1), xlabel="time", ylabel="smoothing marginals")
    sure, guess = found.marginals[data.valid].max(-1)
    right = (guess == data.k[data.valid]).double()
    bins = torch.linspace(0.25, 1, 11)
    where = torch.bucketize(sure, bins[1:-1])
    points = [
        (sure[where == b].mean().item(), right[where == b].mean().item()) for b in range(10) if (where == b).sum() > 100
    ]
    axes["sure"].plot([0.25, 1], [0.25, 1], color="#9aa5b1", linewidth=1)
    axes["sure"].plot(*zip(*points, strict=True), "o-", color=COLORS[0])
    axes["sure"].set(
        xlabel="largest marginal", ylabel="share of frames that it names right", title="how sure, how right"
    )
    axes["counts"].hist(counts.numpy(), bins=25, color=COLORS[0], alpha=0.7, label="draws")
    axes["counts"].axvline(count_segments(data.k, data.valid).item(), color="black", label="truth")
    axes["counts"].axvline(
        count_segments(found.path, data.valid).item(), color=COLORS[3], linestyle="--", label="best path"
    )
    axes["counts"].set(xlabel="segments", yticks=[])
    axes["counts"].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def simulation(out: Path, smoke_test: bool) -> None:
    """Fit and segment simulated sequences, and compare with the truth."""
    data = simulate(*(40, 60) if smoke_test else (120, 120))
    hmm, frames = HMM(STATES), data.x[data.valid].sort().values
    hmm.start_from([part.unsqueeze(-1) for part in frames.chunk(STATES)])
    fit(hmm, data.x, data.lengths, 120 if smoke_test else 500, compile=not smoke_test)

    n = int(data.lengths.sum())
    bound = pe.TraceBeta_ELBO().terms(hmm.model, hmm.guide, data.x, data.lengths).elbo.detach()
    evidence, at_truth = (m.log_evidence(data.x, data.lengths).sum().detach() for m in (hmm, data.truth))
    fitted, ideal = segment(hmm, data), segment(data.truth, data)
    print(f"{len(data.x)} sequences of {int(data.lengths.min())} to {int(data.lengths.max())} frames, {n} in all\n")
    print(f"{'':24}{'fitted':>10}{'true parameters':>18}")
    print(f"{'log p(x), nats a frame':24}{evidence / n:10.4f}{at_truth / n:18.4f}")
    guesses = [(m.path, m.marginals.argmax(-1)) for m in (fitted, ideal)]
    for name, (ours, theirs) in zip(("best path", "largest marginal"), zip(*guesses, strict=True), strict=True):
        print(f"{name + ', right':24}{accuracy(ours, data):10.4f}{accuracy(theirs, data):18.4f}")

    pyro.clear_param_store()
    exported = pe.to_arviz(hmm.model, hmm.guide, data.x, data.lengths, num_samples=400)
    counts = count_segments(torch.as_tensor(exported.posterior["k"].values[0]), data.valid)
    true, best = int(count_segments(data.k, data.valid)), int(count_segments(fitted.path, data.valid))
    low, high = counts.double().quantile(torch.tensor([0.005, 0.995], dtype=torch.float64)).tolist()
    print(f"\nsegments: {true} in truth, {best} on the best paths, {low:.0f} to {high:.0f} in 99 % of the draws")
    print(pe.loo(exported))
    out.mkdir(parents=True, exist_ok=True)
    exported.to_netcdf(str(out / "posterior.nc"))
    if importlib.util.find_spec("matplotlib") is not None:
        draw(data, fitted, counts, out / "hmm_segments.png")
    print(f"\nwritten to {out}/: " + ", ".join(sorted(path.name for path in out.iterdir())))

    ours, theirs = accuracy(fitted.path, data), accuracy(ideal.path, data)
    print(
        f"the best path names {100 * ours:.1f} % of the frames right, {100 * theirs:.1f} % with the true parameters, "
        f"and has {100 * best / true:.0f} % of the segments; the draws hold their number"
    )
    torch.testing.assert_close(bound, evidence, rtol=1e-5, atol=0)
    assert evidence > at_truth, "the fitted parameters must have a higher evidence than the true ones"
    assert ours > theirs - 0.02, f"the fitted model must segment like the true one, got {ours:.3f} for {theirs:.3f}"
    assert best < true, f"the best paths must miss segments, got {best} of {true}"
    assert low <= true <= high, f"the draws must hold the true number of segments, got {low} to {high} for {true}"


def vowels(path: Path, smoke_test: bool) -> None:
    """Fit a model to each speaker's utterances, and name the speakers of others by the evidence."""
    utterances, speakers = load_vowels(path), load_speakers(path)
    x, lengths = pad(utterances["test"])
    scores: dict[int, list[Tensor]] = {1: [], STATES: []}
    for speaker in range(9):
        own = [u for u, s in zip(utterances["train"], speakers["train"].tolist(), strict=True) if s == speaker]
        for states in scores:
            hmm = HMM(states, channels=12)
            hmm.start_from([torch.cat(part) for part in zip(*(u.tensor_split(states) for u in own), strict=True)])
            fit(hmm, *pad(own), steps=10 if smoke_test else 100, compile=False)
            scores[states].append(hmm.log_evidence(x, lengths).detach())
        mine = speakers["test"] == speaker
        pyro.clear_param_store()
        path = pe.infer_discrete(hmm.model, hmm.guide, x[mine], lengths[mine], temperature=0)["k"]
        valid = torch.arange(x.shape[1]) < lengths[mine].unsqueeze(-1)
        segments = count_segments(path, valid) / len(valid)
        print(f"speaker {speaker}: {segments:.2f} segments on the best path of an utterance")
    right = {n: (torch.stack(s).argmax(0) == speakers["test"]).double().mean().item() for n, s in scores.items()}
    print(
        f"{100 * right[STATES]:.1f} % of {len(x)} utterances are given to their speaker by {STATES} states, "
        f"{100 * right[1]:.1f} % by one"
    )
    assert right[STATES] > 0.9, f"nine in ten utterances must be given to their speaker, got {right[STATES]:.3f}"


def main(data: Path | None, out: Path, *, seed: int = 0, smoke_test: bool = False) -> None:
    pyro.set_rng_seed(seed)
    if data is None:
        simulation(out, smoke_test)
    else:
        vowels(data, smoke_test)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="UCI's Japanese vowels, ts_japanesevowels.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/hmm_segments"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="fewer sequences and steps")
    args = parser.parse_args()
    main(args.data, args.out, seed=args.seed, smoke_test=args.smoke_test)
