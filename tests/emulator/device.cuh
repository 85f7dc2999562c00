// csrc/device.cuh on a CPU: launches and instructions by the emulator. Compiled by any C++ compiler, with CUDA's headers
// (as those of CUTLASS want them, cutlass.h) or without.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#ifndef __CUDA_RUNTIME_H__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
extern "C" {
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetDevice(int*);
cudaError_t cudaSetDevice(int);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int);
}
#else
#undef __launch_bounds__
#define __launch_bounds__(...)
#endif
#undef __shared__
#define __shared__ static  // blocks that have such memory run one after the other
#define __forceinline__ inline

#define AK_LAUNCH(kernel, grid, block, shared, stream, ...) \
    ::ak::launched((const void*)(kernel), grid, block, shared, [&] { kernel(__VA_ARGS__); })
#define AK_DYNAMIC_SHARED(name) unsigned char* const name = emulator::dynamic_shared()

inline void __syncthreads() { emulator::sync_block(); }
inline int __syncthreads_or(int vote) { return emulator::sync_block_or(vote); }

template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
    const unsigned char* all;
    emulator::exchange(&value, sizeof(T), &all);
    memcpy(&value, all + (emulator::thread_index().x % 32 ^ mask) * 64, sizeof(T));
    return value;
}

inline int __any_sync(unsigned, int vote) {
    const unsigned char* all;
    emulator::exchange(&vote, sizeof(vote), &all);
    for (int lane = 0; lane < 32; ++lane) {
        int theirs;
        memcpy(&theirs, all + lane * 64, sizeof(theirs));
        vote |= theirs;
    }
    return vote;
}

inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

namespace ak {

struct half;
struct bfloat16;
struct tfloat32;

inline void launched(const void* kernel, dim3 grid, dim3 block, size_t shared, const std::function<void()>& call) {
    emulator::launch(kernel, {grid.x, grid.y, grid.z}, {}, {block.x, block.y, block.z}, shared, call);
}

// CUDA's runtime, as far as a kernel's address is asked for. Ahead of those of CUDA's headers.
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    emulator::allow_shared((const void*)kernel, size_t(bytes));
    return cudaGetLastError();
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
    return *blocks = 2, cudaSuccess;
}
#ifdef __CUDA_RUNTIME_H__
template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(Parameters...), const cudaLaunchConfig_t*) {
    return *clusters = 3, cudaSuccess;
}
template <class Parameters>
cudaError_t launched_in_clusters(const cudaLaunchConfig_t* c, void (*kernel)(Parameters), const Parameters& given) {
    if (c->numAttrs != 1 || c->attrs->id != cudaLaunchAttributeClusterDimension) return cudaErrorInvalidConfiguration;
    const auto& cluster = c->attrs->val.clusterDim;
    emulator::launch((const void*)kernel, {c->gridDim.x, c->gridDim.y, c->gridDim.z}, {cluster.x, cluster.y, cluster.z},
                     {c->blockDim.x, c->blockDim.y, c->blockDim.z}, c->dynamicSmemBytes,
                     [&] { kernel(given); });
    return cudaGetLastError();
}
#define cudaLaunchKernelEx launched_in_clusters
#endif

inline float half_to_float(uint16_t bits) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return float(value);
}

inline uint16_t float_to_half(float value) {
    const _Float16 rounded = _Float16(value);
    uint16_t bits;
    memcpy(&bits, &rounded, 2);
    return bits;
}

inline uint16_t float_to_bfloat16(float value) {
    const uint32_t bits = __float_as_uint(value);
    return value != value ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float exp2_fast(float x) { return std::exp2(x); }

inline void copy_async(void* shared, const void* global, bool inside) { emulator::copy_16(shared, inside ? global : nullptr); }
inline void commit_copies() { emulator::commit_copies(); }
template <int PENDING>
void wait_copies() {
    emulator::wait_copies(PENDING);
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
    const unsigned char* all;
    emulator::exchange(&row, sizeof(row), &all);
    const unsigned lane = emulator::thread_index().x % 32;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned char* from;
        memcpy(&from, all + (i * 8 + lane / 4) * 64, sizeof(from));
        memcpy(&to[i], from + lane % 4 * 4, 4);
    }
}

// Element `which` of a register of operands: two of 16 bits, or one rounded to TF32.
template <class T>
float operand(uint32_t bits, int which) {
    if constexpr (sizeof(T) == 4) {
        const uint32_t seen = bits & 0xFFFFE000u;
        float value;
        memcpy(&value, &seen, 4);
        return value;
    } else {
        return to_float(T{uint16_t(bits >> 16 * which)});
    }
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const unsigned char* all;
    emulator::exchange(mine, sizeof(mine), &all);
    constexpr int kEach = int(4 / sizeof(T));  // elements a register
    const int lane = int(emulator::thread_index().x % 32);
    const auto of = [&](int from, int which) {
        uint32_t bits;
        memcpy(&bits, all + from * 64 + which * 4, 4);
        return bits;
    };
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int far = 0; far < 2; ++far)
            for (int near = 0; near < 4; ++near) {
                const uint32_t left = of(row % 8 * 4 + near, row / 8 + far * 2), right = of(column * 4 + near, 4 + far);
                for (int k = 0; k < kEach; ++k) c[i] += operand<T>(left, k) * operand<T>(right, k);
            }
    }
}

inline void prefetch_to_l2(const void*) {}
inline void keep_accesses_here() {}
inline void wait_for_the_cluster(const void* barrier, uint32_t phase) { emulator::barrier_wait(barrier, phase); }

}  // namespace ak
