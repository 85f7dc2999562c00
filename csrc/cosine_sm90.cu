// Piece 2 of a step on Hopper: wgmma under CUTLASS's pipeline of bulk copies, two warpgroups that take turns at the tensor
// cores, and one that loads. Built only with CUTLASS's headers.
//
// Rows of the batch are the M of the products: a row's sum is then over a thread's own registers and its quad's, and E lies
// as both products of the backward pass take it. A block keeps its 128 rows of x̂ in shared memory (to a width of 512; wider
// rows come again with each tile) and the classes stream past: a cluster of two blocks loads each tile of ŵ once, either
// block half of it for both. That is 256 flops a byte from the L2 cache. A tile of 128 x 128 of whose operands both stream,
// so shared, has 85: 800 TFLOP/s would take 9.4 TB/s. This is why the main loop is not a collective of CUTLASS's, which
// streams both.
//
// The turns: at a width of 512 a tile of 128 x 128 takes the tensor cores 4096 clocks, its exponentials the special-function
// units 1024, and a warp has some 800 instructions to issue for it; so one warpgroup's epilogue hides under the other's
// products. Both warpgroups at one tile of 128 x 256 would leave the tensor cores idle for a quarter of the time.
//
// Sums have a fixed order whatever runs first: a cluster owns its rows in its stream of tiles, each warpgroup every second
// tile, and keeps their sums in registers. So no order hangs on a scheduler, and no tile's sums go to memory.
#ifdef AK_CUTLASS

#ifndef NDEBUG
#define NDEBUG  // else CUTLASS's device code asserts
#endif
#include "tile_sm90.cuh"
//
#include <cuda.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/pipeline/sm90_pipeline.hpp>

#include "cosine.h"
#include "launch.cuh"

namespace ak {
namespace sm90 {
namespace {

constexpr int kThreads = 384, kGroup = 128;
constexpr int kMostSteps = 8;  // of a row of x̂ that stays: a width of 512
constexpr int kTileElements = kRows * kDepth, kTileBytes = kTileElements * 2;
constexpr uint64_t kCacheHint = uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL);

struct Parameters {
    AkCosine p;
    CUtensorMap x_hat, w_hat, terms;
};

template <class T, bool STAYS>
struct Shared {
    static constexpr int kStages = STAYS ? 5 : 6;
    static constexpr int kTilesOfX = STAYS ? kMostSteps : kStages;
    using Pipeline = cutlass::PipelineTmaAsync<kStages>;
    using Order = cutlass::OrderedSequenceBarrier<1, 2>;

    alignas(1024) T x[kTilesOfX][kTileElements];
    alignas(1024) T w[kStages][kTileElements];
    alignas(1024) bfloat16 squares[kParts][kSquare * kSquare];
    typename Pipeline::SharedStorage pipeline;
    typename Order::SharedStorage order;
    cutlass::arch::ClusterTransactionBarrier x_arrived[STAYS ? kMostSteps : 1];
};
static_assert(sizeof(Shared<cutlass::half_t, true>) == 225 << 10 && sizeof(Shared<cutlass::half_t, false>) == 209 << 10);

// Bulk copies of the classes' tiles, and of x̂, by one thread.
template <class Memory>
__device__ void load(const Parameters& p, Memory& shared, typename Memory::Pipeline& pipeline, const Turn& turn, int steps,
                     int cluster, int rank) {
    constexpr bool STAYS = Memory::kTilesOfX == kMostSteps;
    const int first_row = int(blockIdx.x) * kRows, count = turn.count();
    auto state = cutlass::make_producer_start_state<typename Memory::Pipeline>();
    for (int i = 0; i < count; ++i) {
        const int first = turn.first_class(i);
        for (int step = 0; step < steps; ++step, ++state) {
            if (STAYS && i == 0) {
                shared.x_arrived[step].arrive_and_expect_tx(kTileBytes);
                cute::SM90_TMA_LOAD_2D::copy(&p.x_hat, reinterpret_cast<uint64_t*>(&shared.x_arrived[step]), kCacheHint,
                                             shared.x[step], step * kDepth, first_row);
            }
            pipeline.producer_acquire(state);
            uint64_t* arrived = pipeline.producer_get_barrier(state);
            if (!STAYS)
                cute::SM90_TMA_LOAD_2D::copy(&p.x_hat, arrived, kCacheHint, shared.x[state.index()], step * kDepth,
                                             first_row);
            // Each block of the cluster loads its share for all.
            for (int half = rank; half < 2; half += cluster)
                cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&p.w_hat, arrived, uint16_t((1 << cluster) - 1), kCacheHint,
                                                       shared.w[state.index()] + half * kTileElements / 2, step * kDepth,
                                                       first + half * kClasses / 2);
        }
    }
    pipeline.producer_tail(state);  // the other block's copies and signals still come here
}

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

// Every second tile of the stream's: products in their turn, then the epilogue.
template <class T, bool GENERAL, class Memory>
__device__ void multiply(const Parameters& parameters, Memory& shared, typename Memory::Pipeline& pipeline,
                         typename Memory::Order& order, const Turn& turn, int steps, int group) {
    using namespace cute;
    constexpr bool STAYS = Memory::kTilesOfX == kMostSteps;
    const AkCosine& p = parameters.p;
    const int thread = threadIdx.x % kGroup, first_row = int(blockIdx.x) * kRows;
    const auto where = coordinates<T>(thread);
    Row rows[4];
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) rows[i] = load_row(p, first_row + row_of_thread(where, i));

