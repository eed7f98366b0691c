"""Export draws to ArviZ: InferenceData on ArviZ 0.x, xarray.DataTree on ArviZ 1 and later, from the same groups."""

import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import pyro
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_elbo.errors import (
    ArgumentError,
    GuideError,
    check_choice,
    check_flag,
    check_path,
    check_seed,
    describe,
    first_line,
)
from pyro_elbo.files import writing
from pyro_elbo.posterior.datasets import (
    Groups,
    Names,
    Plates,
    data_groups,
    label,
    mark_masked,
    names_in,
    row_labels,
    stack_chains,
    without_slashes,
)
from pyro_elbo.posterior.draws import Arrays, Draws, ProgramCall, draw
from pyro_elbo.posterior.importance import resample, smooth
from pyro_elbo.posterior.linear_response import respond
from pyro_elbo.posterior.netcdf import open_groups, write_groups
from pyro_elbo.posterior.predict import Predictions, predict
from pyro_elbo.posterior.psis import MIN_DRAWS
from pyro_elbo.posterior.storage import MEMORY, Storage
from pyro_elbo.programs import (
    Program,
    check_initialized,
    check_options,
    collect_parameters,
    evaluating,
    program_arguments,
    seeded,
)


class Options(NamedTuple):
    """The options of :func:`to_arviz`."""

    num_samples: int = 1000
    resample: str | None = None
    predictive: bool = True
    prior: bool = True
    history: Any = None
    coords: Mapping[str, Sequence[Any]] = {}
    seed: int = 0
    dims: Mapping[str, Sequence[str]] = {}
    covariance: str = "guide"
    storage: Storage = MEMORY


def to_arviz(
    model: Program | Sequence[Program],
    guide: Program | Sequence[Program],
    *args: Any,
    num_samples: int = 1000,
    resample: str | None = None,
    predictive: bool = True,
    prior: bool = True,
    history: Any = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    covariance: str = "guide",
    file: str | os.PathLike | None = None,
    **kwargs: Any,
) -> Any:
    r"""Export a fitted posterior with its log densities and importance weights to ArviZ.

    Groups: ``posterior`` (latents and deterministics), ``unconstrained_posterior``, ``sample_stats`` (``lp``,
    ``lp_approx``, ``log_weight``, and ``log_weight_local`` per row where all latents are local; k-hat in its attribute
    ``pareto_k``, one number a chain, the worst row where latents are local), ``log_likelihood``,
    ``log_prior``, ``posterior_predictive``, ``prior``, ``prior_predictive``, ``observed_data``, ``constant_data`` and
    ``training``. Dimensions are ``chain``, ``draw``, the plates' names, and ``<site>_dim_0`` ... for events.

    Args:
        model, guide: the programs, or lists of them: several restarts, which become chains. Give every restart its own
            guide, an AutoGuide or a PyroModule: these run with their own parameters, not with those of Pyro's store.
        args, kwargs: arguments of both programs.
        num_samples: number of draws per chain.
        resample: ``"psis"`` draws again in proportion to the Pareto-smoothed importance weights.
        predictive, prior: whether to add the groups of predictive and of prior draws. What cannot be sampled (flat
            priors, likelihoods without a sampler) is left out, and an attribute of every group says why:
            ``prior_skipped``, ``posterior_predictive_skipped`` or ``prior_predictive_skipped``.
        history: the result of ``fit``, or its ``history``.
        coords: labels of dimensions.
        dims: names of a site's event dimensions, in place of ``<site>_dim_0`` ...
        seed: seed of all draws.
        covariance: ``"linear_response"`` draws from a Gaussian on the real line with the covariance of
            :func:`linear_response` in place of the guide. Its density is exact, and so are ``lp_approx`` and all
            weights. The attribute ``covariance`` of every group says so.
        file: a NetCDF file for exports that memory does not hold: large arrays go to the disk as they are made, in
            chunks of draws, and the result reads from the file what is used of it. The folder needs room for twice
            the file.

    Returns:
        ``arviz.InferenceData`` on ArviZ 0.x, ``xarray.DataTree`` on ArviZ 1 and later; densities in nats.

    Raises:
        ArgumentError: lists of different length, guides that share their parameters, ``coords`` or ``dims`` that do
            not fit, a ``file`` that is no path.
        CheckpointError: ``file`` cannot be written; one of that name is unchanged.
        GuideError: a guide that has never run, or ``resample`` with a point estimate.
        GuideError, SiteError, WeightsError: with ``covariance="linear_response"``, as from :func:`linear_response`.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, pyro_elbo as pe
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> x = torch.randn(20)
        >>> guide(x)["z"].shape
        torch.Size([])
        >>> data = pe.to_arviz(model, guide, x, num_samples=50)
        >>> dict(data["log_likelihood"]["x"].sizes)
        {'chain': 1, 'draw': 50, 'data': 20}
    """
    models: Sequence[Any] = model if isinstance(model, list | tuple) else [model]
    if not models or (isinstance(guide, list | tuple) and not guide):
        raise ArgumentError("model and guide must be programs, or lists of at least one, got an empty list.")
    for program in models:
        check_options(program, kwargs)
    check_seed(seed, optional=False)
    coords, dims = ({} if x is None else x for x in (coords, dims))
    options = Options(num_samples, resample, predictive, prior, history, coords, seed, dims, covariance)
    args, kwargs = program_arguments(models[0], args, kwargs)
    if file is None:
        return to_container(build_groups(model, guide, args, kwargs, options))
    path = check_path("file", file)
    with writing(path):
        storage = Storage(path.parent)
        write_groups(build_groups(model, guide, args, kwargs, options._replace(storage=storage)), path, storage)
    return open_groups(path, _major())


