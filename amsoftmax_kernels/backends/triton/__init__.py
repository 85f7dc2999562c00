"""The fused decomposition on Triton kernels: CUDA GPUs from compute capability 8.0 on, or a CPU under TRITON_INTERPRET=1."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import Forward, Problem
from ..chunking import kind, padded
from ..fused import Fused, streams_for
from ..kernels import RawLabels
from ..triton_launch import launch, version
from .tiles import GRADIENT, Config, GradientConfig, config

try:
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    from . import backward as gradients
    from . import forward as kernels
except ImportError as error:
    _import_error: str | None = f"{error}; pip install 'triton>=3.6,<3.9'"
else:
    _import_error = None

_MIN_CAPABILITY = (8, 0)
_IN_SIXTEENS = 16
_MIN_VERSION = (3, 6)  # of Triton: what the kernels are compiled and read with
_INTERPRETED = Config(rows=16, classes=32, depth=16, stages=1, warps=4, bulk=True, split=True, masked=True)
_INTERPRETED_GRADIENT = GradientConfig(
    rows=16,
    classes=16,
    columns=32,
    stages=1,
    warps=4,
    most_rows=1 << 62,
    most_columns=128,
    product_rows=16,
    product_depth=16,
)


def unavailable_reason() -> str | None:
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA GPU that this PyTorch can use"
    if _import_error is not None:
        return _import_error
    if torch.version.hip is not None:
        return "ROCm has not been tried"
    if version(triton.__version__) < _MIN_VERSION:
        return f"needs Triton 3.6 or newer, which PyTorch 2.10 brings, but this is {triton.__version__}"
    reason = _build_failure()
    if reason is not None:
        return reason
    capability = _capability(torch.device("cuda", torch.cuda.current_device()))
    if capability < _MIN_CAPABILITY:
        return f"needs compute capability 8.0 or newer, but this GPU has {capability[0]}.{capability[1]}"
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


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type == "cpu":  # the interpreter multiplies bfloat16 matrices wrongly
        return _interpreted() and dtype in (torch.float32, torch.float16)
    return (
        device.type == "cuda"
        and not _interpreted()
        and dtype in (torch.float32, torch.float16, torch.bfloat16)
        and _capability(device) >= _MIN_CAPABILITY
    )


class _Kernels:
    """:class:`.fused.Kernels` in Triton."""

    def streams(self, problem: Problem, classes: int) -> int:
        return self._programs(problem, classes)[1]

    def _programs(self, problem: Problem, classes: int) -> tuple[int, int]:
        device = problem.weight.device
        c = _config(device, problem.compute_dtype)
        blocks = -(-problem.features.shape[0] // c.rows)
        return blocks, streams_for(_multiprocessors(device) * c.resident, blocks, -(-classes // c.classes))

    def canonical_labels(self, labels: Tensor, ignore_index: int, num_classes: int, result: Tensor, count: Tensor) -> None:
        launch(kernels.canonical_labels, (1,), labels, ignore_index, result, count, labels.shape[0], num_classes, 1024)

    def prepare_rows(
        self, problem: Problem, raw: RawLabels | None, s: float | Tensor, x_hat: Tensor, cosine: Tensor, norm: Tensor,
        factor: Tensor, shift: Tensor, w_hat: Tensor | None, inverse_norm: Tensor,
    ) -> None:  # fmt: skip
        features, weight = problem.features, problem.weight
        width = x_hat.shape[1]
        block, rows = _rows_a_program(width)
        centres = 0 if w_hat is None else -(-weight.shape[0] // rows)
        given, ignore_index, count = (problem.labels, 0, problem.labels) if raw is None else raw
        launch(
            kernels.prepare_rows, ((raw is not None) + features.shape[0] + centres,),
            features, *features.stride(), weight, *weight.stride(), problem.labels, given, ignore_index, count,
            s, x_hat, cosine, norm, factor, shift,
            x_hat if w_hat is None else w_hat, inverse_norm, features.shape[0], *weight.shape, width,
            raw is not None, isinstance(s, Tensor), problem.normalize_features, _tf32(x_hat), w_hat is not None, rows, block,
            1024,
        )  # fmt: skip

    def prepare_centres(self, weight: Tensor, w_hat: Tensor, inverse_norm: Tensor, unless_bounded: Tensor | None) -> None:
        block, rows = _rows_a_program(w_hat.shape[1])
        launch(
            kernels.prepare_centres, (-(-weight.shape[0] // rows),),
            weight, *weight.stride(), w_hat, inverse_norm, inverse_norm if unless_bounded is None else unless_bounded,
            *weight.shape, w_hat.shape[1], unless_bounded is not None, _tf32(w_hat), rows, block,
        )  # fmt: skip

    def cosine_exp(
        self, problem: Problem, start: int, x_hat: Tensor, w_hat: Tensor, factor: Tensor, shift: Tensor | None,
        terms: Tensor | None, z: Tensor | None, best: Tensor | None, best_class: Tensor | None, only_unbounded: bool,
    ) -> None:  # fmt: skip
        c = _config(x_hat.device, x_hat.dtype)
        stored = x_hat if terms is None else terms
        operands: list[Any] = [x_hat, w_hat, stored]
        if c.bulk:
            columns = c.classes // 2 if c.split else c.classes
            tiles = ([c.rows, c.depth], [c.classes, c.depth], [c.rows, columns])
            operands = [TensorDescriptor.from_tensor(*each) for each in zip(operands, tiles, strict=True)]
        parts = z if z is not None else best
        blocks, streams = self._programs(problem, w_hat.shape[0])
        launch(
            kernels.cosine_exp, (blocks, streams if parts is None else parts.shape[0]),
            *operands,
            problem.labels, factor, factor if shift is None else shift,
            factor if z is None else z, factor if best is None else best, factor if best_class is None else best_class,
            x_hat.shape[0], w_hat.shape[0], x_hat.shape[1], stored.shape[1], stored.stride(0), start,
            problem.interclass_filter,
            ONLY_UNBOUNDED=only_unbounded, SHIFT=shift is not None, SUM=z is not None, STORE=terms is not None,
            BEST=best is not None, MASKED=c.masked, FILTER=problem.interclass_filter <= 1, BULK=c.bulk,
            PRECISION="tf32" if _tf32(x_hat) else "ieee",
            BLOCK_B=c.rows, BLOCK_C=c.classes, BLOCK_D=c.depth, SPLIT=c.split, FLATTEN=c.bulk,
            num_stages=c.stages, num_warps=c.warps,
        )  # fmt: skip

    def reduce_sums(self, z_parts: Tensor, labels: Tensor, z: Tensor) -> None:
        parts = z_parts.shape[0] * z_parts.shape[1]
        launch(kernels.reduce_sums, (-(-z.shape[0] // 32),), z_parts, labels, z, z.shape[0], parts, ROWS=32, PARTS=32)

    def reduce_best(self, best_parts: Tensor, class_parts: Tensor, best: Tensor, best_class: Tensor) -> None:
        self._reduce_best(best_parts, class_parts, best, best, best_class, best, False)

    def reduce_shift(self, best_parts: Tensor, class_parts: Tensor, factor: Tensor, shift: Tensor) -> None:
        self._reduce_best(best_parts, class_parts, factor, shift, shift, shift, True)

    def _reduce_best(self, best_parts: Tensor, class_parts: Tensor, *vectors: Any) -> None:
        chunks, streams, batch = best_parts.shape
        *tensors, is_shift = vectors
        launch(
            kernels.reduce_best, (-(-batch // 32),),
            best_parts, class_parts, *tensors, batch, chunks * streams, SHIFT=is_shift, ROWS=32, PARTS=32,
        )  # fmt: skip

    def constant_margin(
        self, problem: Problem, saved: Forward, z_parts: Tensor | None, num_rows: Tensor, s: float | Tensor, margin: float,
        reduction: str, loss: Tensor, derivatives: Tensor, x_factored: Tensor | None,
    ) -> None:  # fmt: skip
        features, reduced = problem.features, reduction != "none"
        if features.shape[0] + reduced == 0:
            return
        width = padded(features.shape[1])
        parts = 0 if z_parts is None else z_parts.shape[0] * z_parts.shape[1]
        launch(
            kernels.constant_margin, (features.shape[0] + reduced,),
            saved.z if z_parts is None else z_parts, saved.z, saved.shift, saved.cosine, saved.norm, problem.labels,
            num_rows, s, margin, loss, derivatives, features, *features.stride(),
            loss if x_factored is None else x_factored, features.shape[0], *problem.weight.shape, width, parts,
            z_parts is not None, x_factored is not None, isinstance(s, Tensor), problem.normalize_features,
            reduced, reduction == "mean", derivatives.shape[0] == 3, x_factored is not None and _tf32(x_factored),
            _power_of_2(width), PARTS=64, LOSS_ROWS=512, LOSS_PARTS=16, num_warps=8,
        )  # fmt: skip

    def factor_rows(
        self, problem: Problem, norm: Tensor, row_factor: Tensor, s: float | Tensor, x_factored: Tensor,
        x_hat: Tensor | None, factor: Tensor | None,
    ) -> None:  # fmt: skip
        features, width = problem.features, x_factored.shape[1]
        launch(
            gradients.factor_rows, (features.shape[0],),
            features, *features.stride(), problem.labels, norm, row_factor, s, x_factored,
            x_factored if x_hat is None else x_hat, norm if factor is None else factor,
            features.shape[1], width, isinstance(s, Tensor), problem.normalize_features, x_hat is not None,
            _tf32(x_factored), _power_of_2(width),
        )  # fmt: skip

    def grad_centres(
        self, terms: Tensor, x_factored: Tensor, weight: Tensor, inverse_norm: Tensor, grad: Tensor, upstream: Tensor | None
    ) -> bool:
        c = self._gradient(x_factored, weight, grad)
        if c is None:
            return False
        programs = min(_multiprocessors(grad.device), -(-grad.shape[0] // c.classes))
        operands, how = self._of_gradient(c, programs, terms, x_factored, weight, inverse_norm, grad, upstream)
        launch(gradients.grad_centres, (programs,), *operands, x_factored.shape[0], *grad.shape, **how)
        return True

    def _gradient(self, x_factored: Tensor, weight: Tensor, grad: Tensor) -> GradientConfig | None:
        """How the centres' gradient is made at once, if it is."""
        c = _gradient_config(grad.device)
        if c is None or x_factored.dtype == torch.float32 or not c.serves(*x_factored.shape):
            return None
        if weight.dtype != grad.dtype or not (_in_sixteens(weight) and _in_sixteens(grad)):
            return None  # read and written in smaller pieces it would not fit the registers
        if weight.stride(0) >= 1 << 31:
            return None  # the kernel has it as an int32
        return c

    def _of_gradient(
        self, c: GradientConfig, programs: int, terms: Tensor, x_factored: Tensor, weight: Tensor, inverse_norm: Tensor,
        grad: Tensor, upstream: Tensor | None,
    ) -> tuple[list[Any], dict[str, Any]]:  # fmt: skip
        """What both kernels that make it are given first, and last."""
        width = x_factored.shape[1]
        columns = c.columns_for(width)
        across = -(-width // columns)
        scratch = inverse_norm.new_empty(programs, c.classes, (across - 1) * columns)
        tiles = (terms, [c.rows, c.classes]), (x_factored, [c.rows, columns])
        operands = [
            *(TensorDescriptor.from_tensor(*each) for each in tiles), weight, *weight.stride(), inverse_norm,
            inverse_norm if upstream is None else upstream, grad, scratch,
        ]  # fmt: skip
        how = {
            "UPSTREAM": upstream is not None, "INTERPRETED": _interpreted(), "ACROSS": across,
            "BLOCK_B": c.rows, "BLOCK_C": c.classes, "BLOCK_D": columns, "num_stages": c.stages, "num_warps": c.warps,
        }  # fmt: skip
        return operands, how

    def parts_beside(self, problem: Problem) -> int:
        features, weight = problem.features, problem.weight
        # Of bfloat16 alone, as ŵ is in the dtype of E; the interpreter has no product of that.
        if problem.compute_dtype != (torch.float16 if _interpreted() else torch.bfloat16):
            return 0
        (B, D), c = features.shape, _gradient_config(weight.device)
        if c is None or D % _IN_SIXTEENS or weight.stride() != (D, 1):
            return 0
        if not c.serves(B, D):
            return 0
        return c.parts_beside(B, D, weight.shape[0], _multiprocessors(weight.device), weight.element_size())

    def grad_both(
        self, terms: Tensor, x_factored: Tensor, w_hat: Tensor, weight: Tensor, inverse_norm: Tensor, grad: Tensor,
        upstream: Tensor | None, parts: Tensor,
    ) -> bool:  # fmt: skip
        c = self._gradient(x_factored, weight, grad)
        if c is None:
            return False
        N, (count, B, width) = grad.shape[0], parts.shape
        programs = -(-N // c.classes)
        operands, how = self._of_gradient(c, programs, terms, x_factored, weight, inverse_norm, grad, upstream)
        tiles = (terms, [c.product_rows, c.product_depth]), (w_hat, [c.product_depth, c.columns_for(width)])
        depth = -(-N // (count * c.product_depth)) * c.product_depth
        launch(
            gradients.grad_both, (programs + count * c.product_tiles(B, width),),
            *operands, *(TensorDescriptor.from_tensor(*each) for each in tiles), parts, programs, depth,
            B, *grad.shape, width, **how, ROWS=c.product_rows, DEPTH=c.product_depth,
        )  # fmt: skip
        return True

    def finish_centres(
        self, grad_unit: Tensor, weight: Tensor, inverse_norm: Tensor, grad: Tensor, upstream: Tensor | None
    ) -> None:
        block, rows = _rows_a_program(grad_unit.shape[1])
        launch(
            gradients.finish_centres, (-(-grad.shape[0] // rows),),
            grad_unit, weight, *weight.stride(), inverse_norm, inverse_norm if upstream is None else upstream,
            grad, *grad.shape, grad_unit.shape[1], upstream is not None, rows, block,
        )  # fmt: skip

    def finish_rows(
        self, problem: Problem, saved: Forward, s: float | Tensor, row_factor: Tensor, grad_cosine: Tensor,
        grad_norm: Tensor | None, upstream: Tensor | None,
        grad_features: Tensor | None, grad_weight: Tensor | None, grad_scale: Tensor | None,
    ) -> None:  # fmt: skip
        features, weight = problem.features, problem.weight
        B, D = features.shape
        width = padded(D)
        launch(
            gradients.finish_rows, (B,),
            features, *features.stride(), weight, *weight.stride(), problem.labels, saved.norm, saved.cosine, s,
            row_factor, grad_cosine, row_factor if grad_norm is None else grad_norm,
            row_factor if upstream is None else upstream, saved.rows,
            *(row_factor if each is None else each for each in (grad_features, grad_weight, grad_scale)),
            saved.rows.shape[0] if saved.rows.dim() == 3 else 1, B, weight.shape[0], D, width,
            isinstance(s, Tensor), problem.normalize_features, grad_norm is not None, upstream is not None,
            grad_features is not None, grad_weight is not None, grad_scale is not None,
            8 if saved.rows.dim() == 3 else 1, _power_of_2(width), 1024,
        )  # fmt: skip


def _interpreted() -> bool:
    return _import_error is None and triton.knobs.runtime.interpret


def _tf32(operand: Tensor) -> bool:
    return kind(operand.dtype) == "tf32"


def _config(device: torch.device, dtype: torch.dtype) -> Config:
    return _INTERPRETED if device.type == "cpu" else config(_capability(device), kind(dtype))


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
canonical_labels, loss_at_once = fused.canonical_labels, fused.loss_at_once
forward, backward = fused.forward, fused.backward
forward_loss, backward_loss = fused.forward_loss, fused.backward_loss
