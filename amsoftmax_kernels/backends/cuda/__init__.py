"""The fused decomposition on the C++ kernels of csrc: CUDA GPUs from compute capability 8.0 on; float16, bfloat16 and TF32,
which is float32 where PyTorch's setting allows it.

There are two fused kernels: Hopper's own (wgmma, bulk copies and clusters, under CUTLASS's pipeline), which is built where
CUTLASS's headers are, and the portable one (mma.sync, cp.async) for the rest. Beside the first there is one that makes the
gradient of the centres at once, in half precision to a width of 512. nvcc builds the library when it is first needed; where
that fails this backend says so once, and serves nothing. None of it has been timed on a GPU; by estimate
(bench/estimate_hopper.py) Hopper's own kernels are faster than Triton's: they come first where a library with them was built
ahead of time.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from .. import Forward, Problem
from ..chunking import kind, padded
from ..fused import Fused, streams_for
from ..kernels import RawLabels
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
    return None if c.library.cache_info().currsize else build.missing()


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16, torch.float32) or kind(dtype) == "float32":
        return False
    return torch.cuda.get_device_capability(device) >= _MIN_CAPABILITY and _builds(device)


def comes_first(device: torch.device | None = None) -> bool:
    """Whether this backend comes before Triton's: on Hopper, where a library built ahead of time has Hopper's own kernels.

    One that the cache holds from a first use decides nothing: what is chosen must not depend on what ran before, or where.
    """
    named = build.prebuilt_name()
    if not named or not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return False
    return _has_hopper(torch.device("cuda", torch.cuda.current_device()) if device is None else device, named)


@functools.cache  # asked in each step, of each library that is named
def _has_hopper(device: torch.device, library: str) -> bool:
    if torch.cuda.get_device_capability(device)[0] != 9 or unavailable_reason() is not None:
        return False
    return _builds(device) and bool(_library(device).has_hopper)


def remark() -> str | None:
    """What would make this backend faster here; None if nothing."""
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.get_device_capability(device)[0] != 9 or not _builds(device) or _library(device).has_hopper:
        return None
    if build.prebuilt() is None and build.find_cutlass() is not None:
        return f"by the portable kernel: Hopper's own did not compile ({build.COMMAND} --arch 90a says why)"
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
def _tiling(device: torch.device, batch: int, width: int, dtype: torch.dtype) -> Any:
    return _library(device).tiling(device, batch, width, dtype)


@functools.lru_cache(1024)
def _grad_clusters(device: torch.device, width: int, dtype: torch.dtype) -> int:
    return _library(device).grad_clusters(device, width, dtype)


def _in_sixteens(tensor: Tensor) -> bool:
    """Whether rows start at multiples of 16 bytes, and can be read and written in several elements at a time."""
    element = tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and tensor.stride(0) * element % 16 == 0
    return aligned and tensor.stride(1) == 1 and tensor.shape[1] % 8 == 0


def _labels(labels: Tensor, ignore_index: int, num_classes: int, result: Tensor, count: Tensor) -> Any:
    return c.Labels(
        c.pointer(labels), c.pointer(result), c.pointer(count), labels.shape[0], num_classes, ignore_index,
        c.integer_type(labels), 0,
    )  # fmt: skip


class _Kernels:
    """:class:`.fused.Kernels` through the library."""

    def streams(self, problem: Problem, classes: int) -> int:
        batch, dim = problem.features.shape
        tiling = _tiling(problem.weight.device, batch, padded(dim), problem.compute_dtype)
        blocks, tiles = -(-batch // tiling.rows), -(-classes // tiling.classes)
        return int(tiling.parts) * streams_for(max(tiling.blocks, 1), blocks, tiles)

    def canonical_labels(self, labels: Tensor, ignore_index: int, num_classes: int, result: Tensor, count: Tensor) -> None:
        parameters = _labels(labels, ignore_index, num_classes, result, count)
        _library(labels.device).call("ak_canonical_labels", parameters, labels.device)

    def prepare_rows(
        self, problem: Problem, raw: RawLabels | None, s: float | Tensor, x_hat: Tensor, cosine: Tensor, norm: Tensor,
        factor: Tensor, shift: Tensor, w_hat: Tensor | None, inverse_norm: Tensor,
    ) -> None:  # fmt: skip
        parameters = c.Rows(
            c.matrix(problem.features), c.matrix(problem.weight), c.operand(x_hat), c.pointer(problem.labels),
            c.pointer(cosine), c.pointer(norm), c.pointer(factor), c.pointer(shift),
            c.scale(s, problem.normalize_features), c.operand(w_hat), c.pointer(inverse_norm),
        )  # fmt: skip
        if raw is not None:
            parameters.raw = _labels(raw.labels, raw.ignore_index, problem.weight.shape[0], problem.labels, raw.num_rows)
        _library(x_hat.device).call("ak_prepare_rows", parameters, x_hat.device)

    def prepare_centres(self, weight: Tensor, w_hat: Tensor, inverse_norm: Tensor, unless_bounded: Tensor | None) -> None:
        parameters = c.Centres(c.matrix(weight), c.operand(w_hat), c.pointer(inverse_norm), c.pointer(unless_bounded))
        _library(w_hat.device).call("ak_prepare_centres", parameters, w_hat.device)

    def cosine_exp(
        self, problem: Problem, start: int, x_hat: Tensor, w_hat: Tensor, factor: Tensor, shift: Tensor | None,
        terms: Tensor | None, z: Tensor | None, best: Tensor | None, best_class: Tensor | None, only_unbounded: bool,
    ) -> None:  # fmt: skip
        parts = z if z is not None else best
        parameters = c.Cosine(
            c.operand(x_hat), c.operand(w_hat), c.matrix(terms), c.pointer(problem.labels), c.pointer(factor),
            c.pointer(shift), c.pointer(z), c.pointer(best), c.pointer(best_class), start, problem.interclass_filter,
            self.streams(problem, w_hat.shape[0]) if parts is None else parts.shape[0], int(only_unbounded), 0,
        )  # fmt: skip
        _library(x_hat.device).call("ak_cosine_exp", parameters, x_hat.device)

    def reduce_sums(self, z_parts: Tensor, labels: Tensor, z: Tensor) -> None:
        self._reduce(z_parts, z_parts=z_parts, labels=labels, z=z)

    def reduce_best(self, best_parts: Tensor, class_parts: Tensor, best: Tensor, best_class: Tensor) -> None:
        self._reduce(best_parts, best_parts=best_parts, class_parts=class_parts, best=best, best_class=best_class)

    def reduce_shift(self, best_parts: Tensor, class_parts: Tensor, factor: Tensor, shift: Tensor) -> None:
        self._reduce(best_parts, best_parts=best_parts, class_parts=class_parts, factor=factor, shift=shift)

    def _reduce(self, parts: Tensor, **tensors: Tensor) -> None:
        chunks, streams, batch = parts.shape
        pointers = {name: c.pointer(tensor) for name, tensor in tensors.items()}
        _library(parts.device).call("ak_reduce", c.Reduce(batch=batch, parts=chunks * streams, **pointers), parts.device)

    def constant_margin(
        self, problem: Problem, saved: Forward, z_parts: Tensor | None, num_rows: Tensor, s: float | Tensor, margin: float,
        reduction: str, loss: Tensor, derivatives: Tensor, x_factored: Tensor | None,
    ) -> None:  # fmt: skip
        parts = 0 if z_parts is None else z_parts.shape[0] * z_parts.shape[1]
        parameters = c.Margin(
            c.matrix(problem.features), c.operand(x_factored), c.pointer(z_parts),
            c.pointer(saved.z), c.pointer(saved.shift), c.pointer(saved.cosine), c.pointer(saved.norm),
            c.pointer(problem.labels), c.pointer(num_rows), c.pointer(loss), c.pointer(derivatives), margin,
            saved.z.shape[0], problem.weight.shape[0], parts, c.scale(s, problem.normalize_features),
            int(reduction != "none"), int(reduction == "mean"), int(derivatives.shape[0] == 3), 0,
        )  # fmt: skip
        _library(loss.device).call("ak_constant_margin", parameters, loss.device)

    def factor_rows(
        self, problem: Problem, norm: Tensor, row_factor: Tensor, s: float | Tensor, x_factored: Tensor,
        x_hat: Tensor | None, factor: Tensor | None,
    ) -> None:  # fmt: skip
        unused = c.operand(x_factored) if x_hat is None else c.operand(x_hat)
        if x_hat is None:
            unused.data = None
        parameters = c.Factor(
            c.matrix(problem.features), c.operand(x_factored), unused, c.pointer(problem.labels), c.pointer(norm),
            c.pointer(row_factor), c.pointer(factor), c.scale(s, problem.normalize_features),
        )  # fmt: skip
        _library(norm.device).call("ak_factor_rows", parameters, norm.device)

    def finish_centres(
        self, grad_unit: Tensor, weight: Tensor, inverse_norm: Tensor, grad: Tensor, upstream: Tensor | None
    ) -> None:
        parameters = c.FinishCentres(
            c.matrix(grad_unit), c.matrix(weight), c.matrix(grad), c.pointer(inverse_norm), c.pointer(upstream)
        )
        _library(grad.device).call("ak_finish_centres", parameters, grad.device)

    def grad_centres(
        self, terms: Tensor, x_factored: Tensor, weight: Tensor, inverse_norm: Tensor, grad: Tensor, upstream: Tensor | None
    ) -> bool:
        if x_factored.dtype != torch.bfloat16 or not (_in_sixteens(weight) and _in_sixteens(grad)):
            return False
        clusters = _grad_clusters(weight.device, x_factored.shape[1], weight.dtype)
        if clusters == 0:
            return False
        parameters = c.GradCentres(
            c.matrix(terms), c.matrix(x_factored), c.matrix(weight), c.matrix(grad), c.pointer(inverse_norm),
            c.pointer(upstream), clusters, 0,
        )  # fmt: skip
        _library(grad.device).call("ak_grad_centres", parameters, grad.device)
        return True

    def parts_beside(self, problem: Problem) -> int:
        return 0

    def grad_both(self, *unused: Any) -> bool:
        return False

    def finish_rows(
        self, problem: Problem, saved: Forward, s: float | Tensor, row_factor: Tensor, grad_cosine: Tensor,
        grad_norm: Tensor | None, upstream: Tensor | None,
        grad_features: Tensor | None, grad_weight: Tensor | None, grad_scale: Tensor | None,
    ) -> None:  # fmt: skip
        rows = saved.rows if saved.rows.dim() == 2 else None
        parameters = c.FinishRows(
            c.matrix(problem.features), c.matrix(problem.weight), c.matrix(rows), c.matrix(grad_features),
            c.matrix(grad_weight), c.pointer(problem.labels), c.pointer(saved.norm), c.pointer(saved.cosine),
            c.pointer(row_factor), c.pointer(grad_cosine), c.pointer(grad_norm), c.pointer(grad_scale),
            c.pointer(upstream), c.scale(s, problem.normalize_features),
        )  # fmt: skip
        _library(row_factor.device).call("ak_finish_rows", parameters, row_factor.device)


fused = Fused("cuda", _Kernels())
canonical_labels, loss_at_once = fused.canonical_labels, fused.loss_at_once
forward, backward = fused.forward, fused.backward
forward_loss, backward_loss = fused.forward_loss, fused.backward_loss
