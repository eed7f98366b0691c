r"""Run model and guide together over time and resample: the filtering bound.

.. math:: \log \hat Z = \sum_{\text{resampled } t} \log \frac1K \sum_k w_{tk}, \qquad E[\hat Z] = p(x_{1:T})

After a step, a sequence resamples when its effective sample size has fallen below a fraction of the particles: it draws
ancestors by weight, and the carries of both programs follow them. The gradient omits the term of the ancestors' choice.

References:
    Maddison et al. (2017), Filtering variational objectives, arXiv:1705.09279; Le et al. (2018), arXiv:1705.10306;
    Naesseth et al. (2018), arXiv:1705.11140.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch import Tensor

from pyro_elbo.assumptions import active_loop, check_or_defer
from pyro_elbo.errors import ArgumentError, SiteError
from pyro_elbo.masking import log_mean_exp, masked
from pyro_elbo.sequences.carry import possible_event_dims
from pyro_elbo.sequences.collect import OuterContext, plate_sizes
from pyro_elbo.sequences.particles import broadcasting_modules
from pyro_elbo.sequences.stacked import fill_masked
from pyro_elbo.sequences.step import StepResult

StepFunction = Callable[[list[Tensor], list[Tensor], Mapping[str, Tensor]], StepResult]
ScanResult = tuple[list[Tensor], list[Tensor]]
"""The last carry of a scan, and the stacked tensors of all steps."""


@dataclass(frozen=True)
class ScanFunction:
    """The scan of one program as a function of tensors.

    Attributes:
        total: the number of steps.
        first: a step that ran before the scan and left no trace: its sites with their shapes.
        shapes: the shapes of init.
        state: the tensors of the initial carry, in the shapes that the step returns.
        columns: the inputs of all steps, time first; a row holds those of one step.
        step: (carry, row, values of sites) -> the step's result.
        reverse: run from the last step to the first.
    """

    total: int
    first: StepResult
    shapes: Sequence[torch.Size]
    state: list[Tensor]
    columns: list[Tensor]
    step: StepFunction
    reverse: bool

    def body(self, state: list[Tensor], row: list[Tensor]) -> ScanResult:
        """Run one step: the next carry and the tensors kept of the step."""
        result = self.step(state, row, {})
        return result.carry_tensors, result.tensors


@dataclass
class Filter:
    """A particle filter: runs the guide's scan together with the model's.

    Attributes:
        particles: the number of particles.
        rank: the number of batch dimensions, the leftmost one for the particles included.
        threshold: a sequence resamples when its effective sample size is below this fraction of the particles.
        run_guide: runs the guide, once the model has reached its scan.
    """

    particles: int
    rank: int
    threshold: float
    run_guide: Callable[[], None]
    _log_z: Tensor | float = 0.0
    _log_w: Tensor | None = None
    _shared: Tensor | float = 0.0
    _model: ScanFunction | None = None
    _results: dict[str, ScanResult] = field(default_factory=dict)
    _handlers: int = field(default_factory=lambda: len(_PYRO_STACK))

    def scan(self, scan: ScanFunction) -> ScanResult:
        """Run a scan of the model, which runs the guide and its scan, or that scan of the guide."""
        if self._results:
            raise SiteError("The filtering bound needs one pe.scan with sites in each program: join the scans.")
        if self._model is not None:
            self._run(scan, self._model)
            return self._results["guide"]
        self._model = scan
        with self._outside_model():
            self.run_guide()
        if not self._results:
            _check_marks(scan)
            raise SiteError(
                "The filtering bound needs a guide that draws its latents in a pe.scan, as the model does. Move the "
                "guide's sites into the step of a scan."
            )
        return self._results["model"]

    @contextmanager
    def _outside_model(self) -> Iterator[None]:
        """Remove the handlers and plates of the model for a while."""
        handlers, plates = list(_PYRO_STACK), list(_DIM_ALLOCATOR._stack)
        _PYRO_STACK[self._handlers :], _DIM_ALLOCATOR._stack[:] = [], []
        try:
            yield
        finally:
            _PYRO_STACK[:], _DIM_ALLOCATOR._stack[:] = handlers, plates

    def _run(self, q: ScanFunction, p: ScanFunction) -> None:
        _check(q, p)
        total, nq, mq = q.total, len(q.state), len(q.columns)
        contexts = [site.outside for scan in (q, p) for site in scan.first.sites.values()]
        shape, sizes = self._shape(contexts), plate_sizes(contexts)
        event_dims = [
            _carry_event_dim(init, x.shape, shape, sizes)
            for scan in (q, p)
            for init, x in zip(scan.shapes, scan.state, strict=True)
        ]
        log_w = torch.zeros(shape, device=p.columns[0].device if p.columns else None)
        last = torch.arange(total, device=log_w.device) == total - 1
        start = [*q.state, *p.state, log_w, torch.zeros_like(log_w[:1])]

        def body(state: list[Tensor], row: list[Tensor]) -> ScanResult:
            guide = q.step(state[:nq], row[:mq], {})
            drawn = {name: site.value for name, site in guide.sites.items()}
            model = p.step(state[nq:-2], row[mq:-1], drawn)
            log_w = state[-2] + self._log_weights(guide, model, shape)
            ancestors, log_w, gained = self._resample(log_w, row[-1], model.valid)
            carry = [*guide.carry_tensors, *model.carry_tensors]
            carry = [self._follow(c, ancestors, n) for c, n in zip(carry, event_dims, strict=True)]
            return [*carry, log_w, state[-1] + gained], [*guide.tensors, *model.tensors, ancestors]

        ends, rows = (active_loop() or run_loop)(body, start, [*q.columns, *p.columns, last], total, False)
        self._log_w, self._log_z = ends[-2:]
        ancestors, width = rows.pop(), len(q.first.tensors)
        results = {"guide": (q, ends[:nq], rows[:width]), "model": (p, ends[nq:-2], rows[width:])}
        for name, (scan, carry, tensors) in results.items():
            outs = scan.first.outs and self._follow_outs(tensors[-scan.first.outs :], ancestors, sizes)
            self._results[name] = carry, [*tensors[: len(tensors) - scan.first.outs], *(outs or [])]

    def weigh(self, name: str, nats: Tensor) -> None:
        """Weigh the last particles by the log density of a site outside the scan (nats, shaped like its plates).

        Raises:
            SiteError: if it depends on the particles but lies outside the plates of the scan's sites.
        """
        assert self._log_w is not None
        shape = self._log_w.shape
        nats = nats.reshape((1,) * (len(shape) - nats.dim()) + nats.shape)
        rows = [d for d in range(1, len(shape)) if shape[d] != 1]
        if all(nats.shape[d] == shape[d] for d in rows):
            gone = [d for d in range(1, len(shape)) if d not in rows and nats.shape[d] != 1]
            self._log_w = self._log_w + (nats.sum(gone, keepdim=True) if gone else nats)
        elif check_or_defer((nats == nats[:1]).all()):
            self._shared = self._shared + nats[0].sum()
        else:
            raise SiteError(
                f"Site '{name}' depends on the particles, but lies outside the plates of the scan, so that no sequence "
                "has a weight of its own. Put it in these plates, or use bound='importance'."
            )

    @property
    def has_run(self) -> bool:
        """Whether the scans of model and guide have run."""
        return self._log_w is not None

    def log_evidence(self) -> Tensor:
        """Return log Ẑ of each sequence (nats); what all sequences share is spread evenly over them."""
        assert self._log_w is not None
        log_z = (self._log_z + log_mean_exp(self._log_w, 0)).squeeze(0)
        return log_z + self._shared / log_z.numel()

    def _shape(self, contexts: Sequence[OuterContext]) -> tuple[int, ...]:
        """Return the shape of the log weights: particles and the plates that all sites share, 1 elsewhere."""
        shape = [1] * self.rank
        for frame in set.intersection(*(set(context.frames) for context in contexts)):
            shape[frame.dim] = frame.size
        return tuple(shape)

    def _log_weights(self, guide: StepResult, model: StepResult, shape: tuple[int, ...]) -> Tensor:
        total = torch.zeros(shape)
        for sign, step in ((1, model), (-1, guide)):
            for site in step.sites.values():
                if not site.infer.get("_deterministic"):
                    nats = masked(site.fn.log_prob(fill_masked(site.fn, site.value, site.mask)), site.mask)
                    nats = masked(nats, site.outside.mask)
                    gone = [d for d in range(-nats.dim(), 0) if shape[d] == 1 and nats.shape[d] != 1]
                    total = total + sign * (nats.sum(gone, keepdim=True) if gone else nats)
        return masked(total, model.valid)

    def _resample(self, log_w: Tensor, last: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ancestors of the new particles, their log weights, and the increment of log Ẑ."""
        count = self.particles
        weights = log_w.detach().softmax(0)
        poor = (1 / weights.square().sum(0, keepdim=True) < self.threshold * count) & ~last
        if valid is not None:
            poor = poor & valid
        places = torch.arange(count, device=log_w.device).reshape(-1, *(1,) * (self.rank - 1))
        points = (torch.rand(weights[:1].shape, dtype=weights.dtype, device=weights.device) + places) / count
        ancestors = (weights.cumsum(0).unsqueeze(0) < points.unsqueeze(1)).sum(1).clamp(max=count - 1)
        ancestors = torch.where(poor, ancestors, places)
        gained = masked(log_mean_exp(log_w, 0), poor)
        return ancestors, masked(log_w, ~poor), gained

    def _follow(self, x: Tensor, ancestors: Tensor, event_dim: int, left: int = 0) -> Tensor:
        """Return a tensor of the ancestors; one that all particles share is unchanged.

        Args:
            x: a tensor of the particles.
            ancestors: the index of each particle's ancestor, shaped like the log weights.
            event_dim: the number of dimensions of ``x`` on the right that are not of the batch.
            left: the number of dimensions of both tensors on the left that are not of the batch (time).
        """
        if x.dim() - event_dim - left != self.rank or x.shape[left] != self.particles:
            return x
        index = ancestors.reshape(ancestors.shape + (1,) * event_dim).expand_as(x)
        return x.gather(left, index)

    def _follow_outs(self, outs: list[Tensor], ancestors: Tensor, sizes: Mapping[int, int]) -> list[Tensor]:
        """Return the outs of all steps along the path that leads to each of the last particles."""

        def backward(later: list[Tensor], row: list[Tensor]) -> ScanResult:
            path = row[0].gather(0, later[0])
            return [path], [path]

        start = torch.arange(self.particles, device=ancestors.device).reshape(-1, *(1,) * (self.rank - 1))
        loop = active_loop() or run_loop
        _, (paths,) = loop(backward, [start.expand(ancestors.shape[1:])], [ancestors], len(ancestors), True)
        rows = ancestors.shape[2:]
        dims = [min(possible_event_dims(x.shape[1:], rows, sizes), default=x.dim()) for x in outs]
        return [self._follow(x, paths, n, left=1) for x, n in zip(outs, dims, strict=True)]


