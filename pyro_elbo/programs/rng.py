"""Random seeds: derived from parts, and used for the length of a block."""

import numpy as np
import pyro


def mix_seed(*parts: int) -> int:
    """Derive a seed from several numbers; seeds of different parts are unrelated."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class seeded:  # noqa: N801  (used as a statement)
    """Use a seed inside the block and leave the caller's random state as it was; None keeps the caller's stream."""

    def __init__(self, seed: int | None) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.state = pyro.util.get_rng_state()
        if self.seed is not None:
            # data that were simulated under the same seed must not be drawn again as noise
            pyro.set_rng_seed(mix_seed(self.seed, 1))

    def __exit__(self, *_: object) -> None:
        if self.seed is not None:
            pyro.util.set_rng_state(self.state)
