// Hopper's tile of the cosine kernel: which thread has which logit, and what becomes of it. Nothing here needs a GPU: tests
// run it on a CPU for every thread, in the same layouts.
#pragma once

#include <cute/tensor.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cutlass/numeric_types.h>

#include "epilogue.cuh"
#include "library.h"
#include "schedule_sm90.h"

namespace ak {
namespace sm90 {

using cute::_;
using cute::Int;
using cute::Shape;

constexpr int kRows = 128, kClasses = 128;  // a warpgroup's tile
using Tile = Shape<Int<kRows>, Int<kClasses>>;

// Bulk copies permute within rows of 128 bytes at most: that much is a step of a tile's products deep, and E leaves in
// boxes that wide.
template <class T>
constexpr int kDepth = 128 / int(sizeof(T));
template <class T>
using Term = std::conditional_t<sizeof(T) == 4, float, bfloat16>;  // of E, beside operands T
constexpr int kBoxRows = 64;
template <class T>
constexpr int kBoxColumns = 128 / int(sizeof(Term<T>));

template <class T>
using Mma = decltype(cute::make_tiled_mma(
    cute::GMMA::ss_op_selector<T, T, float, Shape<Int<kRows>, Int<kClasses>, Int<kDepth<T>>>>()));

// Rows of 128 bytes whose eight 16-byte parts are permuted by the row, as bulk copies write and read them.
template <class T, int COUNT>
using Operands = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<T>{},
                                              Shape<Int<kRows>, Int<kDepth<T>>, Int<COUNT>>{}));
// The same as plain offsets: a layout of products' operands permutes addresses, not offsets.
template <class T>
using Box = decltype(cute::as_position_independent_swizzle_layout(cute::tile_to_shape(
    cute::GMMA::Layout_K_SW128_Atom<Term<T>>{}, Shape<Int<kBoxRows>, Int<kBoxColumns<T>>>{})));

// Coordinates (row, class) of a thread's accumulators in its warpgroup's tile: ((2 sides, 2 rows, 16 eights), 2 halves, 1).
template <class T>
CUTE_HOST_DEVICE auto coordinates(int thread) {
    return Mma<T>{}.get_slice(thread).partition_C(cute::make_identity_tensor(Tile{}));
}

// A thread has four rows of the tile: i is 2 * half + which of the half's two.
template <class Where>
CUTE_HOST_DEVICE int row_of_thread(const Where& where, int i) {
    return cute::get<0>(where(cute::make_coord(0, i % 2, 0), i / 2, 0));
}

CUTE_HOST_DEVICE Row load_row(const AkCosine& p, int64_t row) {
    if (row >= p.x_hat.rows) return {0.0f, 0.0f, -1};
    return {p.factor[row], p.shift ? p.shift[row] : 0.0f, label_here(p.labels[row], p.class_start, p.w_hat.rows)};
}

// Few tiles hold a target of these rows or the end of the classes: the rest are spared the comparisons.
CUTE_HOST_DEVICE bool is_special(const Row (&rows)[4], int first, int classes) {
    bool here = first + kClasses > classes;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) here |= rows[i].label >= first && rows[i].label < first + kClasses;
    return here;
}

// A row's sum and maximum over a part of one tile.
struct Sum {
    float sum = 0;
    Most most;
};

// That of row i of a thread's four, by values: an index would send them all to memory.
CUTE_HOST_DEVICE Sum one_of(const Sum (&sums)[4], int i) {
    Sum one = sums[0];
    CUTE_UNROLL
    for (int other = 1; other < 4; ++other) {
        one.sum = i == other ? sums[other].sum : one.sum;
        one.most.cosine = i == other ? sums[other].most.cosine : one.most.cosine;
        one.most.column = i == other ? sums[other].most.column : one.most.column;
    }
    return one;
}

