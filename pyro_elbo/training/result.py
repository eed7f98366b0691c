"""What is kept after training: the programs with their history, data and seed, as draws, terms, tables and a file."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from pyro_elbo.diagnosis import Diagnosis, diagnose, named_points
from pyro_elbo.display import count_noun, html_table
from pyro_elbo.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    check_choice,
    check_count,
    check_flag,
    check_path,
    check_seed,
)
from pyro_elbo.files import read_file, reading, write_file
from pyro_elbo.objectives import TraceBeta_ELBO
from pyro_elbo.plots import plot_history
from pyro_elbo.posterior import ParetoK, label_latents, pareto_k, predict_data, sample_guide, to_arviz
from pyro_elbo.programs import (
    Program,
    check_arguments,
    check_options,
    check_programs,
    program_arguments,
    program_name,
    seeded,
)
from pyro_elbo.terms import Terms
from pyro_elbo.training.checkpoint import check_state
from pyro_elbo.training.checks import check_loss
from pyro_elbo.training.convergence import ConvergenceReport
from pyro_elbo.training.data import RunArguments, arguments
from pyro_elbo.training.rows import check_no_list, num_rows
from pyro_elbo.training.saved import SavedResult, decode_loss, decode_result, encode_history, encode_loss, encode_report
from pyro_elbo.training.summary import Summary, summarize
from pyro_elbo.training.trained import Trained, first_run

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

Which = Literal["best", "last"]
FORMAT = "pyro_elbo.FitResult.1"
_PARTS = ("format", "states", "holds", "loss", "loss_repr", "history", "best_epoch", "stopped_early", "seed", "data")
_KIND = "file of result.save"


@dataclass(frozen=True, repr=False, eq=False)
class FitResult:
    """The result of :func:`fit`: look at it, draw from it, save it.

    Methods evaluate the programs in evaluation mode and leave modes, buffers, parameters and the caller's random state
    as they were. They take new arguments of the programs, in the forms that :func:`fit` takes; without any they use the
    training data. Draws repeat with ``seed``, that of the fit if omitted.

    Attributes:
        model, guide, loss: the arguments of :func:`fit`; the parameters are trained in place.
        history: Dataset over ``epoch`` x ``split`` (x ``latent``), nats per datum.
        best_epoch: the epoch after warm-up with the highest validation ELBO at β = 1 (training ELBO without
            validation data).
        stopped_early: True if training ended before ``max_epochs`` and ``max_steps``, as when patience runs out, or
            ``lr="auto"`` has converged.
        best_path, last_path: the checkpoints; None without ``dir``.
        seed: the seed of the fit.
        data: the training data as arguments of the programs; the first batch if they came from a Dataset or DataLoader.
        holds: which parameters the programs hold since training, those of the ``"best"`` or of the ``"last"`` epoch.
        convergence: how ``lr="auto"`` came to its end; None without it.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, pyro_elbo as pe
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> result = pe.fit(model, guide, torch.randn(50), batch_size=None, max_epochs=2, progress=False)
        >>> dict(result.sample(100).sizes), dict(result.predict(torch.zeros(3), num_samples=10).sizes)
        ({'draw': 100}, {'draw': 10, 'data': 3})
    """

    model: Program
    guide: Program
    loss: TraceBeta_ELBO
    history: "xarray.Dataset"
    best_epoch: int
    stopped_early: bool
    best_path: Path | None
    last_path: Path | None
    seed: int
    data: RunArguments
    holds: Which
    convergence: ConvergenceReport | None
    _trained: Trained
    _kept: Mapping[str, Mapping[str, Any]]

    def sample(self, num_samples: int = 1000, *args: Any, seed: int | None = None, **kwargs: Any) -> "xarray.Dataset":
        """Draw the latents from the guide, with the model's deterministics.

        Returns:
            Dataset of every site: ``draw``, the site's plates, (``time``,) then ``<site>_dim_0`` ... for its event.

        Raises:
            DataError: the training data came from a loader, and no arguments are given.
            GuideError, SiteError, NonFiniteError: as from the terms.
        """
        check_count("num_samples", num_samples)
        given = self._arguments(args, kwargs)
        return label_latents(sample_guide(self.model, self.guide, *given, num_samples, self._seed(seed)))

    def predict(
        self, *args: Any, num_samples: int = 1000, horizon: int = 0, seed: int | None = None, **kwargs: Any
    ) -> "xarray.Dataset":
        r"""Draw new data: latents from the guide given the arguments, observed sites from the model.

        .. math:: \tilde x \sim \int p(\tilde x \mid z)\, q(z \mid x)\, dz

        Observations in the arguments inform the guide and are drawn anew; arguments that a program makes optional
        (``y=None``) may be left out. With ``horizon``, the sequences of :func:`scan` keep their data, and the steps
        after the end of each are drawn: the model takes ``horizon`` and passes it on to the scan.

        Returns:
            Dataset of the observed sites: ``draw``, plates, (``time``,) event. Under ragged or masked sequences the
            coordinate ``<site>_counted`` is True where a step is real. Attributes name sites without a sampler.

        Raises:
            ArgumentError, DataError: ``horizon`` reaches no scan, or the arguments do not fit the programs.
            GuideError, SiteError, NonFiniteError: as from the terms; a guide with parameters for every row of the
                training data has none for new rows.
        """
        check_count("num_samples", num_samples)
        given = self._arguments(args, kwargs)
        return predict_data(self.model, self.guide, *given, num_samples, self._seed(seed), horizon)

    def terms(self, *args: Any, seed: int | None = None, **kwargs: Any) -> Terms:
        """Evaluate every term of the bound under the objective of the fit, without gradients: nats."""
        args, kwargs = self._arguments(args, kwargs)
        with torch.no_grad(), seeded(self._seed(seed)):
            return self.loss.terms(self.model, self.guide, *args, **kwargs)

    def to_arviz(self, *args: Any, seed: int | None = None, **options: Any) -> Any:
        """Export to ArviZ: :func:`to_arviz` with the history of the fit; ``options`` are its options."""
        names = ("num_samples", "resample", "predictive", "prior", "coords", "dims", "covariance", "file")
        own = {name: options.pop(name) for name in names if name in options}
        args, kwargs = self._arguments(args, options)
        return to_arviz(self.model, self.guide, *args, history=self.history, seed=self._seed(seed), **own, **kwargs)

    def pareto_k(self, *args: Any, num_samples: int = 4000, seed: int | None = None, **kwargs: Any) -> ParetoK:
        """Say how far the guide can be trusted: see :func:`pareto_k`."""
        args, kwargs = self._arguments(args, kwargs)
        return pareto_k(self.model, self.guide, *args, num_samples=num_samples, seed=self._seed(seed), **kwargs)

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """Whether training is done and healthy, and if not, why; print it: see :func:`diagnose`."""
        return diagnose(self.history)

    def plot(self, axes: "list[Axes] | None" = None) -> "list[Axes]":
        """Plot the history: see :func:`plot_history`."""
        return plot_history(self.history, axes)

    def summary(self, *args: Any, num_samples: int = 4000, seed: int | None = None, **kwargs: Any) -> Summary:
        """Return a table of the latent sites: KL in nats, k-hat, active units; see :class:`Summary`.

        The bound and the KLs are means of 25 evaluations; k-hat and active units take ``num_samples`` draws, which is
        slow where the programs do not vectorize over draws.
        Where every latent belongs to one row and training took minibatches, k-hat and active units are those of 250
        rows, spread evenly over the data.

        Raises:
            ArgumentError: ``num_samples`` is less than 2, from which no spread can be told.
        """
        check_count("num_samples", num_samples, least=2)
        args, kwargs = self._arguments(args, kwargs)

        def evaluate(seed: int) -> Terms:
            return self.terms(*args, seed=seed, **kwargs)

        return summarize(self.model, self.guide, evaluate, args, kwargs, self.data.rows, num_samples, self._seed(seed))

    def save(self, path: str | os.PathLike, which: Which | None = None, *, data: bool = True) -> None:
        """Write the result to one file, which :func:`load` reads back with the same model and guide.

        The file holds the parameters, buffers, history, seed, objective and training data, as tensors and plain values.
        It is written to a temporary file first, so ``path`` never holds half of a result.

        Args:
            path: the file; an older one is replaced.
            which: the only parameters to write, of the ``"best"`` or the ``"last"`` epoch. Without it, both that the
                fit kept: it keeps those of the best epoch beside the last with ``dir``, ``patience`` or
                ``restore_best``.
            data: whether to write the training data too; without them :func:`load` needs arguments for the programs.

        Raises:
            ArgumentError: ``which`` is neither.
            CheckpointError: the fit did not keep those parameters, or the file cannot be written.
        """
        check_flag("data", data)
        wanted = [name for name in ("best", "last") if name in self._states] if which is None else [which]
        content = {
            "format": FORMAT,
            "states": {name: self._state(name) for name in wanted},
            "holds": self.holds if self.holds in wanted else wanted[0],
            "loss": encode_loss(self.loss),
            "loss_repr": repr(self.loss),
            "history": encode_history(self.history),
            "best_epoch": self.best_epoch,
            "stopped_early": self.stopped_early,
            "seed": self.seed,
            "data": tuple(self.data) if data and self.data.is_plain() else None,
            "convergence": None if self.convergence is None else encode_report(self.convergence),
        }
        write_file(content, check_path("path", path))

    @property
    def _states(self) -> dict[str, Mapping[str, Any]]:
        """The parameters of both epochs, as far as they are known; one set where the best epoch is the last."""
        states = {**self._kept, self.holds: self._trained.state_dict()}
        only = states[self.holds]
        return {"best": only, "last": only} if self.best_epoch == self.history.epoch[-1] else states

    def _state(self, which: str) -> Mapping[str, Any]:
        check_choice("which", which, ("best", "last"))
        if which not in self._states:
            raise CheckpointError(
                f"The parameters of the {which} epoch were not kept. Fit with restore_best=True or dir=..., which keep "
                "both, or leave which out."
            )
        return self._states[which]

    def _seed(self, seed: int | None) -> int:
        check_seed(seed)
        return self.seed if seed is None else seed

    def _arguments(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Return new arguments as the programs take them, or the training data."""
        if args or kwargs:
            check_options(self.model, kwargs)
            if len(args) == 1:
                check_no_list("This call", args[0])
            if len(args) == 1 and not kwargs and isinstance(args[0], tuple | list | Mapping):
                args, kwargs = arguments(args[0])
            args, given = program_arguments(self.model, args, kwargs)
            check_arguments("This call", {"model": self.model, "guide": self.guide}, args, given)
            return args, given
        if not self.data.whole:
            raise DataError(
                "The result does not hold training data that come from a file, a Dataset or a DataLoader. Pass the "
                "arguments of the programs, such as result.sample(1000, x)."
            )
        return self.data.args, self.data.kwargs

    @property
    def _lines(self) -> list[str]:
        epoch = self.best_epoch if self.holds == "best" else int(self.history.epoch[-1])
        elbo = self.history.elbo.sel(epoch=epoch).dropna("split")
        figures = ", ".join(f"{split.item()} elbo {elbo.sel(split=split):.4f}" for split in elbo.split)
        stopped = ", stopped early" if self.stopped_early else ""
        converged = [] if self.convergence is None else [self.convergence.summary]
        points = named_points(self.history)
        return [
            f"Fit of {program_name(self.model)} and {program_name(self.guide)}, {self.loss!r}",
            f"{count_noun(self.history.sizes['epoch'], 'epoch')}{stopped}; best epoch {self.best_epoch}",
            f"parameters of epoch {epoch}: {figures} nats per datum",
            *converged,
            *([f"the elbo is no bound: the guide is a point estimate of {points}"] if points else []),
        ]

    def __repr__(self) -> str:
        return "\n  ".join(self._lines)

    def _repr_html_(self) -> str:
        title, *notes = self._lines
        return html_table(title, (), [], notes)


