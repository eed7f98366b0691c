"""The sequences: what the files hold, padding, and a piano roll written as MIDI and drawn."""

import matplotlib
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_elbo as pe
from models.sequences import KEYS, digits, load_chorales, load_vowels, pad, piano_roll, write_midi
from pyro_elbo.errors import ArgumentError
from tests.models.laws import trace_of

matplotlib.use("Agg")


def test_chorales_are_piano_rolls_of_four_voices(data_dir):
    splits = load_chorales(data_dir / "jsb_chorales.npz")
    assert {split: len(rolls) for split, rolls in splits.items()} == {"train": 229, "valid": 76, "test": 77}
    assert {split: sum(map(len, rolls)) for split, rolls in splits.items()} == {
        "train": 13807,
        "valid": 4602,
        "test": 4725,
    }
    rolls = torch.cat(splits["train"])
    assert rolls.dtype == torch.float32
    assert rolls.shape[1] == KEYS
    assert rolls.unique().tolist() == [0, 1]
    assert 3.5 < rolls.sum(1).mean() < 4
    # MIDI's notes 43 to 96, as the files of the paper have them.
    assert rolls.any(0).nonzero()[[0, -1], 0].tolist() == [43 - 21, 96 - 21]


def test_vowels_are_ragged_frames(data_dir):
    splits = load_vowels(data_dir / "ts_japanesevowels.npz")
    assert {split: len(frames) for split, frames in splits.items()} == {"train": 270, "test": 370}
    for frames in splits.values():
        assert {x.shape[1] for x in frames} == {12}
        assert (min(map(len, frames)), max(map(len, frames))) in {(7, 26), (7, 29)}
        assert torch.cat(frames).isfinite().all()


def test_digits_are_rows_of_pixels():
    images = digits()
    assert images.shape == (1797, 8, 8)
    assert (images.min(), images.max()) == (0, 16)


def test_padding_fills_behind_the_ends():
    sequences = [torch.randn(n, 3) for n in (2, 5, 1)]
    x, lengths = pad(sequences)
    assert lengths.tolist() == [2, 5, 1]
    assert x.shape == (3, 5, 3)
    for row, sequence in zip(x, sequences, strict=True):
        assert torch.equal(row[: len(sequence)], sequence)
        assert row[len(sequence) :].isnan().all()
    assert torch.equal(pad(sequences, value=0.0)[0], x.nan_to_num())


def read_midi(path):
    """The file as a piano roll, and its quarter notes per minute."""
    import mido

    file, now, down, rows = mido.MidiFile(path), 0, torch.zeros(KEYS), []
    for message in file.tracks[0]:
        rows += [down.clone()] * (message.time // file.ticks_per_beat)
        now += message.time
        if message.type in ("note_on", "note_off"):
            down[message.note - 21] = float(message.type == "note_on")
    tempo = next(message.tempo for message in file.tracks[0] if message.type == "set_tempo")
    assert not down.any()
    return torch.stack(rows), mido.tempo2bpm(tempo)


@pytest.mark.parametrize("silent", [0, 3])
def test_midi_holds_the_roll(tmp_path, silent):
    roll = (torch.rand(40, KEYS, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    roll[10:13] = 0  # a rest
    roll[0, [0, -1]], roll[-1, 30] = 1, 1
    roll[len(roll) - silent :] = 0
    write_midi(roll, tmp_path / "a.mid", tempo=80)
    got, tempo = read_midi(tmp_path / "a.mid")
    assert torch.equal(got, roll)
    assert tempo == pytest.approx(80, rel=1e-5)


def test_a_held_key_is_one_note(tmp_path):
    roll = torch.zeros(4, KEYS)
    roll[:3, 39] = 1
    write_midi(roll, tmp_path / "a.mid")
    data = (tmp_path / "a.mid").read_bytes()
    assert data.count(bytes([0x90, 21 + 39])) == 1


def test_a_roll_without_88_keys_is_an_error(tmp_path):
    with pytest.raises(ArgumentError, match=r"expected shape \(time, 88\).*got \(5, 87\)"):
        write_midi(torch.zeros(5, 87), tmp_path / "a.mid")


def test_piano_roll_shows_the_keys_in_use():
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    roll = torch.zeros(12, KEYS)
    roll[3, 60 - 21], roll[5, 72 - 21] = 1, 1
    piano_roll(ax, roll)
    figure.canvas.draw()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["C4", "C5"]
    assert ax.get_yticks().tolist() == [39, 51]
    assert ax.images[0].get_array().T.tolist() == roll.tolist()
    plt.close(figure)


@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_the_bound_of_ragged_utterances_is_the_sum_of_single_ones(data_dir, kl):
    objective = pe.TraceTimestep_ELBO(kl=kl)
    utterances = [x.double() for x in load_vowels(data_dir / "ts_japanesevowels.npz")["train"][::6]]
    torch.manual_seed(0)
    cell, prior, encoder = (m.double() for m in (nn.GRUCell(16, 8), nn.Linear(8, 8), nn.Linear(20, 8)))
    decoder = nn.Linear(12, 24).double()
    parameters = [p for m in (cell, prior, encoder, decoder) for p in m.parameters()]

    def normal(x):
        loc, raw = x.chunk(2, -1)
        return dist.Normal(loc, raw.exp()).to_event(1)

    def model(x, lengths):
        def step(h, x_t):
            z = pyro.sample("z", normal(prior(h)))
            pyro.sample("x", normal(decoder(torch.cat([z, h], -1))), obs=x_t)
            return cell(torch.cat([x_t, z], -1), h), None

        with pyro.plate("utterances", len(x)):
            pe.scan(step, x.new_zeros(len(x), 8), x.transpose(0, 1), lengths)

    def guide(x, lengths):
        def step(h, x_t):
            z = pyro.sample("z", normal(encoder(torch.cat([x_t, h], -1))))
            return cell(torch.cat([x_t, z], -1), h), None

        with pyro.plate("utterances", len(x)):
            pe.scan(step, x.new_zeros(len(x), 8), x.transpose(0, 1), lengths)

    x, lengths = pad(utterances)
    assert len(lengths.unique()) > 10
    drawn = poutine.trace(guide).get_trace(x, lengths).nodes["z"]["value"].detach()
    whole = objective.terms(model, poutine.replay(guide, trace=trace_of(drawn)), x, lengths)
    singles = [
        objective.terms(
            model, poutine.replay(guide, trace=trace_of(drawn[i : i + 1, :n])), one[None], torch.tensor([n])
        )
        for i, (one, n) in enumerate(zip(utterances, lengths.tolist(), strict=True))
    ]
    total = torch.stack([terms.objective for terms in singles]).sum()
    torch.testing.assert_close(whole.objective, total, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, parameters) for loss in (whole.objective, total)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
