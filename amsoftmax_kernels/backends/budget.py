"""What backends share about ranges and memory."""

from __future__ import annotations

import torch

# The largest scale at which e^(s·cos) and its sums stay inside float32's range whatever the cosines are.
BOUNDED_SCALE = 64.0


def kept_classes(batch: int, num_classes: int, dtype: torch.dtype, save_bytes: int, chunk: int) -> int:
    """Classes whose terms fit ``save_bytes``: whole chunks, or all."""
    fit = save_bytes // (max(batch, 1) * dtype.itemsize)
    return min(num_classes, fit // chunk * chunk) if fit < num_classes else num_classes
