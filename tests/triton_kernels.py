"""Where the Triton backend's tests run: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from amsoftmax_kernels.backends import triton as backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = backend.unavailable_reason()
# Of each of their files; new tensors are poisoned.
MARKS = [
    pytest.mark.skipif(REASON is not None, reason=f"the Triton backend cannot run here: {REASON}"),
    pytest.mark.usefixtures("poisoned"),
]
