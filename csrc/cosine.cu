// Piece 2 of a step: its arguments' checks, and the choice of a kernel: Hopper's own on that GPU if the library was built
// with CUTLASS's headers, else the portable one.
#include "cosine.h"
#include "gradient.h"

#include "launch.cuh"

namespace ak {
namespace {

#ifdef AK_CUTLASS
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

int32_t ak_version() { return 5; }

int32_t ak_contract() { return AK_CONTRACT; }

int32_t ak_has_hopper() {
#ifdef AK_CUTLASS
    return 1;
#else
    return 0;
#endif
}

const char* ak_check(const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    if (guard.error()) return guard.error();
    const char* error = ak::portable_cosine.check();
#ifdef AK_CUTLASS
    if (!error && ak::is_hopper(where->device)) error = ak::hopper_cosine.check();
    if (!error && ak::is_hopper(where->device)) error = ak::hopper_gradient.check();
#endif
    return error;
}

const char* ak_tiling(AkTiling* p, const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    if (guard.error()) return guard.error();
    return ak::kernel_for(where->device).tiling(*p);
}

const char* ak_block(AkBlock* p, const AkWhere*) {
#ifdef AK_CUTLASS
    if (p->kernel == AK_HOPPER_COSINE) return ak::hopper_cosine.block(*p), nullptr;
    if (p->kernel == AK_HOPPER_GRADIENT) return ak::hopper_gradient.block(*p), nullptr;
#endif
    if (p->kernel != AK_PORTABLE_COSINE) return "this library was built without Hopper's own kernels";
    ak::portable_cosine.block(*p);
    return nullptr;
}

const char* ak_cosine_exp(const AkCosine* p, const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    if (guard.error()) return guard.error();
    const char* error = ak::wrong(*p);
    return error ? error : ak::kernel_for(where->device).launch(*p, *where);
}
}
