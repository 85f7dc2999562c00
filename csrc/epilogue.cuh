// What both cosine kernels do with a row of the batch and with one cosine, whatever multiplied it.
#pragma once

#include "arithmetic.h"
#include "launch.cuh"

namespace ak {

// What the epilogue wants of a row; its label as a column of this chunk, negative where it is in another.
struct Row {
    float factor, shift;
    int32_t label;
};

__device__ inline Row load_row(const AkCosine& p, int64_t row) {
    if (row >= p.x_hat.rows) return {0.0f, 0.0f, -1};
    const int64_t label = p.labels[row] - p.class_start;
    return {p.factor[row], p.shift ? p.shift[row] : 0.0f, label >= 0 && label < p.w_hat.rows ? int32_t(label) : -1};
}

// The largest cosine so far, and the lowest column that has it.
struct Most {
    float cosine = -INFINITY;
    int32_t column = INT32_MAX;
};

__device__ __forceinline__ Most larger(Most a, Most b) {
    return b.cosine > a.cosine || (b.cosine == a.cosine && b.column < a.column) ? b : a;
}

// The larger of this lane's and that of the lane whose number differs in the bits of `mask`.
__device__ __forceinline__ Most larger_across(Most most, int mask) {
    Most other;
    other.cosine = __shfl_xor_sync(0xFFFFFFFFu, most.cosine, mask);
    other.column = __shfl_xor_sync(0xFFFFFFFFu, most.column, mask);
    return larger(most, other);
}

// E of one cosine: 2^logit, 0 where it is masked (its row's own class, past the last class) or filtered out. GENERAL kernels
// look for the largest cosine and have a filter; one that is not wanted is infinite.
template <bool GENERAL>
__device__ inline float term(float cosine, int32_t column, bool masked, const Row& row, float filter, bool only_unbounded,
                             Most& most) {
    const bool filtered = GENERAL && cosine > filter;
    // A pass for the shift must not see what the filter leaves out.
    if (GENERAL && !masked && !(filtered && only_unbounded) && cosine > most.cosine) most = {cosine, column};
    return masked || filtered ? 0.0f : exp2_fast(cosine * row.factor - row.shift);
}

inline bool has_filter(const AkCosine& p) { return p.filter <= 1.0f; }

// Two terms as they lie in memory.
__device__ inline uint32_t pack(const float (&e)[2]) {
    return uint32_t(float_to_bfloat16(e[1])) << 16 | float_to_bfloat16(e[0]);
}

// What a part of the classes has come to: a row's sum and its largest cosine.
__device__ inline void store_sums(const AkCosine& p, int part, int64_t row, double z, const Most& best) {
    if (row >= p.x_hat.rows) return;
    const int64_t owned = part * p.x_hat.rows + row;
    if (p.z) p.z[owned] = z;
    if (!p.best) return;
    p.best[owned] = best.cosine;
    p.best_class[owned] = best.cosine > -INFINITY ? p.class_start + best.column : -1;
}

}  // namespace ak
