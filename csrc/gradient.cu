// Pieces 4 and 5 of a step for the centres in one kernel, where there is one: on Hopper, if the library was built with
// CUTLASS's headers. Its arguments' checks.
#include "gradient.h"

#include "launch.cuh"

namespace ak {
namespace {

#ifdef AK_CUTLASS
const char* wrong(const AkGradCentres& p, int device) {
    if (!is_hopper(device)) return "this device has no such kernel";
    if (p.terms.rows < 1 || p.terms.columns < 1) return "nothing to sum";
    if (p.terms.type != AK_BFLOAT16 || p.x_factored.type != AK_BFLOAT16) return "operands must be bfloat16";
    if (p.weight.type != p.grad.type) return "the centres and their gradient must have one type";
    const char* error = with_type(p.weight.type, [](auto) -> const char* { return nullptr; });
    if (error) return error;
    if (p.terms.rows != p.x_factored.rows) return "both operands must have one number of rows";
    if (p.terms.columns != p.weight.rows) return "E must have a column for each class";
    if (p.x_factored.columns > hopper_gradient.widest) return "rows are too wide";
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
#endif

}  // namespace
}  // namespace ak

extern "C" {

const char* ak_grad_tiling(AkGradTiling* p, [[maybe_unused]] const AkWhere* where) {
    p->clusters = 0;
#ifdef AK_CUTLASS
    ak::DeviceGuard guard(where->device);
    if (guard.error()) return guard.error();
    if (ak::is_hopper(where->device) && p->width <= ak::hopper_gradient.widest) return ak::hopper_gradient.tiling(*p);
#endif
    return nullptr;
}

const char* ak_grad_centres([[maybe_unused]] const AkGradCentres* p, [[maybe_unused]] const AkWhere* where) {
#ifdef AK_CUTLASS
    ak::DeviceGuard guard(where->device);
    if (guard.error()) return guard.error();
    const char* error = ak::wrong(*p, where->device);
    return error ? error : ak::hopper_gradient.launch(*p, *where);
#else
    return "this library was built without Hopper's own kernels";
#endif
}
}