def _carry_event_dim(init: torch.Size, shape: torch.Size, weights: Sequence[int], sizes: Mapping[int, int]) -> int:
    """Return the number of dimensions of a part of the carry that are not of the batch; init has no particles."""
    rows = torch.Size(weights[1:])
    while rows and rows[0] == 1:
        rows = rows[1:]
    possible = possible_event_dims(shape, rows, sizes)
    if init[: len(rows)] == rows and len(init) - len(rows) in possible:
        return len(init) - len(rows)
    return min(possible, default=len(shape))


def _check(q: ScanFunction, p: ScanFunction) -> None:
    _check_marks(p)
    if q.total != p.total or q.reverse or p.reverse:
        ways = [f"{s.total} steps{' backward' * s.reverse}" for s in (p, q)]
        raise SiteError(
            f"The filtering bound runs model and guide forward through the same steps, but the model takes {ways[0]} "
            f"and the guide {ways[1]}."
        )
    for name, site in q.first.sites.items():
        if not site.fn.has_rsample:
            raise SiteError(
                f"Site '{name}' has no pathwise gradient ({type(site.fn).__name__}), which the filtering bound needs. "
                "Use bound='importance'."
            )
    latent = {n for n, s in p.first.sites.items() if not s.observed and not s.infer.get("_deterministic")}
    if missing := sorted(latent - q.first.sites.keys()):
        raise SiteError(f"The latent sites {missing} of the model's scan are not in the guide's scan. Draw them there.")


