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

from pyro_elbo.errors import DataError, describe, first_sentence
from pyro_elbo.failures import describe_arguments


def as_tensors(data: Any) -> Any:
    """Convert arrays of NumPy, pandas and xarray inside ``data`` to tensors, and NumPy scalars to numbers.

    Floating-point arrays get torch's default dtype; integers and booleans keep theirs. A DataFrame becomes a matrix of
    rows and columns.

    Raises:
        DataError: an array or a column does not hold numbers.
    """
    if isinstance(data, Tensor) or (isinstance(data, tuple) and all(isinstance(x, Tensor) for x in data)):
        return data
    return pytree.tree_map(_as_tensor, data)


def observed_tensor(x: Any, name: str) -> Tensor:
    """Return an observed value as a tensor; Python and NumPy numbers become tensors without dimensions.

    Raises:
        DataError: it is none of these, or a tensor without values or of another layout.
    """
    try:
        found = x if isinstance(x, Tensor) else torch.as_tensor(as_tensors(x))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"Site '{name}': expected observed values as a tensor, an array or a number, got {describe(x)}: "
            f"{first_sentence(error)} Convert them by torch.tensor."
        ) from error
    check_dense(f"Site '{name}'", found)
    return found


def check_dense(what: str, x: Tensor) -> None:
    """Raise DataError for a sparse tensor, and for one without values."""
    if x.layout is not torch.strided or x.is_meta:
        kind = "values on the device 'meta', where there are none" if x.is_meta else f"the layout {x.layout}"
        raise DataError(f"{what}: expected a tensor of numbers, got {kind}. Use x.to_dense(), or data with values.")


def as_array(x: Tensor) -> Any:
    """Return a tensor as a NumPy array, which has no bfloat16."""
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


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
    if is_xarray(x, "DataArray"):
        return _from_numpy(x.to_numpy(), f"The DataArray '{x.name}'")
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


def is_xarray(x: Any, kind: str) -> bool:
    """Return True for an xarray object of this kind, without importing xarray."""
    xarray = sys.modules.get("xarray")
    return xarray is not None and isinstance(x, getattr(xarray, kind))


def named_columns(data: Any, program: Callable[..., Any]) -> Any:
    """Return a DataFrame as ``{column: tensor}`` if its columns are arguments of ``program``, all else unchanged.

    The variables of an xarray Dataset are keyword arguments in any case.
    """
    if is_xarray(data, "Dataset"):
        return dict(data.data_vars)
    signature = signature_of(program)
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
    """Return arguments as programs take them: arrays as tensors, a DataFrame as its columns where they fit."""
    if not kwargs and len(args) == 1 and (columns := named_columns(args[0], model)) is not args[0]:
        args, kwargs = (), columns
    return as_tensors(args), as_tensors(dict(kwargs))


def signature_of(program: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature of a program, that of its ``forward`` for a module; None for a builtin without one."""
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
        signature = signature_of(program)
        try:
            if signature is not None:
                signature.bind(*args, **kwargs)
        except TypeError as error:
            raise DataError(
                f"{call} calls the {role} as {role}{describe_arguments(args, kwargs)}, but it takes {signature}: "
                f"{error}. {cure}Give model and guide the same arguments."
            ) from error
