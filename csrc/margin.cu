// Piece 3 of a step for a constant margin: the loss and its derivatives from z, a row a thread.
#include "arithmetic.h"
#include "elements.cuh"
#include "launch.cuh"

namespace ak {
namespace {

constexpr int kThreads = 128;

__global__ void constant_margin(AkMargin p) {
    int share = p.mean ? 0 : threadIdx.x == 0;  // of the rows that are divided by
    for (int64_t row = threadIdx.x; p.mean && row < p.batch; row += kThreads) share += p.labels[row] >= 0;
    const int rows = block_sum(share);
    const double count = rows > 0 ? rows : 1;
    const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (row >= p.batch) return;
    const int64_t label = p.labels[row];
    MarginRow out = {0, 0, 0, 0};
    if (label >= 0) {
        const double cosine = label < p.classes ? double(p.cosine[row]) : NAN;  // out of range: no silent wrong number
        out = additive_margin(p.z[row], p.shift[row], cosine, scale_of(p.scale, p.norm[row]), p.margin);
    }
    p.loss[row] = float(out.loss / count);
    p.derivatives[row] = float(out.by_log_z / count);
    p.derivatives[p.batch + row] = float(out.by_cosine / count);
    p.derivatives[2 * p.batch + row] = float(out.by_scale / count);
}

}  // namespace
}  // namespace ak

extern "C" {

const char* ak_constant_margin(const AkMargin* p, const AkWhere* where) {
    ak::DeviceGuard guard(where->device);
    if (guard.error()) return guard.error();
    const unsigned blocks = unsigned((p->batch + ak::kThreads - 1) / ak::kThreads);
    if (blocks == 0) return nullptr;
    AK_LAUNCH(ak::constant_margin, blocks, ak::kThreads, 0, static_cast<cudaStream_t>(where->stream), *p);
    return ak::launch_error();
}
}
