"""Kill a training run at random moments, resume it each time, and compare what it ends with.

    .venv/bin/python -m tests.benchmarks.bench_kills [kills [save_every]]

The run has batch norm, dropout, Adam, a learning rate by cosine, a β that warms up, a critic and early stopping. With
``save_every``, it is also saved within its epochs of three steps. A run that has ended is begun again in another
folder, until the kills are used up.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

import lightning  # noqa: F401  (imported once, before the processes are forked)
import torch

from tests.support.killed import run

EPOCHS = 30


def main(kills: int, save_every: int | None = None) -> None:
    """Print a line per kill, with where the run was saved, and the checksums."""
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run(Path(folder) / "whole", EPOCHS, save_every=save_every)
        length = time.perf_counter() - start
        expected = (Path(folder) / "whole" / "checksum").read_text()
        print(f"uninterrupted: {length:.1f} s, sha256 {expected[:16]}")
        print(f"{'kill':>4} {'run':>4} {'after (s)':>10}  saved, files left")
        done, number, equal, within = 0, 0, 0, 0
        while done < kills:
            place, ended = Path(folder) / str(number), False
            while not ended:
                after = moments.uniform(0.02, 0.5) * length if done < kills else None
                ended = run(place, EPOCHS, after, save_every)
                if not ended:
                    done += 1
                    within += "within" in _saved(place)
                    left = sorted(file.name for file in place.iterdir()) if place.exists() else []
                    print(f"{done:>4} {number:>4} {after:>10.2f}  {_saved(place)}, {', '.join(left)}")
            found = (place / "checksum").read_text()
            equal, number = equal + (found == expected), number + 1
            print(f"     {number - 1:>4} ended, sha256 {found[:16]}: {'equal' if found == expected else 'DIFFERENT'}")
        print(f"{done} kills in {number} runs, {within} where the last checkpoint lies within an epoch")
        print(f"{equal} of {number} end bit for bit like the uninterrupted run")
        assert equal == number


def _saved(folder: Path) -> str:
    """Return the step of the last checkpoint, and whether it lies within an epoch."""
    if not (folder / "last.ckpt").exists():
        return "nothing"
    last = torch.load(folder / "last.ckpt", weights_only=True)
    return f"step {last['global_step']}{' within an epoch' * ('within' in last)}"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or ["50"]))
