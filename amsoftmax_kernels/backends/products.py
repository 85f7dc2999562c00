"""Matrix products with an accumulate-dtype result, by the fastest library that PyTorch carries for the machine."""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor


def product_nt(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` for ``a [M, K]`` and ``b [N, K]`` of one dtype: ``[M, N]``, float32 for half-precision operands.

    ``b`` is read at whatever strides it has; ``a`` is best contiguous.
    """
    if a.dtype == torch.float32 and a.device.type == "cpu" and _onednn_is_faster() and torch.backends.mkldnn.enabled:
        product: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], "")
        return product
    if a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b.T, out_dtype=torch.float32)
    return torch.mm(a, b.T)


def remark() -> str | None:
    """What would make a CPU's products faster; None if nothing."""
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)  # since PyTorch 2.6
    if known is None or not known() or torch.get_float32_matmul_precision() == "medium":
        return None
    return "torch.set_float32_matmul_precision('medium') lets this CPU's bfloat16 unit multiply float32 matrices"


@functools.cache
def _onednn_is_faster() -> bool:
    """Whether float32 products should go to oneDNN instead of torch.mm's MKL. Depends on the processor alone.

    MKL keeps to AVX2 on processors that are not Intel's; oneDNN uses AVX-512 wherever it is. Measured on 2 cores of
    an AMD EPYC (Zen 5), [2048, 512] x [512, 256]: torch.mm 225 GFLOP/s, oneDNN 495.
    """
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "GenuineIntel" not in _cpu_vendor()
    )


def _cpu_vendor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line for line in lines if line.startswith("vendor_id")), "GenuineIntel")
    except OSError:
        # Windows names the vendor in platform.processor(); a machine that says nothing is left to MKL.
        return platform.processor() or "GenuineIntel"
