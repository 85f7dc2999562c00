// Piece 3 of a step for a constant margin: the loss, its derivatives, and a∘x̂, from the parts of z.
#include "arithmetic.h"
#include "launch.cuh"

namespace ak {
namespace {

constexpr int kThreads = 256, kRows = kThreads / 32;

__device__ inline MarginRow margin_row(const AkMargin& p, int64_t row, double z) {
    const int64_t label = p.labels[row];
    if (label < 0) return {0, 0, 0, 0};
    const double cosine = p.cosine[row], shift = p.shift[row], s = scale_of(p.scale, p.norm[row]);
    return additive_margin(z, shift, label < p.classes ? cosine : NAN, s, p.margin);  // out of range: no silent wrong number
}

// A row a warp.
template <class X, class O>
__device__ inline void one_row(const AkMargin& p, int64_t row, double share) {
    const int lane = threadIdx.x % 32;
    const bool ignored = p.labels[row] < 0;
    double z = 0;
    if (p.z_parts) {
#pragma unroll 4
        for (int64_t part = lane; part < p.parts; part += 32) z += p.z_parts[part * p.batch + row];
        z = warp_sum(z);
    } else {
        z = p.z[row];
    }
    const MarginRow out = margin_row(p, row, z);
    const float s = scale_of(p.scale, p.norm[row]);
    if (lane == 0) {
        if (p.z_parts) p.z[row] = ignored ? 0.0f : float(z);
        p.derivatives[row] = float(out.by_log_z * share);
        p.derivatives[p.batch + row] = float(out.by_cosine * share);
        if (p.need_scale) p.derivatives[2 * p.batch + row] = float(out.by_scale * share);
        if (!p.reduce) p.loss[row] = float(out.loss);
    }
    if (!p.x_factored.data) return;
    const X* x = row_of<X>(p.features, row);
    O* x_factored = writable_row<O>(p.x_factored, row);
    const float x_inverse = inverse(p.norm[row]), coefficient = float(out.by_log_z * share * s);
    for (int64_t i = lane; i < p.x_factored.columns; i += 32) {
        const float value = !ignored && i < p.features.columns ? to_float(x[i * p.features.column_stride]) : 0.0f;
        x_factored[i] = from_float<O>(value * x_inverse * coefficient);
    }
}

// The first block, if the loss is one number, takes that alone: every row's margin again, rather than a wait for the others.
// It has the most to do one after the other: a row a thread, eight of its parts at once.
template <class X, class O>
__global__ void __launch_bounds__(kThreads, 4) constant_margin(AkMargin p) {
    const double share = p.mean ? 1.0 / double(*p.num_rows) : 1.0;
    if (!p.reduce || blockIdx.x > 0) {
        const int64_t row = int64_t(blockIdx.x - (p.reduce ? 1 : 0)) * kRows + threadIdx.x / 32;
        if (row < p.batch) one_row<X, O>(p, row, share);
        return;
    }
    double total = 0;
    for (int64_t row = threadIdx.x; row < p.batch; row += kThreads) {
        double z = 0;
        if (p.z_parts) {
#pragma unroll 8
            for (int64_t part = 0; part < p.parts; ++part) z += p.z_parts[part * p.batch + row];
        } else {
            z = p.z[row];
        }
        total += margin_row(p, row, z).loss;
    }
    total = block_sum(total);
    if (threadIdx.x == 0) *p.loss = float(total * share);
}

}  // namespace
}  // namespace ak

extern "C" {

const char* ak_constant_margin(const AkMargin* p, const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    if (guard.error()) return guard.error();
    [[maybe_unused]] cudaStream_t stream = static_cast<cudaStream_t>(where->stream);
    const int64_t blocks = (p->batch + ak::kRows - 1) / ak::kRows + (p->reduce ? 1 : 0);
    if (blocks == 0) return nullptr;
    return ak::with_type(p->features.type, [&](auto x) {
        return ak::with_operand_type(p->x_factored.data ? p->x_factored.type : AK_BFLOAT16, [&](auto o) {
            using X = typename decltype(x)::type;
            using O = typename decltype(o)::type;
            AK_LAUNCH((ak::constant_margin<X, O>), blocks, ak::kThreads, 0, stream, *p);
            return ak::launch_error();
        });
    });
}
}
