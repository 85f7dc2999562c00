// The margin's and the softmax's arithmetic, one row at a time (Wang et al. 2018, equation 6).
#pragma once

#include <cmath>

#include "device.cuh"

namespace ak {

constexpr double kEps = 1e-12;  // a norm at or below it has no direction (torch.nn.functional.normalize's)
constexpr float kLog2e = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kBound = 92.33248261893206f;  // 64 log2(e): to there 2^logit needs no shift

// 1/norm; 0 for a zero row, NaN where the norm overflowed.
template <class T>
__device__ inline T inverse(T norm) {
    return (norm <= T(kEps) ? T(0) : T(1) / norm) + (norm - norm);
}

struct MarginRow {
    double loss;      // softplus(log z − s(t − m))
    double by_log_z;  // p/z with p = sigmoid(log z − s(t − m))
    double by_cosine;  // −s·p
    double by_scale;   // −p(t − m)
};

// One row of AM-Softmax: z the negatives' sum, off by 2^shift; t the target's cosine. A row without negatives has loss 0.
__device__ inline MarginRow additive_margin(double z, double shift, double cosine, double scale, double margin) {
    double above = cosine - margin;
    double v = log(z) + shift * kLn2 - above * scale;
    if (v == -INFINITY) return {0, 0, 0, 0};
    double e = exp(-fabs(v));  // softplus and sigmoid from it, without cancellation
    double p = (v > 0 ? 1.0 : e) / (1.0 + e);
    double loss = (v > 0 ? v : 0.0) + log1p(e);
    if (v != v) loss = p = v;
    return {loss, z > 0 ? p / z : p * 0.0, -p * scale, -p * above};
}

}  // namespace ak
