// Around every launch: the device, the launch's own error, the element types. And which kernels there are that multiply.
#pragma once

#include "library.h"
#include "elements.cuh"

namespace ak {

// Launches go to the caller's device; its own current device comes back afterwards.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) : device_(device) {
        error_ = cudaGetDevice(&before_);
        // Even if it is that one: only this makes its context the thread's, which the driver's own functions ask for.
        if (error_ == cudaSuccess) error_ = cudaSetDevice(device);
        if (error_ != cudaSuccess) cudaGetLastError();  // not left to the next launch
    }
    ~DeviceGuard() {
        if (error_ == cudaSuccess && before_ != device_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

    // Why it is another device that launches would go to; null if it is not.
    const char* error() const { return error_ == cudaSuccess ? nullptr : cudaGetErrorString(error_); }

private:
    int before_ = 0, device_ = 0;
    cudaError_t error_;
};

inline const char* launch_error() {
    cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// What a call of CUDA's runtime says is wrong, null if nothing.
inline const char* message(cudaError_t error) {
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();  // not left to the next launch
    return cudaGetErrorString(error);
}

// Kernels that multiply, on the current device: a check, which lets them have their shared memory; how they divide a problem;
// a launch. Arguments have been checked (library.cu).
namespace sm80 {
const char* check_cosine();
const char* tile_cosine(AkTiling&);
const char* launch_cosine(const AkCosine&, void* stream);
}  // namespace sm80
namespace sm90 {  // only where AK_CUTLASS is defined
constexpr int kWidest = 512;  // of a∘x̂
const char* check_cosine();
const char* tile_cosine(AkTiling&);
const char* launch_cosine(const AkCosine&, void* stream);
const char* check_gradient();
const char* tile_gradient(AkGradTiling&);
const char* launch_gradient(const AkGradCentres&, void* stream);
}  // namespace sm90

template <class T>
struct Tag {
    using type = T;
};

// Calls function(Tag<T>()) for the element type; what is wrong otherwise.
template <class Function>
const char* with_type(int32_t type, Function function) {
    switch (type) {
        case AK_FLOAT32: return function(Tag<float>());
        case AK_FLOAT16: return function(Tag<half>());
        case AK_BFLOAT16: return function(Tag<bfloat16>());
        default: return "an element type that is not float32, float16 or bfloat16";
    }
}

// The same for what is multiplied.
template <class Function>
const char* with_operand_type(int32_t type, Function function) {
    switch (type) {
        case AK_TFLOAT32: return function(Tag<tfloat32>());
        case AK_FLOAT16: return function(Tag<half>());
        case AK_BFLOAT16: return function(Tag<bfloat16>());
        default: return "operands must be float16, bfloat16 or, rounded to TF32, float32";
    }
}

inline size_t operand_bytes(int32_t type) { return type == AK_TFLOAT32 ? 4 : 2; }

inline bool aligned_rows(const AkMatrix& matrix, size_t element) {
    return matrix.column_stride == 1 && matrix.columns % 8 == 0 && matrix.row_stride * element % 16 == 0 &&
           reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0;
}

template <class T>
__device__ inline const T* row_of(const AkMatrix& matrix, int64_t row) {
    return static_cast<const T*>(matrix.data) + row * matrix.row_stride;
}

template <class T>
__device__ inline T* writable_row(const AkMatrix& matrix, int64_t row) {
    return static_cast<T*>(matrix.data) + row * matrix.row_stride;
}

__device__ inline float scale_of(const AkScale& scale, float norm) {
    return !scale.normalize ? norm : scale.pointer ? *scale.pointer : scale.number;
}

}  // namespace ak
