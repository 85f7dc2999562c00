"""What a value is that a caller gave."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, torch.SymFloat, torch.SymInt)) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """A number of another library's, NumPy's say, as Python's own; all else as it is."""
    if type(value) in (int, float, bool, type(None)) or isinstance(value, (Tensor, torch.SymInt, torch.SymFloat)):
        return value
    if not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def whole(value: Any) -> Any:
    """:func:`plain`, and a float without a fraction as an int: a number of bytes is also written 1e9."""
    value = plain(value)
    return int(value) if isinstance(value, float) and value % 1 == 0 else value


def is_readable(tensor: Tensor) -> bool:
    """Whether it has values: not on the meta device, in a fake tensor or under ``torch.func``'s transforms."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def type_name(value: Any) -> str:
    return type(value).__name__
