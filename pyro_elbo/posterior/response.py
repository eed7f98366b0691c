"""What linear response says about a posterior: covariance and standard deviations, beside those of the guide."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_elbo.display import html_table
from pyro_elbo.errors import ArgumentError, check_count
from pyro_elbo.posterior.datasets import Names, Plates, label, stack_chains, without_slashes
from pyro_elbo.posterior.draws import Arrays, ProgramCall, draw
from pyro_elbo.posterior.gaussian import GaussianGuide
from pyro_elbo.posterior.predict import label_latents

if TYPE_CHECKING:
    import xarray

_HEADER = ("", "mean", "error", "sd of guide", "sd", "ratio")


@dataclass(frozen=True, repr=False)
class LinearResponse:
    """Means and covariance of a posterior by linear response; print it for a table. See :func:`linear_response`.

    Attributes:
        mean: means under the guide at its fixed-draw optimum, by quantity, with the dimensions of its plates and event.
        error: their Monte Carlo standard errors, those of the fixed draws.
        sd, guide_sd: standard deviations by linear response, and those of the guide itself.
        covariance: all elements of all quantities, named as in ``beta[0]``: dimensions ``element``, ``element_2``.
        guide: a Gaussian on the real line with the covariance that linear response gives the latents there. It is a
            guide: use it in ``pareto_k``, ``to_arviz``, or wherever a fitted guide is used. None where ``functions``
            were asked for.
        moved: the farthest that a mean on the real line moved to the optimum, in standard deviations of the guide: the
            training that the guide lacked.
        decrement: what a further Newton step would move means by, in standard deviations.
        num_samples: the number of fixed draws.
        num_parameters: the number of parameters of the guide.
        iterations: the iterations of conjugate gradients; 0 where the Hessian was dense.
    """

    mean: "xarray.Dataset"
    error: "xarray.Dataset"
    sd: "xarray.Dataset"
    guide_sd: "xarray.Dataset"
    covariance: "xarray.DataArray"
    guide: GaussianGuide | None
    moved: float
    decrement: float
    num_samples: int
    num_parameters: int
    iterations: int
    programs: ProgramCall = field(repr=False)

    def draws(self, num_samples: int = 1000, seed: int | None = 0) -> "xarray.Dataset":
        """Draw latents, and what the model computes from them, from the Gaussian on the real line.

        Their spread on the real line is that of ``covariance``; in the constrained space the map bends it.

        Args:
            num_samples: the number of draws.
            seed: seed of the draws; None continues the caller's random stream.

        Returns:
            Dimensions ``draw``, plates, (time,) event.

        Raises:
            ArgumentError: the response is that of ``functions``.
        """
        check_count("num_samples", num_samples)
        if self.guide is None:
            raise ArgumentError("draws need the covariance of all latents: call linear_response without functions.")
        model, _, args, kwargs = self.programs
        return label_latents(draw(model, self.guide, args, kwargs, num_samples, seed=seed))

    def __repr__(self) -> str:
        rows = [_HEADER, *self._rows()]
        width = max(len(name) for name, *_ in rows)
        lines = [f"  {name:{width}} {'  '.join(f'{x:>11}' for x in rest)}" for name, *rest in rows]
        return "\n".join([self._title, *lines, f"  {self._note}"])

    def _repr_html_(self) -> str:
        return html_table(self._title, _HEADER, self._rows(), [self._note])

    @property
    def _title(self) -> str:
        return (
            f"Linear response of {self.num_parameters:,} parameters, {self.num_samples:,} fixed draws"
            f"{f', {self.iterations:,} iterations of conjugate gradients' if self.iterations else ''}."
        )

    @property
    def _note(self) -> str:
        return f"On the way to the optimum, means moved by up to {self.moved:.2g} sd of the guide."

    def _rows(self) -> Iterator[tuple[str, ...]]:
        """Yield a row per element, of the first 40."""
        names = self.covariance["element"].values
        columns = [_flat(x) for x in (self.mean, self.error, self.guide_sd, self.sd)]
        for name, mean, error, guide, sd in itertools.islice(zip(names, *columns, strict=True), MAX_ROWS):
            yield str(name), f"{mean:.4g}", f"{error:.2g}", f"{guide:.4g}", f"{sd:.4g}", f"{sd / guide:.2f}"
        if len(names) > MAX_ROWS:
            yield (f"... and {len(names) - MAX_ROWS:,} more", "", "", "", "", "")


MAX_ROWS = 40


def _flat(data: "xarray.Dataset") -> np.ndarray:
    return np.concatenate([x.values.reshape(-1) for x in data.data_vars.values()])


def label_quantities(values: np.ndarray, like: Arrays, plates: Plates, times: Mapping[str, str]) -> "xarray.Dataset":
    """Label one number per element of each quantity: plates, (time,) event.

    Args:
        values: the numbers, one quantity after the other.
        like: draws of each quantity.
        plates, times: the plates of sites, and the names of their dimensions of time.
    """
    parts = torch.as_tensor(values).split([x[0].numel() for x in like.values()])
    arrays = {name: part.reshape(1, *x.shape[1:]) for part, (name, x) in zip(parts, like.items(), strict=True)}
    data = label({"values": stack_chains([(arrays, plates)], Names(set(arrays), {}, times))}, {}, {})
    return without_slashes(data)["values"].isel(chain=0, draw=0, drop=True)


def label_covariance(matrix: np.ndarray, like: Arrays) -> "xarray.DataArray":
    """Label a covariance matrix of the elements of quantities, as in ``beta[0]``."""
    import xarray

    names = [name for quantity, x in like.items() for name in _element_names(quantity, x[0])]
    return xarray.DataArray(
        matrix, dims=("element", "element_2"), coords={"element": names, "element_2": names}, name="covariance"
    )


def _element_names(name: str, x: Tensor) -> list[str]:
    indices = itertools.product(*map(range, x.shape))
    return [f"{name}[{','.join(map(str, i))}]" if i else name for i in indices]
