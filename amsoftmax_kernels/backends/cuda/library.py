"""The compiled library through ctypes: the structures of csrc/library.h, and calls that raise what it says is wrong."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import build

VERSION = 8  # of the contract: ak_version()
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_OPERANDS = _TYPES | {torch.float32: 3}  # multiplied as TF32


def _structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def _named(ctype: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), ctype)


Matrix = _structure(
    "AkMatrix", data=c_void_p, **_named(c_int64, "rows columns row_stride column_stride"), **_named(c_int32, "type reserved")
)
Where = _structure("AkWhere", stream=c_void_p, **_named(c_int32, "device without"))
Scale = _structure("AkScale", pointer=c_void_p, number=c_float, normalize=c_int32)
Rows = _structure(
    "AkRows", **_named(Matrix, "features weight x_hat"), **_named(c_void_p, "labels cosine norm factor shift"), scale=Scale
)
Centres = _structure("AkCentres", **_named(Matrix, "weight w_hat"), inverse_norm=c_void_p)
Cosine = _structure(
    "AkCosine", **_named(Matrix, "x_hat w_hat terms"), **_named(c_void_p, "labels factor shift z best best_class"),
    class_start=c_int64, filter=c_float, **_named(c_int32, "parts only_unbounded subcentres group reserved"),
)  # fmt: skip
Tiling = _structure(
    "AkTiling", **_named(c_int64, "batch width"), **_named(c_int32, "rows classes parts blocks type grouped")
)
Reduce = _structure(
    "AkReduce", **_named(c_void_p, "z_parts best_parts class_parts labels factor z best shift best_class"),
    **_named(c_int64, "batch parts"),
)  # fmt: skip
Margin = _structure(
    "AkMargin", **_named(c_void_p, "z shift cosine norm labels loss derivatives"), margin=c_double,
    **_named(c_int64, "batch classes mean"), scale=Scale,
)  # fmt: skip
Factor = _structure(
    "AkFactor",
    **_named(Matrix, "features x_factored x_hat"),
    **_named(c_void_p, "labels norm row_factor factor"),
    scale=Scale,
)
FinishCentres = _structure("AkFinishCentres", **_named(Matrix, "grad_unit weight grad"), inverse_norm=c_void_p)
GradCentres = _structure(
    "AkGradCentres", **_named(Matrix, "terms x_factored weight grad"), inverse_norm=c_void_p,
    **_named(c_int32, "clusters reserved"),
)  # fmt: skip
GradTiling = _structure("AkGradTiling", width=c_int64, **_named(c_int32, "type clusters"))
UpdateCentres = _structure(
    "AkUpdateCentres", **_named(Matrix, "grad_unit centres target_rows out weight first second"),
    **_named(c_void_p, "inverse_norm slots rows skipped"),
    **_named(c_int64, "weight_key first_key second_key start class_start"),
    **_named(c_float, "loss_scale lr decay first_rate second_rate third correction"),
    **_named(c_int32, "whole nesterov stochastic"),
)  # fmt: skip
FinishRows = _structure(
    "AkFinishRows", **_named(Matrix, "features weight unit_rows grad_features grad_weight"),
    **_named(c_void_p, "labels norm cosine row_factor grad_cosine grad_norm grad_scale"), scale=Scale,
)  # fmt: skip

LAUNCHERS = {
    "ak_prepare_rows": Rows, "ak_prepare_centres": Centres, "ak_tiling": Tiling, "ak_cosine_exp": Cosine,
    "ak_reduce": Reduce, "ak_constant_margin": Margin, "ak_factor_rows": Factor, "ak_finish_centres": FinishCentres,
    "ak_update_centres": UpdateCentres, "ak_finish_rows": FinishRows, "ak_grad_centres": GradCentres,
    "ak_grad_tiling": GradTiling,
}  # fmt: skip
CONSTANTS = ("ak_version", "ak_contract", "ak_has_hopper")
KERNELS = {"cosine_sm90": 1, "gradient_sm90": 2}  # Hopper's own, as AkKernel has them


def without() -> int:
    """Which kernels the environment leaves out, as ``AkWhere`` has it.

    Raises:
        ValueError: it names a kernel that there is not.
    """
    names = [name.strip() for name in os.environ.get(build.WITHOUT, "").split(",") if name.strip()]
    for name in names:
        if name not in KERNELS:
            raise ValueError(f"{build.WITHOUT} names {name!r}, which is none of {', '.join(KERNELS)}")
    return sum(KERNELS[name] for name in set(names))


class Library:
    """A loaded library. ``call`` launches one kernel on the current stream of the tensors' device."""

    def __init__(self, path: Path) -> None:
        """Load it.

        Raises:
            OSError: the loader refuses the file.
            build.BuildError: it is not a library of this package, or of another version's interface.
        """
        self.path = path
        self._library = ctypes.CDLL(str(path))
        if not hasattr(self._library, "ak_version"):
            raise build.BuildError(f"{path} is not a library of this package: it has no ak_version")
        version = self._constant("ak_version")
        if version != VERSION:
            raise self._refused(f"has version {version} of the interface, this package {VERSION}")
        if self._constant("ak_contract") != build.contract():
            raise self._refused("has other structures in its interface than this package's csrc/library.h")
        self._functions = {name: self._function(name) for name in LAUNCHERS}
        for function in self._functions.values():
            function.argtypes, function.restype = [c_void_p, c_void_p], c_char_p
        self._check = self._function("ak_check")
        self._check.argtypes, self._check.restype = [ctypes.POINTER(Where)], c_char_p
        self._without = without()
        # Its own kernels: whether they are there, and not all left out.
        self.has_hopper = bool(self._constant("ak_has_hopper")) and self._without != sum(KERNELS.values())

    def _function(self, name: str) -> Any:
        function = getattr(self._library, name, None)
        if function is None:
            raise self._refused(f"has no {name}, it is of other sources than this package's")
        return function

    def _constant(self, name: str) -> int:
        function = self._function(name)
        function.argtypes, function.restype = [], c_int32
        return int(function())

    def _refused(self, why: str) -> build.BuildError:
        return build.BuildError(f"{self.path} {why}: build it again ({build.COMMAND})")

    def call(self, name: str, parameters: ctypes.Structure, device: torch.device) -> None:
        """Launch; RuntimeError with the library's own words if it cannot."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        where = Where(stream, device.index or 0, self._without)
        error = self._functions[name](ctypes.byref(parameters), ctypes.byref(where))
        if error is not None:
            raise RuntimeError(f"{name}: {error.decode()}")

    def check(self, device: torch.device) -> None:
        """RuntimeError if the kernels do not run on this device."""
        error = self._check(ctypes.byref(Where(None, device.index or 0, self._without)))
        if error is not None:
            raise RuntimeError(f"the kernels of {self.path} do not run on {device}: {error.decode()}")

    def tiling(
        self, device: torch.device, batch: int, width: int, dtype: torch.dtype, grouped: bool = False
    ) -> ctypes.Structure:
        """How the cosine kernel divides a batch of rows of this width, of classes with several centres if ``grouped``."""
        tiling = Tiling(batch, width, type=_OPERANDS[dtype], grouped=int(grouped))
        self.call("ak_tiling", tiling, device)
        return tiling

    def grad_clusters(self, device: torch.device, width: int, dtype: torch.dtype) -> int:
        """Clusters of the gradient kernel that run at once, for centres of this dtype; 0 where there is no such kernel."""
        tiling = GradTiling(width, _TYPES[dtype])
        self.call("ak_grad_tiling", tiling, device)
        return int(tiling.clusters)


@functools.cache
def library(arch: str) -> Library:
    """The library built ahead of time if there is one, else that of an architecture, built if it is not there yet."""
    prebuilt = build.prebuilt()
    if prebuilt is not None:
        return Library(prebuilt)
    path = build.cached(arch)
    when = build.written(path)
    try:
        return Library(path)
    except OSError:  # cut short, or for another machine: a home folder is shared by many
        return Library(build.cached(arch, broken=when))


def matrix(tensor: Tensor | None) -> ctypes.Structure:
    """A 2-d tensor; of None the null matrix."""
    if tensor is None:
        return Matrix()
    return Matrix(tensor.data_ptr(), *tensor.shape, *tensor.stride(), _TYPES[tensor.dtype], 0)


def operand(tensor: Tensor | None) -> ctypes.Structure:
    """A matrix that is multiplied, or will be."""
    result = matrix(tensor)
    if tensor is not None:
        result.type = _OPERANDS[tensor.dtype]
    return result


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def scale(s: float | Tensor, normalize: bool) -> ctypes.Structure:
    """s: a number or a float32 tensor on the device."""
    if isinstance(s, Tensor):
        return Scale(s.data_ptr(), 0.0, int(normalize))
    return Scale(None, s, int(normalize))
