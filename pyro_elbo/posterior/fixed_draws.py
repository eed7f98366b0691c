r"""The KL objective averaged over fixed draws: a deterministic function of the parameters of a guide.

.. math:: KL_M(\eta) = \frac1M \sum_m \log q_\eta(z_m) - \log p(x, z_m), \qquad z_m = T(\varepsilon_m, \eta)

In expectation it is KL(q ‖ p(z | x)) - log p(x). Parameters are counted in units of their Fisher information: a step of
one moves the guide by about one standard deviation, whatever the scale of the data.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_elbo.posterior.draws import Arrays, Frame, ProgramCall, agrees_alone
from pyro_elbo.posterior.fixed_noise import FixedNoise, RecordedNoise
from pyro_elbo.posterior.layout import lead, lead_unconstrained
from pyro_elbo.posterior.weights import unconstrain
from pyro_elbo.programs import TracePair, seeded, trace_pair, trace_program

PROBES = 32  # a relative error of √(2/32) = 1/4 in the Fisher information does for units
LEAST, MOST = 256, 2048  # draws, where their number is not given

Vector = Float[np.ndarray, " parameters"]


class Evaluated(NamedTuple):
    """Every draw at one parameter vector.

    Attributes:
        nats: log q - log p of each draw.
        values: latents, and what the model computes from them (``pyro.deterministic``).
        unconstrained: latents on the real line.
    """

    nats: Float[Tensor, " draws"]
    values: Arrays
    unconstrained: Arrays


class FixedDraws:
    """The objective at the parameters that the guide has; ``write`` gives it others.

    Args:
        programs: model, guide and data.
        frame: what their runs share.
        leaves: the parameters.
        num_samples: the number of draws M; None for four a dimension of the noise, from 256 to 2048.
        seed: seed of the noise.

    Attributes:
        origin: the parameters as they were found.
        units: the size of a step of one in each parameter.
        num_dims: the dimensions of the guide's noise.
    """

    def __init__(
        self, programs: ProgramCall, frame: Frame, leaves: Sequence[Tensor], num_samples: int | None, seed: int
    ) -> None:
        self.programs, self.frame, self.leaves, self._seed = programs, frame, leaves, seed
        self._sizes = [leaf.numel() for leaf in leaves]
        self.origin = torch.cat([leaf.detach().double().cpu().flatten() for leaf in leaves]).numpy()
        self.units = np.ones_like(self.origin)
        with torch.no_grad(), seeded(seed), RecordedNoise() as recorded:
            trace_pair(*programs)
        self.num_dims = sum(recorded.sizes)
        self.num_samples = num_samples or min(max(LEAST, 4 * self.num_dims), MOST)
        self._noise = FixedNoise(recorded.sizes, self.num_samples, seed)
        self.vectorized = self._vectorizes()
        self.units = self._find_units()

    def write(self, step: Vector) -> None:
        """Move the parameters to ``step`` units from where they were found."""
        values = torch.as_tensor(self.origin + self.units * step)
        with torch.no_grad():
            for leaf, value in zip(self.leaves, values.split(self._sizes), strict=True):
                leaf.copy_(value.reshape(leaf.shape))

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Give the parameters back as they were found."""
        found = [leaf.detach().clone() for leaf in self.leaves]
        try:
            yield
        finally:
            with torch.no_grad():
                for leaf, value in zip(self.leaves, found, strict=True):
                    leaf.copy_(value)

    def evaluate(self) -> Evaluated:
        """Evaluate all draws, with gradients."""
        if self.vectorized:
            return self._collect(self.trace(), self.num_samples)
        parts = [self._collect(self.trace(row), 1) for row in range(self.num_samples)]

        def join(arrays: Sequence[Arrays]) -> Arrays:
            return {name: torch.cat([part[name] for part in arrays]) for name in arrays[0]}

        nats, values, unconstrained = zip(*parts, strict=True)
        return Evaluated(torch.cat(nats), join(values), join(unconstrained))

    def trace(self, row: int | None = None) -> TracePair:
        """Run both programs on all draws, or on one of them."""
        self._noise.row = row
        with seeded(self._seed), self._noise:
            return trace_pair(*self.programs, self.num_samples if row is None else 1, self.frame.nesting)

    def gradient(self, outputs: Tensor, weights: Tensor, create_graph: bool = False) -> Float[Tensor, " parameters"]:
        """Return the gradient of a weighted sum of outputs in units of the parameters."""
        if not outputs.requires_grad:
            return torch.zeros(len(self.units), dtype=torch.float64)
        parts = torch.autograd.grad(
            outputs,
            self.leaves,
            weights,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return torch.cat([part.double().cpu().flatten() for part in parts]) * torch.as_tensor(self.units)

    def jacobian(self, outputs: Float[Tensor, " outputs"]) -> Float[np.ndarray, "outputs parameters"]:
        """Return the gradient of each output in units of the parameters."""
        rows = torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)
        return torch.stack([self.gradient(outputs, row) for row in rows]).numpy()

    def _vectorizes(self) -> bool:
        try:
            with torch.no_grad():
                pair = self.trace()
                ends = (agrees_alone(self.programs, pair, self.frame.shapes, i, self.num_samples, self.frame.nesting)
                        for i in (0, -1))  # fmt: skip
                return all(ends)
        except Exception:  # single runs raise it again if the programs themselves are at fault
            return False

    def _collect(self, pair: TracePair, count: int) -> Evaluated:
        shapes, weighting, nesting, _ = self.frame
        sums: Any = weighting.sums(pair, count, nesting)
        values, unconstrained = {}, {}
        for name, site in pair.model.items():
            like = shapes.model[name]
            if site.role == "latent" or (site.role == "deterministic" and site.value.is_floating_point()):
                values[name] = lead(site.value, like.value.shape, count, like)
            if site.role == "latent":
                free: Any = unconstrain(site)
                unconstrained[name] = lead_unconstrained(free, count, like)
        return Evaluated(sums["log_q"] - sums["log_p"], values, unconstrained)

    def _find_units(self) -> Vector:
        r"""Return the inverse roots of the diagonal of the Fisher information, from random sums of scores.

        .. math:: s = M^{-1/2} \sum_m r_m \nabla_\eta \log q_\eta(z_m), \quad r_m = \pm 1 \implies
            E[s_i^2] = M^{-1} \sum_m (\partial_i \log q_\eta(z_m))^2
        """
        log_q, generator = self._log_q(), torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (PROBES, len(log_q)), generator=generator, dtype=torch.float64) * 2 - 1
        scores = torch.stack([self.gradient(log_q, row) for row in signs / len(log_q) ** 0.5])
        fisher = scores.square().mean(0).numpy()
        return np.where(fisher > 0, fisher, 1.0) ** -0.5

    def _log_q(self) -> Float[Tensor, " draws"]:
        """Return log q at draws that stay where they are while parameters move."""
        parts = []
        for row in [None] if self.vectorized else range(self.num_samples):
            with torch.no_grad():
                drawn = self.trace(row).guide
            count = self.num_samples if row is None else 1
            given = {name: site.value for name, site in drawn.items() if site.is_drawn}
            _, guide, args, kwargs = self.programs
            with seeded(self._seed):
                sites = trace_program(guide, args, kwargs, given, count, self.frame.nesting)
            parts.append(sum(sites[name].log_prob().double().cpu().reshape(count, -1).sum(1) for name in given))
        return torch.cat(parts)
