"""Faults to be planted in the C++ kernels, each of which the emulation must show.

To add one: the text to be replaced, which its file must have once, what to put there, and why it would matter. The ``quick``
ones run in every test run, the others as slow tests.
"""

from __future__ import annotations

from typing import NamedTuple

from .emulation import Change

COSINE, GRADIENT, COMMON = "cosine_sm90.cu", "gradient_sm90.cu", "sm90.cuh"  # Hopper's own
PORTABLE = "cosine_sm80.cu"


class Fault(NamedTuple):
    name: str
    why: str
    file: str
    old: str
    new: str
    quick: bool = False
    of: str = ""  # the kernel that shows it, where it is not the file's

    @property
    def kernel(self) -> str:
        return self.of or self.file


FAULTS = [
    Fault(
        "too few bytes expected", "products start before x̂ has come", COSINE,
        "roles.transaction_bytes = STAYS ? kTileBytes : 2 * kTileBytes;", "roles.transaction_bytes = kTileBytes;", True,
    ),
    Fault(
        "too many bytes expected", "a stage is never full", COSINE,
        "roles.transaction_bytes = STAYS ? kTileBytes : 2 * kTileBytes;", "roles.transaction_bytes = 2 * kTileBytes;",
    ),
    Fault(
        "no fence before a box leaves", "copies may read what was before", COSINE, "    cute::tma_store_fence();\n", "",
    ),
    Fault(
        "another phase of x̂", "a barrier waited for in a phase that does not come", COSINE,
        "shared.x_arrived[step].wait(0)", "shared.x_arrived[step].wait(1)",
    ),
    Fault("no wait for x̂", "products of what is not there yet", COSINE, "shared.x_arrived[step].wait(0)", "(void)0"),
    Fault(
        "stages released to one block alone", "the other block loads into what is still read, or waits forever", COSINE,
        "cute::make_shape(cluster, cute::_1{}, cute::_1{})", "cute::make_shape(1, cute::_1{}, cute::_1{})", True,
    ),
    Fault(
        "halves of a tile exchanged", "each block loads the other's rows of ŵ", COSINE,
        "turn.first_class(i) + half * kClasses / 2", "turn.first_class(i) + (1 - half) * kClasses / 2",
    ),
    Fault(
        "the last tile left out", "classes past the last whole tile are in no sum", COSINE,
        "int((p.w_hat.rows + kClasses - 1) / kClasses), kClasses}", "int(p.w_hat.rows / kClasses), kClasses}",
    ),
    Fault(
        "no wait before the end", "a block's shared memory goes to another while its boxes are read", COSINE,
        "    if (thread == 0) tma_store_wait<0>();  // shared memory must outlive its readers\n", "", True,
    ),
    Fault(
        "a box written over", "a box is written while the one before is read from it", COSINE,
        "    if (thread == 0) cute::tma_store_wait<0>();  // the box before has been read\n", "",
    ),
    Fault(
        "x̂ by the stage", "it lies by the step", COSINE, "STAYS ? step : int(state.index())", "int(state.index())",
    ),
    Fault(
        "blocks that do not wait for one another", "a barrier is used before it is one", COSINE,
        "    cute::cluster_sync();\n", "",
    ),
    Fault(
        "half of a quad", "a row's sum is over four threads", COSINE,
        "mask < 4; mask *= 2) {\n            sums", "mask < 2; mask *= 2) {\n            sums",
    ),
    Fault(
        "more registers than there are", "a block's registers are 168 a thread, 504 for its three warpgroups", COMMON,
        "kLoaderRegisters = 24, kRegisters = 240", "kLoaderRegisters = 24, kRegisters = 248", of=COSINE,
    ),
    Fault(
        "boxes of twice the rows", "a copy writes past its stage's half", COSINE,
        "p.w_hat, kClasses / 2)", "p.w_hat, kClasses)",
    ),
    Fault(
        "twice the streams", "blocks whose sums nobody has room for", COSINE,
        "p.x_hat.rows, p.parts / kParts, v.shared", "p.x_hat.rows, p.parts, v.shared",
    ),
    Fault(
        "a stage released while it is read", "the next copy comes too early", COSINE,
        "            if (step > 0) pipeline.consumer_release(before);", "            pipeline.consumer_release(state);",
        True,
    ),
    Fault(
        "no turns", "both warpgroups' stages come in the order of the turns", COSINE, "        order.wait();\n", "",
    ),
    Fault(
        "a loader that leaves early", "the other block's copies still come", COSINE,
        "    pipeline.producer_tail(state);  // the other block's copies and signals still come here\n", "", True,
    ),
    Fault(
        "accumulators that are not cleared", "a tile's products are added to those before", COSINE,
        "        mma.accumulate_ = GMMA::ScaleOut::Zero;\n", "",
    ),
    Fault(
        "accumulators read too early", "the last products are still under way", COSINE,
        "        wait_for_products<0>(c);\n", "",
    ),
    Fault(
        "a multicast for one block", "half of every tile comes to one of two", COSINE, "uint16_t(3)", "uint16_t(1)",
    ),
    Fault(
        "the first columns twice", "the second block needs its own", GRADIENT,
        "place.half * COLUMNS + part * kBox, row", "part * kBox, row",
    ),
    Fault(
        "a sum sent to oneself", "the halves of a row need one another's", GRADIENT,
        "place.rank(1 - place.half, place.share)", "place.rank(place.half, place.share)",
    ),
    Fault(
        "half of the bytes expected", "products start with half a stage", GRADIENT,
        "roles.transaction_bytes = Memory::kBytes;", "roles.transaction_bytes = Memory::kBytes / 2;", True,
    ),
    Fault(
        "half of the consumers", "one warpgroup's release frees what the other reads", GRADIENT,
        "roles.num_consumers = kParts * kGroup;", "roles.num_consumers = kGroup;",
    ),
    Fault(
        "one place for what is sent", "a block may be a tile ahead of the one beside it", GRADIENT,
        "const int at = tile % 2, thread", "const int at = 0, thread",
    ),
    Fault(
        "a phase of sums too many", "the same place is used every second tile", GRADIENT,
        "uint32_t(tile / 2 % 2)", "uint32_t(tile % 2)",
    ),
    Fault(
        "centres' columns past their end", "a row's last columns are another row's first", GRADIENT,
        "if (8 * (batch + k) < left[i]) *", "*",
    ),
    Fault(
        "a wait for too few copies", "products of what is not there yet", PORTABLE,
        "wait_copies<kStages - 2>", "wait_copies<kStages - 1>", True,
    ),
    Fault(
        "a tile of E written over", "the next tile's operands come where E still leaves from", PORTABLE,
        "        __syncthreads();  // the last tile of E has left the shared memory\n", "",
    ),
    Fault(
        "a stage written over", "a warp still reads the stage that the next copies go to", PORTABLE,
        "            __syncthreads();  // this step's operands are there, and the stage before it has been read by all\n",
        "",
    ),
]  # fmt: skip

# What the changed sources need not be compiled for, to save time: one type of operands, of centres.
ONE_TYPE: dict[str, list[Change]] = {
    PORTABLE: [],
    COSINE: [
        Change(COSINE, "        case AK_FLOAT16: return variant<cutlass::half_t>(general, width);\n", ""),
        Change(COSINE, "variant<cutlass::tfloat32_t>(", "variant<cutlass::bfloat16_t>("),
    ],
    GRADIENT: [
        Change(GRADIENT, "        case AK_FLOAT16: return variant<cutlass::half_t>(width);\n", ""),
        Change(GRADIENT, "        case AK_BFLOAT16: return variant<cutlass::bfloat16_t>(width);\n", ""),
    ],
}
