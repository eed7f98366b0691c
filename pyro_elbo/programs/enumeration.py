"""Give discrete sites that are marked for enumeration all their values at once.

A marked site has one value per element of its support, along a batch dimension of its own, left of all plates. Pyro
recycles these dimensions inside ``pyro.markov``, so a dimension alone does not name a variable: the messages also
record an identifier of the variable behind each dimension.

A site of the guide that is marked ``"sequential"`` has one value at a time instead: the programs run once per value,
each time as a :class:`Branch`.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine import Trace, infer_config
from pyro.poutine.enum_messenger import EnumMessenger, enumerate_site
from pyro.poutine.markov_messenger import MarkovMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from pyro_elbo.errors import SiteError, first_sentence
from pyro_elbo.programs.checks import check_entries
from pyro_elbo.programs.sites import Turn
from pyro_elbo.sequences import SUMS_PATHS, is_subsample

ROOM_FOR_PLATES = 6
"""Batch dimensions left for plates where nobody gave their number: a dimension of size one costs next to nothing."""


T = TypeVar("T")
TURN = "_turn"
"""Where a message keeps the turn of its value."""
_VALUES = "_values"
FORGOTTEN = "_forgotten"
"""Where a message keeps the sites just outside of the history of its loops, and how many steps back they lie."""
FURTHER = 2
"""The steps beyond the history of a loop in which sites keep a dimension of their own, for an error to name them."""


class Enumerator(EnumMessenger):
    """Enumerates the sites marked ``infer={"enumerate": "parallel"}``; does nothing before the first of them.

    In a guide, sites marked ``"sequential"`` take the value whose turn it is in the :class:`Branch` around; the last
    one without a branch.

    Args:
        leftmost: the first dimension left of all plates.
        before: the handler of the program that ran before, whose dimensions stay taken; None for the first program.
        given: the sites whose values come from elsewhere.
        is_guide: whether the program is a guide.

    Attributes:
        active: whether a marked site was met.
        shapes: the shape of the values of each site that has all of them at once.
    """

    def __init__(
        self,
        leftmost: int,
        before: "Enumerator | None" = None,
        given: Collection[str] = (),
        is_guide: bool = False,
    ) -> None:
        super().__init__(leftmost if before is None else None)
        self.leftmost, self.given, self.is_guide = leftmost, given, is_guide
        self.active = before is not None and before.active
        self.shapes: dict[str, torch.Size] = {} if before is None else dict(before.shapes)

    def _pyro_sample(self, msg: Any) -> None:
        if not isinstance(msg["fn"], TorchDistributionMixin):
            return
        infer, given = msg["infer"], msg["done"] or msg["name"] in self.given
        if self.is_guide and infer.get("enumerate") == "sequential" and not given and not msg["is_observed"]:
            _check_support(msg)
            infer[_VALUES] = list(enumerate_site(msg))
            _take(msg, len(infer[_VALUES]) - 1)
        marked = infer.get("enumerate") == "parallel" and not given and not msg["is_observed"]
        self.active = self.active or marked
        marked = marked and "_enumerate_before" not in infer  # the scan that states the site has enumerated it
        if not self.active:
            if "_markov_depth" in infer:  # a later site may look it up
                self._markov_depths[msg["name"]], self._value_dims[msg["name"]] = infer["_markov_depth"], {}
            return
        self._check_room(msg)
        check_entries(msg["name"], msg["fn"].batch_shape, list(self.shapes))
        forgotten = self._keep_apart(infer)
        if marked:
            _check_support(msg)
            infer[SUMS_PATHS] = True
            self._enumerate(msg)
            msg["infer"][FORGOTTEN] = forgotten
            return
        # Pyro skips sites that have their value; here their dimensions are recorded like those of others.
        done, msg["done"], msg["infer"] = msg["done"], False, infer | {"enumerate": None}
        super()._pyro_sample(msg)
        msg["done"], msg["infer"] = done, infer | {FORGOTTEN: forgotten}

    def _enumerate(self, msg: Any) -> None:
        try:
            super()._pyro_sample(msg)
        except NotImplementedError as error:
            raise SiteError(
                f"Site '{msg['name']}': its {type(msg['fn']).__name__} has another support in each row, or for each "
                f"value of another site: {first_sentence(error)} Write it as a Categorical over the largest support, "
                "with logits of -inf for the values that a row does not have."
            ) from error
        self.shapes[msg["name"]] = msg["value"].shape

    def _keep_apart(self, infer: Any) -> dict[str, int]:
        """Let a site use no dimension of sites that ``pyro.markov`` has just forgotten; return how far back they lie.

        Pyro would use these dimensions again at once, and a density that depends on such a site would be wrong.
        """
        if (scope := infer.get("_markov_scope")) is None:
            return {}
        loops = [h for h in _PYRO_STACK if isinstance(h, MarkovMessenger)]
        lags = ((h, lag) for h in loops for lag in range(min(h.history + FURTHER, h._pos), h.history, -1))
        back = {n: lag for h, lag in lags for n in h._stack[h._pos - lag] if n not in scope and n in self.shapes}
        infer["_markov_scope"] = Counter({n: self._markov_depths[n] for n in back}) | scope
        return back

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.active:
            super()._pyro_post_sample(msg)

    def _check_room(self, msg: Any) -> None:
        deepest = max((-f.dim for f in msg["cond_indep_stack"] if f.dim is not None), default=0)
        if deepest >= -self.leftmost:
            raise SiteError(
                f"Site '{msg['name']}': its plates use {deepest} batch dimensions, and enumerated sites start left of "
                f"{-self.leftmost - 1}. Give the objective max_plate_nesting={deepest}."
            )


def _take(msg: Any, index: int) -> None:
    values = msg["infer"][_VALUES]
    msg["infer"][TURN] = Turn(index, len(values))
    msg["value"], msg["done"] = values[index], True


class HeldDraws(Messenger):
    """Give sites these values, as draws and not as observations."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._values and not msg["done"] and not msg["is_observed"]:
            msg["value"], msg["done"] = self._values[msg["name"]], True


