// Piece 2 of a step on Hopper: wgmma under CUTLASS's pipeline of bulk copies, two warpgroups that take turns at the tensor
// cores, and one that loads.
//
// Rows of the batch are the M of the products: a row's sum is then over a thread's own registers and its quad's, and E lies
// as both products of the backward pass take it. A block keeps its 128 rows of x̂ in shared memory (to a width of 512, in TF32
// of 256; wider rows come again with each tile) and the classes stream past: a cluster of two blocks loads each tile of ŵ
// once, either block half of it for both. That is 256 flops a byte from the L2 cache. A tile of 128 x 128 of whose operands
// both stream, so shared, has 85: 800 TFLOP/s would take 9.4 TB/s. This is why the main loop is not a collective of CUTLASS's,
// which streams both.
//
// The turns: at a width of 512 a tile of 128 x 128 takes the tensor cores 4096 clocks, its exponentials the special-function
// units 1024, and a warp has some 800 instructions to issue for it; so one warpgroup's epilogue hides under the other's
// products. Both warpgroups at one tile of 128 x 256 would leave the tensor cores idle for a quarter of the time.
//
// Sums have a fixed order whatever runs first: a cluster owns its rows in its stream of tiles, each warpgroup every second
// tile, and keeps their sums in registers. So no order hangs on a scheduler, and no tile's sums go to memory.
#pragma once

#include "roles_sm90.cuh"
#include "tile_sm90.cuh"

namespace ak {
namespace sm90 {
namespace {

constexpr int kMostSteps = 8;  // of a row of x̂ that stays: 1024 bytes
constexpr int kTileBytes = kRows * 128;

struct Parameters {
    AkCosine p;
    CUtensorMap x_hat, w_hat, terms;
};

template <class T, bool STAYS>
struct Shared {
    static constexpr int kStages = STAYS ? 5 : 6;
    static constexpr int kTilesOfX = STAYS ? kMostSteps : kStages;
    static constexpr bool kStays = STAYS;
    static constexpr int kTileElements = kTileBytes / int(sizeof(T)), kDepth = sm90::kDepth<T>;
    using Pipeline = cutlass::PipelineTmaAsync<kStages>;
    using State = cutlass::PipelineState<kStages>;
    using Order = cutlass::OrderedSequenceBarrier<1, 2>;

    alignas(1024) T x[kTilesOfX][kTileElements];
    alignas(1024) T w[kStages][kTileElements];
    alignas(1024) Term<T> boxes[kParts][kBoxRows * kBoxColumns<T>];
    typename Pipeline::SharedStorage pipeline;
    typename Order::SharedStorage order;
    cutlass::arch::ClusterTransactionBarrier x_arrived[STAYS ? kMostSteps : 1];
};
static_assert(sizeof(Shared<cutlass::half_t, true>) == 225 << 10 && sizeof(Shared<cutlass::half_t, false>) == 209 << 10);
static_assert(sizeof(Shared<cutlass::tfloat32_t, true>) == 225 << 10);

// Bulk copies into shared memory, by one thread.
template <class Memory>
struct Copies {
    const Parameters& p;
    Memory& shared;
    typename Memory::Pipeline& pipeline;
    int cluster, rank;

    __device__ int first_row() const { return int(blockIdx.x) * kRows; }

    __device__ void once(int step) const {
        if (!Memory::kStays) return;
        shared.x_arrived[step].arrive_and_expect_tx(kTileBytes);
        cute::SM90_TMA_LOAD_2D::copy(&p.x_hat, reinterpret_cast<uint64_t*>(&shared.x_arrived[step]), kCacheHint,
                                     shared.x[step], step * Memory::kDepth, first_row());
    }

