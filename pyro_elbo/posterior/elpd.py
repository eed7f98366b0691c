"""The result of leave-one-out for ArviZ 0.x, whose functions take a pandas Series. Imported with ArviZ 0.x only."""

from typing import Any

from arviz.stats.stats_utils import ELPDData

_NAMES = {"elpd_loo": "elpd", "p_loo": "p", "loo_i": "elpd_i"}
_INDEX = ("elpd_loo", "se", "p_loo", "n_samples", "n_data_points", "warning", "loo_i", "scale", "pareto_k", "good_k")


class Elpd(ELPDData):
    """ArviZ 0.x's ELPDData that also answers to the names that ArviZ 1 uses.

    ``az.compare`` and ``az.plot_khat`` read ``elpd_loo``, ``p_loo`` and ``loo_i``; from ArviZ 1 on these are called
    ``elpd``, ``p`` and ``elpd_i``.
    """

    kind = "loo"
    elpd = property(lambda self: self["elpd_loo"])
    p = property(lambda self: self["p_loo"])
    elpd_i = property(lambda self: self["loo_i"])

    @classmethod
    def of(cls, result: Any) -> "Elpd":
        """Convert the result of ``arviz_stats.loo``."""
        return cls([getattr(result, _NAMES.get(key, key)) for key in _INDEX], index=list(_INDEX))

    def copy(self, deep: bool = True) -> "Elpd":
        """Copy the values and, if ``deep``, the arrays in them."""
        return Elpd(super().copy(deep))