def load(
    path: str | os.PathLike,
    model: Program,
    guide: Program,
    *args: Any,
    which: Which | None = None,
    loss: TraceBeta_ELBO | None = None,
    **kwargs: Any,
) -> FitResult:
    """Read a result that :meth:`FitResult.save` wrote into model and guide, which must be those that were fitted.

    The file is read as tensors and plain values: no code in it is run. Everything is compared before a parameter
    changes.

    Args:
        path: the file.
        model, guide: the programs; their parameters are set in place. An AutoGuide need not have run.
        args, kwargs: arguments of the programs to run them with once, if the file's training data do not suit.
        which: the parameters of the ``"best"`` or the ``"last"`` epoch; those that the programs held if omitted.
        loss: the objective, if it holds functions or classes of your own, which a file cannot.

    Raises:
        CheckpointError: the file is missing, damaged, no saved result or one of other programs, or lacks those
            parameters.
        ArgumentError: an argument has a wrong type, or the file lacks the objective.
        GuideError: the parameter store already holds parameters of another program of the same name.

    Example:
        >>> import pyro, tempfile, torch, pyro.distributions as dist, pyro_elbo as pe
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> fitted = pyro.infer.autoguide.AutoNormal(model)
        >>> result = pe.fit(model, fitted, torch.ones(50), batch_size=None, max_epochs=2, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result.save(f"{folder}/fit")
        ...     pyro.clear_param_store()
        ...     again = pe.load(f"{folder}/fit", model, pyro.infer.autoguide.AutoNormal(model))
        >>> bool((again.sample(10).z == result.sample(10).z).all())
        True
    """
    check_programs(model, guide)
    path = check_path("path", path)
    saved = _read(path)
    loss = _loss_of(path, saved) if loss is None else loss
    check_loss(loss)
    if which is not None:
        check_choice("which", which, ("best", "last"))
    holds: Which = saved.holds if which is None else which
    if holds not in saved.states:
        raise CheckpointError(
            f"{path} holds the parameters of the epochs {list(saved.states)}, not of {holds!r}. Leave which out, or "
            "save a fit that kept both (restore_best=True or dir=...)."
        )
    data = _data_of(path, saved, program_arguments(model, args, kwargs))
    batch = data.batch()
    check_arguments(f"{path}: its data", {"model": model, "guide": guide}, *batch, "Pass arguments to pe.load. ")
    with seeded(saved.seed):
        trained, _ = first_run(loss(model, guide), *batch)
    check_state(path, saved.states[holds], trained.state_dict())
    with reading(path, _KIND):
        trained.load_state_dict(saved.states[holds])
    kept = {name: state for name, state in saved.states.items() if name != holds}
    fixed = saved.best_epoch, saved.stopped_early, None, None, saved.seed, data
    return FitResult(model, guide, loss, saved.history, *fixed, holds, saved.convergence, trained, kept)


def _read(path: Path) -> SavedResult:
    plain = read_file(path, _PARTS, _KIND)
    if not isinstance(plain["format"], str) or plain["format"] != FORMAT:
        raise CheckpointError(f"{path}: expected the format {FORMAT}, got {plain['format']!r}. Save it again.")
    with reading(path, _KIND):
        return decode_result(plain)


def _loss_of(path: Path, saved: SavedResult) -> TraceBeta_ELBO:
    if saved.loss is None:
        raise ArgumentError(
            f"{path}: the objective {saved.loss_repr} holds functions or classes that a file cannot: pass it as "
            "loss=..."
        )
    with reading(path, _KIND):
        return decode_loss(saved.loss)


def _data_of(path: Path, saved: SavedResult, given: tuple[tuple, dict[str, Any]]) -> RunArguments:
    """Return the data that were given, or those of the file."""
    args, kwargs = given
    if args or kwargs:
        return RunArguments(args, kwargs, num_rows((*args, *kwargs.values())), whole=True)
    if saved.data is None:
        raise CheckpointError(f"{path} was saved without data: pass the arguments of the programs to pe.load.")
    return saved.data
