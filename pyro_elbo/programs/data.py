"""Convert arrays and data frames to tensors, and match data with the arguments of programs."""

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_elbo.errors import DataError


def as_tensors(data: Any) -> Any:
    """Convert NumPy arrays, pandas Series and DataFrames inside ``data`` to tensors, and NumPy scalars to numbers.

    Floating-point arrays get torch's default dtype; integers and booleans keep theirs. A DataFrame becomes a matrix of
    rows and columns.

    Raises:
        DataError: an array or a column does not hold numbers.
    """
    if isinstance(data, Tensor) or (isinstance(data, tuple) and all(isinstance(x, Tensor) for x in data)):
        return data
    return pytree.tree_map(_as_tensor, data)


def observed_tensor(x: Any) -> Tensor:
    """Return an observed value as a tensor; Python and NumPy numbers become tensors without dimensions."""
    return x if isinstance(x, Tensor) else torch.as_tensor(as_tensors(x))


def _as_tensor(x: Any) -> Any:
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, np.ndarray):
        return _from_numpy(x, f"The array of shape {x.shape}")
    if _is_frame(x):
        columns = [_from_numpy(x.iloc[:, i].to_numpy(), f"Column '{name}'") for i, name in enumerate(x.columns)]
        dtype = reduce(torch.promote_types, (column.dtype for column in columns))
        return torch.stack([column.to(dtype) for column in columns], -1)
    if _is_frame(x, "Series"):
        return _from_numpy(x.to_numpy(), f"The Series '{x.name}'")
    return x


def _from_numpy(x: np.ndarray, what: str) -> Tensor:
    if x.dtype.kind not in "biufc":
        raise DataError(
            f"{what} has dtype {x.dtype}, expected numbers. Encode strings and categories as integers "
            "(column.astype('category').cat.codes), and replace missing values by NaN."
        )
    usable = x.flags.writeable and x.dtype.isnative and all(stride >= 0 for stride in x.strides)
    tensor = torch.as_tensor(x if usable else np.array(x, dtype=x.dtype.newbyteorder("=")))
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def _is_frame(x: Any, kind: str = "DataFrame") -> bool:
    """Return True for a pandas object of this kind, without importing pandas."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(x, getattr(pandas, kind))


def named_columns(data: Any, program: Callable[..., Any]) -> Any:
    """Return a DataFrame as ``{column: tensor}`` if its columns are arguments of ``program``, all else unchanged."""
    signature = _signature(program)
    if not _is_frame(data) or signature is None or not all(isinstance(name, str) for name in data.columns):
        return data
    columns = {name: data[name] for name in data.columns}
    try:
        signature.bind(**columns)
    except TypeError:
        return data
    return columns


def program_arguments(
    model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments as the programs take them: arrays as tensors, a DataFrame as its columns where they fit."""
    if not kwargs and len(args) == 1 and (columns := named_columns(args[0], model)) is not args[0]:
        args, kwargs = (), columns
    return as_tensors(args), as_tensors(dict(kwargs))


def _signature(program: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(program.forward if isinstance(program, nn.Module) else program)
    except (TypeError, ValueError):  # a builtin
        return None


def check_arguments(
    call: str, programs: Mapping[str, Callable[..., Any]], args: tuple, kwargs: Mapping[str, Any], cure: str = ""
) -> None:
    """Raise DataError if one of the programs cannot be called with these arguments.

    Args:
        call: what calls the programs, for the message.
        programs: the programs by their role.
        cure: how to pass other arguments.
    """
    for role, program in programs.items():
        signature = _signature(program)
        try:
            if signature is not None:
                signature.bind(*args, **kwargs)
        except TypeError as error:
            given = [*map(_describe, args), *(f"{name}={_describe(x)}" for name, x in kwargs.items())]
            raise DataError(
                f"{call} calls the {role} as {role}({', '.join(given)}), but it takes {signature}: {error}. {cure}Give "
                "model and guide the same arguments."
            ) from error


def _describe(x: Any) -> str:
    return f"tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
