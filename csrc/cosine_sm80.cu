// Piece 2 of a step on any GPU from compute capability 8.0 on: the cosines' product through mma.sync and cp.async, with the
// exponential, the target's mask, the row sums and the store of E in its epilogue.
//
// A block owns 128 rows and its own stream of tiles of 128 classes, every p.parts-th, so that its rows' sums never leave it.
// Two blocks share an SM where its shared memory has room (not on 8.6, 8.9 and 12.0): one's epilogue runs under the other's
// products. Operands, of two bytes or TF32 in four, lie in shared memory in rows of 64 bytes whose four 16-byte parts are
// permuted, so that the eight rows of a matrix that is loaded at once fall into different banks.
#include "epilogue.cuh"

namespace ak {
namespace sm80 {
namespace {

constexpr int kRows = 128, kClasses = 128, kStages = 4, kThreads = 256;
constexpr int kWarpRows = 64, kWarpClasses = 32;  // two warps down, four across
constexpr int kDepthBytes = 64;                   // of a row in one step
constexpr int kTile = kRows * kDepthBytes;        // bytes of one operand's tile
constexpr int kPitch = kClasses * 2 + 16;         // bytes of a row of E on its way out
constexpr int kShared = kStages * 2 * kTile;
static_assert(kRows == 128 && kClasses == 128 && kThreads == 256 && kRows * kPitch <= kShared);

struct alignas(8) Two {
    float first, second;
};

__device__ inline int place(int row, int part) { return row * 64 + (part ^ (row >> 1 & 3)) * 16; }

// Where a thread's two 16-byte parts of an operand's tile come from: the same columns of two rows, 64 apart.
struct Source {
    const unsigned char* from;
    int rows_left, columns_left;  // from this thread's first part on
};

template <class T>
constexpr int kDepth = kDepthBytes / int(sizeof(T));

template <class T>
__device__ inline Source source(const AkMatrix& matrix, int64_t first_row) {
    const int row = threadIdx.x / 4, part = threadIdx.x % 4;
    const int64_t rows_left = matrix.rows - first_row - row;
    return {reinterpret_cast<const unsigned char*>(row_of<T>(matrix, first_row + row)) + part * 16,
            int(rows_left > kRows ? kRows : rows_left), int(matrix.columns) - part * int(16 / sizeof(T))};
}

template <class T>
__device__ inline void load_tile(unsigned char* to, const Source& source, const AkMatrix& matrix, int step) {
    to += place(threadIdx.x / 4, threadIdx.x % 4);  // 64 rows on, the parts are permuted alike
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const bool inside = i * 64 < source.rows_left && step * kDepth<T> < source.columns_left;
        const unsigned char* from = source.from + i * 64 * matrix.row_stride * int(sizeof(T)) + step * kDepthBytes;
        copy_async(to + i * 64 * 64, inside ? from : static_cast<const unsigned char*>(matrix.data), inside);
    }
}

// The largest over the four threads that share a row.
__device__ inline Most quad_best(Most most) {
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) most = larger_across(most, mask);
    return most;
}

// Which of a lane's two neighbouring columns count, a bit each: of every group of columns, of which a quad's lanes have two
// each, the nearest of the first `subcentres`, the first of equals. NaN counts, to be seen.
__device__ __forceinline__ uint32_t nearest(float left, float right, int group, int subcentres) {
    if (group == 1) return 3;
    const int place = int(threadIdx.x) % 4 * 2 & (group - 1);
    Most most;
    if (place < subcentres) most = larger(most, {left, place});
    if (place + 1 < subcentres) most = larger(most, {right, place + 1});
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
        if (mask >= group / 2) break;
        most = larger_across(most, mask);
    }
    return uint32_t(place == most.column || left != left) | uint32_t(place + 1 == most.column || right != right) << 1;
}

// Whether a column is past the last class or of the row's own class.
__device__ inline bool is_masked(int32_t column, int32_t label, int32_t columns, int32_t group) {
    return uint32_t(column ^ label) < uint32_t(group) || column >= columns;
}