def _check_marks(p: ScanFunction) -> None:
    if marked := [n for n, s in p.first.sites.items() if s.infer.get("enumerate") and not s.observed]:
        raise SiteError(
            f"The sites {marked} are marked to be summed out over paths, and the filtering bound resamples draws. Use "
            "bound='importance'."
        )


def run_loop(
    body: Callable[[list[Tensor], list[Tensor]], ScanResult],
    state: list[Tensor],
    columns: list[Tensor],
    total: int,
    reverse: bool,
) -> ScanResult:
    """Run a step over time in Python and return the last carry and the tensors of all steps, time first."""
    rows = []
    for t in range(total - 1, -1, -1) if reverse else range(total):
        state, row = body(state, [x[t] for x in columns])
        rows.append(row)
    return state, stack_rows(rows[::-1] if reverse else rows)


def stack_rows(rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Stack the tensors of all steps, time first.

    Raises:
        ArgumentError: if a tensor changes its shape from step to step.
    """
    stacked = []
    for column in zip(*rows, strict=True):
        try:
            stacked.append(torch.stack(torch.broadcast_tensors(*column)))
        except RuntimeError as error:
            shapes = list(dict.fromkeys(tuple(x.shape) for x in column))
            raise ArgumentError(
                f"pe.scan: a tensor in the step's out, or a mask, changes its shape over time: {shapes}. Return one "
                "shape at all steps."
            ) from error
    return stacked


_active: ContextVar[Filter | None] = ContextVar("filter", default=None)


def active_filter() -> Filter | None:
    """Return the filter under which the program runs, if any."""
    return _active.get()


@contextmanager
def filtering(particle_filter: Filter) -> Iterator[None]:
    """Run the scans of a model under a particle filter; modules in their steps broadcast over the particles."""
    token = _active.set(particle_filter)
    try:
        with broadcasting_modules():
            yield
    finally:
        _active.reset(token)
