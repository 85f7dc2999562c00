"""The fused decomposition on the C++ kernels of csrc: CUDA GPUs from compute capability 8.0 on; float16, bfloat16 and TF32,
which is float32 where PyTorch's setting allows it.

There are two fused kernels: Hopper's own (wgmma, bulk copies and clusters, under CUTLASS's pipeline), which is built where
CUTLASS's headers are, and the portable one (mma.sync, cp.async) for the rest and for sub-centres. Beside the first there is
one that makes the gradient of the centres at once, in half precision to a width of 512. ``backend="cuda"`` has nvcc build
the library when it is first needed; one that was built ahead of time and is named is a candidate by itself (:func:`place`).
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from .. import Forward, Problem, Upstream
from ..chunking import kind, padded
from ..fused import Fused, streams_for
from ..kernels import Cosines, Factored, Grads, Rows, TargetParts
from ..subcentres import Columns
from ..update import Update
from . import build
from . import library as c

_MIN_CAPABILITY = (8, 0)


def unavailable_reason() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU that this PyTorch can use"
    if torch.version.hip is not None:
        return "ROCm is not supported"
    capability = torch.cuda.get_device_capability()
    if capability < _MIN_CAPABILITY:
        return f"needs compute capability 8.0 or newer, but this GPU has {capability[0]}.{capability[1]}"
    if _failed and _architecture() in _failed:
        return _failed[_architecture()]
    # To look for nvcc takes some 50 µs, and a step asks each time.
    return None if c.library.cache_info().currsize else build.missing(_architecture())


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """The library is built here where it is not there yet."""
    if device.type != "cuda":
        return f"it does not serve tensors on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it does not serve {dtype}"
    if kind(dtype) == "float32":
        return "it multiplies float32 as TF32 only, which PyTorch's setting does not allow"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        return f"needs compute capability 8.0 or newer, but this GPU has {capability[0]}.{capability[1]}"
    if _builds(device):
        return None
    return _failed.get(_architecture(device), "its library does not serve this device")


def place(device: torch.device) -> int | None:
    """Where it stands among the candidates for a device: nowhere, unless a library built ahead of time is named.

    On Hopper one with Hopper's own kernels comes before Triton's, any other after. A library that the cache holds from an
    earlier use decides nothing: what is chosen must not depend on what ran before, or where.
    """
    named = build.prebuilt_name()
    if not named or device.type != "cuda":
        return None
    return 0 if _has_hopper(device, named) else 1


@functools.cache  # asked in each step, of each library that is named
def _has_hopper(device: torch.device, library: str) -> bool:
    if torch.cuda.get_device_capability(device)[0] != 9 or unavailable_reason() is not None:
        return False
    return _builds(device) and bool(_library(device).has_hopper)


def built(device: torch.device) -> bool:
    """Whether its library is there: built ahead of time and named, or in the cache."""
    return build.prebuilt() is not None or build.path_of(_architecture(device)).exists()


def remark() -> str | None:
    """What would make this backend faster here; None if nothing."""
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.get_device_capability(device)[0] != 9 or not _builds(device):
        return None
    if c.without():
        return f"of Hopper's own kernels {build.WITHOUT} leaves out {os.environ[build.WITHOUT]}"
    if _library(device).has_hopper:
        return None
    if build.prebuilt() is None and build.find_cutlass() is not None:
        return f"by the portable kernel: Hopper's own did not compile ({build.COMMAND} --arch 90a --out FILE.so says why)"
    return f"by the portable kernel: Hopper's own takes CUTLASS's headers, pip install {build.CUTLASS}"


# Why there is no library for an architecture: not tried again in this process.
_failed: dict[str, str] = {}


def _builds(device: torch.device) -> bool:
    """Whether there are kernels for this device; a library that is not there yet is built. A failure is shown, once."""
    if _failed and _architecture(device) in _failed:
        return False
    try:
        _library(device)
    except (build.BuildError, OSError) as error:
        arch = _architecture(device)
        command = f"{build.COMMAND} --arch {arch} --out FILE.so"
        where = "" if build.prebuilt() else f" (`{command}` shows all of it)"
        _failed[arch] = f"its library cannot be had: {build.summary(str(error))}{where}"
        warnings.warn(f"amsoftmax_kernels: the CUDA library cannot be had, other backends serve:\n{error}", stacklevel=2)
        return False
    except RuntimeError as error:  # the device's, and perhaps not the next time
        warnings.warn(f"amsoftmax_kernels: the CUDA library does not serve {device}:\n{error}", stacklevel=2)
        return False
    return True


def _architecture(device: torch.device | None = None) -> str:
    return build.architecture(torch.cuda.get_device_capability(device))


@functools.cache
def _library(device: torch.device) -> c.Library:
    """The library for this device. Its check is also what lets kernels have their shared memory there."""
    found = c.library(_architecture(device))
    found.check(device)
    return found


@functools.lru_cache(1024)
def _tiling(device: torch.device, batch: int, width: int, dtype: torch.dtype, grouped: bool) -> Any:
    return _library(device).tiling(device, batch, width, dtype, grouped)


@functools.lru_cache(1024)
def _grad_clusters(device: torch.device, width: int, dtype: torch.dtype) -> int:
    return _library(device).grad_clusters(device, width, dtype)


def _in_sixteens(tensor: Tensor) -> bool:
    """Whether rows start at multiples of 16 bytes, and can be read and written in several elements at a time."""
    element = tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and tensor.stride(0) * element % 16 == 0
    return aligned and tensor.stride(1) == 1 and tensor.shape[1] % 8 == 0


class _Kernels:
    """:class:`.fused.Kernels` through the library."""

    def streams(self, problem: Problem, classes: int) -> int:
        batch, dim = problem.features.shape
        grouped = problem.subcentres > 1
        tiling = _tiling(problem.weight.device, batch, padded(dim), problem.compute_dtype, grouped)
        blocks, tiles = -(-batch // tiling.rows), -(-classes // tiling.classes)
        return int(tiling.parts) * streams_for(max(tiling.blocks, 1), blocks, tiles)

    def prepare_rows(self, problem: Problem, s: float | Tensor, rows: Rows) -> None:
        parameters = c.Rows(
            c.matrix(problem.features), c.matrix(problem.weight), c.operand(rows.x_hat), c.pointer(problem.labels),
            c.pointer(rows.cosine), c.pointer(rows.norm), c.pointer(rows.factor), c.pointer(rows.shift),
            c.scale(s, problem.normalize_features),
        )  # fmt: skip
        self._call("ak_prepare_rows", parameters, rows.norm)

    def prepare_centres(self, weight: Tensor, w_hat: Tensor, inverse_norm: Tensor) -> None:
        parameters = c.Centres(c.matrix(weight), c.operand(w_hat), c.pointer(inverse_norm))
        self._call("ak_prepare_centres", parameters, w_hat)

    def cosine_exp(self, problem: Problem, start: int, rows: Rows, w_hat: Tensor, out: Cosines) -> None:
        parts = out.best if out.z is None else out.z
        streams = self.streams(problem, w_hat.shape[0]) if parts is None else parts.shape[0]
        for_shift = out.z is None and out.best is not None
        parameters = c.Cosine(
            c.operand(rows.x_hat), c.operand(w_hat), c.matrix(out.terms), c.pointer(problem.labels), c.pointer(rows.factor),
            c.pointer(rows.shift), c.pointer(out.z), c.pointer(out.best), c.pointer(out.best_class), start,
            problem.interclass_filter, streams, int(for_shift), problem.subcentres, Columns(problem.subcentres).group, 0,
        )  # fmt: skip
        self._call("ak_cosine_exp", parameters, w_hat)

    def reduce_sums(self, z_parts: Tensor, labels: Tensor, z: Tensor) -> None:
        self._reduce(z_parts, z_parts=z_parts, labels=labels, z=z)

    def reduce_best(self, best_parts: Tensor, class_parts: Tensor, best: Tensor, best_class: Tensor) -> None:
        self._reduce(best_parts, best_parts=best_parts, class_parts=class_parts, best=best, best_class=best_class)

    def reduce_shift(self, best_parts: Tensor, class_parts: Tensor, factor: Tensor, shift: Tensor) -> None:
        self._reduce(best_parts, best_parts=best_parts, class_parts=class_parts, factor=factor, shift=shift)

    def _reduce(self, parts: Tensor, **tensors: Tensor) -> None:
        chunks, streams, batch = parts.shape
        pointers = {name: c.pointer(tensor) for name, tensor in tensors.items()}
        self._call("ak_reduce", c.Reduce(batch=batch, parts=chunks * streams, **pointers), parts)

    def additive_margin(
        self, problem: Problem, z_parts: Tensor, out: Forward, s: float | Tensor, margin: float, mean: bool
    ) -> None:  # fmt: skip
        z = torch.empty_like(out.norm)
        self.reduce_sums(z_parts, problem.labels, z)
        parameters = c.Margin(
            c.pointer(z), c.pointer(out.shift), c.pointer(out.cosine), c.pointer(out.norm), c.pointer(problem.labels),
            c.pointer(out.loss), c.pointer(out.derivatives), margin, z.shape[0], problem.weight.shape[0],
            mean, c.scale(s, problem.normalize_features),
        )  # fmt: skip
        self._call("ak_constant_margin", parameters, z)

    def factor_rows(self, problem: Problem, norm: Tensor, row_factor: Tensor, s: float | Tensor, out: Factored) -> None:
        x_hat = c.operand(out.x_factored) if out.x_hat is None else c.operand(out.x_hat)
        if out.x_hat is None:
            x_hat.data = None
        parameters = c.Factor(
            c.matrix(problem.features), c.operand(out.x_factored), x_hat, c.pointer(problem.labels), c.pointer(norm),
            c.pointer(row_factor), c.pointer(out.factor), c.scale(s, problem.normalize_features),
        )  # fmt: skip
        self._call("ak_factor_rows", parameters, norm)

    def grad_centres(self, terms: Tensor, x_factored: Tensor, weight: Tensor, inverse_norm: Tensor, grad: Tensor) -> bool:
        if x_factored.dtype != torch.bfloat16 or not (_in_sixteens(weight) and _in_sixteens(grad)):
            return False
        clusters = _grad_clusters(weight.device, x_factored.shape[1], weight.dtype)
        if clusters == 0:
            return False
        parameters = c.GradCentres(
            c.matrix(terms[:, : grad.shape[0]]),
            c.matrix(x_factored),
            c.matrix(weight),
            c.matrix(grad),
            c.pointer(inverse_norm),
            clusters,
            0,
        )
        self._call("ak_grad_centres", parameters, grad)
        return True

    def finish_centres(self, grad_unit: Tensor, weight: Tensor, inverse_norm: Tensor, grad: Tensor) -> None:
        parameters = c.FinishCentres(c.matrix(grad_unit), c.matrix(weight), c.matrix(grad), c.pointer(inverse_norm))
        self._call("ak_finish_centres", parameters, grad)

    def update_centres(
        self, grad: Tensor, weight: Tensor, inverse_norm: Tensor, parts: TargetParts, start: int, update: Update,
        whole: bool, out: Tensor | None,
    ) -> None:  # fmt: skip
        N, rows = len(weight), update.rows
        first, second = (*update.state, None, None)[:2]
        skipped = parts.slots.new_empty(N)
        parameters = c.UpdateCentres(
            c.matrix(grad), c.matrix(weight), c.matrix(parts.rows), c.matrix(out),
            c.matrix(update.weight), c.matrix(first), c.matrix(second),
            c.pointer(inverse_norm), c.pointer(parts.slots), c.pointer(None if rows is None else rows[start : start + N]),
            c.pointer(skipped), *update.keys(), start, update.class_start, update.loss_scale, *update.rule.numbers(),
            int(whole), int(getattr(update.rule, "nesterov", False)), int(update.seed is not None),
        )  # fmt: skip
        self._call("ak_update_centres", parameters, grad)
        if out is None:
            update.tally.count(skipped.sum())

    def finish_rows(self, problem: Problem, saved: Forward, s: float | Tensor, upstream: Upstream, grads: Grads) -> None:
        rows = saved.rows if saved.rows.dim() == 2 else None
        parameters = c.FinishRows(
            c.matrix(problem.features), c.matrix(problem.weight), c.matrix(rows), c.matrix(grads.features),
            c.matrix(grads.weight), c.pointer(problem.labels), c.pointer(saved.norm), c.pointer(saved.cosine),
            c.pointer(upstream.row_factor), c.pointer(upstream.cosine), c.pointer(upstream.norm), c.pointer(grads.scale),
            c.scale(s, problem.normalize_features),
        )  # fmt: skip
        self._call("ak_finish_rows", parameters, upstream.row_factor)

    def _call(self, name: str, parameters: Any, tensor: Tensor) -> None:
        _library(tensor.device).call(name, parameters, tensor.device)


fused = Fused("cuda", _Kernels())
forward, backward = fused.forward, fused.backward
