"""Large buffers on a CPU that are about to be written for the first time."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor

_MADV_HUGEPAGE = 14  # linux/mman.h
_HUGE_PAGE = 2 << 20


def advise_huge_pages(buffer: Tensor) -> Tensor:
    """Ask Linux to back a freshly allocated CPU tensor with huge pages; elsewhere, and for small tensors, nothing.

    A large allocation is new memory from the system each time, and its first write faults once a page. Measured in a
    virtual machine: 139 of 310 ms of a step at B = 256, C = 100,000, D = 512 were the 4 KiB faults of the 205 MB of
    the centres' gradient.
    """
    size = buffer.numel() * buffer.element_size()
    if buffer.device.type == "cpu" and size >= 2 * _HUGE_PAGE and (madvise := _madvise()) is not None:
        address = buffer.data_ptr()
        first = -(-address // _HUGE_PAGE) * _HUGE_PAGE
        # A hint: where it is refused, small pages do.
        madvise(first, (address + size - first) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
    return buffer


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function
