// What Hopper's two kernels have in common. A block has three warpgroups: one loads, by one thread's bulk copies, two multiply
// by wgmma. Between them are CUTLASS's pipeline, its barriers and its layouts of shared memory; the loops are our own.
//
// Below: which tiles a stream of blocks has, a stage's products, how matrices are described to bulk copies, and launches of
// whole clusters.
#pragma once

#ifndef NDEBUG
#define NDEBUG  // else CUTLASS's device code asserts
#endif
#include <cute/tensor.hpp>
//
#include <cuda.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>
#include <cutlass/pipeline/sm90_pipeline.hpp>

#include "launch.cuh"

namespace ak {
namespace sm90 {
namespace {

using cute::Int;
using cute::Shape;

constexpr int kThreads = 384, kGroup = 128;
constexpr int kParts = 2;  // warpgroups that multiply
constexpr int kLoaderRegisters = 24, kRegisters = 240;  // a thread; of 168 each at the start
constexpr uint64_t kCacheHint = uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL);

// A stream's tiles of so many classes: every so manieth.
struct Turn {
    int stream, streams, tiles, classes;

    __device__ int count() const { return tiles > stream ? (tiles - stream - 1) / streams + 1 : 0; }
    __device__ int first_class(int i) const { return (stream + i * streams) * classes; }
};

// c plus the products of a stage, on their way when this returns; the first of a tile starts from zero.
template <class Mma, class A, class B, class C>
__device__ inline void multiply_stage(Mma& mma, const A& a, const B& b, C& c) {
    using cute::_;
    cute::warpgroup_fence_operand(c);
    cute::warpgroup_arrive();
    CUTE_UNROLL
    for (int k = 0; k < cute::size<2>(b); ++k) {
        cute::gemm(mma, a(_, _, k), b(_, _, k), c);
        mma.accumulate_ = cute::GMMA::ScaleOut::One;
    }
    cute::warpgroup_commit_batch();
}

// Until at most so many stages' products are still under way.
template <int PENDING, class C>
__device__ inline void wait_for_products(C& c) {
    cute::warpgroup_wait<PENDING>();
    cute::warpgroup_fence_operand(c);
}

// Whether this thread is the one that loads. Elected, the compiler knows it to be one, as copies want.
__device__ inline bool loads() { return cutlass::canonical_warp_idx_sync() == 0 && cute::elect_one_sync(); }

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's own function, without linking its library; null if it is older than CUDA 12.
inline Encode encode_function() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    auto error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    auto error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess) cudaGetLastError();
    return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

// How bulk copies see a matrix: boxes of `rows` rows and 128 bytes, zeros outside it, never written there. Null, or what is
// wrong.
inline const char* describe(CUtensorMap& map, const AkMatrix& matrix, int rows) {
    static const Encode encode = encode_function();
    if (!encode) return "the driver has no tensor maps: it is older than CUDA 12";
    const bool half = matrix.type == AK_FLOAT16 || matrix.type == AK_BFLOAT16;
    const unsigned bytes = half ? 2 : 4;
    const cuuint64_t size[2] = {cuuint64_t(matrix.columns), cuuint64_t(matrix.rows)};
    const cuuint64_t stride[1] = {cuuint64_t(matrix.row_stride) * bytes};
    const cuuint32_t box[2] = {128 / bytes, cuuint32_t(rows)}, step[2] = {1, 1};
    // Operands have been rounded to TF32: copies need not.
    const auto type = matrix.type == AK_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                      : half                    ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    const CUresult result =
        encode(&map, type, 2, matrix.data, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : "the driver refuses to describe a matrix for bulk copies: its address, its shape";
}

// A kernel, and the bytes of shared memory that it takes, which pass the default: they are allowed on the current device.
template <class Parameters>
struct Variant {
    void (*kernel)(Parameters);
    int shared;

    const char* allow() const {
        return message(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    }
};

// A grid of whole clusters. The attribute must outlive the configuration.
inline cudaLaunchConfig_t configure(cudaLaunchAttribute& attribute, dim3 grid, dim3 cluster, int shared, void* stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster.x, attribute.val.clusterDim.y = cluster.y, attribute.val.clusterDim.z = cluster.z;
    cudaLaunchConfig_t configuration = {};
    configuration.gridDim = grid;
    configuration.blockDim = dim3(kThreads);
    configuration.dynamicSmemBytes = size_t(shared);
    configuration.stream = static_cast<cudaStream_t>(stream);
    configuration.attrs = &attribute, configuration.numAttrs = 1;
    return configuration;
}

}  // namespace
}  // namespace sm90
}  // namespace ak
