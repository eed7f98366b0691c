"""Real sequences to train on: their files read as lists of tensors, padded into batches, and shown.

The chorales are 382 harmonisations by J. S. Bach as piano rolls: one row per quarter note, one column per key of the
piano (column 0 is A0, MIDI's note 21), 1 where the key is down. Boulanger-Lewandowski, Bengio, Vincent (2012),
Modeling temporal dependencies in high-dimensional sequences, arXiv:1206.6392. The vowels are 640 utterances of two
Japanese vowels by nine men, 12 cepstral coefficients a frame. Kudo, Toyama, Shimbo (1999), Multidimensional curve
classification using passing-through regions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_elbo.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEYS, LOWEST = 88, 21  # of a piano; MIDI's number of its lowest key
TICKS = 480  # of MIDI's clock in a quarter note

Sequences = list[Float[Tensor, "time d"]]


def load_chorales(path: str | Path) -> dict[str, Sequences]:
    """The splits ``train``, ``valid`` and ``test``: 229, 76 and 77 piano rolls of shape (T_i, 88), of 0 and 1."""
    with np.load(path, allow_pickle=False) as data:
        packed = {split: (data[f"{split}_packed"], data[f"{split}_lengths"]) for split in ("train", "valid", "test")}
    return {split: _split(np.unpackbits(bits, axis=1)[:, :KEYS], n) for split, (bits, n) in packed.items()}


def load_vowels(path: str | Path) -> dict[str, Sequences]:
    """The splits ``train`` and ``test``: 270 and 370 utterances of shape (T_i, 12), 7 to 29 frames long."""
    with np.load(path, allow_pickle=False) as data:
        return {split: _split(data[f"{split}_flat"], data[f"{split}_lengths"]) for split in ("train", "test")}


def load_speakers(path: str | Path) -> dict[str, Int[Tensor, " utterances"]]:
    """The speaker of each utterance of the splits ``train`` and ``test``, 0 to 8."""
    with np.load(path, allow_pickle=False) as data:
        return {split: torch.tensor(data[f"{split}_label"].astype(int) - 1) for split in ("train", "test")}


def digits() -> Float[Tensor, "n 8 8"]:
    """The 1797 digits bundled with scikit-learn, counts from 0 to 16: sequences of 8 rows of 8 pixels."""
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().images, dtype=torch.float32)


def pad(
    sequences: Sequence[Float[Tensor, "time d"]], value: float = float("nan")
) -> tuple[Float[Tensor, "batch time d"], Int[Tensor, " batch"]]:
    """Stack sequences of unlike length.

    Args:
        sequences: tensors of shape (T_i, d).
        value: fills the padding. NaN shows up wherever padding enters a number.

    Returns:
        The batch, and the lengths T_i.

    Example:
        >>> x, lengths = pad([torch.ones(1, 2), torch.ones(3, 2)], value=0.0)
        >>> x.shape, lengths.tolist(), x[0].sum().item()
        (torch.Size([2, 3, 2]), [1, 3], 2.0)
    """
    padded = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=value)
    return padded, torch.tensor([len(x) for x in sequences])


def write_midi(roll: Float[Tensor, "time 88"], path: str | Path, tempo: float = 100.0) -> None:
    """Write a piano roll as a MIDI file; a key that stays down is one long note. Needs ``pip install mido``.

    Args:
        roll: a row per quarter note; a key sounds where its value is above a half.
        path: of the file.
        tempo: quarter notes per minute.

    Raises:
        ArgumentError: the roll is no matrix of 88 columns.
    """
    import mido

    if roll.dim() != 2 or roll.shape[1] != KEYS:
        raise ArgumentError(f"roll: expected shape (time, {KEYS}), a column for each key, got {tuple(roll.shape)}.")
    down = torch.nn.functional.pad((roll > 0.5).int(), (0, 0, 1, 1))
    track = mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(tempo))])
    waited = 0
    for change in down.diff(dim=0):
        for key in change.nonzero()[:, 0].tolist():
            kind = "note_on" if change[key] > 0 else "note_off"
            track.append(mido.Message(kind, note=LOWEST + key, velocity=64, time=waited))
            waited = 0
        waited += TICKS
    track.append(mido.MetaMessage("end_of_track", time=waited - TICKS))  # silence at the end lasts
    mido.MidiFile(ticks_per_beat=TICKS, tracks=[track]).save(str(path))


def piano_roll(ax: "Axes", roll: Float[Tensor, "time 88"]) -> None:
    """Draw a piano roll (values from 0 to 1), cut to the keys in use, with the Cs named (C4 is middle C)."""
    used = (roll > 0.5).any(0).nonzero()[:, 0].tolist() or [0, KEYS - 1]
    bottom, top = max(used[0] - 2, 0), min(used[-1] + 2, KEYS - 1)
    ax.imshow(roll.detach().T.numpy(), origin="lower", aspect="auto", cmap="gray_r", vmin=0, vmax=1)
    octaves = [key for key in range(bottom, top + 1) if (LOWEST + key) % 12 == 0]
    ax.set_yticks(octaves, [f"C{(LOWEST + key) // 12 - 1}" for key in octaves])
    ax.set(ylim=(bottom - 0.5, top + 0.5), xlabel="quarter notes")
    ax.grid(axis="y", alpha=0.3)


def _split(flat: np.ndarray, lengths: np.ndarray) -> Sequences:
    return list(torch.tensor(flat, dtype=torch.float32).split(lengths.tolist()))
