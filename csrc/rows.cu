// Passes over the batch's rows: piece 1 of a step, and the end of 5. A block a row, in float64: B·D is small.
#include "arithmetic.h"
#include "launch.cuh"

namespace ak {
namespace {

constexpr int kThreads = 128;

template <class T>
__device__ inline double element(const T* row, int64_t column, int64_t stride, bool present) {
    return present ? double(to_float(row[column * stride])) : 0.0;
}

// x̂, ‖x‖, the target's cosine and the logits' factor.
template <class X, class W, class O>
__global__ void __launch_bounds__(kThreads) prepare_rows(AkRows p) {
    const int64_t row = blockIdx.x, label = p.labels[row];
    const bool ignored = label < 0, present = !ignored && label < p.weight.rows;
    const X* x = row_of<X>(p.features, row);
    const W* w = row_of<W>(p.weight, present ? label : 0);
    double xx = 0, xw = 0, ww = 0;
    for (int64_t i = threadIdx.x; i < p.features.columns; i += kThreads) {
        double a = element(x, i, p.features.column_stride, !ignored);
        double b = element(w, i, p.weight.column_stride, true);
        xx += a * a, xw += a * b, ww += b * b;
    }
    xx = block_sum(xx), xw = block_sum(xw), ww = block_sum(ww);
    const double norm = sqrt(xx), x_inverse = inverse(norm);
    O* x_hat = writable_row<O>(p.x_hat, row);
    for (int64_t i = threadIdx.x; i < p.x_hat.columns; i += kThreads) {
        double a = i < p.features.columns ? element(x, i, p.features.column_stride, !ignored) : 0.0;
        x_hat[i] = from_float<O>(float(a * x_inverse));
    }
    if (threadIdx.x == 0) {
        float length = float(norm);
        length = ignored ? 1.0f : length + (length - length);  // NaN where it overflows
        p.cosine[row] = present ? float(xw * (x_inverse * inverse(sqrt(ww)))) : 0.0f;
        p.norm[row] = length;
        p.factor[row] = scale_of(p.scale, length) * kLog2e;
        p.shift[row] = 0;
    }
}

// a∘x̂, and x̂ and the logits' factor again where they were not kept.
template <class X, class O, class H>
__global__ void factor_rows(AkFactor p) {
    const int64_t row = blockIdx.x;
    const bool ignored = p.labels[row] < 0;
    const X* x = row_of<X>(p.features, row);
    const float x_inverse = inverse(p.norm[row]), s = scale_of(p.scale, p.norm[row]);
    const float coefficient = p.row_factor[row] * s;
    O* x_factored = writable_row<O>(p.x_factored, row);
    for (int64_t i = threadIdx.x; i < p.x_factored.columns; i += kThreads) {
        bool inside = i < p.features.columns && !ignored;
        float unit = float(element(x, i, p.features.column_stride, inside)) * x_inverse;
        x_factored[i] = from_float<O>(unit * coefficient);
        if (p.x_hat.data) writable_row<H>(p.x_hat, row)[i] = from_float<H>(unit);
    }
    if (p.x_hat.data && threadIdx.x == 0) p.factor[row] = s * kLog2e;
}

// Sums and maxima of all parts of the classes. Threads of a warp take neighbouring rows, warps take parts in turn; their sums
// are added in order.
__global__ void reduce_parts(AkReduce p) {
    __shared__ double sums[8][32];
    __shared__ float largest[8][32];
    __shared__ int64_t classes[8][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t row = int64_t(blockIdx.x) * 32 + lane;
    double sum = 0;
    float best = -INFINITY;
    int64_t best_class = -1;
    for (int64_t part = warp; row < p.batch && part < p.parts; part += 8) {
        const int64_t place = part * p.batch + row;
        if (p.z_parts) sum += p.z_parts[place];
        if (p.best_parts && (p.best_parts[place] > best ||
                             (p.best_parts[place] == best && p.class_parts[place] < best_class)))
            best = p.best_parts[place], best_class = p.class_parts[place];
    }
    sums[warp][lane] = sum, largest[warp][lane] = best, classes[warp][lane] = best_class;
    __syncthreads();
    if (warp != 0 || row >= p.batch) return;
    for (int i = 1; i < 8; ++i) {
        sum += sums[i][lane];
        if (largest[i][lane] > best || (largest[i][lane] == best && classes[i][lane] < best_class))
            best = largest[i][lane], best_class = classes[i][lane];
    }
    if (p.z) p.z[row] = p.labels[row] < 0 ? 0.0f : float(sum);
    if (p.best) p.best[row] = best, p.best_class[row] = best_class;
    // Without a negative there is nothing to keep in range.
    if (p.shift) p.shift[row] = p.factor[row] > kBound && best > -INFINITY ? best * p.factor[row] : 0.0f;
}

// dx from dx̂, and what the target's class adds to dw.
template <class X, class W>
__global__ void finish_rows(AkFinishRows p) {
    const int64_t row = blockIdx.x, label = p.labels[row], batch = p.features.rows, D = p.features.columns;
    const bool ignored = label < 0, present = !ignored && label < p.weight.rows;
    const W* w = row_of<W>(p.weight, present ? label : 0);
    double ww = 0;
    for (int64_t i = threadIdx.x; i < D; i += kThreads) {
        double b = element(w, i, p.weight.column_stride, true);
        ww += b * b;
    }
    const double w_inverse = inverse(sqrt(block_sum(ww)));

    if (p.grad_features.data || p.grad_scale) {
        const X* x = row_of<X>(p.features, row);
        const float* sums = row_of<float>(p.unit_rows, row);
        const double x_inverse = inverse(double(p.norm[row])), t = p.cosine[row];
        double along = 0;
        for (int64_t i = threadIdx.x; i < D; i += kThreads)
            along += double(sums[i]) * element(x, i, p.features.column_stride, !ignored) * x_inverse;
        along = block_sum(along);
        double a = p.row_factor[row];
        if (p.grad_scale && threadIdx.x == 0) p.grad_scale[row] = a * along;
        if (p.grad_features.data) {
            const double tau = present ? p.grad_cosine[row] * x_inverse : 0.0;
            const double by_norm = p.grad_norm ? double(p.grad_norm[row]) : 0.0;
            if (p.scale.normalize)
                a *= scale_of(p.scale, p.norm[row]) * x_inverse;
            else
                a = x_inverse == 0 ? 0 : a;  // a zero row has no direction
            X* grad = writable_row<X>(p.grad_features, row);
            for (int64_t i = threadIdx.x; i < D; i += kThreads) {
                double x_unit = element(x, i, p.features.column_stride, !ignored) * x_inverse;
                double w_unit = element(w, i, p.weight.column_stride, true) * w_inverse;
                double dx = a * (sums[i] - (p.scale.normalize ? along * x_unit : 0.0));
                dx += tau * (w_unit - t * x_unit) + by_norm * x_unit;
                grad[i] = from_float<X>(ignored ? 0.0f : float(dx));
            }
        }
    }

    if (!p.grad_weight.data || !present) return;
    // The first row of each class adds the targets' part of that class's gradient, row after row.
    int earlier = 0;
    for (int64_t other = threadIdx.x; other < row; other += kThreads) earlier += p.labels[other] == label;
    if (__syncthreads_or(earlier)) return;
    // Summed in registers and rounded once, four columns a thread at a time.
    W* grad = writable_row<W>(p.grad_weight, label);
    for (int64_t column = threadIdx.x; column < D + threadIdx.x; column += 4 * kThreads) {
        double sum[4] = {};
        for (int64_t first = row; first < batch; first += kThreads) {
            const int64_t mine = first + threadIdx.x;
            if (!__syncthreads_or(mine < batch && p.labels[mine] == label)) continue;
            for (int64_t other = first; other < batch && other < first + kThreads; ++other) {
                if (p.labels[other] != label) continue;
                const X* x = row_of<X>(p.features, other);
                const double x_inverse = inverse(double(p.norm[other])), t = p.cosine[other];
                const double tau = p.grad_cosine[other] * w_inverse;
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const int64_t i = column + k * kThreads;
                    const double x_unit = element(x, i, p.features.column_stride, i < D) * x_inverse;
                    const double w_unit = element(w, i, p.weight.column_stride, i < D) * w_inverse;
                    sum[k] += tau * (x_unit - t * w_unit);
                }
            }
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int64_t i = column + k * kThreads;
            if (i < D) grad[i] = from_float<W>(float(to_float(grad[i]) + sum[k]));
        }
    }
}

}  // namespace
}  // namespace ak

