"""The fused decomposition on Triton kernels: CUDA GPUs from compute capability 8.0 on, or a CPU under TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from .. import Forward, Problem, Upstream
from ..chunking import kind, padded
from ..fused import Fused, streams_for
from ..kernels import Cosines, Factored, Grads, Rows, TargetParts
from ..subcentres import Columns
from ..update import AdamW, Update
from .tiles import GRADIENT, Config, GradientConfig, config

try:
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    from . import backward_kernels, forward_kernels, update_kernels
except ImportError as error:
    _import_error: str | None = f"{error}; pip install 'triton>=3.6,<3.9'"
else:
    _import_error = None

_IN_SIXTEENS = 16
_INTERPRETED = Config(rows=16, classes=32, depth=16, stages=1, warps=4, bulk=True)
_INTERPRETED_GRADIENT = GradientConfig(rows=16, classes=16, columns=128, stages=1, warps=4)


def unavailable_reason() -> str | None:
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA GPU that this PyTorch can use"
    if _import_error is not None:
        return _import_error
    if torch.version.hip is not None:
        return "ROCm has not been tried"
    reason = _unsupported(_version(), _capability(torch.device("cuda", torch.cuda.current_device())))
    return _build_failure() if reason is None else reason


def _unsupported(version: tuple[int, int], capability: tuple[int, int]) -> str | None:
    """What is wrong with a Triton and a GPU, or with both together."""
    if version < (3, 6):
        return f"needs Triton 3.6 or newer, which PyTorch 2.10 brings, but this is {version[0]}.{version[1]}"
    if version >= (3, 9):
        return f"Triton {version[0]}.{version[1]} is newer than what was tried, 3.6 to 3.8"
    if capability < (8, 0):
        return f"needs compute capability 8.0 or newer, but this GPU has {capability[0]}.{capability[1]}"
    if capability[0] == 11 and version < (3, 7):
        return (
            f"Triton {version[0]}.{version[1]} cannot compile for sm_{capability[0]}{capability[1]}: it needs 3.7 or newer"
        )
    return None


@functools.cache
def _build_failure() -> str | None:
    """Why Triton cannot launch here: it builds its driver with a C compiler when it is first needed."""
    try:
        _ = triton.runtime.driver.active.utils
    except Exception as error:  # whatever that compiler or the driver says
        return (
            f"Triton cannot build its launcher ({type(error).__name__}: {error}); it needs a C compiler and Python's headers"
        )
    return None


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cpu":
        if not _interpreted():
            return "it serves CPU tensors under TRITON_INTERPRET=1 only"
        # The interpreter multiplies bfloat16 matrices wrongly.
        return None if dtype in (torch.float32, torch.float16) else f"interpreted, it does not serve {dtype}"
    if device.type != "cuda" or _interpreted():
        return f"it does not serve tensors on {device.type} here"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it does not serve {dtype}"
    return _unsupported(_version(), _capability(device))


class _Kernels:
    """:class:`..kernels.Kernels` in Triton, by its public launcher."""

    def streams(self, problem: Problem, classes: int) -> int:
        device = problem.weight.device
        c = _tile(device, problem.compute_dtype, problem.subcentres)
        blocks, tiles = _ceil(problem.features.shape[0], c.rows), _ceil(classes, c.classes)
        return streams_for(_multiprocessors(device) * c.resident, blocks, tiles)

    def prepare_rows(self, problem: Problem, s: float | Tensor, rows: Rows) -> None:
        features, weight, width = problem.features, problem.weight, rows.x_hat.shape[1]
        forward_kernels.prepare_rows[(features.shape[0],)](
            features, *features.stride(), weight, *weight.stride(), problem.labels, s,
            rows.x_hat, rows.cosine, rows.norm, rows.factor, rows.shift, *weight.shape, width,
            isinstance(s, Tensor), problem.normalize_features, _tf32(rows.x_hat), _power_of_2(width),
        )  # fmt: skip

    def prepare_centres(self, weight: Tensor, w_hat: Tensor, inverse_norm: Tensor) -> None:
        block, rows = _rows_a_program(w_hat.shape[1])
        forward_kernels.prepare_centres[(_ceil(weight.shape[0], rows),)](
            weight, *weight.stride(), w_hat, inverse_norm, *weight.shape, w_hat.shape[1], _tf32(w_hat), rows, block
        )

    def cosine_exp(self, problem: Problem, start: int, rows: Rows, w_hat: Tensor, out: Cosines) -> None:
        x_hat, factor = rows.x_hat, rows.factor
        c = _tile(x_hat.device, x_hat.dtype, problem.subcentres)
        stored = x_hat if out.terms is None else out.terms
        operands: list[Any] = [x_hat, w_hat, stored]
        if c.bulk:
            tiles = ([c.rows, c.depth], [c.classes, c.depth], [c.rows, c.classes])
            operands = [TensorDescriptor.from_tensor(*each) for each in zip(operands, tiles, strict=True)]
        parts = out.best if out.z is None else out.z
        streams = self.streams(problem, w_hat.shape[0]) if parts is None else parts.shape[0]
        for_shift = out.z is None and out.best is not None
        # The next tile's operands are on their way while this one is finished. Triton 3.8 spills registers if it stores too.
        flatten = c.bulk and (out.terms is None or _version() < (3, 8))
        forward_kernels.cosine_exp[(_ceil(x_hat.shape[0], c.rows), streams)](
            *operands, problem.labels, factor, rows.shift, out.z, out.best, out.best_class,
            x_hat.shape[0], w_hat.shape[0], x_hat.shape[1], stored.shape[1], stored.stride(0), start,
            problem.interclass_filter,
            ONLY_UNBOUNDED=for_shift, SHIFT=rows.shift is not None, SUM=out.z is not None,
            STORE=out.terms is not None, BEST=out.best is not None, FILTER=problem.interclass_filter <= 1, BULK=c.bulk,
            SUBCENTRES=problem.subcentres, GROUP=Columns(problem.subcentres).group,
            PRECISION="tf32" if _tf32(x_hat) else "ieee", BLOCK_B=c.rows, BLOCK_C=c.classes, BLOCK_D=c.depth,
            FLATTEN=flatten, num_stages=c.stages, num_warps=c.warps,
        )  # fmt: skip

    def reduce_sums(self, z_parts: Tensor, labels: Tensor, z: Tensor) -> None:
        parts, B = z_parts.shape[0] * z_parts.shape[1], z.shape[0]
        forward_kernels.reduce_sums[(_ceil(B, 32),)](z_parts, labels, z, B, parts, ROWS=32, PARTS=32)

    def reduce_best(self, best_parts: Tensor, class_parts: Tensor, best: Tensor, best_class: Tensor) -> None:
        parts, B = best_parts.shape[0] * best_parts.shape[1], best.shape[0]
        kernel = forward_kernels.reduce_best[(_ceil(B, 32),)]
        kernel(best_parts, class_parts, best, best_class, B, parts, ROWS=32, PARTS=32)

    def reduce_shift(self, best_parts: Tensor, class_parts: Tensor, factor: Tensor, shift: Tensor) -> None:
        parts, B = best_parts.shape[0] * best_parts.shape[1], shift.shape[0]
        forward_kernels.reduce_shift[(_ceil(B, 32),)](best_parts, factor, shift, B, parts, ROWS=32, PARTS=32)

    def additive_margin(
        self, problem: Problem, z_parts: Tensor, out: Forward, s: float | Tensor, margin: float, mean: bool
    ) -> None:  # fmt: skip
        parts, B = z_parts.shape[0] * z_parts.shape[1], z_parts.shape[2]
        forward_kernels.additive_margin[(_ceil(B, 32),)](
            z_parts, out.shift, out.cosine, out.norm, problem.labels, s, margin, out.loss, out.derivatives,
            B, parts, problem.weight.shape[0], isinstance(s, Tensor), problem.normalize_features, mean, ROWS=32, PARTS=32,
        )  # fmt: skip

    def factor_rows(self, problem: Problem, norm: Tensor, row_factor: Tensor, s: float | Tensor, out: Factored) -> None:
        features, width = problem.features, out.x_factored.shape[1]
        backward_kernels.factor_rows[(features.shape[0],)](
            features, *features.stride(), problem.labels, norm, row_factor, s,
            out.x_factored, out.x_hat, out.factor, features.shape[1], width,
            isinstance(s, Tensor), problem.normalize_features, _tf32(out.x_factored), _power_of_2(width),
        )  # fmt: skip

    def grad_centres(self, terms: Tensor, x_factored: Tensor, weight: Tensor, inverse_norm: Tensor, grad: Tensor) -> bool:
        c = _gradient_config(grad.device)
        if c is None or x_factored.dtype == torch.float32 or not c.serves(x_factored.shape[1]):
            return False
        if weight.dtype != grad.dtype or not (_in_sixteens(weight) and _in_sixteens(grad)):
            return False  # read and written in smaller pieces it would not fit the registers
        columns = max(_power_of_2(x_factored.shape[1]), 32)
        backward_kernels.grad_centres[(_ceil(grad.shape[0], c.classes),)](
            TensorDescriptor.from_tensor(terms, [c.rows, c.classes]),
            TensorDescriptor.from_tensor(x_factored, [c.rows, columns]),
            weight, weight.stride(0), inverse_norm, grad, x_factored.shape[0], *grad.shape,
            BLOCK_B=c.rows, BLOCK_C=c.classes, BLOCK_D=columns,
            num_stages=c.stages, num_warps=c.warps,
        )  # fmt: skip
        return True

    def finish_centres(self, grad_unit: Tensor, weight: Tensor, inverse_norm: Tensor, grad: Tensor) -> None:
        block, rows = _rows_a_program(grad_unit.shape[1])
        backward_kernels.finish_centres[(_ceil(grad.shape[0], rows),)](
            grad_unit, weight, *weight.stride(), inverse_norm, grad, *grad.shape, grad_unit.shape[1], rows, block
        )

    def update_centres(
        self, grad: Tensor, weight: Tensor, inverse_norm: Tensor, parts: TargetParts, start: int, update: Update,
        whole: bool, out: Tensor | None,
    ) -> None:  # fmt: skip
        N, D = weight.shape
        block, rows = _rows_a_program(grad.shape[1])
        programs, unused = _ceil(N, rows), update.weight
        skipped = parts.slots.new_empty(programs)
        state = (*update.state, unused, unused)
        rule, applied = update.rule, out is None
        adam, nesterov = isinstance(rule, AdamW), getattr(rule, "nesterov", False)
        flags = (update.rows is not None, update.seed is not None, adam, len(update.state) > 0, nesterov)
        update_kernels.update_centres[(programs,)](
            grad, weight, *weight.stride(), inverse_norm, parts.slots, parts.rows, out,
            parts.slots if update.rows is None else update.rows[start : start + N], update.weight, state[0], state[1],
            skipped, *update.keys(), N, start, update.class_start, D, grad.shape[1], update.loss_scale, *rule.numbers(),
            whole, applied, *(applied and flag for flag in flags), rows, block,
        )  # fmt: skip
        if applied:
            update.tally.count(skipped.sum())

    def finish_rows(self, problem: Problem, saved: Forward, s: float | Tensor, upstream: Upstream, grads: Grads) -> None:
        features, weight = problem.features, problem.weight
        B, D = features.shape
        width = padded(D)
        backward_kernels.finish_rows[(B,)](
            features, *features.stride(), weight, *weight.stride(), problem.labels, saved.norm, saved.cosine, s,
            *upstream[:3], saved.rows, *grads, B, weight.shape[0], D, width,
            isinstance(s, Tensor), problem.normalize_features, _power_of_2(width), 1024,
        )  # fmt: skip


def _ceil(size: int, block: int) -> int:
    """Blocks that cover ``size``."""
    return -(-size // block)


def _interpreted() -> bool:
    return _import_error is None and triton.knobs.runtime.interpret


def _tf32(operand: Tensor) -> bool:
    return kind(operand.dtype) == "tf32"


def _config(device: torch.device, dtype: torch.dtype) -> Config:
    return _INTERPRETED if device.type == "cpu" else config(_capability(device), kind(dtype))


def _tile(device: torch.device, dtype: torch.dtype, subcentres: int) -> Config:
    c = _config(device, dtype)
    # To find each class's nearest takes registers that the widest tile has not.
    return c if subcentres == 1 or c.classes <= 128 else dataclasses.replace(c, classes=128)


@functools.cache
def _version() -> tuple[int, int]:
    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


def _in_sixteens(tensor: Tensor) -> bool:
    """Whether Triton can know that rows start at multiples of 16 bytes, and of 16 elements."""
    rows = tensor.stride(0) % _IN_SIXTEENS == 0 and tensor.stride(1) == 1 and tensor.shape[1] % _IN_SIXTEENS == 0
    return rows and tensor.data_ptr() % _IN_SIXTEENS == 0


def _gradient_config(device: torch.device) -> GradientConfig | None:
    return _INTERPRETED_GRADIENT if device.type == "cpu" else GRADIENT.get(_capability(device)[0])


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _rows_a_program(width: int) -> tuple[int, int]:
    """Columns, padded to a power of two, and centres that one program of the memory-bound passes takes."""
    block = _power_of_2(width)
    return block, max(2048 // block, 1)


def _power_of_2(size: int) -> int:
    """The next; triton.next_power_of_2 takes microseconds, as it also serves kernels."""
    return 1 << (size - 1).bit_length()


fused = Fused("triton", _Kernels())
forward, backward = fused.forward, fused.backward
