// Launches Hopper's cosine kernel (kernel_sm90.cuh): its matrices as bulk copies see them, its clusters and its variants.
// Built only with CUTLASS's headers.
#ifdef AK_CUTLASS

#include "kernel_sm90.cuh"
//
#include "cosine.h"
#include "launch.cuh"
#include "launch_sm90.cuh"

namespace ak {
namespace sm90 {
namespace {

using Kernel = void (*)(Parameters);

struct Variant {
    Kernel kernel;
    int shared;
};

template <class T, bool GENERAL, bool STAYS>
Variant variant() {
    return {cosine_exp<T, GENERAL, STAYS>, int(sizeof(Shared<T, STAYS>))};
}

template <class T>
Variant variant(bool general, int64_t width) {
    const bool stays = width <= kMostSteps * kDepth<T>;
    if (general) return stays ? variant<T, true, true>() : variant<T, true, false>();
    return stays ? variant<T, false, true>() : variant<T, false, false>();
}

Variant variant(int32_t type, bool general, int64_t width) {
    switch (type) {
        case AK_FLOAT16: return variant<cutlass::half_t>(general, width);
        case AK_BFLOAT16: return variant<cutlass::bfloat16_t>(general, width);
        default: return variant<cutlass::tfloat32_t>(general, width);
    }
}

// The grid's first side: blocks of rows, whole clusters of them.
cudaLaunchConfig_t configure(cudaLaunchAttribute& attribute, int64_t batch, int streams, int shared, void* stream) {
    const int cluster = cluster_of(batch);
    const int64_t clusters = (batch + cluster * kRows - 1) / (cluster * kRows);
    return configure(attribute, dim3(unsigned(clusters * cluster), unsigned(streams)), dim3(unsigned(cluster)), shared, stream);
}

const char* check() {
    for (int32_t type : {AK_FLOAT16, AK_BFLOAT16, AK_TFLOAT32})
        for (bool general : {false, true})
            for (int64_t width : {16, 1024})
                if (const char* error = allow(variant(type, general, width))) return error;
    return encode_function() ? nullptr : kNoMaps;
}

const char* tiling(AkTiling& p) {
    const int cluster = cluster_of(p.batch);
    p.rows = cluster * kRows, p.classes = kClasses, p.parts = kParts;
    const Variant v = variant(p.type, false, p.width);
    if (const char* error = allow(v)) return error;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t configuration = configure(attribute, p.batch, 1, v.shared, nullptr);
    return message(cudaOccupancyMaxActiveClusters(&p.blocks, v.kernel, &configuration));
}

const char* launch(const AkCosine& p, const AkWhere& where) {
    static const Encode encode = encode_function();
    if (!encode) return kNoMaps;
    if (p.parts % kParts) return "an odd number of partial sums";
    const bool filter = p.filter <= 1.0f, general = filter || p.best;
    Parameters parameters = {p, {}, {}, {}};
    if (!filter) parameters.p.filter = INFINITY;
    if (!describe(encode, parameters.x_hat, p.x_hat, kRows) || !describe(encode, parameters.w_hat, p.w_hat, kClasses / 2) ||
        (p.terms.data && !describe(encode, parameters.terms, p.terms, kBoxRows)))
        return kRefused;
    const Variant v = variant(p.x_hat.type, general, p.x_hat.columns);
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t configuration =
        configure(attribute, p.x_hat.rows, p.parts / kParts, v.shared, where.stream);
    return message(cudaLaunchKernelEx(&configuration, v.kernel, parameters));
}

void block(AkBlock& p) { p.threads = kThreads, p.bytes = variant(p.type, false, p.width).shared; }

}  // namespace
}  // namespace sm90

const CosineKernel hopper_cosine = {sm90::check, sm90::tiling, sm90::launch, sm90::block};

}  // namespace ak

#endif
