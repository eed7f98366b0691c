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

from pyro_elbo.assumptions import active_loop
from pyro_elbo.errors import ArgumentError, SiteError
from pyro_elbo.masking import log_mean_exp, masked
from pyro_elbo.sequences.stacked import fill_masked
from pyro_elbo.sequences.step import StepResult, StepSite

StepFunction = Callable[[list[Tensor], list[Tensor], Mapping[str, Tensor]], StepResult]
ScanResult = tuple[list[Tensor], list[Tensor]]
"""The last carry of a scan, and the stacked tensors of all steps."""


@dataclass(frozen=True)
class ScanFunction:
    """The scan of one program as a function of tensors.

    Attributes:
        total: the number of steps.
        first: a step that ran before the scan and left no trace: its sites with their shapes.
        state: the tensors of the initial carry.
        columns: the inputs of all steps, time first; a row holds those of one step.
        step: (carry, row, values of sites) -> the step's result.
        reverse: run from the last step to the first.
    """

    total: int
    first: StepResult
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
        log_evidence: log Ẑ of each sequence (nats), shaped like the plates; set by the run.
    """

    particles: int
    rank: int
    threshold: float
    run_guide: Callable[[], None]
    log_evidence: Tensor | None = None
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
        shape = self._shape([*q.first.sites.values(), *p.first.sites.values()])
        log_w = torch.zeros(shape, device=p.columns[0].device if p.columns else None)
        last = torch.arange(total, device=log_w.device) == total - 1
        start = [*q.state, *p.state, log_w, torch.zeros_like(log_w[:1])]

        def body(state: list[Tensor], row: list[Tensor]) -> ScanResult:
            guide = q.step(state[:nq], row[:mq], {})
            drawn = {name: site.value for name, site in guide.sites.items()}
            model = p.step(state[nq:-2], row[mq:-1], drawn)
            log_w = state[-2] + self._log_weights(guide, model, shape)
            carry = [*guide.carry_tensors, *model.carry_tensors]
            carry, log_w, gained = self._resample(carry, log_w, row[-1], model.valid)
            return [*carry, log_w, state[-1] + gained], [*guide.tensors, *model.tensors]

        ends, rows = (active_loop() or run_loop)(body, start, [*q.columns, *p.columns, last], total, False)
        self.log_evidence = ends[-1].squeeze(0)
        width = len(q.first.tensors)
        self._results = {"guide": (ends[:nq], rows[:width]), "model": (ends[nq:-2], rows[width:])}

    def _shape(self, sites: list[StepSite]) -> tuple[int, ...]:
        """Return the shape of the log weights: particles and the plates that all sites share, 1 elsewhere."""
        shape = [1] * self.rank
        for frame in set.intersection(*(set(s.everywhere) for s in sites)):
            shape[frame.dim] = frame.size
        return tuple(shape)

    def _log_weights(self, guide: StepResult, model: StepResult, shape: tuple[int, ...]) -> Tensor:
        total = torch.zeros(shape)
        for sign, step in ((1, model), (-1, guide)):
            for site in step.sites.values():
                if not site.infer.get("_deterministic"):
                    nats = masked(site.fn.log_prob(fill_masked(site.fn, site.value, site.mask)), site.mask)
                    gone = [d for d in range(-nats.dim(), 0) if shape[d] == 1 and nats.shape[d] != 1]
                    total = total + sign * (nats.sum(gone, keepdim=True) if gone else nats)
        return masked(total, model.valid)

    def _resample(
        self, carry: list[Tensor], log_w: Tensor, last: Tensor, valid: Tensor | None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the carries of the new particles, their log weights, and the increment of log Ẑ."""
        count = self.particles
        weights = log_w.detach().softmax(0)
        poor = (1 / weights.square().sum(0, keepdim=True) < self.threshold * count) & ~last
        if valid is not None:
            poor = poor & valid
        places = torch.arange(count, device=log_w.device).reshape(-1, *(1,) * (self.rank - 1))
        points = (torch.rand(weights[:1].shape, dtype=weights.dtype, device=weights.device) + places) / count
        ancestors = (weights.cumsum(0).unsqueeze(0) < points.unsqueeze(1)).sum(1).clamp(max=count - 1)
        ancestors = torch.where(poor, ancestors, places)
        gained = masked(log_mean_exp(log_w, 0), poor | last)
        return [_follow(c, ancestors, log_w.shape) for c in carry], masked(log_w, ~poor), gained


def _follow(carry: Tensor, ancestors: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the carry of the ancestors; a carry that all particles share is unchanged."""
    rank = len(shape)
    if carry.dim() < rank or any(n not in (1, m) for n, m in zip(shape, carry.shape, strict=False)):
        return carry
    if carry.shape[0] != shape[0]:
        return carry
    index = ancestors.reshape(ancestors.shape + (1,) * (carry.dim() - rank)).expand_as(carry)
    return carry.gather(0, index)


def _check(q: ScanFunction, p: ScanFunction) -> None:
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
    """Run the scans of a model under a particle filter."""
    token = _active.set(particle_filter)
    try:
        yield
    finally:
        _active.reset(token)
