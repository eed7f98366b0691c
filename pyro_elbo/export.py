"""Draws -> ArviZ: InferenceData on ArviZ 0.x, xarray.DataTree from 1 on. One builder makes the groups of both."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import pyro
import torch
from torch import Tensor, nn

from pyro_elbo.draws import Arrays, Draws, draw, predict
from pyro_elbo.errors import ArgumentError
from pyro_elbo.sites import Plate, Program

if TYPE_CHECKING:
    import xarray

Groups = dict[str, "xarray.Dataset"]
Plates = Mapping[str, tuple[Plate, ...]]

SAMPLE_DIMS = ("chain", "draw")


def to_arviz(
    model: Program | Sequence[Program],
    guide: Program | Sequence[Program],
    *args: Any,
    num_samples: int = 1000,
    resample: Literal["psis"] | None = None,
    predictive: bool = True,
    prior: bool = True,
    history: "xarray.Dataset | None" = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> Any:
    r"""Export a fitted posterior, with what its diagnostics need, to ArviZ.

    Groups: ``posterior`` (latents and deterministics), ``unconstrained_posterior``, ``sample_stats`` (``lp``,
    ``lp_approx``, ``log_weight``, and ``log_weight_local`` per row where all latents are local), ``log_likelihood``,
    ``log_prior``, ``posterior_predictive``, ``prior``, ``prior_predictive``, ``observed_data``, ``constant_data`` and
    ``training``. Dimensions are ``chain``, ``draw``, the plates' names, and ``<site>_dim_0`` ... for events.

    Args:
        model, guide: the programs, or lists of them: several restarts, which become chains. Give every restart its own
            guide, a module with its own parameters; those are used, whatever Pyro's store holds under their names.
        args, kwargs: arguments of both programs.
        num_samples: draws per chain.
        resample: ``"psis"`` draws again in proportion to the Pareto-smoothed importance weights.
        predictive, prior: whether to add the groups of predictive and of prior draws. Flat priors cannot be sampled;
            the prior is then left out and ``posterior.attrs["prior_skipped"]`` says why.
        history: ``FitResult.history``.
        coords: labels of dimensions.
        seed: of all draws.

    Returns:
        ``arviz.InferenceData`` on ArviZ 0.x, ``xarray.DataTree`` on ArviZ 1 and later; densities in nats.

    Raises:
        ArgumentError: lists of different length, or guides that share their parameters.
        GuideError: a guide that has never run, or ``resample`` with a point estimate.

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
    groups = build_groups(
        model, guide, args, kwargs, num_samples, resample, predictive, prior, history, coords or {}, seed
    )
    return to_container(groups)


def to_container(groups: Groups, major: int | None = None) -> Any:
    """Wrap groups for ArviZ's major version (the installed one by default)."""
    import arviz
    import xarray

    major = int(arviz.__version__.split(".")[0]) if major is None else major
    wrapped: dict[str, Any] = dict(groups)
    return arviz.InferenceData(**wrapped) if major == 0 else xarray.DataTree.from_dict(groups)


def build_groups(
    model: Program | Sequence[Program],
    guide: Program | Sequence[Program],
    args: tuple,
    kwargs: Mapping[str, Any],
    num_samples: int,
    resample: Literal["psis"] | None,
    predictive: bool,
    prior: bool,
    history: "xarray.Dataset | None",
    coords: Mapping[str, Sequence[Any]],
    seed: int,
) -> Groups:
    """Make all groups as Datasets: see :func:`to_arviz`."""
    if resample not in (None, "psis"):
        raise ArgumentError(f"resample must be None or 'psis', got {resample!r}.")
    chains = _restarts(model, guide)
    attributes: dict[str, Any] = {"inference_library": "pyro_elbo", "sampling": "variational"}
    parts: list[dict[str, tuple[Arrays, Plates]]] = []
    for i, (p, q) in enumerate(chains):
        with _own_parameters(chains):
            drawn = draw(p, q, args, kwargs, num_samples, seed=seed + i)
            if resample:
                drawn = drawn.resample(torch.Generator().manual_seed(seed + i))
            part = _posterior_groups(drawn)
            names = drawn.observed.keys()
            if predictive and names:
                arrays, plates = predict(p, args, kwargs, drawn, num_samples, seed + i)
                part["posterior_predictive"] = ({n: arrays[n] for n in names}, plates)
            if prior:
                part |= _prior_groups(p, args, kwargs, names, num_samples, seed + i, attributes)
            parts.append(part)
    taken = {n for part in parts for arrays, _ in part.values() for n in arrays}
    groups = {name: _stack_chains([part[name] for part in parts], taken) for name in parts[0]}
    groups |= _data_groups(drawn, chains[0][0], args, kwargs, taken)
    groups = {name: _labelled(ds, coords, attributes) for name, ds in groups.items() if ds.data_vars}
    return groups | ({"training": history} if history is not None else {})


def _own_parameters(chains: list[tuple[Program, Program]]) -> AbstractContextManager:
    """Run a restart with its own parameters: Pyro's store keeps one value per name, that of the last restart."""
    if len(chains) == 1:
        return nullcontext()
    owned = {id(x) for pair in chains for m in pair if isinstance(m, nn.Module) for x in m.parameters()}
    store = pyro.get_param_store()
    state = store.get_state()
    kept = {name: x for name, x in state["params"].items() if id(x) not in owned}
    return store.scope({"params": kept, "constraints": {name: state["constraints"][name] for name in kept}})