    Mma<T> mma;
    const auto slice = mma.get_slice(0);
    const Tensor x = slice.make_fragment_A(
        slice.partition_A(make_tensor(make_smem_ptr(shared.x[0]), Operands<T, Memory::kTilesOfX>{})));
    const Tensor w =
        slice.make_fragment_B(slice.partition_B(make_tensor(make_smem_ptr(shared.w[0]), Operands<T, Memory::kStages>{})));
    bfloat16* const square = shared.squares[group];
    const auto leave = [&](int half, int right, const uint32_t(&pairs)[16], int first) {
        if (!p.terms.data) return;
        if (thread == 0) tma_store_wait<0>();  // the square before has been read
        cutlass::arch::NamedBarrier::sync(kGroup, group);
        place_square(where, pairs, square);
        tma_store_fence();
        cutlass::arch::NamedBarrier::sync(kGroup, group);
        const int column = first + right * kSquare, row = first_row + half * kSquare;
        if (thread == 0 && column < p.terms.columns && row < p.x_hat.rows) {
            SM90_TMA_STORE_2D::copy(&parameters.terms, square, column, row);
            tma_store_arrive();
        }
    };

    Totals totals;
    cutlass::PipelineState<Memory::kStages> state;
    state.advance(group * steps);
    const int count = turn.count();
    for (int i = group; i < count; i += 2) {
        Tensor c = partition_fragment_C(mma, Tile{});
        order.wait();
        mma.accumulate_ = GMMA::ScaleOut::Zero;
        auto before = state;
        for (int step = 0; step < steps; ++step) {
            if (STAYS && i == group) shared.x_arrived[step].wait(0);
            pipeline.consumer_wait(state);
            warpgroup_fence_operand(c);
            warpgroup_arrive();
            CUTE_UNROLL
            for (int k = 0; k < size<2>(w); ++k) {
                gemm(mma, x(_, _, k, STAYS ? step : int(state.index())), w(_, _, k, int(state.index())), c);
                mma.accumulate_ = GMMA::ScaleOut::One;
            }
            warpgroup_commit_batch();
            warpgroup_wait<1>();
            warpgroup_fence_operand(c);
            if (step > 0) pipeline.consumer_release(before);
            before = state;
            ++state;
        }
        order.arrive();
        warpgroup_wait<0>();
        warpgroup_fence_operand(c);
        pipeline.consumer_release(before);
        state.advance(steps);  // the other's tile

        const int first = turn.first_class(i);
        Sum sums[4];
        const auto leave_here = [&](int half, int right, const uint32_t(&pairs)[16]) { leave(half, right, pairs, first); };
        if (__any_sync(0xFFFFFFFFu, is_special(rows, first, int(p.w_hat.rows))))
            tile_terms<GENERAL, true>(c, where, first, p, rows, sums, leave_here);
        else
            tile_terms<GENERAL, false>(c, where, first, p, rows, sums, leave_here);
        reduce_quad(sums, GENERAL);
        totals.add(one_of(sums, thread % 4));
    }
    totals.write(p, int(blockIdx.y) * kParts + group, first_row + row_of_thread(where, thread % 4));
    if (thread == 0) tma_store_wait<0>();  // shared memory must outlive its readers
}

template <class T, bool GENERAL, bool STAYS>
__global__ void __launch_bounds__(kThreads, 1) cosine_exp(const __grid_constant__ Parameters parameters) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Memory = Shared<T, STAYS>;
    extern __shared__ __align__(1024) unsigned char memory[];
    Memory& shared = *reinterpret_cast<Memory*>(memory);
    const AkCosine& p = parameters.p;
    const int group = cutlass::canonical_warp_group_idx() - 1;  // -1 loads
    const int cluster = int(cute::cluster_shape().x), rank = int(cute::block_rank_in_cluster());
    const int steps = int((p.x_hat.columns + kDepth - 1) / kDepth);
    Turn turn = {int(blockIdx.y), int(gridDim.y), int((p.w_hat.rows + kClasses - 1) / kClasses)};
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
    roles.is_leader = threadIdx.x == 0;
    roles.num_consumers = kGroup;  // a stage is for one of the two
    typename Memory::Pipeline pipeline(shared.pipeline, roles, cute::make_shape(cluster, cute::_1{}, cute::_1{}));
    typename Memory::Order order(shared.order, {uint32_t(group == 1), kGroup});  // fences the barriers' initialization too
    cute::cluster_sync();

    if (group < 0) {
        cutlass::arch::warpgroup_reg_dealloc<40>();
        if (threadIdx.x == 0) load(parameters, shared, pipeline, turn, steps, cluster, rank);
    } else {
        cutlass::arch::warpgroup_reg_alloc<232>();
        multiply<T, GENERAL>(parameters, shared, pipeline, order, turn, steps, group);
    }