def to_container(groups: Groups, major: int | None = None) -> Any:
    """Wrap groups for ArviZ's major version (the installed one by default)."""
    import arviz
    import xarray

    wrapped: dict[str, Any] = dict(groups)
    major = _major() if major is None else major
    return arviz.InferenceData(**wrapped) if major == 0 else xarray.DataTree.from_dict(groups)


def _major() -> int:
    import arviz

    return int(arviz.__version__.split(".")[0])


def build_groups(model: Any, guide: Any, args: tuple, kwargs: Mapping[str, Any], options: Options) -> Groups:
    """Build all groups as Datasets: see :func:`to_arviz`."""
    _check_options(options)
    chains = _restarts(model, guide)
    attributes: dict[str, Any] = {
        "inference_library": "pyro_elbo",
        "inference_library_version": _version(),
        "sampling": "variational",
        "covariance": options.covariance,
    }
    parts: list[tuple[Draws, dict[str, tuple[Arrays, Plates]]]] = []
    owners: dict[int, int] = {}
    ks: list[float] = []
    for i, (p, q) in enumerate(chains):
        with _own_parameters(chains, i):
            if len(chains) > 1:
                _check_not_shared(q, args, kwargs, i, owners)
            rows = parts[0][0].rows if parts else None  # all chains speak of the same data
            drawn = draw(
                p,
                _drawn_from(p, q, args, kwargs, options),
                args,
                kwargs,
                options.num_samples,
                seed=options.seed + i,
                rows=rows,
                storage=options.storage,
            )
            if drawn.weights_error is None and options.num_samples >= MIN_DRAWS:
                ks.append(max(float(smoothed.pareto_k.max()) for smoothed in smooth(drawn)))
            parts.append(_chain(p, drawn, args, kwargs, options, options.seed + i, attributes))
    drawn, arrays = parts[-1][0], [part for _, part in parts]
    taken = {n for part in arrays for group, _ in part.values() for n in group}
    names = Names(taken, options.dims, drawn.times)
    shared = [g for g in arrays[0] if all(g in part for part in arrays)]
    if unknown := options.dims.keys() - names.taken:
        raise ArgumentError(f"dims: {sorted(unknown)} are not among the variables {sorted(names.taken)}.")
    groups = {
        group: stack_chains([part.pop(group) for part in arrays], names_in(group, names, drawn), options.storage)
        for group in shared
    }
    groups = mark_masked(groups, drawn)
    groups |= data_groups(drawn, chains[0][0], args, kwargs, names)
    groups = {name: ds.assign_attrs(attributes) for name, ds in groups.items() if ds.data_vars}
    stats: dict[str, Any] = {}
    if error := next((d.weights_error for d, _ in parts if d.weights_error), None):
        stats["weights_skipped"] = str(error)
        if isinstance(error, GuideError):
            stats["point_estimate"] = 1
    if ks:
        stats["pareto_k"] = ks if len(ks) > 1 else ks[0]  # a file gives back a list of one number as the number
    groups["sample_stats"] = groups["sample_stats"].assign_attrs(stats)
    groups = without_slashes(label(groups, options.coords, row_labels(drawn, chains[0][0], args, kwargs)))
    history = getattr(options.history, "history", options.history)
    return groups | ({"training": history} if history is not None else {})


