r"""Fixed noise for the draws of a guide: antithetic quasi-random numbers, whitened, the same in every run.

A guide turns standard draws into its own: :math:`z = T(\varepsilon, \eta)`. With the :math:`\varepsilon` fixed,
everything that a program computes from its draws is a deterministic function of the parameters :math:`\eta`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.quasirandom import SobolEngine


def _normal(noise: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
    return mean + std * noise


def _uniform(noise: Tensor, low: float = 0.0, high: float = 1.0, **_: Any) -> Tensor:
    return low + (high - low) * torch.special.ndtr(noise)


# In place, after the tensor come the two parameters; the others have shapes and options only.
IN_PLACE: dict[Callable, Callable[..., Tensor]] = {Tensor.normal_: _normal, Tensor.uniform_: _uniform}
STANDARD: dict[Callable, Callable[..., Tensor]] = {
    torch.randn: _normal,
    torch.randn_like: _normal,
    torch.rand: _uniform,
    torch.rand_like: _uniform,
}


class RecordedNoise(TorchFunctionMode):
    """Count the standard draws of a single run, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in IN_PLACE or func in STANDARD:
            self.sizes.append(result.numel())
        return result


class FixedNoise(TorchFunctionMode):
    """Replace the standard draws of torch inside the block by rows of fixed numbers.

    Args:
        sizes: the numbers that a single run draws, call by call.
        num_samples: the rows.
        seed: seed of the numbers.

    Attributes:
        row: the row that a single run gets; None for a run with all rows, in the first dimension of its draws.
    """

    def __init__(self, sizes: list[int], num_samples: int, seed: int) -> None:
        super().__init__()
        self.blocks = antithetic_normal(num_samples, sum(sizes), seed).split(sizes, 1)
        self.row: int | None = None

    def __enter__(self) -> Any:
        self.calls = iter(self.blocks)
        return super().__enter__()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        drawn = func(*args, **(kwargs or {}))
        if func not in IN_PLACE and func not in STANDARD:
            return drawn
        block = next(self.calls)
        noise = (block if self.row is None else block[self.row]).reshape(drawn.shape)
        if func in IN_PLACE:
            return drawn.copy_(IN_PLACE[func](noise, *args[1:], **(kwargs or {})))
        return drawn.copy_(STANDARD[func](noise))


def antithetic_normal(rows: int, columns: int, seed: int) -> Float[Tensor, "rows columns"]:
    r"""Return standard normal numbers in pairs ±ε, with identity covariance where there are enough of them.

    Odd moments vanish exactly. Second moments are exact too, so that averages of quadratic functions are: a fixed-draw
    objective is exact on Gaussian posteriors. Fewer than twice as many pairs as columns are only scaled, column by
    column.
    """
    pairs = rows // 2
    if columns == 0:
        return torch.empty(rows, 0, dtype=torch.float64)
    if columns <= SobolEngine.MAXDIM:
        uniform = SobolEngine(columns, scramble=True, seed=int(seed)).draw(pairs, dtype=torch.float64)
        half = torch.special.ndtri(uniform.clamp(1e-10, 1 - 1e-10))
    else:
        half = torch.randn(pairs, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if pairs >= 2 * columns:
        factor = torch.linalg.cholesky(half.T @ half / pairs)
        half = torch.linalg.solve_triangular(factor, half.T, upper=False).T
    else:
        half = half / half.square().mean(0).sqrt()
    return torch.cat([half, -half])
