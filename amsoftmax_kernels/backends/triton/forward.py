"""The Triton kernels of the forward pass: one matrix product with our epilogue, the passes around it, and the loss.

Every sum has one owner and a fixed order: no atomics, no locks. Offsets into the centres are 64-bit. Sizes that change from
step to step (the last batch of an epoch, the last chunk of classes) are not specialized on: they compile nothing new.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Rows with a norm at or below this have no direction (torch.nn.functional.normalize's eps).
EPS = tl.constexpr(1e-12)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# log2(e)·64: up to here 2^logit and its sums stay inside float32's and bfloat16's range without a shift.
BOUND = tl.constexpr(92.33248261893206)


@triton.jit
def _inverse(norm):
    """1/norm; 0 for a zero row, NaN where the norm overflowed."""
    return tl.where(norm <= EPS, 0.0, 1.0 / norm) + (norm - norm)


@triton.jit
def _operand(x, dtype: tl.constexpr, TF32: tl.constexpr):
    """x in the operand dtype; rounded to TF32 where that is what will be multiplied.

    The tensor cores drop the low 13 bits: left to them, every cosine would be some 7e-4 too small, and all alike.
    """
    if TF32:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        x = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _scale(scale, norm, ON_DEVICE: tl.constexpr, NORMALIZE: tl.constexpr):
    """What multiplies the cosines: s, a number or a pointer to it, or ‖x‖ in its place."""
    s = norm
    if NORMALIZE:
        if ON_DEVICE:
            s = tl.load(scale).to(tl.float32)
        else:
            s = tl.zeros([], tl.float32) + scale
    return s


@triton.jit
def _canonical(label, ignore_index, C):
    """A label as int64, -1 where ignored, C where out of range."""
    label = label.to(tl.int64)
    return tl.where(label == ignore_index, -1, tl.where((label < 0) | (label >= C), C, label))


@triton.jit
def _canonical_labels(labels, ignore_index, out, count, B, C, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, B, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < B
        label = _canonical(tl.load(labels + offsets, mask=inside, other=0), ignore_index, C)
        tl.store(out + offsets, label, mask=inside)
        total += (inside & (label >= 0)).to(tl.int32)
    tl.store(count, tl.maximum(tl.sum(total, 0), 1).to(tl.int64))


@triton.jit(do_not_specialize=["B", "C", "ignore_index"])
def canonical_labels(labels, ignore_index, out, count, B, C, BLOCK: tl.constexpr):
    """Labels ``[B]`` made canonical; and the number of rows not ignored, at least 1."""
    _canonical_labels(labels, ignore_index, out, count, B, C, BLOCK)


@triton.jit(do_not_specialize=["B", "C", "ignore_index"])
def prepare_rows(
    features, stride_row, stride_column,  # [B, D]
    weight, stride_class, stride_dim,  # [C, D]
    labels,  # [B], written if RAW
    raw, ignore_index, count,  # what those are made of, if RAW, and a number
    scale,  # s, or a pointer to it
    x_hat,  # [B, D_padded] in the operand dtype
    cosine, norm_out, factor, shift,  # [B]
    w_hat, inverse_norm,  # [C, D_padded], [C], written if CENTRES
    B, C, D, D_padded,
    RAW: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr, NORMALIZE: tl.constexpr, TF32: tl.constexpr,
    CENTRES: tl.constexpr, CENTRES_A_PROGRAM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_LABELS: tl.constexpr,
):  # fmt: skip
    """A row a program: x̂, ‖x‖, the target's exact cosine (in float64), log2(e)·s (or ‖x‖), the logits' factor, no shift.

    With RAW the program before them does what :func:`canonical_labels` does, with CENTRES those after them what
    :func:`prepare_centres` does, which spares their launches.
    """
    row = tl.program_id(0).to(tl.int64)
    if RAW:
        row -= 1
    if row < 0:
        _canonical_labels(raw, ignore_index, labels, count, B, C, BLOCK_LABELS)
    elif row < B:
        columns = tl.arange(0, BLOCK).to(tl.int64)  # times a stride that may be C
        if RAW:
            label = _canonical(tl.load(raw + row), ignore_index, C)
        else:
            label = tl.load(labels + row)
        present = (label >= 0) & (label < C)
        target = tl.where(present, label, 0)
        x = tl.load(features + row * stride_row + columns * stride_column, mask=(columns < D) & (label >= 0), other=0.0)
        w = tl.load(weight + target * stride_class + columns * stride_dim, mask=columns < D, other=0.0)
        x, w = x.to(tl.float64), w.to(tl.float64)
        norm = tl.sqrt(tl.sum(x * x, 0))
        inverse = _inverse(norm)
        t = tl.sum(x * w, 0) * (inverse * _inverse(tl.sqrt(tl.sum(w * w, 0))))
        x_unit = (x * inverse).to(tl.float32)
        tl.store(x_hat + row * D_padded + columns, _operand(x_unit, x_hat.dtype.element_ty, TF32), mask=columns < D_padded)
        tl.store(cosine + row, tl.where(present, t, 0.0).to(tl.float32))
        length = norm.to(tl.float32)
        length = tl.where(label < 0, 1.0, length + (length - length))  # NaN where it overflows
        tl.store(norm_out + row, length)
        tl.store(factor + row, _scale(scale, length, SCALE_ON_DEVICE, NORMALIZE) * LOG2E)
        tl.store(shift + row, 0.0)
    elif CENTRES:
        _prepare_centres(
            row - B, weight, stride_class, stride_dim, w_hat, inverse_norm, C, D, D_padded, TF32, CENTRES_A_PROGRAM, BLOCK
        )


@triton.jit(do_not_specialize=["N"])
def prepare_centres(
    weight, stride_class, stride_dim,  # [C, D], from the chunk's first class
    w_hat,  # [N, D_padded] in the operand dtype
    inverse_norm,  # [N]
    scale,  # a pointer to s if ONLY_UNBOUNDED
    N, D, D_padded,
    ONLY_UNBOUNDED: tl.constexpr, TF32: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ŵ and 1/‖w‖ of a chunk's N classes: one read, one write; nothing for a pass that a moderate scale does without."""
    if ONLY_UNBOUNDED:
        N = tl.where(tl.load(scale).to(tl.float32) * LOG2E <= BOUND, 0, N)
    program = tl.program_id(0).to(tl.int64)
    _prepare_centres(program, weight, stride_class, stride_dim, w_hat, inverse_norm, N, D, D_padded, TF32, ROWS, BLOCK)