#endif
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's own function, without linking its library.
Encode encode_function() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    auto error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    auto error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess) cudaGetLastError();
    return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

// How bulk copies see a matrix: boxes of `rows` rows and 64 columns, zeros outside it, never written there.
bool describe(Encode encode, CUtensorMap& map, const AkMatrix& matrix, int rows) {
    const cuuint64_t size[2] = {cuuint64_t(matrix.columns), cuuint64_t(matrix.rows)};
    const cuuint64_t stride[1] = {cuuint64_t(matrix.row_stride) * 2};
    const cuuint32_t box[2] = {kDepth, cuuint32_t(rows)}, step[2] = {1, 1};
    const auto type = matrix.type == AK_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    return encode(&map, type, 2, matrix.data, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

const char* message(cudaError_t error) {
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();  // not left to the next launch
    return cudaGetErrorString(error);
}

using Kernel = void (*)(Parameters);

struct Variant {
    Kernel kernel;
    int shared;
};

template <class T, bool GENERAL, bool STAYS>
Variant variant() {
    return {cosine_exp<T, GENERAL, STAYS>, int(sizeof(Shared<T, STAYS>))};
}

template <class T>
Variant variant(bool general, bool stays) {
    if (general) return stays ? variant<T, true, true>() : variant<T, true, false>();
    return stays ? variant<T, false, true>() : variant<T, false, false>();
}

Variant variant(bool float16, bool general, int64_t width) {
    const bool stays = width <= kMostSteps * kDepth;
    return float16 ? variant<cutlass::half_t>(general, stays) : variant<cutlass::bfloat16_t>(general, stays);
}

// The grid's first side: blocks of rows, whole clusters of them. The attribute must outlive the configuration.
cudaLaunchConfig_t configure(cudaLaunchAttribute& attribute, int64_t batch, int streams, int shared, void* stream) {
    const int cluster = cluster_of(batch);
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t configuration = {};
    const int64_t clusters = (batch + cluster * kRows - 1) / (cluster * kRows);
    configuration.gridDim = dim3(unsigned(clusters * cluster), unsigned(streams));
    configuration.blockDim = dim3(kThreads);
    configuration.dynamicSmemBytes = size_t(shared);
    configuration.stream = static_cast<cudaStream_t>(stream);
    configuration.attrs = &attribute, configuration.numAttrs = 1;
    return configuration;
}

const char* check() {
    for (bool float16 : {false, true})
        for (bool general : {false, true})
            for (int64_t width : {16, 1024}) {
                const Variant v = variant(float16, general, width);
                auto error = cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, v.shared);
                if (error != cudaSuccess) return message(error);
            }
    return encode_function() ? nullptr : "the driver has no tensor maps: it is older than CUDA 12";
}

const char* tiling(AkTiling& p) {
    const int cluster = cluster_of(p.batch);
    p.rows = cluster * kRows, p.classes = kClasses, p.parts = kParts;
    const Variant v = variant(false, false, p.width);
    auto error = cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, v.shared);
    if (error != cudaSuccess) return message(error);
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t configuration = configure(attribute, p.batch, 1, v.shared, nullptr);
    return message(cudaOccupancyMaxActiveClusters(&p.blocks, v.kernel, &configuration));
}

const char* launch(const AkCosine& p, const AkWhere& where) {
    static const Encode encode = encode_function();
    if (!encode) return "the driver has no tensor maps: it is older than CUDA 12";
    if (p.parts % kParts) return "an odd number of partial sums";
    const bool filter = p.filter <= 1.0f, general = filter || p.best;
    Parameters parameters = {p, {}, {}, {}};
    if (!filter) parameters.p.filter = INFINITY;
    if (!describe(encode, parameters.x_hat, p.x_hat, kRows) || !describe(encode, parameters.w_hat, p.w_hat, kClasses / 2) ||
        (p.terms.data && !describe(encode, parameters.terms, p.terms, kSquare)))
        return "the driver refuses a matrix's shape for bulk copies";
    const Variant v = variant(p.x_hat.type == AK_FLOAT16, general, p.x_hat.columns);
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t configuration =
        configure(attribute, p.x_hat.rows, p.parts / kParts, v.shared, where.stream);
    return message(cudaLaunchKernelEx(&configuration, v.kernel, parameters));
}

}  // namespace
}  // namespace sm90

const CosineKernel hopper_cosine = {sm90::check, sm90::tiling, sm90::launch};

}  // namespace ak

#endif
