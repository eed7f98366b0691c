"""What training covers: parameters, modules and objective of two programs, found by running both once."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from pyro_elbo.diagnosis import MAX_ROWS, Call, Probe, ProbeData, are_local, cost_in_steps
from pyro_elbo.errors import ArgumentError, DataError, GuideError, NonFiniteError, first_sentence
from pyro_elbo.objectives import TermsModule, TraceBeta_ELBO
from pyro_elbo.programs import Plate, collect_modules, collect_parameters, seeded
from pyro_elbo.schedules import Capacity
from pyro_elbo.terms import Term, Terms
from pyro_elbo.training.data import Loaders, RunArguments, arguments
from pyro_elbo.training.rows import num_rows


class Trained(nn.Module):
    """The parameters and modules that training, checkpoints and saved results cover.

    Attributes:
        module: model, guide and objective.
        store: the parameters that only Pyro's store holds.
        used: the modules that the programs use, besides programs that are modules.
        by_name: the parameters to train, by name.
    """

    def __init__(
        self,
        module: TermsModule,
        store: Mapping[str, nn.Parameter],
        used: Sequence[nn.Module],
        by_name: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.module = module
        # the prefix "@" separates names such as "values" from the methods of the dictionary
        self.store = nn.ParameterDict({f"@{name.replace('.', '|')}": p for name, p in store.items()})
        self.used = nn.ModuleList(used)
        self.by_name = by_name


def first_run(module: TermsModule, args: tuple, kwargs: dict[str, Any]) -> tuple[Trained, Terms]:
    """Run both programs once to create lazy parameters; return what training covers, and the terms.

    Replace the tensors in Pyro's store by nn.Parameters, so that optimizer, checkpoint and DDP share them with Pyro.

    Raises:
        GuideError: the parameter store already holds parameters of another program of the same name.
    """
    with torch.no_grad():
        displaced = _displaced_parameters(module, args, kwargs)
        with collect_parameters() as names, collect_modules(module.model, module.guide) as found:
            terms = module.terms(*args, **kwargs)
    inside = {id(part) for whole in (module, *_critics(module.elbo)) for part in whole.modules()}
    used = [part for part in found if id(part) not in inside]
    owned = {id(p) for part in module.children() for p in part.parameters()}
    _check_not_adopted([name for name, p in displaced.items() if id(p) not in owned])
    owned |= {id(p) for part in used for p in part.parameters()}
    loose = {name: _as_parameter(p) for name, p in names.items() if name not in displaced and id(p) not in owned}
    store = pyro.get_param_store()
    state = store.get_state()
    state["params"].update(displaced | loose)  # the store follows what is trained now
    store.set_state(state)
    by_id: dict[int, tuple[str, Tensor]] = {}
    for name, p in (*(names | displaced | loose).items(), *module.named_parameters()):
        by_id.setdefault(id(p), (name, p))
    return Trained(module, loose, used, dict(by_id.values())), terms


def _critics(loss: TraceBeta_ELBO) -> list[nn.Module]:
    return [critic.network for critic in loss.critics.values()]


def _as_parameter(p: Tensor) -> nn.Parameter:
    return p if isinstance(p, nn.Parameter) else nn.Parameter(p.detach())


def _check_not_adopted(names: list[str]) -> None:
    if names:
        raise GuideError(
            f"The parameter store already holds {names}, made by another program of the same name, and would "
            "train those instead. Call pyro.clear_param_store() and make the programs anew, or keep parameters of "
            "PyroModules apart with pyro.settings.set(module_local_params=True)."
        )


def _displaced_parameters(module: TermsModule, args: tuple, kwargs: dict[str, Any]) -> dict[str, nn.Parameter]:
    """Return the parameters of the programs' modules whose names in the store belong to other modules.

    Pyro would silently use those of the store. A run with an empty store shows the programs' own parameters.
    """
    store = pyro.get_param_store()
    known = dict(store.named_parameters())
    if not known:
        return {}
    with store.scope():
        module.terms(*args, **kwargs)
        own = {name: p for name, p in store.named_parameters() if isinstance(p, nn.Parameter)}
    return {name: p for name, p in own.items() if name in known and known[name] is not p}


def checked_minibatches(module: TermsModule, terms: Terms, batches: int, loaders: Loaders) -> Loaders:
    """Refuse minibatches that would count the term of a global site once per batch, and wrong full sizes.

    A model that does not declare the full size gets the validation data as one batch, which counts its global terms
    once.
    """
    plate = terms.data_plate
    if plate is not None and _is_subsampled(terms):
        if plate.full_size not in (rows := loaders.row_counts()):
            raise DataError(
                f"Plate '{plate.name}' declares {plate.full_size} rows, the training data have {rows[0]}. Give the "
                "plate the size of the training data."
            )
        return loaders
    shared = [name for name, term in terms.sites.items() if _is_shared(term, plate)]
    if shared and batches > 1:
        name, rows = plate.name if plate else "data", loaders.row_counts()[0]
        raise DataError(
            f"Site '{shared[0]}' is shared by all data, but the model does not know that it sees {batches} minibatches "
            f"of {rows} rows: its term would count {batches} times. Declare the full size, pyro.plate('{name}', "
            f"{rows}, subsample_size=len(x)), in model and guide, or pass batch_size=None and devices=1."
        )
    if shared and len(loaders("valid")) > 1:
        args, kwargs = arguments(next(iter(loaders("valid"))))
        with torch.no_grad():
            declared = _is_subsampled(module.terms(*args, **kwargs))
        return loaders if declared else loaders.with_whole_validation()
    return loaders


def check_validation(module: TermsModule, first: Mapping[str, list[Any]], seed: int) -> None:
    """Run the programs on validation rows whose shape differs from those of training, long before an epoch ends.

    Sequences of other lengths are fine.

    Raises:
        DataError: the programs fail on them.
    """
    train, valid = (_row_shapes(first[split][0]) for split in ("train", "valid" if "valid" in first else "train"))
    if train == valid:
        return
    args, kwargs = arguments(first["valid"][0])
    try:
        with torch.no_grad(), seeded(seed):
            module.terms(*args, **kwargs)
    except NonFiniteError:
        raise
    except Exception as error:  # programs fail in many ways
        raise DataError(
            f"valid: the programs fail on rows of shape {_brief(valid)}, where train has {_brief(train)}: "
            f"{first_sentence(error)} Give both splits the same columns."
        ) from error


def _row_shapes(batch: Any) -> list[tuple[int, ...]]:
    return [tuple(x.shape[1:]) for x in pytree.tree_leaves(arguments(batch)) if isinstance(x, Tensor)]


def _brief(shapes: list[tuple[int, ...]]) -> str:
    return " and ".join(map(str, shapes))


def check_position(loaders: Loaders, processes: int, is_auto: bool) -> None:
    """Raise ArgumentError where a run cannot go on within an epoch."""
    if is_auto:
        raise ArgumentError("save_every: lr='auto' continues at the end of an epoch. Leave save_every out.")
    if processes > 1 and isinstance(loaders.train, DataLoader):
        raise ArgumentError(
            "save_every: processes cannot share a DataLoader and continue within it. Pass tensors, arrays or a Dataset."
        )


def needs_all_rows(loss: TraceBeta_ELBO, terms: Terms) -> bool:
    """Return whether a step compares the rows of all processes: penalties, free bits, capacities, averages."""
    capacity = any(isinstance(schedule, Capacity) for schedule in loss.weighting.schedules)
    return capacity or bool(loss.penalties or loss.weighting.free_bits or terms.averages)


def _is_subsampled(terms: Terms) -> bool:
    plate = terms.data_plate
    return plate is not None and plate.full_size != plate.size


def _is_shared(term: Term, data: Plate | None) -> bool:
    """Return True for the term of a site that is not repeated for every datum."""
    return term.is_kl if data is None else data not in term.plates


def make_probe(trained: Trained, terms: Terms, first: Mapping[str, list[Any]], seed: int) -> Probe:
    """Return the probe of a fit: of the first batches, or of a part of their rows where a row stands for itself.

    Args:
        trained: the programs and their parameters.
        terms: the terms of the first training batch.
        first: the first batches of each split.
        seed: the seed of the fit.
    """
    plate = terms.data_plate
    local = are_local(terms) and plate is not None and plate.size == num_rows(first["train"][0])

    def rows(batch: Any) -> Call:
        given = RunArguments(*arguments(batch), num_rows(batch), False)
        if not local or given.rows <= MAX_ROWS:
            return given.args, given.kwargs
        return given.spread(MAX_ROWS)

    batch, *more = first["train"]
    other = more[0] if more and num_rows(more[0]) == num_rows(batch) else batch
    valid = rows(first["valid"][0]) if "valid" in first else None
    module = trained.module
    data = ProbeData((rows(batch), rows(other)), valid)
    train, others = (0 if x is None else num_rows((*x[0], *x[1].values())) for x in (data.train[0], valid))
    cost = cost_in_steps(num_rows(batch), train, others, module.elbo.num_particles)
    return Probe(module.model, module.guide, module.elbo, list(trained.by_name.values()), data, seed, cost)
