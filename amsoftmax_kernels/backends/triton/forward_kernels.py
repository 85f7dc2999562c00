"""The forward pass's Triton kernels: a matrix product with our epilogue, the passes around it, and the additive margin.

Every sum has one owner and a fixed order: no atomics, no locks. Offsets into the centres are 64-bit. Sizes that change from
step to step, as of an epoch's last batch or the last chunk of classes, are not specialized on: they compile nothing new.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton compares every global that a kernel reads at each launch, a microsecond each: constants stand in functions.


@triton.jit
def _bound():
    """log2(e)·64: up to here 2^logit and its sums stay inside float32's and bfloat16's range without a shift."""
    return 92.33248261893206


@triton.jit
def _inverse(norm, power=1.0):
    """1/norm; 0 for a zero row, NaN where the norm overflowed. The norm was multiplied by ``power``.

    A row of a norm of 1e-30 counts as zero: a gradient is divided by the norm and must stay in float32's range.
    """
    return tl.where(norm <= 1e-30 * power, 0.0, 1.0 / norm) + (norm - norm)


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
def _factor(scale, norm, ON_DEVICE: tl.constexpr, NORMALIZE: tl.constexpr):
    """log2(e) times :func:`_scale`."""
    return _scale(scale, norm, ON_DEVICE, NORMALIZE) * 1.4426950408889634


@triton.jit(do_not_specialize=["C"])
def prepare_rows(
    features, stride_row, stride_column,  # [B, D] float32, bfloat16 or float16
    weight, stride_class, stride_dim,  # [C, D] float32, bfloat16 or float16
    labels,  # [B] int64: negative where ignored, C or more where the class is not in this shard
    scale,  # s: a number, or a pointer to a float32
    x_hat,  # [B, D_padded] in the operand dtype
    cosine, norm_out,  # [B] float32: the target's cosine, ‖x‖
    factor, shift,  # [B] float32: log2(e) times what multiplies the cosines, and 0
    C, D, D_padded,
    SCALE_ON_DEVICE: tl.constexpr, NORMALIZE: tl.constexpr, TF32: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program normalizes a row of the features and takes its target's cosine in float64."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)  # times a stride that may be C
    label = tl.load(labels + row)
    present = (label >= 0) & (label < C)
    target = tl.where(present, label, 0)
    x = tl.load(features + row * stride_row + columns * stride_column, mask=(columns < D) & (label >= 0), other=0.0)
    w = tl.load(weight + target * stride_class + columns * stride_dim, mask=columns < D, other=0.0)
    x, w = x.to(tl.float64), w.to(tl.float64)
    norm = tl.sqrt(tl.sum(x * x, 0))
    inverse = _inverse(norm)
    t = tl.sum(x * w, 0) * (inverse * _inverse(tl.sqrt(tl.sum(w * w, 0))))
    x_unit = _operand((x * inverse).to(tl.float32), x_hat.dtype.element_ty, TF32)
    tl.store(x_hat + row * D_padded + columns, x_unit, mask=columns < D_padded)
    tl.store(cosine + row, tl.where(present, t, 0.0).to(tl.float32))
    length = norm.to(tl.float32)
    length = tl.where(label < 0, 1.0, length + (length - length))  # NaN where it overflows
    tl.store(norm_out + row, length)
    tl.store(factor + row, _factor(scale, length, SCALE_ON_DEVICE, NORMALIZE))
    tl.store(shift + row, 0.0)


@triton.jit(do_not_specialize=["N"])
def prepare_centres(
    weight, stride_class, stride_dim,  # [N, D], a chunk's; float32, bfloat16 or float16
    w_hat,  # [N, D_padded] in the operand dtype
    inverse_norm,  # [N] float32
    N, D, D_padded,
    TF32: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program writes ŵ and 1/‖w‖ of ROWS classes."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    inside = (rows < N)[:, None]
    places = weight + rows[:, None] * stride_class + columns[None, :] * stride_dim
    w = tl.load(places, mask=inside & (columns < D)[None, :], other=0.0).to(tl.float32)
    # Where the largest element of a row lies between 1/USUAL and USUAL, float32 holds the squares. Others are scaled.
    USUAL: tl.constexpr = 2.0**30
    POWER: tl.constexpr = 2.0**80
    largest = tl.max(tl.abs(w), 1)
    power = tl.where(largest > USUAL, 1 / POWER, tl.where(largest < 1 / USUAL, POWER, 1.0))
    w *= power[:, None]
    inverse = _inverse(tl.sqrt(tl.sum(w * w, 1)), power)
    unit = _operand(w * inverse[:, None], w_hat.dtype.element_ty, TF32)
    tl.store(w_hat + rows[:, None] * D_padded + columns[None, :], unit, mask=inside & (columns < D_padded)[None, :])
    tl.store(inverse_norm + rows, inverse * power, mask=rows < N)


@triton.jit
def _masked(tile, columns, label, N, value: tl.constexpr, GROUP: tl.constexpr):
    """A tile of logits or terms with ``value`` in the place of targets, their whole groups, and what is past the classes."""
    if GROUP > 1:
        columns_group, label_group = columns // GROUP, tl.where(label < 0, -1, label // GROUP)
        targets = columns_group[None, :] == label_group[:, None]
    else:
        targets = columns[None, :] == label[:, None]
    return tl.where(targets | (columns >= N)[None, :], value, tile)


@triton.jit
def _nearest(cos, SUBCENTRES: tl.constexpr, GROUP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    """Cosines with −∞ in the place of all but the largest of a group's first SUBCENTRES, the first of equals; NaN stays."""
    groups = tl.reshape(cos, [BLOCK_B, BLOCK_C // GROUP, GROUP])
    place = tl.arange(0, GROUP)[None, None, :]
    if SUBCENTRES < GROUP:
        groups = tl.where(place < SUBCENTRES, groups, float("-inf"))
    largest = tl.max(groups, 2, keep_dims=True)
    first = tl.min(tl.where(groups == largest, place, GROUP), 2, keep_dims=True)
    groups = tl.where((place == first) | (groups != groups), groups, float("-inf"))
    return tl.reshape(groups, [BLOCK_B, BLOCK_C])


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
    x_hat,  # [B, D_padded] in the operand dtype; a descriptor if BULK
    w_hat,  # [N, D_padded], a chunk's, in the operand dtype; a descriptor if BULK
    terms,  # E [B, terms_width], rows terms_stride apart, bfloat16 or float32; a descriptor if BULK; written if STORE
    labels,  # [B] int64
    factor, shift,  # [B] float32; shift is read if SHIFT
    z_partial,  # [streams, B] float64, written if SUM
    best_partial, best_class_partial,  # [streams, B] float32 and int64, written if BEST; no class if ONLY_UNBOUNDED
    B, N, D_padded, terms_width, terms_stride, class_start, interclass_filter,
    ONLY_UNBOUNDED: tl.constexpr, SHIFT: tl.constexpr, SUM: tl.constexpr, STORE: tl.constexpr,
    BEST: tl.constexpr, FILTER: tl.constexpr, SUBCENTRES: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, BULK: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """E = 2^(factor·cos − shift) of a chunk of classes, the targets masked, and its row sums: piece 2 of a step.

    The P programs of a block of rows each take every P-th tile of classes, and each keeps its rows' sums to itself. BEST
    adds the largest cosine of a negative and its class. ONLY_UNBOUNDED is for the pass that finds the shifts: it leaves the
    class out, and skips blocks in which no row's scale is large enough to need a shift. With sub-centres each GROUP columns
    are one class, of which the nearest of the first SUBCENTRES counts.
    """
    row_block, stream = tl.program_id(0), tl.program_id(1)  # rows first: programs that run together share classes in L2
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
    if ONLY_UNBOUNDED:
        tiles = tl.where(tl.max(tl.where(row_factor <= _bound(), 0, 1), 0) > 0, tiles, 0)
    for tile in tl.range(stream, tiles, tl.num_programs(1), flatten=FLATTEN):
        first = tile * BLOCK_C
        cos = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
        for k in range(0, D_padded, BLOCK_D):
            x = _load_tile(x_hat, first_row, k, B, D_padded, BULK, BLOCK_B, BLOCK_D)
            w = _load_tile(w_hat, first, k, N, D_padded, BULK, BLOCK_C, BLOCK_D)
            cos = tl.dot(x, w.T, cos, input_precision=PRECISION)
        columns = first + tl.arange(0, BLOCK_C)
        if GROUP > 1:
            cos = _nearest(cos, SUBCENTRES, GROUP, BLOCK_B, BLOCK_C)
        if BEST:
            # In every tile: were the products' result an if's, Triton would wait for each group of Hopper's.
            cos = _masked(cos, columns, label, N, float("-inf"), GROUP)
            if ONLY_UNBOUNDED and FILTER:
                cos = tl.where(cos > interclass_filter, float("-inf"), cos)
            if ONLY_UNBOUNDED:
                best = tl.maximum(best, tl.max(cos, 1))
            else:
                largest, column = tl.max(cos, 1, return_indices=True)
                better = largest > best
                best_column = tl.where(better, first + column, best_column)
                best = tl.where(better, largest, best)
        if SUM or STORE:
            e = tl.exp2(cos * row_factor[:, None] - row_shift[:, None])
            if FILTER:
                e = tl.where(cos > interclass_filter, 0.0, e)
            if GROUP > 1:  # −∞ times a factor of 0 is no number
                e = tl.where(cos == float("-inf"), 0.0, e)
            # Few tiles hold a target or the end of the classes: the rest are spared the comparisons.
            here = (label >= first) & (label < first + BLOCK_C)
            if (tl.max(here.to(tl.int32), 0) > 0) | (first + BLOCK_C > N):
                e = _masked(e, columns, label, N, 0.0, GROUP)
            if SUM:
                z += tl.sum(e, 1).to(tl.float64)
            if STORE:
                _store_tile(terms, e, first_row, first, B, terms_width, terms_stride, BULK, BLOCK_B, BLOCK_C)
    owned = stream * B + rows
    if SUM:
        tl.store(z_partial + owned, z, mask=in_batch)
    if BEST:
        tl.store(best_partial + owned, best, mask=in_batch)
        if not ONLY_UNBOUNDED:
            best_class = tl.where(best_column < 0, -1, best_column.to(tl.int64) + class_start)
            tl.store(best_class_partial + owned, best_class, mask=in_batch)


@triton.jit
def _load_parts(pointer, part, rows, parts, B, missing):
    """A block ``[part, rows]`` of the programs' results ``[parts, B]``."""
    inside = (part < parts)[:, None] & (rows < B)[None, :]
    return tl.load(pointer + part.to(tl.int64)[:, None] * B + rows[None, :], mask=inside, other=missing)


@triton.jit
def _sum_of_parts(z_partial, rows, label, parts, B, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """The programs' sums ``[parts, B]``, added in a fixed order; an ignored row's is 0."""
    total = tl.zeros([ROWS], tl.float64)
    for start in range(0, parts, PARTS):
        total += tl.sum(_load_parts(z_partial, start + tl.arange(0, PARTS), rows, parts, B, 0.0), 0)
    return tl.where(label < 0, 0.0, total)


@triton.jit(do_not_specialize=["B", "parts"])
def reduce_sums(
    z_partial,  # [parts, B] float64
    labels,  # [B] int64
    z,  # [B] float32
    B, parts,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A program adds up the parts of z of ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    label = tl.load(labels + rows, mask=rows < B, other=-1)
    total = _sum_of_parts(z_partial, rows, label, parts, B, ROWS, PARTS)
    tl.store(z + rows, total.to(tl.float32), mask=rows < B)


@triton.jit(do_not_specialize=["B", "parts"])
def reduce_shift(
    best_partial,  # [parts, B] float32
    factor, shift,  # [B] float32
    B, parts,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A row whose scale is too large gets its largest logit as its shift, in units of log 2; others keep 0."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    for start in range(0, parts, PARTS):
        value = _load_parts(best_partial, start + tl.arange(0, PARTS), rows, parts, B, float("-inf"))
        largest = tl.maximum(largest, tl.max(value, 0))
    row_factor = tl.load(factor + rows, mask=rows < B, other=0.0)
    needed = (row_factor > _bound()) & (largest > float("-inf"))  # without a negative there is nothing to keep in range
    tl.store(shift + rows, tl.where(needed, largest * row_factor, 0.0), mask=rows < B)


@triton.jit(do_not_specialize=["B", "parts"])
def reduce_best(
    best_partial, best_class_partial,  # [parts, B] float32 and int64
    best, best_class,  # [B] float32 and int64
    B, parts,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Each row gets the largest of the programs' cosines and its class, the lowest class of equals; −inf and −1 if none."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    largest_class = tl.full([ROWS], -1, tl.int64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        value = _load_parts(best_partial, part, rows, parts, B, float("-inf"))
        value_class = _load_parts(best_class_partial, part, rows, parts, B, -1)
        most = tl.max(value, 0)
        first = tl.min(tl.where(value == most[None, :], value_class, 0x7FFFFFFFFFFFFFFF), 0)
        better = (most > largest) | ((most == largest) & (first < largest_class))
        largest = tl.where(better, most, largest)
        largest_class = tl.where(better, first, largest_class)
    tl.store(best + rows, largest, mask=rows < B)
    tl.store(best_class + rows, largest_class, mask=rows < B)


@triton.jit(do_not_specialize=["margin", "B", "parts", "C"])
def additive_margin(
    z_partial,  # [parts, B] float64
    shift, cosine, norm,  # [B] float32
    labels,  # [B] int64: negative where ignored, NaN is the result where C or more
    scale,  # s: a number, or a pointer to a float32
    margin,  # float
    loss,  # [B] float32
    derivatives,  # [3, B] float32: by log z, over z; by t; by s or, without NORMALIZE, by ‖x‖
    B, parts, C,
    SCALE_ON_DEVICE: tl.constexpr, NORMALIZE: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The loss of ROWS rows, or their shares of a MEAN, and its derivatives for an upstream gradient of 1, in float64."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < B
    label = tl.load(labels + rows, mask=inside, other=-1)
    length = tl.load(norm + rows, mask=inside, other=1.0)
    s = (_scale(scale, length, SCALE_ON_DEVICE, NORMALIZE) + tl.zeros([ROWS], tl.float32)).to(tl.float64)
    negatives = _sum_of_parts(z_partial, rows, label, parts, B, ROWS, PARTS)
    LN2: tl.constexpr = 0.6931471805599453
    log_z = tl.log(negatives) + tl.load(shift + rows, mask=inside, other=0.0).to(tl.float64) * LN2
    t = tl.load(cosine + rows, mask=inside, other=0.0).to(tl.float64)
    t = tl.where(label < C, t, float("nan"))  # out of range: no silent wrong number
    v = log_z - (t - margin) * s
    # softplus(v) and sigmoid(v), both from e^-|v|, with a log(1 + e) that keeps a small e.
    e = tl.exp(-tl.abs(v))
    one_more = 1.0 + e
    rounded = one_more - 1.0
    log1p = tl.where(rounded == 0.0, e, tl.log(one_more) * (e / tl.where(rounded == 0.0, 1.0, rounded)))
    nothing = (label < 0) | (v == float("-inf"))
    softplus = tl.where(nothing, 0.0, tl.where(v > 0, v, 0.0) + log1p)
    p = tl.where(nothing, 0.0, tl.where(v > 0, 1.0, e) / one_more)
    if MEAN:
        count = tl.zeros([1024], tl.int32)
        for first in range(0, B, 1024):
            place = first + tl.arange(0, 1024)
            count += (tl.load(labels + place, mask=place < B, other=-1) >= 0).to(tl.int32)
        share = 1.0 / tl.maximum(tl.sum(count), 1).to(tl.float64)
        softplus *= share
        p *= share
    by_z = tl.where(negatives > 0, p / tl.where(negatives > 0, negatives, 1.0), p * 0.0)  # a NaN stays
    tl.store(loss + rows, softplus.to(tl.float32), mask=inside)
    tl.store(derivatives + rows, by_z.to(tl.float32), mask=inside)
    tl.store(derivatives + B + rows, (-p * s).to(tl.float32), mask=inside)
    tl.store(derivatives + 2 * B + rows, (-p * (t - margin)).to(tl.float32), mask=inside)