template <class T, bool GENERAL>
__global__ void __launch_bounds__(kThreads, GENERAL ? 1 : 2) cosine_exp(AkCosine p) {
    AK_DYNAMIC_SHARED(shared);
    __shared__ float sums[4][kRows], bests[4][kRows];
    __shared__ int32_t columns[4][kRows], labels[kRows];
    __shared__ float factors[kRows], shifts[kRows];
    __shared__ double z[kRows];  // this and the next two belong to the thread of that number
    __shared__ float best[kRows];
    __shared__ int32_t best_column[kRows];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp % 2 * kWarpRows, across = warp / 2, warp_class = across * kWarpClasses;
    const int64_t first_row = int64_t(blockIdx.x) * kRows;
    const int group = GENERAL ? p.group : 1;
    const int N = int(p.w_hat.rows), rows_here = int(p.x_hat.rows - first_row < kRows ? p.x_hat.rows - first_row : kRows);

    // What the epilogue wants of each row waits in shared memory: registers are the products'.
    bool unbounded = false;
    for (int i = threadIdx.x; i < kRows; i += kThreads) {
        const Row row = load_row(p, first_row + i);
        factors[i] = row.factor, shifts[i] = row.shift, labels[i] = row.label;
        unbounded |= !(row.factor <= kBound);
        z[i] = 0, best[i] = -INFINITY, best_column[i] = -1;
    }
    int tiles = (N + kClasses - 1) / kClasses;  // N leaves room for that
    if (p.only_unbounded && !__syncthreads_or(unbounded)) tiles = 0;  // a pass that rows of a moderate scale do without

    const Source x_source = source<T>(p.x_hat, first_row);
    const int steps = int((p.x_hat.columns + kDepth<T> - 1) / kDepth<T>);
    for (int tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
        const int first = tile * kClasses;
        const Source w_source = source<T>(p.w_hat, first);
        auto load = [&](int step) {
            unsigned char* to = shared + step % kStages * 2 * kTile;
            if (step < steps) {
                load_tile<T>(to, x_source, p.x_hat, step);
                load_tile<T>(to + kTile, w_source, p.w_hat, step);
            }
            commit_copies();
        };
        __syncthreads();  // the last tile of E has left the shared memory
#pragma unroll
        for (int step = 0; step < kStages - 1; ++step) load(step);
        float c[4][4][4] = {};
        for (int step = 0; step < steps; ++step) {
            wait_copies<kStages - 2>();
            __syncthreads();  // this step's operands are there, and the stage before it has been read by all
            load(step + kStages - 1);
            const unsigned char* x = shared + step % kStages * 2 * kTile;
            const unsigned char* w = x + kTile;
#pragma unroll
            for (int k = 0; k < kDepthBytes / 32; ++k) {
                uint32_t a[4][4], b[4][2];
#pragma unroll
                for (int i = 0; i < 4; ++i) load_matrices(a[i], x + place(warp_row + i * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    uint32_t pair[4];
                    load_matrices(pair, w + place(warp_class + i * 8 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
                    b[i][0] = pair[0], b[i][1] = pair[1], b[i + 1][0] = pair[2], b[i + 1][1] = pair[3];
                }
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) multiply_add<T>(c[i][j], a[i], b[j]);
            }
        }
        wait_copies<0>();

        // Few tiles hold a target or the end of the classes: the rest are spared the comparisons.
        bool here = first + kClasses > N;
        if (threadIdx.x < kRows) here |= labels[threadIdx.x] >= first && labels[threadIdx.x] < first + kClasses;
        const bool special = __syncthreads_or(here);  // and the operands have been read
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int row = warp_row + i / 2 * 16 + i % 2 * 8 + lane / 4;
            const Row mine = {factors[row], shifts[row], labels[row]};
            float sum = 0;
            Most most;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float e[2];
                const float cosines[2] = {c[i / 2][j][i % 2 * 2], c[i / 2][j][i % 2 * 2 + 1]};
                const uint32_t near = GENERAL ? nearest(cosines[0], cosines[1], group, p.subcentres) : 3;
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    const int column = first + warp_class + j * 8 + lane % 4 * 2 + side;
                    const bool masked = !(near >> side & 1) || (special && is_masked(column, mine.label, N, group));
                    e[side] = term<GENERAL>(cosines[side], column, masked, mine, p.filter, p.only_unbounded, most);
                    sum += e[side];
                }
                if (sizeof(T) == 4) {  // float32: a quad writes 32 bytes of a row at once
                    const int column = first + warp_class + j * 8 + lane % 4 * 2;
                    if (p.terms.data && row < rows_here && column < p.terms.columns)
                        *reinterpret_cast<Two*>(writable_row<float>(p.terms, first_row + row) + column) = {e[0], e[1]};
                } else if (p.terms.data) {
                    bfloat16* to = reinterpret_cast<bfloat16*>(shared + row * kPitch) + warp_class + j * 8 + lane % 4 * 2;
                    const uint32_t pair = pack(e);
                    memcpy(to, &pair, 4);
                }
            }
            sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
            sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
            if (GENERAL) most = quad_best(most);
            if (lane % 4 == 0) {
                sums[across][row] = sum;
                if (GENERAL) bests[across][row] = most.cosine, columns[across][row] = most.column;
            }
        }
        __syncthreads();
        if (threadIdx.x < kRows) {
            const int row = threadIdx.x;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                z[row] += double(sums[i][row]);
                if (GENERAL && bests[i][row] > best[row]) best[row] = bests[i][row], best_column[row] = columns[i][row];
            }
        }
        if (p.terms.data && sizeof(T) == 2) {
#pragma unroll
            for (int i = threadIdx.x; i < kRows * kClasses / 8; i += kThreads) {
                const int row = i / (kClasses / 8), part = i % (kClasses / 8);
                if (row < rows_here && first + part * 8 < p.terms.columns) {
                    bfloat16* to = writable_row<bfloat16>(p.terms, first_row + row) + first + part * 8;
                    *reinterpret_cast<Eight<bfloat16>*>(to) =
                        *reinterpret_cast<const Eight<bfloat16>*>(shared + row * kPitch + part * 16);
                }
            }
        }
    }
    if (threadIdx.x < kRows)
        store_sums(p, int(blockIdx.y), first_row + threadIdx.x, z[threadIdx.x],
                   {best[threadIdx.x], best_column[threadIdx.x]});
}

