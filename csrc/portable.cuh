// What lets one source run on a GPU (nvcc) and, thread by thread, on a CPU (a host compiler with AK_EMULATE) for tests.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef AK_EMULATE
#include "emulate.h"
#else
#include <cuda_runtime.h>
#define AK_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define AK_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

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

__host__ __device__ inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

__host__ __device__ inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

__host__ __device__ inline float to_float(float value) { return value; }
__host__ __device__ inline float to_float(bfloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

__host__ __device__ inline float to_float([[maybe_unused]] half value) {
#ifdef __CUDA_ARCH__
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#elif defined(AK_EMULATE)
    _Float16 number;
    memcpy(&number, &value.bits, 2);
    return float(number);
#else
    return 0;  // nvcc's host pass: never called
#endif
}

template <class T>
__host__ __device__ T from_float(float value);

template <>
__host__ __device__ inline float from_float<float>(float value) {
    return value;
}

// To the nearest: the tensor cores drop the low 13 bits, and left to them every cosine would be too small.
template <>
__host__ __device__ inline tfloat32 from_float<tfloat32>(float value) {
    return {value - value == 0 ? bits_to_float((float_to_bits(value) + 0x1000u) & 0xFFFFE000u) : value};
}

// To the nearest, ties to even; a NaN stays one.
template <>
__host__ __device__ inline bfloat16 from_float<bfloat16>(float value) {
    bfloat16 result;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
    uint32_t bits = float_to_bits(value);
    result.bits = value != value ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
#endif
    return result;
}

template <>
__host__ __device__ inline half from_float<half>([[maybe_unused]] float value) {
    half result;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#elif defined(AK_EMULATE)
    _Float16 number = _Float16(value);
    memcpy(&result.bits, &number, 2);
#else
    result.bits = 0;  // nvcc's host pass: never called
#endif
    return result;
}

#ifdef AK_EMULATE
template <class T>
inline float multiply_element(uint32_t pair, int which) {
    return to_float(T{uint16_t(pair >> 16 * which)});
}

template <>
inline float multiply_element<tfloat32>(uint32_t bits, int) {
    return bits_to_float(bits & 0xFFFFE000u);
}

template <class T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Operands mine;
    memcpy(mine.a, a, sizeof(a));
    memcpy(mine.b, b, sizeof(b));
    const emulate::Warp& warp = emulate::exchange(mine);
    constexpr int each = int(4 / sizeof(T));  // elements a register
    const int lane = emulate::current % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 8 * each; ++k) {
            const int register_of_row = k / each % 4, far = k / each / 4;
            const Operands left = emulate::from_lane<Operands>(warp, row % 8 * 4 + register_of_row);
            const Operands right = emulate::from_lane<Operands>(warp, column * 4 + register_of_row);
            c[i] += multiply_element<T>(left.a[row / 8 + far * 2], k % each) * multiply_element<T>(right.b[far], k % each);
        }
    }
}
#else
__host__ __device__ __forceinline__ float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return exp2f(x);
#endif
}

// Sixteen bytes from global to shared memory, zeros if not `inside`.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
    const unsigned address = unsigned(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(inside ? 16 : 0));
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

template <int PENDING>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
    const unsigned address = unsigned(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
}

// c[16, 8] += a[16, K] b[K, 8]: PTX's mma fragments, 32 bytes of a row: K is 16 for half and bfloat16, 8 for tfloat32.
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define AK_MULTIPLY_ADD(type, name, shape)                                                                             \
    template <>                                                                                                        \
    __device__ __forceinline__ void multiply_add<type>(float(&c)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) {   \
        asm volatile("mma.sync.aligned." shape ".row.col.f32." name "." name ".f32 "                                   \
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                 \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                  \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                              \
    }
AK_MULTIPLY_ADD(half, "f16", "m16n8k16")
AK_MULTIPLY_ADD(bfloat16, "bf16", "m16n8k16")
AK_MULTIPLY_ADD(tfloat32, "tf32", "m16n8k8")
#undef AK_MULTIPLY_ADD
#endif

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