    __device__ void each(const typename Memory::State& state, int first_class, int step) const {
        uint64_t* arrived = pipeline.producer_get_barrier(state);
        const int stage = int(state.index());
        if (!Memory::kStays)
            cute::SM90_TMA_LOAD_2D::copy(&p.x_hat, arrived, kCacheHint, shared.x[stage], step * Memory::kDepth,
                                         first_row());
        // Each block of the cluster loads its share for all.
        for (int half = rank; half < 2; half += cluster)
            cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&p.w_hat, arrived, uint16_t((1 << cluster) - 1), kCacheHint,
                                                   shared.w[stage] + half * Memory::kTileElements / 2,
                                                   step * Memory::kDepth,
                                                   first_class + half * kClasses / 2);
    }
};

// The largest of a row, and its sum, over the quad that shares it, the same in each.
__device__ inline void reduce_quad(Sum (&sums)[4], bool best) {
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i)
        CUTE_UNROLL
        for (int mask = 1; mask < 4; mask *= 2) {
            sums[i].sum += __shfl_xor_sync(0xFFFFFFFFu, sums[i].sum, mask);
            if (!best) continue;
            Most other;
            other.cosine = __shfl_xor_sync(0xFFFFFFFFu, sums[i].most.cosine, mask);
            other.column = __shfl_xor_sync(0xFFFFFFFFu, sums[i].most.column, mask);
            sums[i].most = larger(sums[i].most, other);
        }
}

// What a warpgroup does with its tiles.
template <class T, bool GENERAL, class Memory>
struct Work {
    using X = Operands<T, Memory::kTilesOfX>;
    using W = Operands<T, Memory::kStages>;
    using Cosines = decltype(cute::partition_fragment_C(Mma<T>{}, Tile{}));

    const Parameters& parameters;
    Memory& shared;
    int group, thread, first_row;
    Mma<T> mma;
    Cosines c;
    Row rows[4];
    Totals totals;

    __device__ Work(const Parameters& parameters_, Memory& shared_, int group_)
        : parameters(parameters_), shared(shared_), group(group_), thread(threadIdx.x % kGroup),
          first_row(int(blockIdx.x) * kRows) {
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) rows[i] = load_row(parameters.p, first_row + row_of_thread(coordinates<T>(thread), i));
    }

    __device__ void begin(int) { mma.accumulate_ = cute::GMMA::ScaleOut::Zero; }
    __device__ void wait_once(int step) {
        if (Memory::kStays) shared.x_arrived[step].wait(0);
    }

    __device__ void multiply(int step, int stage) {
        using namespace cute;
        const auto slice = mma.get_slice(0);
        const Tensor x = slice.make_fragment_A(slice.partition_A(make_tensor(make_smem_ptr(shared.x[0]), X{})));
        const Tensor w = slice.make_fragment_B(slice.partition_B(make_tensor(make_smem_ptr(shared.w[0]), W{})));
        multiply_stage(mma, x(_, _, _, Memory::kStays ? step : stage), w(_, _, _, stage), c);
    }

    __device__ void wait_for_all_but_the_last() { wait_for_products<1>(c); }
    __device__ void wait_for_all() { wait_for_products<0>(c); }

    // The epilogue.
    __device__ void finish(int first) {
        const AkCosine& p = parameters.p;
        const auto where = coordinates<T>(thread);
        const auto leave = [&](int half, int across, const uint32_t(&words)[16]) {
            if (p.terms.data) store_box(where, half, across, words, first);
        };
        Sum sums[4];
        if (__any_sync(0xFFFFFFFFu, is_special(rows, first, int(p.w_hat.rows))))
            tile_terms<T, GENERAL, true>(c, where, first, p, rows, sums, leave);
        else
            tile_terms<T, GENERAL, false>(c, where, first, p, rows, sums, leave);
        reduce_quad(sums, GENERAL);
        totals.add(one_of(sums, thread % 4));
    }

