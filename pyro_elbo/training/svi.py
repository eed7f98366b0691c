"""A drop-in for :class:`pyro.infer.SVI` whose steps can run as one compiled graph."""

import inspect
import itertools
import math
from collections.abc import Iterable
from contextlib import closing
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer

from pyro_elbo.compile import Compile, CompiledSVI, Course, PyroUpdate, StepTotals, TorchUpdate
from pyro_elbo.display import count_noun, progress_bar
from pyro_elbo.errors import ArgumentError, ProgramError, check_count, check_flag
from pyro_elbo.objectives import TraceBeta_ELBO
from pyro_elbo.programs import Program, check_programs, program_arguments, program_name
from pyro_elbo.ranks import check_alone
from pyro_elbo.training.checks import check_compile, check_grad_clip, check_loss
from pyro_elbo.training.comparable import check_limits, repeat
from pyro_elbo.training.converge import BLOCK, Convergence, Goal
from pyro_elbo.training.convergence import ConvergenceReport, Window


class SVI:
    r"""Stochastic variational inference: :class:`pyro.infer.SVI` for the objectives of this library, compiled.

    With ``compile=True`` a whole step becomes one graph: programs, objective, gradient and optimizer. The first step
    with data of a new shape runs in Python. The second step is captured and compiled. From then on the graph runs, as
    long as nothing that it has frozen changes (see ``docs/compile.md``). Steps train the parameters and the
    optimizer's state in place, so both can be read, saved and loaded as usual.

    Args:
        model: the generative program.
        guide: the variational posterior of the model.
        optim: a ``pyro.optim`` optimizer, or a ``torch.optim`` one that holds all parameters.
        loss: an objective of this library.
        compile: compile repeated steps. ``"auto"`` warns once and goes on in Python where a step cannot be compiled.
        grad_clip: the largest joint norm of the gradients of all parameters.
        fallback_random: draw in a compiled step the numbers that an uncompiled one draws from the same seed, for the
            families listed in ``docs/compile.md``. This is slower. Without it the draws are equal in distribution and
            still seeded by torch's generator.

    Raises:
        ArgumentError: ``loss``, ``optim`` or ``compile`` has the wrong type, or ``grad_clip`` is not positive.
        CompileError: ``compile`` is True and compiled steps do not work with this version of torch.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, pyro_elbo as pe
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> svi = pe.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pe.TraceBeta_ELBO(), compile=True)
        >>> losses = svi.run(200, torch.tensor([0.8, 1.2, 1.0]), progress=False)
        >>> losses.shape
        torch.Size([200])
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: PyroOptim | Optimizer,
        loss: TraceBeta_ELBO,
        *,
        compile: Compile = False,
        grad_clip: float | None = None,
        fallback_random: bool = False,
    ) -> None:
        check_programs(model, guide)
        check_loss(loss)
        check_compile(compile)
        check_flag("fallback_random", fallback_random)
        _check_optim(optim, grad_clip)
        self.model, self.guide, self.optim, self.loss, self.compile = model, guide, optim, loss, compile
        update = TorchUpdate(optim, grad_clip) if isinstance(optim, Optimizer) else PyroUpdate(optim, grad_clip)
        self._steps = CompiledSVI(model, guide, loss, update, compile=compile, fallback_random=fallback_random)

    def __repr__(self) -> str:
        kind = self.optim.pt_optim_constructor if isinstance(self.optim, PyroOptim) else type(self.optim)
        programs = f"{program_name(self.model)}, {program_name(self.guide)}"
        return f"SVI({programs}, {kind.__name__}, {self.loss!r}, compile={self.compile!r})"

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(self, "_steps"):
            raise AttributeError(f"SVI is made once: '{name}' cannot be set. Make a new pe.SVI(...) with it.")
        super().__setattr__(name, value)

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one step and return the loss, an estimate of -objective in nats.

        NumPy arrays and pandas objects become tensors, with floats in torch's default dtype. A single DataFrame passes
        its columns as keyword arguments if the model takes arguments of their names, otherwise one matrix.

        Raises:
            CompileError: the step cannot be one graph, or a frozen Python value changes at every step.
            DataError: the arguments do not fit those of the programs, or a column does not hold numbers.
            NonFiniteError: the objective or its gradient is not finite; the step leaves the parameters unchanged.
            ProgramError: the programs, the backward pass or the optimizer fail.
            SiteError: model and guide do not fit each other.
            ArgumentError: this is one of several processes, whose steps would not average gradients.
        """
        return self._train(*self._arguments(args, kwargs))[1][0, 0].item()

    def run(self, num_steps: int, *args: Any, progress: bool = True, **kwargs: Any) -> Float64[Tensor, "num_steps"]:
        """Take many steps on the same data and return the loss of each in nats.

        Compiled steps run without Python between them. ``progress`` shows a bar with the ELBO at β = 1.

        Raises:
            ArgumentError: ``num_steps`` is less than 1.
            CompileError, NonFiniteError, SiteError: as for :meth:`step`.
        """
        check_count("num_steps", num_steps)
        args, kwargs = self._arguments(args, kwargs)
        losses = np.empty(num_steps)
        with progress_bar(progress, total=num_steps, unit=" steps") as bar:
            for start in range(0, num_steps, BLOCK):
                part = losses[start : start + BLOCK]
                names, values = self._train(args, kwargs, Course(len(part)))
                part[:] = values[:, 0]
                bar.update(len(part))
                bar.set_postfix(elbo=f"{values[:, names.index('elbo')].mean():.4g}")
        return torch.from_numpy(losses)

    def converge(
        self,
        *args: Any,
        batches: Iterable | None = None,
        accuracy: float = 0.1,
        max_steps: int = 100_000,
        progress: bool = True,
        **kwargs: Any,
    ) -> ConvergenceReport:
        r"""Train until the averaged parameters are close to the optimum, and say whether they are.

        Steps are taken at the optimizer's learning rate until the iterates are stationary: the halves of a window of
        them agree, by the split R-hat of the parameters. Their average is far closer to the optimum than the last of
        them. Then the learning rate is halved, and so on, until the distance from the optimum, predicted from how far
        the averages moved, is at most ``accuracy``. The averages are left in the parameters; the optimizer gets its
        learning rate back.

        A learning rate for which the objective becomes infinite or worse than at the start is lowered by itself. Start
        with a large one, such as 0.05 or 0.1 for Adam: a large step size finds the region of the optimum, small ones
        the optimum.

        Args:
            args, kwargs: arguments of the programs, the same for every step.
            batches: an iterable of minibatches instead, such as a DataLoader, iterated again and again. A batch is a
                tensor, a tuple of arguments, or a dict of keyword arguments.
            accuracy: the distance from the optimum, as the root of the symmetrized KL between guides: 0.1 stands for
                a mean that is off by a tenth of a posterior standard deviation. Latents of single rows of the data
                count by the row that is farthest off.
            max_steps: the most steps.
            progress: show a bar with step size, R-hat and distance.

        Raises:
            ArgumentError: ``accuracy`` is not positive, ``max_steps`` is too small, the learning rate decays,
                or two runs of the programs from the same seed differ.
            DataError: ``batches`` yields nothing, or data do not fit the programs.
            GuideError: the guide has no density.
            CompileError, NonFiniteError, SiteError: as for :meth:`step`.

        Example:
            >>> import pyro, torch, pyro.distributions as dist, pyro_elbo as pe
            >>> def model(x):
            ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
            ...     with pyro.plate("data", len(x)):
            ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            >>> guide = pyro.infer.autoguide.AutoNormal(model)
            >>> svi = pe.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pe.TraceBeta_ELBO())
            >>> report = svi.converge(torch.tensor([0.8, 1.2, 1.0]))  # doctest: +SKIP
            >>> report.converged  # doctest: +SKIP
            True

        References:
            Dhaka, Catalina, Andersen, Magnusson, Huggins, Vehtari (2020), Robust, accurate stochastic optimization for
            variational inference, arXiv:2009.00666; Welandawe, Andersen, Vehtari, Huggins (2024), A framework for
            improving the reliability of black-box variational inference, JMLR 25:219, arXiv:2203.15945.
        """
        check_limits(self.loss, accuracy, max_steps)
        if batches is not None and (args or kwargs):
            raise ArgumentError("Pass the data of every step as arguments, or batches=..., not both.")
        data = repeat(batches) if batches is not None else itertools.repeat(self._arguments(args, kwargs))
        with progress_bar(progress, total=max_steps, unit=" steps") as bar:

            def show(window: Window) -> None:
                shown = {"step_size": window.step_size, "r_hat": window.r_hat, "distance": window.distance}
                bar.set_postfix({name: x for name, x in shown.items() if not math.isnan(x)})

            made, goal = self._steps.update.optimizers, Goal(accuracy, max_steps)
            run = Convergence(self.model, self.guide, self.loss, next(data), made, goal, show=show)
            with closing(run):
                while run.due:
                    steps, snapshots = run.snapshots() if batches is None else (1, None)
                    bar.update(steps)
                    try:
                        names, values = self._train(*next(data), Course(steps, snapshots))
                    except ValueError as error:
                        run.fail(error, steps)
                    else:
                        iterates = None if snapshots is None else snapshots.rows
                        run.observe(values[:, names.index("elbo")], iterates)
            return run.report()

    def reset(self) -> None:
        """Forget the training: parameters, optimizer and schedules become what they were before the first step.

        Compiled graphs stay, so that data sets of one shape can be fitted one after the other with one compilation, as
        in :func:`simulation_based_calibration`. Parameters that Pyro's store has lost come back to it. Learning rates,
        and buffers of modules such as the averages of batch norm, are left as they are. Before the first step there is
        nothing to forget.

        Raises:
            ArgumentError: the optimizer does not start from zeros, or a penalty trains a critic.

        Example:
            >>> import pyro, torch, pyro.distributions as dist, pyro_elbo as pe
            >>> def model(x):
            ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
            ...     with pyro.plate("data", len(x)):
            ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            >>> guide = pyro.infer.autoguide.AutoNormal(model)
            >>> svi = pe.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pe.TraceBeta_ELBO())
            >>> means = []
            >>> for x in (torch.full((99,), 3.0), torch.full((99,), -3.0)):
            ...     svi.reset()
            ...     _ = svi.run(300, x, progress=False)
            ...     means.append(round(guide.median()["z"].item()))
            >>> means
            [3, -3]
        """
        self._steps.reset()

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Return the loss in nats without taking a step, with modules in evaluation mode; schedules do not advance."""
        args, kwargs = self._arguments(args, kwargs)
        return self._steps.evaluate(args, kwargs)[1][0, 0].item()

    def _arguments(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if not kwargs and all(isinstance(x, Tensor) for x in args):
            return args, kwargs
        return program_arguments(self.model, args, kwargs)

    def _train(self, args: tuple, kwargs: dict[str, Any], course: Course | None = None) -> StepTotals:
        check_alone()
        try:
            return self._steps.train(args, kwargs, course or Course())
        except ProgramError as error:
            raise ProgramError(f"{error} It failed after {count_noun(self.loss.step, 'step')}.") from (
                error.__cause__ or error
            )


def _check_optim(optim: Any, grad_clip: float | None) -> None:
    if not isinstance(optim, PyroOptim | Optimizer):
        got = f"the class {optim.__name__}" if inspect.isclass(optim) else type(optim).__name__
        raise ArgumentError(
            f"optim must be a pyro.optim or a torch.optim optimizer, got {got}: for example "
            'pyro.optim.Adam({"lr": 0.01}), or torch.optim.Adam(guide.parameters()) after guide(*args).'
        )
    check_grad_clip(grad_clip)
