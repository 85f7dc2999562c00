"""The backward pass's Triton kernels, but for E itself: the centres' gradient, a∘x̂, and the rows' and targets' part.

As in :mod:`.forward` every sum has one owner and a fixed order, and offsets into the centres are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import LOG2E, _halves, _inverse, _operand, _scale


@triton.jit(do_not_specialize=["row_factor"])
def factor_rows(
    features, stride_row, stride_column,  # [B, D]
    labels, norm, row_factor, scale,  # [B], and s or a pointer to it
    x_factored,  # [B, D_padded] in the dtype of E
    x_hat, factor,  # [B, D_padded] in the operand dtype, [B]: written if RECOMPUTE
    D, D_padded,
    SCALE_ON_DEVICE: tl.constexpr, NORMALIZE: tl.constexpr, RECOMPUTE: tl.constexpr,
    TF32: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row a program: x̂ times a, the gradient by log z over z times the logits' scale; x̂ again if E is recomputed."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    label = tl.load(labels + row)
    x = tl.load(features + row * stride_row + columns * stride_column, mask=(columns < D) & (label >= 0), other=0.0)
    length = tl.load(norm + row)
    x = x.to(tl.float32) * _inverse(length)
    s = _scale(scale, length, SCALE_ON_DEVICE, NORMALIZE)
    factored = _operand(x * (tl.load(row_factor + row) * s), x_factored.dtype.element_ty, TF32)
    tl.store(x_factored + row * D_padded + columns, factored, mask=columns < D_padded)
    if RECOMPUTE:
        tl.store(x_hat + row * D_padded + columns, _operand(x, x_hat.dtype.element_ty, TF32), mask=columns < D_padded)
        tl.store(factor + row, s * LOG2E)


@triton.jit(do_not_specialize=["N", "upstream"])
def finish_centres(
    grad_unit,  # [N, D_padded] float32: the gradient by ŵ
    weight, stride_class, stride_dim,  # [C, D], from the chunk's first class
    inverse_norm,  # [N]
    upstream,  # a number to multiply by, if UPSTREAM
    grad,  # [N, D], may be grad_unit itself
    N, D, D_padded,
    UPSTREAM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dw = (dŵ − (dŵ·ŵ) ŵ)/‖w‖ of a chunk's classes in one pass."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    g = tl.load(grad_unit + rows[:, None] * D_padded + columns[None, :], mask=inside, other=0.0)
    w = tl.load(weight + rows[:, None] * stride_class + columns[None, :] * stride_dim, mask=inside, other=0.0)
    inverse = tl.load(inverse_norm + rows, mask=rows < N, other=0.0)
    outer = inverse
    if UPSTREAM:
        outer *= tl.load(upstream)
    unit = w.to(tl.float32) * inverse[:, None]
    along = tl.sum(g * unit, 1)
    g = (g - along[:, None] * unit) * outer[:, None]
    tl.store(grad + rows[:, None] * D + columns[None, :], g.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _quarters(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    left, right = _halves(tile, ROWS, COLUMNS)
    return _halves(left, ROWS, COLUMNS // 2) + _halves(right, ROWS, COLUMNS // 2)


@triton.jit
def _eighths(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    left, right = _halves(tile, ROWS, COLUMNS)
    return _quarters(left, ROWS, COLUMNS // 2) + _quarters(right, ROWS, COLUMNS // 2)


@triton.jit
def _unit(weight, stride_class, stride_dim, rows, columns, inverse, N, D):
    """A tile of ŵ, not rounded."""
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    w = tl.load(weight + rows[:, None] * stride_class + columns[None, :] * stride_dim, mask=inside, other=0.0)
    return w.to(tl.float32) * inverse[:, None]


@triton.jit
def _store_tangent(g, unit, along, outer, grad, stride_grad, rows, columns, N, D):
    """A tile of dw from those of dŵ and ŵ, given dŵ·ŵ of the whole rows."""
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    g = (g - along[:, None] * unit) * outer[:, None]
    tl.store(grad + rows[:, None] * stride_grad + columns[None, :], g.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _in_fours(stride, APPLIES: tl.constexpr):
    """A stride of centres of two bytes, of which Triton is to know no more than that it is a multiple of 4.

    Else it would load them by eights and lay out tiles so, but by fours what waits in float32: a tile of dŵ, which is needed
    beside both, would be there in both ways, which do not fit the registers.
    """
    if APPLIES:
        fours = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [stride // 4], tl.int32, is_pure=True, pack=1)
        stride = fours * 4
    return stride


@triton.jit
def _grad_centres(
    program, programs, terms, x_factored, weight, stride_class, stride_dim, inverse_norm, upstream, grad, scratch, B, N, D,
    UPSTREAM: tl.constexpr, INTERPRETED: tl.constexpr, ACROSS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dŵ = Eᵀ(a∘x̂) of a chunk's classes, and from it dw = (dŵ − (dŵ·ŵ) ŵ)/‖w‖.

    A program takes a tile of classes, its columns in ACROSS tiles one after the other. Those before the last wait in memory
    of the program's own, which stays in the L2 cache, until dŵ·ŵ of the whole rows is known.
    """
    WIDTH: tl.constexpr = BLOCK_D // 8
    MIXED: tl.constexpr = ACROSS > 1 and weight.dtype.element_ty != tl.float32 and not INTERPRETED
    stride_class, stride_grad = _in_fours(stride_class, MIXED), _in_fours(D, MIXED)
    scale = 1.0
    if UPSTREAM:
        scale = tl.load(upstream)
    slot = program.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    waiting = scratch + slot[:, None] * ((ACROSS - 1) * BLOCK_D)
    tiles = tl.cdiv(tl.cdiv(N, BLOCK_C) - program, programs)
    steps = tl.cdiv(B, BLOCK_B)
    along = tl.zeros([BLOCK_C], tl.float32)
    g = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    # One loop over all tiles' steps: operands of the next tile are on their way while this one is finished.
    for i in range(0, tiles * ACROSS * steps):
        tile = i // steps
        row = (i % steps) * BLOCK_B
        first = (program + (tile // ACROSS) * programs) * BLOCK_C
        column = (tile % ACROSS) * BLOCK_D
        e = terms.load([row, first])
        x = x_factored.load([row, column])
        if INTERPRETED:  # there bfloat16 products are wrong
            e, x = e.to(tl.float32), x.to(tl.float32)
        g = tl.dot(e.T, x, g)
        if row + BLOCK_B >= B:
            rows = first + tl.arange(0, BLOCK_C).to(tl.int64)
            inverse = tl.load(inverse_norm + rows, mask=rows < N, other=0.0)
            parts = _eighths(g, BLOCK_C, BLOCK_D)  # a whole tile of centres beside g would not fit the registers
            if column == 0:
                along = tl.zeros([BLOCK_C], tl.float32)
            for part in tl.static_range(8):
                columns = column + part * WIDTH + tl.arange(0, WIDTH).to(tl.int64)
                along += tl.sum(parts[part] * _unit(weight, stride_class, stride_dim, rows, columns, inverse, N, D), 1)
            if column < (ACROSS - 1) * BLOCK_D:
                for part in tl.static_range(8):
                    tl.store(waiting + (column + part * WIDTH + tl.arange(0, WIDTH))[None, :], parts[part])
            else:
                outer = inverse * scale
                for pair in tl.static_range(4):  # two at a time: loads do not pass stores, and each way to memory is long
                    columns = column + 2 * pair * WIDTH + tl.arange(0, WIDTH).to(tl.int64)
                    more = columns + WIDTH
                    unit = _unit(weight, stride_class, stride_dim, rows, columns, inverse, N, D)
                    unit_more = _unit(weight, stride_class, stride_dim, rows, more, inverse, N, D)
                    _store_tangent(parts[2 * pair], unit, along, outer, grad, stride_grad, rows, columns, N, D)
                    _store_tangent(parts[2 * pair + 1], unit_more, along, outer, grad, stride_grad, rows, more, N, D)
                if ACROSS > 1 and not INTERPRETED:
                    # Each thread loads what it stored itself, as Triton lays tiles out today; were it otherwise, this would
                    # order them, and the barriers of the steps between the next stores. (Around Triton's own barrier a
                    # loop's loads are not asynchronous.)
                    tl.inline_asm_elementwise(
                        "bar.sync 0; mov.b32 $0, $1;", "=r,r", [program], tl.int32, is_pure=False, pack=1
                    )
                for pair in tl.static_range((ACROSS - 1) * 4):
                    columns = 2 * pair * WIDTH + tl.arange(0, WIDTH).to(tl.int64)
                    more = columns + WIDTH
                    earlier, earlier_more = tl.load(waiting + columns[None, :]), tl.load(waiting + more[None, :])
                    unit = _unit(weight, stride_class, stride_dim, rows, columns, inverse, N, D)
                    unit_more = _unit(weight, stride_class, stride_dim, rows, more, inverse, N, D)
                    _store_tangent(earlier, unit, along, outer, grad, stride_grad, rows, columns, N, D)
                    _store_tangent(earlier_more, unit_more, along, outer, grad, stride_grad, rows, more, N, D)
            g = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)


@triton.jit(do_not_specialize=["B", "N", "upstream"])
def grad_centres(
    terms,  # [B, N or a little more] bfloat16; a descriptor
    x_factored,  # [B, D_padded] bfloat16; a descriptor
    weight, stride_class, stride_dim,  # [C, D], from the chunk's first class
    inverse_norm,  # [N]
    upstream,  # a number to multiply by, if UPSTREAM
    grad,  # [N, D]
    scratch,  # [programs, BLOCK_C, (ACROSS - 1)·BLOCK_D] float32
    B, N, D,
    UPSTREAM: tl.constexpr, INTERPRETED: tl.constexpr, ACROSS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of a chunk's centres."""
    _grad_centres(
        tl.program_id(0), tl.num_programs(0), terms, x_factored, weight, stride_class, stride_dim, inverse_norm, upstream,
        grad, scratch, B, N, D, UPSTREAM, INTERPRETED, ACROSS, BLOCK_B, BLOCK_C, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["programs", "B", "N", "depth", "upstream"])
def grad_both(
    terms, x_factored, weight, stride_class, stride_dim, inverse_norm, upstream, grad, scratch,  # as for grad_centres
    terms_rows,  # [B, N] terms again, by other tiles; a descriptor
    w_hat,  # [N, D_padded] bfloat16; a descriptor
    parts,  # [parts, B, D_padded] float32
    programs, depth, B, N, D, D_padded,
    UPSTREAM: tl.constexpr, INTERPRETED: tl.constexpr, ACROSS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The gradient of all centres by the first ``programs``, and Eŵ by those for which it leaves an SM.

    Each of these makes a tile of Eŵ over ``depth`` classes, a multiple of DEPTH; :func:`finish_rows` sums them.
    """
    if tl.program_id(0) < programs:
        _grad_centres(
            tl.program_id(0), programs, terms, x_factored, weight, stride_class, stride_dim, inverse_norm, upstream,
            grad, scratch, B, N, D, UPSTREAM, INTERPRETED, ACROSS, BLOCK_B, BLOCK_C, BLOCK_D,
        )  # fmt: skip
    else:
        number = tl.program_id(0) - programs
        part = number // (tl.cdiv(B, ROWS) * ACROSS)
        tile = number % (tl.cdiv(B, ROWS) * ACROSS)
        row, column = (tile // ACROSS) * ROWS, (tile % ACROSS) * BLOCK_D
        sums = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for start in range(part * depth, min((part + 1) * depth, N), DEPTH):
            e = terms_rows.load([row, start])
            w = w_hat.load([start, column])
            if INTERPRETED:
                e, w = e.to(tl.float32), w.to(tl.float32)
            sums = tl.dot(e, w, sums)
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, BLOCK_D)
        place = (part * B + rows).to(tl.int64)[:, None] * D_padded + columns[None, :]
        tl.store(parts + place, sums, mask=(rows < B)[:, None] & (columns < D_padded)[None, :])


@triton.jit
def _narrow(values, pointer):
    """Float64 to what is stored; by way of float32, as the interpreter converts to bfloat16 from nothing else."""
    return values.to(tl.float32).to(pointer.dtype.element_ty)


@triton.jit(do_not_specialize=["parts", "B", "C", "row_factor", "grad_cosine", "grad_norm", "upstream"])
def finish_rows(
    features, stride_row, stride_column,  # [B, D]
    weight, stride_class, stride_dim,  # [C, D]
    labels, norm, cosine, scale,  # [B], and s or a pointer to it
    row_factor, grad_cosine, grad_norm,  # [B]
    upstream,  # a number to multiply those by, if UPSTREAM
    unit_rows,  # [parts, B, D_padded] float32: Σ_j E ŵ_j in parts
    grad_features,  # [B, D]
    grad_weight,  # [C, D], complete but for the targets
    grad_scale,  # [B] float64, the parts of the gradient of s through z
    parts, B, C, D, D_padded,
    SCALE_ON_DEVICE: tl.constexpr, NORMALIZE: tl.constexpr, GRAD_NORM: tl.constexpr,
    UPSTREAM: tl.constexpr, FEATURES: tl.constexpr, WEIGHT: tl.constexpr, SCALE: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_LABELS: tl.constexpr,
):  # fmt: skip
    """A row a program: dx; and, by the first row of each class, the targets' part of that class's dw. In float64.

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
    outer = tl.full([], 1.0, tl.float64)
    if UPSTREAM:
        outer = tl.load(upstream).to(tl.float64)

    if FEATURES or SCALE:
        x = tl.load(features + row * stride_row + columns * stride_column, mask=inside & (label >= 0), other=0.0)
        length = tl.load(norm + row)
        x_inverse = _inverse(length.to(tl.float64))
        x_unit = x.to(tl.float64) * x_inverse
        a = tl.load(row_factor + row).to(tl.float64) * outer
        if PARTS == 1:
            sums = tl.load(unit_rows + row * D_padded + columns, mask=inside, other=0.0).to(tl.float64)
        else:  # several on their way at a time
            sums = tl.zeros([BLOCK], tl.float64)
            for first in range(0, parts, PARTS):
                part = first + tl.arange(0, PARTS)[:, None]
                place = (part * B + row) * D_padded + columns[None, :]
                of_parts = tl.load(unit_rows + place, mask=(part < parts) & inside[None, :], other=0.0)
                sums += tl.sum(of_parts.to(tl.float64), 0)
        along = tl.sum(sums * x_unit, 0)
        if SCALE:
            tl.store(grad_scale + row, a * along)
        if FEATURES:
            tau = tl.where(present, tl.load(grad_cosine + row).to(tl.float64), 0.0) * (x_inverse * outer)
            t = tl.load(cosine + row).to(tl.float64)
            if NORMALIZE:
                a *= _scale(scale, length, SCALE_ON_DEVICE, NORMALIZE).to(tl.float64) * x_inverse
                dx = a * (sums - along * x_unit)
            else:
                dx = tl.where(x_inverse == 0.0, 0.0, a) * sums
            dx += tau * (w_unit - t * x_unit)
            if GRAD_NORM:
                dx += tl.load(grad_norm + row).to(tl.float64) * outer * x_unit
            dx = tl.where(label < 0, 0.0, dx)  # whatever its features or the centres are
            tl.store(grad_features + row * D + columns, _narrow(dx, grad_features), mask=inside)

    if WEIGHT:
        earlier = tl.zeros([BLOCK_LABELS], tl.int32)
        for start in range(0, row, BLOCK_LABELS):
            others = start + tl.arange(0, BLOCK_LABELS)
            earlier += (tl.load(labels + others, mask=others < row, other=-1) == label).to(tl.int32)
        if present & (tl.sum(earlier, 0) == 0):
            dw = tl.zeros([BLOCK], tl.float64)
            for start in range((row // BLOCK_LABELS) * BLOCK_LABELS, B, BLOCK_LABELS):
                others = start + tl.arange(0, BLOCK_LABELS)
                same = (others >= row) & (tl.load(labels + others, mask=others < B, other=-1) == label)
                other = tl.min(tl.where(same, others, B), 0)
                while other < B:
                    x_other = tl.load(
                        features + other.to(tl.int64) * stride_row + columns * stride_column, mask=inside, other=0.0
                    ).to(tl.float64)
                    x_other *= _inverse(tl.load(norm + other).to(tl.float64))
                    tau_other = tl.load(grad_cosine + other).to(tl.float64) * (w_inverse * outer)
                    dw += tau_other * (x_other - tl.load(cosine + other).to(tl.float64) * w_unit)
                    other = tl.min(tl.where(same & (others > other), others, B), 0)
            place = grad_weight + target * D + columns
            dw += tl.load(place, mask=inside, other=0.0).to(tl.float64)
            tl.store(place, _narrow(dw, grad_weight), mask=inside)
