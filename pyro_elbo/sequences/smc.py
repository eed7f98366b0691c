r"""Model and guide side by side, step by step, with resampling: the filtering bound.

.. math:: \log \hat Z = \sum_{\text{resampled } t} \log \frac1K \sum_k w_{tk}, \qquad E[\hat Z] = p(x_{1:T})

After a step, a sequence whose effective sample size has fallen below a part of the particles draws new ones among
them, by weight. The carries of both programs follow. The gradient leaves out that of the choice of ancestors.

References:
    Maddison et al. (2017), Filtering variational objectives, arXiv:1705.09279; Le et al. (2018), arXiv:1705.10306;
    Naesseth et al. (2018), arXiv:1705.11140.
"""

from collections.abc import Callable, Iterator, Sequence
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
from pyro_elbo.sequences.step import StepProgram, StepSite

StepFunction = Callable[[list[Tensor], list[Tensor], dict[str, Tensor]], tuple[list[Tensor], list[Tensor]]]


@dataclass(frozen=True)
class ScanSide:
    """The scan of one program as a function of tensors.

    Attributes:
        steps: what its sites are.
        state, columns: the carry at the start, and a row of tensors per step (time first).
        body: (carry, row, values of sites) -> (next carry, what is kept of the step).
    """

    steps: StepProgram
    state: list[Tensor]
    columns: list[Tensor]
    body: StepFunction
    reverse: bool


ScanResult = tuple[list[Tensor], list[Tensor]]
"""The last carry of a scan, and what it kept of all steps."""


@dataclass
class Filter:
    """Runs a guide's scan together with a model's.

    Attributes:
        particles: how many.
        rank: batch dimensions, that of the particles on the left included.
        threshold: a sequence resamples when its effective sample size is below this part of the particles.
        run_guide: runs the guide, when the model has come to its scan.
        log_evidence: log Ẑ of each sequence (nats), shaped like the plates; known after the run.
    """

    particles: int
    rank: int
    threshold: float
    run_guide: Callable[[], None]
    log_evidence: Tensor | None = None
    _model: ScanSide | None = None
    _results: dict[str, ScanResult] = field(default_factory=dict)
    _handlers: int = field(default_factory=lambda: len(_PYRO_STACK))

    def scan(self, side: ScanSide) -> ScanResult:
        """Take part in the run: first the model, from within it the guide."""
        if self._results:
            raise SiteError("The filtering bound needs one pe.scan with sites in each program: join the scans.")
        if self._model is not None:
            self._run(side, self._model)
            return self._results["guide"]
        self._model = side
        with self._aside():
            self.run_guide()
        if not self._results:
            raise SiteError(
                "The filtering bound needs a guide that draws its latents in a pe.scan, as the model does. Move the "
                "guide's sites into the step of a scan."
            )
        return self._results["model"]

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Leave the handlers and plates of the model for a while."""
        handlers, plates = list(_PYRO_STACK), list(_DIM_ALLOCATOR._stack)
        _PYRO_STACK[self._handlers :], _DIM_ALLOCATOR._stack[:] = [], []
        try:
            yield
        finally:
            _PYRO_STACK[:], _DIM_ALLOCATOR._stack[:] = handlers, plates

    def _run(self, q: ScanSide, p: ScanSide) -> None:
        _check(q, p)
        total, nq, mq = q.steps.total, len(q.state), len(q.columns)
        shape = self._shape([*q.steps.last.values(), *p.steps.last.values()])
        log_w = torch.zeros(shape, device=p.columns[0].device if p.columns else None)
        last = torch.arange(total, device=log_w.device) == total - 1
        start = [*q.state, *p.state, log_w, torch.zeros_like(log_w[:1])]

        def body(state: list[Tensor], row: list[Tensor]) -> ScanResult:
            new_q, row_q = q.body(state[:nq], row[:mq], {})
            drawn = {name: site.value for name, site in q.steps.last.items()}
            new_p, row_p = p.body(state[nq:-2], row[mq:-1], drawn)
            log_w = state[-2] + self._log_weights(q.steps, p.steps, shape)
            carry, log_w, gained = self._resample([*new_q, *new_p], log_w, row[-1], p.steps.valid)
            return [*carry, log_w, state[-1] + gained], [*row_q, *row_p]

        ends, rows = (active_loop() or one_by_one)(body, start, [*q.columns, *p.columns, last], total, False)
        self.log_evidence = ends[-1].squeeze(0)
        self._results = {
            "guide": (ends[:nq], rows[: q.steps.width]),
            "model": (ends[nq:-2], rows[q.steps.width :]),
        }

    def _shape(self, sites: list[StepSite]) -> tuple[int, ...]:
        """Particles, then the plates that all sites share; the rest of the batch is summed out."""
        shape = [1] * self.rank
        for frame in set.intersection(*(set(s.everywhere) for s in sites)):
            shape[frame.dim] = frame.size
        return tuple(shape)

    def _log_weights(self, q: StepProgram, p: StepProgram, shape: tuple[int, ...]) -> Tensor:
        total = torch.zeros(shape)
        for sign, steps in ((1, p), (-1, q)):
            for site in steps.last.values():
                if not site.infer.get("_deterministic"):
                    nats = masked(site.fn.log_prob(fill_masked(site.fn, site.value, site.mask)), site.mask)
                    gone = [d for d in range(-nats.dim(), 0) if shape[d] == 1 and nats.shape[d] != 1]
                    total = total + sign * (nats.sum(gone, keepdim=True) if gone else nats)
        return masked(total, p.valid)

    def _resample(
        self, carry: list[Tensor], log_w: Tensor, last: Tensor, valid: Tensor | None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The carries of the new particles, their log weights, and what this adds to log Ẑ."""
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
    """The carry of the ancestors; one that is the same for all particles stays."""
    rank = len(shape)
    if carry.dim() < rank or any(n not in (1, m) for n, m in zip(shape, carry.shape, strict=False)):
        return carry
    if carry.shape[0] != shape[0]:
        return carry
    index = ancestors.reshape(ancestors.shape + (1,) * (carry.dim() - rank)).expand_as(carry)
    return carry.gather(0, index)