// E of a thread's logits in box (half, across), as words: a row's eight, then the other's.
template <class T, bool GENERAL, bool SPECIAL, class Cosines, class Where>
CUTE_HOST_DEVICE void box_terms(const Cosines& c, const Where& where, int half, int across, int first, const AkCosine& p,
                                const Row (&rows)[4], Sum (&sums)[4], uint32_t (&words)[16]) {
    constexpr int kEights = kBoxColumns<T> / 8;
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
        const Row& row = rows[2 * half + i];
        CUTE_UNROLL
        for (int eight = 0; eight < kEights; ++eight) {
            float e[2];
            CUTE_UNROLL
            for (int side = 0; side < 2; ++side) {
                const auto at = cute::make_coord(side, i, kEights * across + eight);
                const int column = first + cute::get<1>(where(at, half, 0));
                const bool masked = SPECIAL && (column == row.label || column >= int(p.w_hat.rows));
                e[side] = term<GENERAL, GENERAL>(c(at, half, 0), column, masked, row, p.filter, p.only_unbounded,
                                                 sums[2 * half + i].most);
                sums[2 * half + i].sum += e[side];
            }
            if constexpr (sizeof(Term<T>) == 4) {
                CUTE_UNROLL
                for (int side = 0; side < 2; ++side) words[8 * i + 2 * eight + side] = float_to_bits(e[side]);
            } else {
                words[8 * i + eight] = pack(e);
            }
        }
    }
}

// A thread's part of a box into its place in shared memory. Its two rows are eight apart and permuted alike, so that the
// parts' places differ in a few bits and the rows' by a constant.
template <class T, class Where>
CUTE_HOST_DEVICE void place_box(const Where& where, const uint32_t (&words)[16], Term<T>* box) {
    constexpr int kEights = kBoxColumns<T> / 8;
    const auto corner = where(cute::make_coord(0, 0, 0), 0, 0);
    const int start = Box<T>{}(cute::get<0>(corner), cute::get<1>(corner));
    CUTE_UNROLL
    for (int eight = 0; eight < kEights; ++eight)
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
            auto* place = box + (start ^ 8 * eight) + 8 * i * kBoxColumns<T>;
            if constexpr (sizeof(Term<T>) == 4)
                *reinterpret_cast<uint2*>(place) = make_uint2(words[8 * i + 2 * eight], words[8 * i + 2 * eight + 1]);
            else
                *reinterpret_cast<uint32_t*>(place) = words[8 * i + eight];
        }
}

// The whole tile; leave(half, across, words) is called as each box is done.
template <class T, bool GENERAL, bool SPECIAL, class Cosines, class Where, class Leave>
CUTE_HOST_DEVICE void tile_terms(const Cosines& c, const Where& where, int first, const AkCosine& p, const Row (&rows)[4],
                                 Sum (&sums)[4], const Leave& leave) {
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half)
        CUTE_UNROLL
        for (int across = 0; across < kClasses / kBoxColumns<T>; ++across) {
            uint32_t words[16];
            box_terms<T, GENERAL, SPECIAL>(c, where, half, across, first, p, rows, sums, words);
            leave(half, across, words);
        }
}

// A row's sum and maximum over its warpgroup's tiles, in their order. Of a quad's four rows each thread keeps one.
struct Totals {
    double z = 0;
    float best = -INFINITY;
    int32_t best_column = -1;

    CUTE_HOST_DEVICE void add(const Sum& one) {
        z += double(one.sum);
        if (one.most.cosine > best) best = one.most.cosine, best_column = one.most.column;
    }

    CUTE_HOST_DEVICE void write(const AkCosine& p, int part, int64_t row) const {
        if (row >= p.x_hat.rows) return;
        const int64_t owned = part * p.x_hat.rows + row;
        if (p.z) p.z[owned] = z;
        if (p.best) p.best[owned] = best, p.best_class[owned] = best_column < 0 ? -1 : p.class_start + best_column;
    }
};

// Two blocks share each tile of classes, unless the batch has rows for one only.
CUTE_HOST_DEVICE int cluster_of(int64_t batch) { return batch > kRows ? 2 : 1; }

// Whether a block of the cluster has a row whose scale needs a shift: the same answer in both, as they share their tiles.
CUTE_HOST_DEVICE bool needs_shift(const AkCosine& p, int64_t row) {
    return row < p.x_hat.rows && !(p.factor[row] <= kBound);
}

}  // namespace sm90
}  // namespace ak
