// Pieces 4 and 5 of a step for the centres on Hopper, as one: dŵ = Eᵀ(a∘x̂), and dw through the normalization's derivative
// while dŵ is still in registers. The gradient is written once, and but for the batch's own classes never read back.
//
// Shared memory, 194 KiB: 4 stages (6 of 128 columns) of 64 rows of the batch, each E of 64 classes for either warpgroup that
// multiplies (8 KiB) and a∘x̂ of 256 columns (32 KiB; 16 of 128); barriers; what another block sends.
//
// The derivative wants whole rows of dŵ: a cluster of 2 x 4 blocks has 512 classes, a block 128 of them and half of the columns
// (up to a width of 256 all, and there are four blocks). Warpgroup 0 loads, by one thread, E for the block beside too, a∘x̂ for the
// three below: 256 flops a byte from the L2 cache. Warpgroups 1 and 2 have 64 classes each of the same stages, as turns would want
// a∘x̂ twice: 160 bytes a clock of shared memory's 128. The halves of a row send one another Σ dŵ·ŵ.
#ifdef AK_CUTLASS

#include "sm90.cuh"

namespace ak {
namespace sm90 {
namespace {

constexpr int kCentres = 64;  // classes of a warpgroup's tile; a block's two have the same columns
constexpr int kDeep = 64;     // rows of the batch a step
constexpr int kBox = 64;      // columns of a bulk copy
constexpr int kSharing = 4;   // blocks of a cluster that have the same columns, and share a∘x̂
constexpr int kTogether = kSharing * kParts * kCentres;  // classes of a cluster's tile

// Columns of a block, and blocks side by side: a row of centres must be whole in a cluster.
int columns_of(int64_t width) { return width > 128 ? 256 : 128; }
int halves_of(int64_t width) { return width > 256 ? 2 : 1; }

using cutlass::bfloat16_t;

// Eᵀ times a∘x̂: both lie with the summed index, rows of the batch, as the slow one.
template <int COLUMNS>
using Mma = decltype(cute::make_tiled_mma(
    cute::GMMA::ss_op_selector<bfloat16_t, bfloat16_t, float, Shape<Int<kCentres>, Int<COLUMNS>, Int<kDeep>>,
                               cute::GMMA::Major::MN, cute::GMMA::Major::MN>()));
template <int COLUMNS>
using Products = decltype(cute::partition_fragment_C(Mma<COLUMNS>{}, Shape<Int<kCentres>, Int<COLUMNS>>{}));

// Boxes of 64 columns and as many rows as are loaded at once, each row 128 bytes permuted, one box after the other.
template <int COLUMNS, int COUNT>
using Panels = decltype(cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<bfloat16_t>{},
                                            Shape<Int<COLUMNS>, Int<kDeep>, Int<COUNT>>{},
                                            cute::Step<cute::_2, cute::_1, cute::_3>{}));

struct GradientParameters {
    AkGradCentres p;
    CUtensorMap terms, x_factored;
};

template <int COLUMNS>
struct Shared {
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

// The thread that loads: this block's share of every stage.
template <int COLUMNS>
__device__ inline void load_tiles(const GradientParameters& p, Shared<COLUMNS>& shared,
                                  typename Shared<COLUMNS>::Pipeline& pipeline, const Place& place, const Turn& turn,
                                  int steps) {
    static_assert(kBox == kCentres);
    auto state = cutlass::make_producer_start_state<typename Shared<COLUMNS>::Pipeline>();
    const int count = turn.count();
    for (int i = 0; i < count; ++i)
        for (int step = 0; step < steps; ++step, ++state) {
            const int stage = int(state.index()), row = step * kDeep;
            pipeline.producer_acquire(state);
            uint64_t* arrived = pipeline.producer_get_barrier(state);
            for (int group = place.half; group < kParts; group += place.halves) {
                const int column = place.first_class(turn.first_class(i), group);
                bfloat16_t* to = shared.terms[group][stage];
                if (place.halves == 1)
                    cute::SM90_TMA_LOAD_2D::copy(&p.terms, arrived, kCacheHint, to, column, row);
                else
                    cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&p.terms, arrived, place.beside(), kCacheHint, to, column, row);
            }
            for (int part = place.share; part < COLUMNS / kBox; part += kSharing)
                cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&p.x_factored, arrived, place.below(), kCacheHint,
                                                       shared.x[stage] + part * kDeep * kBox,
                                                       place.half * COLUMNS + part * kBox, row);
        }
    pipeline.producer_tail(state);  // the other blocks' copies and signals still come here
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
    int first_class;
    int classes[2];  // in the tile
    int left[2];     // columns from this part's first to the end; none past the last class
    int first;       // column
    float inverses[2];

