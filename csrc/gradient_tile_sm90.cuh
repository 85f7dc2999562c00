// A tile of Hopper's gradient kernel: where its operands lie, which thread has which element, and the normalization's
// derivative on them. Nothing here needs a GPU: tests run it on a CPU for every thread, in the same layouts.
#pragma once

#include <cute/tensor.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cutlass/numeric_types.h>

#include "library.h"
#include "schedule_sm90.h"

namespace ak {
namespace sm90 {

constexpr int kCentres = 64;  // classes of a warpgroup's tile; a block's two have the same columns
constexpr int kDeep = 64;     // rows of the batch a step
constexpr int kSharing = 4;   // blocks of a cluster that have the same columns, and share a∘x̂
constexpr int kTogether = kSharing * kParts * kCentres;  // classes of a cluster's tile

// Columns of a block, and blocks side by side: a row of centres must be whole in a cluster.
CUTE_HOST_DEVICE int columns_of(int64_t width) { return width > 128 ? 256 : 128; }
CUTE_HOST_DEVICE int halves_of(int64_t width) { return width > 256 ? 2 : 1; }
constexpr int kWidest = 512;

using cutlass::bfloat16_t;

// Eᵀ times a∘x̂: both lie with the summed index, rows of the batch, as the slow one.
template <int COLUMNS>
using GradientMma = decltype(cute::make_tiled_mma(
    cute::GMMA::ss_op_selector<bfloat16_t, bfloat16_t, float,
                               cute::Shape<cute::Int<kCentres>, cute::Int<COLUMNS>, cute::Int<kDeep>>,
                               cute::GMMA::Major::MN, cute::GMMA::Major::MN>()));

// Boxes of 64 columns and as many rows as are loaded at once, each row 128 bytes permuted, one box after the other.
template <int COLUMNS, int COUNT>
using Panels = decltype(cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<bfloat16_t>{},
                                            cute::Shape<cute::Int<COLUMNS>, cute::Int<kDeep>, cute::Int<COUNT>>{},
                                            cute::Step<cute::_2, cute::_1, cute::_3>{}));

// Coordinates (class, column) of a thread's accumulators: ((2 sides, 2 classes, eights), 1, 1).
template <int COLUMNS>
CUTE_HOST_DEVICE auto gradient_coordinates(int thread) {
    return GradientMma<COLUMNS>{}.get_slice(thread).partition_C(
        cute::make_identity_tensor(cute::Shape<cute::Int<kCentres>, cute::Int<COLUMNS>>{}));
}

// Two neighbours of a row: a quad reads and writes 32 bytes of float32 at once, a whole sector.
template <class W>
struct alignas(2 * sizeof(W)) Two {
    W of[2];
};

// A thread's part of a tile: two of its classes, of each every fourth pair of columns.
template <int COLUMNS, class W>
struct Part {
    static constexpr int kPairs = COLUMNS / 8, kBatch = 8;  // pairs whose loads are under way together
    static_assert(kPairs % kBatch == 0);

    const AkGradCentres& p;
    int first_class, first_column;
    int classes[2];         // in the tile
    int left[2];            // columns from this part's first to the end; none past the last class
    int64_t first[2];       // of the part in either class's row of the centres
    float inverses[2];

    CUTE_HOST_DEVICE Part(const AkGradCentres& p_, int thread, int first_class_, int first_column_)
        : p(p_), first_class(first_class_), first_column(first_column_) {
        const auto where = gradient_coordinates<COLUMNS>(thread);
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
            const auto at = where(cute::make_coord(0, i, 0), 0, 0);
            classes[i] = int(cute::get<0>(at));
            const int64_t row = first_class + classes[i];
            const bool inside = row < p.weight.rows;
            left[i] = inside ? int(p.weight.columns) - first_column - int(cute::get<1>(at)) : 0;
            inverses[i] = inside ? p.inverse_norm[row] : 0.0f;
            first[i] = first_column + int(cute::get<1>(at));
        }
    }

    template <class T>
    CUTE_HOST_DEVICE T* start(const AkMatrix& matrix, int i) const {
        return static_cast<T*>(matrix.data) + (first_class + classes[i]) * matrix.row_stride + first[i];
    }

    struct Centres {
        Two<W> of[2][kBatch];
    };
    CUTE_HOST_DEVICE Centres centres(int batch) const {
        Centres w;
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
            const W* from = start<const W>(p.weight, i) + 8 * batch;
            CUTE_UNROLL
            for (int k = 0; k < kBatch; ++k)
                w.of[i][k] = 8 * (batch + k) < left[i] ? *reinterpret_cast<const Two<W>*>(from + 8 * k) : Two<W>{};
        }
        return w;
    }

    // Σ dŵ·ŵ over this part of either class.
    template <class Products>
    CUTE_HOST_DEVICE void along(const Products& c, float (&sums)[2]) const {
        sums[0] = sums[1] = 0;
        CUTE_UNROLL
        for (int batch = 0; batch < kPairs; batch += kBatch) {
            const Centres w = centres(batch);
            CUTE_UNROLL
            for (int i = 0; i < 2; ++i)
                CUTE_UNROLL
                for (int k = 0; k < kBatch; ++k)
                    CUTE_UNROLL
                    for (int side = 0; side < 2; ++side)
                        sums[i] += c(cute::make_coord(side, i, batch + k), 0, 0) *
                                   (float(w.of[i][k].of[side]) * inverses[i]);
        }
    }

    // dw, from Σ dŵ·ŵ over the whole class.
    template <class Products>
    CUTE_HOST_DEVICE void write(const Products& c, const float (&sums)[2]) const {
        const float upstream = p.upstream ? *p.upstream : 1.0f;
        // Backwards: what was read last may still be in the L1 cache (not where it was emptied, by a wait for the other half).
        CUTE_UNROLL
        for (int batch = kPairs - kBatch; batch >= 0; batch -= kBatch) {
            const Centres w = centres(batch);
            CUTE_UNROLL
            for (int i = 0; i < 2; ++i) {
                W* to = start<W>(p.grad, i) + 8 * batch;
                CUTE_UNROLL
                for (int k = 0; k < kBatch; ++k) {
                    Two<W> result;
                    CUTE_UNROLL
                    for (int side = 0; side < 2; ++side) {
                        const float along = sums[i] * (float(w.of[i][k].of[side]) * inverses[i]);
                        const float across = c(cute::make_coord(side, i, batch + k), 0, 0) - along;
                        result.of[side] = W(across * (inverses[i] * upstream));
                    }
                    if (8 * (batch + k) < left[i]) *reinterpret_cast<Two<W>*>(to + 8 * k) = result;
                }
            }
        }
    }
};

}  // namespace sm90
}  // namespace ak
