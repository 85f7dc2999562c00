"""Features, labels and rates as the protocols take them: checked, on one device, rows of unit length."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_size, no_autocast
from ..values import is_number, type_name

_MATMUL = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_NAMED = 5  # rows that an error lists


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32, whatever training has chosen: TF32 or bfloat16 would move scores by 1e-3."""
    before = [each.fp32_precision for each in _MATMUL]
    for each in _MATMUL:
        each.fp32_precision = "ieee"
    try:
        with no_autocast(device):
            yield
    finally:
        for each, value in zip(_MATMUL, before, strict=True):
            each.fp32_precision = value


def tensor(name: str, value: Any) -> Tensor:
    """A tensor as it is, an array or a list as a tensor that shares its memory where it can.

    Raises:
        TypeError: it cannot become a tensor.
    """
    if isinstance(value, Tensor):
        return value.detach()
    try:
        if hasattr(value, "__array__"):
            import numpy as np

            array = np.asarray(value)
            if any(step < 0 for step in array.strides) or not array.dtype.isnative:
                array = np.array(array, dtype=array.dtype.newbyteorder("="))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nothing writes into it
                return torch.from_numpy(array)
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor or an array of numbers, but it is {type_name(value)}: {error}") from error


def matrix(name: str, value: Any, dim: int | None = None) -> Tensor:
    """``[N, D]`` of floating point; with ``dim``, D must be that.

    Raises:
        TypeError: it is no floating-point tensor or array.
        ValueError: it has another shape.
    """
    rows = tensor(name, value)
    if rows.dtype not in FLOATS:
        raise TypeError(f"{name} must be floating-point, but its dtype is {rows.dtype}")
    if rows.dim() != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name} must have shape [N, D], but it has {list(rows.shape)}")
    if dim is not None and rows.shape[1] != dim:
        raise ValueError(f"{name} must have the {dim} dimensions of the others, but it has {rows.shape[1]}")
    return rows


def unit_rows(name: str, rows: Tensor, first: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """The rows ``[N, D]`` over their norms, float32 (float64 stays); a zero row stays zero: its cosines are 0.

    Args:
        name: of the argument, for the error.
        rows: of any floating-point dtype.
        first: the number of the first row, where these are a part of the argument.
        dtype: of the result, where another argument decides it.

    Raises:
        ValueError: a row has a NaN or an infinity. The error names the rows.
    """
    unit = rows.to(dtype or (torch.float64 if rows.dtype == torch.float64 else torch.float32), copy=True)
    norms = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
    odd = ~((norms > 1e-15) & (norms < 1e15))[:, 0]  # where squares may have left float32's range
    if bool(odd.any()):
        part = rows[odd].double()
        largest = part.abs().amax(1, keepdim=True)
        bad = odd.nonzero()[~torch.isfinite(largest[:, 0]), 0]
        if len(bad):
            named = ", ".join(str(first + int(row)) for row in bad[:_NAMED]) + (", …" if len(bad) > _NAMED else "")
            raise ValueError(f"{name} must be finite, but these rows are not: {named}")
        part = part / torch.where(largest > 0, largest, 1)
        unit[odd] = part.to(unit.dtype)
        norms[odd] = torch.linalg.vector_norm(part, dim=1, keepdim=True).clamp_min(1e-300).to(unit.dtype)
        norms[norms == 0] = 1
    return unit.div_(norms)


def integers(name: str, value: Any, length: int, below: int | None = None) -> Tensor:
    """``[length]`` int64 on the CPU; with ``below``, indices in ``[0, below)``.

    Raises:
        TypeError: these are no integers.
        ValueError: another shape, or an index out of range.
    """
    found = tensor(name, value)
    if found.dtype.is_floating_point or found.dtype.is_complex or found.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, but its dtype is {found.dtype}")
    found = found.to("cpu", torch.int64)
    if found.shape not in ((length,), (length, 1)):
        raise ValueError(f"{name} must have shape [{length}], but it has {list(found.shape)}")
    found = found.reshape(length)
    if below is not None and length and not 0 <= int(found.min()) <= int(found.max()) < below:
        wrong = int(((found < 0) | (found >= below)).nonzero()[0])
        raise ValueError(f"{name} must lie in [0, {below}), but {name}[{wrong}] is {int(found[wrong])}")
    return found


def people(name: str, value: Any, length: int) -> Tensor:
    """``[length]`` numbers from 0 on, one a person, on the CPU, for labels of any values."""
    numbers: Tensor = torch.unique(integers(name, value, length), return_inverse=True)[1]
    return numbers


def flags(name: str, value: Any, length: int) -> Tensor:
    """``[length]`` bool on the CPU; integers 0 and 1 are taken too.

    Raises:
        TypeError: another dtype.
        ValueError: another shape, or an integer that is neither 0 nor 1.
    """
    found = tensor(name, value).to("cpu")
    if found.shape != (length,):
        raise ValueError(f"{name} must have shape [{length}], but it has {list(found.shape)}")
    if found.dtype == torch.bool:
        return found
    if found.dtype.is_floating_point or found.dtype.is_complex:
        raise TypeError(f"{name} must be bools, but its dtype is {found.dtype}")
    if length and not 0 <= int(found.min()) <= int(found.max()) <= 1:
        raise ValueError(f"{name} must be bools, or integers 0 and 1")
    return found.bool()


def rates(name: str, value: Any) -> tuple[float, ...]:
    """False acceptance rates in (0, 1]: one or several.

    Raises:
        TypeError: these are no numbers.
        ValueError: one is out of range, or there is none.
    """
    several = value if isinstance(value, Iterable) else (value,)
    found = []
    for each in several:
        if not is_number(each):
            raise TypeError(f"{name} must be a float or several, but it has {type_name(each)}")
        if not 0 < each <= 1:
            raise ValueError(f"{name} must lie in (0, 1], but it has {each}")
        found.append(float(each))
    if not found:
        raise ValueError(f"{name} must have at least one rate, but it is empty")
    return tuple(found)


def sizes(name: str, value: Any) -> tuple[int, ...]:
    """Positive ints, one or several.

    Raises:
        TypeError: these are no ints.
        ValueError: one is less than 1, or there is none.
    """
    several = value if isinstance(value, Iterable) else (value,)
    found = tuple(check_size(name, each) for each in several)
    if not found:
        raise ValueError(f"{name} must have at least one number, but it is empty")
    return found


def accepted(far: float, impostors: int) -> int:
    """k: as many impostor pairs as this FAR accepts, rounded, halves up, as MATLAB's round does."""
    return math.floor(far * impostors + 0.5)


def too_few(far: float, impostors: int, kind: str = "impostor pairs") -> str | None:
    """Why there is no rate at this FAR; None if there is one."""
    if impostors == 0:
        return f"no rate at FAR {far:g}: there are no {kind}"
    if accepted(far, impostors) == 0:
        return f"no rate at FAR {far:g}: {impostors:,} {kind} are too few, it takes {math.ceil(0.5 / far):,}"
    return None
