"""The backward pass's Triton kernels: a∘x̂, the centres' gradient, and the rows' and targets' part.

E is made again by :func:`.forward_kernels.cosine_exp` where it was not kept. As there, every sum has one owner and a fixed
order, and offsets into the centres are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward_kernels import _factor, _inverse, _operand, _scale

INTERPRETED: bool = triton.knobs.runtime.interpret


@triton.jit(do_not_specialize=["row_factor"])
def factor_rows(
    features, stride_row, stride_column,  # [B, D] float32, bfloat16 or float16
    labels,  # [B] int64, negative where ignored
    norm,  # [B] float32
    row_factor,  # [B] float32: the gradient by log z, over z
    scale,  # s: a number, or a pointer to a float32
    x_factored,  # [B, D_padded] in the dtype of E
    x_hat, factor,  # [B, D_padded] in the operand dtype and [B] float32, as in prepare_rows; None: not wanted
    D, D_padded,
    SCALE_ON_DEVICE: tl.constexpr, NORMALIZE: tl.constexpr, TF32: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program multiplies a row's x̂ by a, row_factor times the logits' scale; it writes x̂ too if E is recomputed."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    label = tl.load(labels + row)
    x = tl.load(features + row * stride_row + columns * stride_column, mask=(columns < D) & (label >= 0), other=0.0)
    length = tl.load(norm + row)
    x = x.to(tl.float32) * _inverse(length)
    s = _scale(scale, length, SCALE_ON_DEVICE, NORMALIZE)
    factored = _operand(x * (tl.load(row_factor + row) * s), x_factored.dtype.element_ty, TF32)
    tl.store(x_factored + row * D_padded + columns, factored, mask=columns < D_padded)
    if x_hat is not None:
        tl.store(x_hat + row * D_padded + columns, _operand(x, x_hat.dtype.element_ty, TF32), mask=columns < D_padded)
        tl.store(factor + row, _factor(scale, length, SCALE_ON_DEVICE, NORMALIZE))


@triton.jit(do_not_specialize=["N"])
def finish_centres(
    grad_unit,  # [N, D_padded] float32: dŵ
    weight, stride_class, stride_dim,  # [N, D], a chunk's; float32, bfloat16 or float16
    inverse_norm,  # [N] float32
    grad,  # [N, D] in the dtype of weight; may be grad_unit itself
    N, D, D_padded,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program makes dw = (dŵ − (dŵ·ŵ) ŵ)/‖w‖ of ROWS classes."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    g = tl.load(grad_unit + rows[:, None] * D_padded + columns[None, :], mask=inside, other=0.0)
    w = tl.load(weight + rows[:, None] * stride_class + columns[None, :] * stride_dim, mask=inside, other=0.0)
    inverse = tl.load(inverse_norm + rows, mask=rows < N, other=0.0)
    unit = w.to(tl.float32) * inverse[:, None]
    along = tl.sum(g * unit, 1)
    g = (g - along[:, None] * unit) * inverse[:, None]
    tl.store(grad + rows[:, None] * D + columns[None, :], g.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's columns in two parts, in order."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _eighths(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's columns in eight parts, in order."""
    left, right = _halves(tile, ROWS, COLUMNS)
    first, second = _halves(left, ROWS, COLUMNS // 2)
    third, fourth = _halves(right, ROWS, COLUMNS // 2)
    WIDTH: tl.constexpr = COLUMNS // 4
    return (
        _halves(first, ROWS, WIDTH)
        + _halves(second, ROWS, WIDTH)
        + _halves(third, ROWS, WIDTH)
        + _halves(fourth, ROWS, WIDTH)
    )


@triton.jit
def _load_centres(weight, stride_class, first_row, first_column, N, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A float32 tile of the centres, the offsets of its elements in a contiguous ``[N, D]``, and which lie inside."""
    rows = (first_row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = (first_column + tl.arange(0, COLUMNS))[None, :]
    inside = (rows < N) & (columns < D)
    w = tl.load(weight + rows * stride_class + columns, mask=inside, other=0.0)
    return w.to(tl.float32), rows * D + columns, inside


@triton.jit
def _add_product(total, e, x, WIDER: tl.constexpr = INTERPRETED):
    """total + eᵀx. The interpreter multiplies bfloat16 matrices wrongly."""
    if WIDER:
        e, x = e.to(tl.float32), x.to(tl.float32)
    return tl.dot(e.T, x, total)


@triton.jit(do_not_specialize=["B", "N"])
def grad_centres(
    terms,  # E [B, N or a little more] bfloat16; a descriptor
    x_factored,  # a∘x̂ [B, D_padded] bfloat16; a descriptor
    weight, stride_class,  # [N, D], a chunk's; float32, bfloat16 or float16; its columns are contiguous
    inverse_norm,  # [N] float32
    grad,  # [N, D] in the dtype of weight
    B, N, D,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program multiplies dŵ = Eᵀ(a∘x̂) of BLOCK_C classes, whole rows, and makes dw = (dŵ − (dŵ·ŵ) ŵ)/‖w‖ of it.

    The centres are read twice, an eighth of their columns at a time: whole rows beside dŵ would not fit the registers.
    """
    first = tl.program_id(0) * BLOCK_C
    g = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for row in range(0, B, BLOCK_B):
        e = terms.load([row, first])
        x = x_factored.load([row, 0])
        g = _add_product(g, e, x)
    rows = first + tl.arange(0, BLOCK_C)
    inverse = tl.load(inverse_norm + rows, mask=rows < N, other=0.0)
    parts = _eighths(g, BLOCK_C, BLOCK_D)
    WIDTH: tl.constexpr = BLOCK_D // 8
    along = tl.zeros([BLOCK_C], tl.float32)
    for part in tl.static_range(8):
        w, _, _ = _load_centres(weight, stride_class, first, part * WIDTH, N, D, BLOCK_C, WIDTH)
        along += tl.sum(parts[part] * (w * inverse[:, None]), 1)
    for part in tl.static_range(8):
        w, places, inside = _load_centres(weight, stride_class, first, part * WIDTH, N, D, BLOCK_C, WIDTH)
        dw = (parts[part] - along[:, None] * (w * inverse[:, None])) * inverse[:, None]
        tl.store(grad + places, dw.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _narrow(values, pointer):
    """Float64 to what is stored; by way of float32, as the interpreter converts to bfloat16 from nothing else."""
    return values.to(tl.float32).to(pointer.dtype.element_ty)


@triton.jit
def _targets_part(
    features, stride_row, stride_column, labels, norm, cosine, grad_cosine, w_unit, label, row, B, D,
    BLOCK: tl.constexpr, BLOCK_LABELS: tl.constexpr,
):  # fmt: skip
    """Σ τ(x̂ − t·ŵ) over the rows of ``label``'s class from ``row`` on, in order: times 1/‖w‖ the targets' part of dw."""
    columns = tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range((row // BLOCK_LABELS) * BLOCK_LABELS, B, BLOCK_LABELS):
        others = start + tl.arange(0, BLOCK_LABELS)
        same = (others >= row) & (tl.load(labels + others, mask=others < B, other=-1) == label)
        other = tl.min(tl.where(same, others, B), 0)
        while other < B:
            place = features + other.to(tl.int64) * stride_row + columns * stride_column
            x = tl.load(place, mask=columns < D, other=0.0).to(tl.float64)
            x_unit = x * _inverse(tl.load(norm + other).to(tl.float64))
            t = tl.load(cosine + other).to(tl.float64)
            total += tl.load(grad_cosine + other).to(tl.float64) * (x_unit - t * w_unit)
            other = tl.min(tl.where(same & (others > other), others, B), 0)
    return total


@triton.jit(do_not_specialize=["B", "C", "row_factor", "grad_cosine", "grad_norm"])
def finish_rows(
    features, stride_row, stride_column,  # [B, D] float32, bfloat16 or float16
    weight, stride_class, stride_dim,  # [C, D] float32, bfloat16 or float16
    labels,  # [B] int64: negative where ignored, C or more where the class is not in this shard
    norm, cosine,  # [B] float32
    scale,  # s: a number, or a pointer to a float32
    row_factor, grad_cosine, grad_norm,  # [B] float32: the gradients by log z, over z; by t; by ‖x‖, or None
    unit_rows,  # [B, D_padded] float32: Σ_j E ŵ_j, read for the gradients of features and scale
    grad_features,  # [B, D] in the dtype of features; this one and the next two are None where not wanted
    grad_weight,  # [C, D] in the dtype of weight, complete but for the targets, which are added
    grad_scale,  # [B] float64: each row's part of the gradient of s through z
    B, C, D, D_padded,
    SCALE_ON_DEVICE: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_LABELS: tl.constexpr,
):  # fmt: skip
    """A program makes dx of a row and, if the row is the first of its class, adds the targets' part of that class's dw.

    A class's rows are added one after the other: a batch of few classes takes a microsecond or so for each row of one.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    inside = columns < D
    label = tl.load(labels + row)
    present = (label >= 0) & (label < C)
    target = tl.where(present, label, 0)
    w = tl.load(weight + target * stride_class + columns * stride_dim, mask=inside, other=0.0).to(tl.float64)
    w_inverse = _inverse(tl.sqrt(tl.sum(w * w, 0)))
    w_unit = w * w_inverse

    if grad_features is not None or grad_scale is not None:
        x = tl.load(features + row * stride_row + columns * stride_column, mask=inside & (label >= 0), other=0.0)
        length = tl.load(norm + row)
        x_inverse = _inverse(length.to(tl.float64))
        x_unit = x.to(tl.float64) * x_inverse
        a = tl.load(row_factor + row).to(tl.float64)
        sums = tl.load(unit_rows + row * D_padded + columns, mask=inside, other=0.0).to(tl.float64)
        along = tl.sum(sums * x_unit, 0)
        if grad_scale is not None:
            tl.store(grad_scale + row, a * along)
        if grad_features is not None:
            tau = tl.where(present, tl.load(grad_cosine + row).to(tl.float64), 0.0) * x_inverse
            t = tl.load(cosine + row).to(tl.float64)
            if NORMALIZE:
                a *= _scale(scale, length, SCALE_ON_DEVICE, NORMALIZE).to(tl.float64) * x_inverse
                dx = a * (sums - along * x_unit)
            else:
                dx = tl.where(x_inverse == 0.0, 0.0, a) * sums
            dx += tau * (w_unit - t * x_unit)
            if grad_norm is not None:
                dx += tl.load(grad_norm + row).to(tl.float64) * x_unit
            dx = tl.where(label < 0, 0.0, dx)  # whatever its features or the centres are
            tl.store(grad_features + row * D + columns, _narrow(dx, grad_features), mask=inside)

    if grad_weight is not None:
        earlier = tl.zeros([BLOCK_LABELS], tl.int32)
        for start in range(0, row, BLOCK_LABELS):
            others = start + tl.arange(0, BLOCK_LABELS)
            earlier += (tl.load(labels + others, mask=others < row, other=-1) == label).to(tl.int32)
        if present & (tl.sum(earlier, 0) == 0):
            part = _targets_part(
                features, stride_row, stride_column, labels, norm, cosine, grad_cosine, w_unit, label, row, B, D,
                BLOCK, BLOCK_LABELS,
            )  # fmt: skip
            place = grad_weight + target * D + columns
            dw = tl.load(place, mask=inside, other=0.0).to(tl.float64) + part * w_inverse
            tl.store(place, _narrow(dw, grad_weight), mask=inside)
