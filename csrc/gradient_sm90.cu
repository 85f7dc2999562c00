// Launches Hopper's gradient kernel (gradient_sm90.cuh). Built only with CUTLASS's headers.
#ifdef AK_CUTLASS

#include "gradient_sm90.cuh"
//
#include "gradient.h"
#include "launch_sm90.cuh"

namespace ak {
namespace sm90 {
namespace {

using Kernel = void (*)(GradientParameters);

struct Variant {
    Kernel kernel;
    int shared;
};

template <class W>
Variant variant(int64_t width) {
    if (columns_of(width) == 256) return {grad_centres<256, W>, int(sizeof(GradientShared<256>))};
    return {grad_centres<128, W>, int(sizeof(GradientShared<128>))};
}

Variant variant(int32_t type, int64_t width) {
    switch (type) {
        case AK_FLOAT16: return variant<cutlass::half_t>(width);
        case AK_BFLOAT16: return variant<cutlass::bfloat16_t>(width);
        default: return variant<float>(width);
    }
}

cudaLaunchConfig_t configure(cudaLaunchAttribute& attribute, int64_t width, int clusters, int shared, void* stream) {
    const unsigned halves = unsigned(halves_of(width));
    return configure(attribute, dim3(halves, unsigned(kSharing * clusters)), dim3(halves, kSharing), shared, stream);
}

const char* check() {
    for (int32_t type : {AK_FLOAT32, AK_FLOAT16, AK_BFLOAT16})
        for (int64_t width : {128, 256})
            if (const char* error = allow(variant(type, width))) return error;
    return nullptr;
}

const char* tiling(AkGradTiling& p) {
    const Variant v = variant(p.type, p.width);
    if (const char* error = allow(v)) return error;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t configuration = configure(attribute, p.width, 1, v.shared, nullptr);
    return message(cudaOccupancyMaxActiveClusters(&p.clusters, v.kernel, &configuration));
}

const char* launch(const AkGradCentres& p, const AkWhere& where) {
    static const Encode encode = encode_function();
    if (!encode) return kNoMaps;
    GradientParameters parameters = {p, {}, {}};
    if (!describe(encode, parameters.terms, p.terms, kDeep) ||
        !describe(encode, parameters.x_factored, p.x_factored, kDeep))
        return kRefused;
    const int64_t width = p.x_factored.columns, tiles = (p.weight.rows + kTogether - 1) / kTogether;
    const Variant v = variant(p.weight.type, width);
    cudaLaunchAttribute attribute;
    const int clusters = int(tiles < p.clusters ? tiles : p.clusters);
    const cudaLaunchConfig_t configuration = configure(attribute, width, clusters, v.shared, where.stream);
    return message(cudaLaunchKernelEx(&configuration, v.kernel, parameters));
}

void block(AkBlock& p) { p.threads = kThreads, p.bytes = variant(AK_FLOAT32, p.width).shared; }

}  // namespace
}  // namespace sm90

const GradientKernel hopper_gradient = {sm90::check, sm90::tiling, sm90::launch, sm90::block, sm90::kWidest};

}  // namespace ak

#endif