def _restarts(model: Any, guide: Any) -> list[tuple[Program, Program]]:
    """Pair models and guides, one pair per chain."""
    guides = list(guide) if isinstance(guide, list | tuple) else [guide]
    models = list(model) if isinstance(model, list | tuple) else [model] * len(guides)
    if len(models) != len(guides):
        raise ArgumentError(f"expected as many models as guides, got {len(models)} and {len(guides)}.")
    seen: dict[int, int] = {}
    for i, g in enumerate(guides):
        for p in g.parameters() if isinstance(g, nn.Module) else ():
            if seen.setdefault(id(p), i) != i:
                raise ArgumentError(
                    f"guides {seen[id(p)]} and {i} share their parameters, so they are one restart, not two. Fit each "
                    "with its own guide, after pyro.clear_param_store()."
                )
    if len(guides) > 1 and not all(isinstance(g, nn.Module) for g in guides):
        raise ArgumentError(
            "several guides as chains must be modules with parameters of their own (AutoGuides or PyroModules): "
            "functions share Pyro's parameter store."
        )
    return list(zip(models, guides, strict=True))


def _posterior_groups(drawn: Draws) -> dict[str, tuple[Arrays, Plates]]:
    stats: Arrays = {"lp": drawn.log_p, "lp_approx": drawn.log_q, "log_weight": drawn.log_weight}
    if drawn.resampled:
        stats["log_weight"] = torch.zeros_like(drawn.log_weight)
    plates = dict(drawn.plates)
    if drawn.local_log_weight is not None and drawn.data_plate is not None:
        local = drawn.local_log_weight
        stats["log_weight_local"] = torch.zeros_like(local) if drawn.resampled else local
        plates["log_weight_local"] = (drawn.data_plate,)
    return {
        "posterior": (drawn.latents | drawn.deterministics, plates),
        "unconstrained_posterior": (drawn.unconstrained, plates),
        "sample_stats": (stats, plates),
        "log_likelihood": ({n: drawn.log_likelihood[n] for n in drawn.observed}, plates),
        "log_prior": (drawn.log_prior, plates),
    }


def _prior_groups(
    model: Program,
    args: tuple,
    kwargs: Mapping[str, Any],
    observed: Iterable[str],
    num_samples: int,
    seed: int,
    attributes: dict[str, Any],
) -> dict[str, tuple[Arrays, Plates]]:
    try:
        arrays, plates = predict(model, args, kwargs, None, num_samples, seed)
    except NotImplementedError as error:
        attributes["prior_skipped"] = f"a prior cannot be sampled ({error or 'improper'})"
        return {}
    names = set(observed)
    return {
        "prior": ({n: x for n, x in arrays.items() if n not in names}, plates),
        "prior_predictive": ({n: x for n, x in arrays.items() if n in names}, plates),
    }


def _stack_chains(parts: list[tuple[Arrays, Plates]], taken: set[str]) -> "xarray.Dataset":
    import xarray

    variables = {}
    for name in parts[0][0]:
        values = torch.stack([arrays[name] for arrays, _ in parts])
        variables[name] = (
            SAMPLE_DIMS + _dims(name, values.shape[2:], parts[0][1].get(name, ()), taken),
            _numpy(values),
        )
    return xarray.Dataset(variables)


def _dims(name: str, shape: Sequence[int], plates: tuple[Plate, ...], taken: set[str]) -> tuple[str, ...]:
    """Name dimensions after the plates, then ``<site>_dim_i``.

    A deterministic may count its plates as event: then the plates' sizes, from the right, tell them apart. A dimension
    named like a variable would swallow it: it gets the suffix ``_dim``.
    """
    plates = (
        plates if all(p.size == n for p, n in zip(plates, shape, strict=False)) and len(plates) <= len(shape) else ()
    )
    named = tuple(f"{p.name}_dim" if p.name in taken else p.name for p in plates)
    return named + tuple(f"{name}_dim_{i}" for i in range(len(shape) - len(named)))


def _data_groups(drawn: Draws, model: Program, args: tuple, kwargs: Mapping[str, Any], taken: set[str]) -> Groups:
    import xarray

    observed = {n: (_dims(n, x.shape, drawn.plates[n], taken), _numpy(x)) for n, x in drawn.observed.items()}
    plates = {p.size: p for stack in drawn.plates.values() for p in stack}
    constants = {}
    for name, x in _tensors(model, args, kwargs).items():
        if any(x.shape == o.shape and torch.equal(x.nan_to_num(), o.nan_to_num()) for o in drawn.observed.values()):
            continue
        stack = (plates[x.shape[0]],) if x.dim() and x.shape[0] in plates else ()
        constants[name] = (_dims(name, x.shape, stack, taken | {name}), _numpy(x))
    return {"observed_data": xarray.Dataset(observed), "constant_data": xarray.Dataset(constants)}


def _tensors(model: Program, args: tuple, kwargs: Mapping[str, Any]) -> Arrays:
    """The model's tensor arguments by the names of its signature."""
    signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    bound = signature.bind(*args, **kwargs).arguments
    return {name: x for name, x in bound.items() if isinstance(x, Tensor)}


def _labelled(
    ds: "xarray.Dataset", coords: Mapping[str, Sequence[Any]], attributes: Mapping[str, Any]
) -> "xarray.Dataset":
    labels = {name: list(values) for name, values in coords.items() if name in ds.dims}
    counted = {name: range(size) for name, size in ds.sizes.items() if name not in labels}
    return ds.assign_coords(counted | labels).assign_attrs(attributes)


def _numpy(x: Tensor) -> Any:
    return x.detach().cpu().numpy()
