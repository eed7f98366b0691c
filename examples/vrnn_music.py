"""A sequence model of four-part music: a VRNN, its bound over time, and a generated piece as MIDI.

With ``--data jsb_chorales.npz`` the script learns harmonizations by J. S. Bach. Without it, a small simulator writes
chords in four voices. The script trains on phrases of 32 quarter notes and plots where held-out pieces surprise the
model. It writes figures, the posterior for ArviZ (dimension ``time``) and a generated piece to ``runs/vrnn_music/``.
Run with ``python -m examples.vrnn_music``; needs ``pip install matplotlib mido``.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import torch
from torch import Tensor

import pyro_elbo as pe
from models.sequences import KEYS, LOWEST, Sequences, load_chorales, pad, piano_roll, write_midi
from models.vrnn import VRNN

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PHRASE, SHORTEST = 32, 8  # quarter notes
SCALE = (0, 2, 4, 5, 7, 9, 11)  # half tones of a major scale
FOLLOWERS = {0: (1, 3, 4, 5), 1: (4, 4, 0), 3: (0, 1, 4), 4: (0, 0, 5), 5: (1, 3)}  # the degrees that may follow
VOICES = (43, 52, 57, 64)  # the lowest MIDI notes of bass, tenor, alto and soprano


def simulate(num_pieces: int, seed: int) -> Sequences:
    """Simulate pieces of 16 to 48 quarter notes in any major key, as walks over chords of two quarter notes."""
    rng, pieces = np.random.default_rng(seed), []
    for _ in range(num_pieces):
        roll, tonic, degree = torch.zeros(2 * int(rng.integers(8, 25)), KEYS), rng.integers(12), 0
        for t in range(len(roll)):
            if t and t % 2 == 0:
                degree = rng.choice(FOLLOWERS[degree])
            tones = [(tonic + SCALE[(degree + third) % 7]) % 12 for third in (0, 2, 4)]
            for lowest, tone in zip(VOICES, [tones[0], *rng.permutation(tones)], strict=True):
                roll[t, lowest + (tone - lowest) % 12 - LOWEST] = 1
        pieces.append(roll)
    return pieces


def load(data: Path | None, seed: int) -> dict[str, Sequences]:
    """Return the pieces for training (``train``), early stopping (``valid``) and testing (``test``)."""
    if data is None:
        return {"train": simulate(200, seed), "valid": simulate(40, seed + 1), "test": simulate(40, seed + 2)}
    return load_chorales(data)


def phrases(pieces: Sequences) -> tuple[Tensor, Tensor]:
    """Cut the pieces into padded phrases; return the phrases and their lengths."""
    return pad([phrase for piece in pieces for phrase in piece.split(PHRASE) if len(phrase) >= SHORTEST])


def independent_keys(train: Sequences, held_out: Sequences) -> float:
    """Return log p of a held-out frame in nats under independent keys, each with its own frequency."""
    frames = torch.cat(list(train))
    frequency = (frames.sum(0) + 1) / (len(frames) + 2)
    return torch.distributions.Bernoulli(frequency).log_prob(torch.cat(list(held_out))).sum(-1).mean().item()


@torch.no_grad()
def per_step(vrnn: VRNN, pieces: Sequences) -> tuple[Tensor, Tensor]:
    """Return the bound of each frame in nats, shape (pieces, time), 0 in the padding; and the pieces per frame."""
    x, lengths = pad(pieces)
    terms = pe.TraceTimestep_ELBO(num_particles=4).terms(vrnn.model, vrnn.guide, x, lengths)
    present = torch.arange(x.shape[1]) < lengths[:, None]
    return terms.log_likelihood["x"] - terms.kl["z"], present.sum(0)


def draw(vrnn: VRNN, held_out: Sequences, generated: Tensor, baseline: float, path: Path) -> None:
    """Plot a held-out piece above the bound of its frames, the mean bound over time, and a generated piece."""
    bounds, present = per_step(vrnn, held_out)
    piece = held_out[0]
    figure, (roll, surprise, mean, new) = plt.subplots(
        4, 1, figsize=(10, 11), layout="constrained", height_ratios=[2, 1, 1, 2]
    )
    piano_roll(roll, piece)
    roll.set_title("a held-out piece")
    surprise.step(range(len(piece)), bounds[0, : len(piece)], where="mid", color="#1f5fa8")
    surprise.set(title="its bound, frame by frame", ylabel="nats", xlim=(-0.5, len(piece) - 0.5))
    often = present >= 0.25 * len(held_out)
    mean.plot((bounds.sum(0) / present.clamp(min=1))[often], color="#1f5fa8", label="VRNN")
    mean.axhline(baseline, color="#9aa5b1", ls="--", label="independent keys")
    mean.set(title="mean bound of all held-out pieces", xlabel="quarter notes", ylabel="nats per frame")
    mean.legend(frameon=False)
    piano_roll(new, generated)
    new.set_title("a generated piece")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def export(vrnn: VRNN, held_out: Sequences, history: pe.FitResult, path: Path, *, num_samples: int) -> None:
    """Write the posterior of the first phrases, which has a time dimension, for ArviZ."""
    x, lengths = phrases(held_out[:4])
    whole = x[lengths == PHRASE]
    data = pe.to_arviz(vrnn.model, vrnn.guide, whole, num_samples=num_samples, history=history)
    data.to_netcdf(str(path))
    print(f"posterior of z: {dict(data['posterior']['z'].sizes)}")


def train(pieces: dict[str, Sequences], out: Path, seed: int, smoke_test: bool) -> tuple[VRNN, pe.FitResult]:
    torch.manual_seed(seed)  # for the initial weights; pe.fit has its own seed
    vrnn = VRNN(KEYS, z_dim=4, hidden=32) if smoke_test else VRNN(KEYS, z_dim=32, hidden=128)
    vrnn.start_from(torch.cat(pieces["train"]))
    epochs, batch = (8, 20) if smoke_test else (60, 50)
    steps = epochs * len(phrases(pieces["train"])[0]) // batch
    return vrnn, pe.fit(
        vrnn.model,
        vrnn.guide,
        phrases(pieces["train"]),
        phrases(pieces["valid"]),
        loss=pe.TraceTimestep_ELBO(pe.LinearWarmup(0.1, 1.0, steps=steps // 3), normalize="frame"),
        lr=1e-2 if smoke_test else 5e-3,
        batch_size=batch,
        max_epochs=epochs,
        patience=10,
        dir=out,
        overwrite=True,
        seed=seed,
        grad_clip=10.0,
        compile=not smoke_test,
    )


def main(data: Path | None, out: Path, *, seed: int = 0, smoke_test: bool = False) -> None:
    pieces = load(data, seed)
    if smoke_test:
        pieces["train"] = pieces["train"][:40]
    vrnn, result = train(pieces, out, seed, smoke_test)

    pyro.set_rng_seed(seed)
    held_out = pieces["test"]
    bounds, present = per_step(vrnn, held_out)
    bound, baseline = (bounds.sum() / present.sum()).item(), independent_keys(pieces["train"], held_out)
    generated = vrnn.generate(1, 64)[0]
    print(f"keys down at a time: {generated.sum(1).mean():.2f} generated, {torch.cat(held_out).sum(1).mean():.2f} real")
    write_midi(generated, out / "generated.mid")
    draw(vrnn, held_out, generated, baseline, out / "vrnn_music.png")
    export(vrnn, held_out, result, out / "posterior.nc", num_samples=20 if smoke_test else 200)
    print(f"written to {out}/: " + ", ".join(sorted(path.name for path in out.iterdir())))

    print(f"held out, nats per frame: bound {bound:.2f}, independent keys {baseline:.2f}")
    least = 0.5 if data is None or smoke_test else 3.0
    assert bound > baseline + least, f"earlier frames must save {least:g} nats a frame, got {bound - baseline:.2f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the chorales, jsb_chorales.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/vrnn_music"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="a small network and few epochs")
    args = parser.parse_args()
    main(args.data, args.out, seed=args.seed, smoke_test=args.smoke_test)
