"""A course: steps in a row on the same data."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pyro_elbo.compile.snapshots import Snapshots
from pyro_elbo.compile.streams import Seeds, build_draws
from pyro_elbo.programs import seed_cpu


@dataclass(frozen=True)
class Course:
    """Steps in a row on the same data.

    Args:
        steps: their number.
        snapshots: copies of parameters on the way.
        seeds: the seed of each step's noise, on a CPU; without them the random state goes on.
    """

    steps: int = 1
    snapshots: Snapshots | None = None
    seeds: Seeds | None = None

    def prepare(self) -> None:
        """Begin to build what compiled steps with seeds draw by."""
        if self.seeds is not None:
            build_draws()

    def in_python(self) -> Iterator[None]:
        """Seed before each step and take snapshots after it."""
        for i in range(self.steps):
            if self.seeds is not None:
                seed_cpu(int(self.seeds[i]))
            yield
            if self.snapshots is not None:
                self.snapshots.note()

    def first(self) -> "Course":
        """Return the first step."""
        return replace(self, steps=1)

    def rest(self) -> "Course":
        """Return the steps after the first."""
        return replace(self, steps=self.steps - 1, seeds=None if self.seeds is None else self.seeds[1:])
