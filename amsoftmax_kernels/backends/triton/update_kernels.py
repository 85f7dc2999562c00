"""The centres' update in the place of their gradient: the normalization's Jacobian, the targets' part, SGD or AdamW.

In plain PyTorch it is :mod:`amsoftmax_kernels.backends.update`, whose rules and random bits these are.
"""

from __future__ import annotations

import triton
import triton.language as tl

_NUMBERS = ["lr", "decay", "first_rate", "second_rate", "third", "correction", "loss_scale"]
_KEYS = ["weight_key", "first_key", "second_key"]


@triton.jit
def _mix(x):
    """SplitMix64's output function: :func:`amsoftmax_kernels.hashing.mix`."""
    x = x.to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _store(pointer, offsets, value, inside, classes, columns, key, STOCHASTIC: tl.constexpr):
    """Float32 into what is stored; into bfloat16 with the random bits of :mod:`amsoftmax_kernels.backends.rounding`."""
    if STOCHASTIC and pointer.dtype.element_ty == tl.bfloat16:
        bits = _mix(classes + key).to(tl.uint32)[:, None] + (columns.to(tl.uint32) * 0x9E3779B1)[None, :]
        bits = (bits ^ (bits >> 16)) * 0x7FEB352D
        bits = (bits ^ (bits >> 15)) * 0x846CA68B
        raised = value.to(tl.uint32, bitcast=True) + (bits >> 16)
        tl.store(pointer + offsets, (raised >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "start", "class_start", *_KEYS, *_NUMBERS])
def update_centres(
    grad_unit,  # [N, D_padded] float32: dŵ; or the whole gradient if COMPLETE
    centres, stride_class, stride_dim,  # [N, D], a chunk's; float32, bfloat16 or float16
    inverse_norm,  # [N] float32
    slots, target_rows,  # [N] int32 and [B, D] float32: the targets' part of a class and where it is, -1 if it has none
    complete,  # [N, D] float32: the gradient, written if it is not to be applied
    rows,  # [N] int64: where the classes are in weight and state; read if INDEXED
    weight, first_state, second_state,  # [*, D] contiguous, as the rule has them; float32, bfloat16 or float16
    skipped,  # [programs] int32: how many classes each left as they are
    weight_key, first_key, second_key,  # int64: of random bits
    N, start, class_start, D, D_padded,  # start: the place of the first class in weight and state
    loss_scale,  # what is in every gradient
    lr, decay, first_rate, second_rate, third, correction,  # what the rule's numbers() are
    COMPLETE: tl.constexpr, APPLY: tl.constexpr, INDEXED: tl.constexpr, STOCHASTIC: tl.constexpr,
    ADAM: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS classes. Without APPLY it leaves their gradient, which COMPLETE then takes."""
    classes = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    valid = classes < N
    inside = valid[:, None] & (columns < D)[None, :]
    g = tl.load(grad_unit + classes[:, None] * D_padded + columns[None, :], mask=inside, other=0.0)
    w = tl.load(centres + classes[:, None] * stride_class + columns[None, :] * stride_dim, mask=inside, other=0.0)
    w = w.to(tl.float32)
    if not COMPLETE:
        inverse = tl.load(inverse_norm + classes, mask=valid, other=0.0)
        unit = w * inverse[:, None]
        g = (g - tl.sum(g * unit, 1)[:, None] * unit) * inverse[:, None]
        slot = tl.load(slots + classes, mask=valid, other=-1).to(tl.int64)
        has_target = inside & (slot >= 0)[:, None]
        g += tl.load(target_rows + slot[:, None] * D + columns[None, :], mask=has_target, other=0.0)
        g /= loss_scale
    if not APPLY:
        tl.store(complete + classes[:, None] * D + columns[None, :], g, mask=inside)
    else:
        bad = tl.sum((inside & ~(tl.abs(g) < float("inf"))).to(tl.int32), 1) > 0
        tl.store(skipped + tl.program_id(0), tl.sum(bad.to(tl.int32), 0))
        inside &= ~bad[:, None]
        place = start + classes
        if INDEXED:
            place = tl.load(rows + classes, mask=valid, other=0)
        offsets = place[:, None] * D + columns[None, :]
        named = class_start + place
        if ADAM:
            mean = tl.load(first_state + offsets, mask=inside, other=0.0).to(tl.float32)
            square = tl.load(second_state + offsets, mask=inside, other=0.0).to(tl.float32)
            mean += first_rate * (g - mean)
            square += second_rate * (g * g - square)
            w = w * decay - lr * mean / (tl.sqrt(square) * correction + third)
            _store(first_state, offsets, mean, inside, named, columns, first_key, STOCHASTIC)
            _store(second_state, offsets, square, inside, named, columns, second_key, STOCHASTIC)
        else:
            g += decay * w
            if MOMENTUM:
                velocity = tl.load(first_state + offsets, mask=inside, other=0.0).to(tl.float32)
                velocity = first_rate * velocity + second_rate * g
                _store(first_state, offsets, velocity, inside, named, columns, first_key, STOCHASTIC)
                g = g + third * velocity if NESTEROV else velocity
            w -= lr * g
        _store(weight, offsets, w, inside, named, columns, weight_key, STOCHASTIC)
