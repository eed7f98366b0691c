"""Training and evaluation steps, each run as one compiled graph.

A new step (another shape, another mode, another value of something that the graph froze) first runs once in Python.
That run makes lazy parameters and the optimizer's state, and raises Pyro's own errors. The second time, the step is
recorded (:mod:`pyro_elbo.compile.record`), and its machine code is made or found (:mod:`pyro_elbo.compile.store`). From
then on the code runs as long as the guard (:mod:`pyro_elbo.compile.guard`) finds nothing changed.
"""

import logging
import os
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

from pyro_elbo.assumptions import NotAlikeError, capturing
from pyro_elbo.compile import record as recorder
from pyro_elbo.compile._torch import import_compiler, lazy_graph_modules
from pyro_elbo.compile.arguments import Key, describe, difference, with_tensors
from pyro_elbo.compile.course import Course
from pyro_elbo.compile.execution import Execution, as_written, collect_code, garbage_later, record_execution
from pyro_elbo.compile.gradients import hooks_of, network_gradients, program_gradients
from pyro_elbo.compile.guard import Guard
from pyro_elbo.compile.known_step import KnownStep
from pyro_elbo.compile.optimizer import Update, UpdatePlan, check_own, check_traceable, watch
from pyro_elbo.compile.reach import guard_of
from pyro_elbo.compile.refusals import check_reachable, check_sites, explain_capture, refuse_side_effects
from pyro_elbo.compile.start import Start
from pyro_elbo.compile.traced_update import trace_update
from pyro_elbo.compile.unusable import explain_unusable
from pyro_elbo.compile.versions import check_version
from pyro_elbo.errors import ArgumentError, CompileError
from pyro_elbo.objectives import TraceBeta_ELBO
from pyro_elbo.programs import (
    Parameters,
    Program,
    collect_parameters,
    differentiate,
    evaluating,
    module_evaluating,
)
from pyro_elbo.ranks import Sizes, all_of, digests, in_parts, weighed
from pyro_elbo.terms import Terms

Compile = bool | Literal["auto"]
StepKind = Literal["train", "evaluate"]
Kwargs = dict[str, Any]
StepTotals = tuple[tuple[str, ...], np.ndarray]  # names, values (steps, names): loss and totals in nats

_VALIDATION = ("validate_distributions_pyro", "validate_distributions_torch", "validate_infer", "validate_poutine")
MAX_MISSES = 8  # steps in a row for which something has changed
MAX_SHAPES = 64  # kinds of data
_ONE = Course()
_log = logging.getLogger(__name__)