def _check_options(options: Options) -> None:
    if options.resample is not None:
        check_choice("resample", options.resample, ("psis",), "None leaves the draws as they are.")
    check_choice("covariance", options.covariance, ("guide", "linear_response"))
    check_flag("predictive", options.predictive)
    check_flag("prior", options.prior)
    for what, given in (("coords", options.coords), ("dims", options.dims)):
        if not isinstance(given, Mapping) or not all(isinstance(x, Collection) for x in given.values()):
            raise ArgumentError(f"{what} must be a dictionary of lists by name, got {describe(given)}.")
    history = getattr(options.history, "history", options.history)
    if history is not None and not {"epoch", "split"} <= set(getattr(history, "dims", ())):
        raise ArgumentError(f"history must be the result of pe.fit, or its history, got {describe(options.history)}.")


def _drawn_from(model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any], options: Options) -> Program:
    """Return what draws come from: the guide, or the Gaussian of its linear response."""
    if options.covariance == "guide":
        return guide
    gaussian: Any = respond(ProgramCall(model, guide, args, kwargs), seed=options.seed).guide
    return gaussian


def _chain(
    model: Program,
    drawn: Draws,
    args: tuple,
    kwargs: Mapping[str, Any],
    options: Options,
    seed: int,
    attributes: dict[str, Any],
) -> tuple[Draws, dict[str, tuple[Arrays, Plates]]]:
    """Return the draws of one restart, resampled if asked for, and their groups."""
    if options.resample:
        drawn = resample(drawn, torch.Generator().manual_seed(seed))
        attributes["resampled"] = options.resample
    part = _posterior_groups(drawn)
    observed = drawn.observed.keys()
    if unsupported := drawn.latents.keys() - drawn.unconstrained.keys() - drawn.discrete:
        attributes["unconstrained_skipped"] = f"no transform to the real line is known for {sorted(unsupported)}"
    if options.predictive and observed:
        part |= _predictive_groups(model, args, kwargs, drawn, seed, attributes)
    if options.prior:
        part |= _prior_groups(model, args, kwargs, drawn, seed, attributes)
    return drawn, part


def _restarts(model: Any, guide: Any) -> list[tuple[Program, Program]]:
    """Pair models and guides, one pair per chain."""
    guides = list(guide) if isinstance(guide, list | tuple) else [guide]
    models = list(model) if isinstance(model, list | tuple) else [model] * len(guides)
    if len(models) != len(guides):
        raise ArgumentError(f"expected as many models as guides, got {len(models)} and {len(guides)}.")
    if len(guides) > 1 and not all(isinstance(g, PyroModule) for g in guides):
        raise ArgumentError(
            "several guides as chains must be modules with parameters of their own (AutoGuides or PyroModules): "
            "functions share Pyro's parameter store."
        )
    return list(zip(models, guides, strict=True))


@contextmanager
def _own_parameters(chains: list[tuple[Program, Program]], index: int) -> Iterator[None]:
    """Let the modules of one of several chains use their own parameters.

    Pyro's store gives all modules that ask for a name the same tensor. Modules made under ``module_local_params`` have
    a store each. The names of other modules are taken out of the store, and the modules register themselves again.
    """
    modules = [m for pair in chains for m in pair if isinstance(m, PyroModule)]
    if len(chains) == 1:
        yield
    elif all(hasattr(m._pyro_context, "param_state") for m in chains[index] if isinstance(m, PyroModule)):
        with pyro.settings.context(module_local_params=True):
            yield
    else:
        store = pyro.get_param_store()
        paths = [f"{m._pyro_name}.{n}".strip(".") for m in modules for n, _ in m.named_parameters()]
        names = {path.removesuffix("_unconstrained") for path in paths}
        state: Any = {part: {n: x for n, x in d.items() if n not in names} for part, d in store.get_state().items()}
        with pyro.settings.context(module_local_params=False), store.scope(state):
            yield


