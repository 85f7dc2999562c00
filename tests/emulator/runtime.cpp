// CUDA's runtime as far as csrc calls it, and the driver's descriptions of matrices: one GPU, number 0, of compute capability
// 9.0 with two multiprocessors.
#include "machine.h"

extern "C" {

enum Result { kFine = 0, kInvalidDevice = 101, kFailed = 719 };

int cudaGetLastError() {
    if (emulator::error.empty()) return kFine;
    emulator::last.swap(emulator::error);  // there until there is another
    emulator::error.clear();
    return kFailed;
}
const char* cudaGetErrorString(int result) {
    return result == kFine ? "no error" : result == kInvalidDevice ? "invalid device ordinal" : emulator::last.c_str();
}
int cudaGetDevice(int* device) { return *device = 0, kFine; }
int cudaSetDevice(int device) { return device == 0 ? kFine : kInvalidDevice; }
int cudaDeviceGetAttribute(int* value, int attribute, int) { return *value = attribute == 75 ? 9 : 2, kFine; }

// cuTensorMapEncodeTiled, for matrices of rows that are permuted within 128 bytes.
static int encode(emulator::Map* map, int type, uint32_t rank, void* data, const uint64_t* size, const uint64_t* stride,
                  const uint32_t* box, const uint32_t* step, int interleave, int swizzle, int, int) {
    constexpr int kFloat16 = 6, kFloat32 = 7, kBfloat16 = 9, kSwizzle128 = 3;
    const uint32_t element = type == kFloat32 ? 4 : 2;
    const bool types = type == kFloat16 || type == kFloat32 || type == kBfloat16;
    const bool places = uintptr_t(map) % 64 == 0 && uintptr_t(data) % 16 == 0 && stride[0] % 16 == 0 && !(stride[0] >> 40);
    const bool sizes = size[0] && size[1] && size[0] <= uint64_t(1) << 32 && size[1] <= uint64_t(1) << 32;
    const bool boxes = box[0] && box[1] && box[1] <= 256 && box[0] * element == 128 && step[0] == 1 && step[1] == 1;
    if (!types || rank != 2 || !places || !sizes || !boxes || stride[0] < size[0] * element || interleave || swizzle != kSwizzle128)
        return 1;
    *map = {static_cast<unsigned char*>(data), size[0], size[1], stride[0], element, box[0], box[1]};
    return 0;
}
int cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long, int* found) {
    *function = reinterpret_cast<void*>(&encode), *found = 0;
    return kFine;
}
}
