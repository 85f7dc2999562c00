// Passes over the centres, bound by memory: a warp a class, one read and one write of every byte, 16 at a time.
#include "arithmetic.h"
#include "launch.cuh"

namespace ak {
namespace {

constexpr int kWarps = 8;

// Eight columns of a row from `first` on, zero past its end.
template <class T, bool VECTOR>
__device__ inline void read(const T* row, int64_t first, int64_t columns, int64_t stride, float (&to)[8]) {
    if (VECTOR) {
        load_eight(row + first, to);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] = first + i < columns ? to_float(row[(first + i) * stride]) : 0.0f;
    }
}

template <class T, bool VECTOR>
__device__ inline void write(T* row, int64_t first, int64_t columns, const float (&from)[8]) {
    if (VECTOR) {
        store_eight(row + first, from);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (first + i < columns) row[first + i] = from_float<T>(from[i]);
    }
}

// ŵ and 1/‖w‖. VECTOR: eight columns at a time.
template <class W, class O, bool VECTOR>
__global__ void prepare_centres(AkCentres p) {
    const int lane = threadIdx.x % 32;
    const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, columns = p.weight.columns;
    if (row >= p.weight.rows) return;
    const W* w = row_of<W>(p.weight, row);
    float values[8], sum = 0;
    for (int64_t first = lane * 8; first < columns; first += 256) {
        read<W, VECTOR>(w, first, columns, p.weight.column_stride, values);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += values[i] * values[i];
    }
    const float w_inverse = inverse(sqrtf(warp_sum(sum)));
    O* w_hat = writable_row<O>(p.w_hat, row);
    for (int64_t first = lane * 8; first < p.w_hat.columns; first += 256) {  // the row again, out of the L1 cache
        read<W, VECTOR>(w, first, columns, p.weight.column_stride, values);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] *= w_inverse;
        store_eight(w_hat + first, values);  // rows of ŵ are multiples of 16 elements
    }
    if (lane == 0) p.inverse_norm[row] = w_inverse;
}

// dŵ → dw.
template <class W, bool VECTOR>
__global__ void finish_centres(AkFinishCentres p) {
    const int lane = threadIdx.x % 32;
    const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, columns = p.grad.columns;
    if (row >= p.grad.rows) return;
    const float* unit = row_of<float>(p.grad_unit, row);
    const W* w = row_of<W>(p.weight, row);
    const float w_inverse = p.inverse_norm[row];
    float g[8], v[8], along = 0;
    for (int64_t first = lane * 8; first < columns; first += 256) {
        load_eight(unit + first, g);
        read<W, VECTOR>(w, first, columns, p.weight.column_stride, v);
#pragma unroll
        for (int i = 0; i < 8; ++i) along += g[i] * (v[i] * w_inverse);
    }
    along = warp_sum(along);
    W* grad = writable_row<W>(p.grad, row);
    for (int64_t first = lane * 8; first < columns; first += 256) {
        load_eight(unit + first, g);
        read<W, VECTOR>(w, first, columns, p.weight.column_stride, v);
#pragma unroll
        for (int i = 0; i < 8; ++i) g[i] = (g[i] - along * (v[i] * w_inverse)) * w_inverse;
        write<W, VECTOR>(grad, first, columns, g);
    }
}

}  // namespace
}  // namespace ak

extern "C" {

const char* ak_prepare_centres(const AkCentres* p, const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    if (guard.error()) return guard.error();
    [[maybe_unused]] cudaStream_t stream = static_cast<cudaStream_t>(where->stream);
    const unsigned blocks = unsigned((p->weight.rows + ak::kWarps - 1) / ak::kWarps);
    if (!ak::aligned_rows(p->w_hat, ak::operand_bytes(p->w_hat.type)))
        return "rows of normalized centres must start at multiples of 16 bytes";
    return ak::with_type(p->weight.type, [&](auto w) {
        return ak::with_operand_type(p->w_hat.type, [&](auto o) {
            using W = typename decltype(w)::type;
            using O = typename decltype(o)::type;
            if (ak::aligned_rows(p->weight, sizeof(W)) && p->weight.columns == p->w_hat.columns)
                AK_LAUNCH((ak::prepare_centres<W, O, true>), blocks, 32 * ak::kWarps, 0, stream, *p);
            else
                AK_LAUNCH((ak::prepare_centres<W, O, false>), blocks, 32 * ak::kWarps, 0, stream, *p);
            return ak::launch_error();
        });
    });
}

const char* ak_finish_centres(const AkFinishCentres* p, const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    if (guard.error()) return guard.error();
    [[maybe_unused]] cudaStream_t stream = static_cast<cudaStream_t>(where->stream);
    const unsigned blocks = unsigned((p->grad.rows + ak::kWarps - 1) / ak::kWarps);
    if (!ak::aligned_rows(p->grad_unit, 4)) return "rows of the unit centres' gradient must start at multiples of 16 bytes";
    return ak::with_type(p->weight.type, [&](auto w) {
        using W = typename decltype(w)::type;
        if (ak::aligned_rows(p->weight, sizeof(W)) && ak::aligned_rows(p->grad, sizeof(W)))
            AK_LAUNCH((ak::finish_centres<W, true>), blocks, 32 * ak::kWarps, 0, stream, *p);
        else
            AK_LAUNCH((ak::finish_centres<W, false>), blocks, 32 * ak::kWarps, 0, stream, *p);
        return ak::launch_error();
    });
}
}
