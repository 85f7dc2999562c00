// Pieces 4 and 5 of a step for the centres on Hopper, as one: dŵ = Eᵀ(a∘x̂), and dw through the normalization's derivative
// while dŵ is still in registers. The gradient is written once, and but for the batch's own classes never read back.
//
// The derivative wants whole rows of dŵ. A tile of 128 classes and 512 columns does not fit an SM's registers, and one of 64 by
// itself would read 57 flops a byte from the L2 cache, a third of what the tensor cores want. So a cluster of two by four blocks
// makes a tile of 512 classes: a block has 128 of them and half of the columns; what it loads of E goes to the block beside it
// too, and of a∘x̂ to the three below it: 256 flops a byte. Up to a width of 256 a block has whole rows, and E is its own.
//
// A block's two warpgroups have 64 classes each, of the same stages of a∘x̂. To take turns, as in the cosine kernel, would hide
// the epilogue (the centres read twice, the second time out of the caches, and dw written), but each would want a∘x̂ for itself:
// with 64 classes to a stage its shared memory would have 160 bytes a clock to move, for the tensor cores' full rate, and has 128.
// Together they have 128, as a library's product of this tile has.
#pragma once

#include "roles_sm90.cuh"
//
#include "gradient_tile_sm90.cuh"

namespace ak {
namespace sm90 {
namespace {

struct GradientParameters {
    AkGradCentres p;
    CUtensorMap terms, x_factored;
};

template <int COLUMNS>
struct GradientShared {
    static constexpr int kStages = COLUMNS == 256 ? 4 : 6;
    static constexpr int kBytes = (kParts * kCentres + COLUMNS) * kDeep * int(sizeof(bfloat16_t));  // of a stage
    using Pipeline = cutlass::PipelineTmaAsync<kStages>;
    using State = cutlass::PipelineState<kStages>;

    alignas(1024) bfloat16_t terms[kParts][kStages][kCentres * kDeep];  // a warpgroup's own
    alignas(1024) bfloat16_t x[kStages][COLUMNS * kDeep];
    typename Pipeline::SharedStorage pipeline;
    // What the block beside this one sends: two places, as it may be a tile ahead.
    cutlass::arch::ClusterTransactionBarrier sent[kParts][2];
    float along[kParts][2][kCentres];
};

// Where a block is in its cluster: which half of the columns, which of the classes.
struct Place {
    int halves, half, share;

    __device__ int rank(int h, int s) const { return h + s * halves; }
    __device__ int first_class(int of_cluster, int group) const { return of_cluster + (share * kParts + group) * kCentres; }
    __device__ uint16_t beside() const { return uint16_t(((1 << halves) - 1) << rank(0, share)); }
    __device__ uint16_t below() const {
        int mask = 0;
        for (int s = 0; s < kSharing; ++s) mask |= 1 << rank(half, s);
        return uint16_t(mask);
    }
};

// Bulk copies into shared memory, by one thread.
template <int COLUMNS>
struct GradientCopies {
    using Memory = GradientShared<COLUMNS>;
    const GradientParameters& p;
    Memory& shared;
    typename Memory::Pipeline& pipeline;
    Place place;

    __device__ void once(int) const {}

    __device__ void each(const typename Memory::State& state, int first_class, int step) const {
        uint64_t* arrived = pipeline.producer_get_barrier(state);
        const int stage = int(state.index()), row = step * kDeep;
        constexpr int kBox = 64;  // columns
        static_assert(kBox == kCentres);
        for (int group = place.half; group < kParts; group += place.halves)
            cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&p.terms, arrived, place.beside(), kCacheHint,
                                                   shared.terms[group][stage], place.first_class(first_class, group), row);
        for (int part = place.share; part < COLUMNS / kBox; part += kSharing)
            cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&p.x_factored, arrived, place.below(), kCacheHint,
                                                   shared.x[stage] + part * kDeep * kBox,
                                                   place.half * COLUMNS + part * kBox, row);
    }
};

// What a warpgroup does with its tiles.
template <int COLUMNS, class W>
struct GradientWork {
    using Memory = GradientShared<COLUMNS>;
    using Products = decltype(cute::partition_fragment_C(GradientMma<COLUMNS>{},
                                                         cute::Shape<cute::Int<kCentres>, cute::Int<COLUMNS>>{}));

    const GradientParameters& parameters;
    Memory& shared;
    Place place;
    int group, thread, tiles = 0;
    GradientMma<COLUMNS> mma;
    Products c;

    __device__ GradientWork(const GradientParameters& parameters_, Memory& shared_, Place place_, int group_)
        : parameters(parameters_), shared(shared_), place(place_), group(group_), thread(threadIdx.x % kGroup) {}

    // The epilogue's centres are on their way to the L2 cache while the products are made.
    __device__ void begin(int first) {
        mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
        const AkMatrix& weight = parameters.p.weight;
        constexpr int kLine = 128 / int(sizeof(W));
        for (int line = thread; line < kCentres * COLUMNS / kLine; line += kGroup) {
            const int64_t row = place.first_class(first, group) + line / (COLUMNS / kLine);
            const int column = place.half * COLUMNS + line % (COLUMNS / kLine) * kLine;
            if (row >= weight.rows || column >= weight.columns) continue;
            const W* from = static_cast<const W*>(weight.data) + row * weight.row_stride + column;
            prefetch_to_l2(from);
        }
    }
    __device__ void wait_once(int) {}

