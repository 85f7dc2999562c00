// The library's contract: what is not a kernel's own. Checks of what is multiplied, and the choice of a kernel: Hopper's own
// on that GPU if the library was built with CUTLASS's headers, else the portable one, or none.
#include "launch.cuh"

namespace ak {
namespace {

#ifdef AK_CUTLASS
// Whether a device runs one of Hopper's own kernels: their instructions are those of 9.0a alone.
bool has(int kernel, const AkWhere& where) {
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, where.device);
    return major == 9 && !(where.without & kernel);
}
#endif

const char* wrong(const AkCosine& p) {
    if (p.x_hat.type != p.w_hat.type) return "features and centres must have one operand type";
    if (const char* error = with_operand_type(p.x_hat.type, [](auto) -> const char* { return nullptr; })) return error;
    const size_t bytes = operand_bytes(p.x_hat.type);
    if (p.terms.data && p.terms.type != (bytes == 2 ? AK_BFLOAT16 : AK_FLOAT32))
        return "E must be bfloat16, or float32 beside TF32 operands";
    if (p.x_hat.columns != p.w_hat.columns) return "features and centres must have one width";
    if (p.w_hat.rows > INT32_MAX - 256) return "too many classes at once";
    if (p.subcentres < 1 || p.subcentres > p.group || p.group > 8 || (p.group & (p.group - 1)))
        return "a class must have 1 to 8 centres, in a group of a power of two";
    if (p.w_hat.rows % p.group || p.class_start % p.group) return "there must be whole groups of columns";
    for (const AkMatrix* matrix : {&p.x_hat, &p.w_hat, &p.terms})
        if (matrix->data && !aligned_rows(*matrix, bytes)) return "rows must start at multiples of 16 bytes";
    return nullptr;
}

const char* wrong(const AkGradCentres& p) {
    if (p.terms.rows < 1 || p.terms.columns < 1) return "nothing to sum";
    if (p.terms.type != AK_BFLOAT16 || p.x_factored.type != AK_BFLOAT16) return "operands must be bfloat16";
    if (p.weight.type != p.grad.type) return "the centres and their gradient must have one type";
    const char* error = with_type(p.weight.type, [](auto) -> const char* { return nullptr; });
    if (error) return error;
    if (p.terms.rows != p.x_factored.rows) return "both operands must have one number of rows";
    if (p.terms.columns != p.weight.rows) return "E must have a column for each class";
    if (p.x_factored.columns > sm90::kWidest) return "rows are too wide";
    if (p.weight.columns > p.x_factored.columns) return "the centres are wider than the features";
    if (p.clusters < 1) return "no blocks";
    if (p.weight.rows > INT32_MAX - 1024) return "too many classes at once";
    const size_t element = p.weight.type == AK_FLOAT32 ? 4 : 2;
    const auto starts = [](const AkMatrix& matrix, size_t bytes) {  // whatever the number of columns
        return matrix.column_stride == 1 && matrix.row_stride * bytes % 16 == 0 &&
               reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0;
    };
    if (!starts(p.terms, 2) || !starts(p.x_factored, 2) || !aligned_rows(p.weight, element) ||
        !aligned_rows(p.grad, element))
        return "rows must start at multiples of 16 bytes";
    return nullptr;
}

}  // namespace
}  // namespace ak

extern "C" {

int32_t ak_version() { return 8; }

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
    const char* error = ak::sm80::check_cosine();
#ifdef AK_CUTLASS
    if (!error && ak::has(AK_COSINE_SM90, *where)) error = ak::sm90::check_cosine();
    if (!error && ak::has(AK_GRADIENT_SM90, *where)) error = ak::sm90::check_gradient();
#endif
    return error;
}

const char* ak_tiling(AkTiling* p, const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    if (guard.error()) return guard.error();
#ifdef AK_CUTLASS
    if (ak::has(AK_COSINE_SM90, *where) && !p->grouped) return ak::sm90::tile_cosine(*p);
#endif
    return ak::sm80::tile_cosine(*p);
}

const char* ak_cosine_exp(const AkCosine* p, const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    if (guard.error()) return guard.error();
    if (const char* error = ak::wrong(*p)) return error;
#ifdef AK_CUTLASS
    if (ak::has(AK_COSINE_SM90, *where) && p->group == 1) return ak::sm90::launch_cosine(*p, where->stream);
#endif
    return ak::sm80::launch_cosine(*p, where->stream);
}

const char* ak_grad_tiling(AkGradTiling* p, const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    if (guard.error()) return guard.error();
    p->clusters = 0;
#ifdef AK_CUTLASS
    if (ak::has(AK_GRADIENT_SM90, *where) && p->width <= ak::sm90::kWidest) return ak::sm90::tile_gradient(*p);
#endif
    return nullptr;
}

const char* ak_grad_centres(const AkGradCentres* p, const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    if (guard.error()) return guard.error();
    if (const char* error = ak::wrong(*p)) return error;
#ifdef AK_CUTLASS
    if (ak::has(AK_GRADIENT_SM90, *where)) return ak::sm90::launch_gradient(*p, where->stream);
#endif
    return "there is no such kernel for this device";
}
}
