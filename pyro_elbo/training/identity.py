"""What a resumed run must share with the first one, by name: settings as text, which a checkpoint can hold."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pyro_elbo.information import Penalty
from pyro_elbo.objectives import TraceBeta_ELBO
from pyro_elbo.schedules import Schedule
from pyro_elbo.training.rows import checksum


def objective_identity(loss: TraceBeta_ELBO) -> dict[str, str]:
    """Return the class and the settings of an objective, and the public attributes that a subclass adds.

    Example:
        >>> objective_identity(TraceBeta_ELBO(beta=4.0))["loss.beta"]
        '4'
    """
    own = {n: x for n, x in vars(loss).items() if not n.startswith("_") and n not in vars(TraceBeta_ELBO())}
    settings = {f"loss.{name}": described(x) for name, x in (own | loss.settings).items()}
    return {"loss": type(loss).__qualname__} | settings


def optimizer_identity(optimizer: torch.optim.Optimizer) -> str:
    """Return the class of an optimizer that has taken no step, and the options of its groups of parameters."""
    groups = [described({n: x for n, x in group.items() if n != "params"}) for group in optimizer.param_groups]
    return f"{type(optimizer).__qualname__}({', '.join(dict.fromkeys(groups))})"


def described(x: Any) -> str:
    """Return a setting as text that is equal for equal settings.

    Numbers, strings and containers are described by their values, large tensors by a checksum, schedules, penalties
    and dataclasses by their class and attributes, anything else, such as a function or a module, by its type.

    Example:
        >>> from pyro_elbo.schedules import LinearWarmup
        >>> described({"z": LinearWarmup(0.0, 1.0, steps=100), "w": abs})
        "{'z': LinearWarmup(start=0, end=1, steps=100), 'w': builtin_function_or_method}"
    """
    if x is None or isinstance(x, bool | str):
        return repr(x)
    if isinstance(x, Tensor):
        return described(x.item()) if x.numel() == 1 else f"tensor of shape {tuple(x.shape)} with {checksum(x)}"
    if isinstance(x, Real):
        number = float(x)
        return str(int(number)) if number.is_integer() else repr(number)
    if isinstance(x, Mapping):
        return f"{{{', '.join(f'{name!r}: {described(part)}' for name, part in x.items())}}}"
    if isinstance(x, tuple | list):
        return f"[{', '.join(map(described, x))}]"
    kind = type(x).__qualname__
    if is_dataclass(x) and not isinstance(x, type):
        parts = {f.name: getattr(x, f.name) for f in fields(x)}
    elif isinstance(x, Schedule | Penalty):
        parts = getattr(x, "__dict__", {})
    else:
        return kind
    return f"{kind}({', '.join(f'{n}={described(part)}' for n, part in parts.items() if not n.startswith('_'))})"
