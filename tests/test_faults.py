"""Faults planted in the C++ kernels (faults.py): the emulation that passes them as they stand must show each."""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback

import pytest
import torch

from amsoftmax_kernels.backends.cuda import library as cuda_library

from .cuda_kernels import check_the_cosine_kernel, check_the_gradient_kernel
from .emulation import Change, emulated, seed, serve
from .faults import COSINE, FAULTS, GRADIENT, ONE_TYPE, PORTABLE, Fault

NOTHING, SHOWN = 0, 3  # a child's exit status


def check(kernel: str) -> None:
    """Rows that stay and that come again, two blocks a cluster; tiles for every warpgroup and more stages than there are."""
    if kernel == PORTABLE:
        check_the_cosine_kernel(130, 300, 160, torch.bfloat16, 1)
    elif kernel == COSINE:
        check_the_cosine_kernel(130, 700, 144, torch.bfloat16, 2)
        check_the_cosine_kernel(130, 300, 528, torch.bfloat16, 2)
    else:
        check_the_gradient_kernel(70, 63, 264, torch.float32)
        check_the_gradient_kernel(20, 3300, 512, torch.float32)
        check_the_gradient_kernel(200, 600, 136, torch.float32)


def shown(library: cuda_library.Library, kernel: str, seeds: int) -> bool:
    """Whether any order of events shows a fault: in words, in numbers, or by the death of the process that runs it."""
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()  # a death is an answer too
            torch.set_num_threads(1)
            for number in range(seeds):
                seed(library, number)
                check(kernel)
        except (AssertionError, RuntimeError):
            os._exit(SHOWN)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
        os._exit(NOTHING)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (NOTHING, SHOWN) or code < 0, "the check itself broke"
    return code != NOTHING


@pytest.mark.parametrize("kernel", [COSINE, GRADIENT, PORTABLE])
def test_the_kernels_without_a_fault(kernel: str, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    library = emulated(kernel != PORTABLE)
    serve(library, monkeypatch)
    assert not shown(library, kernel, 4)


@pytest.mark.parametrize(
    "fault", [pytest.param(each, id=each.name, marks=[] if each.quick else [pytest.mark.slow]) for each in FAULTS]
)
def test_a_fault_is_shown(fault: Fault, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    library = emulated(fault.kernel != PORTABLE, [Change(fault.file, fault.old, fault.new), *ONE_TYPE[fault.kernel]])
    serve(library, monkeypatch)
    assert shown(library, fault.kernel, 4), fault.why