    __device__ Part(const AkGradCentres& p_, int thread, int first_class_, int first_column) : p(p_), first_class(first_class_) {
        // Coordinates (class, column) of a thread's accumulators: ((2 sides, 2 classes, eights), 1, 1).
        const auto where = Mma<COLUMNS>{}.get_slice(thread).partition_C(
            cute::make_identity_tensor(Shape<Int<kCentres>, Int<COLUMNS>>{}));
        first = first_column + int(cute::get<1>(where(cute::make_coord(0, 0, 0), 0, 0)));
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
            classes[i] = int(cute::get<0>(where(cute::make_coord(0, i, 0), 0, 0)));
            const int64_t row = first_class + classes[i];
            const bool inside = row < p.weight.rows;
            left[i] = inside ? int(p.weight.columns) - first : 0;
            inverses[i] = inside ? p.inverse_norm[row] : 0.0f;
        }
    }

    template <class T>
    __device__ T* start(const AkMatrix& matrix, int i) const {
        return static_cast<T*>(matrix.data) + (first_class + classes[i]) * matrix.row_stride + first;
    }

    struct Centres {
        Two<W> of[2][kBatch];
    };
    __device__ Centres centres(int batch) const {
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
    __device__ void along(const Products<COLUMNS>& c, float (&sums)[2]) const {
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
    __device__ void write(const Products<COLUMNS>& c, const float (&sums)[2]) const {
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
                        result.of[side] = W((c(cute::make_coord(side, i, batch + k), 0, 0) - along) * inverses[i]);
                    }
                    if (8 * (batch + k) < left[i]) *reinterpret_cast<Two<W>*>(to + 8 * k) = result;
                }
            }
        }
    }
};

// The centres of a warpgroup's tile, on their way to the L2 cache while its products are made.
template <int COLUMNS, class W>
__device__ inline void prefetch_centres(const AkMatrix& weight, int first_class, int first_column) {
    constexpr int kLine = 128 / int(sizeof(W));
    for (int line = threadIdx.x % kGroup; line < kCentres * COLUMNS / kLine; line += kGroup) {
        const int64_t row = first_class + line / (COLUMNS / kLine);
        const int column = first_column + line % (COLUMNS / kLine) * kLine;
        if (row < weight.rows && column < weight.columns)
            prefetch_to_l2(static_cast<const W*>(weight.data) + row * weight.row_stride + column);
    }
}

// Adds what the block beside this one has of these classes: both add the same two numbers. A place is written again only once
// its warpgroup has sent for the tile after, which each of its warps does after having read.
template <int COLUMNS>
__device__ inline void add_the_other_half(Shared<COLUMNS>& shared, const Place& place, const int (&classes)[2], int group,
                                          int tile, float (&sums)[2]) {
    const int at = tile % 2, thread = threadIdx.x % kGroup, lane = thread % 4;
    auto& sent = shared.sent[group][at];
    float* const along = shared.along[group][at];
    if (thread == 0) sent.arrive_and_expect_tx(kCentres * sizeof(float));
    if (lane < 2)
        cute::store_shared_remote(__float_as_uint(lane ? sums[1] : sums[0]),
                                  cute::cast_smem_ptr_to_uint(along + (lane ? classes[1] : classes[0])),
                                  cute::cast_smem_ptr_to_uint(&sent), uint32_t(place.rank(1 - place.half, place.share)));
    wait_for_the_cluster(&sent, uint32_t(tile / 2 % 2));
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) sums[i] += along[classes[i]];
}

