"""What a value is that a caller gave."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor


def is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, torch.SymFloat, torch.SymInt)) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """A number of another library's, NumPy's say, as Python's own; all else as it is."""
    if isinstance(value, (int, float, Tensor, type(None))) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def type_name(value: Any) -> str:
    return type(value).__name__