class CompiledSVI:
    """Steps of stochastic variational inference, compiled from their second run on.

    Args:
        update: moves the parameters by their gradients.
        compile: compile the steps; False runs every step in Python, ``"auto"`` those that cannot be compiled.
        per_datum: divide the loss by the number of rows of the full data.
        fallback_random: draw with torch's own operators in the program's order, which reproduces the stream of an
            uncompiled run. Otherwise all noise of a step is drawn at once.
        rows: counts the rows of a step's arguments, where they are a part of a batch that several processes hold and
            the objective needs the rows of all. All of them run a step in Python, or none.

    Attributes:
        trains: whether the objective depends on a parameter.

    Raises:
        CompileError: ``compile`` is True and compiled steps do not work with this version of torch.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        loss: TraceBeta_ELBO,
        update: Update,
        *,
        compile: Compile = True,
        per_datum: bool = False,
        fallback_random: bool = False,
        rows: Callable[[tuple, Kwargs], int] | None = None,
    ) -> None:
        self.model, self.guide, self.loss, self.update = model, guide, loss, update
        self.compile: Compile = compile
        self.per_datum, self.fallback_random, self.rows = per_datum, fallback_random, rows
        self._known: dict[Key, list[KnownStep]] = {}
        self._modules: list[nn.Module] = []
        self._misses = 0
        self.trains = True
        self._start, self._first_step = Start(), loss.step
        if compile:
            with self._or_python():
                check_version(CompiledSVI)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_known": {}, "_misses": 0}  # a copy has other tensors than those of the graphs

    def train(self, args: tuple, kwargs: Kwargs, course: Course = _ONE) -> StepTotals:
        """Take the steps of a course.

        Raises:
            CompileError: the step cannot be captured as one graph, or something that a graph freezes changes from step
                to step.
            NonFiniteError: the objective is not finite. That step changes nothing.
        """
        return self._run("train", args, kwargs, course)

    def evaluate(self, args: tuple, kwargs: Kwargs) -> StepTotals:
        """Return the loss and the totals, with modules in evaluation mode; change nothing."""
        with self._evaluating():
            return self._run("evaluate", args, kwargs, _ONE)

    def reset(self) -> None:
        """Begin again: parameters, optimizer and schedules as before the first step; graphs stay.

        Raises:
            ArgumentError: the optimizer does not start from zeros, or the objective trains a critic.
        """
        if self.loss.critics:
            raise ArgumentError(
                "reset: the objective's penalties train critics, which stay trained. Make a new pe.SVI."
            )
        self._start.restore(self.update.optimizers(self._start.parameters))
        self.loss.step = self._first_step

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Put the modules that earlier evaluations have found into evaluation mode: a graph does not call them."""
        with ExitStack() as stack:
            for module in self._modules:
                stack.enter_context(module_evaluating(module))
            yield

    def _run(self, kind: StepKind, args: tuple, kwargs: Kwargs, course: Course) -> StepTotals:
        here = bool(self.compile) and not _PYRO_STACK  # a graph would freeze the handlers around the step
        if not self._everywhere(here):
            return self._run_in_python(kind, args, kwargs, course)
        key, leaves, spec = describe(kind, args, kwargs)
        data = [x for x in leaves if isinstance(x, Tensor)]
        if self.rows is not None:
            key = (*key, *digests(repr([x.shape for x in data])))
        step = None
        with self._or_python():
            course.prepare()
            step = self._captured(key, kind, leaves, spec)
        if self._everywhere(step is not None and not step.left.found()) and step is not None:
            return self._execute(step, args, kwargs, data, course)
        if not self.compile:
            return self._run_in_python(kind, args, kwargs, course)
        if step is not None:
            names, first = self._run_in_python(kind, args, kwargs, course.first())
        else:
            ((step, (names, first)),) = (self._record_step(kind, args, kwargs) for _ in course.first().in_python())
            self._known[key][:] = [step, *self._known[key][: MAX_MISSES - 1]]
        if course.steps == 1:
            return names, first
        return names, np.concatenate([first, self._run(kind, args, kwargs, course.rest())[1]])

    def _everywhere(self, condition: bool) -> bool:
        """Return whether a condition holds in every process that holds a part of the batch."""
        return condition if self.rows is None else all_of(condition)

    def _sharing(self, sizes: Sizes, captured: Tensor | None = None) -> AbstractContextManager[None]:
        return nullcontext() if self.rows is None else in_parts(sizes, captured)

    def _weighed(self, loss: Tensor, record: Mapping[str, Tensor], args: tuple, kwargs: Kwargs) -> Tensor:
        """Weigh the loss of a part of a batch by its rows (frames, ...)."""
        return loss if self.rows is None else weighed(loss, self.rows(args, kwargs) * record.get("divisor", 1))

    def _captured(self, key: Key, kind: StepKind, leaves: list[Any], spec: Any) -> KnownStep | None:
        """Return a step whose graph can run, captured now where it ran once in Python; None for a new step."""
        known, changed = self._known.setdefault(key, []), "the program"
        for step in known:
            if (broken := step.broken()) is None:
                if step.execute is None:
                    self._capture(step, kind, leaves, spec)
                else:
                    self._misses = 0
                return step
            changed = broken
        self._check_misses(changed if known else None)
        return None

    @contextmanager
    def _or_python(self) -> Iterator[None]:
        """Under ``compile="auto"``, warn of what cannot be compiled and take all steps in Python from now on."""
        try:
            yield
        except CompileError as error:
            if self.compile != "auto":
                raise
            self.compile = False
            warnings.warn(f"Steps run in Python, several times slower than compiled ones: {error}", stacklevel=2)

    def _check_misses(self, changed: str | None) -> None:
        """Raise once too many steps needed a new graph; ``changed`` is None where the shapes of the data are new."""
        self._misses += changed is not None
        if self._misses > MAX_MISSES or len(self._known) > MAX_SHAPES:
            what = f"'{changed}' changes" if changed is not None else difference(*list(self._known)[-2:])
            raise CompileError(
                f"Almost every step needs a graph of its own: {what} from step to step, and a graph is compiled for "
                "one value. Pass what changes as a tensor argument, pad the data to one shape, or use compile=False."
            )

    def _loss(self, terms: Terms) -> Tensor:
        return -(terms.per_datum if self.per_datum else terms).objective

    def _record(self, terms: Terms, loss: Tensor) -> dict[str, Tensor]:
        totals = (terms.per_datum if self.per_datum else terms).totals()
        return {"loss": loss.detach()} | {name: x.detach() for name, x in totals.items()}

    def _run_in_python(self, kind: StepKind, args: tuple, kwargs: Kwargs, course: Course) -> StepTotals:
        records = [self._in_python(kind, args, kwargs, {})[1] for _ in course.in_python()]
        return tuple(records[0]), np.array([[x.item() for x in record.values()] for record in records])

    def _in_python(
        self, kind: StepKind, args: tuple, kwargs: Kwargs, sizes: Sizes
    ) -> tuple[Terms, dict[str, Tensor], Parameters]:
        """Take a step as pyro.infer.SVI does; return its terms, its record and the parameters that it used."""
        train = torch.set_grad_enabled(kind == "train")
        with train, self._sharing(sizes), collect_parameters() as parameters, ExitStack() as stack:
            if kind == "evaluate":
                self._modules = stack.enter_context(evaluating(self.model, self.guide))
            terms = self.loss.checked_terms(self.model, self.guide, args, kwargs)
            loss = self._loss(terms)
            record = self._record(terms, loss)
            if kind == "train" and loss.requires_grad:
                loss = self.loss.count_step(self._weighed(loss, record, args, kwargs), terms)
        if kind == "train":
            self.trains = loss.requires_grad
        if kind == "train" and loss.requires_grad:
            self._start.note(parameters)
            differentiate(loss, parameters)
            check_own(parameters)
            self.update(parameters)
            pyro.infer.util.zero_grads(parameters.values())
        return terms, record, parameters

    def _record_step(self, kind: StepKind, args: tuple, kwargs: Kwargs) -> tuple[KnownStep, StepTotals]:
        """Take a step in Python and note everything that its graph will rely on."""
        sizes: Sizes = {}
        with garbage_later():
            import_compiler()
        with as_written(), record_execution() as execution:
            terms, record, parameters = self._in_python(kind, args, kwargs, sizes)
        trained = kind == "train" and terms.objective.requires_grad
        critics = [critic.optimizer for critic in self.loss.critics.values()]
        plan = UpdatePlan(optimizers := self.update.optimizers(parameters) + critics if trained else [])
        with self._evaluating() if kind == "evaluate" else nullcontext():
            guard = self._guard(execution, args, kwargs, parameters, optimizers)
        gradients = {p: p.grad for p in _held(optimizers) if p.grad is not None}
        hooks, sites = hooks_of(parameters), tuple(terms.sites)
        step = KnownStep(parameters, plan, gradients, hooks, sites, tuple(record), guard, execution, sizes)
        return step, (step.names, np.array([[x.item() for x in record.values()]]))

    def _guard(
        self,
        execution: Execution | None,
        args: tuple,
        kwargs: Kwargs,
        parameters: Mapping[str, Tensor],
        optimizers: list[torch.optim.Optimizer],
    ) -> Guard:
        """Watch what a step reads: programs, objective, parameters and the optimizers that train them."""
        hooks, store = hooks_of(parameters), pyro.get_param_store()
        guard = guard_of((self.model, self.guide, args, kwargs, self.loss, *hooks.values(), *optimizers), execution)
        watch(guard, optimizers)
        if optimizers:
            self.update.watch(guard, parameters.values())
        stored = [name for name in parameters if name in store._params]
        guard.watch(lambda: store._params, stored)
        guard.watch(lambda: store._constraints, stored)
        for p in parameters.values():
            guard.watch_gradient(p)
        guard.watch_attributes("grad", [p for p in _held(optimizers) if id(p) not in map(id, parameters.values())])
        return guard

    def _capture(self, step: KnownStep, kind: StepKind, leaves: list[Any], spec: Any) -> None:
        """Capture and compile a step."""
        from pyro_elbo.compile._torch import config  # takes a second to import
        from pyro_elbo.compile.executable import Executable, build_driver, compiling
        from pyro_elbo.compile.scan.lower import ScanLowering
        from pyro_elbo.compile.store import machine_code

        scans, recording = ScanLowering(), collect_code
        names, validate = list(self._scalars(step, 0)), pyro.settings.get("validate_distributions_pyro")
        ran: list[Any] = []

        def function(*inputs: Tensor) -> Tensor:
            *tensors, scalars, alive, record = inputs
            args, kwargs = with_tensors(leaves, spec, tensors)
            named = {name: scalars[i] for i, name in enumerate(names)}
            with self._sharing(step.sizes, alive):
                with capturing(validate, scans) as assumed, torch.set_grad_enabled(kind == "train"):
                    with as_written(), recording() as found:
                        terms = self.loss.evaluate(self.model, self.guide, args, kwargs, named.__getitem__)
                    ran.append(found)
                    check_sites(step.sites, tuple(terms.sites))
                    recorded = self._record(terms, loss := self._loss(terms))
                    share = self._weighed(loss, recorded, args, kwargs)
                finite = (
                    self._traced_update(step, terms, share, named) if step.plan.optimizers else torch.ones_like(alive)
                )
            usable = torch.stack([alive, torch.isfinite(loss.detach()), finite, *assumed]).all()
            record.copy_(torch.stack([x.to(torch.float64) for x in (*recorded.values(), finite, usable)]))
            alive.copy_(usable)
            return usable

        def trace() -> recorder.Recording:
            with refuse_side_effects(step.guard), pyro.settings.context(**dict.fromkeys(_VALIDATION, False)):
                return recorder.record(function, inputs)

        row = step.row(len(names))
        inputs = [*(x for x in leaves if isinstance(x, Tensor)), *row]
        with (
            explain_capture(step.guard.generators),
            config.patch(fallback_random=self.fallback_random),
            lazy_graph_modules(True),
            garbage_later(),
            compiling(),
        ):
            check_reachable(step.guard)
            check_traceable(step.plan.optimizers, step.parameters)
            try:
                call = trace()
            except NotAlikeError as reason:
                _log.debug("particles are captured one by one: %s", reason)
                scans = ScanLowering(maps=False)
                call = trace()
            if step.execution is not None and step.execution.misses(ran[-1]):
                scans, recording = ScanLowering(scans.maps), record_execution  # the first run took another branch
                call = trace()
                step.execution.update(ran[-1])
                args, kwargs = with_tensors(leaves, spec, [x for x in leaves if isinstance(x, Tensor)])
                step.guard = self._guard(step.execution, args, kwargs, step.parameters, step.plan.optimizers)
                check_reachable(step.guard)
            build_driver(call.tensors)
            scans.compile()
            code = machine_code(call, kept=2, lift_noise=not self.fallback_random)
            step.execute = Executable(call, code, row, scans.owned)
            if os.environ.get("PYRO_ELBO_CHECK"):
                step.execute.check(call, not self.fallback_random, list(self._scalars(step, 0).values()))

    def _traced_update(self, step: KnownStep, terms: Terms, loss: Tensor, named: Mapping[Hashable, Tensor]) -> Tensor:
        """Move the parameters while a step is captured; return whether all gradients are finite."""
        self.loss.keep_averages(terms)
        critics = network_gradients(terms)
        gradients = program_gradients(loss, step.parameters, step.hooks, step.gradients)
        return trace_update(self.update, step.plan, gradients, critics, named)

    def _scalars(self, step: KnownStep, ahead: int) -> dict[Hashable, float]:
        """Return the Python numbers of the step after ``ahead`` more: each schedule's, and the optimizers'."""
        taken = self.loss.step + ahead
        return {schedule: schedule(taken) for schedule in self.loss.schedules} | step.plan.numbers(ahead)

    def _execute(self, step: KnownStep, args: tuple, kwargs: Kwargs, data: list[Tensor], course: Course) -> StepTotals:
        steps = course.steps
        constant = self.loss.step >= self.loss.settled and not step.plan.counts_in_python
        values = [list(self._scalars(step, ahead).values()) for ahead in range(1 if constant else steps)]
        values *= steps if constant else 1
        execute: Any = step.execute
        try:
            record = execute(data, values, course.snapshots, course.seeds)
        except RuntimeError:
            with torch.no_grad():
                self.loss.terms(self.model, self.guide, *args, **kwargs)  # raises Pyro's or torch's own error, if any
            raise
        usable = int(record[:, -1].sum())
        if step.plan.optimizers:
            self.loss.step += usable
            step.plan.advance(usable)
        if usable < steps:
            step.execute.flag.fill_(True)
            self._explain_unusable(step, record[usable], args, kwargs)
        return step.names, record[:, :-2]

    def _explain_unusable(self, step: KnownStep, row: np.ndarray, args: tuple, kwargs: Kwargs) -> None:
        def loss() -> Tensor:
            return self._loss(self.loss.evaluate(self.model, self.guide, args, kwargs, lambda s: s(self.loss.step)))

        with step.execute.unchanged():
            with torch.no_grad():
                self.loss.terms(self.model, self.guide, *args, **kwargs)  # raises an error that names site and rows
            totals = dict(zip(step.names, row.tolist(), strict=False))
            explain_unusable(totals, bool(row[-2]), loss, step.parameters)


def _held(optimizers: Iterable[torch.optim.Optimizer]) -> list[Tensor]:
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
