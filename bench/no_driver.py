"""Triton's host side where there is no GPU: its own launchers, on a CUDA driver whose launches do nothing (no_driver.c)."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import shutil
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock


class BulkCopy:
    """A tensor as the bulk copy engine is told of it: no two are equal, as they are not for Triton."""

    def __init__(self, address: int, *rest: Any) -> None:
        self.address, self.rest = address, rest


@contextlib.contextmanager
def entered(capability: tuple[int, int], launch: Callable[..., None] | None = None) -> Iterator[Callable[[], int]]:
    """Triton's active driver is one for a GPU like that; how often it has launched.

    ``launch`` takes the place of the C part of Triton's launchers, one for each kernel until its version 3.7: it is given
    the grid first, and the kernel's arguments last, :class:`BulkCopy` among them.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    library = _library()
    cuda = nvidia.CudaUtils()
    calls = 0

    def counted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        assert launch is not None
        if isinstance(arguments[-1], (tuple, list)):  # since Triton 3.7 they are apart
            *arguments, values = arguments  # type: ignore[assignment]
            arguments = (*arguments, *values)
        launch(*arguments)

    class Driver:
        utils = cuda
        launcher_cls = nvidia.CudaLauncher
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability[0] * 10 + capability[1], 32))

    with contextlib.ExitStack() as stack:
        if launch is not None:
            for name in ("fill_tma_descriptor", "fill_tma_descriptor_tiled"):  # the second since 3.7
                if hasattr(cuda, name):
                    stack.enter_context(mock.patch.object(cuda, name, BulkCopy))
        if launch is not None and hasattr(nvidia, "make_launcher"):
            module = types.SimpleNamespace(launch=counted)
            stack.enter_context(mock.patch.object(nvidia, "compile_module_from_src", lambda **_: module))
        elif launch is not None:
            stack.enter_context(mock.patch.object(cuda, "launch", counted))
        triton.runtime.driver.set_active(Driver())
        try:
            yield (lambda: library.launches()) if launch is None else (lambda: calls)
        finally:
            triton.runtime.driver.set_active(None)  # the default, when it is next asked for


@functools.cache
def _library() -> ctypes.CDLL:
    """The driver, compiled and loaded under the name that Triton asks the system for."""
    import triton

    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SystemExit("no C compiler, which Triton builds its launchers with")
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "libcuda.so.1"
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    options = ["-O2", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", f"-I{headers}"]
    subprocess.run([compiler, *options, str(Path(__file__).with_suffix(".c")), "-o", str(path)], check=True)
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(path.name)
    if not hasattr(library, "launches"):
        raise SystemExit("a CUDA driver is loaded in this process already")
    library.launches.restype = ctypes.c_ulonglong
    triton.knobs.nvidia.libcuda_path = folder  # where launchers are linked
    return library
