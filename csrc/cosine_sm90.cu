// Piece 2 of a step on Hopper: E and z. A block has 128 rows of x̂ and a stream of tiles of 128 classes, every so manieth.
//
// Shared memory, 225 KiB: x̂ (8 steps of 128 bytes a row, 128 KiB; wider rows come again with each tile, a stage at a time), 5
// stages of ŵ (16 KiB each; 6 where x̂ comes again), a box of E for each warpgroup that multiplies (8 KiB), barriers.
//
// Warpgroup 0 loads, by one thread. Of a cluster of two blocks (one, of 128 rows or less) either loads half of each tile of ŵ
// for both: 256 flops a byte from the L2 cache, where a product that streams both operands has 85. Warpgroups 1 and 2 take turns
// at the tensor cores, a tile each: one's epilogue (exponentials, mask, sums, E to a box and out) hides under the other's
// products. Rows of the batch are the M of the products, so that a row's sum is over a quad's registers, always in one order.
#ifdef AK_CUTLASS

#include "sm90.cuh"
//
#include "epilogue.cuh"

namespace ak {
namespace sm90 {
namespace {

constexpr int kRows = 128, kClasses = 128;  // a warpgroup's tile
constexpr int kMostSteps = 8;               // of a row of x̂ that stays: 1024 bytes
constexpr int kBoxRows = 64;
constexpr int kTileBytes = kRows * 128;

// Bulk copies permute within rows of 128 bytes at most: that much is a step of a tile's products deep, and E leaves in boxes
// that wide.
template <class T>
constexpr int kDepth = 128 / int(sizeof(T));
template <class T>
using Term = std::conditional_t<sizeof(T) == 4, float, bfloat16>;  // of E, beside operands T
template <class T>
constexpr int kBoxColumns = 128 / int(sizeof(Term<T>));

using Tile = Shape<Int<kRows>, Int<kClasses>>;
template <class T>
using Mma = decltype(cute::make_tiled_mma(
    cute::GMMA::ss_op_selector<T, T, float, Shape<Int<kRows>, Int<kClasses>, Int<kDepth<T>>>>()));
template <class T>
using Cosines = decltype(cute::partition_fragment_C(Mma<T>{}, Tile{}));

// Rows of 128 bytes whose eight 16-byte parts are permuted by the row, as bulk copies write and read them.
template <class T, int COUNT>
using Operands = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<T>{},
                                              Shape<Int<kRows>, Int<kDepth<T>>, Int<COUNT>>{}));
// The same as plain offsets: a layout of products' operands permutes addresses, not offsets.
template <class T>
using Box = decltype(cute::as_position_independent_swizzle_layout(cute::tile_to_shape(
    cute::GMMA::Layout_K_SW128_Atom<Term<T>>{}, Shape<Int<kBoxRows>, Int<kBoxColumns<T>>>{})));

struct Parameters {
    AkCosine p;
    CUtensorMap x_hat, w_hat, terms;
};

template <class T, bool STAYS>
struct Shared {
    static constexpr int kStages = STAYS ? 5 : 6;
    static constexpr int kTilesOfX = STAYS ? kMostSteps : kStages;
    static constexpr int kTileElements = kTileBytes / int(sizeof(T));
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

// The thread that loads: the stages of every tile, and with the first of them x̂.
template <class T, bool STAYS>
__device__ inline void load_tiles(const Parameters& p, Shared<T, STAYS>& shared,
                                  typename Shared<T, STAYS>::Pipeline& pipeline, const Turn& turn, int steps) {
    using Memory = Shared<T, STAYS>;
    const int cluster = int(cute::cluster_shape().x), rank = int(cute::block_rank_in_cluster());
    const int first_row = int(blockIdx.x) * kRows, count = turn.count();
    auto state = cutlass::make_producer_start_state<typename Memory::Pipeline>();
    for (int i = 0; i < count; ++i)
        for (int step = 0; step < steps; ++step, ++state) {
            const int column = step * kDepth<T>, stage = int(state.index());
            if (STAYS && i == 0) {
                auto& arrived = shared.x_arrived[step];
                arrived.arrive_and_expect_tx(kTileBytes);
                cute::SM90_TMA_LOAD_2D::copy(&p.x_hat, reinterpret_cast<uint64_t*>(&arrived), kCacheHint, shared.x[step],
                                             column, first_row);
            }
            pipeline.producer_acquire(state);
            uint64_t* arrived = pipeline.producer_get_barrier(state);
            if (!STAYS)
                cute::SM90_TMA_LOAD_2D::copy(&p.x_hat, arrived, kCacheHint, shared.x[stage], column, first_row);
            for (int half = rank; half < 2; half += cluster) {
                T* to = shared.w[stage] + half * Memory::kTileElements / 2;
                const int row = turn.first_class(i) + half * kClasses / 2;
                if (cluster == 1)
                    cute::SM90_TMA_LOAD_2D::copy(&p.w_hat, arrived, kCacheHint, to, column, row);
                else
                    cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&p.w_hat, arrived, uint16_t(3), kCacheHint, to, column, row);
            }
        }
    pipeline.producer_tail(state);  // the other block's copies and signals still come here
}

// Coordinates (row, class) of a thread's accumulators in its warpgroup's tile: ((2 sides, 2 rows, 16 eights), 2 halves, 1).
template <class T>
__device__ auto coordinates(int thread) {
    return Mma<T>{}.get_slice(thread).partition_C(cute::make_identity_tensor(Tile{}));
}

// A thread has four rows of the tile: i is 2 * half + which of the half's two.
template <class Where>
__device__ int row_of_thread(const Where& where, int i) {
    return cute::get<0>(where(cute::make_coord(0, i % 2, 0), i / 2, 0));
}

// A row's sum and maximum over a part of one tile.
struct Sum {
    float sum = 0;
    Most most;
};

// E of a thread's logits in box (half, across), as words: a row's eight, then the other's.
template <class T, bool GENERAL, bool SPECIAL, class Where>
__device__ inline void box_terms(const Cosines<T>& c, const Where& where, int half, int across, int first, const AkCosine& p,
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
                e[side] = term<GENERAL>(c(at, half, 0), column, masked, row, p.filter, p.only_unbounded,
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
__device__ inline void place_box(const Where& where, const uint32_t (&words)[16], Term<T>* box) {
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

// A warpgroup's box to E, by a bulk copy: all have left the box before, write, and have written.
template <class T, class Where>
__device__ inline void store_box(const Parameters& parameters, const Where& where, const uint32_t (&words)[16], Term<T>* box,
                                 int group, int row, int column) {
    const int thread = threadIdx.x % kGroup;
    if (thread == 0) cute::tma_store_wait<0>();  // the box before has been read
    cutlass::arch::NamedBarrier::sync(kGroup, uint32_t(group));
    keep_accesses_here();
    place_box<T>(where, words, box);
    keep_accesses_here();
    cute::tma_store_fence();
    cutlass::arch::NamedBarrier::sync(kGroup, uint32_t(group));
    if (thread == 0 && column < parameters.p.terms.columns && row < parameters.p.x_hat.rows) {
        cute::SM90_TMA_STORE_2D::copy(&parameters.terms, box, column, row);
        cute::tma_store_arrive();
    }
}

// The epilogue of a tile, box by box. Few tiles are SPECIAL: hold a target of these rows, or the end of the classes.
template <class T, bool GENERAL, bool SPECIAL, class Where>
__device__ inline void finish_tile(const Parameters& parameters, const Cosines<T>& c, const Where& where, Term<T>* box,
                                   int group, int first_row, int first, const Row (&rows)[4], Sum (&sums)[4]) {
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half)
        CUTE_UNROLL
        for (int across = 0; across < kClasses / kBoxColumns<T>; ++across) {
            uint32_t words[16];
            box_terms<T, GENERAL, SPECIAL>(c, where, half, across, first, parameters.p, rows, sums, words);
            if (parameters.p.terms.data)
                store_box<T>(parameters, where, words, box, group, first_row + half * kBoxRows,
                             first + across * kBoxColumns<T>);
        }
}

__device__ inline bool is_special(const Row (&rows)[4], int first, int classes) {
    bool here = first + kClasses > classes;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) here |= rows[i].label >= first && rows[i].label < first + kClasses;
    return here;
}

// The largest of a row, and its sum, over the quad that shares it, the same in each.
__device__ inline void reduce_quad(Sum (&sums)[4], bool best) {
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i)
        CUTE_UNROLL
        for (int mask = 1; mask < 4; mask *= 2) {
            sums[i].sum += __shfl_xor_sync(0xFFFFFFFFu, sums[i].sum, mask);
            if (best) sums[i].most = larger_across(sums[i].most, mask);
        }
}

// That of row i of a thread's four, by values: an index would send them all to memory.
__device__ inline Sum one_of(const Sum (&sums)[4], int i) {
    Sum one = sums[0];
    CUTE_UNROLL
    for (int other = 1; other < 4; ++other) {
        one.sum = i == other ? sums[other].sum : one.sum;
        one.most.cosine = i == other ? sums[other].most.cosine : one.most.cosine;
        one.most.column = i == other ? sums[other].most.column : one.most.column;
    }
    return one;
}

// A warpgroup: every second tile of its stream, in its turn; a row's sum and maximum over them in a thread of its quad.
template <class T, bool GENERAL, bool STAYS>
__device__ inline void multiply_tiles(const Parameters& parameters, Shared<T, STAYS>& shared,
                                      typename Shared<T, STAYS>::Pipeline& pipeline,
                                      typename Shared<T, STAYS>::Order& order, const Turn& turn, int steps, int group) {
    using namespace cute;
    using Memory = Shared<T, STAYS>;
    const AkCosine& p = parameters.p;
    const int thread = threadIdx.x % kGroup, first_row = int(blockIdx.x) * kRows, count = turn.count();
    const auto where = coordinates<T>(thread);
    Row rows[4];
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) rows[i] = load_row(p, first_row + row_of_thread(where, i));
    Mma<T> mma;
    const auto slice = mma.get_slice(0);
    const Tensor x = slice.make_fragment_A(
        slice.partition_A(make_tensor(make_smem_ptr(shared.x[0]), Operands<T, Memory::kTilesOfX>{})));
    const Tensor w = slice.make_fragment_B(
        slice.partition_B(make_tensor(make_smem_ptr(shared.w[0]), Operands<T, Memory::kStages>{})));
    Cosines<T> c;
    double z = 0;
    Most best;
    typename Memory::State state;
    state.advance(group * steps);
    for (int i = group; i < count; i += kParts) {
        const int first = turn.first_class(i);
        order.wait();
        mma.accumulate_ = GMMA::ScaleOut::Zero;
        typename Memory::State before = state;
        for (int step = 0; step < steps; ++step, ++state) {
            if (STAYS && i == group) shared.x_arrived[step].wait(0);
            pipeline.consumer_wait(state);
            multiply_stage(mma, x(_, _, _, STAYS ? step : int(state.index())), w(_, _, _, int(state.index())), c);
            wait_for_products<1>(c);  // all but these: the stage before has been read
            if (step > 0) pipeline.consumer_release(before);
            before = state;
        }
        order.arrive();
        wait_for_products<0>(c);
        pipeline.consumer_release(before);
        state.advance((kParts - 1) * steps);
        Sum sums[4];
        if (__any_sync(0xFFFFFFFFu, is_special(rows, first, int(p.w_hat.rows))))
            finish_tile<T, GENERAL, true>(parameters, c, where, shared.boxes[group], group, first_row, first, rows, sums);
        else
            finish_tile<T, GENERAL, false>(parameters, c, where, shared.boxes[group], group, first_row, first, rows, sums);
        reduce_quad(sums, GENERAL);
        const Sum mine = one_of(sums, thread % 4);
        z += double(mine.sum);
        if (mine.most.cosine > best.cosine) best = mine.most;
    }
    store_sums(p, int(blockIdx.y) * kParts + group, first_row + row_of_thread(where, thread % 4), z, best);
    if (thread == 0) tma_store_wait<0>();  // shared memory must outlive its readers
}

