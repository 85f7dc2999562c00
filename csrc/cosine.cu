// Piece 2 of a step: its arguments' checks, and the choice of a kernel: Hopper's own on that GPU if the library was built
// with CUTLASS's headers, else the portable one.
#include "cosine.h"

#include "launch.cuh"

namespace ak {
namespace {

#ifndef AK_CUTLASS
const CosineKernel& kernel_on(int) { return portable_cosine; }
#elif defined(AK_EMULATE)
const CosineKernel& kernel_on(int) { return hopper_cosine; }
#else
// Its instructions are those of 9.0a alone: neither 8.x nor 10.x has them.
const CosineKernel& kernel_on(int device) {
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return major == 9 ? hopper_cosine : portable_cosine;
}
#endif

const char* wrong(const AkCosine& p) {
    if (p.terms.data && p.terms.type != AK_BFLOAT16) return "E must be bfloat16";
    if (p.x_hat.type != p.w_hat.type) return "features and centres must have one operand type";
    if (p.x_hat.type != AK_FLOAT16 && p.x_hat.type != AK_BFLOAT16) return "operands must be float16 or bfloat16";
    if (p.x_hat.columns != p.w_hat.columns) return "features and centres must have one width";
    if (p.w_hat.rows > INT32_MAX - 256) return "too many classes at once";
    for (const AkMatrix* matrix : {&p.x_hat, &p.w_hat, &p.terms})
        if (matrix->data && !aligned_rows(*matrix, 2)) return "rows must start at multiples of 16 bytes";
    return nullptr;
}

}  // namespace
}  // namespace ak

extern "C" {

int32_t ak_version() { return 2; }

int32_t ak_has_hopper() {
#ifdef AK_CUTLASS
    return 1;
#else
    return 0;
#endif
}

const char* ak_check(const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    const char* error = ak::portable_cosine.check();
    const ak::CosineKernel& kernel = ak::kernel_on(where->device);
    return error || &kernel == &ak::portable_cosine ? error : kernel.check();
}

const char* ak_tiling(AkTiling* p, const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    return ak::kernel_on(where->device).tiling(*p);
}

const char* ak_cosine_exp(const AkCosine* p, const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    const char* error = ak::wrong(*p);
    return error ? error : ak::kernel_on(where->device).launch(*p, *where);
}
}
