// The centres' step in the place of their gradient: the normalization's derivative, the targets' part, SGD or AdamW. A warp
// takes a class and goes over its row three times, of which the first reads memory and the others the L1 cache. The rules and
// the random bits are those of amsoftmax_kernels/backends/update.py and rounding.py.
#include "arithmetic.h"
#include "launch.cuh"

namespace ak {
namespace {

constexpr int kWarps = 8;

// SplitMix64's output function.
__device__ inline uint64_t mix(uint64_t x) {
    x *= 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// To the nearest, and to bfloat16 at random if `stochastic`: random bits below the last, truncated.
template <class T>
__device__ inline T rounded(float value, uint32_t, bool) {
    return from_float<T>(value);
}
template <>
__device__ inline bfloat16 rounded<bfloat16>(float value, uint32_t bits, bool stochastic) {
    if (!stochastic) return from_float<bfloat16>(value);
    bits = (bits ^ (bits >> 16)) * 0x7FEB352Du;
    bits = (bits ^ (bits >> 15)) * 0x846CA68Bu;
    return {uint16_t((float_to_bits(value) + (bits >> 16)) >> 16)};
}

template <class W, class S>
__global__ void update_centres(AkUpdateCentres p) {
    const int lane = threadIdx.x % 32;
    const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, columns = p.centres.columns;
    if (row >= p.centres.rows) return;
    const float* unit = row_of<float>(p.grad_unit, row);
    const W* centre = row_of<W>(p.centres, row);
    const float w_inverse = p.whole ? 0.0f : p.inverse_norm[row];
    const int slot = p.whole ? -1 : p.slots[row];
    const float* target = slot < 0 ? nullptr : row_of<float>(p.target_rows, slot);
    float along = 0;
    if (!p.whole) {
        for (int64_t i = lane; i < columns; i += 32)
            along += unit[i] * (to_float(centre[i * p.centres.column_stride]) * w_inverse);
        along = warp_sum(along);
    }
    const auto gradient = [&](int64_t i, float w) {
        if (p.whole) return unit[i];
        const float g = (unit[i] - along * (w * w_inverse)) * w_inverse;
        return (target ? g + target[i] : g) / p.loss_scale;
    };
    float bad = 0;
    for (int64_t i = lane; i < columns; i += 32) {
        const float g = gradient(i, to_float(centre[i * p.centres.column_stride]));
        if (!(fabsf(g) < INFINITY)) bad = 1;
        if (p.out.data) writable_row<float>(p.out, row)[i] = g;
    }
    if (p.out.data) return;
    bad = warp_sum(bad);
    if (lane == 0) p.skipped[row] = bad > 0;
    if (bad > 0) return;

    const int64_t place = p.rows ? p.rows[row] : p.start + row;
    const uint64_t name = uint64_t(p.class_start + place);
    const uint32_t w_bits = uint32_t(mix(name + uint64_t(p.weight_key)));
    const uint32_t first_bits = uint32_t(mix(name + uint64_t(p.first_key)));
    const uint32_t second_bits = uint32_t(mix(name + uint64_t(p.second_key)));
    W* weight = writable_row<W>(p.weight, place);
    S* first = p.first.data ? writable_row<S>(p.first, place) : nullptr;
    S* second = p.second.data ? writable_row<S>(p.second, place) : nullptr;
    const bool stochastic = p.stochastic;
    for (int64_t i = lane; i < columns; i += 32) {
        const uint32_t column = uint32_t(i) * 0x9E3779B1u;
        float w = to_float(centre[i * p.centres.column_stride]), g = gradient(i, w);
        if (second) {  // AdamW
            float mean = to_float(first[i]), square = to_float(second[i]);
            mean += p.first_rate * (g - mean);
            square += p.second_rate * (g * g - square);
            w = w * p.decay - p.lr * mean / (sqrtf(square) * p.correction + p.third);
            first[i] = rounded<S>(mean, first_bits + column, stochastic);
            second[i] = rounded<S>(square, second_bits + column, stochastic);
        } else {
            g += p.decay * w;
            if (first) {
                const float velocity = p.first_rate * to_float(first[i]) + p.second_rate * g;
                first[i] = rounded<S>(velocity, first_bits + column, stochastic);
                g = p.nesterov ? g + p.third * velocity : velocity;
            }
            w -= p.lr * g;
        }
        weight[i] = rounded<W>(w, w_bits + column, stochastic);
    }
}

}  // namespace
}  // namespace ak

extern "C" {

const char* ak_update_centres(const AkUpdateCentres* p, const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    if (guard.error()) return guard.error();
    if (p->weight.type != p->centres.type || (p->second.data && p->second.type != p->first.type))
        return "the centres must have one type, and their state too";
    [[maybe_unused]] cudaStream_t stream = static_cast<cudaStream_t>(where->stream);
    const unsigned blocks = unsigned((p->centres.rows + ak::kWarps - 1) / ak::kWarps);
    return ak::with_type(p->weight.type, [&](auto w) {
        return ak::with_type(p->first.data ? p->first.type : p->weight.type, [&](auto s) {
            using W = typename decltype(w)::type;
            using S = typename decltype(s)::type;
            AK_LAUNCH((ak::update_centres<W, S>), blocks, 32 * ak::kWarps, 0, stream, *p);
            return ak::launch_error();
        });
    });
}
}