def _check_not_shared(
    guide: Program, args: tuple, kwargs: Mapping[str, Any], index: int, owners: dict[int, int]
) -> None:
    """Refuse a guide that reads a parameter of a previous one: they are one restart, not two."""
    check_initialized(guide)
    with torch.no_grad(), seeded(0), evaluating(guide), collect_parameters() as used:
        guide(*args, **kwargs)
    for p in [*used.values(), *(guide.parameters() if isinstance(guide, nn.Module) else ())]:
        if owners.setdefault(id(p), index) != index:
            raise ArgumentError(
                f"guides {owners[id(p)]} and {index} share their parameters, so they are one restart, not two. Make "
                "and fit each guide under pyro.settings.context(module_local_params=True), or clear the parameter "
                "store before each fit."
            )


def _posterior_groups(drawn: Draws) -> dict[str, tuple[Arrays, Plates]]:
    stats: Arrays = {"lp": drawn.log_p, "lp_approx": drawn.log_q}
    stats["log_weight"] = torch.zeros_like(drawn.log_weight) if drawn.resampled else drawn.log_weight
    plates = dict(drawn.plates)
    if drawn.local_log_p is not None and drawn.local_log_q is not None and drawn.data_plate is not None:
        pairs = zip(drawn.local_log_p, drawn.local_log_q, strict=True)
        weights = ((torch.zeros_like(p) if drawn.resampled else p - q)[None] for p, q in pairs)
        stats["log_weight_local"] = drawn.storage.join(weights, len(drawn.log_p))
        plates["log_weight_local"] = (drawn.data_plate,)
    return {
        "posterior": (drawn.latents | drawn.deterministics, plates),
        "unconstrained_posterior": (drawn.unconstrained, plates),
        "sample_stats": (stats, plates),
        "log_likelihood": ({n: drawn.log_likelihood[n] for n in drawn.observed}, plates),
        "log_prior": (drawn.log_prior, plates),
    }


def _prior_groups(
    model: Program, args: tuple, kwargs: Mapping[str, Any], drawn: Draws, seed: int, attributes: dict[str, Any]
) -> dict[str, tuple[Arrays, Plates]]:
    try:
        found = predict(model, args, kwargs, drawn, seed, prior=True)
    except Exception as error:  # the program ran with draws from the guide: its prior is flat, or overflows
        attributes["prior_skipped"] = f"the prior cannot be sampled ({first_line(error)})"
        return {}
    _note_skipped(found, "prior_predictive", attributes)
    return {
        "prior": ({n: x for n, x in found.arrays.items() if n not in drawn.observed}, found.plates),
        "prior_predictive": ({n: x for n, x in found.arrays.items() if n in drawn.observed}, found.plates),
    }


def _predictive_groups(
    model: Program, args: tuple, kwargs: Mapping[str, Any], drawn: Draws, seed: int, attributes: dict[str, Any]
) -> dict[str, tuple[Arrays, Plates]]:
    try:
        found = predict(model, args, kwargs, drawn, seed)
    except Exception as error:  # the program ran with its data: it cannot run with draws in their place
        attributes["posterior_predictive_skipped"] = f"no predictive draws ({first_line(error)})"
        return {}
    _note_skipped(found, "posterior_predictive", attributes)
    return {"posterior_predictive": ({n: x for n, x in found.arrays.items() if n in drawn.observed}, found.plates)}


def _note_skipped(found: Predictions, group: str, attributes: dict[str, Any]) -> None:
    if found.skipped:
        attributes[f"{group}_skipped"] = "; ".join(f"'{n}' cannot be sampled ({e})" for n, e in found.skipped.items())


def _version() -> str:
    """Return the version of the installed package, or that of a checkout that is not installed."""
    try:
        return version("pyro-elbo")
    except PackageNotFoundError:
        return sys.modules["pyro_elbo"].__version__