    template <class Where>
    __device__ void store_box(const Where& where, int half, int across, const uint32_t (&words)[16], int first) {
        const AkCosine& p = parameters.p;
        Term<T>* const box = shared.boxes[group];
        if (thread == 0) cute::tma_store_wait<0>();  // the box before has been read
        cutlass::arch::NamedBarrier::sync(kGroup, uint32_t(group));
        keep_accesses_here();
        place_box<T>(where, words, box);
        keep_accesses_here();
        cute::tma_store_fence();
        cutlass::arch::NamedBarrier::sync(kGroup, uint32_t(group));
        const int column = first + across * kBoxColumns<T>, row = first_row + half * kBoxRows;
        if (thread == 0 && column < p.terms.columns && row < p.x_hat.rows) {
            cute::SM90_TMA_STORE_2D::copy(&parameters.terms, box, column, row);
            cute::tma_store_arrive();
        }
    }

    __device__ void end() {
        totals.write(parameters.p, int(blockIdx.y) * kParts + group,
                     first_row + row_of_thread(coordinates<T>(thread), thread % 4));
        if (thread == 0) cute::tma_store_wait<0>();  // shared memory must outlive its readers
    }
};

template <class T, bool GENERAL, bool STAYS>
__global__ void __launch_bounds__(kThreads, 1) cosine_exp(const __grid_constant__ Parameters parameters) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Memory = Shared<T, STAYS>;
    AK_DYNAMIC_SHARED(memory);
    Memory& shared = *reinterpret_cast<Memory*>(memory);
    const AkCosine& p = parameters.p;
    const int group = cutlass::canonical_warp_group_idx() - 1;  // -1 loads
    const int cluster = int(cute::cluster_shape().x), rank = int(cute::block_rank_in_cluster());
    const int steps = int((p.x_hat.columns + kDepth<T> - 1) / kDepth<T>);
    Turn turn = {int(blockIdx.y), int(gridDim.y), int((p.w_hat.rows + kClasses - 1) / kClasses), kClasses};
    if (p.only_unbounded) {
        bool unbounded = false;
        const int64_t first = int64_t(blockIdx.x - rank) * kRows;
        for (int i = threadIdx.x; i < cluster * kRows; i += kThreads) unbounded |= needs_shift(p, first + i);
        if (!__syncthreads_or(unbounded)) turn.tiles = 0;  // a pass that rows of a moderate scale do without
    }

    if (threadIdx.x == 0) {
        cute::prefetch_tma_descriptor(&parameters.x_hat);
        cute::prefetch_tma_descriptor(&parameters.w_hat);
        if (p.terms.data) cute::prefetch_tma_descriptor(&parameters.terms);
        for (auto& barrier : shared.x_arrived) barrier.init(1);
    }
    typename Memory::Pipeline::Params roles;
    using Role = typename Memory::Pipeline::ThreadCategory;
    roles.transaction_bytes = STAYS ? kTileBytes : 2 * kTileBytes;
    roles.role = group < 0 ? Role::Producer : Role::Consumer;
    roles.is_leader = group < 0;  // whichever of them loads
    roles.num_consumers = kGroup;  // a stage is for one of the two
    typename Memory::Pipeline pipeline(shared.pipeline, roles, cute::make_shape(cluster, cute::_1{}, cute::_1{}));
    typename Memory::Order order(shared.order, {uint32_t(group == 1), kGroup});  // fences the barriers' initialization too
    cute::cluster_sync();

    if (group < 0) {
        cutlass::arch::warpgroup_reg_dealloc<24>();
        // Elected, the compiler knows it to be one thread, as copies want.
        if (cutlass::canonical_warp_idx_sync() == 0 && cute::elect_one_sync())
            load_tiles(pipeline, cutlass::make_producer_start_state<typename Memory::Pipeline>(), turn, steps,
                       Copies<Memory>{parameters, shared, pipeline, cluster, rank});
    } else {
        cutlass::arch::warpgroup_reg_alloc<240>();
        Work<T, GENERAL, Memory> work(parameters, shared, group);
        multiply_tiles(pipeline, order, typename Memory::State(), turn, steps, group, kParts, work);
        work.end();
    }
#endif
}

}  // namespace
}  // namespace sm90
}  // namespace ak
