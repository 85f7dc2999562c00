// How matrices are described to bulk copies, and what launching Hopper's kernels takes beside.
#pragma once

#include <cuda.h>

#include "library.h"
#include "roles_sm90.cuh"

namespace ak {
namespace sm90 {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's own function, without linking its library.
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

// How bulk copies see a matrix: boxes of `rows` rows and 128 bytes, zeros outside it, never written there.
inline bool describe(Encode encode, CUtensorMap& map, const AkMatrix& matrix, int rows) {
    const bool half = matrix.type == AK_FLOAT16 || matrix.type == AK_BFLOAT16;
    const unsigned bytes = half ? 2 : 4;
    const cuuint64_t size[2] = {cuuint64_t(matrix.columns), cuuint64_t(matrix.rows)};
    const cuuint64_t stride[1] = {cuuint64_t(matrix.row_stride) * bytes};
    const cuuint32_t box[2] = {128 / bytes, cuuint32_t(rows)}, step[2] = {1, 1};
    // Operands have been rounded to TF32: copies need not.
    const auto type = matrix.type == AK_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                      : half                    ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    return encode(&map, type, 2, matrix.data, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

inline const char* message(cudaError_t error) {
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();  // not left to the next launch
    return cudaGetErrorString(error);
}

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

// What a kernel takes of shared memory passes the default; on the current device.
template <class Variant>
const char* allow(const Variant& v) {
    return message(cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, v.shared));
}

constexpr const char* kNoMaps = "the driver has no tensor maps: it is older than CUDA 12";
constexpr const char* kRefused = "the driver refuses to describe a matrix for bulk copies: its address, its shape";

}  // namespace
}  // namespace sm90
}  // namespace ak