// A warpgroup: its classes of every tile.
template <int COLUMNS, class W>
__device__ inline void multiply_tiles(const AkGradCentres& p, Shared<COLUMNS>& shared,
                                      typename Shared<COLUMNS>::Pipeline& pipeline, const Place& place, const Turn& turn,
                                      int steps, int group) {
    using namespace cute;
    constexpr int kStages = Shared<COLUMNS>::kStages;
    const int thread = threadIdx.x % kGroup, first_column = place.half * COLUMNS, count = turn.count();
    Mma<COLUMNS> mma;
    const auto slice = mma.get_slice(0);
    const Tensor e = slice.make_fragment_A(
        slice.partition_A(make_tensor(make_smem_ptr(shared.terms[group][0]), Panels<kCentres, kStages>{})));
    const Tensor x =
        slice.make_fragment_B(slice.partition_B(make_tensor(make_smem_ptr(shared.x[0]), Panels<COLUMNS, kStages>{})));
    Products<COLUMNS> c;
    typename Shared<COLUMNS>::State state;
    for (int tile = 0; tile < count; ++tile) {
        const int first_class = place.first_class(turn.first_class(tile), group);
        prefetch_centres<COLUMNS, W>(p.weight, first_class, first_column);
        mma.accumulate_ = GMMA::ScaleOut::Zero;
        auto before = state;
        for (int step = 0; step < steps; ++step, ++state) {
            pipeline.consumer_wait(state);
            multiply_stage(mma, e(_, _, _, int(state.index())), x(_, _, _, int(state.index())), c);
            wait_for_products<1>(c);  // all but these: the stage before has been read
            if (step > 0) pipeline.consumer_release(before);
            before = state;
        }
        wait_for_products<0>(c);
        pipeline.consumer_release(before);

        const Part<COLUMNS, W> mine(p, thread, first_class, first_column);
        float sums[2];
        mine.along(c, sums);
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i)
            CUTE_UNROLL
            for (int mask = 1; mask < 4; mask *= 2) sums[i] += __shfl_xor_sync(0xFFFFFFFFu, sums[i], mask);
        if (place.halves == 2) add_the_other_half(shared, place, mine.classes, group, tile, sums);
        mine.write(c, sums);
    }
}

template <int COLUMNS, class W>
__global__ void __launch_bounds__(kThreads, 1) grad_centres(const __grid_constant__ GradientParameters parameters) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Memory = Shared<COLUMNS>;
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
    // It fences the barriers' initialization too.
    typename Memory::Pipeline pipeline(shared.pipeline, roles,
                                       cute::make_shape(place.halves, cute::Int<kSharing>{}, cute::_1{}));
    cute::cluster_sync();

    if (group < 0) {
        cutlass::arch::warpgroup_reg_dealloc<kLoaderRegisters>();
        if (loads()) load_tiles<COLUMNS>(parameters, shared, pipeline, place, turn, steps);
    } else {
        cutlass::arch::warpgroup_reg_alloc<kRegisters>();
        multiply_tiles<COLUMNS, W>(p, shared, pipeline, place, turn, steps, group);
    }
#endif
}

template <class W>
Variant<GradientParameters> variant(int64_t width) {
    if (columns_of(width) == 256) return {grad_centres<256, W>, int(sizeof(Shared<256>))};
    return {grad_centres<128, W>, int(sizeof(Shared<128>))};
}

Variant<GradientParameters> variant(int32_t type, int64_t width) {
    switch (type) {
        case AK_FLOAT16: return variant<cutlass::half_t>(width);
        case AK_BFLOAT16: return variant<cutlass::bfloat16_t>(width);
        default: return variant<float>(width);
    }
}

cudaLaunchConfig_t configure(cudaLaunchAttribute& attribute, int64_t width, int clusters, int shared, void* stream) {
    const unsigned halves = unsigned(halves_of(width));
    return configure(attribute, dim3(halves, unsigned(kSharing * clusters)), dim3(halves, kSharing), shared, stream);
}

}  // namespace

const char* check_gradient() {
    for (int32_t type : {AK_FLOAT32, AK_FLOAT16, AK_BFLOAT16})
        for (int64_t width : {128, 256})
            if (const char* error = variant(type, width).allow()) return error;
    return nullptr;
}

const char* tile_gradient(AkGradTiling& p) {
    const auto v = variant(p.type, p.width);
    if (const char* error = v.allow()) return error;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t configuration = configure(attribute, p.width, 1, v.shared, nullptr);
    return message(cudaOccupancyMaxActiveClusters(&p.clusters, v.kernel, &configuration));
}

const char* launch_gradient(const AkGradCentres& p, void* stream) {
    GradientParameters parameters = {p, {}, {}};
    if (const char* error = describe(parameters.terms, p.terms, kDeep)) return error;
    if (const char* error = describe(parameters.x_factored, p.x_factored, kDeep)) return error;
    const int64_t width = p.x_factored.columns, tiles = (p.weight.rows + kTogether - 1) / kTogether;
    const auto v = variant(p.weight.type, width);
    cudaLaunchAttribute attribute;
    const int clusters = int(tiles < p.clusters ? tiles : p.clusters);
    const cudaLaunchConfig_t configuration = configure(attribute, width, clusters, v.shared, stream);
    return message(cudaLaunchKernelEx(&configuration, v.kernel, parameters));
}

}  // namespace sm90
}  // namespace ak

#endif
