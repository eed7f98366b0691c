"""Kill a training run at random moments, resume it each time, and compare what it ends with.

    .venv/bin/python -m tests.benchmarks.bench_kills [kills]

The run has batch norm, dropout, Adam, a learning rate by cosine, a β that warms up, a critic and early stopping. A run
that has ended is begun again in another folder, until the kills are used up.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

import lightning  # noqa: F401  (imported once, before the processes are forked)

from tests.support.killed import run

EPOCHS = 30


def main(kills: int) -> None:
    """Print a line per kill and the checksums."""
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run(Path(folder) / "whole", EPOCHS)
        length = time.perf_counter() - start
        expected = (Path(folder) / "whole" / "checksum").read_text()
        print(f"uninterrupted: {length:.1f} s, sha256 {expected[:16]}")
        print(f"{'kill':>4} {'run':>4} {'after (s)':>10}  files left")
        done, number, equal = 0, 0, 0
        while done < kills:
            place, ended = Path(folder) / str(number), False
            while not ended:
                after = moments.uniform(0.02, 0.5) * length if done < kills else None
                ended = run(place, EPOCHS, after)
                if not ended:
                    done += 1
                    left = sorted(file.name for file in place.iterdir()) if place.exists() else []
                    print(f"{done:>4} {number:>4} {after:>10.2f}  {', '.join(left)}")
            found = (place / "checksum").read_text()
            equal, number = equal + (found == expected), number + 1
            print(f"     {number - 1:>4} ended, sha256 {found[:16]}: {'equal' if found == expected else 'DIFFERENT'}")
        print(f"{done} kills in {number} runs, {equal} of {number} end bit for bit like the uninterrupted run")
        assert equal == number


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
