// What the cosine kernels do with one cosine, whatever multiplied it.
#pragma once

#include "arithmetic.h"
#include "elements.cuh"

namespace ak {

// What the epilogue wants of a row of the batch; its label as a column of this chunk, negative where it is in another.
struct Row {
    float factor, shift;
    int32_t label;
};

__host__ __device__ inline int32_t label_here(int64_t label, int64_t class_start, int64_t classes) {
    const int64_t local = label - class_start;
    return local >= 0 && local < classes ? int32_t(local) : -1;
}

// The largest cosine so far, and the lowest column that has it.
struct Most {
    float cosine = -INFINITY;
    int32_t column = INT32_MAX;
};

__host__ __device__ inline Most larger(Most a, Most b) {
    return b.cosine > a.cosine || (b.cosine == a.cosine && b.column < a.column) ? b : a;
}

// E of one cosine: 2^logit, 0 where it is masked (its row's own class, past the last class) or filtered out.
template <bool BEST, bool FILTER>
__host__ __device__ inline float term(float cosine, int32_t column, bool masked, const Row& row, float filter,
                                      bool only_unbounded, Most& most) {
    const bool filtered = FILTER && cosine > filter;
    // A pass for the shift must not see what the filter leaves out.
    if (BEST && !masked && !(filtered && only_unbounded) && cosine > most.cosine) most.cosine = cosine, most.column = column;
    return masked || filtered ? 0.0f : exp2_fast(cosine * row.factor - row.shift);
}

// Two of them as they lie in memory.
__host__ __device__ inline uint32_t pack(const float (&e)[2]) {
    return uint32_t(from_float<bfloat16>(e[1]).bits) << 16 | from_float<bfloat16>(e[0]).bits;
}

}  // namespace ak