template <class T, bool GENERAL>
const char* allow() {
    return message(cudaFuncSetAttribute(cosine_exp<T, GENERAL>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
}

template <class T, bool GENERAL>
const char* launch(const AkCosine& p, [[maybe_unused]] void* stream) {
    const dim3 grid(unsigned((p.x_hat.rows + kRows - 1) / kRows), unsigned(p.parts));
    AK_LAUNCH((cosine_exp<T, GENERAL>), grid, kThreads, kShared, static_cast<cudaStream_t>(stream), p);
    return launch_error();
}

}  // namespace

const char* check_cosine() {
    for (const char* error : {allow<half, false>(), allow<half, true>(), allow<bfloat16, false>(), allow<bfloat16, true>(),
                              allow<tfloat32, false>(), allow<tfloat32, true>()})
        if (error) return error;
    return nullptr;
}

const char* tile_cosine(AkTiling& p) {
    p.rows = kRows, p.classes = kClasses, p.parts = 1;
    if (const char* error = allow<bfloat16, false>()) return error;
    int device = 0, multiprocessors = 0, resident = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    const auto kernel = cosine_exp<bfloat16, false>;
    const char* error = message(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, kShared));
    p.blocks = resident * multiprocessors;
    return error;
}

const char* launch_cosine(const AkCosine& given, void* stream) {
    AkCosine p = given;
    if (!has_filter(p)) p.filter = INFINITY;
    return with_operand_type(p.x_hat.type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        return has_filter(p) || p.best || p.group > 1 ? launch<T, true>(p, stream) : launch<T, false>(p, stream);
    });
}

}  // namespace sm80
}  // namespace ak