extern "C" {

const char* ak_prepare_rows(const AkRows* p, const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    if (guard.error()) return guard.error();
    [[maybe_unused]] cudaStream_t stream = static_cast<cudaStream_t>(where->stream);
    return ak::with_type(p->features.type, [&](auto x) {
        return ak::with_type(p->weight.type, [&](auto w) {
            return ak::with_operand_type(p->x_hat.type, [&](auto o) {
                using X = typename decltype(x)::type;
                using W = typename decltype(w)::type;
                using O = typename decltype(o)::type;
                AK_LAUNCH((ak::prepare_rows<X, W, O>), p->features.rows, ak::kThreads, 0, stream, *p);
                return ak::launch_error();
            });
        });
    });
}

const char* ak_factor_rows(const AkFactor* p, const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    if (guard.error()) return guard.error();
    [[maybe_unused]] cudaStream_t stream = static_cast<cudaStream_t>(where->stream);
    return ak::with_type(p->features.type, [&](auto x) {
        return ak::with_operand_type(p->x_factored.type, [&](auto o) {
            return ak::with_operand_type(p->x_hat.type, [&](auto h) {
                using X = typename decltype(x)::type;
                using O = typename decltype(o)::type;
                using H = typename decltype(h)::type;
                AK_LAUNCH((ak::factor_rows<X, O, H>), p->features.rows, ak::kThreads, 0, stream, *p);
                return ak::launch_error();
            });
        });
    });
}

const char* ak_reduce(const AkReduce* p, const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    if (guard.error()) return guard.error();
    AK_LAUNCH(ak::reduce_parts, (p->batch + 31) / 32, 256, 0, static_cast<cudaStream_t>(where->stream), *p);
    return ak::launch_error();
}

const char* ak_finish_rows(const AkFinishRows* p, const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    if (guard.error()) return guard.error();
    [[maybe_unused]] cudaStream_t stream = static_cast<cudaStream_t>(where->stream);
    return ak::with_type(p->features.type, [&](auto x) {
        return ak::with_type(p->weight.type, [&](auto w) {
            using X = typename decltype(x)::type;
            using W = typename decltype(w)::type;
            AK_LAUNCH((ak::finish_rows<X, W>), p->features.rows, ak::kThreads, 0, stream, *p);
            return ak::launch_error();
        });
    });
}
}