template <class T, bool GENERAL, bool STAYS>
__global__ void __launch_bounds__(kThreads, 1) cosine_exp(const __grid_constant__ Parameters parameters) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Memory = Shared<T, STAYS>;
    AK_DYNAMIC_SHARED(memory);
    Memory& shared = *reinterpret_cast<Memory*>(memory);
    const AkCosine& p = parameters.p;
    const int group = cutlass::canonical_warp_group_idx() - 1;  // -1 loads
    const int cluster = int(cute::cluster_shape().x);
    const int steps = int((p.x_hat.columns + kDepth<T> - 1) / kDepth<T>);
    Turn turn = {int(blockIdx.y), int(gridDim.y), int((p.w_hat.rows + kClasses - 1) / kClasses), kClasses};
    if (p.only_unbounded) {
        bool unbounded = false;  // the same in both blocks, as they share their tiles
        const int64_t first = int64_t(blockIdx.x - cute::block_rank_in_cluster()) * kRows;
        for (int i = threadIdx.x; i < cluster * kRows; i += kThreads)
            unbounded |= first + i < p.x_hat.rows && !(p.factor[first + i] <= kBound);
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
        cutlass::arch::warpgroup_reg_dealloc<kLoaderRegisters>();
        if (loads()) load_tiles<T, STAYS>(parameters, shared, pipeline, turn, steps);
    } else {
        cutlass::arch::warpgroup_reg_alloc<kRegisters>();
        multiply_tiles<T, GENERAL, STAYS>(parameters, shared, pipeline, order, turn, steps, group);
    }