class Branch(HeldDraws):
    """One run of the programs for one value of each sequential site that its guide comes upon.

    Args:
        values: the draws that this branch shares with the one that it left.
        turns: the number of the value of each site up to where it left.

    Attributes:
        others: the branches that leave this one.
    """

    def __init__(self, values: Mapping[str, Tensor] | None = None, turns: Mapping[str, int] | None = None) -> None:
        super().__init__(values or {})
        self.turns = dict(turns or {})
        self.others: list[Branch] = []
        self._drawn: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        turn, name = msg["infer"].get(TURN), msg["name"]
        if turn is None:
            super()._pyro_sample(msg)
            return
        if name not in self.turns:
            others = ({**self.turns, name: i} for i in range(turn.index))
            self.others += [Branch(dict(self._drawn), turns) for turns in others]
        _take(msg, self.turns.setdefault(name, turn.index))

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not is_subsample(msg):
            self._drawn[msg["name"]] = msg["value"]


def each_branch(run: Callable[[], T]) -> list[T]:
    """Run programs once per value of the sites that a guide marks ``"sequential"``, the last value first as in Pyro."""
    pending, found = [Branch()], []
    while pending:
        branch = pending.pop()
        with branch:
            found.append(run())
        pending += branch.others
    return found


def without_marks(guide: Callable[..., Any]) -> Callable[..., Any]:
    """Return a guide that draws the sites that it marks for enumeration."""
    unmarked: Any = {"enumerate": None}
    return infer_config(guide, lambda msg: unmarked)


def _check_support(msg: Any) -> None:
    """Raise SiteError where a marked site cannot be enumerated."""
    name, fn, infer = msg["name"], msg["fn"], msg["infer"]
    if infer.get("num_samples") is not None:
        raise SiteError(
            f"Site '{name}' asks for num_samples={infer['num_samples']} values in place of its support (tensor Monte "
            "Carlo), which objectives here do not do. Leave out num_samples, or use num_particles."
        )
    if not fn.has_enumerate_support:
        raise SiteError(
            f"Site '{name}' is marked for enumeration, but {type(fn).__name__} has no finite support. Remove the mark, "
            "and draw the site in the guide."
        )


def separate_dimensions(trace: Trace) -> Trace:
    """Copy a guide's trace for a replay, which would add the dimensions of the model to the guide's own records."""
    copied = trace.copy()
    nodes: Any = copied.nodes
    for name, message in nodes.items():
        if message["type"] == "sample":
            infer = dict(message["infer"])
            infer["_dim_to_id"] = dict(infer.get("_dim_to_id", {}))
            nodes[name] = message | {"infer": infer}
    return copied


def enumerated_variables(*traces: Any) -> dict[int, tuple[str, int]]:
    """Return name and number of values of each enumerated variable, by its identifier."""
    found = {}
    for trace in traces:
        nodes: dict[str, Any] = dict(trace.nodes)
        for name, message in nodes.items():
            dim = message["infer"].get("_enumerate_dim") if message["type"] == "sample" else None
            if dim is None:
                continue
            size, ids = message["value"].shape[dim - len(message["fn"].event_shape)], message["infer"]["_dim_to_id"]
            found[ids[dim]] = name, size
            if (before := message["infer"].get("_enumerate_before")) is not None:
                found[ids[before]] = step_before(name), size
    return found


def step_before(name: str) -> str:
    """Return the name of a state of a scan at the step before."""
    return f"{name} before"
