// Numbers in memory as kernels read and write them, and their sums over a warp and a block.
#pragma once

#include <cstdint>
#include <cstring>

#include "device.cuh"

namespace ak {

struct half {
    uint16_t bits;
};
struct bfloat16 {
    uint16_t bits;
};
struct tfloat32 {
    float value;
};

__device__ inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

__device__ inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(bfloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

__device__ inline float to_float(half value) { return half_to_float(value.bits); }

template <class T>
__device__ T from_float(float value);

template <>
__device__ inline float from_float<float>(float value) {
    return value;
}

// To the nearest: the tensor cores drop the low 13 bits, and left to them every cosine would be too small.
template <>
__device__ inline tfloat32 from_float<tfloat32>(float value) {
    return {value - value == 0 ? bits_to_float((float_to_bits(value) + 0x1000u) & 0xFFFFE000u) : value};
}

template <>
__device__ inline bfloat16 from_float<bfloat16>(float value) {
    return {float_to_bfloat16(value)};
}

template <>
__device__ inline half from_float<half>(float value) {
    return {float_to_half(value)};
}

// Eight elements of a row, in 16-byte accesses.
template <class T>
struct alignas(16) Eight {
    T of[8];
};

template <class T>
__device__ inline void load_eight(const T* from, float (&to)[8]) {
    const Eight<T> raw = *reinterpret_cast<const Eight<T>*>(from);
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = to_float(raw.of[i]);
}

template <class T>
__device__ inline void store_eight(T* to, const float (&from)[8]) {
    Eight<T> raw;
#pragma unroll
    for (int i = 0; i < 8; ++i) raw.of[i] = from_float<T>(from[i]);
    *reinterpret_cast<Eight<T>*>(to) = raw;
}

// Sums over a warp and over a block of whole warps, the same on every thread, in a fixed order.
template <class T>
__device__ inline T warp_sum(T value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
    return value;
}

template <class T>
__device__ inline T block_sum(T value) {
    __shared__ T parts[32];
    value = warp_sum(value);
    __syncthreads();  // whoever still reads an earlier sum
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    T total = 0;
    for (unsigned i = 0; i < blockDim.x / 32; ++i) total += parts[i];
    return total;
}

}  // namespace ak