#endif
}

template <class T>
Variant<Parameters> variant(bool general, int64_t width) {
    if (width <= kMostSteps * kDepth<T>)
        return {general ? cosine_exp<T, true, true> : cosine_exp<T, false, true>, int(sizeof(Shared<T, true>))};
    return {general ? cosine_exp<T, true, false> : cosine_exp<T, false, false>, int(sizeof(Shared<T, false>))};
}

Variant<Parameters> variant(int32_t type, bool general, int64_t width) {
    switch (type) {
        case AK_FLOAT16: return variant<cutlass::half_t>(general, width);
        case AK_BFLOAT16: return variant<cutlass::bfloat16_t>(general, width);
        default: return variant<cutlass::tfloat32_t>(general, width);
    }
}

// Two blocks share each tile of classes, unless the batch has rows for one only.
int cluster_of(int64_t batch) { return batch > kRows ? 2 : 1; }

cudaLaunchConfig_t configure(cudaLaunchAttribute& attribute, int64_t batch, int streams, int shared, void* stream) {
    const int cluster = cluster_of(batch);
    const int64_t clusters = (batch + cluster * kRows - 1) / (cluster * kRows);
    return configure(attribute, dim3(unsigned(clusters * cluster), unsigned(streams)), dim3(unsigned(cluster)), shared, stream);
}

}  // namespace