def _check(q: ScanSide, p: ScanSide) -> None:
    if q.steps.total != p.steps.total or q.reverse or p.reverse:
        ways = [f"{s.steps.total} steps{' backward' * s.reverse}" for s in (p, q)]
        raise SiteError(
            f"The filtering bound runs model and guide forward through the same steps, but the model takes {ways[0]} "
            f"and the guide {ways[1]}."
        )
    for name, site in q.steps.last.items():
        if not site.fn.has_rsample:
            raise SiteError(
                f"Site '{name}' has no pathwise gradient ({type(site.fn).__name__}), which the filtering bound needs. "
                "Use bound='importance'."
            )
    latent = {n for n, s in p.steps.last.items() if not s.observed and not s.infer.get("_deterministic")}
    if missing := sorted(latent - q.steps.last.keys()):
        raise SiteError(f"The latent sites {missing} of the model's scan are not in the guide's scan. Draw them there.")


def one_by_one(
    body: Callable[[list[Tensor], list[Tensor]], ScanResult],
    state: list[Tensor],
    columns: list[Tensor],
    total: int,
    reverse: bool,
) -> ScanResult:
    """Run a step over time in Python: the last carry, and what is kept of all steps, time first."""
    rows = []
    for t in range(total - 1, -1, -1) if reverse else range(total):
        state, row = body(state, [x[t] for x in columns])
        rows.append(row)
    return state, stack_rows(rows[::-1] if reverse else rows)


def stack_rows(rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The tensors of all steps, time first.

    Raises:
        ArgumentError: one changes its shape from step to step.
    """
    stacked = []
    for column in zip(*rows, strict=True):
        try:
            stacked.append(torch.stack(torch.broadcast_tensors(*column)))
        except RuntimeError as error:
            shapes = list(dict.fromkeys(tuple(x.shape) for x in column))
            raise ArgumentError(
                f"pe.scan: a tensor that step returns in its out, or a mask, changes its shape over time: {shapes}. "
                "Give it one shape."
            ) from error
    return stacked


_active: ContextVar[Filter | None] = ContextVar("filter", default=None)


def active_filter() -> Filter | None:
    """The filter in which a program is run, if any."""
    return _active.get()


@contextmanager
def filtering(by: Filter) -> Iterator[None]:
    """Let the scans of a model take part in a filter."""
    token = _active.set(by)
    try:
        yield
    finally:
        _active.reset(token)
