// Piece 2 of a step: its arguments' checks, and the choice of a kernel: Hopper's own on that GPU if the library was built
// with CUTLASS's headers, else the portable one.
#include "cosine.h"

#include "launch.cuh"

namespace ak {
namespace {

#ifdef AK_CUTLASS
// Its instructions are those of 9.0a alone: neither 8.x nor 10.x has them.
bool is_hopper([[maybe_unused]] int device) {
    int major = 9;
#ifndef AK_EMULATE
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
#endif
    return major == 9;
}

const CosineKernel& kernel_for(int device) { return is_hopper(device) ? hopper_cosine : portable_cosine; }
#else
const CosineKernel& kernel_for(int) { return portable_cosine; }
#endif

const char* wrong(const AkCosine& p) {
    if (p.x_hat.type != p.w_hat.type) return "features and centres must have one operand type";
    if (const char* error = with_operand_type(p.x_hat.type, [](auto) -> const char* { return nullptr; })) return error;
    const size_t bytes = operand_bytes(p.x_hat.type);
    if (p.terms.data && p.terms.type != (bytes == 2 ? AK_BFLOAT16 : AK_FLOAT32))
        return "E must be bfloat16, or float32 beside TF32 operands";
    if (p.x_hat.columns != p.w_hat.columns) return "features and centres must have one width";
    if (p.w_hat.rows > INT32_MAX - 256) return "too many classes at once";
    for (const AkMatrix* matrix : {&p.x_hat, &p.w_hat, &p.terms})
        if (matrix->data && !aligned_rows(*matrix, bytes)) return "rows must start at multiples of 16 bytes";
    return nullptr;
}

}  // namespace
}  // namespace ak

extern "C" {

int32_t ak_version() { return 3; }

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
    const ak::CosineKernel& kernel = ak::kernel_for(where->device);
    return error || &kernel == &ak::portable_cosine ? error : kernel.check();
}

const char* ak_tiling(AkTiling* p, const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    return ak::kernel_for(where->device).tiling(*p);
}

const char* ak_block(AkBlock* p, const AkWhere*) {
#ifdef AK_CUTLASS
    (p->hopper ? ak::hopper_cosine : ak::portable_cosine).block(*p);
    return nullptr;
#else
    if (p->hopper) return "this library was built without Hopper's own kernel";
    ak::portable_cosine.block(*p);
    return nullptr;
#endif
}

const char* ak_cosine_exp(const AkCosine* p, const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    const char* error = ak::wrong(*p);
    return error ? error : ak::kernel_for(where->device).launch(*p, *where);
}
}
