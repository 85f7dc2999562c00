// One class of the centres by one warp: what more than one kernel does with it.
#pragma once

#include "arithmetic.h"
#include "launch.cuh"

namespace ak {

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

// ŵ and 1/‖w‖ of a class.
template <class W, class O, bool VECTOR>
__device__ inline void prepare_centre(const AkMatrix& weight, const AkMatrix& unit, float* inverse_norm, int64_t row) {
    const int lane = threadIdx.x % 32;
    const int64_t columns = weight.columns;
    const W* w = row_of<W>(weight, row);
    float values[8], sum = 0;
    for (int64_t first = lane * 8; first < columns; first += 256) {
        read<W, VECTOR>(w, first, columns, weight.column_stride, values);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += values[i] * values[i];
    }
    const float w_inverse = inverse(sqrtf(warp_sum(sum)));
    O* w_hat = writable_row<O>(unit, row);
    for (int64_t first = lane * 8; first < unit.columns; first += 256) {  // the row again, out of the L1 cache
        read<W, VECTOR>(w, first, columns, weight.column_stride, values);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] *= w_inverse;
        store_eight(w_hat + first, values);  // rows of ŵ are multiples of 16 elements
    }
    if (lane == 0) inverse_norm[row] = w_inverse;
}

// Whether every row of the centres can be read, and of ŵ written, eight columns at a time.
template <class W>
inline bool in_eights(const AkMatrix& weight, const AkMatrix& w_hat) {
    return aligned_rows(weight, sizeof(W)) && weight.columns == w_hat.columns;
}

}  // namespace ak
