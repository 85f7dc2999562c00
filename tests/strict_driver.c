// libcuda.so.1 for a machine without a GPU: what Triton asks of a driver. Nothing runs; tensor maps and launches are checked
// as CUDA's driver checks them, and what it would refuse is refused, with the reason on stderr.
#include <cuda.h>
#include <stdio.h>
#include <string.h>

enum { SHARED_MEMORY = 227 << 10, MOST_BOX = 256 };

static unsigned long long maps_seen, launches_seen, refusals;
static int the_context;

unsigned long long maps(void) { return maps_seen; }
unsigned long long launches(void) { return launches_seen; }
unsigned long long refused(void) { return refusals; }

static CUresult refuse(const char *what, unsigned long long value) {
  ++refusals;
  fprintf(stderr, "the driver refuses %s: %llu\n", what, value);
  return CUDA_ERROR_INVALID_VALUE;
}

static unsigned bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 4;
  }
}

static unsigned widest_row(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_32B: return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B: return 64;
    case CU_TENSOR_MAP_SWIZZLE_128B: return 128;
    default: return MOST_BOX * 8;
  }
}

CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *extent,
    const cuuint64_t *stride, const cuuint32_t *box, const cuuint32_t *step, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const unsigned bytes = bytes_of(type);
  ++maps_seen;
  if (rank < 1 || rank > 5) return refuse("a tensor map's rank", rank);
  if ((unsigned long long)address % 16) return refuse("an address that is no multiple of 16 bytes", (unsigned long long)address);
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return refuse("an interleaved layout", interleave);
  for (unsigned i = 0; i < rank; ++i) {
    if (extent[i] == 0 || extent[i] > 1ull << 32) return refuse("an extent", extent[i]);
    if (box[i] == 0 || box[i] > MOST_BOX) return refuse("a box's side", box[i]);
    if (step[i] == 0 || step[i] > 8) return refuse("an element stride", step[i]);
  }
  for (unsigned i = 0; i + 1 < rank; ++i) {
    if (stride[i] % 16 || stride[i] >= 1ull << 40) return refuse("a stride in bytes", stride[i]);
    if (i == 0 && stride[0] < extent[0] * bytes) return refuse("a stride of less than a row", stride[0]);
  }
  if (box[0] * bytes % 16) return refuse("a box whose rows are no multiple of 16 bytes", box[0] * bytes);
  if (box[0] * bytes > widest_row(swizzle)) return refuse("a box wider than its swizzle", box[0] * bytes);
  memset(map, 0, sizeof *map);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters, void **extra) {
  ++launches_seen;
  if (c->gridDimX == 0 || c->gridDimX > 2147483647u) return refuse("a grid's first side", c->gridDimX);
  if (c->gridDimY == 0 || c->gridDimY > 65535) return refuse("a grid's second side", c->gridDimY);
  if (c->gridDimZ == 0 || c->gridDimZ > 65535) return refuse("a grid's third side", c->gridDimZ);
  const unsigned threads = c->blockDimX * c->blockDimY * c->blockDimZ;
  if (threads == 0 || threads > 1024) return refuse("a block's threads", threads);
  if (c->sharedMemBytes > SHARED_MEMORY) return refuse("shared memory", c->sharedMemBytes);
  return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  return *value = SHARED_MEMORY, CUDA_SUCCESS;  // the one that matters: a kernel that takes more is never loaded
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)&the_context, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)&the_context, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **string) { return *string = "refused", CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)image, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  return *function = (CUfunction)module, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > SHARED_MEMORY) return refuse("shared memory", value);
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)data = pointer, CUDA_SUCCESS;  // a tensor's memory is here
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