const char* check_cosine() {
    for (int32_t type : {AK_FLOAT16, AK_BFLOAT16, AK_TFLOAT32})
        for (bool general : {false, true})
            for (int64_t width : {16, 1024})
                if (const char* error = variant(type, general, width).allow()) return error;
    return nullptr;
}

const char* tile_cosine(AkTiling& p) {
    p.rows = cluster_of(p.batch) * kRows, p.classes = kClasses, p.parts = kParts;
    const auto v = variant(p.type, false, p.width);
    if (const char* error = v.allow()) return error;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t configuration = configure(attribute, p.batch, 1, v.shared, nullptr);
    return message(cudaOccupancyMaxActiveClusters(&p.blocks, v.kernel, &configuration));
}

const char* launch_cosine(const AkCosine& p, void* stream) {
    if (p.parts % kParts) return "an odd number of partial sums";
    Parameters parameters = {p, {}, {}, {}};
    if (!has_filter(p)) parameters.p.filter = INFINITY;
    if (const char* error = describe(parameters.x_hat, p.x_hat, kRows)) return error;
    if (const char* error = describe(parameters.w_hat, p.w_hat, kClasses / 2)) return error;
    if (const char* error = p.terms.data ? describe(parameters.terms, p.terms, kBoxRows) : nullptr) return error;
    const auto v = variant(p.x_hat.type, has_filter(p) || p.best, p.x_hat.columns);
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t configuration = configure(attribute, p.x_hat.rows, p.parts / kParts, v.shared, stream);
    return message(cudaLaunchKernelEx(&configuration, v.kernel, parameters));
}

}  // namespace sm90
}  // namespace ak

#endif
