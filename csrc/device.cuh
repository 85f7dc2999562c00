// What only a GPU has: launches, and instructions that C++ has no word for. The tests put a file of the same name in its
// place, by which the rest of these sources run on a CPU as they stand.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define AK_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define AK_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace ak {

struct half;  // the types of elements.cuh
struct bfloat16;
struct tfloat32;

// Conversions of 16-bit numbers, to the nearest, ties to even.
__device__ __forceinline__ float half_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ uint16_t float_to_half(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ uint16_t float_to_bfloat16(float value) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
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

__device__ __forceinline__ void prefetch_to_l2(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// The compiler leaves loads and stores on their side of it, which CUTLASS's barriers and fences do not ask of it.
__device__ __forceinline__ void keep_accesses_here() { asm volatile("" ::: "memory"); }

// Until a phase of an mbarrier that another block completes is over. CUTLASS's own wait acquires what this block has written,
// no other's; this one empties the L1 cache.
__device__ __forceinline__ void wait_for_the_cluster(const void* barrier, uint32_t phase) {
    const unsigned address = unsigned(__cvta_generic_to_shared(barrier));
    uint32_t over;
    do {
        asm volatile(
            "{\n"
            ".reg .pred over;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], %2, %3;\n"
            "selp.b32 %0, 1, 0, over;\n"
            "}"
            : "=r"(over)
            : "r"(address), "r"(phase), "r"(10'000'000)  // nanoseconds at most, and again
            : "memory");
    } while (!over);
}

}  // namespace ak
