"""Which classes the fused kernels take at a time, and in which dtypes."""

from __future__ import annotations

import torch

from .budget import kept_classes

# Classes a chunk: what is not kept of E takes at most this many elements (256 classes at the least), and so does ŵ.
CHUNK_ELEMENTS = 1 << 27
# Classes of which dŵ is computed at a time, in elements: still in the L2 cache when the Jacobian reads it.
FINISH_ELEMENTS = 1 << 23
_ALIGN = 16  # elements: rows of operands start at multiples of 16 bytes, as bulk copies want


def panel_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype of E."""
    return torch.float32 if compute_dtype == torch.float32 else torch.bfloat16


def kind(dtype: torch.dtype) -> str:
    """How operands of this dtype are multiplied; float32 as PyTorch's own setting says."""
    if dtype != torch.float32:
        return "half"
    # Since PyTorch 2.9; follows the older setting, which must not be read beside it.
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if precision is not None:
        return "tf32" if precision == "tf32" else "float32"
    return "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def padded(size: int) -> int:
    """The next multiple of 16."""
    return -(-size // _ALIGN) * _ALIGN


def chunk_size(batch: int, dim: int) -> int:
    """Classes a chunk, a multiple of 256."""
    return max(CHUNK_ELEMENTS // max(batch, dim, 1) // 256, 1) * 256


def finish_size(width: int) -> int:
    """Classes of which dŵ is computed at a time, where that is not done at once."""
    return max(FINISH_ELEMENTS // width // 256, 1) * 256


def kept_count(batch: int, num_classes: int, dim: int, compute_dtype: torch.dtype, save_bytes: int) -> int:
    """Classes of which E is kept: whole chunks, or all."""
    count = kept_classes(batch, padded(num_classes), panel_dtype(compute_dtype), save_bytes, chunk_size(batch, dim))
    return num_classes if count == padded(num_classes) else count


def spans(batch: int, dim: int, num_classes: int) -> list[range]:
    """The chunks of classes, in order."""
    size = chunk_size(batch, dim)
    return [range(start, min(start + size, num_classes)) for start in range(0, num_classes, size)]
