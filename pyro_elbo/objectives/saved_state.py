"""What an exact continuation needs beside parameters and optimizer, read back with care."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_elbo.errors import CheckpointError, check_count, describe, first_sentence
from pyro_elbo.information import Critic

PARTS = {"step", "critics", "averages"}


def read_state(state: Mapping[str, Any]) -> tuple[int, dict[str, Critic], dict[str, Tensor]]:
    """Return the step, the critics and the averages of baselines of a saved objective.

    Raises:
        CheckpointError: it is not the state of an objective.
    """
    if not isinstance(state, Mapping) or not {"step"} <= state.keys() <= PARTS:
        raise CheckpointError(
            f"state must be what state_dict() of an objective returned, with a step and nothing but {sorted(PARTS)}, "
            f"got {describe(state)}."
        )
    try:
        check_count("step", state["step"], least=0)
        critics = {n: Critic.restored(critic) for n, critic in state.get("critics", {}).items()}
        averages = {n: torch.clone(x) for n, x in state.get("averages", {}).items()}
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"state cannot be restored: {first_sentence(error)} Give what state_dict() of an objective returned."
        ) from error
    return int(state["step"]), critics, averages
