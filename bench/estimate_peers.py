"""What the same step should cost as others compute it, from what their code reads, writes and multiplies.

Products are as fast as ours are assumed to be and memory as a copy; nothing waits for the host, launches are counted low.
CCE, Liger and quack take centres that are normalized already, in bfloat16, and give their gradient in it (``bare``); or
PyTorch normalizes them within the step, as ``bench gpu`` times it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .estimate import SECONDS_A_LAUNCH, Card, library_product

# What the PartialFC algorithm (gpu_peers.partial_fc) reads and writes of each logit, operation by operation.
PARTIAL_FC_BYTES = {
    "product stored": 2, "to float32": 6, "clamp": 8, "scale": 8, "maximum": 4, "subtract": 8, "exponential": 8, "sum": 4,
    "divide": 8, "times the gradient": 8, "of the scale": 8, "of the margin": 8, "of the clamp": 12, "to float16": 6,
}  # fmt: skip
# The same of peers.eager under autocast: PyTorch's softmax reads its input three times, its gradient both of its twice.
EAGER_BYTES = {
    "product stored": 2, "margin": 4, "scale": 4, "to float32": 6, "log-softmax": 16, "of the loss": 4,
    "of the softmax": 20, "to bfloat16": 6, "of the scale": 4,
}  # fmt: skip
# And of each element of the centres: norm, division, cast; of the gradients the cast, and about 28 of the division and norm.
CENTRES_BYTES = 4 + 8 + 6 + 6 + 28


# PyTorch's launches, about: of the normalization, forward and backward, and of the rest.
_NORMALIZATION, _EAGER, _PARTIAL_FC = 20, 20, 30


def _three_products(card: Card, B: int, D: int, C: int, of_rate: float) -> float:
    """Of which dx̂'s has few tiles, as our E·ŵ has: ``of_rate`` of its rate is reached there."""
    return 4 * B * C * D / card.products + library_product(card, B, D, C) / of_rate


def partial_fc(card: Card, B: int, D: int, C: int, of_rate: float = 1) -> dict[str, float]:
    """Seconds and bytes of a step as InsightFace computes it; of its memory what is held at once: logits three times."""
    moved = B * C * sum(PARTIAL_FC_BYTES.values()) + C * D * CENTRES_BYTES
    seconds = _three_products(card, B, D, C, of_rate) + moved / card.copy
    return {"total_s": seconds + (_NORMALIZATION + _PARTIAL_FC) * SECONDS_A_LAUNCH, "held": (4 + 4 + 2) * B * C}


def eager(card: Card, B: int, D: int, C: int, of_rate: float = 1) -> float:
    """Seconds of plain PyTorch under bfloat16 autocast; both products of the backward pass read the logits' gradient."""
    moved = B * C * (sum(EAGER_BYTES.values()) + 4) + C * D * CENTRES_BYTES
    return _three_products(card, B, D, C, of_rate) + moved / card.copy + (_NORMALIZATION + _EAGER) * SECONDS_A_LAUNCH


def quack(card: Card, B: int, D: int, C: int, of_rate: float = 1) -> float:
    """chunked_linear_cross_entropy of Dao-AILab/quack (quack/linear_cross_entropy.py): 4,096 rows a chunk.

    Three products. A logit is stored, read for the loss and for its gradient (these rows fit no SM), overwritten by the
    latter, and read by two products; a chunk reads the centres twice and writes their gradient, which it reads from the
    second on. Four launches a chunk, and two for the mean and its gradient.
    """
    count = -(-B // 4096)
    moved = (2 + 4 + 2 + 4) * B * C + count * 2 * 2 * C * D + (2 * count - 1) * 2 * C * D
    return _three_products(card, B, D, C, of_rate) + moved / card.copy + (4 * count + 2) * SECONDS_A_LAUNCH


def liger(card: Card, B: int, D: int, C: int, of_rate: float = 1) -> float:
    """LigerFusedLinearCrossEntropyLoss (linkedin/Liger-Kernel, ops/fused_linear_cross_entropy.py), by rows.

    A chunk has the next power of two of B/⌈C/D⌉ rows, one where C/D ≥ B; for each the centres are read twice, and their
    gradient, bfloat16, is made, read and written. Three products, of at least 64 rows for the tensor cores' sake; a logit is
    stored, read three times by the loss, overwritten, and read by two products. The upstream gradient is taken to be 1.
    """
    rows = min(1 << (-(-B // -(-C // D)) - 1).bit_length(), B)
    count = -(-B // rows)
    moved = 14 * B * C + count * (2 * 2 + 2 + 4) * C * D
    products = _three_products(card, max(B, 64 * count), D, C, of_rate)
    return products + moved / card.copy + 6 * count * SECONDS_A_LAUNCH


def cce(
    card: Card, B: int, D: int, C: int, of_rate: float = 1, filtered: bool = True, scale: float = 30.0
) -> float:  # fmt: skip
    """Cut cross-entropy (Wijmans et al. 2024, arXiv 2411.09009; cce_backward.py in apple/ml-cross-entropy).

    Four products and no logits in memory: they are made again in the backward pass, in blocks of 128 x 128, by a kernel that
    adds each block's parts to both gradients in bfloat16, under locks. Nothing is shared between blocks, so the L2 cache may
    bound it; the exponentials are taken to overlap, and no product has too few tiles.

    ``filtered``, its default: a block is left out of both gradients if no probability in it, targets' less 1, is above 2⁻¹²,
    so most of the gradient of many classes is dropped. Counted for random features, whose cosines are normal with variance
    1/D, and targets in blocks of their own.
    """
    product, blocks = 2 * B * C * D / card.products, -(-B // 128) * -(-C // 128)
    forward = max(product, blocks / 2 * (128 + 256) * D * 2 / card.l2)  # tiles of 128 x 256
    logits = max(product, blocks * 256 * D * 2 / card.l2)
    both = max(2 * product, blocks * 256 * D * (2 + 4) / card.l2)
    share = 1.0
    if filtered:
        least = math.log(2**-12 * C) + scale * scale / (2 * D)  # the logit whose share of the mean sum is 2⁻¹²
        above = math.erfc(least * math.sqrt(D / 2) / scale) / 2
        share = 1 - math.exp(128 * 128 * math.log1p(-min(above, 0.5)) - min(B / blocks, 1.0))
    # The centres read in the forward pass and the backward, their gradient filled with zeros, and written.
    moved = (2 + 2 + 2 + 2 * share) * C * D
    return forward + logits + share * both + moved / card.copy + 6 * SECONDS_A_LAUNCH


PEERS: dict[str, Callable[..., float]] = {"CCE": cce, "Liger": liger, "quack": quack}


def normalization(card: Card, D: int, C: int) -> float:
    """Seconds of PyTorch's, forward and backward, with the casts."""
    return CENTRES_BYTES * C * D / card.copy + _NORMALIZATION * SECONDS_A_LAUNCH