@triton.jit
def _prepare_centres(
    program, weight, stride_class, stride_dim, w_hat, inverse_norm, N, D, D_padded,
    TF32: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = program * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    inside = (rows < N)[:, None]
    w = tl.load(
        weight + rows[:, None] * stride_class + columns[None, :] * stride_dim,
        mask=inside & (columns < D)[None, :],
        other=0.0,
    ).to(tl.float32)
    inverse = _inverse(tl.sqrt(tl.sum(w * w, 1)))
    unit = _operand(w * inverse[:, None], w_hat.dtype.element_ty, TF32)
    tl.store(w_hat + rows[:, None] * D_padded + columns[None, :], unit, mask=inside & (columns < D_padded)[None, :])
    tl.store(inverse_norm + rows, inverse, mask=rows < N)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's columns in two parts, in order."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _masked(tile, columns, label, N, value: tl.constexpr):
    """A tile of logits or terms with ``value`` in the place of targets and of what is past the classes."""
    return tl.where((columns[None, :] == label[:, None]) | (columns >= N)[None, :], value, tile)


@triton.jit
def _load_tile(
    matrix, first, k, rows_count, width, BULK: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """A tile of an operand ``[rows_count, width]``, zero past its ends: by the bulk copy engine or by ordinary loads."""
    if BULK:
        tile = matrix.load([first, k])
    else:
        rows = first + tl.arange(0, ROWS)
        columns = k + tl.arange(0, DEPTH)
        inside = (rows < rows_count)[:, None] & (columns < width)[None, :]
        tile = tl.load(matrix + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def _store_tile(
    matrix, tile, first_row, first, rows_count, width, stride,
    BULK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of E ``[rows_count, width]``, what is past its ends left out."""
    if BULK:
        matrix.store([first_row, first], tile.to(matrix.dtype))
    else:
        rows = first_row + tl.arange(0, ROWS)
        columns = first + tl.arange(0, COLUMNS)
        inside = (rows < rows_count)[:, None] & (columns < width)[None, :]
        places = matrix + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        tl.store(places, tile.to(matrix.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", "N", "class_start", "z_partial", "best_partial", "best_class_partial"])
def cosine_exp(
    x_hat,  # [B, D_padded]; a descriptor if BULK
    w_hat,  # [N, D_padded], the chunk's; a descriptor if BULK
    terms,  # [B, N or a little more], rows `stride` apart, written if STORE; a descriptor if BULK
    labels, factor, shift,  # [B]
    z_partial,  # [programs, B] float64, written if SUM
    best_partial, best_class_partial,  # [programs, B], written if BEST
    B, N, D_padded, terms_width, terms_stride, class_start, interclass_filter,
    ONLY_UNBOUNDED: tl.constexpr, SHIFT: tl.constexpr, SUM: tl.constexpr, STORE: tl.constexpr,
    BEST: tl.constexpr, MASKED: tl.constexpr, FILTER: tl.constexpr, PRECISION: tl.constexpr, BULK: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """E = 2^(factor·cos − shift) of a chunk of classes, the targets masked, and its row sums: piece 2 of a step.

    A program owns BLOCK_B rows and every P-th tile of classes, so that its rows' sums never leave it; programs of the
    same classes run together and share them in the L2 cache. With BEST, the largest cosine of a negative and its class.
    """
    row_block, stream = tl.program_id(0), tl.program_id(1)  # rows first: neighbours in time share their classes
    first_row = row_block * BLOCK_B
    rows = first_row + tl.arange(0, BLOCK_B)
    in_batch = rows < B
    row_factor = tl.load(factor + rows, mask=in_batch, other=0.0)
    row_shift = tl.zeros([BLOCK_B], tl.float32)
    if SHIFT:
        row_shift = tl.load(shift + rows, mask=in_batch, other=0.0)
    label = tl.load(labels + rows, mask=in_batch, other=-1) - class_start
    label = tl.where((label >= 0) & (label < N), label, -1).to(tl.int32)
    z = tl.zeros([BLOCK_B], tl.float64)
    best = tl.full([BLOCK_B], float("-inf"), tl.float32)
    best_column = tl.full([BLOCK_B], -1, tl.int32)
    tiles = tl.cdiv(N, BLOCK_C)
    if ONLY_UNBOUNDED:  # a pass for the maxima alone, which rows of a moderate scale do without
        tiles = tl.where(tl.max(tl.where(row_factor <= BOUND, 0, 1), 0) > 0, tiles, 0)
    for tile in tl.range(stream, tiles, tl.num_programs(1), flatten=FLATTEN):
        first = tile * BLOCK_C
        cos = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
        for k in range(0, D_padded, BLOCK_D):
            x = _load_tile(x_hat, first_row, k, B, D_padded, BULK, BLOCK_B, BLOCK_D)
            w = _load_tile(w_hat, first, k, N, D_padded, BULK, BLOCK_C, BLOCK_D)
            cos = tl.dot(x, w.T, cos, input_precision=PRECISION)
        columns = first + tl.arange(0, BLOCK_C)
        # Few tiles hold a target or the end of the classes: the rest are spared the comparisons.
        here = (label >= first) & (label < first + BLOCK_C)
        special = (tl.max(here.to(tl.int32), 0) > 0) | (first + BLOCK_C > N)
        if BEST:
            # MASKED: every tile; were the products' result an if's, Triton would wait for each group of Hopper's.
            if MASKED:
                cos = _masked(cos, columns, label, N, float("-inf"))
            elif special:
                cos = _masked(cos, columns, label, N, float("-inf"))
            if ONLY_UNBOUNDED and FILTER:
                cos = tl.where(cos > interclass_filter, float("-inf"), cos)
            largest = tl.max(cos, 1)
            better = largest > best
            column = best_column
            if tl.max(better.to(tl.int32), 0) > 0:  # rarely, once a few tiles have been seen
                column = tl.min(tl.where(cos == largest[:, None], columns[None, :], 0x7FFFFFFF), 1)
            best_column = tl.where(better, column, best_column)
            best = tl.where(better, largest, best)
        if SUM or STORE:
            e = tl.exp2(cos * row_factor[:, None] - row_shift[:, None])
            if FILTER:
                e = tl.where(cos > interclass_filter, 0.0, e)
            if special:
                e = _masked(e, columns, label, N, 0.0)
            if SUM:
                z += tl.sum(e, 1).to(tl.float64)
            if STORE:
                if SPLIT:  # half a tile at a time needs half the shared memory
                    HALF: tl.constexpr = BLOCK_C // 2
                    left, right = _halves(e, BLOCK_B, BLOCK_C)
                    _store_tile(terms, left, first_row, first, B, terms_width, terms_stride, BULK, BLOCK_B, HALF)
                    _store_tile(terms, right, first_row, first + HALF, B, terms_width, terms_stride, BULK, BLOCK_B, HALF)
                else:
                    _store_tile(terms, e, first_row, first, B, terms_width, terms_stride, BULK, BLOCK_B, BLOCK_C)
    owned = stream * B + rows
    if SUM:
        tl.store(z_partial + owned, z, mask=in_batch)
    if BEST:
        tl.store(best_partial + owned, best, mask=in_batch)
        best_class = tl.where(best_column < 0, -1, best_column.to(tl.int64) + class_start)
        tl.store(best_class_partial + owned, best_class, mask=in_batch)


@triton.jit(do_not_specialize=["B", "parts"])
def reduce_sums(z_partial, labels, z, B, parts, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """z ``[B]`` from the programs' parts ``[parts, B]``, in a fixed order; 0 for an ignored row."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < B
    total = tl.zeros([ROWS], tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        offsets = part.to(tl.int64)[:, None] * B + rows[None, :]
        total += tl.sum(tl.load(z_partial + offsets, mask=(part < parts)[:, None] & inside[None, :], other=0.0), 0)
    label = tl.load(labels + rows, mask=inside, other=-1)
    tl.store(z + rows, tl.where(label < 0, 0.0, total).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["B", "parts"])
def reduce_best(
    best_partial, best_class_partial,  # [parts, B]
    factor,  # [B]
    best, best_class, shift,  # [B]
    B, parts,
    SHIFT: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The largest of the programs' cosines and its class, the lowest of equals; or the shift of rows that need one."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < B
    none = float("-inf")
    largest = tl.full([ROWS], none, tl.float32)
    largest_class = tl.full([ROWS], -1, tl.int64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        offsets = part.to(tl.int64)[:, None] * B + rows[None, :]
        mask = (part < parts)[:, None] & inside[None, :]
        value = tl.load(best_partial + offsets, mask=mask, other=none)
        value_class = tl.load(best_class_partial + offsets, mask=mask, other=-1)
        most = tl.max(value, 0)
        first = tl.min(tl.where((value == most[None, :]) & (value > none), value_class, 0x7FFFFFFFFFFFFFFF), 0)
        better = (most > largest) | ((most == largest) & (first < largest_class))
        largest = tl.where(better, most, largest)
        largest_class = tl.where(better, first, largest_class)
    if SHIFT:
        row_factor = tl.load(factor + rows, mask=inside, other=0.0)
        # Without a negative there is nothing to keep in range.
        needed = (row_factor > BOUND) & (largest > none)
        tl.store(shift + rows, tl.where(needed, largest * row_factor, 0.0), mask=inside)
    else:
        tl.store(best + rows, largest, mask=inside)
        tl.store(best_class + rows, largest_class, mask=inside)


@triton.jit
def _additive_margin(z, shift, cosine, s, margin, label, C):
    """softplus(v) with v = log z − s(t − m), sigmoid(v), and t − m, in float64; 0 where ignored, NaN out of range."""
    t = tl.where(label < C, cosine, float("nan"))  # no silent wrong number
    above = t - margin
    v = tl.log(z) + shift * LN2 - above * s
    # Both from e^-|v|, with a log(1 + e) that keeps a small e.
    e = tl.exp(-tl.abs(v))
    one_more = 1.0 + e
    rounded = one_more - 1.0
    log1p = tl.where(rounded == 0.0, e, tl.log(one_more) * (e / tl.where(rounded == 0.0, 1.0, rounded)))
    nothing = (label < 0) | (v == float("-inf"))
    softplus = tl.where(nothing, 0.0, tl.where(v > 0, v, 0.0) + log1p)
    p = tl.where(nothing, 0.0, tl.where(v > 0, 1.0, e) / one_more)
    return softplus, p, above


@triton.jit(do_not_specialize=["B", "C", "parts"])
def constant_margin(
    z_partial,  # [parts, B] float64, summed into z if SUM
    z, shift, cosine, norm,  # [B]
    labels, num_rows,  # [B] and a number
    scale, margin,
    loss,  # [B], or a number if REDUCE
    derivatives,  # [2 or 3, B]
    features, stride_row, stride_column,  # [B, D]
    x_factored,  # [B, D_padded] in the dtype of E, written if FACTOR
    B, C, D, D_padded, parts,
    SUM: tl.constexpr, FACTOR: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr, NORMALIZE: tl.constexpr,
    REDUCE: tl.constexpr, MEAN: tl.constexpr, NEED_SCALE: tl.constexpr, TF32: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, LOSS_ROWS: tl.constexpr, LOSS_PARTS: tl.constexpr,
):  # fmt: skip
    """AM-Softmax's derivatives by log z (over z), t and s, and a∘x̂, a row a program; the first program, if REDUCE, the loss.

    That one computes every row's margin again rather than wait for the others: B numbers, in float64.
    """
    row = tl.program_id(0)
    if REDUCE:
        row -= 1
    count = tl.load(num_rows).to(tl.float64)
    if row >= 0:
        label = tl.load(labels + row)
        if SUM:
            total = tl.zeros([PARTS], tl.float64)
            for start in range(0, parts, PARTS):
                part = start + tl.arange(0, PARTS)
                total += tl.load(z_partial + part.to(tl.int64) * B + row, mask=part < parts, other=0.0)
            sum_of_negatives = tl.where(label < 0, 0.0, tl.sum(total, 0))
            tl.store(z + row, sum_of_negatives.to(tl.float32))
        else:
            sum_of_negatives = tl.load(z + row).to(tl.float64)
        length = tl.load(norm + row)
        s = _scale(scale, length, SCALE_ON_DEVICE, NORMALIZE).to(tl.float64)
        softplus, p, above = _additive_margin(
            sum_of_negatives, tl.load(shift + row).to(tl.float64), tl.load(cosine + row).to(tl.float64), s, margin, label, C
        )
        if MEAN:
            p /= count
        by_z = tl.where(sum_of_negatives > 0, p / tl.where(sum_of_negatives > 0, sum_of_negatives, 1.0), p * 0.0)
        tl.store(derivatives + row, by_z.to(tl.float32))
        tl.store(derivatives + B + row, (-p * s).to(tl.float32))
        if NEED_SCALE:
            tl.store(derivatives + 2 * B + row, (-p * above).to(tl.float32))
        if not REDUCE:
            tl.store(loss + row, softplus.to(tl.float32))
        if FACTOR:
            columns = tl.arange(0, BLOCK).to(tl.int64)
            place = row.to(tl.int64)
            x = tl.load(
                features + place * stride_row + columns * stride_column, mask=(columns < D) & (label >= 0), other=0.0
            ).to(tl.float32)
            factored = x * _inverse(length) * (by_z * s).to(tl.float32)
            factored = _operand(factored, x_factored.dtype.element_ty, TF32)
            tl.store(x_factored + place * D_padded + columns, factored, mask=columns < D_padded)
    elif REDUCE:
        losses = tl.zeros([LOSS_ROWS], tl.float64)
        for first in range(0, B, LOSS_ROWS):
            rows = first + tl.arange(0, LOSS_ROWS)
            inside = rows < B
            label = tl.load(labels + rows, mask=inside, other=-1)
            if SUM:
                total = tl.zeros([LOSS_ROWS], tl.float64)
                for start in range(0, parts, LOSS_PARTS):
                    part = start + tl.arange(0, LOSS_PARTS)
                    mask = (part < parts)[:, None] & inside[None, :]
                    offsets = part.to(tl.int64)[:, None] * B + rows[None, :]
                    total += tl.sum(tl.load(z_partial + offsets, mask=mask, other=0.0), 0)
            else:
                total = tl.load(z + rows, mask=inside, other=0.0).to(tl.float64)
            s = _scale(scale, tl.load(norm + rows, mask=inside, other=1.0), SCALE_ON_DEVICE, NORMALIZE).to(tl.float64)
            softplus, p, above = _additive_margin(
                total, tl.load(shift + rows, mask=inside, other=0.0).to(tl.float64),
                tl.load(cosine + rows, mask=inside, other=0.0).to(tl.float64), s, margin, label, C,
            )  # fmt: skip
            losses += softplus
        value = tl.sum(losses, 0)
        if MEAN:
            value /= count
        tl.store(loss, value.to(tl.float32))
