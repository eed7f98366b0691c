r"""Tests of one quantity's positions u = (r + v) / (L + 1), which are uniform on (0, 1) for a calibrated fit.

* uniform: χ² of a histogram (Talts et al. 2018);
* bias: symmetry about ½, by Wilcoxon's signed ranks. Yao et al. (2018) test the same symmetry, which holds for
  variational posteriors that have the right centers and the wrong spread, by comparing the samples u and 1 - u. Those
  are not independent; signed ranks are exact;
* spread: |2u - 1|, the distance from the center, is uniform too: Kolmogorov-Smirnov, exact.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

TESTS = 3


class Verdict(NamedTuple):
    """What the ranks say of one quantity.

    Attributes:
        name: the site, with the index of its element.
        uniform, bias, spread: p-values of the three tests.
        mean: mean position of the true values: ½ if calibrated, above if draws lie too low.
        words: ``calibrated``, or how it deviates.
    """

    name: str
    uniform: float
    bias: float
    spread: float
    mean: float
    words: str

    @property
    def is_calibrated(self) -> bool:
        """Whether no test rejects."""
        return self.words == "calibrated"


def judge(name: str, u: Float64[np.ndarray, " simulations"], level: float) -> Verdict:
    """Test one quantity; each of the three tests rejects a calibrated one with probability ``level``."""
    from scipy import stats

    bins = int(np.clip(len(u) // 10, 4, 20))
    uniform = float(stats.chisquare(np.histogram(u, bins, (0.0, 1.0))[0]).pvalue)
    bias = float(stats.wilcoxon(u - 0.5).pvalue)
    distance = np.abs(2 * u - 1)
    spread = float(stats.kstest(distance, "uniform").pvalue)
    found = []
    if bias < level:
        found.append("draws too low" if u.mean() > 0.5 else "draws too high")
    if spread < level:
        found.append("too narrow" if distance.mean() > 0.5 else "too wide")
    if uniform < level and not found:
        found.append("not uniform")
    return Verdict(name, uniform, bias, spread, float(u.mean()), ", ".join(found) or "calibrated")