    __device__ void multiply(int, int stage) {
        using namespace cute;
        const auto slice = mma.get_slice(0);
        const Tensor e = slice.make_fragment_A(
            slice.partition_A(make_tensor(make_smem_ptr(shared.terms[group][0]), Panels<kCentres, Memory::kStages>{})));
        const Tensor x = slice.make_fragment_B(
            slice.partition_B(make_tensor(make_smem_ptr(shared.x[0]), Panels<COLUMNS, Memory::kStages>{})));
        multiply_stage(mma, e(_, _, _, stage), x(_, _, _, stage), c);
    }

    __device__ void wait_for_all_but_the_last() { wait_for_products<1>(c); }
    __device__ void wait_for_all() { wait_for_products<0>(c); }

    // The epilogue.
    __device__ void finish(int first) {
        const Part<COLUMNS, W> mine(parameters.p, thread, place.first_class(first, group), place.half * COLUMNS);
        float sums[2];
        mine.along(c, sums);
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i)
            CUTE_UNROLL
            for (int mask = 1; mask < 4; mask *= 2) sums[i] += __shfl_xor_sync(0xFFFFFFFFu, sums[i], mask);
        if (place.halves == 2) add_the_other_half(mine, sums);
        mine.write(c, sums);
        ++tiles;
    }

    // Both blocks add the same two numbers. A place is written again only once its warpgroup has sent for the tile after, which
    // each of its warps does after having read.
    __device__ void add_the_other_half(const Part<COLUMNS, W>& mine, float (&sums)[2]) {
        const int at = tiles % 2, lane = thread % 4;
        auto& sent = shared.sent[group][at];
        float* const along = shared.along[group][at];
        if (thread == 0) sent.arrive_and_expect_tx(kCentres * sizeof(float));
        if (lane < 2)
            cute::store_shared_remote(__float_as_uint(lane ? sums[1] : sums[0]),
                                      cute::cast_smem_ptr_to_uint(along + (lane ? mine.classes[1] : mine.classes[0])),
                                      cute::cast_smem_ptr_to_uint(&sent), uint32_t(place.rank(1 - place.half, place.share)));
        wait_for_the_cluster(&sent, uint32_t(tiles / 2 % 2));
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) sums[i] += along[mine.classes[i]];
    }
};

template <int COLUMNS, class W>
__global__ void __launch_bounds__(kThreads, 1) grad_centres(const __grid_constant__ GradientParameters parameters) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Memory = GradientShared<COLUMNS>;
    AK_DYNAMIC_SHARED(memory);
    Memory& shared = *reinterpret_cast<Memory*>(memory);
    const AkGradCentres& p = parameters.p;
    const int group = cutlass::canonical_warp_group_idx() - 1;  // -1 loads
    const dim3 shape = cute::cluster_shape(), at = cute::block_id_in_cluster();
    const Place place = {int(shape.x), int(at.x), int(at.y)};
    const int steps = int((p.terms.rows + kDeep - 1) / kDeep);
    const Turn turn = {int(blockIdx.y) / kSharing, int(gridDim.y) / kSharing,
                       int((p.weight.rows + kTogether - 1) / kTogether), kTogether};

    if (threadIdx.x == 0) {
        cute::prefetch_tma_descriptor(&parameters.terms);
        cute::prefetch_tma_descriptor(&parameters.x_factored);
        for (auto& barriers : shared.sent)
            for (auto& barrier : barriers) barrier.init(1);
    }
    typename Memory::Pipeline::Params roles;
    using Role = typename Memory::Pipeline::ThreadCategory;
    roles.transaction_bytes = Memory::kBytes;
    roles.role = group < 0 ? Role::Producer : Role::Consumer;
    roles.is_leader = group < 0;  // whichever of them loads
    roles.num_consumers = kParts * kGroup;
    typename Memory::Pipeline pipeline(shared.pipeline, roles,
                                       cute::make_shape(place.halves, cute::Int<kSharing>{}, cute::_1{}));
    cutlass::arch::fence_barrier_init();
    cute::cluster_sync();

    if (group < 0) {
        cutlass::arch::warpgroup_reg_dealloc<24>();
        // Elected, the compiler knows it to be one thread, as copies want.
        if (cutlass::canonical_warp_idx_sync() == 0 && cute::elect_one_sync())
            load_tiles(pipeline, cutlass::make_producer_start_state<typename Memory::Pipeline>(), turn, steps,
                       GradientCopies<COLUMNS>{parameters, shared, pipeline, place});
    } else {
        cutlass::arch::warpgroup_reg_alloc<240>();
        GradientWork<COLUMNS, W> work(parameters, shared, place, group);
        NoOrder order;
        multiply_tiles(pipeline, order, typename Memory::State(), turn, steps, 0, 1, work);
    }
#endif
}

}  // namespace
}  // namespace sm90
}  // namespace ak
